"""Initial access tokens in SQL."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, exists, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import InitialAccessToken, Touched
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record
from authsvc.store.tables import CUTOFF
from authsvc.store.tables import INITIAL_ACCESS_TOKEN as TOKEN
from authsvc_client.core.markers import MarkerKind, marker_key

_EVERYTHING = marker_key(MarkerKind.CUTOFF_EVERYTHING).hex()


class SqlInitialAccessTokens:
    """Initial access tokens."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def add(self, token: InitialAccessToken) -> None:
        """See InitialAccessTokenStore."""
        await self._db.to_the_end(self._add(token))

    async def _add(self, token: InitialAccessToken) -> None:
        async with self._db.write() as connection:
            await connection.execute(
                insert(TOKEN).values(
                    initial_access_token_id=token.initial_access_token_id,
                    digest=token.digest,
                    display_name=token.display_name,
                    uses_left=token.uses_left,
                    rev=token.rev,
                    create_time=token.create_time,
                    expire_time=token.expire_time,
                )
            )
            touched = Touched(object_id=token.initial_access_token_id)
            await record(self._db, connection, touched)

    async def find(self, digest: bytes) -> InitialAccessToken | None:
        """See InitialAccessTokenStore."""
        async with self._db.read() as connection:
            found = await connection.execute(select(TOKEN).where(_alive(self._db, digest)))
            return next(iter(_tokens(found)), None)

    async def page(self, after: str, limit: int) -> tuple[InitialAccessToken, ...]:
        """See InitialAccessTokenStore."""
        key = TOKEN.c.initial_access_token_id
        async with self._db.read() as connection:
            found = await connection.execute(
                select(TOKEN).where(key > after).order_by(key).limit(limit)
            )
            return _tokens(found)

    async def delete(self, initial_access_token_id: str) -> bool:
        """See InitialAccessTokenStore."""
        return await self._db.to_the_end(self._delete(initial_access_token_id))

    async def _delete(self, initial_access_token_id: str) -> bool:
        key = TOKEN.c.initial_access_token_id
        statement = delete(TOKEN).where(key == initial_access_token_id).returning(key)
        async with self._db.write() as connection:
            if (await connection.execute(statement)).first() is None:
                return False
            await record(self._db, connection, Touched(object_id=initial_access_token_id))
            return True


async def take_use(database: Database, connection: AsyncConnection, digest: bytes) -> None:
    """Takes one use within a transaction; AuthError REGISTRATION_TOKEN_INVALID."""
    taken = await connection.execute(
        update(TOKEN)
        .where(_alive(database, digest), TOKEN.c.uses_left > 0)
        .values(uses_left=TOKEN.c.uses_left - 1)
        .returning(TOKEN.c.uses_left)
    )
    if taken.first() is None:
        raise AuthError(Reason.REGISTRATION_TOKEN_INVALID)


def _alive(database: Database, digest: bytes) -> ColumnElement[bool]:
    cut_off = exists().where(CUTOFF.c.key == _EVERYTHING, CUTOFF.c.revision > TOKEN.c.rev)
    return and_(
        TOKEN.c.digest == digest,
        TOKEN.c.expire_time > database.time,
        ~cut_off,
    )


def _tokens(rows: Iterable[Row[Any]]) -> tuple[InitialAccessToken, ...]:
    return tuple(readable(rows, _token, "initial_access_token"))


def _token(row: Row[Any]) -> InitialAccessToken:
    return InitialAccessToken(
        initial_access_token_id=row.initial_access_token_id,
        display_name=row.display_name,
        uses_left=row.uses_left,
        rev=row.rev,
        create_time=row.create_time,
        expire_time=row.expire_time,
    )
