"""The database: engines, transactions, and which errors mean what."""

import asyncio
import os
import re
import sqlite3
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, Executable, Row, event, literal_column
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.store.lineage import hold
from authsvc.store.port import Change

T = TypeVar("T")
R = TypeVar("R", bound=Row[Any])

COMMAND_TIMEOUT_S = 5.0
POOL_CONNECTIONS = 4

log = structlog.get_logger()

WAL_TRIES = 20

_LOST = (SQLAlchemyError, OSError, TimeoutError)
TIME = {
    "sqlite": "authsvc_now()",
    "postgresql": "(extract(epoch FROM clock_timestamp())::double precision)",
}
# A standby has no timeline of its own yet.
_POSTGRES_FINGERPRINT = (
    "CASE WHEN pg_is_in_recovery() THEN ''"
    " ELSE (SELECT system_identifier::text FROM pg_control_system()) || ':'"
    " || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END"
)


class Database:
    """A SQLite file or a PostgreSQL primary: one engine to write, one to read, one to follow."""

    def __init__(
        self,
        url: str,
        clock: Clock,
        *,
        sqlite_id: str = "",
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        """`clock` is a SQLite file's, and `sqlite_id` names its lineage; PostgreSQL has its own of
        both. `timeout_s` bounds each wait: for a connection, for a lock, for a statement.
        """
        self.url = make_url(url)
        self.dialect = self.url.get_backend_name()
        if self.dialect == "sqlite":
            self._writer = _sqlite(url, clock, timeout_s, begin="BEGIN IMMEDIATE")
            self._reader = _sqlite(url, clock, timeout_s, begin="BEGIN")
            self._follower = _sqlite(url, clock, timeout_s, begin="BEGIN")
        elif self.dialect == "postgresql":
            self._writer = _postgres(url, timeout_s, POOL_CONNECTIONS)
            auto = {"isolation_level": "AUTOCOMMIT"}
            self._single = self._writer.execution_options(**auto)
            self._reader = _postgres(url, timeout_s, POOL_CONNECTIONS).execution_options(**auto)
            self._follower = _postgres(url, timeout_s, 3).execution_options(**auto)
        else:
            raise ValueError(f"database.url: {self.dialect} is neither sqlite nor postgresql")
        self.time: ColumnElement[float] = literal_column(TIME[self.dialect])
        self.standby: ColumnElement[bool] = literal_column(
            "false" if self.dialect == "sqlite" else "pg_is_in_recovery()"
        )
        if re.fullmatch(r"[0-9a-f]*", sqlite_id) is None:
            raise ValueError("sqlite_id: hexadecimal digits only")
        self.fingerprint: ColumnElement[str] = literal_column(
            f"'{sqlite_id}'" if self.dialect == "sqlite" else _POSTGRES_FINGERPRINT
        )
        self.on_commit: Callable[[int, Sequence[Change]], None] = lambda _revision, _changes: None
        """Told what each transaction that took a revision changed, once it is committed."""
        self._running: set[asyncio.Task[Any]] = set()
        self._lineage = sqlite_id
        self._held: int | None = None

    def is_missing(self) -> bool:
        """Whether it is a SQLite file that the first use would make."""
        file = self.url.database
        return self.dialect == "sqlite" and bool(file) and not Path(file or "").exists()

    def hold(self) -> bool:
        """Keeps servers of other lineages off a SQLite file; False where one has it open.

        Raises OSError.
        """
        if self.dialect == "sqlite" and self.url.database and self._held is None:
            self._held = hold(self.url.database, self._lineage)
            return self._held is not None
        return True

    async def close(self) -> None:
        """Waits for the changes under way, and gives all connections back."""
        if self._running:
            await asyncio.wait(self._running)
        for engine in {
            id(e.pool): e for e in (self._writer, self._reader, self._follower)
        }.values():
            await engine.dispose()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    @asynccontextmanager
    async def read(self, *, follower: bool = False) -> AsyncIterator[AsyncConnection]:
        """A connection for one statement; AuthError STORE_UNAVAILABLE where it is lost."""
        try:
            async with (self._follower if follower else self._reader).connect() as connection:
                yield connection
        except _LOST as error:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause=repr(error)) from error

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction; AuthError STORE_UNAVAILABLE before the commit, COMMIT_UNKNOWN in it."""
        committing = False
        try:
            async with self._writer.connect() as connection:
                connection.info.pop(_TAKEN, None)  # of one that was rolled back
                yield connection
                committing = True
                try:
                    await connection.commit()
                except BaseException:
                    await connection.invalidate()  # SQLite may have left its transaction open
                    raise
                for revision, changes in connection.info.pop(_TAKEN, ()):
                    self.on_commit(revision, changes)
        except _LOST as error:
            if isinstance(error, IntegrityError) and not committing:
                raise
            reason = Reason.COMMIT_UNKNOWN if committing else Reason.STORE_UNAVAILABLE
            raise AuthError(reason, cause=repr(error)) from error

    async def single(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> list[Row[Any]]:
        """Rows of one changing statement, committed with it: one round trip on PostgreSQL.

        AuthError STORE_UNAVAILABLE before it, COMMIT_UNKNOWN from there on.
        """
        if self.dialect == "sqlite":
            async with self.write() as connection:
                return list((await connection.execute(statement, parameters)).all())
        sent = False
        try:
            async with self._single.connect() as connection:
                sent = True
                return list((await connection.execute(statement, parameters)).all())
        except _LOST as error:
            reason = Reason.COMMIT_UNKNOWN if sent else Reason.STORE_UNAVAILABLE
            raise AuthError(reason, cause=repr(error)) from error

    async def to_the_end(self, change: Coroutine[Any, Any, T]) -> T:
        """Runs a change in a task of its own: a caller that goes away does not cut it in half."""
        task = asyncio.create_task(change)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)


def shown(url: URL) -> str:
    """Without what may be secret: the password, and the query but for its host."""
    query = {name: value for name, value in url.query.items() if name == "host"}
    return url.set(query=query).render_as_string(hide_password=True)


_TAKEN = "authsvc_taken"


def note(connection: AsyncConnection, revision: int, changes: Sequence[Change]) -> None:
    """What the transaction changes under a revision that it took, for `on_commit`."""
    connection.info.setdefault(_TAKEN, []).append((revision, changes))


def readable(rows: Iterable[R], decode: Callable[[R], T], table: str) -> Iterator[T]:
    """Rows as values. One that this version cannot read is reported, and is not there."""
    for row in rows:
        try:
            yield decode(row)
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            log.error("store.unreadable", table=table, id=row[0], cause=repr(error))


def _sqlite(url: str, clock: Clock, timeout_s: float, *, begin: str) -> AsyncEngine:
    connections = 1 if "IMMEDIATE" in begin else 4
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=timeout_s,
        hide_parameters=True,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        # The driver's own transaction mode loses updates without a word.
        connection.isolation_level = None
        connection.create_function("authsvc_now", 0, clock.wall)
        cursor = connection.cursor()
        _switch_to_wal(cursor, timeout_s)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _switch_to_wal(cursor: Any, timeout_s: float) -> None:
    """Of those that switch a new file at once SQLite refuses some, without a wait: try again."""
    cursor.execute(f"PRAGMA busy_timeout={int(timeout_s * 1000 / WAL_TRIES)}")
    for tries_left in reversed(range(WAL_TRIES)):
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if not tries_left:
                raise
        else:
            break
    cursor.execute(f"PRAGMA busy_timeout={int(timeout_s * 1000)}")


def _postgres(url: str, timeout_s: float, connections: int) -> AsyncEngine:
    milliseconds = str(int(timeout_s * 1000))
    return create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=timeout_s,
        pool_pre_ping=False,
        hide_parameters=True,  # of errors that are logged
        connect_args={
            "command_timeout": timeout_s,
            "timeout": timeout_s,
            "server_settings": {
                "application_name": "authsvc",
                "default_transaction_isolation": "read committed",
                "lock_timeout": milliseconds,
                "idle_in_transaction_session_timeout": milliseconds,
            },
        },
    )
