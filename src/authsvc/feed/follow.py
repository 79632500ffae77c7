"""Following the feed: the one place where the applied revision advances."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from authsvc.acting import by_itself
from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.store.port import ANY_KEY, FeedPage, FeedStore
from authsvc_client.core.markers import CUTOFF_KINDS, DEAD_KINDS, Marker, MarkerKind
from authsvc_client.core.state import State

POLL_S = 1.0
BEAT_S = 0.9
"""A beat that old is due: it comes once a poll, of whichever worker is first."""
BEAT_WAIT_S = 1.0
"""So long a poll waits for a database that takes no writes."""
BEAT_LATE_S = 3.0
"""A beat that old confirms nothing. A commit that a lost standby holds up is seen when it is given
up, `COMMAND_TIMEOUT_S` after its time at the least: too late for others to take it for one.
"""
READ_S_MAX = 5.0
"""A read that took longer says too little of the database's clock: this process may have slept."""
STRONG_S = 5.0
"""Nothing is as of now that was confirmed so long ago."""
HEAR_S = 0.003
"""After a message; what others say meanwhile is read with it."""
PIECE_MARKERS = 1024
"""Of a snapshot: taking it in keeps nobody waiting for more than some milliseconds."""

log = structlog.get_logger()

Listener = Callable[[tuple[Marker, ...]], Awaitable[None]]

_CHANGED_KINDS = [kind for kind in MarkerKind if kind not in DEAD_KINDS | CUTOFF_KINDS]


@dataclass(frozen=True, slots=True)
class Applied:
    """What one poll applied, for watchers. Without markers it is a heartbeat."""

    revision: int
    markers: tuple[Marker, ...]
    started: float
    """Boot-time clock when the head was last confirmed; minus infinity: never."""
    time: float
    """The database's clock at the read."""
    snapshot: bool = False
    """The markers do not continue those before: another history, or compacted meanwhile."""


