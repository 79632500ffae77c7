"""Where people are logged in, and what clients got for their subjects: listed and ended."""

from collections.abc import Awaitable, Callable, Sequence

import structlog

from authsvc.errors import AuthError, Reason
from authsvc.model import Grant, Session, User
from authsvc.store.port import Change, GrantFilter, GrantStore, SessionStore, change
from authsvc_client.core.markers import MarkerKind

log = structlog.get_logger()


class Sessions:
    """Sessions and grants, as an administrator sees them."""

    def __init__(
        self,
        sessions: SessionStore,
        grants: GrantStore,
        user: Callable[[str], Awaitable[User | None]],
        append: Callable[[Sequence[Change]], Awaitable[int]],
        reach: Callable[[int], Awaitable[None]],
    ) -> None:
        self._sessions = sessions
        self._grants = grants
        self._user = user
        self._append = append
        self._reach = reach

    async def page(self, user_id: str, after: str, limit: int) -> tuple[Session, ...]:
        """Living sessions, the newest first, from the one after the place `after`, if any."""
        return await self._sessions.page(user_id, _place(after), limit)

    async def page_of_grants(
        self, wanted: GrantFilter, after: str, limit: int
    ) -> tuple[Grant, ...]:
        """Living grants, the newest first, from the one after the place `after`, if any."""
        return await self._grants.page(wanted, _place(after), limit)

    async def end(self, session_id: str, by: str) -> int:
        """Ends a living session and answers the revision.

        Raises AuthError SESSION_NOT_FOUND, STORE_UNAVAILABLE, COMMIT_UNKNOWN.
        """
        if await self._sessions.living(session_id) is None:
            raise AuthError(Reason.SESSION_NOT_FOUND)
        return await self._kill(change(MarkerKind.SESSION_DEAD, session_id), by)

    async def end_grant(self, grant_id: str, by: str) -> int:
        """Ends a living grant and answers the revision.

        Raises AuthError GRANT_NOT_FOUND, STORE_UNAVAILABLE, COMMIT_UNKNOWN.
        """
        if await self._grants.living(grant_id) is None:
            raise AuthError(Reason.GRANT_NOT_FOUND)
        return await self._kill(change(MarkerKind.GRANT_DEAD, grant_id), by)

    async def sign_out_everywhere(self, user_id: str, by: str) -> int:
        """Cuts off all that a user has, who may log in again; answers the revision.

        Raises AuthError USER_NOT_FOUND, STORE_UNAVAILABLE, COMMIT_UNKNOWN.
        """
        if await self._user(user_id) is None:
            raise AuthError(Reason.USER_NOT_FOUND)
        return await self._kill(change(MarkerKind.CUTOFF_SUBJECT, user_id), by)

    async def _kill(self, marker: Change, by: str) -> int:
        revision = await self._append([marker])
        log.info(
            "session.killed", kind=marker.kind.name, id=marker.ids[0], by=by, revision=revision
        )
        await self._reach(revision)
        return revision


def _place(after: str) -> tuple[float, str] | None:
    time, _, found = after.partition(" ")
    return (float(time), found) if after else None


def place_of(listed: Session | Grant) -> str:
    """Its place in the list, for the page after it."""
    listed_id = listed.session_id if isinstance(listed, Session) else listed.grant_id
    return f"{listed.create_time!r} {listed_id}"
