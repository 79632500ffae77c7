"""Clients over each kind of storage: what time does to them, what is one transaction, races."""

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from sqlalchemy import event

from authsvc.errors import Reason
from authsvc.model import ApiKey, ClientState, IdentityKind, InitialAccessToken
from authsvc.oauth.registration import as_of
from authsvc.store import sql_store
from authsvc.store.port import Admission, Store, change
from authsvc.store.tables import CLIENT
from authsvc_client.core.markers import MarkerKind
from tests.store.conftest import Place
from tests.store.test_contract import (
    a_client,
    a_resource,
    cutoff,
    head,
    outcome,
    refused,
    step,
)

PENDING, APPROVED, REJECTED = ClientState.PENDING, ClientState.APPROVED, ClientState.REJECTED
EXPIRED = ClientState.EXPIRED
URI = IdentityKind.SAN_URI
NAME = "spiffe://x.test/a"


async def database_time(store: Store) -> float:
    return (await store.feed.read(0)).time


def a_token(value: bytes = b"it", uses: int = 1, **fields: float) -> InitialAccessToken:
    made = InitialAccessToken(value.decode(), "ci", uses, 2**40, 1.0, 9e9, value)
    return replace(made, **fields)  # type: ignore[arg-type]


async def together(*calls: Awaitable[object]) -> list[Reason | None]:
    return list(await asyncio.gather(*map(outcome, calls)))


# --- time ---


async def test_the_database_and_the_code_agree_on_who_is_expired(store: Store) -> None:
    now = await database_time(store)
    clients = []
    ages = (0.0, 50.0, 150.0)
    ends = (None, now - 50, now + 50)
    for number, (state, age, end) in enumerate(product(ClientState, ages, ends)):
        made = a_client(
            f"c{number:02}", state=state, update_time=now - age, approval_expire_time=end
        )
        await store.clients.add(made)
        clients.append(made)
    for state in ClientState:
        expected = [c.client_id for c in clients if as_of(c, now, 100).state is state]
        found = await store.clients.page(state, "", 100, 100)
        assert [client.client_id for client in found] == expected
    assert len(await store.clients.page(EXPIRED, "", 100)) > 9  # nobody waits for ever, unasked
    over = [c for c in clients if as_of(c, now, 100) != c]
    assert await store.clients.expire(100) == len(over)
    assert await store.clients.expire(100) == 0
    for client in clients:
        row = await store.clients.get(client.client_id)
        assert row is not None
        assert row.state is as_of(client, now, 100).state
        assert row.version == (2 if client in over else 1)


async def test_only_the_end_of_an_approval_cuts_off(store: Store, place: Place) -> None:
    now = await database_time(store)
    await store.clients.add(a_client("waits", update_time=now - 100))
    await store.clients.add(a_client("ends", state=APPROVED, approval_expire_time=now - 1))
    before = await head(store)
    assert await store.clients.expire(100) == 2
    page = await store.feed.read(before)
    kinds = sorted(marker.kind.name for marker in page.markers)
    assert kinds == ["CLIENT_CHANGED", "CLIENT_CHANGED", "CUTOFF_CLIENT"]
    assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, "ends") > before
    assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, "waits") == 0


async def test_who_is_over_is_found_by_an_index(place: Place) -> None:
    """Among many who are not, and whose approvals all have an end."""
    database, ran = place.database(), list[tuple[str, Any]]()
    store = sql_store(database)
    await store.clients.add(a_client("c", state=APPROVED, approval_expire_time=9e9))
    names = [column.name for column in CLIENT.columns if column.name != "client_id"]
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
    copies = f"SELECT client_id || i, {', '.join(names)} FROM client, n"
    await place.sql(f"INSERT INTO client (client_id, {', '.join(names)}) {many} {copies}")
    if place.backend == "postgres":  # it does so by itself
        await place.sql("ANALYZE client")
    event.listen(
        database._reader.sync_engine,
        "before_cursor_execute",
        lambda _connection, _cursor, statement, values, *_: ran.append((statement, values)),
    )
    assert await store.clients.expire(1e9) == 0
    explain = "EXPLAIN QUERY PLAN" if place.backend == "sqlite" else "EXPLAIN"
    plans = list[str]()
    async with database.read() as connection:
        for statement, values in [each for each in ran if "client" in each[0]]:
            rows = await connection.exec_driver_sql(f"{explain} {statement}", values)
            plans.append("\n".join(map(str, rows)))
    assert len(plans) == 2
    for plan, index in zip(plans, ("client_state", "client_approval_end"), strict=True):
        assert re.search(f"(?i)index scan (using|on) {index}|using index {index}", plan), plan


