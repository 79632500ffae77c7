"""Revocations that come together share a transaction, and nobody's failure is another's."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.feed import append as module
from authsvc.feed.append import Append
from authsvc.store.port import Change, Done, FeedPage, change
from authsvc_client.core.markers import Marker, MarkerKind
from tests.clocks import HandClock
from tests.feed.feeds import BentFeed

Hook = Callable[[Sequence[Change]], Awaitable[None]]


class CountedFeed:
    """A feed whose transactions are kept, and begin with what a test puts in their way."""

    def __init__(self, before: Hook | None = None) -> None:
        self.feed = BentFeed(HandClock())
        self.before = before
        self.transactions: list[list[Change]] = []
        self.under_way = 0

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        self.transactions.append(list(changes))
        assert self.under_way == 0, "one transaction at a time"
        self.under_way += 1
        try:
            if self.before is not None:
                await self.before(changes)
            return await self.feed.append(changes)
        finally:
            self.under_way -= 1

    async def read(self, cursor: int) -> FeedPage:
        return await self.feed.read(cursor)

    def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        return self.feed.pieces(head, rows)

    async def begin(self, page: FeedPage) -> None:
        await self.feed.begin(page)

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        await self.feed.raise_epoch(page, above, cut_off=cut_off)

    async def beat(self, every_s: float) -> None:
        await self.feed.beat(every_s)

    async def fence(self) -> int:
        return await self.feed.fence()

    def written(self) -> Counter[bytes]:
        return Counter(marker.key for marker in self.feed.markers)


def dead(token: str) -> Change:
    return change(MarkerKind.TOKEN_DEAD, token)


class Gate:
    """Holds transactions up until opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, changes: Sequence[Change]) -> None:
        self.reached.set()
        await self.opened.wait()


def fails(reason: Reason, *tokens: str) -> Hook:
    """Refuses transactions with one of these tokens; with none named, all."""

    async def before(changes: Sequence[Change]) -> None:
        await asyncio.sleep(0)
        if not tokens or {dead(token) for token in tokens} & set(changes):
            raise AuthError(reason, cause="planted")

    return before


async def reasons(calls: Sequence[Awaitable[int]]) -> list[Reason | None]:
    async with asyncio.timeout(10):
        results = await asyncio.gather(*calls, return_exceptions=True)
    found: list[Reason | None] = []
    for result in results:
        if isinstance(result, AuthError):
            found.append(result.reason)
        else:
            assert isinstance(result, int), result
            found.append(None)
    return found


async def test_what_comes_together_is_one_transaction() -> None:
    store = CountedFeed()
    append = Append(store)
    revisions = await asyncio.gather(*(append([dead(str(n))]) for n in range(100)))
    assert len(store.transactions) == 1
    assert set(revisions) == {store.feed.head}
    assert len(store.written()) == 100


async def test_what_comes_during_a_transaction_shares_the_next() -> None:
    gate = Gate()
    store = CountedFeed(gate)
    append = Append(store)
    first = asyncio.create_task(append([dead("first")]))
    await gate.reached.wait()
    later = [asyncio.create_task(append([dead(str(n))])) for n in range(50)]
    await asyncio.sleep(0)
    assert len(store.transactions) == 1
    gate.opened.set()
    revisions = await asyncio.gather(first, *later)
    assert [len(changes) for changes in store.transactions] == [1, 50]
    assert revisions == [store.feed.head - 1] + [store.feed.head] * 50


async def test_a_transaction_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHANGES_MAX", 10)
    store = CountedFeed()
    append = Append(store)
    await asyncio.gather(*(append([dead(str(n)), dead(f"{n}b")]) for n in range(25)))
    assert [len(changes) for changes in store.transactions] == [10] * 5


async def test_a_caller_that_goes_away_loses_nothing() -> None:
    gate = Gate()
    store = CountedFeed(gate)
    append = Append(store)
    under_way = [asyncio.create_task(append([dead(name)])) for name in ("a", "b")]
    await gate.reached.wait()
    waiting = [asyncio.create_task(append([dead(name)])) for name in ("c", "d")]
    await asyncio.sleep(0)
    for gone in (under_way[0], waiting[0]):
        gone.cancel()
    await asyncio.gather(under_way[0], waiting[0], return_exceptions=True)
    assert under_way[0].cancelled()
    assert waiting[0].cancelled()
    gate.opened.set()
    assert await under_way[1] == store.feed.head - 1
    assert await waiting[1] == store.feed.head
    assert store.written() == {dead(name).key: 1 for name in "abcd"}


async def test_one_bad_member_fails_alone() -> None:
    store = CountedFeed(fails(Reason.STORE_UNAVAILABLE, "3"))
    append = Append(store)
    found = await reasons([append([dead(str(n))]) for n in range(6)])
    assert found == [Reason.STORE_UNAVAILABLE if n == 3 else None for n in range(6)]
    assert [len(changes) for changes in store.transactions] == [6] + [1] * 6
    assert store.written() == {dead(str(n)).key: 1 for n in range(6) if n != 3}


async def test_a_database_that_is_gone_is_not_asked_for_each_member() -> None:
    store = CountedFeed(fails(Reason.STORE_UNAVAILABLE))
    append = Append(store)
    found = await reasons([append([dead(str(n))]) for n in range(200)])
    assert found == [Reason.STORE_UNAVAILABLE] * 200
    assert len(store.transactions) == 3
    store.before = None
    assert await append([dead("later")]) == store.feed.head
    assert store.written() == {dead("later").key: 1}


@pytest.mark.parametrize("members", [1, 5])
async def test_an_unknown_commit_is_told_to_all_and_not_tried_again(members: int) -> None:
    store = CountedFeed(fails(Reason.COMMIT_UNKNOWN))
    append = Append(store)
    found = await reasons([append([dead(str(n))]) for n in range(members)])
    assert found == [Reason.COMMIT_UNKNOWN] * members
    assert len(store.transactions) == 1


async def test_each_caller_gets_an_error_of_its_own() -> None:
    append = Append(CountedFeed(fails(Reason.COMMIT_UNKNOWN)))
    results = await asyncio.gather(append([dead("a")]), append([dead("b")]), return_exceptions=True)
    assert len({id(result) for result in results}) == 2
    assert [str(getattr(result, "cause", "")) for result in results] == ["planted"] * 2


async def test_an_error_that_nobody_foresaw_reaches_the_callers_and_stops_nothing() -> None:
    async def before(changes: Sequence[Change]) -> None:
        raise KeyError("planted")

    store = CountedFeed(before)
    append = Append(store)
    found = await reasons([append([dead(str(n))]) for n in range(3)])
    assert found == [Reason.INTERNAL] * 3
    store.before = None
    assert await append([dead("later")]) == store.feed.head


async def test_stopping_leaves_no_caller_waiting() -> None:
    gate = Gate()
    append = Append(CountedFeed(gate))
    under_way = asyncio.create_task(append([dead("a")]))
    await gate.reached.wait()
    waiting = asyncio.create_task(append([dead("b")]))
    await asyncio.sleep(0)
    [drain] = [task for task in asyncio.all_tasks() if task.get_name() == "feed-append"]
    drain.cancel()
    found = await reasons([under_way, waiting])
    assert found == [Reason.COMMIT_UNKNOWN, Reason.STORE_UNAVAILABLE]


async def test_nothing_is_no_change() -> None:
    store = CountedFeed()
    with pytest.raises(ValueError, match="needs a change"):
        await Append(store)([])
    assert store.transactions == []
