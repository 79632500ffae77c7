"""How the applied revision advances, and what the state says when it cannot."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.feed import follow as module
from authsvc.feed.follow import Applied, Follow, Listener
from authsvc.store.port import ANY_KEY, Change, Done, FeedPage, change
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State, StateStale
from tests.clocks import HandClock
from tests.feed.feeds import BentFeed
from tests.feed.watching import until_beat, watching

STALENESS_S = 120.0
EVERYTHING = marker_key(MarkerKind.CUTOFF_EVERYTHING)


def key(token: str) -> bytes:
    return marker_key(MarkerKind.TOKEN_DEAD, token)


def dead(*tokens: str) -> list[Change]:
    return [change(MarkerKind.TOKEN_DEAD, token) for token in tokens]


class FaultyFeed:
    """A feed with a hook around each read."""

    def __init__(self, clock: HandClock) -> None:
        self.bent = BentFeed(clock)
        self.reads: list[int] = []
        self.before: Callable[[], Awaitable[None]] | None = None
        self.after: Callable[[], Awaitable[None]] | None = None
        """Between the moment that the answer is made and the moment that it arrives."""
        self.within: Callable[[], Awaitable[None]] | None = None
        """After each piece of a snapshot."""
        self.epochs = 0

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        return await self.bent.append(changes)

    async def read(self, cursor: int) -> FeedPage:
        self.reads.append(cursor)
        if self.before is not None:
            await self.before()
        page = await self.bent.read(cursor)
        if self.after is not None:
            await self.after()
        return page

    async def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        async for piece in self.bent.pieces(head, rows):
            yield piece
            if self.within is not None:
                await self.within()

    async def begin(self, page: FeedPage) -> None:
        await self.bent.begin(page)

    async def beat(self, every_s: float) -> None:
        await self.bent.beat(every_s)

    async def fence(self) -> int:
        return await self.bent.fence()

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        self.epochs += 1
        await self.bent.raise_epoch(page, above, cut_off=cut_off)


class Worker:
    """One worker's state, and what follows the feed for it."""

    def __init__(
        self, feed: FaultyFeed, clock: HandClock, *listeners: Listener, synchronous: bool = False
    ) -> None:
        self.state = State(STALENESS_S)
        self.follow = Follow(feed, self.state, clock, listeners=listeners, synchronous=synchronous)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def feed(clock: HandClock) -> FaultyFeed:
    return FaultyFeed(clock)


@pytest.fixture
def worker(feed: FaultyFeed, clock: HandClock) -> Worker:
    return Worker(feed, clock)


@contextlib.asynccontextmanager
async def running(follow: Follow) -> AsyncIterator[None]:
    task = asyncio.create_task(follow.run())
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (of what sets no event)
            await asyncio.sleep(0.001)


async def unavailable() -> None:
    raise AuthError(Reason.STORE_UNAVAILABLE, cause="planted")


# Applying


