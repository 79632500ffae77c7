"""How often one caller may call: which limit a method has, and who is counted."""

from collections.abc import Mapping
from enum import StrEnum

from google.protobuf.descriptor import MethodDescriptor

from authsvc.cache.port import Rate, RateLimits
from authsvc.clock import Clock
from authsvc.config import Limits
from authsvc.errors import AuthError, Reason
from authsvc.telemetry import Counters
from authsvc_client.core.cache import BytesCache

AWAY_BYTES_MAX = 2**20
_ENTRY_BYTES = 256


class Limit(StrEnum):
    """The limits, by their settings."""

    TOKENS = "tokens"
    REVOCATIONS = "revocations"
    REGISTRATIONS = "registrations"
    ADMINISTRATION = "administration"
    REFUSED = "refused"


_OF_METHODS: Mapping[str, Limit | None] = {
    "IssueToken": Limit.TOKENS,
    "RefreshToken": Limit.TOKENS,
    "RevokeToken": Limit.REVOCATIONS,
    "RegisterClient": Limit.REGISTRATIONS,
    # Each request of each service asks these: they wait for nothing.
    "ValidateToken": None,
    "BatchValidateTokens": None,
    "WatchChanges": None,
    "GetKeys": None,
}
_OF_SERVICES: Mapping[str, Limit] = {
    "RevocationService": Limit.REVOCATIONS,
    "ClientService": Limit.ADMINISTRATION,
    "ResourceService": Limit.ADMINISTRATION,
    "UserService": Limit.ADMINISTRATION,
    "RoleService": Limit.ADMINISTRATION,
    "SessionService": Limit.ADMINISTRATION,
    "KeyService": Limit.ADMINISTRATION,
    "AuditService": Limit.ADMINISTRATION,
    "ExplainService": Limit.ADMINISTRATION,
}
STRANGERS = frozenset(
    {
        Reason.PEER_CERTIFICATE_MISSING,
        Reason.CALLER_UNKNOWN,
        Reason.CALLER_TOKEN_INVALID,
        Reason.CLIENT_AUTHENTICATION_FAILED,
        Reason.AUTH_METHOD_NOT_REGISTERED,
        Reason.CLIENT_PENDING,
        Reason.CLIENT_REJECTED,
        Reason.CLIENT_EXPIRED,
        Reason.CLIENT_SUSPENDED,
        Reason.INSUFFICIENT_SCOPE,
        Reason.REGISTRATION_NOT_ALLOWED,
        Reason.REGISTRATION_TOKEN_INVALID,
    }
)
"""Refusals of the caller itself. A wrong password or grant says nothing against who brings it."""


def rates_of(limits: Limits) -> dict[Limit, Rate]:
    """Those of the settings, without what has no limit."""
    return {
        limit: Rate(per_minute, max(1, round(per_minute * limits.burst_s / 60)))
        for limit in Limit
        if (per_minute := getattr(limits, limit))
    }


def limit_of(method: MethodDescriptor) -> Limit | None:
    """The limit of a method; KeyError where nobody said which."""
    service = method.containing_service.name
    return _OF_METHODS[method.name] if service == "AuthService" else _OF_SERVICES[service]


class Rates:
    """The limits of a server. A method without one is not touched."""

    def __init__(
        self, limits: RateLimits, rates: Mapping[Limit, Rate], exceeded: Counters, clock: Clock
    ) -> None:
        """`rates` of those limits that there are; `exceeded` counts by their names."""
        self._limits = limits
        self._rates = rates
        self._exceeded = exceeded
        self._clock = clock
        self._away: BytesCache[str, float] = BytesCache(AWAY_BYTES_MAX)
        """Who failed too often, and until when it is sent away, by the boot-time clock."""

    def limit_of(self, method: MethodDescriptor) -> Limit | None:
        """The limit of a method, where this server has one for it, or for those it refuses."""
        limit = limit_of(method)
        return limit if {limit, Limit.REFUSED} & self._rates.keys() else None

    def counts(self, limit: Limit) -> bool:
        """Whether calls are counted against it, not only those that are refused."""
        return limit in self._rates

    async def count(self, limit: Limit, who: str) -> None:
        """Counts a call; AuthError RATE_LIMITED where it is one too many."""
        rate = self._rates.get(limit)
        if rate is not None and (wait_s := await self._limits(limit, who, rate)):
            raise self._too_many(limit, rate, wait_s)

    def away_s(self, who: str) -> float:
        """Seconds for which who failed too often is still sent away; 0 for others."""
        until = self._away.get(who)
        return max(0.0, until - self._clock.boot()) if until is not None else 0.0

    def turn_away(self, who: str) -> None:
        """Raises AuthError RATE_LIMITED for who failed too often: it is not even looked at."""
        if wait_s := self.away_s(who):
            raise self._too_many(Limit.REFUSED, self._rates[Limit.REFUSED], wait_s)

    async def failed(self, who: str, error: AuthError) -> None:
        """Counts a call that was refused for who made it."""
        rate = self._rates.get(Limit.REFUSED)
        if rate is None or error.reason not in STRANGERS:
            return
        if wait_s := await self._limits(Limit.REFUSED, who, rate):
            self._away.put(who, self._clock.boot() + wait_s, _ENTRY_BYTES + len(who))

    def _too_many(self, limit: Limit, rate: Rate, wait_s: float) -> AuthError:
        self._exceeded.labels(limit).inc()
        about = {"limit": str(rate.per_minute)}
        return AuthError(
            Reason.RATE_LIMITED, f"{limit} of this caller", metadata=about, retry_after_s=wait_s
        )
