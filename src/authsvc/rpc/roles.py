"""RoleService: decode, call the verb, encode."""

from collections.abc import Iterable

from authsvc.model import HolderKind, Permission, PermissionRef, Role, RoleAssignment
from authsvc.roles import Roles, place_of_assignment, place_of_permission
from authsvc.rpc import convert
from authsvc.rpc.convert import timestamp
from authsvc.rpc.limits import field_invalid
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.store.port import AssignmentFilter
from authsvc_client.v1 import roles_pb2

_HOLDER_IDS = {"user_id": HolderKind.USER, "client_id": HolderKind.CLIENT}


class RoleServicer:
    """Permissions, roles, assignments."""

    def __init__(self, roles: Roles, pages: Pages) -> None:
        self._roles = roles
        self._pages = pages

    async def CreateRole(
        self, request: roles_pb2.CreateRoleRequest, _call: Call
    ) -> roles_pb2.CreateRoleResponse:
        """Creates one."""
        return roles_pb2.CreateRoleResponse(
            role=_role_pb(await self._roles.create(_role(request.role)))
        )

    async def GetRole(
        self, request: roles_pb2.GetRoleRequest, _call: Call
    ) -> roles_pb2.GetRoleResponse:
        """One role."""
        return roles_pb2.GetRoleResponse(role=_role_pb(await self._roles.get(request.role_id)))

    async def ListRoles(
        self, request: roles_pb2.ListRolesRequest, _call: Call
    ) -> roles_pb2.ListRolesResponse:
        """A page of roles."""
        wanted, size = request.resource_id, request.page_size or PAGE_SIZE_DEFAULT
        what = f"roles:{wanted}"
        after = self._pages.after(request.page_token, what)
        found = await self._roles.page(wanted, after, size + 1)
        return roles_pb2.ListRolesResponse(
            roles=[_role_pb(role) for role in found[:size]],
            next_page_token=self._pages.next([role.role_id for role in found], size, what),
        )

    async def UpdateRole(
        self, request: roles_pb2.UpdateRoleRequest, _call: Call
    ) -> roles_pb2.UpdateRoleResponse:
        """Changes the fields of the mask."""
        changed, revision = await self._roles.update(
            _role(request.role),
            frozenset(request.update_mask.paths),
            convert.version_of(request.role.etag),
        )
        return roles_pb2.UpdateRoleResponse(role=_role_pb(changed), revision=revision)

    async def DeleteRole(
        self, request: roles_pb2.DeleteRoleRequest, _call: Call
    ) -> roles_pb2.DeleteRoleResponse:
        """Deletes one, and its assignments."""
        version = convert.version_of(request.etag)
        revision = await self._roles.delete(request.role_id, version)
        return roles_pb2.DeleteRoleResponse(revision=revision)

    async def CreatePermission(
        self, request: roles_pb2.CreatePermissionRequest, _call: Call
    ) -> roles_pb2.CreatePermissionResponse:
        """Creates one."""
        given = request.permission
        created = await self._roles.create_permission(
            Permission(_ref(given.ref), given.description, 0.0)
        )
        return roles_pb2.CreatePermissionResponse(permission=_permission_pb(created))

    async def ListPermissions(
        self, request: roles_pb2.ListPermissionsRequest, _call: Call
    ) -> roles_pb2.ListPermissionsResponse:
        """A page of permissions."""
        wanted, size = request.resource_id, request.page_size or PAGE_SIZE_DEFAULT
        what = f"permissions:{wanted}"
        after = self._pages.after(request.page_token, what)
        found = await self._roles.page_of_permissions(wanted, after, size + 1)
        return roles_pb2.ListPermissionsResponse(
            permissions=[_permission_pb(permission) for permission in found[:size]],
            next_page_token=self._pages.next([*map(place_of_permission, found)], size, what),
        )

    async def DeletePermission(
        self, request: roles_pb2.DeletePermissionRequest, _call: Call
    ) -> roles_pb2.DeletePermissionResponse:
        """Deletes one, out of every role."""
        revision = await self._roles.delete_permission(_ref(request.ref))
        return roles_pb2.DeletePermissionResponse(revision=revision)

    async def AssignRole(
        self, request: roles_pb2.AssignRoleRequest, _call: Call
    ) -> roles_pb2.AssignRoleResponse:
        """Gives a role."""
        held, revision = await self._roles.assign(_assignment(request.role_assignment))
        return roles_pb2.AssignRoleResponse(role_assignment=_assignment_pb(held), revision=revision)

    async def UnassignRole(
        self, request: roles_pb2.UnassignRoleRequest, _call: Call
    ) -> roles_pb2.UnassignRoleResponse:
        """Takes a role away."""
        revision = await self._roles.unassign(_assignment(request.role_assignment))
        return roles_pb2.UnassignRoleResponse(revision=revision)

    async def ListRoleAssignments(
        self, request: roles_pb2.ListRoleAssignmentsRequest, _call: Call
    ) -> roles_pb2.ListRoleAssignmentsResponse:
        """A page of assignments."""
        kind, holder_id = _holder(request)
        wanted = AssignmentFilter(kind, holder_id, request.role_id, request.resource_id)
        what, size = f"role-assignments:{wanted}", request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._roles.page_of_assignments(wanted, after, size + 1)
        return roles_pb2.ListRoleAssignmentsResponse(
            role_assignments=[_assignment_pb(held) for held in found[:size]],
            next_page_token=self._pages.next([*map(place_of_assignment, found)], size, what),
        )


