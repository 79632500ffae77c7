"""Grants, their refresh tokens and used assertions, over each kind of database."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event

from authsvc.errors import AuthError, Reason
from authsvc.model import Grant, GrantType, Origin
from authsvc.store import sql_feed, sql_grants
from authsvc.store.port import Change, Reused, Store, Use, change
from authsvc.store.sql import Database
from authsvc.store.sql_grants import SqlGrants
from authsvc_client.core.markers import MarkerKind
from tests.servers import Postgres
from tests.store.conftest import Place

KIND = MarkerKind
IDLE_S, LIFE_S = 100.0, 1000.0
KEY, NEXT_KEY = "0000000a", "0000000b"
CLIENT, SUBJECT, ACTOR, API, OTHER_API = "app", "alice", "shop", "https://a.test", "https://b.test"
ORIGIN = Origin(
    SUBJECT,
    actors=(CLIENT, ACTOR),
    session_id="login",
    root_jti="root",
    key_ids=("kid-1", "kid-2"),
    auth_time=7,
    acr="urn:acr",
    amr=("pwd", "otp"),
)
ALONE = Origin(SUBJECT)
_numbers: Iterator[int] = count(1)


def now(place: Place) -> float:
    """By the database's clock, or very nearly."""
    return place.clock.wall() if place.backend == "sqlite" else time.time()


def a_grant(place: Place, **more: Any) -> Grant:
    number, start = next(_numbers), now(place)
    made = Grant(
        grant_id=f"g{number}",
        client_id=CLIENT,
        origin=ALONE,
        grant_type=GrantType.TOKEN_EXCHANGE,
        scopes=frozenset({"read", "write"}),
        audiences=(API, OTHER_API),
        sender=CLIENT,
        rev=2**32,
        handle=number.to_bytes(16, "big"),
        key_id=KEY,
        create_time=start,
        idle_expire_time=start + IDLE_S,
        expire_time=start + LIFE_S,
    )
    return replace(made, **more)


def a_use(grant: Grant, generation: int = 1, **more: Any) -> Use:
    made = Use(
        grant.handle,
        generation,
        KEY,
        grant.client_id,
        grant.sender,
        bool(grant.sender),
        KEY,
        IDLE_S,
    )
    return replace(made, **more)


async def add(store: Store, grant: Grant) -> Grant:
    assert await store.grants.add(grant)
    return grant


async def used(store: Store, grant: Grant, generation: int = 1, **more: Any) -> str:
    """`-> n` for a successor, REUSED where it killed the grant, or NOTHING."""
    found = await store.grants.use(a_use(grant, generation, **more))
    if isinstance(found, Reused):
        assert found.grant_id == grant.grant_id
        assert found.revision > 2**32
        return "REUSED"
    return "NOTHING" if found is None else f"-> {found.generation}"


async def is_alive(store: Store, grant: Grant) -> bool:
    return await store.grants.by_handle(grant.handle) is not None


async def let_pass(place: Place, seconds: float) -> None:
    """Time, for the grants that are there."""
    if place.backend == "sqlite":
        place.clock.advance(seconds)
    else:
        await place.sql(
            'UPDATE "grant" SET expire_time = expire_time - $1,'
            " idle_expire_time = idle_expire_time - $1",
            seconds,
        )


async def forget_feed(place: Place) -> None:
    """As if all markers had been compacted."""
    await place.sql("DELETE FROM feed")
    await place.sql("UPDATE feed_head SET compacted_to = revision")


async def reason(call: Awaitable[object]) -> Reason:
    with pytest.raises(AuthError) as caught:
        await call
    return caught.value.reason


async def outcome(call: Awaitable[object]) -> Reason | None:
    """Why the database could not do it; None where it did."""
    try:
        await call
    except AuthError as error:
        return error.reason
    return None


async def reaches(place: Place, query: str, wanted: int) -> None:
    """Polls until a count in the database is as wanted."""
    async with asyncio.timeout(20):
        while (await place.sql(query))[0][0] != wanted:  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.002)


