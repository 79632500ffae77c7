"""Sessions in SQL."""

import json
from typing import Any

from sqlalchemy import Row, insert, select, tuple_

from authsvc.model import Grant, Session, Touched, UserState
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record
from authsvc.store.sql_grants import grant_row, lives
from authsvc.store.tables import GRANT, SESSION, USER
from authsvc_client.core.markers import MarkerKind, marker_key


class SqlSessions:
    """Sessions."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._lives = lives(database, SESSION)

    async def open(self, session: Session, grant: Grant, password_version: int) -> bool:
        """See SessionStore."""
        return await self._db.to_the_end(self._open(session, grant, password_version))

    async def _open(self, session: Session, grant: Grant, password_version: int) -> bool:
        mine = select(USER.c.user_id).where(
            USER.c.user_id == session.user_id,
            USER.c.state == int(UserState.ACTIVE),
            USER.c.password_version == password_version,
        )
        async with self._db.write() as connection:
            # Whoever sets the password holds the row: it ends this session, or refuses it here.
            if (await connection.execute(mine.with_for_update(read=True))).first() is None:
                return False
            await connection.execute(insert(SESSION).values(**_row(session)))
            await connection.execute(insert(GRANT).values(**grant_row(grant)))
            touched = Touched(session.user_id, grant.client_id, session.session_id)
            await record(self._db, connection, touched)
            return True

    async def living(self, session_id: str) -> Session | None:
        """See SessionStore."""
        query = select(SESSION).where(SESSION.c.session_id == session_id, self._lives)
        async with self._db.read() as connection:
            return next(readable(await connection.execute(query), _session, "session"), None)

    async def page(
        self, user_id: str, after: tuple[float, str] | None, limit: int
    ) -> tuple[Session, ...]:
        """See SessionStore."""
        place = (SESSION.c.create_time, SESSION.c.session_id)
        query = select(SESSION).where(self._lives).order_by(*(column.desc() for column in place))
        if user_id:
            query = query.where(SESSION.c.user_id == user_id)
        page: list[Session] = []
        async with self._db.read() as connection:
            while missing := limit - len(page):  # a row that cannot be read does not end the list
                more = query if after is None else query.where(tuple_(*place) < after)
                rows = (await connection.execute(more.limit(missing))).all()
                page += readable(rows, _session, "session")
                if len(rows) < missing:
                    break
                after = (rows[-1].create_time, rows[-1].session_id)
        return tuple(page)


def _row(session: Session) -> dict[str, Any]:
    keys = (
        marker_key(MarkerKind.CUTOFF_EVERYTHING),
        marker_key(MarkerKind.CUTOFF_SUBJECT, session.user_id),
    )
    return {
        "session_id": session.session_id,
        "user_id": session.user_id,
        "rev": session.rev,
        "cutoff_keys": json.dumps([key.hex() for key in keys]),
        "address": session.address,
        "acr": session.acr,
        "amr": json.dumps(session.amr),
        "create_time": session.create_time,
        "auth_time": session.auth_time,
        "expire_time": session.expire_time,
        "end_time": None,
    }


def _session(row: Row[Any]) -> Session:
    return Session(
        session_id=row.session_id,
        user_id=row.user_id,
        rev=row.rev,
        address=row.address,
        create_time=row.create_time,
        auth_time=row.auth_time,
        expire_time=row.expire_time,
        acr=row.acr,
        amr=tuple(json.loads(row.amr)),
    )