def _role(message: roles_pb2.Role) -> Role:
    """A role as it is asked for."""
    return Role(
        role_id=message.role_id,
        permissions=_permissions(message.permissions),
        create_time=0.0,
        update_time=0.0,
        display_name=message.display_name,
        description=message.description,
    )


def _permissions(messages: Iterable[roles_pb2.PermissionRef]) -> frozenset[PermissionRef]:
    refs = [_ref(message) for message in messages]
    unique = frozenset(refs)
    if len(unique) != len(refs):
        raise field_invalid("role.permissions", "has an item twice")
    return unique


def _ref(message: roles_pb2.PermissionRef) -> PermissionRef:
    return PermissionRef(message.resource_id, message.name)


def _assignment(message: roles_pb2.RoleAssignment) -> RoleAssignment:
    """An assignment as it is asked for."""
    kind, holder_id = _holder(message)
    if kind is None or not holder_id:
        raise field_invalid("role_assignment.holder", "is required: user_id or client_id")
    return RoleAssignment(message.role_id, kind, holder_id, message.resource_id)


def _holder(
    message: roles_pb2.RoleAssignment | roles_pb2.ListRoleAssignmentsRequest,
) -> tuple[HolderKind | None, str]:
    name = message.WhichOneof("holder")
    return (_HOLDER_IDS[name], getattr(message, name)) if name else (None, "")


def _role_pb(role: Role) -> roles_pb2.Role:
    return roles_pb2.Role(
        role_id=role.role_id,
        display_name=role.display_name,
        description=role.description,
        permissions=[_ref_pb(ref) for ref in sorted(role.permissions)],
        etag=str(role.version),
        create_time=timestamp(role.create_time),
        update_time=timestamp(role.update_time),
    )


def _ref_pb(ref: PermissionRef) -> roles_pb2.PermissionRef:
    return roles_pb2.PermissionRef(resource_id=ref.resource_id, name=ref.name)


def _permission_pb(permission: Permission) -> roles_pb2.Permission:
    return roles_pb2.Permission(
        ref=_ref_pb(permission.ref),
        description=permission.description,
        create_time=timestamp(permission.create_time),
    )


def _assignment_pb(held: RoleAssignment) -> roles_pb2.RoleAssignment:
    message = roles_pb2.RoleAssignment(
        role_id=held.role_id,
        resource_id=held.resource_id,
        create_time=timestamp(held.create_time),
    )
    setattr(message, f"{held.holder_kind.value}_id", held.holder_id)
    return message
