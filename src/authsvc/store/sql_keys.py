"""Signing keys in SQL."""

import json
from typing import Any

from sqlalchemy import Row, insert, select
from sqlalchemy.exc import IntegrityError

from authsvc.model import KeyState, SigningKey
from authsvc.store.port import KEYS_CHANGES
from authsvc.store.sql import Database, readable
from authsvc.store.sql_feed import advance
from authsvc.store.tables import SIGNING_KEY


class SqlKeys:
    """Signing keys."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def all(self) -> tuple[SigningKey, ...]:
        """See KeyStore."""
        async with self._db.read() as connection:
            rows = (await connection.execute(select(SIGNING_KEY))).all()
        return tuple(readable(rows, _key, "signing_key"))

    async def add_first(self, key: SigningKey) -> None:
        """See KeyStore."""
        await self._db.to_the_end(self._add_first(key))

    async def _add_first(self, key: SigningKey) -> None:
        try:
            async with self._db.write() as connection:
                await connection.execute(
                    insert(SIGNING_KEY).values(
                        kid=key.kid,
                        alg=key.alg,
                        state=key.state.value,
                        public_jwk=json.dumps(dict(key.public_jwk)),
                        sealed_private=key.sealed_private,
                        create_time=key.create_time,
                    )
                )
                await advance(self._db, connection, KEYS_CHANGES)
        except IntegrityError:
            return  # another worker was first; at most one key is current


def _key(row: Row[Any]) -> SigningKey:
    public_jwk = json.loads(row.public_jwk)
    if not isinstance(public_jwk, dict):
        raise TypeError("public_jwk")
    return SigningKey(
        kid=row.kid,
        alg=row.alg,
        state=KeyState(row.state),
        public_jwk=public_jwk,
        sealed_private=bytes(row.sealed_private),
        create_time=row.create_time,
    )
