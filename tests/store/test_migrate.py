"""The schema: told apart, brought up to date once, whole or not at all."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlmodel import SQLModel

from authsvc.clock import SystemClock
from authsvc.errors import AuthError, Reason
from authsvc.store import migrate, sql_store
from authsvc.store.migrate import Schema, standing, upgrade
from authsvc.store.port import change
from authsvc.store.sql import Database
from authsvc_client.core.markers import MarkerKind, marker_key
from tests.servers import Postgres
from tests.store.conftest import sql

GOOD = "op.create_table('later', sa.Column('id', sa.Integer()))"
RAISES = f"{GOOD}\n    raise RuntimeError('half-way')"
BAD_SQL = f"{GOOD}\n    op.execute('INSERT INTO nowhere VALUES (1)')"


@pytest.fixture(params=["sqlite", "postgres"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'authsvc.db'}"
    else:
        server: Postgres = request.getfixturevalue("postgres")
        yield await server.database()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    opened = Database(url, SystemClock())
    yield opened
    await opened.close()


def add_migration(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Plays a later version of authsvc, which has one migration more."""
    scripts = folder / "migrations"
    shutil.copytree(
        Path(migrate.__file__).parent / "migrations",
        scripts,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (scripts / "versions/0006_later.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        "revision, down_revision, branch_labels, depends_on = '0006', '0005', None, None\n\n"
        f"def upgrade():\n    {body}\n"
    )
    original = migrate._config

    def config(connection: Connection) -> Config:
        made = original(connection)
        made.set_main_option("script_location", str(scripts))
        return made

    monkeypatch.setattr(migrate, "_config", config)


async def tables(database: Database) -> set[str]:
    async with database.read() as connection:
        return set(await connection.run_sync(lambda c: inspect(c).get_table_names()))


async def test_empty_becomes_current_and_stays(database: Database) -> None:
    assert await standing(database) is Schema.EMPTY
    assert await tables(database) == set()
    assert await upgrade(database) is Schema.EMPTY
    assert await standing(database) is Schema.CURRENT
    before = await tables(database)
    store = sql_store(database)
    page = await store.feed.read(0)
    assert await upgrade(database) is Schema.CURRENT
    assert await tables(database) == before
    again = await store.feed.read(0)
    assert (again.head, again.compacted_to) == (page.head, page.compacted_to) == (2**32, 2**32)


async def test_behind_is_brought_up_to_date_with_its_rows(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await upgrade(database)
    revision = await sql_store(database).feed.append([change(MarkerKind.TOKEN_DEAD, "x")])
    add_migration(monkeypatch, tmp_path, GOOD)
    assert await standing(database) is Schema.BEHIND
    assert "later" not in await tables(database)
    assert await upgrade(database) is Schema.BEHIND
    assert await standing(database) is Schema.CURRENT
    assert "later" in await tables(database)
    assert (await sql_store(database).feed.read(0)).head == revision


def _at(monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """Plays an earlier version of authsvc, whose last migration was this one."""
    real = command.upgrade
    monkeypatch.setattr(command, "upgrade", lambda config, _head: real(config, revision))


async def test_cutoffs_and_rows_of_the_first_schema_survive(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _at(patch, "0001")
        assert await upgrade(database) is Schema.EMPTY
    assert await standing(database) is Schema.BEHIND
    head = 2 * 2**32 + 7
    cutoffs = {"cut": head, "also cut": head - 2, "alive": 0}
    for client_id, revision in cutoffs.items():
        await sql(
            url,
            "INSERT INTO client (client_id, state, details, secret_digest, cutoff, version,"
            " registrant, reviewer, review_comment, create_time, update_time) VALUES"
            f" ('{client_id}', 1, '{{}}', '{client_id}', {revision}, 3, 'admin', '', '', 5, 6)",
        )
    await sql(
        url,
        "INSERT INTO client (client_id, state, details, identity_kind, identity_value, cutoff,"
        " version, registrant, reviewer, review_comment, create_time, update_time)"
        " VALUES ('named', 1, '{}', 'san_uri', 'name', 0, 1, '', '', '', 5, 6)",
    )
    await sql(
        url,
        "INSERT INTO resource (resource_id, display_name, owner_client_id, token_format,"
        " token_lifetime_s, version, create_time, update_time)"
        " VALUES ('urn:r', '', 'cut', 1, 60, 1, 5, 6)",
    )
    await sql(url, "INSERT INTO scope VALUES ('read', 'urn:r', '')")
    for kid, state in (("now", "current"), ("past", "retired")):
        await sql(
            url,
            "INSERT INTO signing_key (kid, alg, state, public_jwk, sealed_private, create_time)"
            f" VALUES ('{kid}', 'ES256', '{state}', '{{}}', 'x', 5.5)",
        )
    await sql(
        url,
        f"UPDATE feed_head SET revision = {head}, cutoff = {head - 4},"
        " fingerprint = 'mine', nonce = 'n'",
    )

    assert await upgrade(database) is Schema.BEHIND
    assert await standing(database) is Schema.CURRENT
    assert dict(await sql(url, "SELECT key, revision FROM cutoff")) == {
        marker_key(MarkerKind.CUTOFF_EVERYTHING).hex(): head - 4,
        marker_key(MarkerKind.CUTOFF_CLIENT, "cut").hex(): head,
        marker_key(MarkerKind.CUTOFF_CLIENT, "also cut").hex(): head - 2,
    }
    async with database.read() as connection:
        columns = await connection.run_sync(lambda c: inspect(c).get_multi_columns())
    assert "cutoff" not in {column["name"] for table in columns.values() for column in table}
    assert sorted(await sql(url, "SELECT client_id, version, identity_value FROM client")) == [
        ("alive", 3, None),
        ("also cut", 3, None),
        ("cut", 3, None),
        ("named", 1, "name"),
    ]
    keys = "SELECT kid, create_time, ready_time, activate_time, retire_time FROM signing_key"
    assert sorted(await sql(url, keys)) == [
        ("now", 5.5, 5.5, 5.5, None),
        ("past", 5.5, 5.5, None, None),
    ]
    resources = "SELECT resource_id, owner_client_id, encryption_jwk FROM resource"
    assert await sql(url, resources) == [("urn:r", "cut", "")]
    assert await sql(url, "SELECT name, resource_id FROM scope") == [("read", "urn:r")]
    page = await sql_store(database).feed.read(0)
    assert (page.head, page.known_fingerprint, page.nonce) == (head, "mine", "n")


async def test_first_schema_without_a_cutoff_gets_none(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _at(patch, "0001")
        await upgrade(database)
    assert await upgrade(database) is Schema.BEHIND
    assert await sql(url, "SELECT key FROM cutoff") == []


_STAMP = "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE things (id INTEGER)"],
        ["CREATE TABLE client (client_id INTEGER)"],
        [_STAMP, "INSERT INTO alembic_version VALUES ('9f3a')"],
        # Another program's, whose first migration has the same name as ours.
        [_STAMP, "INSERT INTO alembic_version VALUES ('0001')", "CREATE TABLE things (id INTEGER)"],
        [_STAMP],
    ],
)
async def test_what_others_made_is_left_alone(
    database: Database, url: str, statements: list[str]
) -> None:
    for statement in statements:
        await sql(url, statement)
    before = await tables(database)
    assert await standing(database) is Schema.UNKNOWN
    assert await upgrade(database) is Schema.UNKNOWN
    assert await tables(database) == before


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = '0009'",
        "INSERT INTO alembic_version VALUES ('other')",
        "DELETE FROM alembic_version",
    ],
)
async def test_a_stamp_that_this_version_does_not_know_is_unknown(
    database: Database, url: str, change: str
) -> None:
    """As after a newer version has migrated."""
    await upgrade(database)
    await sql(url, change)
    assert await standing(database) is Schema.UNKNOWN
    assert await upgrade(database) is Schema.UNKNOWN


