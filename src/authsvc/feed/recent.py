"""What was applied lately, encoded once for all watchers of this worker."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from authsvc.feed.follow import Applied
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import State

CHUNK_MARKERS_MAX = 2048
"""About 90 KiB: far below what gRPC takes, and encoded in some milliseconds."""
RECENT_MARKERS_MAX = 16_384
"""Some 4 MiB. A watcher that is further behind is too slow."""


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of the snapshot, or changes up to a revision."""

    revision: int
    markers: Sequence[Marker] = ()
    keys: tuple[Mapping[str, Any], ...] = ()
    staleness: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    snapshot: bool = False
    last: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """All changes up to a revision were sent, and so long ago it was confirmed."""

    revision: int
    age_s: float
    time: float


Encode = Callable[[Event | Beat], bytes]


def everything(state: State, revision: int) -> Event:
    """What markers only say has changed, as it is now."""
    keys = tuple(verifier.jwk for verifier in state.keys.by_kid.values())
    return Event(revision, (), keys, state.staleness)


class Step:
    """What one read brought."""

    __slots__ = ("_encoded", "after", "confirmed", "markers", "revision")

    def __init__(
        self, after: int, revision: int, markers: Sequence[Marker], confirmed: float
    ) -> None:
        """All the changes above `after` up to `revision`."""
        self.after, self.revision = after, revision
        self.markers, self.confirmed = markers, confirmed
        self._encoded: dict[int, list[bytes]] = {}

    def messages(self, position: int, state: State, encode: Encode) -> list[bytes]:
        """For a watcher at a position; the same bytes for all who are there."""
        since = max(position, self.after)
        found = self._encoded.get(since)
        if found is None:
            events = self._events(since, everything(state, self.revision))
            found = self._encoded[since] = [encode(event) for event in events]
        return found

    def _events(self, since: int, now: Event) -> Iterator[Event]:
        """No piece says that its last revision is whole where more of it is to come."""
        # Also for a change that was sent: what was sent with it may be older than it is.
        kinds = {marker.kind for marker in self.markers}
        keys = now.keys if MarkerKind.KEYS_CHANGED in kinds else ()
        staleness = now.staleness if MarkerKind.RESOURCE_CHANGED in kinds else {}
        markers = [marker for marker in self.markers if marker.revision > since]
        for end in range(CHUNK_MARKERS_MAX, len(markers), CHUNK_MARKERS_MAX):
            piece = markers[end - CHUNK_MARKERS_MAX : end]
            whole = max(since, markers[end].revision - 1)
            yield Event(min(whole, piece[-1].revision), piece, keys, staleness)
        rest = markers[(len(markers) - 1) // CHUNK_MARKERS_MAX * CHUNK_MARKERS_MAX :]
        yield Event(self.revision, rest, keys, staleness)


class Recent:
    """The last steps without a gap, as many as fit: who goes on from `low` misses nothing."""

    def __init__(self, revision: int) -> None:
        self.low = self.head = revision
        self.opened = revision
        """Where this history began for this worker: who was below cannot just go on."""
        self.moved = asyncio.Event()
        """Set, and replaced, when there is more."""
        self._steps: deque[Step] = deque()
        self._markers = 0

    def take(self, applied: Applied) -> None:
        """Adds what was applied."""
        if applied.snapshot:
            self._steps.clear()
            self._markers = 0
            self.low = self.head = self.opened = applied.revision
        elif applied.revision > self.head:
            self._steps.append(Step(self.head, applied.revision, applied.markers, applied.started))
            self._markers += len(applied.markers)
            self.head = applied.revision
            while self._markers > RECENT_MARKERS_MAX:
                gone = self._steps.popleft()
                self._markers -= len(gone.markers)
                self.low = gone.revision
        else:
            return
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def reach_back(self, after: int, markers: Sequence[Marker], confirmed: float) -> None:
        """Adds what was before: the changes above `after` that are not held."""
        found = [marker for marker in markers if after < marker.revision <= self.low]
        self._steps.appendleft(Step(after, self.low, found, confirmed))
        self._markers += len(found)
        self.low = after

    def since(self, position: int) -> list[Step] | None:
        """The steps above a position; None where some are no longer held."""
        if position < self.low:
            return None
        found: list[Step] = []
        for step in reversed(self._steps):
            if step.revision <= position:
                break
            found.append(step)
        return found[::-1]
