"""Grants and assertions in SQL. A refresh token is used by one statement."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from hashlib import sha256
from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    Double,
    Executable,
    LargeBinary,
    Row,
    String,
    Table,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from authsvc.acting import act
from authsvc.errors import AuthError, Reason
from authsvc.model import Grant, GrantType, Origin, Touched
from authsvc.store.port import Change, GrantFilter, Reused, Standing, Use, change
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record, record_all
from authsvc.store.sql_feed import advance_silently, lock_marks
from authsvc.store.tables import ASSERTION, FEED, GRANT
from authsvc_client.core.judge import cutoff_keys
from authsvc_client.core.markers import MarkerKind, marker_key

_CUTOFF_KEYS = {
    "sqlite": "json_each({0}.cutoff_keys) AS k",
    "postgresql": "jsonb_array_elements_text(CAST({0}.cutoff_keys AS jsonb)) AS k(value)",
}


def lives(database: Database, table: Table) -> ColumnElement[bool]:
    """Whether a row of `grant` or `session` has neither ended nor expired, nor been cut off."""
    return and_(*(~sign for sign in _signs_of_death(database, table).values()))


def _signs_of_death(database: Database, table: Table) -> dict[str, ColumnElement[bool]]:
    name = f'"{table.name}"'
    keys = _CUTOFF_KEYS[database.dialect].format(name)
    cut_off: ColumnElement[bool] = literal_column(
        f"EXISTS (SELECT 1 FROM {keys} JOIN cutoff ON cutoff.key = k.value"  # noqa: S608 - constant
        f" WHERE cutoff.revision > {name}.rev)"
    )
    return {
        "is_ended": table.c.end_time.is_not(None),
        "is_expired": table.c.expire_time <= database.time,
        "is_cut_off": cut_off,
    }


def _is_idle(database: Database) -> ColumnElement[bool]:
    return GRANT.c.idle_expire_time <= database.time


def alive(database: Database) -> ColumnElement[bool]:
    """Whether a row of `grant` can still be used, by the database's clock and its cutoffs."""
    return and_(lives(database, GRANT), ~_is_idle(database))


def _use_statement(database: Database, is_alive: ColumnElement[bool]) -> Executable:
    """Built once, as that took longer than to send it; parameters are the fields of Use."""
    grant = GRANT.c
    is_fresh = grant.generation == _parameter("generation", BigInteger)
    key_id = _parameter("key_id", String)
    is_repeated = and_(
        _parameter("may_repeat", Boolean),
        grant.generation - 1 == _parameter("generation", BigInteger),
        grant.previous_key_id == key_id,
    )
    return (
        update(GRANT)
        .where(
            grant.handle == _parameter("handle", LargeBinary),
            grant.client_id == _parameter("client_id", String),
            grant.sender == _parameter("sender", String),
            or_(and_(is_fresh, grant.key_id == key_id), is_repeated),
            is_alive,
        )
        .values(
            generation=case((is_fresh, grant.generation + 1), else_=grant.generation),
            previous_key_id=case((is_fresh, grant.key_id), else_=grant.previous_key_id),
            key_id=case((is_fresh, _parameter("next_key_id", String)), else_=grant.key_id),
            use_time=database.time,
            idle_expire_time=database.time + _parameter("idle_s", Double),
        )
        .returning(GRANT)
    )


def _parameter(name: str, kind: type[TypeEngine[Any]]) -> BindParameter[Any]:
    # Under its own name it would be taken for the column's new value.
    return bindparam(f"use_{name}", type_=kind())


GRANTS_OF_A_TOKEN_MAX = 100
END_REUSED_GRANT = "EndReusedGrant"
"""What the audit calls it: to refresh was refused, and this is what was done."""


