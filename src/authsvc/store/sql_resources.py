"""Resources and their scopes in SQL."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog, Resource, TokenFormat, Touched
from authsvc.store.port import RESOURCE_CHANGES, Change, change
from authsvc.store.sql import Database, readable
from authsvc.store.sql_feed import advance
from authsvc.store.sql_roles import forget_resource
from authsvc.store.tables import CLIENT, RESOURCE, SCOPE
from authsvc_client.core.markers import MarkerKind


class SqlResources:
    """Resources."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def catalog(self) -> Catalog:
        """See ResourceStore."""
        joined = RESOURCE.outerjoin(SCOPE, SCOPE.c.resource_id == RESOURCE.c.resource_id)
        query = (
            select(RESOURCE, SCOPE.c.name, SCOPE.c.description)
            .select_from(joined)
            .order_by(RESOURCE.c.resource_id, SCOPE.c.name)
        )
        rows: dict[str, Row[Any]] = {}
        scopes: dict[str, dict[str, str]] = {}
        async with self._db.read() as connection:
            for row in await connection.execute(query):
                rows[row.resource_id] = row
                found = scopes.setdefault(row.resource_id, {})
                if row.name is not None:
                    found[row.name] = row.description
        decoded = readable(
            rows.values(), lambda row: _resource(row, scopes[row.resource_id]), "resource"
        )
        return Catalog(tuple(decoded))

    async def add(self, resource: Resource) -> int:
        """See ResourceStore."""
        return await self._db.to_the_end(self._add(resource))

    async def _add(self, resource: Resource) -> int:
        try:
            async with self._db.write() as connection:
                await _require_client(connection, resource.owner_client_id)
                await connection.execute(insert(RESOURCE).values(**_row(resource)))
                await _define(connection, resource)
                return await _changed(self._db, connection, resource.resource_id)
        except IntegrityError as error:
            raise _taken(error) from error

    async def update(
        self, resource_id: str, version: int | None, edit: Callable[[Resource], Resource]
    ) -> tuple[Resource, int]:
        """See ResourceStore."""
        return await self._db.to_the_end(self._update(resource_id, version, edit))

    async def _update(
        self, resource_id: str, version: int | None, edit: Callable[[Resource], Resource]
    ) -> tuple[Resource, int]:
        try:
            async with self._db.write() as connection:
                known = await _locked(connection, resource_id, version)
                resource = replace(edit(known), version=known.version + 1)
                if resource.owner_client_id != known.owner_client_id:
                    await _require_client(connection, resource.owner_client_id)
                await connection.execute(
                    update(RESOURCE)
                    .where(RESOURCE.c.resource_id == resource_id)
                    .values(**_row(resource))
                )
                if resource.scopes != known.scopes:
                    await connection.execute(
                        delete(SCOPE).where(SCOPE.c.resource_id == resource_id)
                    )
                    await _define(connection, resource)
                return resource, await _changed(self._db, connection, resource_id)
        except IntegrityError as error:
            raise _taken(error) from error

    async def delete(self, resource_id: str, version: int | None) -> int:
        """See ResourceStore."""
        return await self._db.to_the_end(self._delete(resource_id, version))

    async def _delete(self, resource_id: str, version: int | None) -> int:
        async with self._db.write() as connection:
            await _locked(connection, resource_id, version)
            await connection.execute(delete(SCOPE).where(SCOPE.c.resource_id == resource_id))
            roles = await forget_resource(self._db, connection, resource_id)
            await connection.execute(delete(RESOURCE).where(RESOURCE.c.resource_id == resource_id))
            cutoff = change(MarkerKind.CUTOFF_RESOURCE, resource_id)
            return await _changed(self._db, connection, resource_id, cutoff, *roles)


async def _changed(
    database: Database, connection: AsyncConnection, resource_id: str, *more: Change
) -> int:
    touched = Touched(object_id=resource_id)
    return await advance(database, connection, [*RESOURCE_CHANGES, *more], touched)


async def _locked(connection: AsyncConnection, resource_id: str, version: int | None) -> Resource:
    """The resource as it is now and stays until the transaction ends."""
    mine = select(RESOURCE).where(RESOURCE.c.resource_id == resource_id).with_for_update()
    row = (await connection.execute(mine)).first()
    if row is None:
        raise AuthError(Reason.RESOURCE_NOT_FOUND)
    if version not in (None, row.version):
        raise AuthError(Reason.ETAG_MISMATCH)
    scopes = await connection.execute(
        select(SCOPE.c.name, SCOPE.c.description).where(SCOPE.c.resource_id == resource_id)
    )
    return _resource(row, {scope.name: scope.description for scope in scopes})


async def _require_client(connection: AsyncConnection, client_id: str) -> None:
    if client_id:
        wanted = select(CLIENT.c.client_id).where(CLIENT.c.client_id == client_id)
        if (await connection.execute(wanted)).first() is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND, "owner_client_id")


async def _define(connection: AsyncConnection, resource: Resource) -> None:
    """Adds its scopes."""
    rows = [
        {"name": name, "resource_id": resource.resource_id, "description": description}
        for name, description in sorted(resource.scopes.items())
    ]
    if rows:
        await connection.execute(insert(SCOPE), rows)


def _taken(error: IntegrityError) -> AuthError:
    return AuthError(
        Reason.ALREADY_EXISTS,
        "resource id or scope",
        metadata={"field": "resource"},
        cause=repr(error),
    )


def _row(resource: Resource) -> dict[str, Any]:
    return {
        "resource_id": resource.resource_id,
        "display_name": resource.display_name,
        "owner_client_id": resource.owner_client_id or None,
        "token_format": int(resource.token_format),
        "token_lifetime_s": resource.token_lifetime_s,
        "staleness_max_s": resource.staleness_max_s,
        "encryption_jwk": resource.encryption_jwk,
        "freeze_permissions": resource.freeze_permissions,
        "version": resource.version,
        "create_time": resource.create_time,
        "update_time": resource.update_time,
    }


def _resource(row: Row[Any], scopes: dict[str, str]) -> Resource:
    return Resource(
        resource_id=row.resource_id,
        scopes=scopes,
        create_time=row.create_time,
        update_time=row.update_time,
        display_name=row.display_name,
        owner_client_id=row.owner_client_id or "",
        token_format=TokenFormat(row.token_format),
        token_lifetime_s=row.token_lifetime_s,
        staleness_max_s=row.staleness_max_s,
        encryption_jwk=row.encryption_jwk,
        freeze_permissions=row.freeze_permissions,
        version=row.version,
    )
