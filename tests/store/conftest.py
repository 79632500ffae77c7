"""Fresh storage of each kind for each test, migrated once for all of them."""

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from authsvc.store import Store, sql_store
from authsvc.store.memory import memory_store
from authsvc.store.migrate import Schema, upgrade
from authsvc.store.sql import COMMAND_TIMEOUT_S, Database
from authsvc_client.core.markers import MARKER_LIFETIME_S
from tests.clocks import HandClock
from tests.servers import SUPERUSER, Postgres

class Place:
    """Where one test keeps its data."""

    def __init__(self, backend: str, url: str = "") -> None:
        self.backend = backend
        self.url = url
        self.clock = HandClock()
        self._memory = memory_store(self.clock)
        self._databases: list[Database] = []

    def database(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Database:
        """The view of one more worker."""
        opened = Database(
            self.url, sqlite_id="ab" * 16 if self.backend == "sqlite" else "", timeout_s=timeout_s
        )
        self._databases.append(opened)
        return opened

    def open(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Store:
        """The store of one more worker."""
        if self.backend == "memory":
            return self._memory
        return sql_store(self.database(timeout_s=timeout_s))

    async def sql(self, statement: str, *values: Any) -> list[Any]:
        """Does what nobody may: writes by hand. `?` and `$1` are the caller's business."""
        return await sql(self.url, statement, *values)

    async def outlive_markers(self) -> None:
        """Lets all markers that are there run out."""
        if self.backend == "memory":
            self.clock.advance(MARKER_LIFETIME_S + 1)
        else:
            await self.sql(f"UPDATE feed SET until = until - {MARKER_LIFETIME_S + 1}")

    async def close(self) -> None:
        for database in self._databases:
            await database.close()


async def sql(url: str, statement: str, *values: Any) -> list[Any]:
    """One statement over a connection of its own."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.partition(":///")[2])) as connection, connection:
            return connection.execute(statement, values).fetchall()
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        rows = await connection.fetch(statement, *values)
        return [tuple(row) for row in rows]
    finally:
        await connection.close()


async def _migrate(url: str) -> None:
    database = Database(url)
    try:
        assert await upgrade(database) is Schema.EMPTY
    finally:
        await database.close()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    asyncio.run(_migrate(f"sqlite+aiosqlite:///{file}"))
    return file


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The name of a database that others are copied from."""
    url = asyncio.run(postgres.database())
    asyncio.run(_migrate(url))
    return url.partition(":///")[2].partition("?")[0]


async def copy_postgres(postgres: Postgres, template: str) -> str:
    name = f"copy_{uuid4().hex}"
    connection = await asyncpg.connect(host=str(postgres.folder), user=SUPERUSER, database="postgres")
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    finally:
        await connection.close()
    return postgres.url(name)


def _seed(backend: str, request: pytest.FixtureRequest, folder: Path) -> Place:
    if backend == "sqlite":
        file = folder / "authsvc.db"
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), file)
        return Place(backend, f"sqlite+aiosqlite:///{file}")
    if backend == "postgres":
        server, template = (
            request.getfixturevalue("postgres"),
            request.getfixturevalue("migrated_postgres"),
        )
        return Place(backend, asyncio.run(copy_postgres(server, template)))
    return Place(backend)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def _any_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return _seed(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgres"])
def _sql_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return _seed(request.param, request, tmp_path)


@pytest.fixture
async def place(_any_place: Place) -> AsyncIterator[Place]:
    """Each kind of storage, empty."""
    yield _any_place
    await _any_place.close()


@pytest.fixture
async def sql_place(_sql_place: Place) -> AsyncIterator[Place]:
    """Each kind of database, migrated and empty."""
    yield _sql_place
    await _sql_place.close()


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()
