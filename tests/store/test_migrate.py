"""The schema: told apart, brought up to date once, whole or not at all."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlmodel import SQLModel

from authsvc.errors import AuthError, Reason
from authsvc.store import migrate, sql_store
from authsvc.store.migrate import Schema, standing, upgrade
from authsvc.store.sql import Database
from authsvc_client.core.markers import MarkerKind
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
    opened = Database(url)
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
    (scripts / "versions/0002_later.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        "revision, down_revision, branch_labels, depends_on = '0002', '0001', None, None\n\n"
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
    revision = await sql_store(database).feed.append([(MarkerKind.TOKEN_DEAD, b"k" * 16)])
    add_migration(monkeypatch, tmp_path, GOOD)
    assert await standing(database) is Schema.BEHIND
    assert "later" not in await tables(database)
    assert await upgrade(database) is Schema.BEHIND
    assert await standing(database) is Schema.CURRENT
    assert "later" in await tables(database)
    assert (await sql_store(database).feed.read(0)).head == revision


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
        "UPDATE alembic_version SET version_num = '0002'",
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
    workers = [Database(url) for _ in range(4)]
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
    fresh = Database(other)
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
