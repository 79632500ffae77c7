"""What a database tells about itself, for who sets it up. Nothing is changed."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from authsvc.store.migrate import Schema, standing_of
from authsvc.store.sql import POOL_CONNECTIONS, Database
from authsvc.store.tables import BEAT, FEED, FEED_HEAD

FEED_COUNT_MAX = 2_000_000
"""Where counting stops."""
CONNECTIONS = 2 * POOL_CONNECTIONS + 3
"""Of one worker, at most: to write, to read and to follow."""

_SERVER = text(
    """
    SELECT current_setting('server_version_num')::int AS version,
           current_setting('server_version') AS version_text,
           pg_is_in_recovery() AS is_standby,
           current_setting('transaction_read_only') = 'on' AS is_read_only,
           current_setting('fsync') = 'on' AS fsync,
           current_setting('full_page_writes') = 'on' AS full_page_writes,
           current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('synchronous_standby_names') AS synchronous_standby_names,
           extract(epoch FROM clock_timestamp())::float8 AS time,
           (SELECT count(*) FROM pg_stat_activity
            WHERE application_name = 'authsvc' AND datname = current_database()
                AND usename = current_user AND pid <> pg_backend_pid()) AS own,
           least(
               current_setting('max_connections')::int
                   - current_setting('superuser_reserved_connections')::int
                   - coalesce(current_setting('reserved_connections', true)::int, 0)
                   - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
               (SELECT nullif(rolconnlimit, -1) - (
                    SELECT count(*) FROM pg_stat_activity WHERE usename = current_user)
                FROM pg_roles WHERE rolname = current_user),
               (SELECT nullif(datconnlimit, -1) - (
                    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database())
                FROM pg_database WHERE datname = current_database())
           ) AS free
    """
)
_STANDBYS = text("SELECT sync_state, count(*) FROM pg_stat_replication GROUP BY sync_state")
_DENIED = text(
    """
    SELECT relname, privilege
    FROM pg_class CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
    WHERE relname = ANY(:tables) AND relkind IN ('r', 'p') AND pg_table_is_visible(pg_class.oid)
      AND NOT has_table_privilege(pg_class.oid, privilege)
    ORDER BY relname, privilege
    """
)
_FEED = f"""
    SELECT revision, compacted_to, fingerprint,
           (SELECT count(*) FROM (SELECT 1 FROM {FEED.name} LIMIT {FEED_COUNT_MAX}) AS x) AS size,
           (SELECT time FROM {BEAT.name}) AS beat
    FROM {FEED_HEAD.name}
"""  # noqa: S608 - names of our own tables


class Feed(NamedTuple):
    """The head of the feed, how many rows it has, and when a worker last beat."""

    revision: int
    compacted_to: int
    fingerprint: str
    size: int
    beat: float


class PostgresServer:
    """A PostgreSQL, asked one thing at a time. Each raises AuthError STORE_UNAVAILABLE."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def server(self) -> Any:
        """Version, role, durability, time and connections, as one row."""
        return (await self._rows(_SERVER))[0]

    async def standbys(self) -> dict[str | None, int]:
        """How many are connected, by their `sync_state`; None where this user may not see it."""
        return {row[0]: row[1] for row in await self._rows(_STANDBYS)}

    async def schema(self) -> Schema:
        """Where the schema stands."""
        async with self._db.read(follower=True) as connection:
            return await connection.run_sync(standing_of)

    async def denied(self) -> list[str]:
        """What this user may not do with the tables."""
        tables = sorted(FEED.metadata.tables)
        return [f"{row[1]} on {row[0]}" for row in await self._rows(_DENIED, tables=tables)]

    async def fingerprint(self) -> str:
        """What names the history of this database; on a primary alone."""
        return str((await self._rows(text(f"SELECT {self._db.fingerprint}")))[0][0])

    async def feed(self) -> Feed:
        """The feed."""
        return Feed(*(await self._rows(text(_FEED)))[0])

    async def _rows(self, statement: Any, **parameters: Any) -> list[Any]:
        async with self._db.read(follower=True) as connection:
            return list((await connection.execute(statement, parameters)).all())


class SqliteFile(NamedTuple):
    """What a SQLite file holds."""

    is_wal: bool
    schema: Schema
    feed: Feed | None


def look_into(file: Path, timeout_s: float) -> SqliteFile:
    """A file that is there. Raises SQLAlchemyError, sqlite3.Error or OSError."""

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(str(file))}?mode=ro", timeout=timeout_s, uri=True)

    with closing(connect()) as plain:
        (journal,) = plain.execute("PRAGMA journal_mode").fetchone()
    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    with engine.connect() as connection:
        schema = standing_of(connection)
        feed = None
        if schema is Schema.CURRENT:
            feed = Feed(*connection.execute(text(_FEED)).one())
        return SqliteFile(journal == "wal", schema, feed)
