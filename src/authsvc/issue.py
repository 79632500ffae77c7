"""IssueToken: authenticate the client, prove the grant, narrow, mint. No database when warm."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from authsvc.authenticate import Authenticate, Credentials
from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason, not_implemented
from authsvc.grants import GRANTS
from authsvc.keys.ring import KeyRing
from authsvc.keys.secrets import new_id
from authsvc.model import Catalog, GrantType, Peer
from authsvc.oauth.claims import access_token_claims
from authsvc.oauth.policy import require_grant, require_let_in
from authsvc.oauth.resources import pick
from authsvc.oauth.scopes import narrow
from authsvc_client.core.markers import SKEW_S
from authsvc_client.core.state import State

MINT_S_MAX = 10.0
"""A token that took longer to make is abandoned: its `rev` and `iat` would be too old."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What both edges decode an IssueToken into."""

    grant_type: GrantType
    credentials: Credentials
    scopes: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """An access token and what is said of it; times in seconds since the epoch."""

    access_token: str = field(repr=False)
    jti: str
    scopes: tuple[str, ...]
    audiences: tuple[str, ...]
    expires: int
    lifetime_s: int


class IssueToken:
    """Issues access tokens."""

    def __init__(
        self,
        issuer: str,
        authenticate: Authenticate,
        catalog: Callable[[], Awaitable[Catalog]],
        ring: KeyRing,
        state: State,
        clock: Clock,
    ) -> None:
        self._issuer = issuer
        self._authenticate = authenticate
        self._catalog = catalog
        self._ring = ring
        self._state = state
        self._clock = clock

    async def __call__(self, request: TokenRequest, peer: Peer) -> TokenAnswer:
        """Raises AuthError with the reasons of the contract, and StateStale.

        `rev` is the applied revision before the first authority is read: whatever is cut off
        while the token is made has a higher one, and the token is dead.
        """
        started = self._clock.boot()
        state = self._state
        state.require_fresh(started)
        revision, now = state.revision, state.now(started)
        if state.ahead(started) > SKEW_S:
            # Tokens made now would begin in the future, and outlive their dead marks.
            raise AuthError(Reason.STATE_STALE, "the database's clock went back", retry_after_s=1.0)
        grant = GRANTS.get(request.grant_type)
        if grant is None:
            raise not_implemented(f"grant {request.grant_type.name.lower()}")
        client = await self._authenticate(request.credentials, peer, self._clock.wall())
        require_let_in(client, now)
        require_grant(client, request.grant_type)
        subject = await grant(client)
        catalog = await self._catalog()
        scopes = narrow(request.scopes, client.metadata.scopes, catalog)
        target = pick(request.resources, scopes, bool(request.scopes), catalog, self._issuer)
        jti = new_id()
        claims = access_token_claims(
            issuer=self._issuer,
            client=client,
            subject=subject,
            target=target,
            jti=jti,
            now=int(now),
            revision=revision,
            thumbprint=peer.thumbprint if client.metadata.bound_access_tokens else "",
        )
        token = self._ring.signer.sign(claims)
        if self._clock.boot() - started > MINT_S_MAX:
            raise AuthError(Reason.MINT_ABANDONED)
        return TokenAnswer(
            token,
            jti,
            tuple(sorted(target.scopes)),
            target.audiences,
            int(now) + target.lifetime_s,
            target.lifetime_s,
        )
