"""Permissions, roles and who holds them, in SQL.

Locks are taken in one order: holder, resource, permissions, roles, assignments, the head.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Row,
    Select,
    Table,
    and_,
    delete,
    insert,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import HolderKind, Permission, PermissionRef, Role, RoleAssignment, Touched
from authsvc.store.port import AssignmentFilter, Change, Holding, change
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record
from authsvc.store.sql_feed import advance
from authsvc.store.tables import (
    CLIENT,
    FEED_HEAD,
    PERMISSION,
    RESOURCE,
    ROLE,
    ROLE_ASSIGNMENT,
    ROLE_PERMISSION,
    USER,
)
from authsvc_client.core.markers import MarkerKind

PIECE = 2000
"""Assignments that go in one transaction, of some milliseconds."""
_HOLDERS = {
    HolderKind.USER: (USER.c.user_id, Reason.USER_NOT_FOUND),
    HolderKind.CLIENT: (CLIENT.c.client_id, Reason.CLIENT_NOT_FOUND),
}


class SqlRoles:
    """Permissions, roles, assignments."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # --- roles ---

    async def get(self, role_id: str) -> Role | None:
        """See RoleStore."""
        return (await self._one(ROLE.c.role_id == role_id))[1]

    async def role_by_uid(self, role_uid: str) -> tuple[int, Role | None]:
        """See RoleStore."""
        return await self._one(ROLE.c.role_uid == role_uid)

    async def _one(self, wanted: ColumnElement[bool]) -> tuple[int, Role | None]:
        has = ROLE_PERMISSION.c
        query = select(FEED_HEAD.c.revision, ROLE, has.resource_id, has.name).select_from(
            FEED_HEAD.outerjoin(ROLE, wanted).outerjoin(
                ROLE_PERMISSION, has.role_uid == ROLE.c.role_uid
            )
        )
        async with self._db.read() as connection:
            rows = (await connection.execute(query)).all()
            found = _roles(row for row in rows if row.role_uid is not None)
            return rows[0].revision, next(found, None)

    async def page(self, resource_id: str, after: str, limit: int) -> tuple[Role, ...]:
        """See RoleStore."""
        query = select(ROLE).where(ROLE.c.role_id > after).order_by(ROLE.c.role_id).limit(limit)
        if resource_id:
            holding = select(ROLE_PERMISSION.c.role_uid).where(
                ROLE_PERMISSION.c.resource_id == resource_id
            )
            query = query.where(ROLE.c.role_uid.in_(holding))
        async with self._db.read() as connection:
            return tuple(_roles(await connection.execute(_whole(query))))

    async def add(self, role: Role) -> Role:
        """See RoleStore."""
        return await self._db.to_the_end(self._add(role))

    async def _add(self, role: Role) -> Role:
        try:
            async with self._db.write() as connection:
                _require_all(await _missing(connection, role.permissions))
                made = await connection.execute(
                    insert(ROLE)
                    .values(
                        role_uid=os.urandom(16).hex(),
                        role_id=role.role_id,
                        display_name=role.display_name,
                        description=role.description,
                        version=1,
                        create_time=self._db.time,
                        update_time=self._db.time,
                    )
                    .returning(ROLE)
                )
                row = made.one()
                await _permit(connection, row.role_uid, role.permissions)
                await record(self._db, connection, Touched(object_id=role.role_id))
                return _role(row, role.permissions)
        except IntegrityError as error:
            raise _taken("role.role_id", error) from error

    async def update(
        self,
        role_id: str,
        version: int | None,
        *,
        display_name: str | None = None,
        description: str | None = None,
        permissions: frozenset[PermissionRef] | None = None,
    ) -> tuple[Role, int]:
        """See RoleStore."""
        texts = {"display_name": display_name, "description": description}
        changed = {name: text for name, text in texts.items() if text is not None}
        return await self._db.to_the_end(self._update(role_id, version, changed, permissions))

    async def _update(
        self,
        role_id: str,
        version: int | None,
        changed: dict[str, str],
        permissions: frozenset[PermissionRef] | None,
    ) -> tuple[Role, int]:
        async with self._db.write() as connection:
            missing = await _missing(connection, permissions or ())
            uid = await _locked_role(connection, role_id, version)
            _require_all(missing)
            if permissions is None:
                mine = select(ROLE_PERMISSION.c.resource_id, ROLE_PERMISSION.c.name).where(
                    ROLE_PERMISSION.c.role_uid == uid
                )
                held = frozenset(PermissionRef(*row) for row in await connection.execute(mine))
            else:
                held = permissions
                await _delete(connection, ROLE_PERMISSION, ROLE_PERMISSION.c.role_uid == uid)
                await _permit(connection, uid, permissions)
            moved = await connection.execute(
                _new_version(self._db).where(ROLE.c.role_uid == uid).values(**changed)
            )
            row = moved.one()
            revision = await advance(self._db, connection, _role_changes([role_id]))
            return _role(row, held), revision

    async def delete(self, role_id: str, version: int | None) -> int:
        """See RoleStore."""
        return await self._db.to_the_end(self._delete(role_id, version))

    async def _delete(self, role_id: str, version: int | None) -> int:
        async with self._db.write() as connection:
            uid = await _locked_role(connection, role_id, version)
            last = await _delete_holders(connection, uid)
            for table in (ROLE_PERMISSION, ROLE):
                await _delete(connection, table, table.c.role_uid == uid)
            revision = await advance(self._db, connection, _role_changes([role_id]))
        with suppress(AuthError):  # without their role they are nothing, and no list shows them
            while last is not None:
                async with self._db.write() as connection:
                    last = await _delete_holders(connection, uid, last)
        return revision

    # --- permissions ---

    async def add_permission(self, permission: Permission) -> Permission:
        """See RoleStore."""
        return await self._db.to_the_end(self._add_permission(permission))

    async def _add_permission(self, permission: Permission) -> Permission:
        ref = permission.ref
        try:
            async with self._db.write() as connection:
                await _require_resource(connection, ref.resource_id)
                made = await connection.execute(
                    insert(PERMISSION)
                    .values(
                        resource_id=ref.resource_id,
                        name=ref.name,
                        description=permission.description,
                        create_time=self._db.time,
                    )
                    .returning(PERMISSION)
                )
                row = made.one()
                await record(self._db, connection, _touched(ref))
                return _permission(row)
        except IntegrityError as error:
            raise _taken("permission.ref", error) from error

    async def page_of_permissions(
        self, resource_id: str, after: PermissionRef | None, limit: int
    ) -> tuple[Permission, ...]:
        """See RoleStore."""
        place = (PERMISSION.c.resource_id, PERMISSION.c.name)
        query = select(PERMISSION).order_by(*place).limit(limit)
        if resource_id:
            query = query.where(PERMISSION.c.resource_id == resource_id)
        if after is not None:
            query = query.where(_beyond(place, after))
        async with self._db.read() as connection:
            found = await connection.execute(query)
            return tuple(readable(found, _permission, "permission"))

    async def delete_permission(self, ref: PermissionRef) -> int:
        """See RoleStore."""
        return await self._db.to_the_end(self._delete_permission(ref))

    async def _delete_permission(self, ref: PermissionRef) -> int:
        async with self._db.write() as connection:
            mine = _named(PERMISSION, ref)
            locked = await connection.execute(select(PERMISSION).where(mine).with_for_update())
            if locked.first() is None:
                raise _no_permission(ref)
            changes = await _take_out(self._db, connection, _named(ROLE_PERMISSION, ref))
            await _delete(connection, PERMISSION, mine)
            if changes:
                return await advance(self._db, connection, changes, _touched(ref))
            await record(self._db, connection, _touched(ref))
            return 0

    # --- assignments ---

    async def assign(self, asked: RoleAssignment) -> tuple[RoleAssignment, int]:
        """See RoleStore."""
        return await self._db.to_the_end(self._assign(asked))

    async def _assign(self, asked: RoleAssignment) -> tuple[RoleAssignment, int]:
        async with self._db.write() as connection:
            uid = await _lock_named(connection, asked)
            known = await connection.execute(select(ROLE_ASSIGNMENT).where(_is(asked, uid)))
            row = known.first()
            if row is not None:
                return _assignment(row, asked.role_id), 0
            made = await connection.execute(
                insert(ROLE_ASSIGNMENT)
                .values(
                    holder_id=asked.holder_id,
                    role_uid=uid,
                    resource_id=asked.resource_id,
                    holder_kind=asked.holder_kind.value,
                    create_time=self._db.time,
                )
                .returning(ROLE_ASSIGNMENT)
            )
            return _assignment(made.one(), asked.role_id), await self._changed(connection, asked)

    async def unassign(self, asked: RoleAssignment) -> int:
        """See RoleStore."""
        return await self._db.to_the_end(self._unassign(asked))

    async def _unassign(self, asked: RoleAssignment) -> int:
        async with self._db.write() as connection:
            uid = await _lock_named(connection, asked)
            if not await _delete(connection, ROLE_ASSIGNMENT, _is(asked, uid)):
                return 0
            return await self._changed(connection, asked)

    async def _changed(self, connection: AsyncConnection, asked: RoleAssignment) -> int:
        client_id = asked.holder_id if asked.holder_kind is HolderKind.CLIENT else ""
        touched = Touched(asked.holder_id, client_id, asked.role_id)
        changes = [change(MarkerKind.PERMISSIONS_CHANGED, asked.holder_id)]
        return await advance(self._db, connection, changes, touched)

    async def page_of_assignments(
        self, wanted: AssignmentFilter, after: tuple[str, str, str] | None, limit: int
    ) -> tuple[RoleAssignment, ...]:
        """See RoleStore."""
        rows = ROLE_ASSIGNMENT.c
        place = (rows.holder_id, ROLE.c.role_id, rows.resource_id)
        query = (
            select(ROLE_ASSIGNMENT, ROLE.c.role_id)
            .join_from(ROLE_ASSIGNMENT, ROLE, rows.role_uid == ROLE.c.role_uid)
            .order_by(*place)
            .limit(limit)
        )
        for column, text in (
            (rows.holder_kind, wanted.holder_kind.value if wanted.holder_kind else ""),
            (rows.holder_id, wanted.holder_id),
            (ROLE.c.role_id, wanted.role_id),
            (rows.resource_id, wanted.resource_id),
        ):
            if text:
                query = query.where(column == text)
        if after is not None:
            # The first condition is the one that an index answers.
            query = query.where(rows.holder_id >= after[0], _beyond(place, after))
        async with self._db.read() as connection:
            found = await connection.execute(query)
            decoded = readable(found, lambda row: _assignment(row, row.role_id), "role_assignment")
            return tuple(decoded)

    async def assignments_of(self, holder_id: str) -> tuple[int, tuple[Holding, ...]]:
        """See RoleStore."""
        held = ROLE_ASSIGNMENT.c
        query = select(
            FEED_HEAD.c.revision, held.role_uid, ROLE.c.role_id, held.resource_id
        ).select_from(
            FEED_HEAD.outerjoin(ROLE_ASSIGNMENT, held.holder_id == holder_id).outerjoin(
                ROLE, ROLE.c.role_uid == held.role_uid
            )
        )
        async with self._db.read() as connection:
            rows = (await connection.execute(query)).all()
            found = (Holding(*row[1:]) for row in rows if row.role_id is not None)
            return rows[0].revision, tuple(found)


