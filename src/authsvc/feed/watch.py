"""WatchChanges: what a validator elsewhere needs to know, as a stream."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.feed.follow import Applied, Follow
from authsvc.feed.recent import Beat, Encode, Recent, everything
from authsvc.feed.snapshot import Snapshots
from authsvc.keys.secrets import jitter
from authsvc.store.port import FeedStore
from authsvc_client.core.state import State, StateStale

HEARTBEAT_S = 0.5
MISSED_MAX = 10_000
"""Revisions. Who missed more than these, and what is held, does better with a snapshot."""
MISSED_MORE = 256
"""Revisions that are read beyond what one missed: others who come back with it may need them."""


class WatchChanges:
    """Streams the feed as this worker has applied it."""

    def __init__(
        self, store: FeedStore, follow: Follow, state: State, clock: Clock, encode: Encode
    ) -> None:
        self._store = store
        self._follow = follow
        self._state = state
        self._clock = clock
        self._encode = encode
        self._recent = Recent(state.revision)
        self._snapshots = Snapshots(store, state, encode, follow.still)
        self._reading: asyncio.Task[int] | None = None
        follow.on_applied(self._take)

    async def __call__(self, resume: int) -> AsyncGenerator[bytes, None]:
        """Encoded events. Raises AuthError REVISION_COMPACTED, STATE_STALE or WATCHER_TOO_SLOW, and
        StateStale: a watcher is told no age that this worker does not have itself.
        """
        if resume > self._state.revision:
            self._follow.poke()
            await self._follow.next_poll()
        if resume > self._state.revision:
            # Another worker may be ahead of this one; it will catch up, or open an epoch.
            raise self._stale()
        position = resume
        if resume:
            if self._recent.low - resume > MISSED_MAX:
                raise _compacted(self._recent.low)
            await self._reach_back(resume)
            yield self._encode(everything(self._state, resume))
        else:
            with self._snapshots.open(self._recent.low) as snapshot:
                position, number = snapshot.revision, 0
                while (chunk := await snapshot.chunk(number)) is not None:
                    yield chunk
                    number += 1
            await self._reach_back(position)
        async with aclosing(self._follow_on(position)) as messages:
            async for message in messages:
                yield message

    async def _follow_on(self, position: int) -> AsyncGenerator[bytes, None]:
        """Changes as they come, and a heartbeat twice a second, each watcher at its own time."""
        loop = asyncio.get_running_loop()
        confirmed: float | None = None
        beat = loop.time()
        pause_s = jitter(HEARTBEAT_S)
        while True:
            moved = self._recent.moved
            steps = self._recent.since(position)
            if steps is None:
                raise self._gone(position)
            for step in steps:
                for message in step.messages(position, self._state, self._encode):
                    yield message
                position, confirmed = step.revision, step.confirmed
            if loop.time() >= beat:
                yield self._heartbeat(position, confirmed)
                beat, pause_s = loop.time() + pause_s, HEARTBEAT_S
            elif not steps:
                try:
                    async with asyncio.timeout_at(beat):
                        await moved.wait()
                except TimeoutError:
                    continue

    def _take(self, applied: Applied) -> None:
        if applied.snapshot:
            self._snapshots.end(_compacted(applied.revision))
        self._recent.take(applied)

    def _gone(self, position: int) -> AuthError:
        """Why a watcher cannot go on."""
        if position < self._recent.opened:
            return _compacted(self._recent.opened)
        return AuthError(Reason.WATCHER_TOO_SLOW)

    def _stale(self) -> AuthError:
        age = f"{self._state.age(self._clock.boot()):.1f}"
        return AuthError(
            Reason.STATE_STALE, metadata={"age_seconds": age}, retry_after_s=HEARTBEAT_S
        )

    async def _reach_back(self, position: int) -> None:
        """Makes sure that what came after a position is held; one read for all who come at once."""
        while position < self._recent.low:
            if self._reading is None:
                self._reading = asyncio.create_task(self._read(position), name="feed-reach-back")
                self._reading.add_done_callback(self._read_ends)
            compacted_to = await asyncio.shield(self._reading)
            if position < compacted_to:
                raise _compacted(compacted_to)

    async def _read(self, position: int) -> int:
        """What it is compacted to. Raises AuthError STORE_UNAVAILABLE, STATE_STALE."""
        confirmed = self._state.confirmed
        require_same = self._follow.still()
        cursor = max(1, position - MISSED_MORE)
        page = await self._store.read(cursor)
        await require_same()
        if page.more and page.head < self._recent.low:
            return self._recent.low  # so much that a snapshot does better
        if page.head < self._recent.low:
            raise self._stale()  # of a standby that is not so far
        after = max(cursor, page.compacted_to)
        if after < self._recent.low:
            self._recent.reach_back(
                after, page.markers, -math.inf if confirmed is None else confirmed
            )
        return page.compacted_to

    def _read_ends(self, task: asyncio.Task[int]) -> None:
        self._reading = None
        if not task.cancelled():
            task.exception()  # those who waited have it

    def _heartbeat(self, position: int, confirmed: float | None) -> bytes:
        """Of what was sent: what came since may be younger than its confirmation."""
        boot = self._clock.boot()
        self._state.require_fresh(boot)
        age = self._state.age(boot)
        if position < self._state.revision and confirmed is not None:
            age = boot - confirmed
        if math.isinf(age):
            raise StateStale(age)
        return self._encode(Beat(position, max(0.0, age), self._state.now(boot)))


def _compacted(revision: int) -> AuthError:
    return AuthError(Reason.REVISION_COMPACTED, metadata={"compacted_to": str(revision)})
