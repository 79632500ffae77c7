"""Fresh storage of each kind for each test, migrated once for all of them."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from authsvc.clock import SystemClock
from authsvc.store import sql_store
from authsvc.store.migrate import Schema, upgrade
from authsvc.store.port import Store
from authsvc.store.sql import COMMAND_TIMEOUT_S, Database
from authsvc_client.core.markers import MARKER_LIFETIME_S
from tests.clocks import HandClock
from tests.harness import by_hand
from tests.servers import SUPERUSER, Postgres


class Place:
    """Where one test keeps its data."""

    def __init__(self, backend: str, url: str = "") -> None:
        self.backend = backend
        self.url = url
        self.clock = HandClock()
        """Of SQLite; PostgreSQL has its own."""
        self._databases: list[Database] = []

    def database(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Database:
        """The view of one more worker."""
        opened = Database(
            self.url,
            self.clock,
            sqlite_id="ab" * 16 if self.backend == "sqlite" else "",
            timeout_s=timeout_s,
        )
        self._databases.append(opened)
        return opened

    def open(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Store:
        """The store of one more worker."""
        return sql_store(self.database(timeout_s=timeout_s))

    async def sql(self, statement: str, *values: Any) -> list[Any]:
        """Does what nobody may: writes by hand. `?` and `$1` are the caller's business."""
        return await sql(self.url, statement, *values)

    async def outlive_markers(self) -> None:
        """Lets all markers that are there run out."""
        if self.backend == "sqlite":
            self.clock.advance(MARKER_LIFETIME_S + 1)
        else:
            await self.sql(f"UPDATE feed SET until = until - {MARKER_LIFETIME_S + 1}")

    async def close(self) -> None:
        for database in self._databases:
            await database.close()


async def sql(url: str, statement: str, *values: Any) -> list[Any]:
    """One statement over a connection of its own."""
    if url.startswith("sqlite"):
        return await by_hand(Path(url.partition(":///")[2]), statement, *values)
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        rows = await connection.fetch(statement, *values)
        return [tuple(row) for row in rows]
    finally:
        await connection.close()


async def _migrate(url: str) -> None:
    database = Database(url, SystemClock())
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


@pytest.fixture(autouse=True)
async def _no_thread_left() -> AsyncIterator[None]:
    """Every connection to SQLite is a thread, and ends before the loop of its test."""
    yield
    async with asyncio.timeout(10):
        while any("_connection_worker_thread" in t.name for t in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def copy_postgres(postgres: Postgres, template: str) -> str:
    name = f"copy_{uuid4().hex}"
    connection = await asyncpg.connect(
        host=str(postgres.folder), user=SUPERUSER, database="postgres"
    )
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
        return Place(backend, request.getfixturevalue("migrated_url"))
    return Place(backend)


@pytest.fixture(params=["sqlite", "postgres"])
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


@pytest.fixture
def _sqlite_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return _seed("sqlite", request, tmp_path)


@pytest.fixture
def _postgres_place(postgres: Postgres, migrated_postgres: str) -> Place:
    return Place("postgres", asyncio.run(copy_postgres(postgres, migrated_postgres)))


@pytest.fixture
async def place_sqlite(_sqlite_place: Place) -> AsyncIterator[Place]:
    yield _sqlite_place
    await _sqlite_place.close()


@pytest.fixture
async def place_pg(_postgres_place: Place) -> AsyncIterator[Place]:
    """A PostgreSQL database whose schema the test may change."""
    yield _postgres_place
    await _postgres_place.close()