class Follow:
    """Reads the feed once a second, and at once when poked."""

    def __init__(
        self,
        store: FeedStore,
        state: State,
        clock: Clock,
        *,
        listeners: tuple[Listener, ...] = (),
        loaders: tuple[Listener, ...] = (),
        synchronous: bool = False,
    ) -> None:
        """`listeners` drop what changed before the revision advances: what the markers name, and
        after a snapshot, which cannot name all, everything (`ANY_KEY`). They do so at once, without
        a wait. `loaders` come after them, and may read. `synchronous` vouches that the database
        loses no commit at a failover, so that a new epoch need not cut off all.
        """
        self._store = store
        self._state = state
        self._clock = clock
        self._listeners = listeners
        self._loaders = loaders
        self._synchronous = synchronous
        self._nonce: str | None = None
        self._beat: float | None = None
        """That of the last confirmation."""
        self._heard: set[tuple[int, MarkerKind, bytes]] = set()
        """Above the applied revision."""
        self._due: asyncio.TimerHandle | None = None
        self._poke = asyncio.Event()
        self._polled = asyncio.Condition()
        self._lock = asyncio.Lock()
        self._asked: asyncio.Future[bool] | None = None
        """How the next read that begins will end."""
        self._told: list[Callable[[Applied], None]] = []

    def still(self) -> Callable[[], Awaitable[None]]:
        """Asks, once called, whether the database has what is applied now: what was read between
        the two is of this history. It raises AuthError STORE_UNAVAILABLE where it is not.
        """
        revision, nonce = self._state.revision, self._nonce

        async def ask() -> None:
            page = await self._store.read(revision)
            if page.compacted_to > revision or _is_another(page, revision, nonce):
                raise AuthError(Reason.STORE_UNAVAILABLE, cause="changed while it was read")

        return ask

    def on_applied(self, tell: Callable[[Applied], None]) -> None:
        """Has it told of each read that was applied; it must neither wait nor fail."""
        self._told.append(tell)

    async def poll(self) -> None:
        """One read, applied, and confirmed if the database takes writes.

        Raises AuthError STORE_UNAVAILABLE; then nothing is confirmed.
        """
        async with self._lock, self._telling():
            page = await self._step()
            while page.more:
                page = await self._step()
            if _is_due(page) and await self._is_beating():
                await self._step()
        async with self._polled:
            self._polled.notify_all()

    async def _step(self) -> FeedPage:
        started = self._clock.boot()
        cursor = self._state.revision
        page = await self._store.read(cursor)
        if page.standby and self._has_lost_commits(page):
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="a standby, behind or of another past")
        if self._is_other_history(page):
            await self._raise_epoch(page)
            cursor, page = 0, await self._store.read(0)
        elif not (page.known_fingerprint or page.standby):
            await self._store.begin(page)
        if 0 < cursor < page.compacted_to:
            cursor, page = 0, await self._store.read(0)
        if not cursor:
            await self._load(page)
            started = self._clock.boot()
            page = await self._on_from(page)
        dropped = page.markers if cursor else (*page.markers, *_any_change(page))
        for listener in (*self._listeners, *self._loaders):
            await listener(dropped)
        self._nonce = page.nonce
        self._state.apply(page.markers, page.head)
        self._heard = {each for each in self._heard if each[0] > page.head}
        self._confirm(started, page)
        confirmed = self._state.confirmed
        applied = Applied(
            page.head,
            page.markers,
            -math.inf if confirmed is None else confirmed,
            page.time,
            snapshot=not cursor,
        )
        for tell in self._told:
            tell(applied)
        if page.standby:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="a standby")
        return page

    async def _load(self, page: FeedPage) -> None:
        """Takes in what is live at a head, in pieces between which others have their turn. It kills
        at once; the revision stays where it is, so what fails half way is done again.
        """
        async for piece in self._store.pieces(page.head, PIECE_MARKERS):
            self._state.apply(piece, self._state.revision)
            await asyncio.sleep(0)

    async def _on_from(self, page: FeedPage) -> FeedPage:
        """What came while a snapshot was taken, if it continues it.

        Raises AuthError STORE_UNAVAILABLE where it does not: the pieces were of two histories.
        """
        after = await self._store.read(page.head)
        is_same = after.fingerprint == page.fingerprint and after.compacted_to <= page.head
        if not is_same or _is_another(after, page.head, page.nonce):
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="changed while it was read")
        return after

    def _confirm(self, started: float, page: FeedPage) -> None:
        """Counts from the beat, and only from one that moved: a database that takes no writes is
        none that others revoke on, and its clock may be wrong.
        """
        if page.more or self._clock.boot() - started > READ_S_MAX:
            return
        since = 0.0
        if page.beat is not None:
            since = page.time - page.beat
            is_young = -BEAT_S < since < BEAT_LATE_S
            if page.standby or page.beat == self._beat or not is_young:
                return
            self._beat = page.beat
        since = max(0.0, since)
        if self._state.age(started - since) >= 0:
            self._state.confirm(started - since, page.time - since)

    async def _is_beating(self) -> bool:
        """Whether the database took a write just now, of whichever worker."""
        try:
            async with asyncio.timeout(BEAT_WAIT_S):
                await self._store.beat(BEAT_S)
        except (AuthError, TimeoutError) as error:
            cause = error.cause if isinstance(error, AuthError) else "takes long"
            log.warning("feed.beat_failed", cause=cause)
            return False
        return True

    @asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        """Tells those who asked before this read how it ends."""
        asked, self._asked = self._asked, None
        is_applied = False
        try:
            yield
            is_applied = True
        finally:
            if asked is not None:
                asked.set_result(is_applied)

    def _is_other_history(self, page: FeedPage) -> bool:
        if page.standby:
            return False  # it cannot be written: what it becomes is seen then
        is_moved = page.known_fingerprint not in ("", page.fingerprint)
        return is_moved or self._has_lost_commits(page)

    def _has_lost_commits(self, page: FeedPage) -> bool:
        """A lower head, or another change at the applied revision, proves it."""
        cursor = self._state.revision
        return cursor > 0 and _is_another(page, cursor, self._nonce)

    async def _raise_epoch(self, page: FeedPage) -> None:
        log.error("feed.other_history", head=page.head, applied=self._state.revision)
        lost = self._has_lost_commits(page)  # whoever vouched that none is
        with by_itself("RaiseEpoch"):
            await self._store.raise_epoch(
                page, self._state.revision, cut_off=lost or not self._synchronous
            )

    async def run(self) -> None:
        """Polls until cancelled; a failure is logged and the state only grows older."""
        while True:
            self._poke.clear()  # before the read: what comes during it calls for another one
            try:
                await self.poll()
            except AuthError as error:
                log.warning("feed.poll_failed", reason=error.reason.name, cause=error.cause)
            try:
                async with asyncio.timeout(POLL_S):
                    await self._poke.wait()
            except TimeoutError:
                continue

    def poke(self) -> None:
        """Polls now rather than within the second."""
        self._poke.set()

    def poke_soon(self) -> None:
        """As `poke`, once for all who say so within a few milliseconds."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(HEAR_S, self._poke_due)

    def _poke_due(self) -> None:
        self._due = None
        self.poke()

    async def hear(self, markers: Iterable[Marker]) -> None:
        """Believes others about changes that are not applied yet, each once.

        What they kill is dead and what they changed is dropped, at once. The revision stays where
        it is until they were read from the table, which is done soon.
        """
        new: list[Marker] = []
        for marker in markers:
            said = (marker.revision, marker.kind, marker.key)
            if marker.revision > self._state.revision and said not in self._heard:
                self._heard.add(said)
                new.append(marker)
        if new:
            self._state.apply(new, self._state.revision)
            for listener in self._listeners:
                await listener(tuple(new))
            self.poke_soon()

    async def next_poll(self) -> None:
        """Waits for the poll that is due, at most two periods."""
        try:
            async with asyncio.timeout(2 * POLL_S), self._polled:
                await self._polled.wait()
        except TimeoutError:
            return

    async def fresh(self) -> None:
        """Waits for a read that begins after this call, one for all who wait, to be applied.

        Raises AuthError STORE_UNAVAILABLE where that read fails, or was not of a database that
        takes writes.
        """
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
        self.poke()
        if not await asyncio.shield(self._asked):
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="no fresh read")
        if self._state.age(self._clock.boot()) > STRONG_S:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="the database takes no writes")

    async def reach(self, revision: int) -> None:
        """Waits, a few periods at most, until this worker has applied a change of its own.

        The change is durable and will arrive by the poll whatever happens here.
        """
        self.poke()
        try:
            async with asyncio.timeout(2 * POLL_S), self._polled:
                await self._polled.wait_for(lambda: self._state.revision >= revision)
        except TimeoutError:
            log.warning("feed.slow_to_apply", revision=revision)


def _is_due(page: FeedPage) -> bool:
    """A beat of the future was written before the database's clock went back."""
    return page.beat is not None and not page.standby and abs(page.time - page.beat) >= BEAT_S


def _is_another(page: FeedPage, cursor: int, nonce: str | None) -> bool:
    """Whether what was read from a cursor does not continue what was known there."""
    if page.head < cursor:
        return True
    # At `compacted_to` the row may be gone; below it another worker may have raised the epoch.
    is_known = cursor > page.compacted_to or page.cursor_nonce is not None
    return cursor >= page.compacted_to and is_known and page.cursor_nonce != nonce


def _any_change(page: FeedPage) -> list[Marker]:
    """What a snapshot adds for listeners: rows may have changed whose markers are gone."""
    return [Marker(kind, ANY_KEY, page.head, page.time) for kind in _CHANGED_KINDS]
