"""What happens to the store when its database fails, or holds what nobody should have written."""

import asyncio
import re
import sqlite3
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest

from authsvc.clock import SystemClock
from authsvc.errors import AuthError, Reason
from authsvc.model import ClientState, IdentityKind, KeyState
from authsvc.store import sql_store
from authsvc.store.migrate import Schema, standing, upgrade
from authsvc.store.port import Store
from authsvc.store.sql import Database
from authsvc_client.core.markers import MarkerKind, marker_key
from tests.servers import SUPERUSER, Postgres
from tests.store.conftest import Place
from tests.store.test_contract import (
    a_client,
    a_key,
    a_resource,
    dead,
    head,
    outcome,
    refused,
    step,
)


async def heals(call: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    """Asks until it works; only AuthErrors that say UNAVAILABLE may be seen on the way."""
    async with asyncio.timeout(seconds):
        while (reason := await outcome(call())) is not None:
            assert reason in (Reason.STORE_UNAVAILABLE, Reason.COMMIT_UNKNOWN)
            await asyncio.sleep(0.02)


def every_verb(store: Store) -> list[Awaitable[object]]:
    approve = step("one", ClientState.PENDING, ClientState.APPROVED)
    return [
        store.clients.get("one"),
        store.clients.by_identity([(IdentityKind.SAN_URI, "name")]),
        store.clients.page(None, "", 9),
        store.clients.add(a_client("two")),
        store.clients.move(approve),
        store.clients.replace(a_client("one", version=2), cut_off=True),
        store.clients.delete("one", None),
        store.clients.expire(1.0),
        store.clients.secret_used("one"),
        store.clients.by_registration_token(b"one"),
        store.initial_access_tokens.find(b"one"),
        store.initial_access_tokens.delete("one"),
        store.resources.catalog(),
        store.resources.add(a_resource("r")),
        store.keys.all(),
        store.keys.add_first(a_key("k")),
        store.feed.append(dead("a")),
        store.feed.read(0),
    ]


# The database is gone


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """One that the test may break."""
    with Postgres() as server:
        yield server


def start_again(server: Postgres) -> None:
    server._process = server._launch()


async def test_postgres_stopped_at_once_is_unavailable_and_heals(own_postgres: Postgres) -> None:
    database = Database(await own_postgres.database(), SystemClock(), timeout_s=2)
    try:
        await upgrade(database)
        store = sql_store(database)
        await store.clients.add(a_client("one", "name"))
        await asyncio.gather(*(store.clients.get("one") for _ in range(6)), store.feed.read(0))
        kept = await store.feed.append(dead("kept"))
        own_postgres._quit()
        for _ in range(2):
            async with asyncio.timeout(10):
                reasons = await asyncio.gather(*map(outcome, every_verb(store)))
            assert set(reasons) == {Reason.STORE_UNAVAILABLE}
        start_again(own_postgres)
        await asyncio.gather(
            heals(lambda: store.feed.append(dead("x"))),
            heals(lambda: store.clients.get("one")),
            heals(lambda: store.feed.read(0)),
        )
        page = await store.feed.read(1)
        assert kept in {m.revision for m in page.markers}
        assert await outcome(store.clients.add(a_client("three"))) is None
    finally:
        await database.close()


async def test_postgres_ends_connections_under_load(place_pg: Place) -> None:
    store = place_pg.open()
    start = await head(store)
    ended = asyncio.Event()
    done: list[int] = []
    refusals = Counter[Reason]()

    async def write(worker: int) -> None:
        number = 0
        while not ended.is_set():
            number += 1
            try:
                done.append(await store.feed.append(dead(f"{worker}-{number}")))
            except AuthError as error:
                refusals[error.reason] += 1

    writers = [asyncio.create_task(write(n)) for n in range(8)]
    for _ in range(10):
        await asyncio.sleep(0.03)
        await place_pg.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'authsvc' AND datname = current_database()"
        )
    ended.set()
    await asyncio.gather(*writers)
    await heals(lambda: store.feed.append(dead("last")))
    await heals(lambda: store.feed.read(0))
    page = await store.feed.read(start)
    revisions = [m.revision for m in page.markers]
    assert revisions == list(range(start + 1, page.head + 1))
    assert len(done) == len(set(done))
    assert set(done) <= set(revisions)
    assert refusals.keys() <= {Reason.STORE_UNAVAILABLE, Reason.COMMIT_UNKNOWN}
    assert len(revisions) <= len(done) + refusals[Reason.COMMIT_UNKNOWN] + 1


