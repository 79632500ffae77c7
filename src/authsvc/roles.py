"""Permissions, roles and who holds them, as an administrator sees them."""

import re
from collections.abc import Awaitable, Callable

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.model import Permission, PermissionRef, Role, RoleAssignment
from authsvc.store.port import AssignmentFilter, RoleStore

EDITABLE = frozenset({"display_name", "description", "permissions"})

_role_id = re.compile(r"[a-z0-9._-]{1,64}").fullmatch
_permission_name = re.compile(r"[A-Za-z0-9._:/-]{1,128}").fullmatch


class Roles:
    """Administers permissions, roles and assignments."""

    def __init__(self, store: RoleStore, reach: Callable[[int], Awaitable[None]]) -> None:
        self._store = store
        self._reach = reach

    async def create(self, asked: Role) -> Role:
        """Raises AuthError FIELD_INVALID, ALREADY_EXISTS, PERMISSION_NOT_FOUND."""
        if not _role_id(asked.role_id):
            raise _invalid("role.role_id", "is not 1 to 64 characters of a-z 0-9 . _ -")
        return await self._store.add(asked)

    async def get(self, role_id: str) -> Role:
        """Raises AuthError ROLE_NOT_FOUND."""
        found = await self._store.get(role_id)
        if found is None:
            raise AuthError(Reason.ROLE_NOT_FOUND)
        return found

    async def page(self, resource_id: str, after: str, limit: int) -> tuple[Role, ...]:
        """In the order of their ids; with a permission on this resource, where one is given."""
        return await self._store.page(resource_id, after, limit)

    async def update(
        self, asked: Role, fields: frozenset[str], version: int | None
    ) -> tuple[Role, int]:
        """Changes these fields to what is asked; answers the revision too.

        Raises AuthError FIELD_INVALID, ROLE_NOT_FOUND, ETAG_MISMATCH, PERMISSION_NOT_FOUND.
        """
        if not fields or not fields <= EDITABLE:
            text = f"names one or more of: {', '.join(sorted(EDITABLE))}"
            raise _invalid("update_mask", text)
        role, revision = await self._store.update(
            asked.role_id,
            version,
            display_name=asked.display_name if "display_name" in fields else None,
            description=asked.description if "description" in fields else None,
            permissions=asked.permissions if "permissions" in fields else None,
        )
        await self._reach(revision)
        return role, revision

    async def delete(self, role_id: str, version: int | None) -> int:
        """Deletes a role, and takes it from all who hold it; answers the revision.

        Raises AuthError ROLE_NOT_FOUND, ETAG_MISMATCH.
        """
        revision = await self._store.delete(role_id, version)
        await self._reach(revision)
        return revision

    async def create_permission(self, asked: Permission) -> Permission:
        """Raises AuthError FIELD_INVALID, RESOURCE_NOT_FOUND, ALREADY_EXISTS."""
        if not _permission_name(asked.ref.name):
            text = "is not 1 to 128 characters of A-Z a-z 0-9 . _ : / -"
            raise _invalid("permission.ref.name", text)
        return await self._store.add_permission(asked)

    async def page_of_permissions(
        self, resource_id: str, after: str, limit: int
    ) -> tuple[Permission, ...]:
        """In the order of resources and names, from the one after the place `after`, if any."""
        place = PermissionRef(*after.split(" ")) if after else None
        return await self._store.page_of_permissions(resource_id, place, limit)

    async def delete_permission(self, ref: PermissionRef) -> int:
        """Deletes a permission and takes it out of every role; answers the revision, 0 where no
        role had it. Raises AuthError PERMISSION_NOT_FOUND.
        """
        revision = await self._store.delete_permission(ref)
        await self._reach(revision)
        return revision

    async def assign(self, asked: RoleAssignment) -> tuple[RoleAssignment, int]:
        """Gives a role; answers what is held, and the revision, 0 where it was held already.

        Raises AuthError ROLE_NOT_FOUND, USER_NOT_FOUND, CLIENT_NOT_FOUND, RESOURCE_NOT_FOUND.
        """
        held, revision = await self._store.assign(asked)
        await self._reach(revision)
        return held, revision

    async def unassign(self, asked: RoleAssignment) -> int:
        """Takes a role away; answers the revision, 0 where it was not held. Raises as `assign`."""
        revision = await self._store.unassign(asked)
        await self._reach(revision)
        return revision

    async def page_of_assignments(
        self, wanted: AssignmentFilter, after: str, limit: int
    ) -> tuple[RoleAssignment, ...]:
        """In the order of holders, roles and resources, from the one after the place `after`."""
        place: tuple[str, str, str] | None = None
        if after:
            holder_id, role_id, resource_id = after.split(" ")
            place = holder_id, role_id, resource_id
        return await self._store.page_of_assignments(wanted, place, limit)


def place_of_permission(found: Permission) -> str:
    """Its place in the list, for `page_of_permissions`; none of its parts holds a space."""
    return " ".join(found.ref)


def place_of_assignment(found: RoleAssignment) -> str:
    """Its place in the list, for `page_of_assignments`; none of its parts holds a space."""
    return f"{found.holder_id} {found.role_id} {found.resource_id}"


def _invalid(field: str, text: str) -> AuthError:
    return AuthError(
        Reason.FIELD_INVALID, f"{field}: {text}", violations=(FieldViolation(field, text),)
    )
