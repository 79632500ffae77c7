"""Commands about roles, and the permissions that they hold."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from authsvc.cli.calls import ALL, Limit, Session, connected, more, time_of
from authsvc.cli.output import Column, Failure, command

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from authsvc_client.v1 import roles_pb2

roles = typer.Typer(no_args_is_help=True, help="Roles: what users and clients may do, live.")
permissions = typer.Typer(no_args_is_help=True, help="Permissions of resources, for roles.")

AT = "@"
"""Between a permission's name and its resource: no name has it."""

RoleId = Annotated[str, typer.Argument(metavar="ROLE_ID", help="Id of the role.")]
DisplayName = Annotated[
    str | None, typer.Option("--display-name", metavar="TEXT", help="Name for people.")
]
Description = Annotated[
    str | None, typer.Option("--description", metavar="TEXT", help="What it is for.")
]
Permissions = Annotated[
    list[str] | None,
    typer.Option(
        "--permission",
        metavar="NAME@RESOURCE_ID",
        help="Permission that it holds, such as bills.read@https://billing.internal; repeatable.",
    ),
]
PermissionName = Annotated[
    str,
    typer.Argument(
        metavar="NAME@RESOURCE_ID", help="Permission, such as bills.read@https://billing.internal"
    ),
]
User = Annotated[str, typer.Option("--user", metavar="USER_ID", help="User that holds it.")]
Client = Annotated[
    str, typer.Option("--client", metavar="CLIENT_ID", help="Client that holds it, for itself.")
]
ResourceId = Annotated[
    str,
    typer.Option(
        "--resource",
        metavar="RESOURCE_ID",
        help="Only the role's permissions on this resource.",
        show_default="all of them",
    ),
]
OnResource = Annotated[
    str, typer.Option("--resource", metavar="RESOURCE_ID", help="Only those on this resource.")
]
Etag = Annotated[
    str,
    typer.Option(
        "--etag", metavar="ETAG", help="Only if it is still as `role show` told with this etag."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(roles, connected)(create)
    command(roles, connected, name="list")(list_roles)
    for step in (show, update, delete, assign, unassign, holders):
        command(roles, connected)(step)
    app.add_typer(roles, name="role")
    command(permissions, connected, name="create")(create_permission)
    command(permissions, connected, name="list")(list_permissions)
    command(permissions, connected, name="delete")(delete_permission)
    app.add_typer(permissions, name="permission")


def create(
    session: Session,
    role_id: Annotated[
        str, typer.Argument(metavar="ROLE_ID", help="Its id: 1 to 64 of a-z 0-9 . _ -")
    ],
    permission: Permissions = None,
    display_name: DisplayName = None,
    description: Description = None,
) -> None:
    """Create a role."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    role = roles_pb2.Role(role_id=role_id, **_fields(permission, display_name, description))
    method = RoleServiceStub(session.channel).CreateRole
    _answer(session, session.call(method, roles_pb2.CreateRoleRequest(role=role)))


def list_roles(session: Session, resource: OnResource = "", limit: Limit = ALL) -> None:
    """List roles, in the order of their ids."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    out, method = session.out, RoleServiceStub(session.channel).ListRoles
    request = roles_pb2.ListRolesRequest(resource_id=resource)
    found = session.pages(method, request, "roles", limit)
    if out.json:
        return out.document(found)
    if not found.roles:
        return out.note("no roles")
    columns = [Column("ROLE ID", is_id=True), Column("NAME"), Column("PERMISSIONS")]
    out.table(
        [*columns, Column("DESCRIPTION")],
        [
            (role.role_id, role.display_name, _told(role.permissions, resource), role.description)
            for role in found.roles
        ],
    )
    return more(session, found.next_page_token)


def show(session: Session, role_id: RoleId) -> None:
    """Show all that there is about a role."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    method = RoleServiceStub(session.channel).GetRole
    _answer(session, session.call(method, roles_pb2.GetRoleRequest(role_id=role_id)))


def update(
    session: Session,
    role_id: RoleId,
    permission: Permissions = None,
    display_name: DisplayName = None,
    description: Description = None,
    etag: Etag = "",
) -> None:
    """Change what the options name, and nothing else; --permission names all that remain.

    An empty value takes it away: --permission ''.
    """
    from google.protobuf.field_mask_pb2 import FieldMask

    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    given = _fields(permission, display_name, description)
    if not given:
        raise Failure("nothing to change", "authsvc role update --help tells what there is")
    answer = session.call(
        RoleServiceStub(session.channel).UpdateRole,
        roles_pb2.UpdateRoleRequest(
            role=roles_pb2.Role(role_id=role_id, etag=etag, **given),
            update_mask=FieldMask(paths=list(given)),
        ),
    )
    _answer(session, answer)


def delete(session: Session, role_id: RoleId, etag: Etag = "") -> None:
    """Delete a role, and take it from all who hold it."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    request = roles_pb2.DeleteRoleRequest(role_id=role_id, etag=etag)
    answer = session.call(RoleServiceStub(session.channel).DeleteRole, request)
    if session.out.json:
        return session.out.document(answer)
    session.out.pairs((("role_id", role_id), ("revision", answer.revision)))
    return session.out.note("Nobody holds it any more.")


def assign(
    session: Session,
    role_id: RoleId,
    user: User = "",
    client: Client = "",
    resource: ResourceId = "",
) -> None:
    """Give a role to a user or a client."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    request = roles_pb2.AssignRoleRequest(
        role_assignment=_assignment(role_id, user, client, resource)
    )
    answer = session.call(RoleServiceStub(session.channel).AssignRole, request)
    _changed(session, answer, request.role_assignment, "It was held before.")


def unassign(
    session: Session,
    role_id: RoleId,
    user: User = "",
    client: Client = "",
    resource: Annotated[
        str,
        typer.Option(
            "--resource",
            metavar="RESOURCE_ID",
            help="The assignment that is limited to this resource.",
            show_default="the one that is not limited",
        ),
    ] = "",
) -> None:
    """Take a role away from a user or a client."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    request = roles_pb2.UnassignRoleRequest(
        role_assignment=_assignment(role_id, user, client, resource)
    )
    answer = session.call(RoleServiceStub(session.channel).UnassignRole, request)
    _changed(session, answer, request.role_assignment, "It was not held.")


def holders(
    session: Session,
    role_id: Annotated[
        str, typer.Argument(metavar="ROLE_ID", help="Only of this role.", show_default="any role")
    ] = "",
    user: Annotated[str, typer.Option(metavar="USER_ID", help="Only what this user holds.")] = "",
    client: Annotated[
        str, typer.Option(metavar="CLIENT_ID", help="Only what this client holds.")
    ] = "",
    resource: Annotated[
        str, typer.Option(metavar="RESOURCE_ID", help="Only those limited to this resource.")
    ] = "",
    limit: Limit = ALL,
) -> None:
    """List who holds which role."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    out, method = session.out, RoleServiceStub(session.channel).ListRoleAssignments
    request = roles_pb2.ListRoleAssignmentsRequest(
        role_id=role_id, resource_id=resource, **_holder(user, client)
    )
    found = session.pages(method, request, "role_assignments", limit)
    if out.json:
        return out.document(found)
    if not found.role_assignments:
        return out.note("nobody holds it" if role_id else "no roles are held")
    columns = [Column("HOLDER", is_id=True), Column("KIND", is_id=True)]
    columns += [Column("ROLE ID", is_id=True), Column("ON RESOURCE", is_id=True), Column("SINCE")]
    out.table(
        columns,
        [
            (
                *_held_by(each),
                each.role_id,
                each.resource_id or "all",
                time_of(each, "create_time", session.now),
            )
            for each in found.role_assignments
        ],
    )
    return more(session, found.next_page_token)


def create_permission(
    session: Session,
    permission: PermissionName,
    description: Annotated[
        str, typer.Option("--description", metavar="TEXT", help="What it permits.")
    ] = "",
) -> None:
    """Create a permission of a resource."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    asked = roles_pb2.Permission(ref=_ref(permission), description=description)
    request = roles_pb2.CreatePermissionRequest(permission=asked)
    answer = session.call(RoleServiceStub(session.channel).CreatePermission, request)
    if session.out.json:
        return session.out.document(answer)
    return session.out.pairs(
        (
            ("permission", _told([answer.permission.ref])),
            ("description", answer.permission.description),
            ("created", time_of(answer.permission, "create_time", session.now)),
        )
    )


def list_permissions(session: Session, resource: OnResource = "", limit: Limit = ALL) -> None:
    """List permissions, in the order of their resources and names."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    out, method = session.out, RoleServiceStub(session.channel).ListPermissions
    request = roles_pb2.ListPermissionsRequest(resource_id=resource)
    found = session.pages(method, request, "permissions", limit)
    if out.json:
        return out.document(found)
    if not found.permissions:
        return out.note("no permissions")
    columns = [Column("PERMISSION", is_id=True), Column("DESCRIPTION"), Column("CREATED")]
    out.table(
        columns,
        [
            (_told([each.ref]), each.description, time_of(each, "create_time", session.now))
            for each in found.permissions
        ],
    )
    return more(session, found.next_page_token)


def delete_permission(session: Session, permission: PermissionName) -> None:
    """Delete a permission, and take it out of every role."""
    from authsvc_client.v1 import roles_pb2
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

    request = roles_pb2.DeletePermissionRequest(ref=_ref(permission))
    answer = session.call(RoleServiceStub(session.channel).DeletePermission, request)
    if session.out.json:
        return session.out.document(answer)
    session.out.pairs((("permission", permission), ("revision", answer.revision or "")))
    return session.out.note("No role holds it any more.")


def _fields(
    permission: list[str] | None, display_name: str | None, description: str | None
) -> dict[str, Any]:
    """Fields of a role that the options name."""
    options = {
        "permissions": None if permission is None else [_ref(each) for each in permission if each],
        "display_name": display_name,
        "description": description,
    }
    return {field: value for field, value in options.items() if value is not None}


def _ref(text: str) -> "roles_pb2.PermissionRef":
    from authsvc_client.v1 import roles_pb2

    name, _, resource_id = text.partition(AT)
    if not name or not resource_id:
        raise Failure(
            f"not a permission: {text}", "NAME@RESOURCE_ID: bills.read@https://billing.internal"
        )
    return roles_pb2.PermissionRef(name=name, resource_id=resource_id)


def _told(refs: Any, resource_id: str = "") -> str:
    """Permissions as `_ref` reads them; of one resource where that is named."""
    kept = [ref for ref in refs if not resource_id or ref.resource_id == resource_id]
    return " ".join(f"{ref.name}{AT}{ref.resource_id}" for ref in kept)


def _holder(user: str, client: str) -> dict[str, Any]:
    if user and client:
        raise Failure("--user and --client exclude each other")
    return {"user_id": user} if user else {"client_id": client} if client else {}


def _assignment(role_id: str, user: str, client: str, resource: str) -> "roles_pb2.RoleAssignment":
    from authsvc_client.v1 import roles_pb2

    holder = _holder(user, client)
    if not holder:
        raise Failure("whose? --user USER_ID or --client CLIENT_ID is missing")
    return roles_pb2.RoleAssignment(role_id=role_id, resource_id=resource, **holder)


def _held_by(assignment: "roles_pb2.RoleAssignment") -> tuple[str, str]:
    """Id and kind of the holder."""
    if assignment.WhichOneof("holder") == "client_id":
        return assignment.client_id, "client"
    return assignment.user_id, "user"


def _changed(
    session: Session, answer: Any, asked: "roles_pb2.RoleAssignment", nothing: str
) -> None:
    out = session.out
    if out.json:
        return out.document(answer)
    holder, kind = _held_by(asked)
    out.pairs(
        (
            ("role_id", asked.role_id),
            (kind, holder),
            ("on resource", asked.resource_id or "all"),
            ("revision", answer.revision or ""),
        )
    )
    return None if answer.revision else out.note(nothing)


def _answer(session: Session, answer: Any) -> None:
    """Of any call that answers a role."""
    if session.out.json:
        return session.out.document(answer)
    role: roles_pb2.Role = answer.role
    return session.out.pairs(
        (
            ("role_id", role.role_id),
            ("name", role.display_name),
            ("description", role.description),
            ("permissions", [_told([ref]) for ref in role.permissions] or "none"),
            ("created", time_of(role, "create_time", session.now)),
            ("updated", time_of(role, "update_time", session.now)),
            ("etag", role.etag),
            ("revision", getattr(answer, "revision", "")),
        )
    )