async def test_markers_are_applied_and_confirmed(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    assert worker.state.age(clock.boot()) == float("inf")
    with pytest.raises(StateStale):
        worker.state.require_fresh(clock.boot())
    await feed.append(dead("a"))
    await worker.follow.poll()
    revision = await feed.append(dead("b"))
    assert not worker.state.is_dead(key("b"))
    await worker.follow.poll()
    assert worker.state.revision == revision
    assert worker.state.is_dead(key("a"))
    assert worker.state.is_dead(key("b"))
    assert not worker.state.is_dead(key("c"))
    assert feed.reads == [0, revision - 1, revision - 1]  # the second continues the snapshot
    worker.state.require_fresh(clock.boot())
    assert feed.bent.known_fingerprint == feed.bent.fingerprint


async def test_listeners_hear_of_a_change_before_the_revision_advances(
    feed: FaultyFeed, clock: HandClock
) -> None:
    heard: list[tuple[int, tuple[Marker, ...]]] = []

    async def listen(markers: tuple[Marker, ...]) -> None:
        await asyncio.sleep(0)
        heard.append((mine.state.revision, markers))
        assert not mine.state.is_dead(key("b"))

    mine = Worker(feed, clock, listen, listen)
    await mine.follow.poll()
    before = mine.state.revision
    after = await feed.append(dead("b"))
    heard.clear()
    await mine.follow.poll()
    assert [revision for revision, _ in heard] == [before, before]
    assert [[(m.key, m.revision) for m in markers] for _, markers in heard] == [
        [(key("b"), after)]
    ] * 2
    assert mine.state.revision == after


@pytest.mark.parametrize("error", [AuthError(Reason.STORE_UNAVAILABLE), ValueError("planted")])
async def test_where_a_listener_fails_nothing_is_applied_and_it_hears_again(
    feed: FaultyFeed, clock: HandClock, error: Exception
) -> None:
    heard: list[tuple[Marker, ...]] = []
    failing = False

    async def listen(markers: tuple[Marker, ...]) -> None:
        heard.append(markers)
        if failing:
            raise error

    worker = Worker(feed, clock, listen)
    await worker.follow.poll()
    before = worker.state.revision
    revision = await feed.append(dead("a"))
    failing = True
    clock.advance(5)
    with pytest.raises(type(error)):
        await worker.follow.poll()
    assert worker.state.revision == before
    assert worker.state.age(clock.boot()) == 5
    failing = False
    await worker.follow.poll()
    assert worker.state.revision == revision
    assert heard[-1] == heard[-2]


# Age


async def test_the_age_counts_from_the_start_of_the_read(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    async def slow() -> None:
        clock.advance(3)

    feed.before = slow
    await worker.follow.poll()
    assert worker.state.age(clock.boot()) == 3
    feed.before, feed.after = None, slow
    clock.advance(10)
    await worker.follow.poll()
    assert worker.state.age(clock.boot()) == 3


async def test_database_time_never_goes_back_and_a_wall_clock_moves_no_age(
    worker: Worker, clock: HandClock
) -> None:
    await worker.follow.poll()
    now = worker.state.now(clock.boot())
    clock.set_wall(clock.wall() - 7200)
    await worker.follow.poll()
    assert worker.state.now(clock.boot()) >= now
    assert worker.state.age(clock.boot()) == 0


async def test_failed_polls_age_the_state_until_nobody_may_judge_by_it(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await feed.append(dead("a"))
    await worker.follow.poll()
    revision = worker.state.revision
    feed.before = unavailable
    for _ in range(int(STALENESS_S)):
        clock.advance(1)
        with pytest.raises(AuthError):
            await worker.follow.poll()
        worker.state.require_fresh(clock.boot())
    assert worker.state.age(clock.boot()) == STALENESS_S
    clock.advance(0.001)
    with pytest.raises(StateStale):
        worker.state.require_fresh(clock.boot())
    assert (worker.state.revision, worker.state.is_dead(key("a"))) == (revision, True)
    feed.before = None
    await worker.follow.poll()
    worker.state.require_fresh(clock.boot())


async def test_a_read_that_lasts_too_long_confirms_nothing_fresh(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    async def slow() -> None:
        clock.advance(STALENESS_S + 1)

    feed.after = slow
    await worker.follow.poll()
    with pytest.raises(StateStale):
        worker.state.require_fresh(clock.boot())


# Other histories

Change_ = Callable[[FaultyFeed], None]


def another_fingerprint(feed: FaultyFeed) -> None:
    feed.bent.fingerprint = "another"


def lost_commits(feed: FaultyFeed) -> None:
    feed.bent.head -= 2
    feed.bent.markers = [m for m in feed.bent.markers if m.revision <= feed.bent.head]


def other_commits(feed: FaultyFeed) -> None:
    feed.bent.nonces[feed.bent.head] = "another"


def started_over(feed: FaultyFeed) -> None:
    feed.bent.head = REVISIONS_PER_EPOCH
    feed.bent.markers = []
    feed.bent.known_fingerprint = ""


@pytest.mark.parametrize(
    "happens", [another_fingerprint, lost_commits, other_commits, started_over]
)
@pytest.mark.parametrize("synchronous", [True, False])
async def test_another_history_raises_the_epoch_once(
    feed: FaultyFeed, clock: HandClock, happens: Change_, synchronous: bool
) -> None:
    workers = [Worker(feed, clock, synchronous=synchronous) for _ in range(2)]
    for number in range(4):
        await feed.append(dead(str(number)))
    for worker in workers:
        await worker.follow.poll()
    happens(feed)
    opening = 2 * REVISIONS_PER_EPOCH
    lost = happens is not another_fingerprint  # proof that outweighs what was vouched for
    cutoff = opening + 1 if lost or not synchronous else 0
    for worker in workers:
        await worker.follow.poll()
        assert feed.epochs == 1
        assert worker.state.revision == feed.bent.head == (cutoff or opening)
        assert worker.state.everything == worker.state.cutoff(()) == cutoff
        assert all(worker.state.is_dead(key(str(number))) for number in range(4))
    assert feed.bent.known_fingerprint == feed.bent.fingerprint
    revision = await feed.append(dead("new"))
    for _ in range(3):
        for worker in workers:
            await worker.follow.poll()
            assert worker.state.revision == revision
            assert worker.state.is_dead(key("new"))
    assert feed.epochs == 1


async def test_workers_that_find_another_history_at_once_open_one_epoch(
    feed: FaultyFeed, clock: HandClock
) -> None:
    workers = [Worker(feed, clock) for _ in range(4)]
    await feed.append(dead("a"))
    for worker in workers:
        await worker.follow.poll()
    another_fingerprint(feed)

    async def together() -> None:
        if len(feed.reads) < 8:  # four reads of the old epoch, before any of them is answered
            await asyncio.sleep(0)

    feed.reads.clear()
    feed.after = together
    await asyncio.gather(*(worker.follow.poll() for worker in workers))
    assert feed.epochs > 1
    assert {worker.state.revision for worker in workers} == {2 * REVISIONS_PER_EPOCH + 1}


async def test_a_first_start_on_another_database_cuts_off_everything(
    worker: Worker, feed: FaultyFeed
) -> None:
    """As after a restore while no worker ran."""
    await feed.begin(await feed.read(0))
    another_fingerprint(feed)
    await worker.follow.poll()
    assert worker.state.everything == 2 * REVISIONS_PER_EPOCH + 1


async def test_an_epoch_that_cannot_be_raised_confirms_nothing(
    worker: Worker, feed: FaultyFeed, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.follow.poll()
    another_fingerprint(feed)
    clock.advance(7)

    async def fail(page: FeedPage, above: int, *, cut_off: bool) -> None:
        raise AuthError(Reason.COMMIT_UNKNOWN)

    with monkeypatch.context() as patch:
        patch.setattr(feed.bent, "raise_epoch", fail)
        with pytest.raises(AuthError):
            await worker.follow.poll()
    assert worker.state.age(clock.boot()) == 7
    await worker.follow.poll()
    assert worker.state.revision // REVISIONS_PER_EPOCH == 2
    assert worker.state.age(clock.boot()) == 0


async def test_below_what_is_compacted_a_snapshot_is_taken(
    feed: FaultyFeed, clock: HandClock
) -> None:
    heard: list[tuple[Marker, ...]] = []

    async def listen(markers: tuple[Marker, ...]) -> None:
        heard.append(markers)

    worker = Worker(feed, clock, listen)
    for number in range(6):
        await feed.append(dead(str(number)))
    await worker.follow.poll()
    cursor = worker.state.revision
    for number in range(6, 12):
        await feed.append(dead(str(number)))
    feed.bent.compacted_to = cursor + 2
    feed.bent.markers = [m for m in feed.bent.markers if m.revision > cursor + 2]
    feed.reads.clear()
    await worker.follow.poll()
    assert feed.reads == [cursor, 0, feed.bent.head]
    assert feed.epochs == 0
    assert worker.state.revision == feed.bent.head
    # What was compacted unread has run out; what was read before is kept.
    assert [n for n in range(12) if not worker.state.is_dead(key(str(n)))] == [6, 7]
    assert {m.kind for m in heard[-1] if m.key == ANY_KEY} == {
        MarkerKind.CLIENT_CHANGED,
        MarkerKind.PERMISSIONS_CHANGED,
        MarkerKind.ROLE_CHANGED,
        MarkerKind.RESOURCE_CHANGED,
        MarkerKind.KEYS_CHANGED,
        MarkerKind.USER_CHANGED,
    }
    await worker.follow.poll()
    assert heard[-1] == ()


# Snapshots


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_MARKERS", 10)


def all_dead(worker: Worker, tokens: Iterable[int]) -> bool:
    return all(worker.state.is_dead(key(str(token))) for token in tokens)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("pieces", [1, 2, 4])
async def test_a_snapshot_that_fails_half_way_advances_nothing_and_confirms_nothing(
    worker: Worker, feed: FaultyFeed, clock: HandClock, pieces: int
) -> None:
    for number in range(50):
        await feed.append(dead(str(number)))
    done = 0

    async def fail() -> None:
        nonlocal done
        done += 1
        if done == pieces:
            await unavailable()

    feed.within = fail
    with pytest.raises(AuthError):
        await worker.follow.poll()
    assert all_dead(worker, range(10 * pieces))
    assert worker.state.revision == 0
    assert worker.state.age(clock.boot()) == float("inf")
    feed.within = None
    await worker.follow.poll()
    assert all_dead(worker, range(50))
    assert worker.state.revision == feed.bent.head
    assert worker.state.age(clock.boot()) == 0


@pytest.mark.usefixtures("small_pieces")
async def test_while_a_living_worker_takes_a_snapshot_it_ages_and_keeps_what_it_has(
    feed: FaultyFeed, clock: HandClock
) -> None:
    heard: list[tuple[Marker, ...]] = []

    async def listen(markers: tuple[Marker, ...]) -> None:
        heard.append(markers)

    worker = Worker(feed, clock, listen)
    for number in range(50):
        await feed.append(dead(str(number)))
    await worker.follow.poll()
    before = worker.state.revision
    another_fingerprint(feed)
    feed.bent.markers = feed.bent.markers[:20]  # it lost the others
    heard.clear()
    ages: list[float] = []

    async def look() -> None:
        clock.advance(1)
        ages.append(worker.state.age(clock.boot()))
        assert worker.state.revision == before
        assert all_dead(worker, range(50))
        assert not heard

    feed.within = look
    await worker.follow.poll()
    assert ages == [1, 2, 3]
    assert all_dead(worker, range(50))
    assert worker.state.revision == feed.bent.head
    assert worker.state.age(clock.boot()) == 0  # as of a read after the last piece
    assert ANY_KEY in {m.key for m in heard[-1]}


@pytest.mark.usefixtures("small_pieces")
async def test_others_have_their_turn_between_the_pieces(worker: Worker, feed: FaultyFeed) -> None:
    for number in range(100):
        await feed.append(dead(str(number)))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    await worker.follow.poll()
    other.cancel()
    assert turns >= 10


@pytest.mark.usefixtures("small_pieces")
async def test_what_comes_while_a_snapshot_is_taken_is_in_it(
    worker: Worker, feed: FaultyFeed
) -> None:
    for number in range(30):
        await feed.append(dead(str(number)))
    later = iter(range(30, 99))

    async def come() -> None:
        await feed.append(dead(str(next(later))))

    feed.within = come
    await worker.follow.poll()
    assert all_dead(worker, range(33))
    assert worker.state.revision == feed.bent.head


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("happens", [another_fingerprint, lost_commits, other_commits])
async def test_pieces_of_two_histories_are_no_snapshot(
    worker: Worker, feed: FaultyFeed, clock: HandClock, happens: Change_
) -> None:
    for number in range(50):
        await feed.append(dead(str(number)))
    done = 0

    async def half_way() -> None:
        nonlocal done
        done += 1
        if done == 3:
            happens(feed)

    feed.within = half_way
    with pytest.raises(AuthError, match="STORE_UNAVAILABLE"):
        await worker.follow.poll()
    assert worker.state.revision == 0
    assert worker.state.age(clock.boot()) == float("inf")
    await worker.follow.poll()
    assert worker.state.revision == feed.bent.head


async def test_far_behind_it_reads_page_by_page_and_confirms_the_last(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await worker.follow.poll()
    told: list[Applied] = []
    worker.follow.on_applied(told.append)
    cursor = worker.state.revision
    for number in range(10):
        await feed.append(dead(str(number)))
    feed.bent.page_revisions = 4
    clock.advance(7)
    reads = 0

    async def gone() -> None:
        nonlocal reads
        reads += 1
        if reads == 3:
            await unavailable()

    feed.before = gone
    with pytest.raises(AuthError):
        await worker.follow.poll()
    assert worker.state.revision == cursor + 8
    assert all_dead(worker, range(8))
    assert worker.state.age(clock.boot()) == 7
    assert [applied.revision for applied in told] == [cursor + 4, cursor + 8]
    assert {applied.started for applied in told} == {clock.boot() - 7}
    await worker.follow.poll()
    assert worker.state.revision == cursor + 10
    assert worker.state.age(clock.boot()) == 0
    assert not told[-1].snapshot


# Watchers


async def test_every_read_that_is_applied_is_told_in_order(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    await worker.follow.poll()
    one: list[Applied] = []
    two: list[Applied] = []
    worker.follow.on_applied(one.append)
    worker.follow.on_applied(two.append)
    expected: list[Applied] = []
    for number in range(20):
        start = clock.boot()
        markers: list[Marker] = []
        if number % 3:
            await feed.append(dead(str(number), f"{number}b"))
            markers = feed.bent.markers[-2:]
        expected.append(Applied(feed.bent.head, tuple(markers), start, clock.wall()))
        await worker.follow.poll()
        clock.advance(1)
    assert one == two == expected


async def test_a_watcher_is_sent_back_to_a_snapshot_by_another_history(
    worker: Worker, feed: FaultyFeed, clock: HandClock
) -> None:
    """Its deltas would leave out what the other history had below its own revision."""
    await feed.append(dead("a"))
    await worker.follow.poll()
    watch = watching(feed, worker.follow, worker.state, clock)
    events = watch(worker.state.revision)
    await until_beat(events)
    revision = await feed.append(dead("b"))
    await worker.follow.poll()
    [delta] = await until_beat(events)
    assert [(m.key, m.revision) for m in delta.delta.markers] == [(key("b"), revision)]
    another_fingerprint(feed)
    await worker.follow.poll()
    with pytest.raises(AuthError) as caught:
        await until_beat(events)
    assert caught.value.reason is Reason.REVISION_COMPACTED
    again = watch(0)
    [snapshot] = await until_beat(again)
    assert {m.key for m in snapshot.snapshot.markers} == {key("a"), key("b"), EVERYTHING}
    await again.aclose()


# Polling


@pytest.fixture
def no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a poke makes it poll."""
    monkeypatch.setattr(module, "POLL_S", 300.0)


@pytest.mark.usefixtures("no_timer")
async def test_a_poke_polls_at_once(worker: Worker, feed: FaultyFeed) -> None:
    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        for number in range(5):
            revision = await feed.append(dead(str(number)))
            worker.follow.poke()
            await until(lambda wanted=revision: worker.state.revision == wanted)  # type: ignore[misc]
    assert len(feed.reads) == 7


@pytest.mark.usefixtures("no_timer")
async def test_reach_returns_as_soon_as_the_change_is_applied(
    worker: Worker, feed: FaultyFeed
) -> None:
    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        for number in range(20):
            revision = await feed.append(dead(str(number)))
            await asyncio.gather(*(worker.follow.reach(revision) for _ in range(4)))
            assert worker.state.revision == revision


@pytest.mark.usefixtures("no_timer")
async def test_a_change_made_during_a_read_is_not_left_to_the_next_second(
    worker: Worker, feed: FaultyFeed
) -> None:
    answered, deliver = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        answered.set()
        await deliver.wait()

    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        feed.after = hold
        worker.follow.poke()
        await answered.wait()  # with an answer that does not hold the change
        revision = await feed.append(dead("a"))
        reached = asyncio.create_task(worker.follow.reach(revision))
        await asyncio.sleep(0)
        feed.after = None
        deliver.set()
        await reached
        assert worker.state.is_dead(key("a"))


async def test_reach_gives_up_where_the_feed_cannot_be_read(
    worker: Worker, feed: FaultyFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    feed.before = unavailable
    async with running(worker.follow):
        revision = await feed.append(dead("a"))
        await worker.follow.reach(revision)
        await worker.follow.next_poll()
        assert worker.state.revision == 0


async def test_failures_do_not_end_the_polling(
    worker: Worker, feed: FaultyFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)
    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        for number in range(3):
            feed.before = unavailable
            count = len(feed.reads)
            await until(lambda start=count: len(feed.reads) > start + 2)  # type: ignore[misc]
            feed.before = None
            revision = await feed.append(dead(str(number)))
            await until(lambda wanted=revision: worker.state.revision == wanted)  # type: ignore[misc]


@pytest.mark.usefixtures("no_timer")
async def test_next_poll_waits_for_a_poll(worker: Worker, feed: FaultyFeed) -> None:
    async with running(worker.follow):
        await until(lambda: worker.state.revision > 0)
        waiting = [asyncio.create_task(worker.follow.next_poll()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        worker.follow.poke()
        await asyncio.gather(*waiting)