@pytest.mark.parametrize("attempt", range(3))
async def test_of_upgrades_at_once_one_does_it(url: str, attempt: int) -> None:
    workers = [Database(url, SystemClock()) for _ in range(4)]
    try:
        found = await asyncio.gather(*map(upgrade, workers))
        assert sorted(found, key=lambda schema: schema.value) == [Schema.CURRENT] * 3 + [
            Schema.EMPTY
        ]
        assert await standing(workers[0]) is Schema.CURRENT
        assert await sql(url, "SELECT count(*) FROM feed_head") == [(1,)]
    finally:
        for worker in workers:
            await worker.close()


@pytest.mark.parametrize("body", [RAISES, BAD_SQL], ids=["raises", "bad sql"])
@pytest.mark.parametrize("start", [Schema.EMPTY, Schema.BEHIND])
async def test_a_migration_that_fails_leaves_nothing(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    body: str,
    start: Schema,
) -> None:
    if start is Schema.BEHIND:
        await upgrade(database)
    before = await tables(database)
    with monkeypatch.context() as patch:
        add_migration(patch, tmp_path, body)
        assert await standing(database) is start
        with pytest.raises(RuntimeError if body == RAISES else AuthError) as caught:
            await upgrade(database)
        if isinstance(caught.value, AuthError):
            assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert await standing(database) is start
    assert await tables(database) == before
    assert await upgrade(database) is (Schema.EMPTY if start is Schema.EMPTY else Schema.CURRENT)
    assert await standing(database) is Schema.CURRENT


def _differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(
        connection, opts={"compare_type": True, "compare_server_default": True}
    )
    return list(compare_metadata(context, SQLModel.metadata))


async def test_migrations_make_the_schema_of_the_tables(
    database: Database, request: pytest.FixtureRequest, url: str, tmp_path: Path
) -> None:
    await upgrade(database)
    async with database.read() as connection:
        assert await connection.run_sync(_differences) == []

    # Indexes with their conditions, which alembic does not compare.
    sqlite = url.startswith("sqlite")
    if sqlite:
        other = f"sqlite+aiosqlite:///{tmp_path / 'other.db'}"
    else:
        other = await request.getfixturevalue("postgres").database()
    fresh = Database(other, SystemClock())
    try:
        async with fresh.write() as connection:
            await connection.run_sync(SQLModel.metadata.create_all)
    finally:
        await fresh.close()
    indexes = (
        "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
        if sqlite
        else "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'"
        " AND tablename <> 'alembic_version'"
    )
    assert sorted(await sql(url, indexes)) == sorted(await sql(other, indexes))
