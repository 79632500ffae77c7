"""Access tokens and API keys that are found by their digest, in SQL."""

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Row, func, insert, literal_column, select

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.model import ApiKey, Touched
from authsvc.store.port import StoredToken, change
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record
from authsvc.store.sql_feed import advance
from authsvc.store.tables import ACCESS_TOKEN, API_KEY, CLIENT, CUTOFF
from authsvc_client.core.claims import parse_claims
from authsvc_client.core.judge import Verified
from authsvc_client.core.markers import MarkerKind, marker_key

_EVERYTHING = marker_key(MarkerKind.CUTOFF_EVERYTHING)
_JSON = "CAST(access_token.claims AS jsonb)"
_KEYS_AND_REV = {
    "sqlite": (
        "json_each(access_token.claims, '$.cutoff_keys') AS k",
        "json_extract(access_token.claims, '$.claims.rev')",
    ),
    "postgresql": (
        f"jsonb_array_elements_text({_JSON} -> 'cutoff_keys') AS k(value)",
        f"CAST({_JSON} -> 'claims' ->> 'rev' AS bigint)",
    ),
}


class SqlTokens:
    """Access tokens."""

    def __init__(self, database: Database) -> None:
        self._db = database
        keys, rev = _KEYS_AND_REV[database.dialect]
        cut_off: ColumnElement[bool] = literal_column(
            f"EXISTS (SELECT 1 FROM {keys} JOIN cutoff ON cutoff.key = k.value"  # noqa: S608 - constant
            f" WHERE cutoff.revision > {rev})"
        )
        self._found = select(ACCESS_TOKEN, cut_off.label("cut_off"))

    async def add(self, token: StoredToken) -> None:
        """See TokenStore."""
        cutoffs = (_EVERYTHING, *Verified(None, parse_claims(token.claims)).cutoffs)
        details = {"claims": dict(token.claims), "cutoff_keys": [key.hex() for key in cutoffs]}
        row = {
            "digest": token.digest,
            "kid": token.kid,
            "claims": json.dumps(details),
            "expire_time": token.expire_time,
        }
        added = insert(ACCESS_TOKEN).values(**row).returning(ACCESS_TOKEN.c.kid)
        await self._db.to_the_end(self._db.single(added))

    async def find(self, digest: bytes) -> StoredToken | None:
        """See TokenStore."""
        async with self._db.read() as connection:
            rows = await connection.execute(self._found.where(ACCESS_TOKEN.c.digest == digest))
            return next(readable(rows, _token, "access_token"), None)


def _token(row: Row[Any]) -> StoredToken:
    claims = json.loads(row.claims)["claims"]
    return StoredToken(bytes(row.digest), row.kid, claims, row.expire_time, bool(row.cut_off))


class SqlApiKeys:
    """API keys."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def add(self, key: ApiKey, most: int) -> None:
        """See ApiKeyStore."""
        await self._db.to_the_end(self._add(key, most))

    async def _add(self, key: ApiKey, most: int) -> None:
        mine = API_KEY.c.client_id == key.client_id
        async with self._db.write() as connection:
            owner = select(CLIENT.c.client_id).where(CLIENT.c.client_id == key.client_id)
            if (await connection.execute(owner.with_for_update())).first() is None:
                raise AuthError(Reason.CLIENT_NOT_FOUND)
            count = await connection.execute(select(func.count()).select_from(API_KEY).where(mine))
            if count.scalar_one() >= most:
                wrong = FieldViolation("api_key", f"is one too many: a client has at most {most}")
                raise AuthError(
                    Reason.FIELD_INVALID, f"{wrong.field} {wrong.text}", violations=(wrong,)
                )
            await connection.execute(
                insert(API_KEY).values(
                    api_key_id=key.api_key_id,
                    digest=key.digest,
                    client_id=key.client_id,
                    display_name=key.display_name,
                    scopes=json.dumps(sorted(key.scopes)),
                    rev=key.rev,
                    create_time=key.create_time,
                    expire_time=key.expire_time,
                )
            )
            touched = Touched(client_id=key.client_id, object_id=key.api_key_id)
            await record(self._db, connection, touched)

    async def page(self, client_id: str, after: str, limit: int) -> tuple[ApiKey, ...]:
        """See ApiKeyStore."""
        query = (
            select(API_KEY)
            .where(API_KEY.c.client_id == client_id, API_KEY.c.api_key_id > after)
            .order_by(API_KEY.c.api_key_id)
            .limit(limit)
        )
        async with self._db.read() as connection:
            rows = (await connection.execute(query)).all()
        return tuple(readable(rows, _api_key, "api_key"))

    async def get(self, api_key_id: str) -> ApiKey | None:
        """See ApiKeyStore."""
        return await self._one(API_KEY.c.api_key_id == api_key_id)

    async def find(self, digest: bytes) -> ApiKey | None:
        """See ApiKeyStore."""
        return await self._one(API_KEY.c.digest == digest)

    async def _one(self, wanted: Any) -> ApiKey | None:
        async with self._db.read() as connection:
            rows = (await connection.execute(select(API_KEY).where(wanted))).all()
        return next(readable(rows, _api_key, "api_key"), None)

    async def cutoff(self, keys: Collection[bytes]) -> int:
        """See ApiKeyStore."""
        wanted = CUTOFF.c.key.in_([key.hex() for key in (_EVERYTHING, *keys)])
        async with self._db.read() as connection:
            found = await connection.execute(select(func.max(CUTOFF.c.revision)).where(wanted))
            return int(found.scalar() or 0)

    async def delete(self, api_key_id: str) -> int:
        """See ApiKeyStore."""
        return await self._db.to_the_end(self._delete(api_key_id))

    async def _delete(self, api_key_id: str) -> int:
        wanted = select(API_KEY.c.client_id).where(API_KEY.c.api_key_id == api_key_id)
        async with self._db.write() as connection:
            owner = (await connection.execute(wanted)).scalar()
            if owner is None:
                raise AuthError(Reason.API_KEY_NOT_FOUND)
            dead = [change(MarkerKind.TOKEN_DEAD, api_key_id)]
            touched = Touched(client_id=owner, object_id=api_key_id)
            return await advance(self._db, connection, dead, touched)


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        api_key_id=row.api_key_id,
        client_id=row.client_id,
        display_name=row.display_name,
        scopes=frozenset(json.loads(row.scopes)),
        rev=row.rev,
        create_time=row.create_time,
        expire_time=row.expire_time,
        digest=bytes(row.digest),
    )
