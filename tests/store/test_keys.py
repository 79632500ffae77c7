"""The key ring in each database: each verb in each state, at once, and when the database fails."""

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial

import asyncpg
import pytest

from authsvc.errors import AuthError, Reason
from authsvc.model import KeyState, SigningKey
from authsvc.store.port import KeyStore, Tainted
from authsvc.store.sql_keys import KEPT_S
from authsvc_client.core.markers import MarkerKind, marker_key
from tests.store.conftest import Place
from tests.store.test_contract import head, outcome

DAY = 86400.0
NEXT, CURRENT, RETIRED, TAINTED = KeyState
CONFLICT, MISSING = Reason.SIGNING_KEY_STATE_CONFLICT, Reason.SIGNING_KEY_NOT_FOUND
Change = Callable[[KeyStore], Awaitable[object]]


def a_key(kid: str) -> SigningKey:
    """What a worker hands in, its clock far off."""
    return SigningKey(kid, "ES256", NEXT, {"kid": kid, "kty": "EC"}, b"\x00sealed\xff", 7.25)


async def states(keys: KeyStore) -> dict[str, KeyState]:
    return {key.kid: key.state for key in await keys.all()}


async def ring(keys: KeyStore) -> list[SigningKey]:
    return sorted(await keys.all(), key=lambda key: key.kid)


async def stored(keys: KeyStore, kid: str) -> SigningKey:
    return next(key for key in await keys.all() if key.kid == kid)


async def a_ring(keys: KeyStore) -> None:
    """One key of each state, named by it."""
    await keys.add_first(a_key("tainted"))
    await keys.taint("tainted", a_key("retired"), 0.0)
    await keys.prepare(a_key("current"), 0.0)
    await keys.activate("current")
    await keys.prepare(a_key("next"), 0.0)
    assert await states(keys) == {state.value: state for state in KeyState}


async def database_time(place: Place) -> float:
    if place.backend == "sqlite":
        return place.clock.wall()
    [[found]] = await place.sql("SELECT extract(epoch FROM clock_timestamp())::float8")
    return float(found)


async def age(place: Place, seconds: float) -> None:
    """Lets so much time pass, for the keys."""
    if place.backend == "sqlite":
        place.clock.advance(seconds)
        return
    columns = ("create_time", "ready_time", "activate_time", "retire_time", "taint_time")
    moved = ", ".join(f"{name} = {name} - {seconds}" for name in columns)
    await place.sql(f"UPDATE signing_key SET {moved}")


# Each verb


async def test_the_first_key_comes_back_and_stays(place: Place) -> None:
    store, earliest = place.open(), await database_time(place)
    assert await store.keys.all() == ()
    before = await head(store)
    await store.keys.add_first(a_key("one"))
    await store.keys.add_first(a_key("two"))
    [one] = await store.keys.all()
    assert await head(store) == before + 1
    at = one.create_time
    assert earliest <= at <= await database_time(place)
    expected = replace(a_key("one"), state=CURRENT, create_time=at, ready_time=at, activate_time=at)
    assert one == expected


STEPS: dict[str, Change] = {
    "prepare": lambda keys: keys.prepare(a_key("more"), 0.0),
    **{
        f"{verb} {kid}": lambda keys, verb=verb, kid=kid: getattr(keys, verb)(kid)  # type: ignore[misc]
        for verb in ("activate", "retire")
        for kid in (*KeyState, "nobody")
    },
    **{
        f"taint {kid}": lambda keys, kid=kid: keys.taint(kid, a_key("spare"), 5.0)  # type: ignore[misc]
        for kid in (*KeyState, "nobody")
    },
}
REFUSED = {
    "prepare": CONFLICT,
    **{
        f"{verb} {kid}": CONFLICT
        for verb in ("activate", "retire")
        for kid in (CURRENT, RETIRED, TAINTED)
    },
    **{f"{verb} nobody": MISSING for verb in ("activate", "retire", "taint")},
}
MOVED: dict[str, dict[str, KeyState]] = {
    "activate next": {"next": CURRENT, "current": RETIRED},
    "retire next": {"next": RETIRED},
    "taint next": {"next": TAINTED},
    "taint current": {"current": TAINTED, "next": CURRENT},
    "taint retired": {"retired": TAINTED},
    "taint tainted": {},
}


