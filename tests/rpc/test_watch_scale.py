"""Many watchers of one worker: those who come back at once, who do not read, who come and go."""

import asyncio
import gc
import resource
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from authsvc.feed.recent import Event
from authsvc.feed.watch import WatchChanges
from authsvc.rpc import convert, pipeline
from authsvc.store.port import FeedPage, change
from authsvc.store.sql_feed import SqlFeed
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from tests.certs import Issued
from tests.harness import Running, connect, hand_clock, reason, running, to_the_end, until
from tests.rpc.test_watch import Watcher

MANY = 200
WATCH = auth_pb2.WatchChangesRequest()
MIB = 2**20
MAKING = "feed-snapshot"
NARROW: dict[str, Any] = {"grpc.http2.bdp_probe": 0, "grpc.http2.lookahead_bytes": 65_535}
"""A connection that takes little before it is read."""


def _is(name: str) -> bool:
    """Whether this is the task that makes a snapshot, or another that has a name."""
    task = asyncio.current_task()
    return task is not None and task.get_name() == name


def _making() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task.get_name() == MAKING}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """What a snapshot waits for before it is read."""
    event = asyncio.Event()
    pieces = SqlFeed.pieces

    async def held(self: SqlFeed, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        if _is(MAKING):
            await event.wait()
        async for piece in pieces(self, head, rows):
            yield piece

    monkeypatch.setattr(SqlFeed, "pieces", held)
    return event


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what is done once for all was done."""
    counted: Counter[str] = Counter()
    read, pieces, watched = SqlFeed.read, SqlFeed.pieces, convert.watched

    async def reads(self: SqlFeed, cursor: int) -> FeedPage:
        if _is("feed-reach-back"):
            counted["reads back"] += 1
        return await read(self, cursor)

    def reads_all(self: SqlFeed, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        if _is(MAKING):
            counted["snapshots"] += 1
        return pieces(self, head, rows)

    def encodes(event: Any) -> bytes:
        if isinstance(event, Event) and event.markers:
            counted["encoded"] += 1
        return watched(event)

    monkeypatch.setattr(SqlFeed, "read", reads)
    monkeypatch.setattr(SqlFeed, "pieces", reads_all)
    monkeypatch.setattr(convert, "watched", encodes)
    return counted


async def _kill(server: Running, *tokens: str) -> int:
    """Marks them dead, as one change, and answers its revision once it is applied."""
    await server.store.feed.append([change(MarkerKind.TOKEN_DEAD, token) for token in tokens])
    return await server.head()


async def _all_at(watchers: Sequence[Watcher], revision: int) -> set[frozenset[bytes]]:
    """What they were told, once all are at a revision and confirmed: one set if it is the same."""
    await asyncio.gather(*(watcher.until_at(revision) for watcher in watchers))
    told = set()
    for watcher in watchers:
        parts = [part for e in watcher.events for part in (e.snapshot, e.delta)]
        told.add(frozenset(marker.key for part in parts for marker in part.markers))
    return told


async def test_many_watchers_share_what_is_read_and_encoded(
    tmp_path: Path, done: Counter[str]
) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        who = (await server.member("many", "watch")).who
        await _kill(server, *(f"before {number}" for number in range(100)))
        watchers = [Watcher(server, who) for _ in range(MANY)]
        await _all_at(watchers, await server.head())
        assert done == {"snapshots": 1, "encoded": 1}
        for number in range(5):
            revision = await _kill(server, f"one {number}", f"other {number}")
        [dead] = await _all_at(watchers, revision)
        assert len(dead) > 110
        assert done == {"snapshots": 1, "encoded": 6}
        for watcher in watchers:
            watcher.call.cancel()
        # All come back at once, to the worker that they left and to one that holds nothing.
        missed = await _kill(server, "meanwhile")
        watchers = [Watcher(server, who, resume=revision) for _ in range(MANY)]
        assert len(await _all_at(watchers, missed)) == 1
        assert done == {"snapshots": 1, "encoded": 7}
        for watcher in watchers:
            watcher.call.cancel()
    async with running(tmp_path, clock=hand_clock()) as server:
        watchers = [Watcher(server, who, resume=revision - n % 5) for n in range(MANY)]
        await _all_at(watchers, missed)
        assert all(w.events[-1].heartbeat.revision == missed for w in watchers)
        assert done == {"snapshots": 1, "encoded": 12, "reads back": 2}
        for watcher in watchers:
            watcher.call.cancel()


async def test_who_waits_for_a_snapshot_does_not_end_it_for_others_by_leaving(
    tmp_path: Path, opened: asyncio.Event
) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        who = (await server.member("leaving", "watch")).who
        first = Watcher(server, who)
        await until(_making)
        made = _making()
        others = [Watcher(server, who) for _ in range(3)]
        streams = server.app._rpc._listeners[0].pipeline._streams
        await until(lambda: len(streams) == 4)
        first.call.cancel()
        await until(lambda: len(streams) == 3)
        assert _making() == made
        opened.set()
        await asyncio.gather(*(other.read() for other in others))
        for other in others:
            other.call.cancel()


async def test_a_snapshot_that_nobody_waits_for_is_not_made(
    tmp_path: Path, opened: asyncio.Event
) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        who = (await server.member("leaving", "watch")).who
        watchers = [Watcher(server, who) for _ in range(3)]
        await until(_making)
        for watcher in watchers:
            watcher.call.cancel()
        await until(lambda: not _making())
        opened.set()
        again = Watcher(server, who)
        await again.read()
        again.call.cancel()


def _memory() -> int:
    """Bytes of this process, which is server and clients."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


async def test_watchers_that_do_not_read_are_cut_off_and_make_nothing_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some stop in the middle of the snapshot, others when there is much to tell."""
    monkeypatch.setattr(pipeline, "SEND_S_MAX", 1.0)
    async with running(tmp_path, clock=hand_clock()) as server:
        who = (await server.member("slow", "watch")).who
        channel = connect(server.app.port, who, **NARROW)
        stub, stopped = AuthServiceStub(channel), 60
        early = [stub.WatchChanges(WATCH) for _ in range(stopped)]
        await asyncio.gather(*(call.read() for call in early))
        before = _memory()
        for part in range(4):
            await _kill(server, *(f"{part} {number}" for number in range(10_000)))
        late = [stub.WatchChanges(WATCH) for _ in range(stopped)]
        await asyncio.gather(*(call.read() for call in late))
        reads_on = Watcher(server, who)
        await reads_on.until_at(await server.head())
        streams = server.app._rpc._listeners[0].pipeline._streams
        await until(lambda: len(streams) == 1)
        # 40,000 markers are 1.6 MiB, and these 120 have some 190 MiB to come.
        assert _memory() - before < 80 * MIB
        for call in (early[0], late[0]):
            assert await reason(to_the_end(call)) == "WATCHER_TOO_SLOW"
        await reads_on.until_at(await _kill(server, "after"))
        reads_on.call.cancel()
        await channel.close()


async def _left_behind(server: Running, who: Issued, times: int) -> int:
    """Objects that are there after so many streams that were not before: some read, some not."""
    streams = server.app._rpc._listeners[0].pipeline._streams
    tasks = len(asyncio.all_tasks())

    async def come_and_go(times: int) -> None:
        left = iter(range(times))

        async def one() -> None:
            for number in left:
                call = server.auth(who).WatchChanges(WATCH)
                for _ in range(number % 4):
                    await call.read()
                call.cancel()

        await asyncio.gather(*(one() for _ in range(50)))
        await until(lambda: not streams and len(asyncio.all_tasks()) <= tasks)
        gc.collect()

    await come_and_go(500)
    before = sys.getallocatedblocks()
    await come_and_go(times)
    return sys.getallocatedblocks() - before


async def test_ten_thousand_watchers_that_leave_leave_nothing_behind(tmp_path: Path) -> None:
    """recipes.md: a stream handler that swallows its cancellation leaks."""
    async with running(tmp_path, clock=hand_clock()) as server:
        who = (await server.member("leaving", "watch")).who
        memory = _memory()
        assert await _left_behind(server, who, 10_000) < 5_000
        assert _memory() - memory < 64 * MIB


async def test_what_a_watcher_leaves_behind_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the test above: each watcher leaves one small object."""
    left: list[object] = []
    follow_on = WatchChanges._follow_on

    def leak(self: WatchChanges, position: int) -> AsyncGenerator[bytes, None]:
        left.append([position])
        return follow_on(self, position)

    monkeypatch.setattr(WatchChanges, "_follow_on", leak)
    async with running(tmp_path, clock=hand_clock()) as server:
        who = (await server.member("leaving", "watch")).who
        assert await _left_behind(server, who, 1_000) > 500
