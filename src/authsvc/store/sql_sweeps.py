"""What is over and goes, in SQL: piece by piece, so that nobody waits for it."""

from collections.abc import Mapping

from sqlalchemy import TextClause, func, select, text, update

from authsvc.store.sql import TIME, Database
from authsvc.store.tables import FEED, FEED_HEAD
from authsvc_client.core.markers import LEEWAY_S, SKEW_S

LATE_S = LEEWAY_S + SKEW_S
"""A token is taken for live so long after its end."""
DAY_S = 24 * 3600
AUDIT_S = 400 * DAY_S
"""How long audit rows are kept, unless the settings say."""
_PIECE = {
    "sqlite": "DELETE FROM {0} WHERE rowid IN ({1})",
    "postgresql": "DELETE FROM {0} WHERE ctid = ANY(ARRAY({1} FOR UPDATE SKIP LOCKED))",
}
_ROW = {"sqlite": "rowid", "postgresql": "ctid"}
_OVER: Mapping[str, Mapping[str, float]] = {
    "feed": {"until": 0},
    "access_token": {"expire_time": LATE_S},
    "assertion": {"expire_time": LATE_S},
    "creation": {"expire_time": LATE_S},
    "initial_access_token": {"expire_time": DAY_S},
    "grant": {"end_time": DAY_S, "expire_time": DAY_S},
    "session": {"end_time": DAY_S, "expire_time": DAY_S},
    "failure": {"expire_time": LATE_S},
}
"""How long after which time a row goes. A grant that was idle too long goes at its absolute end:
that time moves with each use, and has no index.
"""
_ALSO = {"feed": " AND revision <= (SELECT compacted_to FROM feed_head)"}


class SqlSweeps:
    """Sweeps."""

    def __init__(self, database: Database, audit_s: float = AUDIT_S) -> None:
        self._db = database
        over = {**_OVER, "audit": {"create_time": audit_s}}
        now = select(database.time).scalar_subquery()
        needed = select(func.min(FEED.c.revision)).where(FEED.c.until > now).scalar_subquery()
        self._found = select(FEED_HEAD.c.revision, FEED_HEAD.c.compacted_to, needed.label("needed"))
        self._pieces = {
            table: [_piece(database.dialect, table, *over) for over in columns.items()]
            for table, columns in over.items()
        }

    async def compact(self) -> None:
        """See SweepStore."""
        async with self._db.read() as connection:
            head = (await connection.execute(self._found)).one()
        # The row at the head stays: by its nonce a follower knows its history.
        last = min(head.revision, head.needed or head.revision) - 1
        if last > head.compacted_to:
            await self._db.to_the_end(self._move(last))

    async def _move(self, last: int) -> None:
        async with self._db.write() as connection:
            await connection.execute(
                update(FEED_HEAD)
                .where(FEED_HEAD.c.compacted_to < last, FEED_HEAD.c.revision > last)
                .values(compacted_to=last)
            )

    async def sweep(self, table: str, most: int) -> int:
        """See SweepStore."""
        return await self._db.to_the_end(self._sweep(table, most))

    async def _sweep(self, table: str, most: int) -> int:
        async with self._db.write() as connection:
            done = [await connection.execute(each, {"most": most}) for each in self._pieces[table]]
            return sum(each.rowcount for each in done)


def _piece(dialect: str, table: str, column: str, kept_s: float) -> TextClause:
    """Of those that are over the longest: their order makes it go by the index."""
    over = (
        f'SELECT {_ROW[dialect]} FROM "{table}"'  # noqa: S608 - constants
        f" WHERE {column} <= (SELECT {TIME[dialect]} - {kept_s}){_ALSO.get(table, '')}"
        f" ORDER BY {column} LIMIT :most"
    )
    return text(_PIECE[dialect].format(f'"{table}"', over))
