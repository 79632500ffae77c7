"""One migrated PostgreSQL database for all tests: to empty it costs a tenth of making another."""

from typing import Any

import asyncpg

from authsvc.clock import SystemClock
from authsvc.store.migrate import Schema, upgrade
from authsvc.store.sql import Database
from tests.servers import Postgres

TABLES = "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public'"
ROWS = """SELECT format('INSERT INTO {0} SELECT (json_populate_record(NULL::{0}, %L)).*',
row_to_json(row)) FROM {0} AS row"""
RESET_S = 60


class Emptied:
    """Empty means: the rows that the migrations write are there, and no others."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._url = ""
        self._reset = ""

    async def again(self) -> str:
        """Its URL, once it is empty; another one's where a test left it without its tables."""
        if self._url:
            try:
                await self._empty()
                return self._url
            except asyncpg.PostgresError:
                pass
        await self._make()
        return self._url

    async def _empty(self) -> None:
        connection = await _connect(self._url)
        try:
            await connection.execute(self._reset, timeout=RESET_S)
        finally:
            await connection.close()

    async def _make(self) -> None:
        url = await self._postgres.database()
        database = Database(url, SystemClock())
        try:
            assert await upgrade(database) is Schema.EMPTY
        finally:
            await database.close()
        connection = await _connect(url)
        try:
            tables = [name for (name,) in await connection.fetch(TABLES)]
            statements = [f"TRUNCATE {', '.join(tables)} RESTART IDENTITY"]
            for name in tables:
                statements += [row for (row,) in await connection.fetch(ROWS.format(name))]
        finally:
            await connection.close()
        self._url, self._reset = url, ";\n".join(statements)


async def _connect(url: str) -> Any:
    return await asyncpg.connect(url.replace("+asyncpg", ""))
