"""The snapshot: what lives in the feed, read and encoded once for all who open a stream."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from mmap import mmap

from authsvc.errors import AuthError, Reason
from authsvc.feed.recent import CHUNK_MARKERS_MAX, Encode, Event, everything
from authsvc.store.port import FeedStore
from authsvc_client.core.markers import Marker
from authsvc_client.core.state import State

REUSE = 10
"""It is used so many times as long as it took to make, within these bounds; what happened since
follows as deltas."""
REUSE_S_MIN, REUSE_S_MAX = 5.0, 60.0
TAKE_S_MAX = 60.0
"""So much longer somebody may take to read it, since it is held for him."""


class Snapshot:
    """As of one revision, chunk by chunk while it is made."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.until: float | None = None
        """The loop's time up to which it is used; None while it is made."""
        self.readers = 0
        self.making: asyncio.Task[None] | None = None
        self._chunks: list[mmap] = []
        """Pages of their own: what malloc is given back it mostly keeps."""
        self._failed: Exception | None = None
        self._more = asyncio.Event()

    def add(self, chunk: bytes) -> None:
        """One more."""
        pages = mmap(-1, len(chunk))
        pages.write(chunk)
        self._chunks.append(pages)
        self._tell()

    def fail(self, error: Exception) -> None:
        """There will be no more."""
        self._failed = error
        self._tell()

    def _tell(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()

    async def chunk(self, number: int) -> bytes | None:
        """One of them, once it is there; None after the last.

        Raises what it failed with, or AuthError WATCHER_TOO_SLOW.
        """
        while True:
            if self._failed is not None:
                raise self._failed
            if number < len(self._chunks):
                break
            if self.until is not None:
                return None
            await self._more.wait()
        if self.until is not None and asyncio.get_running_loop().time() > self.until + TAKE_S_MAX:
            raise AuthError(Reason.WATCHER_TOO_SLOW)
        return self._chunks[number][:]


class Snapshots:
    """The one in use, made when somebody asks and gone from memory soon after."""

    def __init__(
        self,
        store: FeedStore,
        state: State,
        encode: Encode,
        still: Callable[[], Callable[[], Awaitable[None]]],
    ) -> None:
        """`still` is that of the follower."""
        self._store = store
        self._still = still
        self._state = state
        self._encode = encode
        self._current: Snapshot | None = None

    @contextmanager
    def open(self, low: int) -> Iterator[Snapshot]:
        """One as of `low` or later, shared by all who ask while it is made and for a while after;
        the last who goes before it is made ends it.
        """
        snapshot = self._current
        if snapshot is None or (snapshot.until is not None and snapshot.revision < low):
            snapshot = self._current = Snapshot(self._state.revision)
            snapshot.making = asyncio.create_task(self._make(snapshot), name="feed-snapshot")
        snapshot.readers += 1
        try:
            yield snapshot
        finally:
            snapshot.readers -= 1
            if not snapshot.readers and snapshot.until is None:
                self._end(snapshot)

    def end(self, error: Exception) -> None:
        """Makes no more use of the one there is; who waits for it gets the error."""
        if self._current is not None:
            if self._current.until is None:
                self._current.fail(error)
            self._end(self._current)

    def _end(self, snapshot: Snapshot) -> None:
        self._forget(snapshot)
        if snapshot.making is not None:
            snapshot.making.cancel()

    def _forget(self, snapshot: Snapshot) -> None:
        if self._current is snapshot:
            self._current = None

    async def _make(self, snapshot: Snapshot) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        require_same = self._still()
        now = everything(self._state, snapshot.revision)
        try:
            held: Sequence[Marker] | None = None
            async for piece in self._store.pieces(snapshot.revision, CHUNK_MARKERS_MAX):
                if held is not None:
                    snapshot.add(self._chunk(now, held))
                    now = Event(snapshot.revision)  # in the first one alone
                held = piece
            await require_same()
            last = self._chunk(now, held or (), last=True)
        except Exception as error:
            self._forget(snapshot)
            snapshot.fail(error)
            return
        reused_s = min(max(REUSE * (loop.time() - began), REUSE_S_MIN), REUSE_S_MAX)
        snapshot.until = loop.time() + reused_s
        snapshot.add(last)
        loop.call_later(reused_s, self._forget, snapshot)

    def _chunk(self, now: Event, markers: Sequence[Marker], *, last: bool = False) -> bytes:
        return self._encode(replace(now, markers=markers, snapshot=True, last=last))