async def test_of_workers_that_expire_at_once_each_client_is_moved_once(
    store: Store, place: Place
) -> None:
    workers = [place.open() for _ in range(4)]
    for number in range(8):
        await store.clients.add(a_client(f"c{number}", update_time=1.0))
    before = await head(store)
    await asyncio.gather(*(worker.clients.expire(100) for worker in workers))
    assert await head(store) == before + 8
    rows = await store.clients.page(None, "", 100)
    assert {(row.state, row.version) for row in rows} == {(EXPIRED, 2)}


async def test_approved_while_it_expires_a_client_is_one_or_the_other(
    store: Store, place: Place
) -> None:
    other = place.open()
    for number in range(8):
        client_id = f"c{number}"
        await store.clients.add(a_client(client_id, update_time=1.0))
        waits = frozenset({PENDING, EXPIRED})
        approve = replace(step(client_id, PENDING, APPROVED), allowed_from=waits, pending_s=100.0)
        await together(store.clients.expire(100), other.clients.move(approve))
        row = await store.clients.get(client_id)
        assert row is not None
        assert row.state is APPROVED


async def test_a_step_counts_from_the_state_by_time(store: Store, place: Place) -> None:
    now = await database_time(store)
    await store.clients.add(a_client("waits", update_time=now - 101))
    await store.clients.add(a_client("ends", state=APPROVED, approval_expire_time=now - 1))
    for client_id, start in (("waits", PENDING), ("ends", APPROVED)):
        late = step(client_id, start, REJECTED, pending_s=100.0)
        error = await refused(store.clients.move(late))
        assert (error.reason, error.metadata) == (
            Reason.CLIENT_STATE_CONFLICT,
            {"state": "EXPIRED"},
        )
        _, revision = await store.clients.move(replace(late, allowed_from=frozenset({EXPIRED})))
        # What the end of the approval would have cut off is cut off by the step.
        expected = revision if start is APPROVED else 0
        assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, client_id) == expected


# --- names ---


@pytest.mark.parametrize("state", ClientState)
@pytest.mark.parametrize("reviewed", [False, True])
async def test_who_holds_a_certificate_name(
    store: Store, state: ClientState, reviewed: bool
) -> None:
    made = a_client("first", NAME, state=state, review_time=5.0 if reviewed else None)
    await store.clients.add(made)
    holds = state is not REJECTED and (state is not EXPIRED or reviewed)
    assert [c.client_id for c in await store.clients.by_identity([(URI, NAME)])] == (
        ["first"] if holds else []
    )
    found = await outcome(store.clients.add(a_client("second", NAME)))
    assert found is (Reason.ALREADY_EXISTS if holds else None)
    back = step("first", state, APPROVED)
    found = await outcome(store.clients.move(back))
    assert found is (None if holds else Reason.ALREADY_EXISTS)


# --- one transaction ---


async def test_a_use_is_taken_with_the_client_or_not_at_all(store: Store) -> None:
    await store.initial_access_tokens.add(a_token(uses=5))
    await store.clients.add(a_client("holder", NAME))
    admission = Admission(b"it", None, None)
    taken = await outcome(store.clients.add(a_client("second", NAME), admission))
    assert taken is Reason.ALREADY_EXISTS
    found = await together(*(store.clients.add(a_client(f"c{n:02}"), admission) for n in range(32)))
    assert found.count(None) == 5
    assert set(found) == {None, Reason.REGISTRATION_TOKEN_INVALID}
    assert len(await store.clients.page(None, "c", 100)) == 5 + 1
    left = await store.initial_access_tokens.find(b"it")
    assert left is not None
    assert left.uses_left == 0


@pytest.mark.parametrize("wrong", ["unknown", "over", "cut off", "deleted"])
async def test_an_initial_access_token_that_is_none_any_more(store: Store, wrong: str) -> None:
    end = await database_time(store) - 1 if wrong == "over" else 9e9
    await store.initial_access_tokens.add(a_token(expire_time=end, rev=await head(store)))
    if wrong == "cut off":
        await store.feed.append([change(MarkerKind.CUTOFF_EVERYTHING)])
    if wrong == "deleted":
        assert await store.initial_access_tokens.delete("it")
        assert not await store.initial_access_tokens.delete("it")
    digest = b"other" if wrong == "unknown" else b"it"
    assert await store.initial_access_tokens.find(digest) is None
    added = store.clients.add(a_client("one"), Admission(digest))
    assert await outcome(added) is Reason.REGISTRATION_TOKEN_INVALID
    assert await store.clients.get("one") is None


async def test_a_repeated_request_takes_no_second_use(store: Store) -> None:
    await store.initial_access_tokens.add(a_token())
    admission = Admission(b"it", (b"request", b"content"), 1)
    made = [
        a_client(f"c{n}", secret_digest=b"secret%d" % n, registration_digest=b"token%d" % n)
        for n in range(3)
    ]
    first = await store.clients.add(made[0], admission)
    again = await store.clients.add(made[1], admission)
    assert first.client_id == again.client_id == "c0"
    assert (again.secret_digest, again.registration_digest) == (b"secret1", b"token1")
    await store.clients.secret_used("c0")
    kept = await store.clients.add(made[2], admission)
    assert (kept.secret_digest, kept.registration_digest) == (b"secret1", b"token2")
    other = Admission(b"it", (b"request", b"other content"), 1)
    assert await outcome(store.clients.add(made[1], other)) is Reason.REQUEST_ID_REUSED
    # Who read it before the repetition does not put the old secret back.
    stale = store.clients.replace(first, cut_off=False)
    assert await outcome(stale) is Reason.ETAG_MISMATCH


