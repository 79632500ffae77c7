"""WatchChanges: what a validator elsewhere needs to know, as a stream."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.feed.follow import Applied, Follow
from authsvc.store.port import FeedStore
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import State, StateStale

CHUNK_MARKERS_MAX = 4096
HEARTBEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of the snapshot, or changes with the heartbeat that follows them."""

    revision: int
    markers: tuple[Marker, ...] = ()
    keys: tuple[Mapping[str, Any], ...] = ()
    staleness: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    snapshot: bool = False
    last: bool = False
    age_s: float = 0.0
    time: float = 0.0


class WatchChanges:
    """Streams the feed as this worker has applied it."""

    def __init__(self, store: FeedStore, follow: Follow, state: State, clock: Clock) -> None:
        self._store = store
        self._follow = follow
        self._state = state
        self._clock = clock

    async def __call__(self, resume: int) -> AsyncGenerator[Event, None]:
        """Raises AuthError REVISION_COMPACTED, STATE_STALE or WATCHER_TOO_SLOW, and
        StateStale: a watcher is told no age that this worker does not have itself.
        """
        async with self._follow.subscribe() as subscription:
            if resume > self._state.revision:
                self._follow.poke()
                await self._follow.next_poll()
            if resume > self._state.revision:
                # Another worker may be ahead of this one; it will catch up, or open an epoch.
                age = f"{self._state.age(self._clock.boot()):.1f}"
                raise AuthError(
                    Reason.STATE_STALE, metadata={"age_seconds": age}, retry_after_s=HEARTBEAT_S
                )
            sent = resume
            async for event in self._open(resume):
                sent = event.revision
                yield event
            yield self._heartbeat(sent)
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_S):
                        applied = await subscription.queue.get()
                except TimeoutError:
                    yield self._heartbeat(sent)
                    continue
                if subscription.lost:
                    raise AuthError(Reason.WATCHER_TOO_SLOW)
                if applied.snapshot:
                    raise AuthError(
                        Reason.REVISION_COMPACTED,
                        metadata={"compacted_to": str(applied.revision)},
                    )
                if applied.revision >= sent:
                    yield self._delta(applied, sent)
                    sent = applied.revision

    async def _open(self, resume: int) -> AsyncIterator[Event]:
        """The snapshot, or what was missed. Its revision is the head before its first chunk."""
        page = await self._store.read(resume)
        if resume and resume < page.compacted_to:
            raise AuthError(
                Reason.REVISION_COMPACTED, metadata={"compacted_to": str(page.compacted_to)}
            )
        if resume:
            yield Event(page.head, page.markers, *self._all())
            return
        pieces = range(0, max(1, len(page.markers)), CHUNK_MARKERS_MAX)
        for start in pieces:
            first, last = start == 0, start == pieces[-1]
            keys, staleness = self._all() if first else ((), {})
            yield Event(
                page.head,
                page.markers[start : start + CHUNK_MARKERS_MAX],
                keys,
                staleness,
                snapshot=True,
                last=last,
            )

    def _all(self) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, float]]:
        keys = tuple(verifier.jwk for verifier in self._state.keys.by_kid.values())
        return keys, self._state.staleness

    def _delta(self, applied: Applied, sent: int) -> Event:
        markers = tuple(marker for marker in applied.markers if marker.revision > sent)
        # Of those that were sent too: what was sent with them may be older than they are.
        kinds = {marker.kind for marker in applied.markers}
        keys, staleness = self._all()
        age = max(0.0, self._clock.boot() - applied.started)
        if math.isinf(age):
            raise StateStale(age)
        return Event(
            applied.revision,
            markers,
            keys if MarkerKind.KEYS_CHANGED in kinds else (),
            staleness if MarkerKind.RESOURCE_CHANGED in kinds else {},
            age_s=age,
            time=applied.time,
        )

    def _heartbeat(self, sent: int) -> Event:
        boot = self._clock.boot()
        self._state.require_fresh(boot)
        return Event(sent, age_s=self._state.age(boot), time=self._state.now(boot))
