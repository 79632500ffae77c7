"""Clients in SQL."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    AuthMethod,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
)
from authsvc.store.port import Transition, name_taken, require_step, review_changes
from authsvc.store.sql import Database, readable
from authsvc.store.sql_feed import advance
from authsvc.store.tables import CLIENT


class SqlClients:
    """Clients."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def get(self, client_id: str) -> Client | None:
        """See ClientStore."""
        async with self._db.read() as connection:
            found = await connection.execute(select(CLIENT).where(CLIENT.c.client_id == client_id))
            return next(_clients(found), None)

    async def by_identity(self, names: Collection[tuple[IdentityKind, str]]) -> tuple[Client, ...]:
        """See ClientStore."""
        if not names:
            return ()
        wanted = or_(
            *(
                and_(CLIENT.c.identity_kind == kind.value, CLIENT.c.identity_value == value)
                for kind, value in sorted(names)
            )
        )
        async with self._db.read() as connection:
            found = await connection.execute(
                select(CLIENT).where(wanted, CLIENT.c.state != ClientState.REJECTED)
            )
            return tuple(_clients(found))

    async def page(self, state: ClientState | None, after: str, limit: int) -> tuple[Client, ...]:
        """See ClientStore."""
        query = select(CLIENT).order_by(CLIENT.c.client_id)
        if state is not None:
            query = query.where(CLIENT.c.state == state)
        page: list[Client] = []
        async with self._db.read() as connection:
            while wanted := limit - len(page):  # a row that cannot be read does not end the list
                more = query.where(CLIENT.c.client_id > after).limit(wanted)
                rows = (await connection.execute(more)).all()
                page += _clients(rows)
                if len(rows) < wanted:
                    break
                after = rows[-1].client_id
        return tuple(page)

    async def add(self, client: Client) -> None:
        """See ClientStore."""
        await self._db.to_the_end(self._add(client))

    async def _add(self, client: Client) -> None:
        try:
            async with self._db.write() as connection:
                await connection.execute(insert(CLIENT).values(**_row(client)))
        except IntegrityError as error:
            raise name_taken(repr(error)) from error

    async def move(self, step: Transition) -> tuple[Client, int]:
        """See ClientStore."""
        return await self._db.to_the_end(self._move(step))

    async def _move(self, step: Transition) -> tuple[Client, int]:
        mine = CLIENT.c.client_id == step.client_id
        try:
            async with self._db.write() as connection:
                return await self._moved(connection, step, mine)
        except IntegrityError as error:  # a rejected client's certificate name was given away
            raise name_taken(repr(error)) from error

    async def _moved(
        self, connection: AsyncConnection, step: Transition, mine: ColumnElement[bool]
    ) -> tuple[Client, int]:
        found = await connection.execute(select(CLIENT).where(mine).with_for_update())
        client = next(_clients(found), None)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        require_step(step, client.state, client.version)
        revision = await advance(self._db, connection, review_changes(step))
        changed: dict[str, Any] = {"cutoff": revision} if step.cut_off else {}
        if step.to is ClientState.APPROVED and not step.keep_expiry:
            changed["approval_expire_time"] = step.approval_expire_time
        moved = await connection.execute(
            update(CLIENT)
            .where(mine)
            .values(
                state=int(step.to),
                version=CLIENT.c.version + 1,
                reviewer=step.reviewer,
                review_comment=step.comment,
                review_time=self._db.time,
                update_time=self._db.time,
                **changed,
            )
            .returning(CLIENT)
        )
        return _client(moved.one()), revision


def _row(client: Client) -> dict[str, Any]:
    identity = client.metadata.identity
    return {
        "client_id": client.client_id,
        "state": int(client.state),
        "details": json.dumps(_details(client.metadata)),
        "identity_kind": identity.kind.value if identity else None,
        "identity_value": identity.value if identity else None,
        "identity_ca": identity.ca if identity else None,
        "secret_digest": client.secret_digest,
        "cutoff": client.cutoff,
        "version": client.version,
        "registrant": client.registrant,
        "reviewer": client.reviewer,
        "review_comment": client.review_comment,
        "review_time": client.review_time,
        "approval_expire_time": client.approval_expire_time,
        "create_time": client.create_time,
        "update_time": client.update_time,
    }


def _details(metadata: ClientMetadata) -> dict[str, Any]:
    return {
        "client_name": metadata.client_name,
        "grant_types": sorted(metadata.grant_types),
        "auth_methods": sorted(metadata.auth_methods),
        "scopes": sorted(metadata.scopes),
        "bound_access_tokens": metadata.bound_access_tokens,
        "validates": sorted(metadata.validates),
        "texts": dict(metadata.texts),
        "contacts": list(metadata.contacts),
    }


def _clients(rows: Iterable[Row[Any]]) -> Iterator[Client]:
    return readable(rows, _client, "client")


def _client(row: Row[Any]) -> Client:
    details: Mapping[str, Any] = json.loads(row.details)
    identity = None
    if row.identity_value is not None:
        identity = CertificateIdentity(
            IdentityKind(row.identity_kind), row.identity_value, row.identity_ca
        )
    return Client(
        client_id=row.client_id,
        metadata=ClientMetadata(
            client_name=details["client_name"],
            grant_types=frozenset(map(GrantType, details["grant_types"])),
            auth_methods=frozenset(map(AuthMethod, details["auth_methods"])),
            scopes=frozenset(details["scopes"]),
            identity=identity,
            bound_access_tokens=bool(details["bound_access_tokens"]),
            validates=frozenset(details["validates"]),
            texts=details["texts"],
            contacts=tuple(details["contacts"]),
        ),
        state=ClientState(row.state),
        create_time=row.create_time,
        update_time=row.update_time,
        registrant=row.registrant,
        version=row.version,
        reviewer=row.reviewer,
        review_comment=row.review_comment,
        review_time=row.review_time,
        approval_expire_time=row.approval_expire_time,
        secret_digest=bytes(row.secret_digest) if row.secret_digest is not None else None,
        cutoff=row.cutoff,
    )