class SqlGrants:
    """Grants."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._alive = alive(database)
        self._statement = _use_statement(database, self._alive)

    async def add(self, grant: Grant) -> bool:
        """See GrantStore."""
        return await self._db.to_the_end(self._add(grant))

    async def _add(self, grant: Grant) -> bool:
        dies_with = _dies_with(grant)
        async with self._db.write() as connection:
            if dies_with:
                await lock_marks(self._db, connection, shared=True)
                dead = FEED.c.key.in_([one.key for one in dies_with])
                found = await connection.execute(select(FEED.c.revision).where(dead).limit(1))
                if found.first() is not None:
                    return False
            if grant.origin.root_jti:
                await _require_room(connection, grant.origin.root_jti)
            await connection.execute(insert(GRANT).values(**grant_row(grant)))
            touched = Touched(grant.origin.subject, grant.client_id, grant.grant_id)
            await record(self._db, connection, touched)
        return True

    async def use(self, use: Use) -> Grant | Reused | None:
        """See GrantStore."""
        return await self._db.to_the_end(self._use(use))

    async def _use(self, use: Use) -> Grant | Reused | None:
        parameters = {f"use_{field.name}": getattr(use, field.name) for field in fields(use)}
        used = await self._db.single(self._statement, parameters)
        for found in readable(used, _grant, "grant"):
            return found
        return await self._refuse(use)

    async def _refuse(self, use: Use) -> Reused | None:
        """Why the statement found nothing: a living grant whose token is not the live one ends."""
        mine = select(GRANT).where(
            GRANT.c.handle == use.handle,
            GRANT.c.client_id == use.client_id,
            GRANT.c.sender == use.sender,
            self._alive,
        )
        async with self._db.write() as connection:
            # Whoever comes with a dead one again and again keeps nobody else waiting.
            if (await connection.execute(mine)).first() is None:
                return None
            await lock_marks(self._db, connection)
            row = (await connection.execute(mine.with_for_update())).first()
            if row is None:
                return None
            if _is_good(row, use):
                raise AuthError(Reason.STORE_UNAVAILABLE, cause="the grant cannot be read")
            dead = [change(MarkerKind.GRANT_DEAD, row.grant_id)]
            revision = await advance_silently(self._db, connection, dead)
            done = replace(act(), action=END_REUSED_GRANT)
            touched = Touched(row.subject, row.client_id, row.grant_id)
            await record_all(self._db, connection, [(done, touched)], revision=revision)
            return Reused(row.grant_id, revision)

    async def by_handle(self, handle: bytes) -> Grant | None:
        """See GrantStore."""
        return await self._living(GRANT.c.handle == handle)

    async def standing(self, handle: bytes, generation: int, key_id: str) -> Standing | None:
        """See GrantStore."""
        signs = {**_signs_of_death(self._db, GRANT), "is_idle": _is_idle(self._db)}
        query = select(GRANT, *(sign.label(name) for name, sign in signs.items()))
        async with self._db.read() as connection:
            rows = (await connection.execute(query.where(GRANT.c.handle == handle))).all()
        for grant in readable(rows, _grant, "grant"):
            row, sender = rows[0], grant.sender
            use = Use(
                handle, generation, key_id, grant.client_id, sender, bool(sender), key_id, 0.0
            )
            told = {name: bool(getattr(row, name)) for name in signs}
            return Standing(grant, row.end_time, **told, is_good=_is_good(row, use))
        return None

    async def living(self, grant_id: str) -> Grant | None:
        """See GrantStore."""
        return await self._living(GRANT.c.grant_id == grant_id)

    async def _living(self, wanted: ColumnElement[bool]) -> Grant | None:
        async with self._db.read() as connection:
            rows = await connection.execute(select(GRANT).where(wanted, self._alive))
            return next(readable(rows, _grant, "grant"), None)

    async def page(
        self, wanted: GrantFilter, after: tuple[float, str] | None, limit: int
    ) -> tuple[Grant, ...]:
        """See GrantStore."""
        place = (GRANT.c.create_time, GRANT.c.grant_id)
        query = select(GRANT).where(
            self._alive,
            *(
                GRANT.c[name] == value
                for name in ("subject", "client_id", "session_id")
                if (value := getattr(wanted, name))
            ),
        )
        query = query.order_by(*(column.desc() for column in place))
        page: list[Grant] = []
        async with self._db.read() as connection:
            while missing := limit - len(page):  # a row that cannot be read does not end the list
                more = query if after is None else query.where(tuple_(*place) < after)
                rows = (await connection.execute(more.limit(missing))).all()
                page += readable(rows, _grant, "grant")
                if len(rows) < missing:
                    break
                after = (rows[-1].create_time, rows[-1].grant_id)
        return tuple(page)


class SqlAssertions:
    """Assertions."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._insert = sqlite_insert if database.dialect == "sqlite" else postgres_insert

    async def use(self, client_id: str, jti: str, expires: float) -> bool:
        """See AssertionStore."""
        row = {"digest": _assertion_digest(client_id, jti), "expire_time": expires}
        statement = (
            self._insert(ASSERTION)
            .values(**row)
            .on_conflict_do_nothing()
            .returning(ASSERTION.c.expire_time)
        )
        return bool(await self._db.to_the_end(self._db.single(statement)))


