"""Who calls authsvc's own methods, and what the option `(authsvc.v1.require)` asks of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.descriptor import MethodDescriptor

from authsvc.acting import ITSELF
from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.identify import Identify
from authsvc.model import (
    ANY_AUDIENCE,
    OWN_SCOPES,
    AuthMethod,
    Caller,
    Catalog,
    CertificateIdentity,
    Client,
    IdentityKind,
    Peer,
)
from authsvc.oauth.policy import require_let_in, validated_by
from authsvc.store.cached import CachedCatalog, CachedClients
from authsvc_client.core.cache import BytesCache
from authsvc_client.core.judge import Question
from authsvc_client.core.markers import MarkerKind, marker_key
from authsvc_client.core.state import State
from authsvc_client.v1.annotations_pb2 import require

BEARER = "bearer "
_ADMIN_SCOPES = frozenset(OWN_SCOPES)
_ADMIN_AUDIENCES = frozenset({ANY_AUDIENCE})


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method asks of its caller."""

    public: bool
    scopes: frozenset[str]


def rule_of(method: MethodDescriptor) -> Rule:
    """The rule of a method; ValueError where it has none, or one that is not enforced here."""
    options = method.GetOptions()
    if not options.HasExtension(require):
        raise ValueError(f"{method.full_name}: no option (authsvc.v1.require)")
    rule = options.Extensions[require]
    names = {field.name for field, _ in rule.ListFields()}
    if names not in ({"public"}, {"scopes"}):
        raise ValueError(f"{method.full_name}: cannot enforce {sorted(names)}")
    return Rule(rule.public, frozenset(rule.scopes))


@dataclass(eq=False, slots=True)
class Grounds:
    """What a client was found by, and may be again as long as it stands."""

    caller: Caller
    client: Client
    catalog: Catalog
    key: bytes
    """Of the client's row."""
    since: float
    until: float
    """Within these the certificate leads to the client's own CA, and before the second one the
    client is approved."""
    changes: int = -1
    """How often clients or the catalog had changed when row and catalog were last looked at."""

    @classmethod
    def of(cls, client: Client, peer: Peer, catalog: Catalog) -> "Grounds":
        """Of a client by its certificate alone. KeyError for a peer that is not the client's."""
        audiences = validated_by(client, catalog)
        caller = Caller(client.client_id, client.client_id, client.metadata.scopes, audiences, peer)
        identity = client.metadata.identity
        path = peer.paths[identity.ca if identity is not None else ""]
        approved = client.approval_expire_time
        return cls(
            caller,
            client,
            catalog,
            marker_key(MarkerKind.CLIENT_CHANGED, client.client_id),
            path.not_before,
            path.not_after if approved is None else min(path.not_after, approved),
        )


class Callers(Protocol):
    """Says who calls."""

    async def __call__(self, rule: Rule, peer: Peer, authorization: str, now: float) -> Caller:
        """The caller, who may. Raises AuthError."""

    async def find(self, peer: Peer, authorization: str, now: float) -> Caller | None:
        """The caller, or None for a peer that is nobody yet."""

    def grounds(self, caller: Caller) -> Grounds | None:
        """What a caller was made of, if it came by its certificate alone and was just found."""

    def is_taken(self, name: str, peer: Peer, now: float) -> bool:
        """Whether another is known by this name in a peer's certificate."""