async def test_that_the_secret_was_used_is_not_forgotten(store: Store) -> None:
    read = await store.clients.add(a_client("one", secret_digest=b"secret"))
    await store.clients.secret_used("one")
    written, _ = await store.clients.replace(read, cut_off=False)
    assert written.secret_used


async def test_deleted_a_client_takes_its_rows_with_it(store: Store, place: Place) -> None:
    await store.clients.add(a_client("gone"), Admission(None, (b"request", b"content")))
    await store.clients.add(a_client("stays"))
    for client_id in ("gone", "stays"):
        key = ApiKey(
            f"k-{client_id}", client_id, "", frozenset(), 1, 1.0, None, b"%d" % len(client_id)
        )
        await store.api_keys.add(key, 10)
    await store.resources.add(a_resource("https://own.test", "own", owner="gone"))
    before = await head(store)
    assert await outcome(store.clients.delete("gone", 9)) is Reason.ETAG_MISMATCH
    assert await head(store) == before
    revision = await store.clients.delete("gone", 1)
    assert revision == before + 1 == await head(store)
    assert await store.clients.get("gone") is None
    assert await store.api_keys.get("k-gone") is None
    assert await store.api_keys.get("k-stays") is not None
    assert await place.sql("SELECT * FROM creation") == []
    resource = (await store.resources.catalog()).by_id["https://own.test"]
    assert (resource.owner_client_id, resource.version) == ("", 2)
    for kind in (MarkerKind.CUTOFF_CLIENT, MarkerKind.CUTOFF_SUBJECT):
        assert await cutoff(place, kind, "gone") == revision
    assert await outcome(store.clients.delete("gone", None)) is Reason.CLIENT_NOT_FOUND
    changed = store.clients.replace(a_client("gone"), cut_off=True)
    assert await outcome(changed) is Reason.CLIENT_NOT_FOUND


async def test_a_change_takes_what_an_approval_gave(store: Store, place: Place) -> None:
    """Whoever writes a client out of APPROVED cuts it off, and its registration token by choice."""
    for keep in (False, True):
        client_id, digest = f"c{keep}", f"token{keep}".encode()
        made = a_client(client_id, state=APPROVED, registration_digest=digest)
        await store.clients.add(replace(made, registration_rev=await head(store)))
        row = await store.clients.by_registration_token(digest)
        assert row is not None
        _, revision = await store.clients.replace(
            replace(row, state=PENDING), cut_off=False, keep_registration=keep
        )
        assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, client_id) == revision
        found = await store.clients.by_registration_token(digest)
        assert (found is not None) is keep


@pytest.mark.parametrize("cut_off", [False, True])
async def test_a_registration_token_that_died_is_not_kept(store: Store, cut_off: bool) -> None:
    """Its bearer was changing the client when somebody revoked it."""
    made = a_client("one", state=APPROVED, registration_digest=b"token")
    await store.clients.add(replace(made, registration_rev=await head(store)))
    row = await store.clients.by_registration_token(b"token")
    assert row is not None
    await store.feed.append([change(MarkerKind.CUTOFF_CLIENT, "one")])
    late = store.clients.replace(row, cut_off=cut_off, keep_registration=True)
    assert await outcome(late) is Reason.REGISTRATION_TOKEN_INVALID
    assert await store.clients.by_registration_token(b"token") is None
    assert await store.clients.get("one") == row


async def test_revoked_while_it_is_kept_a_registration_token_is_dead(
    store: Store, place: Place
) -> None:
    other = place.open()
    for number in range(16):
        client_id, digest = f"c{number:02}", b"token%d" % number
        made = a_client(client_id, registration_digest=digest, registration_rev=await head(store))
        row = await store.clients.add(made)
        await together(
            store.clients.replace(row, cut_off=True, keep_registration=True),
            other.feed.append([change(MarkerKind.CUTOFF_CLIENT, client_id)]),
        )
        assert await store.clients.by_registration_token(digest) is None


async def test_of_changes_at_once_one_wins(store: Store, place: Place) -> None:
    read = await store.clients.add(a_client("one"))
    workers = [place.open() for _ in range(4)]
    found = await together(
        *(workers[n % 4].clients.replace(read, cut_off=False) for n in range(31)),
        workers[0].clients.delete("one", read.version),
    )
    assert found.count(None) == 1
    assert set(found) <= {None, Reason.ETAG_MISMATCH, Reason.CLIENT_NOT_FOUND}
