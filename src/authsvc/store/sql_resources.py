"""Resources and their scopes in SQL."""

from typing import Any

from sqlalchemy import Row, insert, select
from sqlalchemy.exc import IntegrityError

from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog, Resource, TokenFormat
from authsvc.store.port import RESOURCE_CHANGES
from authsvc.store.sql import Database, readable
from authsvc.store.sql_feed import advance
from authsvc.store.tables import CLIENT, RESOURCE, SCOPE


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
        owner = resource.owner_client_id or None
        try:
            async with self._db.write() as connection:
                if owner is not None:
                    found = await connection.execute(
                        select(CLIENT.c.client_id).where(CLIENT.c.client_id == owner)
                    )
                    if found.one_or_none() is None:
                        raise AuthError(Reason.CLIENT_NOT_FOUND, "owner_client_id")
                await connection.execute(
                    insert(RESOURCE).values(
                        resource_id=resource.resource_id,
                        display_name=resource.display_name,
                        owner_client_id=owner,
                        token_format=int(resource.token_format),
                        token_lifetime_s=resource.token_lifetime_s,
                        staleness_max_s=resource.staleness_max_s,
                        version=resource.version,
                        create_time=resource.create_time,
                        update_time=resource.update_time,
                    )
                )
                if resource.scopes:
                    await connection.execute(
                        insert(SCOPE),
                        [
                            {
                                "name": name,
                                "resource_id": resource.resource_id,
                                "description": description,
                            }
                            for name, description in sorted(resource.scopes.items())
                        ],
                    )
                return await advance(self._db, connection, RESOURCE_CHANGES)
        except IntegrityError as error:
            raise AuthError(
                Reason.ALREADY_EXISTS,
                "resource id or scope",
                metadata={"field": "resource"},
                cause=repr(error),
            ) from error


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
        version=row.version,
    )