@pytest.mark.parametrize("step", STEPS)
async def test_each_verb_in_each_state(place: Place, step: str) -> None:
    store = place.open()
    await a_ring(store.keys)
    before, first = await ring(store.keys), await head(store)
    reason = await outcome(STEPS[step](store.keys))
    assert reason == REFUSED.get(step)
    moved = {} if reason else MOVED[step]
    assert await states(store.keys) == {state.value: state for state in KeyState} | moved
    page = await store.feed.read(first)
    if not moved:
        assert page.head == first
        assert await ring(store.keys) == before
        return
    assert page.head == first + 1
    expected = {(MarkerKind.KEYS_CHANGED, marker_key(MarkerKind.KEYS_CHANGED))}
    if step.startswith("taint"):
        key = marker_key(MarkerKind.KEY_TAINTED, step.removeprefix("taint "))
        expected.add((MarkerKind.KEY_TAINTED, key))
    assert {(marker.kind, marker.key) for marker in page.markers} == expected


async def test_what_signs_no_more_has_no_private_part_and_tells_since_when(place: Place) -> None:
    store = place.open()
    await a_ring(store.keys)
    now, found = await database_time(place), {k.state: k for k in await store.keys.all()}
    for state, key in found.items():
        assert bool(key.sealed_private) is (state in (NEXT, CURRENT))
        assert key.public_jwk == {"kid": key.kid, "kty": "EC"}
        times = (key.activate_time, key.retire_time, key.taint_time)
        assert [time is not None for time in times] == [
            state is not NEXT,
            state is RETIRED,
            state is TAINTED,
        ]
        assert all(now - 60 < time <= now for time in times if time is not None)
    assert "sealed" not in repr(found)


async def test_next_signs_only_when_it_is_ready_by_the_databases_clock(place: Place) -> None:
    keys = place.open().keys
    await keys.add_first(a_key("one"))
    made, _ = await keys.prepare(a_key("two"), 600.0)
    assert made.ready_time == pytest.approx(made.create_time + 600)
    assert (await stored(keys, "two")) == made
    for passed, left in ((0.0, 600.0), (500.0, 100.0)):
        await age(place, passed)
        with pytest.raises(AuthError) as caught:
            await keys.activate("two")
        assert caught.value.reason is Reason.SIGNING_KEY_NOT_READY
        assert caught.value.retry_after_s == pytest.approx(left, abs=20)
        assert await states(keys) == {"one": CURRENT, "two": NEXT}
    await age(place, 100.0)
    active, revision = await keys.activate("two")
    assert revision
    assert await stored(keys, "two") == active
    assert await states(keys) == {"one": RETIRED, "two": CURRENT}


async def test_taint_of_the_current_key_takes_next_ready_or_not_else_the_spare(
    place: Place,
) -> None:
    store = place.open()
    keys = store.keys
    await keys.add_first(a_key("one"))
    await keys.prepare(a_key("two"), 600.0)
    first = await keys.taint("one", a_key("spare"), 300.0)
    assert (first.key.state, first.current) == (TAINTED, await stored(keys, "two"))
    assert await states(keys) == {"one": TAINTED, "two": CURRENT}
    second = await keys.taint("two", a_key("spare"), 300.0)
    assert second.revision == first.revision + 1 == await head(store)
    spare = await stored(keys, "spare")
    assert second.current == spare
    assert spare.activate_time == spare.create_time == spare.ready_time - 300
    assert await states(keys) == {"one": TAINTED, "two": TAINTED, "spare": CURRENT}
    again = await keys.taint("two", a_key("another"), 0.0)
    assert again == Tainted(second.key, spare, 0)
    assert await head(store) == second.revision


