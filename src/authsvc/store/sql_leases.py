"""Leases in SQL: one statement each, by the database's clock."""

from sqlalchemy import delete, text

from authsvc.store.sql import TIME, Database
from authsvc.store.tables import LEASE

# A lease that ends later than any could was taken before the clock went back.
_TAKE = (
    "INSERT INTO lease (name, holder, until) VALUES (:name, :holder, {now} + :seconds)"
    " ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until"
    " WHERE lease.holder = excluded.holder OR lease.until <= {now}"
    " OR lease.until > excluded.until + :seconds RETURNING name"
)


class SqlLeases:
    """Leases."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._take = text(_TAKE.format(now=TIME[database.dialect]))

    async def take(self, name: str, holder: str, seconds: float) -> bool:
        """See LeaseStore."""
        values = {"name": name, "holder": holder, "seconds": float(seconds)}
        return bool(await self._db.to_the_end(self._db.single(self._take, values)))

    async def give_back(self, holder: str) -> None:
        """See LeaseStore."""
        async with self._db.write() as connection:
            await connection.execute(delete(LEASE).where(LEASE.c.holder == holder))
