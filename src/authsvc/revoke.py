"""RevokeToken (RFC 7009): durable at the answer, and what is not ours to kill stays alive."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.store.port import Change
from authsvc_client.core.judge import Judge
from authsvc_client.core.markers import MarkerKind, marker_key

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Revocation:
    """What died, or would; `revision` is 0 where nothing was written."""

    revision: int
    jtis: tuple[str, ...]


class RevokeToken:
    """Revokes access tokens."""

    def __init__(
        self,
        judge: Judge,
        append: Callable[[Sequence[Change]], Awaitable[int]],
        reach: Callable[[int], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._judge = judge
        self._append = append
        self._reach = reach
        self._clock = clock

    async def by_token(self, token: str, client_id: str, *, dry: bool) -> Revocation:
        """By the client that the token was issued to.

        Forged, foreign and expired tokens write nothing and are fine (RFC 7009 section 2.2).
        Raises AuthError TOKEN_NOT_OWNED, STORE_UNAVAILABLE, COMMIT_UNKNOWN, and StateStale.
        """
        verified = self._judge.identify(token, self._clock.boot())
        if verified is None:
            return Revocation(0, ())
        if verified.claims.client_id != client_id:
            raise AuthError(Reason.TOKEN_NOT_OWNED)
        return await self._kill(verified.claims.jti, dry=dry)

    async def by_jti(self, jti: str, *, dry: bool) -> Revocation:
        """By an administrator, who need not hold the token. Raises AuthError as `by_token`."""
        return await self._kill(jti, dry=dry)

    async def _kill(self, jti: str, *, dry: bool) -> Revocation:
        if dry:
            return Revocation(0, (jti,))
        kind = MarkerKind.TOKEN_DEAD
        revision = await self._append([(kind, marker_key(kind, jti))])
        log.info("token.revoked", jti=jti, revision=revision)
        await self._reach(revision)
        return Revocation(revision, (jti,))