@pytest.mark.parametrize("kid", ["next", "current", "retired", "tainted"])
async def test_taint_dry_tells_what_would_be_and_changes_nothing(place: Place, kid: str) -> None:
    store = place.open()
    keys = store.keys
    await a_ring(keys)
    before, first = await ring(keys), await head(store)
    told = await keys.taint(kid, a_key("spare"), 0.0, dry=True)
    assert told.revision == 0
    assert (await ring(keys), await head(store)) == (before, first)
    done = await keys.taint(kid, a_key("spare"), 0.0)
    assert told.key.state is done.key.state is TAINTED
    assert told.current is not None
    assert done.current is not None
    assert told.current.kid == done.current.kid
    assert told.current.state is CURRENT


async def test_taint_dry_names_no_key_that_has_yet_to_be_made(place: Place) -> None:
    keys = place.open().keys
    await keys.add_first(a_key("one"))
    assert (await keys.taint("one", a_key("spare"), 0.0, dry=True)).current is None
    assert await states(keys) == {"one": CURRENT}


async def test_taint_is_durable_beside_its_marker(place: Place) -> None:
    """Grants that were exchanged from its tokens outlive every marker."""
    keys = place.open().keys
    await keys.add_first(a_key("one"))
    done = await keys.taint("one", a_key("two"), 0.0)
    key = marker_key(MarkerKind.KEY_TAINTED, "one").hex()
    [[revision]] = await place.sql(f"SELECT revision FROM cutoff WHERE key = '{key}'")
    assert revision == done.revision


async def test_purge_forgets_public_parts_then_rows(place: Place) -> None:
    store = place.open()
    keys = store.keys
    await a_ring(keys)
    start = await head(store)
    await age(place, 3000.0)
    await keys.purge(3600.0)
    assert await head(store) == start, "nothing was due"
    await age(place, 1000.0)
    await keys.purge(3600.0)
    await keys.purge(3600.0)
    assert await head(store) == start + 1
    assert {key.kid: key.verifies for key in await keys.all()} == {
        "next": True,
        "current": True,
        "retired": False,
        "tainted": False,
    }
    assert (await keys.taint("retired", a_key("spare"), 0.0)).revision
    await age(place, KEPT_S + 1)
    await keys.purge(3600.0)
    assert await states(keys) == {"next": NEXT, "current": CURRENT}


# At once


async def test_eight_at_once_make_one(place: Place) -> None:
    workers = [place.open(), place.open()]
    before = await head(workers[0])
    await asyncio.gather(*(workers[n % 2].keys.add_first(a_key(f"k{n}")) for n in range(8)))
    [first] = await workers[0].keys.all()
    assert first.state is CURRENT
    made = await asyncio.gather(
        *(outcome(workers[n % 2].keys.prepare(a_key(f"n{n}"), 0.0)) for n in range(8))
    )
    assert Counter(made) == {None: 1, CONFLICT: 7}
    [heir] = [kid for kid, state in (await states(workers[1].keys)).items() if state is NEXT]
    taken = await asyncio.gather(*(outcome(workers[n % 2].keys.activate(heir)) for n in range(8)))
    assert Counter(taken) == {None: 1, CONFLICT: 7}
    tainted = await asyncio.gather(
        *(workers[n % 2].keys.taint(heir, a_key(f"s{n}"), 0.0) for n in range(8))
    )
    assert len([done for done in tainted if done.revision]) == 1
    assert len({done.current.kid for done in tainted if done.current}) == 1
    assert await head(workers[0]) == before + 4
    assert Counter((await states(workers[0].keys)).values()) == {RETIRED: 1, TAINTED: 1, CURRENT: 1}


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_two_workers_do_at_once_one_key_signs(place: Place, seed: int) -> None:
    chance = random.Random(seed)
    workers = [place.open(), place.open()]
    await workers[0].keys.add_first(a_key("first"))
    watching = True

    async def watch() -> int:
        looks = 0
        while watching:
            seen = Counter(key.state for key in await workers[looks % 2].keys.all())
            assert seen[CURRENT] == 1
            assert seen[NEXT] <= 1
            looks += 1
        return looks

    async def work(name: int) -> list[Reason | None]:
        keys = workers[name % 2].keys
        done: list[Reason | None] = []
        for number in range(12):
            kids = [key.kid for key in await keys.all()]
            kid, fresh = chance.choice(kids[-4:]), a_key(f"w{name}-{number}")
            steps: list[Callable[[], Awaitable[object]]] = [
                partial(keys.prepare, fresh, 0.0),
                partial(keys.activate, kid),
                partial(keys.retire, kid),
                partial(keys.taint, kid, fresh, 0.0),
                partial(keys.purge, 0.0),
            ]
            done.append(await outcome(chance.choice(steps)()))
        return done

    watcher = asyncio.create_task(watch())
    results = await asyncio.gather(*map(work, range(4)))
    watching = False
    assert await watcher > 3
    assert {reason for done in results for reason in done} <= {None, CONFLICT, MISSING}
    page = await workers[0].feed.read(1)
    assert {m.revision for m in page.markers} == set(range(page.compacted_to + 1, page.head + 1))
    for key in await workers[1].keys.all():
        assert bool(key.sealed_private) is (key.state in (NEXT, CURRENT))