async def forget_resource(
    database: Database, connection: AsyncConnection, resource_id: str
) -> list[Change]:
    """Deletes the permissions of a resource that is locked, and what roles and assignments say of
    it; answers which roles changed.
    """
    permissions = select(PERMISSION.c.name).where(PERMISSION.c.resource_id == resource_id)
    await connection.execute(permissions.order_by(PERMISSION.c.name).with_for_update())
    held, limited = (
        table.c.resource_id == resource_id for table in (ROLE_PERMISSION, ROLE_ASSIGNMENT)
    )
    await _lock_roles(
        connection,
        or_(
            ROLE.c.role_uid.in_(select(ROLE_PERMISSION.c.role_uid).where(held)),
            ROLE.c.role_uid.in_(select(ROLE_ASSIGNMENT.c.role_uid).where(limited)),
        ),
    )
    changes = await _take_out(database, connection, held)
    await _delete(connection, PERMISSION, PERMISSION.c.resource_id == resource_id)
    await _delete(connection, ROLE_ASSIGNMENT, limited)
    return changes


async def _take_out(
    database: Database, connection: AsyncConnection, held: ColumnElement[bool]
) -> list[Change]:
    """Deletes these rows of `role_permission`, whose permissions are locked, so that no role gets
    one meanwhile; answers which roles changed.
    """
    mine = ROLE.c.role_uid.in_(select(ROLE_PERMISSION.c.role_uid).where(held))
    await _lock_roles(connection, mine)
    moved = await connection.execute(_new_version(database).where(mine))
    changes = _role_changes(sorted(row.role_id for row in moved))
    await _delete(connection, ROLE_PERMISSION, held)
    return changes