@pytest.mark.parametrize("url", ["sqlite+aiosqlite:////nowhere/x.db", "postgres"])
async def test_a_database_that_never_was_is_unavailable(postgres: Postgres, url: str) -> None:
    database = Database(postgres.url("nowhere") if url == "postgres" else url, SystemClock())
    try:
        for call in every_verb(sql_store(database)):
            assert await outcome(call) is Reason.STORE_UNAVAILABLE
        assert await outcome(standing(database)) is Reason.STORE_UNAVAILABLE
    finally:
        await database.close()


async def test_postgres_without_free_connections_is_unavailable_and_heals(
    place_pg: Place,
) -> None:
    name = (await place_pg.sql("SELECT current_database()"))[0][0]
    await place_pg.sql(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    role = f"limited_{name}"
    await place_pg.sql(f"CREATE ROLE {role} LOGIN")
    database = Database(place_pg.url.replace(f"user={SUPERUSER}", f"user={role}"), SystemClock())
    try:
        reason = await outcome(database_now(database))
        assert reason is Reason.STORE_UNAVAILABLE
        await place_pg.sql(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
        await heals(lambda: database_now(database))
    finally:
        await database.close()


async def database_now(database: Database) -> None:
    async with database.read() as connection:
        await connection.exec_driver_sql("SELECT 1")


async def test_a_row_locked_too_long_is_unavailable_and_heals(place_pg: Place) -> None:
    store = place_pg.open(timeout_s=0.3)
    await store.clients.add(a_client("one"))
    other = await asyncpg.connect(place_pg.url.replace("+asyncpg", ""))
    try:
        async with other.transaction():
            await other.execute("SELECT 1 FROM feed_head FOR UPDATE")
            approve = step("one", ClientState.PENDING, ClientState.APPROVED)
            results = await asyncio.gather(
                outcome(store.feed.append(dead("a"))), outcome(store.clients.move(approve))
            )
            assert list(results) == [Reason.STORE_UNAVAILABLE] * 2
            client = await store.clients.get("one")  # readers do not wait
            assert client == a_client("one")
    finally:
        await other.close()
    before = await head(store)
    assert await store.feed.append(dead("a")) == before + 1


_WAITS = "SELECT 1 FROM pg_locks WHERE NOT granted"


async def test_a_change_that_has_begun_is_made_though_its_caller_is_gone(place_pg: Place) -> None:
    store, witness = place_pg.open(), place_pg.open()
    before = await head(store)
    other = await asyncpg.connect(place_pg.url.replace("+asyncpg", ""))
    try:
        async with other.transaction():
            await other.execute("SELECT 1 FROM feed_head FOR UPDATE")
            caller = asyncio.create_task(store.feed.append(dead("a")))
            async with asyncio.timeout(5):
                while not await place_pg.sql(_WAITS):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            assert caller.cancelled()
    finally:
        await other.close()
    await store.close()  # waits for it
    page = await witness.feed.read(before)
    assert [(m.kind, m.key) for m in page.markers] == [(c.kind, c.key) for c in dead("a")]


async def test_what_is_logged_of_an_error_holds_no_values(sql_place: Place) -> None:
    store = sql_place.open(timeout_s=0.2)
    await store.clients.add(a_client("one"))
    needle = b"needle-in-a-row"
    secret = a_client("one", secret_digest=needle, registrant=needle.decode())
    error = await refused(store.clients.add(secret))
    assert error.reason is Reason.ALREADY_EXISTS
    assert "needle" not in error.cause + "".join(traceback.format_exception(error))
    await sql_place.sql("ALTER TABLE client RENAME TO elsewhere")
    try:
        error = await refused(store.clients.add(secret))
    finally:
        await sql_place.sql("ALTER TABLE elsewhere RENAME TO client")
    assert error.reason is Reason.STORE_UNAVAILABLE
    told = error.cause + "".join(traceback.format_exception(error))
    assert "INSERT INTO client" in told
    assert "needle" not in told


# SQLite


async def test_sqlite_locked_by_another_is_unavailable_and_heals(place_sqlite: Place) -> None:
    store = place_sqlite.open(timeout_s=0.2)
    await store.clients.add(a_client("one"))
    before = await head(store)
    file = place_sqlite.url.partition(":///")[2]
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writes = [
            store.clients.add(a_client("two")),
            store.feed.append(dead("a")),
            store.resources.add(a_resource("r")),
            store.clients.move(step("one", ClientState.PENDING, ClientState.APPROVED)),
        ]
        async with asyncio.timeout(10):
            reasons = await asyncio.gather(*map(outcome, writes))
        assert reasons == [Reason.STORE_UNAVAILABLE] * 4
        assert await store.clients.get("one") == a_client("one")  # readers do not wait
        assert await head(store) == before
        other.execute("ROLLBACK")
    assert await store.feed.append(dead("a")) == before + 1
    assert await store.clients.get("two") is None


async def test_sqlite_full_is_unavailable_and_heals(place_sqlite: Place) -> None:
    database = place_sqlite.database()
    store = sql_store(database)
    before = await store.feed.append(dead("a"))

    async def limit(pages: int) -> None:
        async with database.write() as connection:
            await connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    await limit(1)
    many = dead(*(str(n) for n in range(5000)))
    assert await outcome(store.feed.append(many)) is Reason.STORE_UNAVAILABLE
    assert await head(store) == before
    await limit(1_000_000)
    assert await store.feed.append(many) == before + 1


# COMMIT itself fails

_COMMIT_TRIGGER = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {how}; RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON feed DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION fail();
"""
_ENDS = "PERFORM pg_terminate_backend(pg_backend_pid())"


@pytest.mark.parametrize("how", ["RAISE EXCEPTION 'at commit'", "RAISE unique_violation", _ENDS])
async def test_an_error_of_commit_is_unknown_on_postgres(place_pg: Place, how: str) -> None:
    store = place_pg.open()
    before = await head(store)
    connection = await asyncpg.connect(place_pg.url.replace("+asyncpg", ""))
    try:
        await connection.execute(_COMMIT_TRIGGER.format(how=how))
        for call in (store.feed.append(dead("a")), store.resources.add(a_resource("r"))):
            assert await outcome(call) is Reason.COMMIT_UNKNOWN
        await connection.execute("DROP TRIGGER at_commit ON feed")
    finally:
        await connection.close()
    assert await head(store) == before
    await heals(lambda: store.resources.add(a_resource("r")), 5)


async def test_an_error_of_commit_is_unknown_on_sqlite(place_sqlite: Place) -> None:
    store = place_sqlite.open()
    before = await head(store)
    await place_sqlite.sql(
        "CREATE TABLE late (id REFERENCES client (client_id) DEFERRABLE INITIALLY DEFERRED)"
    )
    await place_sqlite.sql(
        "CREATE TRIGGER at_commit AFTER INSERT ON feed BEGIN INSERT INTO late VALUES ('no'); END"
    )
    for call in (store.feed.append(dead("a")), store.resources.add(a_resource("r"))):
        assert await outcome(call) is Reason.COMMIT_UNKNOWN
    await place_sqlite.sql("DROP TRIGGER at_commit")
    assert await head(store) == before
    assert await store.resources.add(a_resource("r")) == before + 1


# What nobody should have written


_BROKEN = [
    "details = '{'",
    "details = 'null'",
    "details = '[]'",
    "details = '{}'",
    "details = '" + "[" * 5000 + "'",
    "details = replace(details, '\"grant_types\": [1]', '\"grant_types\": [99]')",
    "details = replace(details, '\"auth_methods\": [5]', '\"auth_methods\": [5, 0]')",
    "details = replace(details, '[\"orders.read\"]', '7')",
    "state = 99",
    "state = 0",
    "identity_kind = 'san_email'",
]


@pytest.mark.parametrize("change", _BROKEN, ids=lambda change: change[:60])
async def test_a_client_that_cannot_be_read_is_not_there_and_harms_no_other(
    sql_place: Place, change: str
) -> None:
    store = sql_place.open()
    good = [a_client(name, f"name-{name}") for name in ("a", "c")]
    for client in (*good, a_client("b", "name-b")):
        await store.clients.add(client)
    await sql_place.sql(f"UPDATE client SET {change} WHERE client_id = 'b'")
    assert await store.clients.get("b") is None
    names = [(IdentityKind.SAN_URI, f"name-{name}") for name in "abc"]
    found = await store.clients.by_identity(names)
    assert sorted(found, key=lambda client: client.client_id) == good
    assert await store.clients.page(None, "", 9) == tuple(good)
    assert await store.clients.page(None, "", 2) == tuple(good)
    assert await store.clients.page(None, "a", 1) == (good[1],)
    before = await head(store)
    for state in ClientState:
        error = await refused(store.clients.move(step("b", state, ClientState.APPROVED)))
        assert error.reason is Reason.CLIENT_NOT_FOUND
    taken = await refused(store.clients.add(a_client("b")))
    assert taken.reason is Reason.ALREADY_EXISTS
    assert await head(store) == before
    _, revision = await store.clients.move(step("a", ClientState.PENDING, ClientState.APPROVED))
    assert revision == before + 1


async def test_a_resource_that_cannot_be_read_is_not_in_the_catalog(sql_place: Place) -> None:
    store = sql_place.open()
    await store.resources.add(a_resource("good", "good.read"))
    await store.resources.add(a_resource("bad", "bad.read"))
    await sql_place.sql("UPDATE resource SET token_format = 99 WHERE resource_id = 'bad'")
    catalog = await store.resources.catalog()
    assert catalog.by_id == {"good": a_resource("good", "good.read")}
    assert catalog.owner_of_scope == {"good.read": "good"}


@pytest.mark.parametrize(
    "change", ["state = 'shiny'", "public_jwk = '{'", "public_jwk = '[]'", "public_jwk = '7'"]
)
async def test_a_key_that_cannot_be_read_is_not_there(sql_place: Place, change: str) -> None:
    store = sql_place.open()
    await store.keys.add_first(a_key("bad"))
    await sql_place.sql(f"UPDATE signing_key SET {change}")
    assert await store.keys.all() == ()
    await sql_place.sql(f"UPDATE signing_key SET state = '{KeyState.RETIRED}'")
    await store.keys.add_first(a_key("good"))
    assert "good" in {key.kid for key in await store.keys.all()}


async def test_a_change_of_an_unknown_kind_kills_every_token(sql_place: Place) -> None:
    store = sql_place.open()
    start = await head(store)
    revision = await store.feed.append(dead("a", "b"))
    digits = dead("a")[0].key.hex()
    literal = f"X'{digits}'" if sql_place.backend == "sqlite" else f"'\\x{digits}'"
    await sql_place.sql(f"UPDATE feed SET kind = 99 WHERE key = {literal}")
    kind = MarkerKind.CUTOFF_EVERYTHING
    page = await store.feed.read(start)
    pieces = [marker async for piece in store.feed.pieces(page.head, 1) for marker in piece]
    for found in (page.markers, pieces):
        assert {(m.kind, m.key, m.revision) for m in found} == {
            (kind, marker_key(kind), revision),
            (MarkerKind.TOKEN_DEAD, dead("b")[0].key, revision),
        }


async def test_without_its_head_the_feed_is_unavailable(sql_place: Place) -> None:
    store = sql_place.open()
    await store.clients.add(a_client("one"))
    await sql_place.sql("DELETE FROM feed_head")
    approve = step("one", ClientState.PENDING, ClientState.APPROVED)
    for call in (store.feed.append(dead("a")), store.feed.read(0), store.clients.move(approve)):
        assert await outcome(call) is Reason.STORE_UNAVAILABLE
    assert await store.clients.get("one") == a_client("one")
    assert await sql_place.sql("SELECT count(*) FROM feed") == [(0,)]


# PostgreSQL as an application uses it


async def test_an_ordinary_role_is_enough_on_postgres(postgres: Postgres) -> None:
    name = re.sub(r"\W", "_", f"app_{id(object())}")
    admin = await asyncpg.connect(host=str(postgres.folder), user=SUPERUSER, database="postgres")
    try:
        await admin.execute(
            f"CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION"
        )
        await admin.execute(f"CREATE DATABASE {name} OWNER {name} TEMPLATE template0")
        roles = await admin.fetch(
            "SELECT b.rolname FROM pg_auth_members m JOIN pg_roles b ON b.oid = m.roleid"
            " JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = $1",
            name,
        )
        assert roles == []
    finally:
        await admin.close()
    url = postgres.url(name).replace(f"user={SUPERUSER}", f"user={name}")
    database = Database(url, SystemClock())
    try:
        assert await upgrade(database) is Schema.EMPTY
        assert await standing(database) is Schema.CURRENT
        store = sql_store(database)
        await store.clients.add(a_client("one", "name"))
        for call in every_verb(store):
            await call
        page = await store.feed.read(0)
        assert re.fullmatch(r"[0-9]{10,20}:[0-9A-F]{8}", page.fingerprint)
        await store.feed.begin(page)
        await store.feed.raise_epoch(page, page.head, cut_off=True)
    finally:
        await database.close()


def test_other_databases_and_lineages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither sqlite nor postgresql"):
        Database("mysql+aiomysql://x/y", SystemClock())
    with pytest.raises(ValueError, match="hexadecimal"):
        Database(f"sqlite+aiosqlite:///{tmp_path / 'x'}", SystemClock(), sqlite_id="a'b")
