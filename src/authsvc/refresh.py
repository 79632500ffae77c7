"""RefreshToken (RFC 6749 section 6): the refresh token of a grant, used."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from authsvc.authenticate import Authenticate, Credentials
from authsvc.errors import AuthError, Reason
from authsvc.keys.refresh import RefreshKeys
from authsvc.mint import GrantLife, Mint, TokenAnswer
from authsvc.model import AuthMethod, Catalog, Grant, GrantType, Peer
from authsvc.oauth.policy import require_grant, require_let_in
from authsvc.oauth.resources import Target, pick
from authsvc.oauth.scopes import narrow
from authsvc.store.port import GrantStore, Reused, Use

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RefreshRequest:
    """What both edges decode a RefreshToken into."""

    refresh_token: str = field(repr=False)
    credentials: Credentials
    scopes: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()


class RefreshToken:
    """Uses refresh tokens."""

    def __init__(
        self,
        issuer: str,
        authenticate: Authenticate,
        store: GrantStore,
        keys: RefreshKeys,
        life: GrantLife,
        catalog: Callable[[], Awaitable[Catalog]],
        reach: Callable[[int], Awaitable[None]],
        mint: Mint,
    ) -> None:
        self._issuer = issuer
        self._authenticate = authenticate
        self._store = store
        self._keys = keys
        self._life = life
        self._catalog = catalog
        self._reach = reach
        self._mint = mint

    async def __call__(self, request: RefreshRequest, peer: Peer) -> TokenAnswer:
        """Raises AuthError with the reasons of the contract, and StateStale."""
        moment = self._mint.begin()
        presented = self._keys.read(request.refresh_token)
        if presented is None:
            raise AuthError(Reason.INVALID_GRANT, cause="not a refresh token of ours")
        who = await self._authenticate(request.credentials, peer)
        client = who.client
        require_let_in(client, moment.now)
        require_grant(client, GrantType.REFRESH_TOKEN)
        is_public = who.method is AuthMethod.NONE
        sender = peer.thumbprint if is_public else client.client_id
        grant = await self._use(
            Use(
                handle=presented.handle,
                generation=presented.generation,
                key_id=presented.key_id,
                client_id=client.client_id,
                sender=sender,
                may_repeat=bool(sender),
                next_key_id=self._keys.current,
                idle_s=self._life.idle_s,
            )
        )
        target = await self._target(request, grant, who.scopes)
        answer = await self._mint(
            moment,
            client,
            peer,
            replace(grant.origin, grant_id=grant.grant_id),
            target,
            expires=grant.expire_time,
            revision=grant.rev,
        )
        return replace(answer, refresh_token=self._successor(grant))

    async def _use(self, use: Use) -> Grant:
        used = await self._store.use(use)
        if isinstance(used, Reused):
            log.warning("grant.reused", grant=used.grant_id, client=use.client_id)
            await self._reach(used.revision)
            raise AuthError(Reason.REFRESH_TOKEN_REUSED)
        if used is None:
            raise AuthError(Reason.INVALID_GRANT)
        return used

    async def _target(
        self, request: RefreshRequest, grant: Grant, registered: frozenset[str]
    ) -> Target:
        """Fewer scopes and audiences for this access token; the grant keeps its own."""
        for resource in request.resources:
            if resource not in grant.audiences:
                raise AuthError(Reason.INVALID_TARGET, metadata={"resource": resource})
        catalog = await self._catalog()
        # A scope that went over to another resource since is not the grant's any more.
        owned = {s for s in grant.scopes if catalog.owner_of_scope.get(s) in grant.audiences}
        scopes = narrow(request.scopes, registered & owned, catalog)
        owners = {catalog.owner_of_scope[scope] for scope in scopes}
        is_login = grant.grant_type is GrantType.PASSWORD
        bare = frozenset({self._issuer}) if is_login else frozenset()
        resources = request.resources or [a for a in grant.audiences if a in owners | bare]
        return pick(resources, scopes, bool(request.scopes), catalog, self._issuer, bare)

    def _successor(self, grant: Grant) -> str:
        try:
            return self._keys.mint(grant.handle, grant.generation, grant.key_id)
        except LookupError as error:  # another worker has a newer key already
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="no key of the successor") from error