async def _lock_roles(connection: AsyncConnection, wanted: ColumnElement[bool]) -> None:
    locked = select(ROLE.c.role_uid).where(wanted).order_by(ROLE.c.role_uid).with_for_update()
    await connection.execute(locked)


async def _locked_role(connection: AsyncConnection, role_id: str, version: int | None) -> str:
    """The uid of a role that stays as it is until the transaction ends."""
    mine = select(ROLE.c.role_uid, ROLE.c.version).where(ROLE.c.role_id == role_id)
    row = (await connection.execute(mine.with_for_update())).first()
    if row is None:
        raise AuthError(Reason.ROLE_NOT_FOUND)
    if version not in (None, row.version):
        raise AuthError(Reason.ETAG_MISMATCH)
    return str(row.role_uid)


async def _lock_named(connection: AsyncConnection, asked: RoleAssignment) -> str:
    """Makes sure that all that an assignment names is there and stays; the uid of its role.

    Who changes what a holder holds is alone with it.
    """
    holder, reason = _HOLDERS[asked.holder_kind]
    mine = select(holder).where(holder == asked.holder_id)
    if (await connection.execute(mine.with_for_update(key_share=True))).first() is None:
        raise AuthError(reason)
    if asked.resource_id:
        await _require_resource(connection, asked.resource_id)
    role = select(ROLE.c.role_uid).where(ROLE.c.role_id == asked.role_id)
    uid = (await connection.execute(_kept(role))).scalar()
    if uid is None:
        raise AuthError(Reason.ROLE_NOT_FOUND)
    return str(uid)


