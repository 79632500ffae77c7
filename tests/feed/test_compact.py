"""Compaction and sweeps: only what is over goes, and nobody who reads is led astray."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from authsvc.errors import AuthError, Reason
from authsvc.feed import compact as module
from authsvc.feed.compact import Compact, sweep
from authsvc.feed.follow import Applied, Follow
from authsvc.housekeeping import Housekeeping
from authsvc.store.port import SWEPT, Change, Store, change
from authsvc_client.core.markers import MARKER_LIFETIME_S, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State
from tests.clocks import HandClock
from tests.feed.watching import until_beat, watching
from tests.harness import migrated
from tests.store.conftest import Place

FIRST = REVISIONS_PER_EPOCH
"""The head of an empty feed."""
DAY = 24 * 3600.0


class Days(Place):
    """A database whose rows grow old by hand."""

    async def age(self, seconds: float) -> None:
        """Lets time pass for the rows that are there."""
        if self.backend == "sqlite":
            self.clock.advance(seconds)
            return
        for table, columns in AGING.items():
            for column in columns:
                await self.sql(f'UPDATE "{table}" SET {column} = {column} - {seconds}')

    async def count(self, table: str) -> int:
        [[rows]] = await self.sql(f'SELECT count(*) FROM "{table}"')
        return int(rows)

    async def bounds(self) -> tuple[int, int]:
        """Head and `compacted_to`, above the first revision."""
        [row] = await self.sql("SELECT revision, compacted_to FROM feed_head")
        return row[0] - FIRST, row[1] - FIRST

    async def revisions(self) -> list[int]:
        return [r[0] - FIRST for r in await self.sql("SELECT revision FROM feed ORDER BY 1")]


AGING = {
    "feed": ("until",),
    "access_token": ("expire_time",),
    "assertion": ("expire_time",),
    "creation": ("expire_time",),
    "initial_access_token": ("expire_time",),
    "grant": ("expire_time", "end_time"),
    "session": ("expire_time", "end_time"),
    "failure": ("expire_time",),
    "audit": ("create_time",),
}


@pytest.fixture(params=["sqlite", "postgres"])
def _days(request: pytest.FixtureRequest, tmp_path: Path) -> Days:
    if request.param == "postgres":
        return Days(request.param, request.getfixturevalue("migrated_url"))
    return Days(request.param, asyncio.run(migrated(tmp_path)))


@pytest.fixture
async def days(_days: Days) -> AsyncIterator[Days]:
    yield _days
    await _days.close()


@pytest.fixture
def store(days: Days) -> Store:
    return days.open()


def dead(*tokens: object) -> list[Change]:
    return [change(MarkerKind.TOKEN_DEAD, str(token)) for token in tokens]


async def append(store: Store, *tokens: object) -> None:
    for token in tokens:
        await store.feed.append(dead(token))


def is_dead(state: State, token: object) -> bool:
    return state.is_dead(marker_key(MarkerKind.TOKEN_DEAD, str(token)))


class Worker:
    """A follower of its own."""

    def __init__(self, store: Store) -> None:
        self.clock = HandClock()
        self.state = State(120.0)
        self.store = store
        self.follow = Follow(store.feed, self.state, self.clock)


# What goes


async def test_what_is_over_goes_and_the_head_stays(days: Days, store: Store) -> None:
    compact = Compact(store.sweeps)
    await compact()
    assert await days.bounds() == (0, 0)
    await append(store, 1, 2, 3)
    await compact()
    assert (await days.bounds(), await days.revisions()) == ((3, 0), [1, 2, 3])
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, 4, 5)
    await compact()
    assert (await days.bounds(), await days.revisions()) == ((5, 3), [4, 5])
    await days.age(MARKER_LIFETIME_S + 1)
    for _ in range(2):
        await compact()
        assert (await days.bounds(), await days.revisions()) == ((5, 4), [5])
    await append(store, 6)
    await compact()
    assert (await days.bounds(), await days.revisions()) == ((6, 5), [6])


async def test_nothing_goes_above_what_is_still_needed(days: Days, store: Store) -> None:
    """The database's clock went back between two changes."""
    await append(store, 1, 2, 3, 4)
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, 5)
    await days.sql(f"UPDATE feed SET until = until + 9999 WHERE revision = {FIRST + 2}")
    await Compact(store.sweeps)()
    assert (await days.bounds(), await days.revisions()) == ((5, 1), [2, 3, 4, 5])