async def _require_room(connection: AsyncConnection, root_jti: str) -> None:
    """Whoever revokes a token ends all grants from it at once: there are not endlessly many."""
    living = select(GRANT.c.grant_id).where(
        GRANT.c.root_jti == root_jti, GRANT.c.end_time.is_(None)
    )
    counted = select(func.count()).select_from(living.limit(GRANTS_OF_A_TOKEN_MAX).subquery())
    if (await connection.execute(counted)).scalar_one() >= GRANTS_OF_A_TOKEN_MAX:
        raise AuthError(
            Reason.RATE_LIMITED,
            "too many grants come from the subject token",
            metadata={"limit": str(GRANTS_OF_A_TOKEN_MAX)},
        )


def _is_good(row: Row[Any], use: Use) -> bool:
    if (row.generation, row.key_id) == (use.generation, use.key_id):
        return True
    repeated = (row.generation - 1, row.previous_key_id) == (use.generation, use.key_id)
    return use.may_repeat and repeated


def _dies_with(grant: Grant) -> list[Change]:
    """What kills the grant beside itself."""
    origin = grant.origin
    ids = {
        MarkerKind.TOKEN_DEAD: origin.root_jti,
        MarkerKind.GRANT_DEAD: origin.grant_id,
        MarkerKind.SESSION_DEAD: origin.session_id,
    }
    return [change(kind, dies_with) for kind, dies_with in ids.items() if dies_with]


def _assertion_digest(client_id: str, jti: str) -> bytes:
    length = len(client_id.encode()).to_bytes(4, "big")
    return sha256(length + client_id.encode() + jti.encode()).digest()


def grant_row(grant: Grant) -> dict[str, Any]:
    """A grant as it is stored."""
    origin = grant.origin
    cutoffs = (
        marker_key(MarkerKind.CUTOFF_EVERYTHING),
        *cutoff_keys(grant.client_id, origin.subject, origin.actors, grant.audiences),
        *(marker_key(MarkerKind.KEY_TAINTED, kid) for kid in origin.key_ids),
    )
    return {
        "grant_id": grant.grant_id,
        "handle": grant.handle,
        "generation": grant.generation,
        "key_id": grant.key_id,
        "previous_key_id": "",
        "sender": grant.sender,
        "client_id": grant.client_id,
        "subject": origin.subject,
        "session_id": origin.session_id,
        "address": grant.address,
        "parent_id": origin.grant_id,
        "root_jti": origin.root_jti,
        "details": json.dumps(_details(grant)),
        "rev": grant.rev,
        "cutoff_keys": json.dumps([key.hex() for key in cutoffs]),
        "create_time": grant.create_time,
        "use_time": grant.use_time,
        "idle_expire_time": grant.idle_expire_time,
        "expire_time": grant.expire_time,
        "end_time": None,
    }


def _details(grant: Grant) -> dict[str, Any]:
    origin = grant.origin
    return {
        "grant_type": int(grant.grant_type),
        "scopes": sorted(grant.scopes),
        "audiences": list(grant.audiences),
        "actors": list(origin.actors),
        "key_ids": list(origin.key_ids),
        "auth_time": origin.auth_time,
        "acr": origin.acr,
        "amr": list(origin.amr),
    }


def _grant(row: Row[Any]) -> Grant:
    details: Mapping[str, Any] = json.loads(row.details)
    return Grant(
        grant_id=row.grant_id,
        client_id=row.client_id,
        origin=Origin(
            subject=row.subject,
            actors=tuple(details["actors"]),
            grant_id=row.parent_id,
            session_id=row.session_id,
            root_jti=row.root_jti,
            key_ids=tuple(details["key_ids"]),
            auth_time=details["auth_time"],
            acr=details["acr"],
            amr=tuple(details["amr"]),
        ),
        grant_type=GrantType(details["grant_type"]),
        scopes=frozenset(details["scopes"]),
        audiences=tuple(details["audiences"]),
        sender=row.sender,
        rev=row.rev,
        handle=bytes(row.handle),
        key_id=row.key_id,
        create_time=row.create_time,
        idle_expire_time=row.idle_expire_time,
        expire_time=row.expire_time,
        generation=row.generation,
        use_time=row.use_time,
        address=row.address,
    )