async def _require_resource(connection: AsyncConnection, resource_id: str) -> None:
    """Makes sure that a resource is there and stays."""
    mine = select(RESOURCE.c.resource_id).where(RESOURCE.c.resource_id == resource_id)
    if (await connection.execute(_kept(mine))).first() is None:
        raise AuthError(Reason.RESOURCE_NOT_FOUND)


async def _missing(
    connection: AsyncConnection, wanted: Collection[PermissionRef]
) -> list[PermissionRef]:
    """Those that are not there; the others stay."""
    if not wanted:
        return []
    place = (PERMISSION.c.resource_id, PERMISSION.c.name)
    query = select(*place).where(tuple_(*place).in_(sorted(wanted))).order_by(*place)
    found = {PermissionRef(*row) for row in await connection.execute(_kept(query))}
    return sorted(set(wanted) - found)


def _kept(query: Select[Any]) -> Select[Any]:
    """With a lock under which nobody deletes what is found."""
    return query.with_for_update(read=True, key_share=True)


def _require_all(missing: list[PermissionRef]) -> None:
    if missing:
        raise _no_permission(missing[0])


def _no_permission(ref: PermissionRef) -> AuthError:
    return AuthError(
        Reason.PERMISSION_NOT_FOUND, f"{ref.name} on {ref.resource_id}", metadata=ref._asdict()
    )