# What fails


@asynccontextmanager
async def held(place: Place) -> AsyncIterator[None]:
    """Somebody else holds the lock that every change needs."""
    if place.backend == "sqlite":
        file = place.url.partition(":///")[2]
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    other = await asyncpg.connect(place.url.replace("+asyncpg", ""))
    try:
        async with other.transaction():
            await other.execute("LOCK TABLE feed_head")
            yield
    finally:
        await other.close()


async def test_a_change_that_cannot_be_made_in_time_leaves_nothing(place: Place) -> None:
    store = place.open()
    await a_ring(store.keys)
    before = await ring(store.keys)
    hurried = place.open(timeout_s=0.3).keys
    changes: list[Change] = [
        lambda keys: keys.retire("next"),
        lambda keys: keys.activate("next"),
        lambda keys: keys.taint("current", a_key("spare"), 0.0),
        lambda keys: keys.taint("retired", a_key("spare"), 0.0),
        lambda keys: keys.purge(-1.0),
    ]
    async with held(place):
        for change in changes:
            assert await outcome(change(hurried)) is Reason.STORE_UNAVAILABLE
    assert await ring(store.keys) == before
    assert await outcome(hurried.activate("next")) is None


async def test_a_caller_that_goes_away_cuts_no_change_in_half(place: Place) -> None:
    store = place.open()
    await store.keys.add_first(a_key("k0"))
    for number in range(1, 12):
        await store.keys.prepare(a_key(f"k{number}"), 0.0)
        change = asyncio.create_task(store.keys.activate(f"k{number}"))
        for _ in range(number):
            await asyncio.sleep(0)
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
        async with asyncio.timeout(10):
            while (await states(store.keys))[f"k{number}"] is not CURRENT:
                if number < 2:  # it may not have begun
                    await outcome(store.keys.activate(f"k{number}"))
                await asyncio.sleep(0.005)
        assert Counter((await states(store.keys)).values()) == {CURRENT: 1, RETIRED: number}


async def test_postgres_ends_the_connection_of_a_change_and_nothing_is_half_done(
    place_pg: Place,
) -> None:
    store = place_pg.open()
    await a_ring(store.keys)
    before = await ring(store.keys)
    async with held(place_pg):
        change = asyncio.create_task(outcome(store.keys.taint("current", a_key("spare"), 0.0)))
        ended: list[object] = []
        async with asyncio.timeout(10):
            while not ended:
                await asyncio.sleep(0.01)
                ended = await place_pg.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE"
                    " application_name = 'authsvc' AND wait_event_type = 'Lock'"
                    " AND datname = current_database()"
                )
        assert await change is Reason.STORE_UNAVAILABLE
    assert await ring(store.keys) == before
    assert (await store.keys.taint("current", a_key("spare"), 0.0)).revision


async def test_a_current_key_that_cannot_be_read_is_not_replaced_unseen(place: Place) -> None:
    """A newer version wrote it, and signs with it."""
    store = place.open()
    await a_ring(store.keys)
    await place.sql("UPDATE signing_key SET public_jwk = '7' WHERE kid = 'current'")
    await store.keys.add_first(a_key("another"))
    assert await outcome(store.keys.activate("next")) is CONFLICT
    found = await states(store.keys)
    assert found == {"next": NEXT, "retired": RETIRED, "tainted": TAINTED}