async def test_it_never_goes_back(days: Days, store: Store) -> None:
    await append(store, 1, 2, 3)
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, 4)
    await Compact(store.sweeps)()
    await days.sql(f"UPDATE feed_head SET compacted_to = {FIRST + 4}, revision = {FIRST + 9}")
    await Compact(store.sweeps)()
    assert await days.bounds() == (9, 4)


async def test_an_epoch_keeps_the_markers_that_are_not_over(days: Days, store: Store) -> None:
    """Where the database loses no commit nothing else kills what was revoked before."""
    await append(store, 1, 2)
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, 3)
    await store.feed.raise_epoch(await store.feed.read(0), 0, cut_off=False)
    await Compact(store.sweeps)()
    head, compacted_to = await days.bounds()
    assert (head == compacted_to, head // REVISIONS_PER_EPOCH) == (True, 1)
    assert await days.revisions() == [3]
    worker = Worker(store)
    await worker.follow.poll()
    assert [n for n in (1, 2, 3) if is_dead(worker.state, n)] == [3]


@pytest.mark.parametrize("pieces", [0, 1, 2])
async def test_killed_half_way_nothing_is_wrong_and_the_next_run_goes_on(
    days: Days, store: Store, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 3)
    await append(store, *range(10))
    late, early = Worker(store), Worker(store)
    await early.follow.poll()
    await append(store, "live")
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, "last")
    done = 0

    class Dying:
        async def compact(self) -> None:
            await store.sweeps.compact()

        async def sweep(self, table: str, most: int) -> int:
            nonlocal done
            if done == pieces:
                raise AuthError(Reason.STORE_UNAVAILABLE)
            done += 1
            return await store.sweeps.sweep(table, most)

    with pytest.raises(AuthError):
        await Compact(Dying())()
    assert await days.bounds() == (12, 11)
    assert len(await days.revisions()) == 12 - 3 * pieces
    for worker in (early, late):
        await worker.follow.poll()
        assert worker.state.revision == FIRST + 12
        assert is_dead(worker.state, "last")
    await Compact(store.sweeps)()
    assert await days.revisions() == [12]


async def test_two_at_once_do_no_harm(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 7)
    stores = [days.open(), days.open()]
    await append(stores[0], *range(60))
    await days.age(MARKER_LIFETIME_S + 1)
    results = await asyncio.gather(
        *(Compact(each.sweeps)() for each in stores * 2),
        *(each.feed.append(dead(n)) for n, each in enumerate(stores * 10)),
    )
    assert sorted(results[4:], key=str) == [FIRST + n for n in range(61, 81)]
    await Compact(stores[0].sweeps)()
    assert set(range(61, 81)) <= set(await days.revisions())
    assert min(await days.revisions()) >= 60


# Who reads on


async def test_follower_from_below_takes_a_snapshot_and_one_at_the_edge_reads_on(
    days: Days, store: Store
) -> None:
    below, edge, quick = (Worker(store) for _ in range(3))
    await append(store, 1)
    await below.follow.poll()
    await append(store, 2)
    await edge.follow.poll()
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, 3, 4)
    await quick.follow.poll()
    await Compact(store.sweeps)()
    assert await days.bounds() == (4, 2)
    for worker in (below, edge, quick):
        applied: list[Applied] = []
        worker.follow.on_applied(applied.append)
        await worker.follow.poll()
        assert applied[0].snapshot is (worker is below)
        assert worker.state.revision == FIRST + 4
        assert is_dead(worker.state, 3)
        assert is_dead(worker.state, 4)
    [row] = await days.sql("SELECT revision FROM feed_head")
    assert row[0] // REVISIONS_PER_EPOCH == 1  # nobody took it for another history


