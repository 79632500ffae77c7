"""RevokeToken (RFC 7009): durable at the answer, and what is not ours to kill stays alive."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from authsvc.errors import AuthError, Reason
from authsvc.keys.refresh import RefreshKeys
from authsvc.store.port import Change, GrantStore, change
from authsvc_client.core.judge import Verified
from authsvc_client.core.markers import MarkerKind

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Revocation:
    """What died, or would; `revision` is 0 where nothing was written."""

    revision: int
    killed: tuple[Change, ...]


class RevokeToken:
    """Revokes tokens of any kind; a refresh token dies with its grant."""

    def __init__(
        self,
        alive: Callable[[str], Awaitable[Verified | None]],
        keys: RefreshKeys,
        grants: GrantStore,
        append: Callable[[Sequence[Change]], Awaitable[int]],
        reach: Callable[[int], Awaitable[None]],
    ) -> None:
        """`alive` finds an access token or API key that is alive now, whoever presents it."""
        self._alive = alive
        self._keys = keys
        self._grants = grants
        self._append = append
        self._reach = reach

    async def by_token(self, token: str, client_id: str, *, dry: bool) -> Revocation:
        """By the client that the token was issued to.

        Forged, foreign and expired tokens write nothing and are fine (RFC 7009 section 2.2).
        Raises AuthError TOKEN_NOT_OWNED, STORE_UNAVAILABLE, COMMIT_UNKNOWN, and StateStale.
        """
        owner, dies = await self._find(token)
        if dies is None:
            return Revocation(0, ())
        if owner != client_id:
            raise AuthError(Reason.TOKEN_NOT_OWNED)
        return await self._kill(dies, dry=dry)

    async def by_jti(self, jti: str, *, dry: bool) -> Revocation:
        """By an administrator, who need not hold the token. Raises AuthError as `by_token`."""
        return await self._kill(change(MarkerKind.TOKEN_DEAD, jti), dry=dry)

    async def _find(self, token: str) -> tuple[str, Change | None]:
        """Whose it is, and what to mark dead; None where there is nothing alive."""
        presented = self._keys.read(token)
        if presented is not None:
            grant = await self._grants.by_handle(presented.handle)
            if grant is None:
                return "", None
            return grant.client_id, change(MarkerKind.GRANT_DEAD, grant.grant_id)
        verified = await self._alive(token)
        if verified is None:
            return "", None
        return verified.claims.client_id, change(MarkerKind.TOKEN_DEAD, verified.claims.jti)

    async def _kill(self, dies: Change, *, dry: bool) -> Revocation:
        if dry:
            return Revocation(0, (dies,))
        revision = await self._append([dies])
        log.info("token.revoked", kind=dies.kind.name, id=dies.ids[0], revision=revision)
        await self._reach(revision)
        return Revocation(revision, (dies,))