# --- one statement ---


async def test_a_grant_comes_back_with_all_its_fields(place: Place, store: Store) -> None:
    parent = await add(store, a_grant(place))
    grant = await add(store, a_grant(place, origin=replace(ORIGIN, grant_id=parent.grant_id)))
    assert await store.grants.by_handle(grant.handle) == grant
    found = await store.grants.use(a_use(grant, next_key_id=NEXT_KEY))
    assert isinstance(found, Grant)
    assert found.use_time is not None
    assert now(place) - 5 < found.use_time <= now(place) + 1
    assert found.idle_expire_time == pytest.approx(found.use_time + IDLE_S, abs=1)
    assert found == replace(
        grant,
        generation=2,
        key_id=NEXT_KEY,
        use_time=found.use_time,
        idle_expire_time=found.idle_expire_time,
    )


async def test_the_good_path_is_one_update(place: Place) -> None:
    database = place.database()
    grants, statements = SqlGrants(database), list[str]()
    grant = a_grant(place)
    assert await grants.add(grant)
    for engine in (database._writer, database._reader):
        event.listen(
            engine.sync_engine,
            "before_cursor_execute",
            lambda _connection, _cursor, statement, *_: statements.append(statement),
        )
    for generation in (1, 1, 2):
        found = await grants.use(a_use(grant, generation))
        assert isinstance(found, Grant)
    words = [statement.split()[0] for statement in statements]
    begin = ["BEGIN"] if place.backend == "sqlite" else []
    assert words == [*begin, "UPDATE"] * 3


async def test_on_postgres_no_begin_crosses_the_wire(place_pg: Place, postgres: Postgres) -> None:
    """Design section 8: RefreshToken is one statement and one round trip."""
    (name,) = (await place_pg.sql("SELECT current_database()"))[0]
    await place_pg.sql(f"ALTER DATABASE {name} SET log_statement = 'all'")
    store = place_pg.open()
    grant = await add(store, a_grant(place_pg))
    await used(store, grant)  # the driver asks for types at first
    log = postgres.folder / "log"
    start = log.stat().st_size
    for generation in (2, 2, 3):
        assert await used(store, grant, generation) == f"-> {generation + 1}"
    assert await used(store, grant, 1) == "REUSED"
    words = re.findall(r"LOG:  (?:statement|execute [^:]*): (\w+)", log.read_text()[start:])
    assert words[:4] == ["UPDATE"] * 4
    assert words[4] == "BEGIN"  # only the refusal is a transaction


# --- what a refresh token may do ---


async def test_a_lost_reply_is_answered_until_the_successor_is_used(
    place: Place, store: Store
) -> None:
    grant = await add(store, a_grant(place))
    for _ in range(3):
        assert await used(store, grant, 1) == "-> 2"
    assert await used(store, grant, 2) == "-> 3"
    assert await used(store, grant, 2) == "-> 3"
    assert await used(store, grant, 1) == "REUSED"
    for generation in range(5):
        assert await used(store, grant, generation) == "NOTHING"