async def test_watcher_from_below_is_out_of_range(days: Days, store: Store) -> None:
    worker = Worker(store)
    await append(store, 1, 2)
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, 3)
    await worker.follow.poll()
    await Compact(store.sweeps)()
    watch = watching(store.feed, worker.follow, worker.state, worker.clock)
    with pytest.raises(AuthError) as refused:
        await anext(watch(FIRST + 1))
    assert refused.value.reason is Reason.REVISION_COMPACTED
    assert refused.value.metadata == {"compacted_to": str(FIRST + 2)}
    stream = watch(FIRST + 2)
    told = [marker.revision for e in await until_beat(stream) for marker in e.delta.markers]
    assert told == [FIRST + 3]
    await stream.aclose()


@pytest.mark.parametrize("behind", [False, True])
async def test_another_history_is_noticed_on_a_quiet_compacted_system(
    days: Days, store: Store, behind: bool
) -> None:
    """A restored database whose head is as high: only its nonce tells (design, epochs)."""
    await append(store, 1, 2, 3)
    worker = Worker(store)
    await worker.follow.poll()
    await days.age(MARKER_LIFETIME_S + 1)
    if behind:
        await append(store, 4)
    await Compact(store.sweeps)()
    assert await days.bounds() == ((4, 3) if behind else (3, 2))
    await worker.follow.poll()
    assert worker.state.revision // REVISIONS_PER_EPOCH == 1
    await days.sql("UPDATE feed_head SET nonce = 'another'")
    await days.sql("UPDATE feed SET nonce = 'another'")
    await worker.follow.poll()
    assert worker.state.revision // REVISIONS_PER_EPOCH == 2
    assert worker.state.everything > 2 * REVISIONS_PER_EPOCH


async def test_another_history_is_noticed_where_an_epoch_began(days: Days, store: Store) -> None:
    """There `compacted_to` is the head itself."""
    await store.feed.raise_epoch(await store.feed.read(0), 0, cut_off=False)
    workers = [Worker(store), Worker(days.open())]
    for worker in workers:
        await worker.follow.poll()
        assert worker.state.revision // REVISIONS_PER_EPOCH == 2
    await days.sql("UPDATE feed_head SET nonce = 'another'")
    for _ in range(2):
        for worker in workers:
            await worker.follow.poll()
            assert worker.state.revision // REVISIONS_PER_EPOCH == 3


async def test_follower_polls_on_while_much_is_compacted(
    days: Days, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 50)
    await store.feed.append(dead(*range(2000)))
    worker = Worker(days.open())
    await worker.follow.poll()
    await days.age(MARKER_LIFETIME_S + 1)
    await append(store, "last")
    compacting = asyncio.create_task(Compact(store.sweeps)())
    polls = 0
    while not compacting.done():
        await worker.follow.poll()
        await store.feed.append(dead(f"during {polls}"))
        polls += 1
    await compacting
    await worker.follow.poll()
    assert polls > 1
    assert is_dead(worker.state, f"during {polls - 1}")
    assert await days.count("feed") == polls + 1


async def test_between_two_pieces_it_rests_as_long_as_it_worked() -> None:
    """Who writes in another process tries again and again, and has to find a gap."""
    loop = asyncio.get_running_loop()
    worked: list[tuple[float, float]] = []

    class Slow:
        async def compact(self) -> None:
            pass

        async def sweep(self, table: str, most: int) -> int:
            started = loop.time()
            await asyncio.sleep(0.02)
            worked.append((started, loop.time()))
            return most if len(worked) < 5 else 0

    await Compact(Slow())()
    assert len(worked) == 5
    for (started, ended), (again, _) in pairwise(worked):
        assert again - ended > 0.9 * (ended - started)


# Sweeps

