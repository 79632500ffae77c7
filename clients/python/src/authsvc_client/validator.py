"""Tokens judged in this very process: microseconds each, and a revocation is seen in milliseconds.

Keys and all that can kill a token come over one stream; what is not in there authsvc is asked.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import TracebackType
from typing import Self

import grpc

from . import clock
from .client import AuthsvcClient
from .core.cache import BytesCache
from .core.judge import ANY_AUDIENCE, Judge, Question, Verdict
from .core.markers import STALENESS_S_MAX, STALENESS_S_MIN
from .core.reason import Reason
from .core.state import State, StateStale
from .core.step_up import NO_STEP_UP, StepUp
from .core.watched import Watched
from .errors import Unavailable
from .messages import RemoteVerdict, is_jwt
from .staleness import CLOSED, WhenStale
from .watcher import Watcher

STALENESS_S = 120.0
ASKING_MAX = 64
"""Tokens that authsvc may be asked about at once because their key is not known here."""
REFUSED_BYTES_MAX = 2**23
"""Of tokens that authsvc refused as revoked."""
_ENTRY_BYTES = 256
_REVOKED = frozenset(
    {
        Reason.TOKEN_REVOKED,
        Reason.SESSION_ENDED,
        Reason.GRANT_REVOKED,
        Reason.TOKEN_CUT_OFF,
        Reason.TOKEN_KEY_TAINTED,
    }
)
_ANY = frozenset({ANY_AUDIENCE})

_log = logging.getLogger("authsvc_client")


@lru_cache(maxsize=4096)  # a service asks for the same of the same callers again and again
def question_of(
    audience: str,
    scopes: frozenset[str],
    thumbprint: str,
    require_bound: bool,
    step_up: StepUp,
    permissions: frozenset[str],
) -> Question:
    """ValueError without an audience: tokens for other services would do."""
    if not audience:
        raise ValueError("audience: is empty")
    return Question(_ANY, audience, scopes, thumbprint, require_bound, step_up, permissions)


class Counts:
    """How tokens were judged; read it for metrics."""

    __slots__ = ("local", "opened", "refused", "remote")

    def __init__(self) -> None:
        self.local = 0
        """In this process."""
        self.remote = 0
        """By asking authsvc."""
        self.opened = 0
        """Of the local ones, by a state older than allowed (WhenStale.open_s)."""
        self.refused = 0
        """Not at all: the state was too old."""


class Local:
    """What both validators do without waiting for anything."""

    def __init__(
        self,
        issuer: str,
        *,
        staleness_max_s: float,
        when_stale: WhenStale,
        now: Callable[[], float],
    ) -> None:
        """ValueError for a bound that no deployment may have either."""
        if not STALENESS_S_MIN <= staleness_max_s <= STALENESS_S_MAX:
            raise ValueError(f"staleness_max_s: not within {STALENESS_S_MIN} and {STALENESS_S_MAX}")
        self.state = State(staleness_max_s)
        self.counts = Counts()
        self._judge = Judge(issuer, self.state).__call__  # to call the object takes longer
        self._when_stale, self._now = when_stale, now
        self._is_degraded = False
        self.asking = 0
        """Tokens that authsvc is being asked about."""
        self._refused: BytesCache[str, Reason] = BytesCache(REFUSED_BYTES_MAX)
        """As revoked, by authsvc: it may know before this state, and one replica before another."""
        self._refused_at = 0.0
        """When the last of them was; 0 where all that is dead is known here."""

    def age_s(self) -> float:
        """Seconds since the state was confirmed; infinite before the first time."""
        return self.state.age(self._now())

    def judge(
        self, token: str, question: Question, when_stale: WhenStale | None = None
    ) -> Verdict | None:
        """The verdict; None where authsvc has to be asked. Raises Unavailable."""
        if question.permissions:
            return None
        boot = self._now()
        try:
            verdict = self._judge(token, question, boot)
        except StateStale as stale:
            return self._stale(token, question, boot, stale, when_stale or self._when_stale)
        if self._is_degraded:
            self._is_degraded = False
            _log.info("tokens are judged by a confirmed state again")
        if verdict.reason and self._is_unknown(token, verdict.reason):
            return None
        self.counts.local += 1
        return self._settled(token, verdict) if self._refused_at else verdict

    def _settled(self, token: str, verdict: Verdict) -> Verdict:
        """What authsvc refused as revoked is not accepted by a state that is older than that."""
        if (self.state.confirmed or 0.0) > self._refused_at:
            self._refused_at = 0.0
        reason = self._refused.get(token) if verdict.active else None
        if reason is None:
            return verdict
        return Verdict(reason, verdict.revision, verdict.check_time, verdict.check_time)

    def _is_unknown(self, token: str, reason: Reason) -> bool:
        """Whether authsvc may know more of a token that does not hold here."""
        if reason is Reason.TOKEN_MALFORMED:
            return not is_jwt(token)
        # Its key may have been published a moment ago.
        return reason is Reason.TOKEN_KEY_UNKNOWN and self.asking < ASKING_MAX

    def asks(self) -> int:
        """One token more is asked about; `asking` is one less when that is over. The revision that
        whoever answers has to know: a replica may be behind, and what is dead here is dead there.
        """
        self.asking += 1
        self.counts.remote += 1
        return self.state.revision

    def told(self, token: str, reason: Reason) -> Reason:
        """What counts of what authsvc answered: a token that it once refused as revoked is dead."""
        if reason in _REVOKED:
            self._refused.put(token, reason, len(token) + _ENTRY_BYTES)
            self._refused_at = self._now()
        return reason or self._refused.get(token) or reason

    def _stale(
        self, token: str, question: Question, boot: float, stale: StateStale, then: WhenStale
    ) -> Verdict | None:
        if not is_jwt(token):
            return None
        if not self._is_degraded:
            self._is_degraded = True
            _log.warning(
                "no confirmed state for %.1f s: tokens are judged as settings say", stale.age_s
            )
        if then.open_s:
            try:
                verdict = self._judge(token, replace(question, open_s=then.open_s), boot)
            except StateStale:
                pass
            else:
                self.counts.local += 1
                self.counts.opened += 1
                return self._settled(token, verdict)
        if then.remote:
            return None
        self.counts.refused += 1
        raise Unavailable(
            f"the state was not confirmed for {stale.age_s:.1f} s",
            code=grpc.StatusCode.UNAVAILABLE,
            reason=Reason.STATE_STALE,
        ) from stale


class LocalValidator:
    """A Validator that judges by itself.

    It asks authsvc about opaque and encrypted tokens and API keys, about live permissions, and
    where a token's key is not known here. Past `staleness_max_s` without a confirmation
    `when_stale` decides. `async with` it, or `start` and `close`.
    """

    def __init__(
        self,
        client: AuthsvcClient,
        *,
        issuer: str,
        staleness_max_s: float = STALENESS_S,
        when_stale: WhenStale = CLOSED,
        now: Callable[[], float] = clock.boot,
    ) -> None:
        """`client` is one with the scopes `watch` and `validate`; it is closed by its owner."""
        self._client = client
        self._local = Local(issuer, staleness_max_s=staleness_max_s, when_stale=when_stale, now=now)
        self._watcher = Watcher(client.stub, Watched(self._local.state), now=now)

    @property
    def counts(self) -> Counts:
        """How tokens were judged."""
        return self._local.counts

    @property
    def revision(self) -> int:
        """Of the last change that was applied."""
        return self._local.state.revision

    def age_s(self) -> float:
        """Seconds since the state was confirmed; infinite before the first time."""
        return self._local.age_s()

    def start(self) -> None:
        """Begins to watch, in the running loop."""
        self._watcher.start()

    async def ready(self, timeout_s: float = 10.0) -> None:
        """Waits until tokens can be judged; TimeoutError where that takes too long."""
        async with asyncio.timeout(timeout_s):
            await self._watcher.confirmed()

    async def validate(
        self,
        token: str,
        *,
        audience: str,
        scopes: frozenset[str] = frozenset(),
        thumbprint: str = "",
        require_bound: bool = False,
        permissions: frozenset[str] = frozenset(),
        step_up: StepUp = NO_STEP_UP,
        when_stale: WhenStale | None = None,
    ) -> Verdict | RemoteVerdict:
        """Raises Unavailable where the state is too old and AuthsvcError of a remote call."""
        local = self._local
        question = question_of(audience, scopes, thumbprint, require_bound, step_up, permissions)
        verdict = local.judge(token, question, when_stale)
        if verdict is not None:
            return verdict
        revision = local.asks()
        try:
            found = await self._client.validate(
                token,
                audience=audience,
                scopes=scopes,
                thumbprint=thumbprint,
                require_bound=require_bound,
                permissions=permissions,
                step_up=step_up,
                at_least=revision,
            )
        finally:
            local.asking -= 1
        return found.but(local.told(token, found.reason))

    async def close(self) -> None:
        """Ends the stream."""
        await self._watcher.stop()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()