WRONG: dict[str, dict[str, Any]] = {
    "older": {"generation": 1},
    "oldest": {"generation": 0},
    "newer": {"generation": 4},
    "far newer": {"generation": 2**63 - 1},
    "live, of another HMAC key": {"generation": 3, "key_id": NEXT_KEY},
    "repeated, of another HMAC key": {"generation": 2, "key_id": NEXT_KEY},
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_not_the_live_generation_kills(
    place: Place, store: Store, wrong: str
) -> None:
    grant = await add(store, a_grant(place))
    await used(store, grant, 1)
    assert await used(store, grant, 2) == "-> 3"
    before = (await store.feed.read(0)).head
    found = await store.grants.use(a_use(grant, **WRONG[wrong]))
    assert found == Reused(grant.grant_id, before + 1)
    assert await used(store, grant, 3) == "NOTHING"
    assert not await is_alive(store, grant)
    dead = change(KIND.GRANT_DEAD, grant.grant_id).key
    assert [m.key for m in (await store.feed.read(before)).markers] == [dead]
    await forget_feed(place)
    assert await used(store, grant, 3) == "NOTHING"


@pytest.mark.parametrize("generation", [0, 1, 2, 3, 9])
@pytest.mark.parametrize(
    "other", [{"client_id": "thief"}, {"sender": "thief"}, {"sender": ""}, {"handle": bytes(16)}]
)
async def test_others_get_nothing_and_break_nothing(
    place: Place, store: Store, generation: int, other: dict[str, Any]
) -> None:
    """RFC 6749 section 6: bound to the client that it was issued to."""
    grant = await add(store, a_grant(place))
    assert await used(store, grant, 1) == "-> 2"
    kept = await store.grants.by_handle(grant.handle)
    head = (await store.feed.read(0)).head
    assert await store.grants.use(a_use(grant, generation, **other)) is None
    assert await store.grants.by_handle(grant.handle) == kept
    assert (await store.feed.read(0)).head == head
    assert await used(store, grant, 2) == "-> 3"


async def test_a_public_client_without_a_key_repeats_nothing(place: Place, store: Store) -> None:
    """RFC 9700 section 4.14.2: without a sender key a repeat is a thief's, or may be."""
    grant = await add(store, a_grant(place, sender=""))
    assert await used(store, grant, 1) == "-> 2"
    assert await used(store, grant, 2) == "-> 3"
    assert await used(store, grant, 2) == "REUSED"
    assert await used(store, grant, 3) == "NOTHING"


async def test_a_public_client_with_a_key_repeats_by_that_key_alone(
    place: Place, store: Store
) -> None:
    grant = await add(store, a_grant(place, sender="thumbprint"))
    assert await used(store, grant, 1) == "-> 2"
    assert await used(store, grant, 1) == "-> 2"
    for generation in (1, 2, 9):
        other = {"sender": "another", "may_repeat": True}
        assert await used(store, grant, generation, **other) == "NOTHING"
    assert await used(store, grant, 2) == "-> 3"


async def test_hmac_keys_change_and_each_generation_keeps_its_own(
    place: Place, store: Store
) -> None:
    grant = await add(store, a_grant(place))
    first = await store.grants.use(a_use(grant, 1, next_key_id=NEXT_KEY))
    again = await store.grants.use(a_use(grant, 1, next_key_id="0000000c"))
    assert isinstance(first, Grant)
    assert isinstance(again, Grant)
    assert first.key_id == again.key_id == NEXT_KEY  # the same successor, whoever answers
    assert await used(store, grant, 2, key_id=NEXT_KEY) == "-> 3"
    assert await used(store, grant, 2, key_id=NEXT_KEY) == "-> 3"
    assert await used(store, grant, 2, key_id=KEY) == "REUSED"


# --- what ends it ---


async def test_it_ends_when_idle_and_at_its_end_by_the_databases_clock(
    place: Place, store: Store
) -> None:
    idle, kept = await add(store, a_grant(place)), await add(store, a_grant(place))
    generation = 1
    for _ in range(int(LIFE_S / 90) - 1):
        await let_pass(place, 90)
        assert await used(store, kept, generation) == f"-> {generation + 1}"
        generation += 1
    for wrong in (1, 2, 0):
        assert await used(store, idle, wrong) == "NOTHING"  # an old one is not reused, it is over
    await let_pass(place, 90)
    assert await used(store, kept, generation) == f"-> {generation + 1}"
    await let_pass(place, 20)  # used a moment ago, and at its end
    assert await used(store, kept, generation + 1) == "NOTHING"
    assert await used(store, kept, 1) == "NOTHING"


async def test_a_repeat_keeps_a_grant_from_being_idle(place: Place, store: Store) -> None:
    grant = await add(store, a_grant(place))
    for _ in range(3):
        await let_pass(place, 60)
        assert await used(store, grant, 1) == "-> 2"
    await let_pass(place, 101)
    assert await used(store, grant, 2) == "NOTHING"


CUTOFFS: dict[str, Change] = {
    "everything": change(KIND.CUTOFF_EVERYTHING),
    "client": change(KIND.CUTOFF_CLIENT, CLIENT),
    "subject": change(KIND.CUTOFF_SUBJECT, SUBJECT),
    "subject+client": change(KIND.CUTOFF_SUBJECT_CLIENT, SUBJECT, CLIENT),
    "subject as client": change(KIND.CUTOFF_CLIENT, SUBJECT),
    "client as subject": change(KIND.CUTOFF_SUBJECT, CLIENT),
    "actor": change(KIND.CUTOFF_CLIENT, ACTOR),
    "actor as subject": change(KIND.CUTOFF_SUBJECT, ACTOR),
    "subject+actor": change(KIND.CUTOFF_SUBJECT_CLIENT, SUBJECT, ACTOR),
    "actor+client": change(KIND.CUTOFF_SUBJECT_CLIENT, ACTOR, CLIENT),
    "resource": change(KIND.CUTOFF_RESOURCE, API),
    "other resource": change(KIND.CUTOFF_RESOURCE, OTHER_API),
    "key": change(KIND.KEY_TAINTED, "kid-1"),
    "other key": change(KIND.KEY_TAINTED, "kid-2"),
}
UNCONCERNED = (
    change(KIND.CUTOFF_CLIENT, "nobody"),
    change(KIND.CUTOFF_SUBJECT, API),
    change(KIND.CUTOFF_SUBJECT_CLIENT, CLIENT, SUBJECT),
    change(KIND.CUTOFF_RESOURCE, CLIENT),
    change(KIND.KEY_TAINTED, "kid-3"),
    change(KIND.TOKEN_DEAD, "login"),
    change(KIND.SESSION_DEAD, "root"),
    change(KIND.CLIENT_CHANGED, CLIENT),
)


@pytest.mark.parametrize("cutoff", CUTOFFS)
async def test_below_a_cutoff_it_is_dead_for_ever(place: Place, store: Store, cutoff: str) -> None:
    """Design section 5: cutoffs are durable, and outlive their rows in the feed."""
    head = await store.feed.append(UNCONCERNED)
    old = await add(store, a_grant(place, origin=ORIGIN, rev=head))
    other = await add(
        store, a_grant(place, client_id="x", sender="x", origin=Origin("y"), rev=head)
    )
    assert await used(store, old, 1) == "-> 2"
    before = await store.feed.append(UNCONCERNED)
    assert await used(store, old, 2) == "-> 3"
    revision = await store.feed.append([CUTOFFS[cutoff]])
    below = await add(store, a_grant(place, origin=ORIGIN, rev=before))
    at = await add(store, a_grant(place, origin=ORIGIN, rev=revision))
    for _ in range(2):
        for dead, generations in ((old, (1, 2, 3, 4)), (below, (0, 1))):
            for generation in generations:
                assert await used(store, dead, generation) == "NOTHING"
            assert not await is_alive(store, dead)
        assert await is_alive(store, at)
        is_over_for_all = cutoff in ("everything", "resource", "other resource")
        assert await is_alive(store, other) is not is_over_for_all
        await forget_feed(place)
    assert await used(place.open(), at, 1) == "-> 2"


async def test_the_highest_cutoff_counts(place: Place, store: Store) -> None:
    await store.feed.append([CUTOFFS["client"]])
    between = await add(store, a_grant(place, rev=(await store.feed.read(0)).head))
    await store.feed.append([CUTOFFS["client"]])
    assert not await is_alive(store, between)


DIES_WITH: dict[str, Callable[[str], tuple[Change, Origin]]] = {
    "root": lambda i: (change(KIND.TOKEN_DEAD, i), Origin(SUBJECT, root_jti=i)),
    "session": lambda i: (change(KIND.SESSION_DEAD, i), Origin(SUBJECT, session_id=i)),
    "parent": lambda i: (change(KIND.GRANT_DEAD, i), Origin(SUBJECT, grant_id=i)),
}


@pytest.mark.parametrize("what", DIES_WITH)
async def test_it_is_not_added_where_what_it_comes_from_is_dead(
    place: Place, store: Store, what: str
) -> None:
    dead, origin = DIES_WITH[what]("it")
    await store.feed.append([change(kind, "other") for kind in KIND if kind != KIND.GRANT_DEAD])
    await add(store, a_grant(place, grant_id="it"))
    before = await add(store, a_grant(place, origin=origin, rev=2**33))
    await store.feed.append([dead])
    grant = a_grant(place, origin=origin, rev=2**33)
    assert not await store.grants.add(grant)
    assert not await is_alive(store, grant)
    assert await used(store, before, 1) == "NOTHING"


async def test_children_end_with_their_parents(place: Place, store: Store) -> None:
    line = [await add(store, a_grant(place))]
    for _ in range(4):
        origin = Origin(SUBJECT, grant_id=line[-1].grant_id)
        line.append(await add(store, a_grant(place, origin=origin)))
    aunt = await add(store, a_grant(place, origin=Origin(SUBJECT, grant_id=line[0].grant_id)))
    await used(store, line[1], 1)
    await used(store, line[1], 2)
    before = (await store.feed.read(0)).head
    assert await used(store, line[1], 1) == "REUSED"
    assert [await is_alive(store, grant) for grant in (*line, aunt)] == [True, *[False] * 4, True]
    marked = {m.key for m in (await store.feed.read(before)).markers}
    assert marked == {change(KIND.GRANT_DEAD, grant.grant_id).key for grant in line[1:]}


# --- at once ---


@pytest.mark.parametrize("generation", [1, 2])
async def test_many_uses_at_once_leave_one_live_generation(place: Place, generation: int) -> None:
    workers = [place.open(timeout_s=30), place.open(timeout_s=30)]
    grant = await add(workers[0], a_grant(place))
    if generation == 2:
        await used(workers[0], grant, 1)
    many = [a_use(grant, generation, next_key_id=(KEY, NEXT_KEY)[n % 2]) for n in range(32)]
    found = await asyncio.gather(*(workers[n % 2].grants.use(use) for n, use in enumerate(many)))
    answers = {(each.generation, each.key_id) for each in found if isinstance(each, Grant)}
    assert all(isinstance(each, Grant) for each in found)
    assert len(answers) == 1
    ((live, key_id),) = answers
    assert live == generation + 1
    assert await used(workers[1], grant, live, key_id=key_id) == f"-> {live + 1}"
    assert await used(workers[0], grant, generation) == "REUSED"


async def test_use_and_death_at_once(place: Place) -> None:
    workers = [place.open(timeout_s=30), place.open(timeout_s=30)]
    kills = [
        (change(KIND.GRANT_DEAD, "{}"), ALONE),
        (change(KIND.TOKEN_DEAD, "{}"), Origin(SUBJECT, root_jti="{}")),
        (change(KIND.CUTOFF_SUBJECT, "{}"), Origin("{}")),
    ]
    for n in range(30):
        kill, origin = kills[n % 3]
        rev = (await workers[0].feed.read(0)).head
        name = f"r{n}"
        origin = replace(
            origin,
            subject=origin.subject.format(name),
            root_jti=origin.root_jti.format(name),
        )
        grant = await add(workers[0], a_grant(place, grant_id=name, origin=origin, rev=rev))
        dead = change(kill.kind, name)
        uses = [workers[m % 2].grants.use(a_use(grant)) for m in range(6)]
        found = await asyncio.gather(*uses[:3], workers[n % 2].feed.append([dead]), *uses[3:])
        assert not [each for each in found if isinstance(each, Reused)]
        assert not await is_alive(workers[0], grant)
        assert await used(workers[1], grant, 2) == "NOTHING"


async def test_two_reuses_at_once_kill_once(place: Place) -> None:
    workers = [place.open(timeout_s=30), place.open(timeout_s=30)]
    grant = await add(workers[0], a_grant(place))
    for generation in (1, 2):
        await used(workers[0], grant, generation)
    found = await asyncio.gather(*(workers[n % 2].grants.use(a_use(grant)) for n in range(8)))
    kinds = Counter(type(each).__name__ for each in found)
    assert kinds == {"Reused": 1, "NoneType": 7}


async def test_what_is_added_while_its_origin_dies_is_dead(place: Place) -> None:
    workers = [place.open(timeout_s=30), place.open(timeout_s=30)]
    alive: list[str] = []
    rounds = 240 if place.backend == "postgres" else 60
    for n in range(rounds):
        what = ("root", "session", "parent", "grandparent")[n % 4]
        dead, origin = DIES_WITH["parent" if what == "grandparent" else what](f"it{n}")
        if origin.grant_id:
            await add(workers[0], a_grant(place, grant_id=f"it{n}"))
        if what == "grandparent":
            child = await add(workers[0], a_grant(place, origin=origin))
            origin = Origin(SUBJECT, grant_id=child.grant_id)
        grants = [a_grant(place, origin=origin) for _ in range(3)]
        await asyncio.gather(
            *(workers[m % 2].grants.add(grant) for m, grant in enumerate(grants)),
            workers[n // 4 % 2].feed.append([dead]),
        )
        alive += [f"{what} {n}" for grant in grants if await is_alive(workers[0], grant)]
    assert alive == []


@asynccontextmanager
async def head_held(place: Place) -> AsyncIterator[None]:
    """Nobody can take a revision meanwhile."""
    other = await asyncpg.connect(place.url.replace("+asyncpg", ""))
    try:
        async with other.transaction():
            await other.execute("SELECT 1 FROM feed_head FOR UPDATE")
            yield
    finally:
        await other.close()


_WAITING = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND cardinality(pg_blocking_pids(pid)) > 0"
)


@pytest.mark.parametrize("locked", [True, False], ids=["", "without the lock it shows"])
@pytest.mark.parametrize("what", ["root", "session", "parent", "grandparent"])
async def test_a_death_half_done_keeps_an_addition_waiting(
    place_pg: Place, what: str, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_lock(*_args: object, **_more: object) -> None:
        return None

    if not locked:
        for module in (sql_feed, sql_grants):
            monkeypatch.setattr(module, "lock_marks", no_lock)
    dies, adds = place_pg.open(timeout_s=30), place_pg.open(timeout_s=30)
    dead, origin = DIES_WITH["parent" if what == "grandparent" else what]("it")
    if origin.grant_id:
        await add(adds, a_grant(place_pg, grant_id="it"))
    if what == "grandparent":
        child = await add(adds, a_grant(place_pg, origin=origin))
        origin = Origin(SUBJECT, grant_id=child.grant_id)
    grant = a_grant(place_pg, origin=origin)
    async with head_held(place_pg):
        dying = asyncio.create_task(dies.feed.append([dead]))
        await reaches(place_pg, _WAITING, 1)
        adding = asyncio.create_task(adds.grants.add(grant))
        if locked:
            await reaches(place_pg, _WAITING, 2)
        else:
            assert await adding
    await dying
    assert await adding is not locked
    assert await is_alive(adds, grant) is not locked


# --- the database fails ---


async def test_a_use_that_fails_leaves_the_token_usable(place_pg: Place) -> None:
    store = place_pg.open(timeout_s=10)
    grant = await add(store, a_grant(place_pg))
    other = await asyncpg.connect(place_pg.url.replace("+asyncpg", ""))
    try:
        async with other.transaction():
            await other.execute('SELECT 1 FROM "grant" FOR UPDATE')
            using = asyncio.create_task(store.grants.use(a_use(grant)))
            await reaches(place_pg, _WAITING, 1)
            await place_pg.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'authsvc' AND datname = current_database()"
            )
            assert await reason(using) in (Reason.COMMIT_UNKNOWN, Reason.STORE_UNAVAILABLE)
            assert await reason(place_pg.open(timeout_s=0.2).grants.use(a_use(grant))) in (
                Reason.COMMIT_UNKNOWN,
                Reason.STORE_UNAVAILABLE,
            )
    finally:
        await other.close()
    async with asyncio.timeout(20):  # connections that the pool thought it had go first
        while await outcome(store.grants.use(a_use(grant))) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await used(store, grant, 1) == "-> 2"
    assert await used(store, grant, 2) == "-> 3"


async def test_a_use_whose_commit_is_unknown_leaves_the_token_usable(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.open()
    grant = await add(store, a_grant(place))
    single = Database.single

    async def lost(self: Database, *given: Any) -> Any:
        await single(self, *given)
        raise AuthError(Reason.COMMIT_UNKNOWN)

    with monkeypatch.context() as patch:
        patch.setattr(Database, "single", lost)
        for _ in range(2):
            assert await reason(store.grants.use(a_use(grant))) is Reason.COMMIT_UNKNOWN
    assert await used(store, grant, 1) == "-> 2"
    assert await used(store, grant, 2) == "-> 3"


async def test_a_locked_sqlite_leaves_the_token_usable(place_sqlite: Place) -> None:
    store, other = place_sqlite.open(timeout_s=0.2), place_sqlite.database()
    grant = await add(store, a_grant(place_sqlite))
    async with other.write() as connection:
        await connection.exec_driver_sql("SELECT 1")  # it begins with its first statement
        assert await reason(store.grants.use(a_use(grant))) is Reason.STORE_UNAVAILABLE
    assert await used(store, grant, 1) == "-> 2"


async def test_a_caller_that_goes_away_loses_nothing(place: Place) -> None:
    store = place.open()
    grant = await add(store, a_grant(place))
    for _ in range(20):
        using = asyncio.create_task(store.grants.use(a_use(grant)))
        await asyncio.sleep(0)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
    assert await used(store, grant, 1) == "-> 2"
    assert await used(store, grant, 2) == "-> 3"


async def test_a_dump_holds_no_refresh_token(place: Place, store: Store) -> None:
    """Design section 6: the HMAC secret is in the configuration only."""
    grant = await add(store, a_grant(place))
    await used(store, grant, 1)
    assert "handle=" not in repr(grant) + repr(a_use(grant))
    columns = 'handle, generation, key_id, previous_key_id, sender, details, "grant".*'
    (row,) = await place.sql(f'SELECT {columns} FROM "grant"')
    assert "asvc_rt_" not in repr(row)


# --- assertions ---


async def test_an_assertion_is_good_once(place: Place) -> None:
    """RFC 7523 section 3: `jti` guards against replay; each worker and each start sees it."""
    store, end = place.open(), now(place) + 60
    assert await store.assertions.use("app", "one", end)
    assert not await store.assertions.use("app", "one", end)
    assert not await store.assertions.use("app", "one", end + 500)
    assert not await place.open().assertions.use("app", "one", end)
    for client_id, jti in (("other", "one"), ("app", "two"), ("appo", "ne"), ("ap", "pone")):
        assert await store.assertions.use(client_id, jti, end)
    for odd in ("", "\0" * 9, "é" * 99, "ONE", "one ", "x" * 10_000):
        assert await store.assertions.use("app", odd, end)
        assert not await store.assertions.use("app", odd, end)


async def test_an_assertion_at_once_is_good_once(place: Place) -> None:
    workers = [place.open(timeout_s=30), place.open(timeout_s=30)]
    for n in range(5):
        found = await asyncio.gather(
            *(workers[m % 2].assertions.use("app", f"jti{n}", now(place) + 60) for m in range(32))
        )
        assert Counter(found) == {True: 1, False: 31}


async def test_an_assertion_that_is_over_stays_used_while_its_row_is_there(place: Place) -> None:
    store, end = place.open(), now(place) - 5
    assert await store.assertions.use("app", "over", end)
    assert not await store.assertions.use("app", "over", end + 1000)
    assert await place.sql("SELECT count(*) FROM assertion") == [(1,)]
