"""Revocations: dead marks and cutoffs set by hand, durable at the answer."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from authsvc.errors import AuthError, Reason
from authsvc.model import Client, User
from authsvc.store.port import Change, Impact, RevocationStore, change
from authsvc_client.core.markers import MarkerKind

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Order:
    """Who asks for a revocation, why, and whether only to be told what it would do."""

    by: str
    comment: str
    dry: bool


@dataclass(frozen=True, slots=True)
class Made:
    """A marker and what it killed, or would; `revision` is 0 where nothing was written."""

    marker: Change
    revision: int
    impact: Impact | None
    """None where it could not be counted: a revocation does not wait for that."""


class Revocations:
    """Sets markers. Each method raises AuthError STORE_UNAVAILABLE and COMMIT_UNKNOWN."""

    def __init__(
        self,
        store: RevocationStore,
        client: Callable[[str], Awaitable[Client | None]],
        user: Callable[[str], Awaitable[User | None]],
        append: Callable[[Sequence[Change]], Awaitable[int]],
        reach: Callable[[int], Awaitable[None]],
    ) -> None:
        self._store = store
        self._client = client
        self._user = user
        self._append = append
        self._reach = reach

    async def everything(self, order: Order) -> Made:
        """All that was ever issued."""
        return await self._make(change(MarkerKind.CUTOFF_EVERYTHING), order)

    async def client(self, client_id: str, order: Order) -> Made:
        """All that was issued to a client. Raises AuthError CLIENT_NOT_FOUND."""
        await self._require_client(client_id)
        return await self._make(change(MarkerKind.CUTOFF_CLIENT, client_id), order)

    async def subject(self, subject: str, order: Order) -> Made:
        """All that was issued for a subject. Raises AuthError SUBJECT_NOT_FOUND."""
        await self._require_subject(subject)
        return await self._make(change(MarkerKind.CUTOFF_SUBJECT, subject), order)

    async def subject_client(self, subject: str, client_id: str, order: Order) -> Made:
        """What a client got for a subject. Raises AuthError SUBJECT_NOT_FOUND, CLIENT_NOT_FOUND."""
        await self._require_subject(subject)
        await self._require_client(client_id)
        return await self._make(change(MarkerKind.CUTOFF_SUBJECT_CLIENT, subject, client_id), order)

    async def session(self, session_id: str, order: Order) -> Made:
        """A session, known here or not, and what was issued in it."""
        return await self._mark(change(MarkerKind.SESSION_DEAD, session_id), order)

    async def grant(self, grant_id: str, order: Order) -> Made:
        """A grant, known here or not, and what was issued from it."""
        return await self._mark(change(MarkerKind.GRANT_DEAD, grant_id), order)

    async def _require_client(self, client_id: str) -> None:
        if await self._client(client_id) is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)

    async def _require_subject(self, subject: str) -> None:
        if await self._user(subject) is None and await self._client(subject) is None:
            raise AuthError(Reason.SUBJECT_NOT_FOUND)

    async def _mark(self, mark: Change, order: Order) -> Made:
        if await self._store.is_dead(mark):
            return Made(mark, 0, Impact())
        return await self._make(mark, order)

    async def _make(self, marker: Change, order: Order) -> Made:
        impact = await self._count(marker, order)
        if order.dry:
            return Made(marker, 0, impact)
        revision = await self._append([marker])
        log.warning(
            "revocation.made",
            kind=marker.kind.name,
            ids=list(marker.ids),
            revision=revision,
            by=order.by,
            comment=order.comment,
        )
        await self._reach(revision)
        return Made(marker, revision, impact)

    async def _count(self, marker: Change, order: Order) -> Impact | None:
        try:
            return await self._store.impact(marker)
        except AuthError as error:
            if order.dry:
                raise
            log.warning("revocation.not_counted", reason=error.reason.name, cause=error.cause)
            return None
