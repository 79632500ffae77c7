"""Markers and the tables: what ends with them, what they count, and many at once."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise, permutations

import pytest

from authsvc.errors import AuthError
from authsvc.model import (
    ApiKey,
    Client,
    ClientMetadata,
    ClientState,
    Grant,
    GrantType,
    Origin,
)
from authsvc.store import sql_revocations
from authsvc.store.port import Change, GrantFilter, Impact, Reused, Store, Use, change
from authsvc_client.core.judge import cutoff_keys
from authsvc_client.core.markers import CUTOFF_KINDS, Marker, MarkerKind
from authsvc_client.core.state import State
from tests.store.conftest import Place

NEVER = 1e11
KIND = MarkerKind
SHOP = Origin("alice", actors=("agent",), session_id="login", root_jti="root")

_numbers: Iterator[int] = count()


def a_grant(grant_id: str, **more: object) -> Grant:
    made = Grant(
        grant_id=grant_id,
        client_id="shop",
        origin=SHOP,
        grant_type=GrantType.TOKEN_EXCHANGE,
        scopes=frozenset({"read"}),
        audiences=("https://api.test",),
        sender="shop",
        rev=2**32,
        handle=next(_numbers).to_bytes(16, "big"),
        key_id="key",
        create_time=1.0,
        idle_expire_time=NEVER,
        expire_time=NEVER,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def child(grant_id: str, parent: str) -> Grant:
    return a_grant(grant_id, origin=Origin("alice", grant_id=parent))


def a_use(grant: Grant, generation: int, **more: object) -> Use:
    made = Use(grant.handle, generation, "key", grant.client_id, grant.sender, False, "key", 3600.0)
    return replace(made, **more)  # type: ignore[arg-type]


def named(marker: Change) -> str:
    return "-".join((marker.kind.name, *marker.ids))


async def living(store: Store, *grant_ids: str) -> set[str]:
    return {each for each in grant_ids if await store.grants.living(each) is not None}


async def add(store: Store, *grants: Grant) -> list[str]:
    for grant in grants:
        assert await store.grants.add(grant)
    return [grant.grant_id for grant in grants]


# What ends

FAMILY = {
    "first": a_grant("first"),
    "child": child("child", "first"),
    "a grandchild": child("a grandchild", "child"),
    "of the session": a_grant("of the session", origin=Origin("alice", session_id="login")),
    "of the token": a_grant("of the token", origin=Origin("alice", root_jti="root")),
    "of another": a_grant("of another", client_id="other", origin=Origin("bob", ("mallory",))),
}
LINE = {"first", "child", "a grandchild"}
MARKS = {
    change(KIND.GRANT_DEAD, "first"): LINE,
    change(KIND.GRANT_DEAD, "child"): {"child", "a grandchild"},
    change(KIND.GRANT_DEAD, "a grandchild"): {"a grandchild"},
    change(KIND.GRANT_DEAD, "lost in a restore"): set(),
    change(KIND.GRANT_DEAD, ""): set(),
    change(KIND.SESSION_DEAD, "login"): LINE | {"of the session"},
    change(KIND.SESSION_DEAD, "root"): set(),
    change(KIND.SESSION_DEAD, ""): set(),
    change(KIND.TOKEN_DEAD, "root"): LINE | {"of the token"},
    change(KIND.TOKEN_DEAD, "first"): set(),
    change(KIND.TOKEN_DEAD, ""): set(),
    change(KIND.CUTOFF_EVERYTHING): set(FAMILY),
    change(KIND.CUTOFF_CLIENT, "shop"): set(FAMILY) - {"of another"},
    change(KIND.CUTOFF_CLIENT, "agent"): {"first"},
    change(KIND.CUTOFF_CLIENT, "other"): {"of another"},
    change(KIND.CUTOFF_SUBJECT, "alice"): set(FAMILY) - {"of another"},
    change(KIND.CUTOFF_SUBJECT, "mallory"): {"of another"},
    change(KIND.CUTOFF_SUBJECT_CLIENT, "alice", "shop"): set(FAMILY) - {"of another"},
    change(KIND.CUTOFF_SUBJECT_CLIENT, "shop", "alice"): set(),
    change(KIND.CUTOFF_SUBJECT_CLIENT, "bob", "shop"): set(),
    change(KIND.CUTOFF_RESOURCE, "https://api.test"): set(FAMILY),
    change(KIND.CUTOFF_RESOURCE, "https://api.test/"): set(),
    change(KIND.CLIENT_CHANGED, "shop"): set(),
    change(KIND.KEY_TAINTED, "key"): set(),
}


@pytest.mark.parametrize("mark", MARKS, ids=named)
async def test_what_a_marker_kills_it_counts_before_and_is_dead_for_ever(
    place: Place, store: Store, mark: Change
) -> None:
    await add(store, *FAMILY.values())
    counted = await store.revocations.impact(mark)
    await store.feed.append([change(KIND.CLIENT_CHANGED, "x"), mark, mark])
    await place.sql("DELETE FROM feed")
    assert await living(store, *FAMILY) == set(FAMILY) - MARKS[mark]
    assert counted == Impact(grants=len(MARKS[mark]))
    assert await store.revocations.impact(mark) == Impact()


async def test_each_grant_that_ends_is_marked_in_the_same_revision(store: Store) -> None:
    await add(store, *FAMILY.values())
    marks = [
        change(KIND.SESSION_DEAD, "login"),
        change(KIND.GRANT_DEAD, "child"),
        change(KIND.TOKEN_DEAD, "root"),
        change(KIND.CUTOFF_CLIENT, "shop"),
        change(KIND.GRANT_DEAD, "child"),
    ]
    revision = await store.feed.append(marks)
    page = await store.feed.read(revision - 1)
    assert {marker.revision for marker in page.markers} == {revision}
    ended = {change(KIND.GRANT_DEAD, each) for each in (*LINE, "of the session", "of the token")}
    assert {(m.kind, m.key) for m in page.markers} == {(c.kind, c.key) for c in ended.union(marks)}
    again = await store.feed.append(marks)
    assert len((await store.feed.read(again - 1)).markers) == len(set(marks))


async def test_what_is_dead_is_known_to_be(place: Place, store: Store) -> None:
    await add(store, *FAMILY.values())
    marks = [change(KIND.GRANT_DEAD, each) for each in FAMILY]
    sessions = [change(KIND.SESSION_DEAD, each) for each in ("login", "unknown")]
    assert not any([await store.revocations.is_dead(mark) for mark in [*marks, *sessions]])
    await store.feed.append([sessions[0], change(KIND.CUTOFF_EVERYTHING)])
    dead = [mark for mark in [*marks, *sessions] if await store.revocations.is_dead(mark)]
    assert {mark.ids[0] for mark in dead} == LINE | {"of the session", "login"}
    await place.sql("DELETE FROM feed")
    dead = [mark for mark in [*marks, *sessions] if await store.revocations.is_dead(mark)]
    assert {mark.ids[0] for mark in dead} == LINE | {"of the session"}


@pytest.mark.parametrize(
    "order",
    list(
        permutations(
            [
                change(KIND.CUTOFF_EVERYTHING),
                change(KIND.CUTOFF_CLIENT, "shop"),
                change(KIND.CUTOFF_SUBJECT, "alice"),
            ],
            2,
        )
    ),
    ids=lambda order: ", ".join(map(named, order)),
)
async def test_the_highest_cutoff_wins_in_any_order(
    store: Store, order: tuple[Change, Change]
) -> None:
    """CVE-2026-18218: an older cutoff for all hid a newer one of the client."""
    first, second = [await store.feed.append([each]) for each in order]
    state = State(120.0)
    state.apply((await store.feed.read(1)).markers, second)
    revs = (first - 1, first, second - 1, second)
    await add(store, *(a_grant(f"{at}", rev=rev) for at, rev in enumerate(revs)))
    assert await living(store, "0", "1", "2", "3") == {"3"}
    assert state.cutoff(cutoff_keys("shop", "alice")) == second
    older = [
        Marker(each.kind, each.key, revision, NEVER)
        for each, revision in zip(order, (first, second), strict=True)
    ]
    backwards = State(120.0)
    backwards.apply(reversed(older), second)
    assert backwards.cutoff(cutoff_keys("shop", "alice")) == second


async def test_session_of_very_many_grants_dies_whole(place: Place) -> None:
    """More than a statement may have parameters."""
    most, store = 33_000, place.open(timeout_s=60.0)
    await add(store, a_grant("first", origin=Origin("alice", session_id="long")))
    rows = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < "
        f"{most - 1}) ",
        "postgres": f"WITH n(i) AS (SELECT * FROM generate_series(1, {most - 1})) ",
    }[place.backend]
    handle = {"sqlite": "randomblob(16)", "postgres": "uuid_send(gen_random_uuid())"}
    columns = (
        "generation, key_id, previous_key_id, sender, client_id, subject, session_id, parent_id,"
        " root_jti, details, rev, cutoff_keys, create_time, idle_expire_time, expire_time"
    )
    await place.sql(
        f'INSERT INTO "grant" (grant_id, handle, {columns}) {rows}'
        f'SELECT CAST(i AS text), {handle[place.backend]}, {columns} FROM "grant", n'
        if place.backend == "postgres"
        else f'{rows} INSERT INTO "grant" (grant_id, handle, {columns})'
        f'SELECT CAST(i AS text), {handle[place.backend]}, {columns} FROM "grant", n'
    )
    mark = change(KIND.SESSION_DEAD, "long")
    assert await store.revocations.impact(mark) == Impact(grants=most)
    revision = await store.feed.append([mark])
    assert len((await store.feed.read(revision - 1)).markers) == most + 1
    assert await store.grants.page(GrantFilter(), None, 1) == ()


# Counting


def a_client(client_id: str) -> Client:
    nothing: frozenset[str] = frozenset()
    metadata = ClientMetadata(client_id, frozenset(), frozenset(), nothing)
    return Client(client_id, metadata, ClientState.APPROVED, 0.0, 0.0, "admin")


def an_api_key(client_id: str, rev: int, expire_time: float | None = None) -> ApiKey:
    number = next(_numbers)
    return ApiKey(
        f"{client_id}-{number}",
        client_id,
        "",
        frozenset(),
        rev,
        0.0,
        expire_time,
        number.to_bytes(32, "big"),
    )


async def test_only_what_is_alive_is_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_revocations, "PIECE", 2)
    everything = change(KIND.CUTOFF_EVERYTHING)
    for name in ("shop", "other"):
        await store.clients.add(a_client(name))
    rev = await store.feed.append([change(KIND.CUTOFF_CLIENT, "shop")])
    await add(
        store,
        a_grant("good", rev=rev),
        a_grant("cut off", rev=rev - 1),
        a_grant("idle", rev=rev, idle_expire_time=1.0),
        a_grant("over", rev=rev, expire_time=1.0),
        a_grant("ended", rev=rev, origin=Origin("alice")),
        a_grant("another's", client_id="other", origin=Origin("bob"), rev=rev - 1),
    )
    await store.feed.append([change(KIND.GRANT_DEAD, "ended")])
    keys = [an_api_key(c, rev - old) for c in ("shop", "other") for old in (0, 0, 1)]
    for key in (*keys, an_api_key("shop", rev, 1.0), an_api_key("shop", rev, NEVER)):
        await store.api_keys.add(key, 100)
    expected = {
        everything: (2, 6),
        change(KIND.CUTOFF_CLIENT, "shop"): (1, 3),
        change(KIND.CUTOFF_SUBJECT, "shop"): (1, 3),
        change(KIND.CUTOFF_SUBJECT_CLIENT, "shop", "shop"): (0, 3),
        change(KIND.CUTOFF_SUBJECT_CLIENT, "alice", "shop"): (1, 0),
        change(KIND.CUTOFF_CLIENT, "other"): (1, 3),
        change(KIND.CUTOFF_SUBJECT, "bob"): (1, 0),
        change(KIND.CUTOFF_CLIENT, "nobody"): (0, 0),
        change(KIND.GRANT_DEAD, "good"): (1, 0),
        change(KIND.GRANT_DEAD, "cut off"): (0, 0),
        change(KIND.SESSION_DEAD, "login"): (1, 0),
    }
    found = {mark: await store.revocations.impact(mark) for mark in expected}
    assert found == {mark: Impact(0, *counts) for mark, counts in expected.items()}
    monkeypatch.setattr(sql_revocations, "IMPACT_MAX", 1)
    assert await store.revocations.impact(everything) == Impact(0, 1, 1)
    await store.feed.append([everything])
    assert await store.revocations.impact(everything) == Impact()


# Lists


async def test_living_grants_are_listed_the_newest_first(place: Place, store: Store) -> None:
    grants = [
        a_grant("a", create_time=3.0, use_time=None),
        a_grant("b", create_time=4.25),
        a_grant("c", create_time=4.25, client_id="other"),
        a_grant("d", create_time=5.0, origin=Origin("bob", session_id="login")),
        a_grant("unreadable", create_time=4.5),
        a_grant("over", create_time=6.0, expire_time=1.0),
        a_grant("dead", create_time=7.0, origin=Origin("alice")),
    ]
    await add(store, *grants)
    await store.feed.append([change(KIND.GRANT_DEAD, "dead")])
    await place.sql("UPDATE \"grant\" SET details = '{' WHERE grant_id = 'unreadable'")
    newest = ["d", "c", "b", "a"]
    found = await store.grants.page(GrantFilter(), None, 9)
    assert [grant.grant_id for grant in found] == newest
    assert found[1] == grants[2]
    for size in (1, 2, 3):
        seen: list[str] = []
        after = None
        while page := await store.grants.page(GrantFilter(), after, size):
            seen += [grant.grant_id for grant in page]
            after = (page[-1].create_time, page[-1].grant_id)
        assert seen == newest
    for wanted, ids in {
        GrantFilter(subject="alice"): ["c", "b", "a"],
        GrantFilter(client_id="shop"): ["d", "b", "a"],
        GrantFilter(session_id="login", subject="bob"): ["d"],
        GrantFilter(subject="bob", client_id="other"): [],
        GrantFilter(subject="agent"): [],
    }.items():
        assert [g.grant_id for g in await store.grants.page(wanted, None, 9)] == ids


# At once


async def test_batches_of_two_workers_neither_deadlock_nor_leave_a_gap(place: Place) -> None:
    workers = [place.open(timeout_s=30.0), place.open(timeout_s=30.0)]
    names = [f"g{n}" for n in range(40)]
    # A line from the last to the first, so that a batch meets its rows in the other direction.
    await add(
        workers[0],
        a_grant("g0", origin=Origin("alice", session_id="s0", root_jti="t0")),
        *(
            a_grant(
                f"g{n}", origin=Origin("alice", (), f"g{n - 1}" if n % 8 else "", f"s{n % 5}", "t")
            )
            for n in range(1, 40)
        ),
    )
    before = (await workers[0].feed.read(0)).head

    def batch(n: int) -> list[Change]:
        mixed = [
            change(KIND.GRANT_DEAD, names[(7 * n) % 40]),
            change(KIND.CUTOFF_CLIENT, f"c{n % 3}"),
            change(KIND.SESSION_DEAD, f"s{n % 5}"),
            change(KIND.TOKEN_DEAD, "t0"),
            change(KIND.CUTOFF_EVERYTHING),
            change(KIND.CUTOFF_CLIENT, f"c{(n + 1) % 3}"),
            change(KIND.GRANT_DEAD, names[(40 - 3 * n) % 40]),
        ]
        return mixed if n % 2 else mixed[::-1]

    revisions = await asyncio.gather(*(workers[n % 2].feed.append(batch(n)) for n in range(60)))
    assert sorted(revisions) == list(range(before + 1, before + 61))
    assert await living(workers[0], *names) == set()
    page = await workers[0].feed.read(before)
    assert {marker.revision for marker in page.markers} == set(revisions)
    cutoffs = dict(await place.sql("SELECT key, revision FROM cutoff"))
    latest = {m.key.hex(): m.revision for m in page.markers if m.kind in CUTOFF_KINDS}
    assert cutoffs == latest


async def test_batches_that_meet_a_line_from_both_ends_do_not_deadlock(place: Place) -> None:
    workers = [place.open(timeout_s=30.0), place.open(timeout_s=30.0)]
    for n in range(25):
        line = [f"{n:02}-{step}" for step in "edcba"]
        grants = [a_grant(line[0]), *(child(to, of) for of, to in pairwise(line))]
        await add(workers[0], *grants)
        batches = [[line[0]], [line[4], line[2]], [line[3], line[1]], line, line[::-1]]
        await asyncio.gather(
            *(
                workers[at % 2].feed.append([change(KIND.GRANT_DEAD, each) for each in batch])
                for at, batch in enumerate(batches)
            )
        )
        assert await living(workers[0], *line) == set()


async def test_grant_that_is_added_while_what_it_comes_from_dies_is_dead(place: Place) -> None:
    """At any depth: else the one would miss what the other has not committed."""
    workers = [place.open(timeout_s=30.0), place.open(timeout_s=30.0)]
    orphans: list[str] = []
    for n in range(25):
        await add(workers[0], a_grant(f"a{n}"), child(f"b{n}", f"a{n}"))
        grandchildren = [child(f"c{n}-{m}", f"b{n}") for m in range(4)]
        await asyncio.gather(
            *(workers[m % 2].grants.add(each) for m, each in enumerate(grandchildren[:2])),
            workers[n % 2].feed.append([change(KIND.GRANT_DEAD, f"a{n}")]),
            *(workers[m % 2].grants.add(each) for m, each in enumerate(grandchildren[2:])),
        )
        family = (f"a{n}", f"b{n}", *(each.grant_id for each in grandchildren))
        orphans += await living(workers[0], *family)
    assert orphans == []


async def test_uses_reuses_and_revocations_of_one_grant_at_once(place: Place) -> None:
    workers = [place.open(timeout_s=30.0), place.open(timeout_s=30.0)]
    for n in range(15):
        grant = a_grant(f"g{n}", origin=Origin("alice", session_id=f"s{n}"))
        await add(workers[0], grant)
        assert isinstance(await workers[0].grants.use(a_use(grant, 1)), Grant)
        results = await asyncio.gather(
            workers[0].grants.use(a_use(grant, 1)),  # reuse
            workers[1].feed.append([change(KIND.SESSION_DEAD, f"s{n}")]),
            workers[1].grants.use(a_use(grant, 1)),
            workers[0].feed.append([change(KIND.GRANT_DEAD, f"g{n}")]),
            workers[1].grants.use(a_use(grant, 2)),
            return_exceptions=True,
        )
        assert not [each for each in results if isinstance(each, BaseException)], results
        assert sum(isinstance(each, Reused) for each in results) <= 1
        assert await living(workers[0], f"g{n}") == set()


async def test_database_that_is_gone_marks_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2020-15223: no success is told of what is not durable."""
    store = place.open(timeout_s=1.0)
    await add(store, *FAMILY.values())
    head = (await store.feed.read(0)).head
    await place.sql("ALTER TABLE feed RENAME TO hidden")
    try:
        with pytest.raises(AuthError) as refused:
            await store.feed.append([change(KIND.SESSION_DEAD, "login")])
        assert refused.value.reason.name == "STORE_UNAVAILABLE"
    finally:
        await place.sql("ALTER TABLE hidden RENAME TO feed")
    assert (await store.feed.read(0)).head == head
    assert await living(store, *FAMILY) == set(FAMILY)
