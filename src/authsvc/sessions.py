"""Grants, listed and ended. Sessions come with people."""

from collections.abc import Awaitable, Callable, Sequence

import structlog

from authsvc.errors import AuthError, Reason
from authsvc.model import Grant
from authsvc.store.port import Change, GrantFilter, GrantStore, change
from authsvc_client.core.markers import MarkerKind

log = structlog.get_logger()


class Sessions:
    """What clients got for their subjects, as an administrator sees it."""

    def __init__(
        self,
        grants: GrantStore,
        append: Callable[[Sequence[Change]], Awaitable[int]],
        reach: Callable[[int], Awaitable[None]],
    ) -> None:
        self._grants = grants
        self._append = append
        self._reach = reach

    async def page_of_grants(
        self, wanted: GrantFilter, after: str, limit: int
    ) -> tuple[Grant, ...]:
        """Living grants, the newest first, from the one after the place `after`, if any."""
        time, _, grant_id = after.partition(" ")
        place = (float(time), grant_id) if after else None
        return await self._grants.page(wanted, place, limit)

    async def end_grant(self, grant_id: str, by: str) -> int:
        """Ends a living grant and answers the revision.

        Raises AuthError GRANT_NOT_FOUND, STORE_UNAVAILABLE, COMMIT_UNKNOWN.
        """
        if await self._grants.living(grant_id) is None:
            raise AuthError(Reason.GRANT_NOT_FOUND)
        revision = await self._append([change(MarkerKind.GRANT_DEAD, grant_id)])
        log.info("grant.ended", grant=grant_id, by=by, revision=revision)
        await self._reach(revision)
        return revision


def place_of(grant: Grant) -> str:
    """Its place in the list, for `page_of_grants`."""
    return f"{grant.create_time!r} {grant.grant_id}"