class Policy:
    """Finds the caller: an administrator of the settings, an approved client, or a bearer token."""

    def __init__(
        self,
        issuer: str,
        admins: frozenset[str],
        admin_ca: Callable[[], str | None],
        clients: CachedClients,
        catalog: CachedCatalog,
        identify: Identify,
        state: State,
        clock: Clock,
    ) -> None:
        """`admins` are SPIFFE IDs; `admin_ca` answers the CA that must have issued them, if any."""
        self._admins = admins
        self._admin_ca = admin_ca
        self._clients = clients
        self._catalog = catalog
        self._identify = identify
        self._state = state
        self._clock = clock
        self._question = Question(frozenset({issuer}), issuer)
        self._callers: BytesCache[str, Grounds] = BytesCache(2**23)

    async def __call__(self, rule: Rule, peer: Peer, authorization: str, now: float) -> Caller:
        """The caller, who may. Raises AuthError CALLER_UNKNOWN, CALLER_TOKEN_INVALID,
        INSUFFICIENT_SCOPE, or the reason for which the client is not let in.
        """
        caller = await self.find(peer, authorization, now)
        if caller is None:
            raise AuthError(Reason.CALLER_UNKNOWN)
        if not rule.scopes <= caller.scopes:
            missing = " ".join(sorted(rule.scopes - caller.scopes))
            raise AuthError(Reason.INSUFFICIENT_SCOPE, metadata={"scope": missing})
        return caller

    async def find(self, peer: Peer, authorization: str, now: float) -> Caller | None:
        """The caller, or None for a peer that is nobody yet."""
        if authorization:
            return await self._by_token(peer, authorization)
        if peer.spiffe_id in self._admins and self._is_admin(peer, now):
            return Caller(peer.spiffe_id, "", _ADMIN_SCOPES, _ADMIN_AUDIENCES, peer)
        client = self._clients.held(peer, now) or await self._clients.by_peer(peer, now)
        if client is None:
            return None
        require_let_in(client, now)
        catalog = await self._catalog()
        held = self._callers.get(peer.thumbprint)
        if (
            held is not None
            and held.caller.peer is peer
            and held.client is client
            and held.catalog is catalog
        ):
            return held.caller
        # None where it did not register its certificate as a way to authenticate.
        if AuthMethod.TLS_CLIENT_AUTH not in client.metadata.auth_methods:
            return None
        found = Grounds.of(client, peer, catalog)
        self._callers.put(peer.thumbprint, found, 4096)
        return found.caller

    def grounds(self, caller: Caller) -> Grounds | None:
        """See Callers."""
        held = self._callers.get(caller.peer.thumbprint)
        return held if held is not None and held.caller is caller else None

    def stand(self, grounds: Grounds, now: float) -> bool:
        """Whether the same caller would be found again, its peer being the same."""
        changes = self._clients.changes + self._catalog.changes
        if changes != grounds.changes:
            if self._clients.row(grounds.key) is not grounds.client:
                return False
            if self._catalog.held is not grounds.catalog:
                return False
            grounds.changes = changes
        return grounds.since <= now < grounds.until

    def is_taken(self, name: str, peer: Peer, now: float) -> bool:
        """Whether the audit knows another by this name in a peer's certificate: authsvc itself, or
        an administrator, whom not every CA can vouch for.
        """
        return name == ITSELF or (name in self._admins and not self._is_admin(peer, now))

    def _is_admin(self, peer: Peer, now: float) -> bool:
        ca = self._admin_ca()
        if ca is None:
            return False
        return CertificateIdentity(IdentityKind.SAN_URI, peer.spiffe_id, ca).matches(peer, now)

    async def _by_token(self, peer: Peer, authorization: str) -> Caller:
        """A bearer token for authsvc itself, bound or not; its client must still be let in."""
        if authorization[: len(BEARER)].lower() != BEARER:
            raise AuthError(Reason.CALLER_TOKEN_INVALID, metadata={"verdict": "TOKEN_MALFORMED"})
        question = Question(
            self._question.audiences, self._question.audience, thumbprint=peer.thumbprint
        )
        verdict = await self._identify(authorization[len(BEARER) :].strip(), question)
        claims = verdict.claims
        if not verdict.active or claims is None:
            raise AuthError(Reason.CALLER_TOKEN_INVALID, metadata={"verdict": verdict.reason.name})
        client = await self._clients.get(claims.client_id)
        if client is None:
            raise AuthError(Reason.CALLER_UNKNOWN)
        require_let_in(client, self._state.now(self._clock.boot()))
        audiences = validated_by(client, await self._catalog())
        # Who is spoken for by a client, or lent it a token, is not the client.
        is_client = claims.subject == client.client_id and not claims.actors
        return Caller(
            claims.actors[0] if claims.actors else claims.subject,
            client.client_id if is_client else "",
            claims.scopes,
            audiences,
            peer,
            claims.subject,
            claims.session_id,
        )