ROWS = {
    "access_token": "INSERT INTO access_token (digest, kid, claims, expire_time)"
    " VALUES ({blob}, '', '{{}}', {time})",
    "assertion": "INSERT INTO assertion (digest, expire_time) VALUES ({blob}, {time})",
    "creation": "INSERT INTO creation (digest, request_digest, object_id, expire_time)"
    " VALUES ({blob}, {blob}, 'c', {time})",
    "initial_access_token": "INSERT INTO initial_access_token (initial_access_token_id, digest,"
    " display_name, uses_left, rev, create_time, expire_time)"
    " VALUES ('{n}', {blob}, '', 1, 1, 0, {time})",
    "grant": 'INSERT INTO "grant" (grant_id, handle, generation, key_id, previous_key_id, sender,'
    " client_id, subject, session_id, parent_id, root_jti, details, rev, cutoff_keys, create_time,"
    " idle_expire_time, expire_time, end_time)"
    " VALUES ('{n}', {blob}, 1, '', '', '', '', '', '', '', '', '{{}}', 1, '[]', 0, 0, {time},"
    " {end})",
    "session": "INSERT INTO session (session_id, user_id, rev, cutoff_keys, address, acr, amr,"
    " create_time, auth_time, expire_time, end_time)"
    " VALUES ('{n}', '', 1, '[]', '', '', '[]', 0, 0, {time}, {end})",
    "failure": "INSERT INTO failure (digest, count, wait_until, expire_time)"
    " VALUES ({blob}, 1, 0, {time})",
    "audit": "INSERT INTO audit (audit_event_id, create_time, action, outcome, reason, actor,"
    " on_behalf_of, peer, address, subject, client_id, object_id, fields, comment, revision,"
    " request_id) VALUES ('{n}', {time}, '', 1, 0, '', '', '', '', '', '', '', '', '', 0, '')",
}
KEPT = {
    "access_token": 60.0,
    "assertion": 60.0,
    "creation": 60.0,
    "initial_access_token": DAY,
    "grant": DAY,
    "session": DAY,
    "failure": 60.0,
    "audit": 400 * DAY,
}
"""How long after its end."""


async def fill(days: Days, store: Store, table: str, ends: Sequence[float | None]) -> None:
    """Rows that are over so many seconds from now; those of None only by their end."""
    now = (await store.feed.read(0)).time
    for n, end in enumerate(ends):
        blob = f"x'{n:08x}'" if days.backend == "sqlite" else f"'\\x{n:08x}'"
        time = now + (DAY * 30 if end is None else end)
        over = "NULL" if end is not None else str(now - DAY - 5)
        await days.sql(ROWS[table].format(blob=blob, n=n, time=time, end=over))


@pytest.mark.parametrize("table", SWEPT)
async def test_rows_go_once_they_are_over_for_good(
    days: Days, store: Store, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 2)
    late = KEPT[table]
    ends: list[float | None] = [99.0, 0.0, -late + 30, -late - 5, -late - 5, -late - 9, -1e9]
    await fill(days, store, table, ends)
    await sweep(store.sweeps, table)
    assert await days.count(table) == 3
    await days.age(late + 99.0)
    await sweep(store.sweeps, table)
    assert await days.count(table) == 0


async def test_grants_that_ended_go_after_a_day(days: Days, store: Store) -> None:
    await fill(days, store, "grant", [None, 99.0])
    await sweep(store.sweeps, "grant")
    assert await days.count("grant") == 1


def test_every_table_that_is_swept_is_tested() -> None:
    assert set(SWEPT) == set(KEPT) == set(ROWS) == set(AGING) - {"feed"}


# Housekeeping


async def test_a_chore_that_fails_is_logged_and_the_others_still_run() -> None:
    done: list[str] = []

    async def good() -> None:
        done.append("good")

    async def refused() -> None:
        raise AuthError(Reason.STORE_UNAVAILABLE, cause="gone")

    async def broken() -> None:
        raise ValueError("planted")

    house = Housekeeping({"a": refused, "b": broken, "c": good}, 60.0)
    with capture_logs() as logs:
        await house.run_once()
    assert done == ["good"]
    assert [(entry["chore"], entry["log_level"]) for entry in logs] == [
        ("a", "warning"),
        ("b", "error"),
    ]


async def test_the_first_run_is_soon_and_the_next_ones_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("authsvc.housekeeping.FIRST_S", 0.01)
    runs = asyncio.Semaphore(0)

    async def chore() -> None:
        runs.release()

    running = asyncio.create_task(Housekeeping({"chore": chore}, 0.01).run())
    async with asyncio.timeout(20):
        for _ in range(3):
            await runs.acquire()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_database_that_is_gone_is_a_chore_that_failed(days: Days) -> None:
    store = days.open(timeout_s=0.5)
    await days.sql("ALTER TABLE feed RENAME TO hidden")
    with capture_logs() as logs:
        await Housekeeping({"compact": Compact(store.sweeps)}, 60.0).run_once()
    assert [entry["reason"] for entry in logs] == ["STORE_UNAVAILABLE"]
