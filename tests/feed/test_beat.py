"""When a read confirms: the beat of a database that takes writes, and of no other."""

import asyncio
import random
from collections.abc import Callable

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.feed import follow as module
from authsvc.feed.follow import BEAT_LATE_S, STRONG_S, Follow
from authsvc.store.port import FeedPage
from authsvc_client.core.state import REVISIONS_PER_EPOCH, StateStale
from authsvc_client.v1 import auth_pb2
from tests.clocks import HandClock
from tests.feed.test_follow import STALENESS_S, FaultyFeed, Worker, dead, key, running, until
from tests.feed.watching import until_beat, watching


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def feed(clock: HandClock) -> FaultyFeed:
    """Of a database whose last beat was long ago."""
    made = FaultyFeed(clock)
    made.bent.beaten = 0.0
    return made


@pytest.fixture
def worker(feed: FaultyFeed, clock: HandClock) -> Worker:
    return Worker(feed, clock)


def age(worker: Worker, clock: HandClock) -> float:
    return worker.state.age(clock.boot())


async def test_whoever_finds_no_recent_beat_makes_one(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await worker.follow.poll()
    assert (feed.bent.beats, age(worker, clock)) == (1, 0)
    clock.advance(0.5)
    await worker.follow.poll()
    assert (feed.bent.beats, age(worker, clock)) == (1, 0.5)
    clock.advance(0.5)
    await worker.follow.poll()
    assert (feed.bent.beats, age(worker, clock)) == (2, 0)


async def test_the_age_counts_from_the_beat_of_another_worker(
    feed: FaultyFeed, clock: HandClock
) -> None:
    one, two = Worker(feed, clock), Worker(feed, clock)
    await one.follow.poll()
    clock.advance(0.6)
    await two.follow.poll()
    assert feed.bent.beats == 1
    assert age(two, clock) == pytest.approx(0.6)


async def test_workers_of_a_healthy_database_stay_young_at_one_beat_a_second(
    feed: FaultyFeed, clock: HandClock
) -> None:
    workers = [Worker(feed, clock) for _ in range(5)]
    due = [random.Random(seed).random() for seed in range(5)]
    for worker in workers:
        await worker.follow.poll()
    feed.bent.beats, oldest = 0, 0.0
    for step in range(3000):  # a minute
        clock.advance(0.02)
        oldest = max(oldest, *(age(worker, clock) for worker in workers))
        for at, worker in enumerate(workers):
            if step * 0.02 >= due[at]:
                due[at] += module.POLL_S
                await worker.follow.poll()
    assert oldest < 3
    assert 50 <= feed.bent.beats <= 67


async def _read_only_ages(worker: Worker, feed: FaultyFeed, clock: HandClock) -> None:
    await worker.follow.poll()
    feed.bent.writable = False
    for number in range(int(STALENESS_S) + 1):
        clock.advance(1)
        await feed.append(dead(str(number)))
        await worker.follow.poll()
        assert worker.state.is_dead(key(str(number)))
    with pytest.raises(StateStale):
        worker.state.require_fresh(clock.boot())


async def test_what_takes_no_writes_is_applied_and_confirms_nothing(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await _read_only_ages(worker, feed, clock)
    feed.bent.writable = True
    await worker.follow.poll()
    assert age(worker, clock) == 0


async def test_confirming_without_a_beat_would_be_noticed(
    worker: Worker, feed: FaultyFeed, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confirm(self: Follow, started: float, page: FeedPage) -> None:
        self._state.confirm(started, page.time)

    monkeypatch.setattr(Follow, "_confirm", confirm)
    with pytest.raises(pytest.fail.Exception):
        await _read_only_ages(worker, feed, clock)


async def test_a_standby_is_applied_and_confirms_nothing_though_its_beat_moves(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await worker.follow.poll()
    feed.bent.standby = True
    clock.advance(10)
    feed.bent.beaten = clock.wall()
    await feed.append(dead("a"))
    with pytest.raises(AuthError, match="STORE_UNAVAILABLE"):
        await worker.follow.poll()
    assert worker.state.is_dead(key("a"))
    assert age(worker, clock) == 10
    feed.bent.standby = False
    await worker.follow.poll()
    assert age(worker, clock) == 0
    assert feed.epochs == 0


async def test_a_standby_that_is_behind_is_no_other_history_yet(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await feed.append(dead("a"))
    await worker.follow.poll()
    head = worker.state.revision
    bent = feed.bent
    bent.standby, bent.head, bent.fingerprint = True, head - 1, ""
    bent.markers.clear()
    with pytest.raises(AuthError):
        await worker.follow.poll()
    assert (feed.epochs, worker.state.revision) == (0, head)
    bent.standby, bent.fingerprint = False, "promoted"
    await worker.follow.poll()
    assert worker.state.everything == 2 * REVISIONS_PER_EPOCH + 1


@pytest.mark.parametrize("jump", [-7200, -5, -1, 5, 7200])
async def test_where_the_clock_jumps_the_beat_goes_on(
    worker: Worker, feed: FaultyFeed, clock: HandClock, jump: float
) -> None:
    await worker.follow.poll()
    clock.set_wall(clock.wall() + jump)
    for _ in range(3):
        clock.advance(1)
        await worker.follow.poll()
        assert age(worker, clock) < 2


async def test_no_jump_of_the_clock_confirms_what_takes_no_writes(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    random_ = random.Random(7)
    await worker.follow.poll()
    feed.bent.writable = False
    start = clock.boot()
    for _ in range(300):
        clock.advance(1)
        assert feed.bent.beaten is not None
        clock.set_wall(feed.bent.beaten + random_.uniform(-5, 5))
        await worker.follow.poll()
        assert age(worker, clock) == clock.boot() - start


async def test_a_beat_that_shows_late_confirms_nothing(feed: FaultyFeed, clock: HandClock) -> None:
    """As a commit does that waited in vain for a synchronous standby."""
    worker = Worker(feed, clock)
    await worker.follow.poll()
    feed.bent.writable = False
    clock.advance(10)
    feed.bent.beaten = clock.wall() - BEAT_LATE_S
    await worker.follow.poll()
    assert age(worker, clock) == 10
    feed.bent.beaten = clock.wall() - BEAT_LATE_S + 0.5
    await worker.follow.poll()
    assert age(worker, clock) == pytest.approx(BEAT_LATE_S - 0.5)


async def test_a_beat_that_hangs_holds_up_no_change(
    worker: Worker, feed: FaultyFeed, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(every_s: float) -> None:
        await asyncio.Event().wait()

    await worker.follow.poll()
    monkeypatch.setattr(module, "BEAT_WAIT_S", 0.02)
    monkeypatch.setattr(feed.bent, "beat", hang)
    clock.advance(2)
    await feed.append(dead("a"))
    await worker.follow.poll()
    assert worker.state.is_dead(key("a"))
    assert age(worker, clock) == 2


async def test_strong_reads_between_two_beats_are_answered_and_renew_nothing(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        for number in range(10):
            clock.advance(0.005)
            await feed.append(dead(str(number)))
            await worker.follow.fresh()
            assert worker.state.is_dead(key(str(number)))
        assert age(worker, clock) == pytest.approx(0.05)
        assert feed.bent.beats == 1


@pytest.mark.parametrize(
    "happens",
    [
        lambda feed: setattr(feed.bent, "writable", False),
        lambda feed: setattr(feed.bent, "standby", True),
    ],
)
async def test_nothing_is_strong_that_was_not_confirmed(
    worker: Worker, feed: FaultyFeed, clock: HandClock, happens: Callable[[FaultyFeed], None]
) -> None:
    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        happens(feed)
        clock.advance(STRONG_S + 0.1)
        with pytest.raises(AuthError) as caught:
            await worker.follow.fresh()
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        feed.bent.writable, feed.bent.standby = True, False
        await worker.follow.fresh()


async def test_a_watcher_is_told_the_age_that_the_worker_has(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await worker.follow.poll()
    events = watching(feed, worker.follow, worker.state, clock)(worker.state.revision)
    await until_beat(events)
    feed.bent.writable = False
    clock.advance(30)
    await feed.append(dead("a"))
    await worker.follow.poll()
    told: list[auth_pb2.WatchChangesResponse] = []
    [delta] = await until_beat(events, told)
    assert [marker.key for marker in delta.delta.markers] == [key("a")]
    assert told[-1].heartbeat.age.seconds == 30
    await events.aclose()