def _taken(field: str, error: IntegrityError) -> AuthError:
    return AuthError(Reason.ALREADY_EXISTS, field, metadata={"field": field}, cause=repr(error))


async def _permit(
    connection: AsyncConnection, uid: str, permissions: Collection[PermissionRef]
) -> None:
    """Gives a role permissions."""
    rows = [{"role_uid": uid, **ref._asdict()} for ref in sorted(permissions)]
    if rows:
        await connection.execute(insert(ROLE_PERMISSION), rows)


async def _delete(connection: AsyncConnection, table: Table, wanted: ColumnElement[bool]) -> int:
    """How many rows went."""
    return int((await connection.execute(delete(table).where(wanted))).rowcount)


async def _delete_holders(connection: AsyncConnection, uid: str, after: str = "") -> str | None:
    """Deletes a role's assignments in the order of holders, from the one after `after`; answers the
    last one of a piece, behind which some may be left.
    """
    holder = ROLE_ASSIGNMENT.c.holder_id
    mine = and_(ROLE_ASSIGNMENT.c.role_uid == uid, holder > after)
    last_of_piece = select(holder).where(mine).order_by(holder).offset(PIECE - 1).limit(1)
    last = (await connection.execute(last_of_piece)).scalar()
    await _delete(connection, ROLE_ASSIGNMENT, mine if last is None else mine & (holder <= last))
    return last


def _new_version(database: Database) -> Any:
    return (
        update(ROLE).values(version=ROLE.c.version + 1, update_time=database.time).returning(ROLE)
    )


def _role_changes(role_ids: Iterable[str]) -> list[Change]:
    """One for each role, however many hold it."""
    return [change(MarkerKind.ROLE_CHANGED, role_id) for role_id in role_ids]


def _touched(ref: PermissionRef) -> Touched:
    return Touched(object_id=f"{ref.resource_id} {ref.name}")


def _named(table: Table, ref: PermissionRef) -> ColumnElement[bool]:
    return and_(table.c.resource_id == ref.resource_id, table.c.name == ref.name)


def _is(asked: RoleAssignment, uid: str) -> ColumnElement[bool]:
    rows = ROLE_ASSIGNMENT.c
    return and_(
        rows.holder_id == asked.holder_id,
        rows.role_uid == uid,
        rows.resource_id == asked.resource_id,
    )


def _beyond(place: tuple[Column[Any], ...], after: tuple[str, ...]) -> ColumnElement[bool]:
    return tuple_(*place) > tuple_(*after)


def _whole(query: Select[Any]) -> Select[Any]:
    """Roles with their permissions, by one statement."""
    role, has = query.subquery(), ROLE_PERMISSION.c
    return (
        select(role, has.resource_id, has.name)
        .select_from(role.outerjoin(ROLE_PERMISSION, has.role_uid == role.c.role_uid))
        .order_by(role.c.role_id)
    )


def _roles(found: Iterable[Row[Any]]) -> Iterator[Role]:
    rows: dict[str, Row[Any]] = {}
    permissions: dict[str, set[PermissionRef]] = {}
    for row in found:
        rows[row.role_uid] = row
        held = permissions.setdefault(row.role_uid, set())
        if row.name is not None:
            held.add(PermissionRef(row.resource_id, row.name))
    return readable(
        rows.values(), lambda row: _role(row, frozenset(permissions[row.role_uid])), "role"
    )


def _role(row: Row[Any], permissions: frozenset[PermissionRef]) -> Role:
    return Role(
        role_id=row.role_id,
        permissions=permissions,
        create_time=row.create_time,
        update_time=row.update_time,
        display_name=row.display_name,
        description=row.description,
        version=row.version,
    )


def _permission(row: Row[Any]) -> Permission:
    return Permission(PermissionRef(row.resource_id, row.name), row.description, row.create_time)


def _assignment(row: Row[Any], role_id: str) -> RoleAssignment:
    return RoleAssignment(
        role_id, HolderKind(row.holder_kind), row.holder_id, row.resource_id, row.create_time
    )
