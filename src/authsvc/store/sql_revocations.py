"""What markers kill, counted in SQL."""

from typing import Any

from sqlalchemy import ColumnElement, exists, func, literal, or_, select, text, true

from authsvc.store.port import IMPACT_MAX, Change, Impact, change
from authsvc.store.sql import Database
from authsvc.store.sql_feed import DIE_WITH, MARKS, marked_ids
from authsvc.store.sql_grants import alive, lives
from authsvc.store.tables import API_KEY, CUTOFF, FEED, GRANT, SESSION
from authsvc_client.core.judge import cutoff_keys
from authsvc_client.core.markers import CUTOFF_KINDS, MarkerKind, marker_key

PIECE = 1000
_EVERYTHING = marker_key(MarkerKind.CUTOFF_EVERYTHING)


class SqlRevocations:
    """Counts."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._alive = alive(database)
        self._dying = text(f'SELECT grant_id FROM "grant" WHERE {DIE_WITH[database.dialect]}')  # noqa: S608

    async def impact(self, marker: Change) -> Impact:
        """See RevocationStore."""
        return Impact(
            sessions=await self._sessions(marker),
            grants=await self._grants(marker),
            api_keys=await self._api_keys(marker),
        )

    async def is_dead(self, mark: Change) -> bool:
        """See RevocationStore."""
        marked = exists().where(FEED.c.key == mark.key)
        named = GRANT.c.grant_id if mark.kind is MarkerKind.GRANT_DEAD else SESSION.c.session_id
        ended = exists().where(named == mark.ids[0], named.table.c.end_time.is_not(None))
        async with self._db.read() as connection:
            found = await connection.execute(select(or_(marked, ended)))
            return bool(found.scalar_one())

    async def _sessions(self, marker: Change) -> int:
        wanted: dict[MarkerKind, ColumnElement[bool]] = {MarkerKind.CUTOFF_EVERYTHING: true()}
        if marker.kind is MarkerKind.SESSION_DEAD:
            wanted[marker.kind] = SESSION.c.session_id == marker.ids[0]
        elif marker.kind is MarkerKind.CUTOFF_SUBJECT:
            wanted[marker.kind] = SESSION.c.user_id == marker.ids[0]
        if marker.kind not in wanted:
            return 0
        living = lives(self._db, SESSION)
        counted = select(literal(1)).select_from(SESSION).where(wanted[marker.kind], living)
        query = select(func.count()).select_from(counted.limit(IMPACT_MAX).subquery())
        async with self._db.read() as connection:
            return int((await connection.execute(query)).scalar_one())

    async def _grants(self, marker: Change) -> int:
        parameters: dict[str, Any] = {}
        if marker.kind in MARKS:
            family = await self._family(marker)
            parameters = marked_ids(self._db, [change(MarkerKind.GRANT_DEAD, g) for g in family])
            wanted: Any = text(DIE_WITH[self._db.dialect])
        elif marker.kind is MarkerKind.CUTOFF_EVERYTHING:
            wanted = true()
        else:
            wanted = GRANT.c.cutoff_keys.contains(marker.key.hex())
        counted = select(literal(1)).select_from(GRANT).where(wanted, self._alive)
        query = select(func.count()).select_from(counted.limit(IMPACT_MAX).subquery())
        async with self._db.read() as connection:
            return int((await connection.execute(query, parameters)).scalar_one())

    async def _family(self, mark: Change) -> set[str]:
        """The grants that end with what is marked dead, and those exchanged from them."""
        family: set[str] = set()
        marked = [mark]
        while marked:
            async with self._db.read() as connection:
                found = await connection.execute(self._dying, marked_ids(self._db, marked))
                added = set(found.scalars()) - family
            family |= added
            marked = [change(MarkerKind.GRANT_DEAD, grant_id) for grant_id in added]
        return family

    async def _api_keys(self, marker: Change) -> int:
        """A key is of one client, which is its subject too."""
        owners = set(marker.ids)
        if marker.kind not in CUTOFF_KINDS or len(owners) > 1:
            return 0
        count, after = 0, ""
        now = select(self._db.time).scalar_subquery()
        query = (
            select(API_KEY.c.api_key_id, API_KEY.c.client_id, API_KEY.c.rev)
            .where(or_(API_KEY.c.expire_time.is_(None), API_KEY.c.expire_time > now))
            .where(API_KEY.c.client_id.in_(owners) if owners else true())
            .order_by(API_KEY.c.api_key_id)
            .limit(PIECE)
        )
        while count < IMPACT_MAX:
            async with self._db.read() as connection:
                rows = (await connection.execute(query.where(API_KEY.c.api_key_id > after))).all()
            if not rows:
                break
            cutoffs = await self._cutoffs({row.client_id for row in rows})
            count += sum(row.rev >= cutoffs[row.client_id] for row in rows)
            after = rows[-1].api_key_id
        return min(count, IMPACT_MAX)

    async def _cutoffs(self, clients: set[str]) -> dict[str, int]:
        """The highest durable cutoff of each client's own credentials."""
        keys = {
            client: [key.hex() for key in (_EVERYTHING, *cutoff_keys(client, client))]
            for client in clients
        }
        wanted = {key for its in keys.values() for key in its}
        async with self._db.read() as connection:
            found = await connection.execute(select(CUTOFF).where(CUTOFF.c.key.in_(wanted)))
            known = {row.key: row.revision for row in found}
        return {client: max(known.get(key, 0) for key in its) for client, its in keys.items()}
