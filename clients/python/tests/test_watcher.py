"""A large snapshot is taken in in steps, between which others have their turn."""

import asyncio
import threading
from collections.abc import Iterator
from types import TracebackType

import pytest

from authsvc_client.core.markers import MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State
from authsvc_client.core.watched import OutOfStep, Watched
from authsvc_client.sync_watcher import SyncWatcher
from authsvc_client.v1 import auth_pb2
from authsvc_client.watcher import STEP_MARKERS, Watcher, apply

HEAD = REVISIONS_PER_EPOCH + 5000
AHEAD = 1_700_000_000


def dead(number: int) -> bytes:
    return marker_key(MarkerKind.TOKEN_DEAD, str(number))


def chunk(numbers: range, *, last: bool = True) -> auth_pb2.WatchChangesResponse:
    snapshot = auth_pb2.SnapshotChunk(revision=HEAD, last=last)
    for number in numbers:
        marker = snapshot.markers.add(
            kind=auth_pb2.MARKER_KIND_TOKEN_DEAD,
            key=dead(number),
            revision=REVISIONS_PER_EPOCH + number,
        )
        marker.until.seconds = AHEAD + 4000
    return auth_pb2.WatchChangesResponse(snapshot=snapshot)


class Stub:
    """A server that sends these, and then nothing for good."""

    def __init__(self, *responses: auth_pb2.WatchChangesResponse) -> None:
        self._responses = iter(responses)

    def WatchChanges(self, _request: object) -> "Stub":
        return self

    async def read(self) -> auth_pb2.WatchChangesResponse:
        for response in self._responses:
            return response
        await asyncio.Event().wait()
        raise AssertionError

    def __iter__(self) -> Iterator[auth_pb2.WatchChangesResponse]:
        return self._responses

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("count", [0, 1, STEP_MARKERS, STEP_MARKERS + 1, 4096])
@pytest.mark.parametrize("last", [True, False])
def test_the_last_step_of_the_last_chunk_advances_the_revision(count: int, last: bool) -> None:
    state = State(120.0)
    watched = Watched(state)
    watched.open(0.0)
    done = 0
    for _ in apply(watched, chunk(range(count), last=last), 0.0):
        done += STEP_MARKERS
        assert all(state.is_dead(dead(number)) for number in range(min(done, count)))
        assert not state.is_dead(dead(done))
        assert state.revision == (HEAD if last and done >= count else 0)
    assert done >= count


def test_what_comes_amid_a_chunk_that_another_stream_began_is_not_taken() -> None:
    watched = Watched(State(120.0))
    watched.open(0.0)
    for _ in apply(watched, chunk(range(10), last=False), 0.0):
        pass
    other = chunk(range(10))
    other.snapshot.revision += 1
    with pytest.raises(OutOfStep):
        next(apply(watched, other, 0.0))


async def test_others_have_their_turn_while_a_chunk_is_taken() -> None:
    state = State(120.0)
    watcher = Watcher(Stub(chunk(range(4096))), Watched(state))
    seen = set()
    watcher.start()
    while not state.revision:
        seen.add(sum(state.is_dead(dead(number)) for number in range(0, 4096, STEP_MARKERS)))
        await asyncio.sleep(0)
    await watcher.stop()
    assert len(seen) >= 4096 // STEP_MARKERS


class CountedLock:
    """Counts how often it is held."""

    def __init__(self) -> None:
        self._lock, self.times = threading.Lock(), 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self.times += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()


def test_the_lock_is_given_back_between_the_steps() -> None:
    state, lock = State(120.0), CountedLock()
    watcher = SyncWatcher(Stub(chunk(range(4096))), Watched(state), lock)  # type: ignore[arg-type]
    watcher._watch()
    assert state.revision == HEAD
    assert lock.times >= 4096 // STEP_MARKERS
