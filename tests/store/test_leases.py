"""Beat, leases and fences: statements by the database's clock, of which each is one."""

import asyncio
import time

import asyncpg
import pytest

from authsvc.acting import Act, begin
from authsvc.errors import AuthError, Reason
from authsvc.store.port import AuditFilter, Store, change
from authsvc_client.core.markers import MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH
from tests.store.conftest import Place

HOUR_S = 3600
EVERYTHING = marker_key(MarkerKind.CUTOFF_EVERYTHING)


async def _wait(place: Place, seconds: float) -> None:
    if place.backend == "sqlite":
        place.clock.advance(seconds)
    else:
        await asyncio.sleep(seconds)


# Leases


async def test_of_workers_that_take_a_lease_at_once_one_has_it(place: Place) -> None:
    workers = [place.open() for _ in range(4)]
    for number in range(10):
        name = f"task {number}"
        taken = await asyncio.gather(
            *(worker.leases.take(name, str(at), 60) for at, worker in enumerate(workers))
        )
        assert sorted(taken) == [False, False, False, True]
        again = [await workers[0].leases.take(name, str(at), 60) for at in range(4)]
        assert again == taken


async def test_a_lease_runs_out_and_is_renewed(place: Place, store: Store) -> None:
    assert await store.leases.take("task", "dies", 0.2)
    assert not await store.leases.take("task", "next", 0.2)
    assert await store.leases.take("other task", "next", 0.2)
    await _wait(place, 0.3)
    assert await store.leases.take("task", "next", 60)
    assert not await store.leases.take("task", "dies", 60)
    assert await store.leases.take("task", "next", 60)


async def test_leases_that_are_given_back_are_anybodys(store: Store) -> None:
    for name in ("one", "two"):
        assert await store.leases.take(name, "stops", 60)
    assert await store.leases.take("three", "stays", 60)
    await store.leases.give_back("stops")
    taken = [await store.leases.take(name, "next", 60) for name in ("one", "two", "three")]
    assert taken == [True, True, False]


async def test_a_clock_that_goes_back_keeps_no_task_from_being_done(
    place: Place, store: Store
) -> None:
    assert await store.leases.take("task", "dead", 60)
    await place.sql("UPDATE lease SET until = until + 7200")
    assert await store.leases.take("task", "next", 60)


# The beat


async def _beat(place: Place) -> float:
    return float((await place.sql("SELECT time FROM beat"))[0][0])


async def test_a_file_has_no_beat(place_sqlite: Place) -> None:
    store = place_sqlite.open()
    await store.feed.beat(0.0)
    assert (await store.feed.read(0)).beat is None
    assert await _beat(place_sqlite) == 0


async def test_of_workers_at_once_one_beats_and_none_before_it_is_due(place_pg: Place) -> None:
    workers = [place_pg.open() for _ in range(3)]
    await asyncio.gather(*(worker.feed.beat(0.9) for worker in workers))
    first = await _beat(place_pg)
    await asyncio.gather(*(worker.feed.beat(0.9) for worker in workers))
    page = await workers[0].feed.read(0)
    assert page.beat == await _beat(place_pg) == first
    assert 0 <= page.time - first < 60
    for moved in (1, -1, 7200, -7200):  # by time that passes, and by a clock that goes back
        await place_pg.sql(f"UPDATE beat SET time = time - {moved}")
        await workers[0].feed.beat(0.9)
        assert abs(await _beat(place_pg) - first) < 60


async def test_a_lost_row_is_no_beat(place_pg: Place) -> None:
    await place_pg.sql("DELETE FROM beat")
    store = place_pg.open()
    await store.feed.beat(0.9)
    assert (await store.feed.read(0)).beat == 0


async def test_nobody_waits_for_a_beat_that_is_held_up(place_pg: Place) -> None:
    holding = await asyncpg.connect(place_pg.url.replace("+asyncpg", ""))
    try:
        async with holding.transaction():
            await holding.execute("UPDATE beat SET time = 5")
            store = place_pg.open()
            started = time.monotonic()
            for _ in range(5):
                await store.feed.beat(0.9)
            assert (await store.feed.read(0)).beat == 0
            assert time.monotonic() - started < 5  # the statement's limit, of which none was hit
    finally:
        await holding.close()


async def test_what_takes_no_writes_is_read_and_does_not_beat(place_pg: Place) -> None:
    name = place_pg.url.partition(":///")[2].partition("?")[0]
    await place_pg.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    store = place_pg.open()
    with pytest.raises(AuthError) as caught:
        await store.feed.beat(0.9)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    page = await store.feed.read(0)
    assert (page.beat, page.standby) == (0, False)


# Fences


async def test_a_fence_cuts_off_everything_above_all_that_was_lost(
    place: Place, store: Store
) -> None:
    begin(lambda: Act("Fence", comment="restored"))
    before = await store.feed.read(0)
    revisions = []
    for _ in range(3):
        revisions.append(await store.feed.fence())
        await _wait(place, 0.01)
    assert revisions == sorted(set(revisions))
    page = await store.feed.read(1)
    assert page.head == revisions[-1] < 2**53
    assert page.compacted_to == page.head - 1
    assert page.head // REVISIONS_PER_EPOCH == int(page.time // HOUR_S)
    assert page.known_fingerprint == page.fingerprint
    assert page.nonce != before.nonce
    assert [m.revision for m in page.markers if m.key == EVERYTHING] == revisions
    stored = await place.sql(f"SELECT revision FROM cutoff WHERE key = '{EVERYTHING.hex()}'")
    assert stored == [(page.head,)]
    events = await store.audit.page(AuditFilter(action="Fence"), None, 10)
    assert [(event.revision, event.act.comment) for event in events] == [
        (revision, "restored") for revision in reversed(revisions)
    ]


async def test_a_fence_is_above_a_lost_history_that_was_fenced_a_moment_ago(
    place: Place, store: Store
) -> None:
    """And wrote something then: the backup knows neither."""
    await store.feed.fence()
    lost = 0
    for number in range(20):
        lost = await store.feed.append([change(MarkerKind.TOKEN_DEAD, str(number))])
    await place.sql("UPDATE feed_head SET revision = 4294967299, compacted_to = 4294967296")
    await place.sql("DELETE FROM feed")
    await place.sql("DELETE FROM cutoff")
    await _wait(place, 0.01)
    assert await store.feed.fence() > lost


async def test_a_fence_goes_up_where_the_clock_is_wrong(place: Place, store: Store) -> None:
    ahead = 2**52
    await place.sql(f"UPDATE feed_head SET revision = {ahead}, compacted_to = {ahead}")
    found = await store.feed.fence()
    assert found // REVISIONS_PER_EPOCH == ahead // REVISIONS_PER_EPOCH + 1
