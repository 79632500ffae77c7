"""RoleService over the wire."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from authsvc.keys.secrets import new_id
from authsvc_client.v1 import resources_pb2, roles_pb2, users_pb2
from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
from tests.harness import ADMIN, Running, build, failure, outcome, reason

if TYPE_CHECKING:  # a name of the type stubs alone
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceAsyncStub

LONG = "urn:" + "x" * 508
"""As long as the id of a resource can be."""


def _roles(server: Running) -> "RoleServiceAsyncStub":
    return RoleServiceStub(server.channel(ADMIN))


def _ref(resource_id: str, name: str) -> dict[str, str]:
    return {"resource_id": resource_id, "name": name}


async def _permission(server: Running, resource_id: str, *names: str) -> list[dict[str, str]]:
    """Creates permissions; answers what names them."""
    refs = [_ref(resource_id, name) for name in names]
    for ref in refs:
        await _create_permission(server, ref=ref)
    return refs


async def _create_permission(server: Running, **fields: Any) -> roles_pb2.Permission:
    request = build(roles_pb2.CreatePermissionRequest, permission=fields)
    return (await _roles(server).CreatePermission(request)).permission


async def _delete_permission(server: Running, ref: dict[str, str]) -> int:
    request = build(roles_pb2.DeletePermissionRequest, ref=ref)
    return (await _roles(server).DeletePermission(request)).revision


async def _create(server: Running, role_id: str, **fields: Any) -> roles_pb2.Role:
    request = build(roles_pb2.CreateRoleRequest, role={"role_id": role_id} | fields)
    return (await _roles(server).CreateRole(request)).role


async def _get(server: Running, role_id: str) -> roles_pb2.Role:
    return (await _roles(server).GetRole(roles_pb2.GetRoleRequest(role_id=role_id))).role


async def _update(
    server: Running, role_id: str, *paths: str, **fields: Any
) -> roles_pb2.UpdateRoleResponse:
    request = build(
        roles_pb2.UpdateRoleRequest,
        role={"role_id": role_id} | fields,
        update_mask={"paths": paths},
    )
    return await _roles(server).UpdateRole(request)


async def _delete(server: Running, role_id: str, etag: str = "") -> int:
    request = roles_pb2.DeleteRoleRequest(role_id=role_id, etag=etag)
    return (await _roles(server).DeleteRole(request)).revision


async def _assign(server: Running, **fields: Any) -> roles_pb2.AssignRoleResponse:
    return await _roles(server).AssignRole(
        build(roles_pb2.AssignRoleRequest, role_assignment=fields)
    )


async def _unassign(server: Running, **fields: Any) -> int:
    request = build(roles_pb2.UnassignRoleRequest, role_assignment=fields)
    return (await _roles(server).UnassignRole(request)).revision


async def _user(server: Running) -> str:
    user = users_pb2.User(username=f"user-{new_id()}")
    made = await server.users().CreateUser(users_pb2.CreateUserRequest(user=user))
    return made.user.user_id


async def _pages(
    call: Callable[..., Awaitable[Any]], request: type[Any], **fields: Any
) -> list[Any]:
    """Every item of a list, one a page."""
    found: list[Any] = []
    token = ""
    while True:
        page = await call(request(page_size=1, page_token=token, **fields))
        (items,) = [value for field, value in page.ListFields() if field.is_repeated] or [[]]
        assert len(items) <= 1
        found += items
        token = page.next_page_token
        if not token:
            return found


# --- roles ---


async def test_role_is_kept_as_it_is_said(server: Running) -> None:
    await server.resource("urn:kept")
    refs = await _permission(server, "urn:kept", "b", "a/1:x.y_Z-")
    made = await _create(
        server,
        "kept.role_1-",
        display_name="Rölle",
        description="For tests",
        permissions=refs,
        etag="99",
        create_time={"seconds": 1},
    )
    assert await _get(server, "kept.role_1-") == made
    assert made.etag == "1"
    assert 1 < made.create_time.seconds <= made.update_time.seconds
    assert [ref.name for ref in made.permissions] == ["a/1:x.y_Z-", "b"]
    assert (made.display_name, made.description) == ("Rölle", "For tests")
    bare = await _create(server, "x" * 64)
    assert not bare.permissions
    assert await reason(_create(server, "kept.role_1-")) == "ALREADY_EXISTS"
    refused = await failure(_create(server, "kept.role_1-"))
    assert refused.metadata == {"field": "role.role_id"}
    assert await reason(_get(server, "none")) == "ROLE_NOT_FOUND"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"role_id": ""}, "role.role_id"),
        ({"role_id": "Upper"}, "role.role_id"),
        ({"role_id": "a b"}, "role.role_id"),
        ({"role_id": "ä"}, "role.role_id"),
        ({"role_id": "new\n"}, "role.role_id"),
        ({"role_id": "a/b"}, "role.role_id"),
        ({"permissions": [_ref("urn:x", "")]}, "role.permissions[0].name"),
        ({"permissions": [_ref("", "x")]}, "role.permissions[0].resource_id"),
        ({"permissions": [_ref("urn:x", "x")] * 2}, "role.permissions"),
        ({"permissions": [_ref("urn:x", str(n)) for n in range(257)]}, "role.permissions"),
    ],
    ids=str,
)
async def test_field_that_is_wrong_is_named(
    server: Running, fields: dict[str, Any], wrong: str
) -> None:
    refused = await failure(_create(server, **{"role_id": "wrong"} | fields))
    assert (refused.reason, refused.fields) == ("FIELD_INVALID", (wrong,))
    assert await reason(_get(server, "wrong")) == "ROLE_NOT_FOUND"


async def test_role_holds_256_permissions_and_all_are_found(server: Running) -> None:
    await server.resource("urn:many")
    refs = await _permission(server, "urn:many", *(f"p{number:03}" for number in range(256)))
    made = await _create(server, "many", permissions=refs)
    assert len(made.permissions) == 256
    assert await _get(server, "many") == made


async def test_permission_that_is_not_there_is_named(server: Running) -> None:
    await server.resource("urn:absent")
    refs = await _permission(server, "urn:absent", "there")
    made = await _create(server, "absent", permissions=refs)
    both = [*refs, _ref("urn:absent", "missing")]
    for call in (
        _create(server, "absent2", permissions=both),
        _update(server, "absent", "permissions", permissions=both),
        _delete_permission(server, both[1]),
    ):
        refused = await failure(call)
        assert refused.reason == "PERMISSION_NOT_FOUND"
        assert refused.metadata == {"resource_id": "urn:absent", "name": "missing"}
    assert await _get(server, "absent") == made


async def test_what_the_mask_names_is_changed_and_nothing_else(server: Running) -> None:
    await server.resource("urn:mask")
    refs = await _permission(server, "urn:mask", "a", "b")
    expected = await _create(server, "mask", display_name="Before", permissions=refs[:1])
    asked: dict[str, Any] = {
        "display_name": "After",
        "description": "What",
        "permissions": refs[1:],
    }
    revisions = [server.app.state.revision]
    for paths in (["display_name"], ["description", "permissions"], ["permissions"]):
        answer = await _update(server, "mask", *paths, etag=expected.etag, **asked)
        wanted = build(roles_pb2.Role, **{path: asked[path] for path in paths})
        if "permissions" in paths:
            expected.ClearField("permissions")
        expected.MergeFrom(wanted)
        expected.etag = str(int(expected.etag) + 1)
        expected.update_time.CopyFrom(answer.role.update_time)
        assert answer.role == expected == await _get(server, "mask")
        assert server.app.state.revision >= answer.revision > revisions[-1]
        revisions.append(answer.revision)
    bare = (await _update(server, "mask", *asked)).role
    assert (bare.display_name, bare.description, list(bare.permissions)) == ("", "", [])


async def test_changes_that_are_refused_change_nothing(server: Running) -> None:
    made = await _create(server, "firm", display_name="Firm")
    for paths, fields, told in (
        ([], {"display_name": "x"}, "FIELD_INVALID"),
        (["nothing"], {}, "FIELD_INVALID"),
        (["role_id"], {}, "FIELD_INVALID"),
        (["etag"], {}, "FIELD_INVALID"),
        (["permissions.name"], {}, "FIELD_INVALID"),
        (["display_name", "create_time"], {}, "FIELD_INVALID"),
        (["display_name"], {"etag": "2"}, "ETAG_MISMATCH"),
        (["display_name"], {"etag": "x"}, "ETAG_MISMATCH"),
        (["permissions"], {"permissions": [_ref("urn:none", "x")]}, "PERMISSION_NOT_FOUND"),
    ):
        head = await server.head()
        assert await reason(_update(server, "firm", *paths, **fields)) == told, (paths, fields)
        assert await server.head() == head
        assert await _get(server, "firm") == made
    assert await reason(_update(server, "none", "display_name")) == "ROLE_NOT_FOUND"
    assert await reason(_delete(server, "none")) == "ROLE_NOT_FOUND"
    assert await reason(_delete(server, "firm", "2")) == "ETAG_MISMATCH"
    revision = await _delete(server, "firm", "1")
    assert server.app.state.revision >= revision > 0
    assert await reason(_get(server, "firm")) == "ROLE_NOT_FOUND"


async def test_of_changes_at_once_each_counts(server: Running) -> None:
    await _create(server, "busy")
    answers = await asyncio.gather(
        *(_update(server, "busy", "display_name", display_name=str(n)) for n in range(20))
    )
    assert sorted(int(answer.role.etag) for answer in answers) == list(range(2, 22))
    found = await asyncio.gather(
        *(outcome(_update(server, "busy", "description", etag="21")) for _ in range(5))
    )
    assert sorted(found) == ["ETAG_MISMATCH"] * 4 + ["OK"]


async def test_roles_are_listed_by_resource_and_in_pages(server: Running) -> None:
    await server.resource("urn:listed")
    await server.resource("urn:unlisted")
    here = await _permission(server, "urn:listed", "a", "b")
    there = await _permission(server, "urn:unlisted", "a")
    for role_id, refs in (("l3", here), ("l1", here[:1] + there), ("l2", there)):
        await _create(server, role_id, permissions=refs)
    call = _roles(server).ListRoles
    found = await _pages(call, roles_pb2.ListRolesRequest, resource_id="urn:listed")
    assert found == [await _get(server, "l1"), await _get(server, "l3")]
    every = await _pages(call, roles_pb2.ListRolesRequest)
    assert [role.role_id for role in every] == sorted(role.role_id for role in every)
    assert {"l1", "l2", "l3"} <= {role.role_id for role in every}
    page = await call(roles_pb2.ListRolesRequest(page_size=1))
    for request in (
        roles_pb2.ListRolesRequest(page_token=page.next_page_token, resource_id="urn:listed"),
        roles_pb2.ListRolesRequest(page_token="x"),
    ):
        assert await reason(call(request)) == "PAGE_TOKEN_INVALID"
    other = roles_pb2.ListPermissionsRequest(page_token=page.next_page_token)
    assert await reason(_roles(server).ListPermissions(other)) == "PAGE_TOKEN_INVALID"


# --- permissions ---


async def test_permission_is_of_a_resource_and_made_once(server: Running) -> None:
    await server.resource("urn:permits")
    ref = _ref("urn:permits", "Az09._:/-" + "x" * 119)
    made = await _create_permission(server, ref=ref, description="Ä", create_time={"seconds": 1})
    assert made.create_time.seconds > 1
    assert (made.ref.resource_id, made.ref.name) == (ref["resource_id"], ref["name"])
    assert made.description == "Ä"
    request = roles_pb2.ListPermissionsRequest(resource_id="urn:permits")
    assert (await _roles(server).ListPermissions(request)).permissions == [made]
    refused = await failure(_create_permission(server, ref=ref))
    assert (refused.reason, refused.metadata) == ("ALREADY_EXISTS", {"field": "permission.ref"})
    nowhere = _create_permission(server, ref=_ref("urn:nowhere", "x"))
    assert await reason(nowhere) == "RESOURCE_NOT_FOUND"
    for name in ("two words", "ä", "a\nb", "a\n", 'quo"te', "a,b", "a*"):
        refused = await failure(_create_permission(server, ref=_ref("urn:permits", name)))
        assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("permission.ref.name",))
    assert await _delete_permission(server, ref) == 0
    assert await reason(_delete_permission(server, ref)) == "PERMISSION_NOT_FOUND"


async def test_deleted_permission_is_out_of_every_role(server: Running) -> None:
    await server.resource("urn:shrinks")
    refs = await _permission(server, "urn:shrinks", "a", "b")
    for role_id in ("shrinks1", "shrinks2"):
        await _create(server, role_id, permissions=refs)
    revision = await _delete_permission(server, refs[0])
    assert server.app.state.revision >= revision > 0
    for role_id in ("shrinks1", "shrinks2"):
        role = await _get(server, role_id)
        assert [ref.name for ref in role.permissions] == ["b"]
        assert role.etag == "2"
    delete = resources_pb2.DeleteResourceRequest(resource_id="urn:shrinks")
    await server.resources().DeleteResource(delete)
    assert not (await _get(server, "shrinks1")).permissions
    request = roles_pb2.ListPermissionsRequest(resource_id="urn:shrinks")
    assert not (await _roles(server).ListPermissions(request)).permissions


async def test_lists_turn_pages_behind_the_longest_ids(server: Running) -> None:
    await server.resource(LONG)
    names = [f"{number}" + "x" * 127 for number in range(3)]
    refs = await _permission(server, LONG, *names)
    roles = _roles(server)
    found = await _pages(roles.ListPermissions, roles_pb2.ListPermissionsRequest, resource_id=LONG)
    assert [permission.ref.name for permission in found] == names
    user_id = await _user(server)
    role_ids = [f"{number}" + "x" * 63 for number in range(3)]
    for role_id in role_ids:
        await _create(server, role_id, permissions=refs)
        await _assign(server, role_id=role_id, user_id=user_id, resource_id=LONG)
    found = await _pages(
        roles.ListRoleAssignments, roles_pb2.ListRoleAssignmentsRequest, user_id=user_id
    )
    assert [held.role_id for held in found] == role_ids


# --- assignments ---


async def test_role_is_given_once_and_taken_once(server: Running) -> None:
    await server.resource("urn:given")
    await _create(server, "given", permissions=await _permission(server, "urn:given", "a"))
    user_id = await _user(server)
    client = await server.member("holder")
    for holder in ({"user_id": user_id}, {"client_id": client.client_id}):
        for limit in ("", "urn:given"):
            asked: dict[str, Any] = {"role_id": "given", "resource_id": limit} | holder
            first = await _assign(server, **asked)
            assert server.app.state.revision >= first.revision > 0
            held = first.role_assignment
            assert held.create_time.seconds > 1
            assert held == build(roles_pb2.RoleAssignment, **asked, create_time=held.create_time)
            again = await _assign(server, **asked, create_time={"seconds": 1})
            assert (again.role_assignment, again.revision) == (held, 0)
        request = build(roles_pb2.ListRoleAssignmentsRequest, **holder)
        found = await _roles(server).ListRoleAssignments(request)
        assert [one.resource_id for one in found.role_assignments] == ["", "urn:given"]
        assert await _unassign(server, role_id="given", **holder) > first.revision
        assert await _unassign(server, role_id="given", **holder) == 0
        found = await _roles(server).ListRoleAssignments(request)
        assert [one.resource_id for one in found.role_assignments] == ["urn:given"]


async def test_assignment_names_what_is_there(server: Running) -> None:
    await _create(server, "named")
    user_id = await _user(server)
    client = await server.member("named")
    for call in (_assign, _unassign):
        for fields, told in (
            ({"role_id": "none", "user_id": user_id}, "ROLE_NOT_FOUND"),
            ({"role_id": "named", "user_id": client.client_id}, "USER_NOT_FOUND"),
            ({"role_id": "named", "client_id": user_id}, "CLIENT_NOT_FOUND"),
            (
                {"role_id": "named", "user_id": user_id, "resource_id": "urn:none"},
                "RESOURCE_NOT_FOUND",
            ),
        ):
            head = await server.head()
            assert await reason(call(server, **fields)) == told
            assert await server.head() == head
        for wrong in ({}, {"user_id": ""}, {"client_id": ""}):
            refused = await failure(call(server, role_id="named", **wrong))
            assert refused.fields == ("role_assignment.holder",)


async def test_assignments_are_listed_by_each_filter(server: Running) -> None:
    await server.resource("urn:filter")
    for role_id in ("filter1", "filter2"):
        await _create(server, role_id)
    user_id = await _user(server)
    client = await server.member("filtered")
    mine = [
        {"role_id": "filter1", "user_id": user_id},
        {"role_id": "filter1", "user_id": user_id, "resource_id": "urn:filter"},
        {"role_id": "filter2", "user_id": user_id},
    ]
    its = {"role_id": "filter1", "client_id": client.client_id, "resource_id": "urn:filter"}
    for fields in (*mine, its):
        await _assign(server, **fields)

    async def listed(**wanted: Any) -> list[Any]:
        found = await _pages(
            _roles(server).ListRoleAssignments, roles_pb2.ListRoleAssignmentsRequest, **wanted
        )
        for held in found:
            held.ClearField("create_time")
        return found

    expected = [build(roles_pb2.RoleAssignment, **fields) for fields in mine]
    assert await listed(user_id=user_id) == expected
    assert await listed(user_id=user_id, role_id="filter1") == expected[:2]
    assert (
        await listed(user_id=user_id, role_id="filter1", resource_id="urn:filter")
        == (expected[1:2])
    )
    last = build(roles_pb2.RoleAssignment, **its)
    assert await listed(client_id=client.client_id) == [last]
    assert sorted(held.WhichOneof("holder") for held in await listed(resource_id="urn:filter")) == [
        "client_id",
        "user_id",
    ]
    assert await listed(role_id="none") == []
    assert await listed(client_id=user_id) == []
    assert last in await listed()
    page = await _roles(server).ListRoleAssignments(
        roles_pb2.ListRoleAssignmentsRequest(page_size=1, user_id=user_id)
    )
    other = roles_pb2.ListRoleAssignmentsRequest(
        page_size=1, client_id=user_id, page_token=page.next_page_token
    )
    call = _roles(server).ListRoleAssignments(other)
    assert await reason(call) == "PAGE_TOKEN_INVALID"


async def test_what_was_held_goes_with_its_role_and_with_its_holder(server: Running) -> None:
    await _create(server, "gone")
    user_id = await _user(server)
    await _assign(server, role_id="gone", user_id=user_id)
    await _delete(server, "gone")
    await _create(server, "gone")
    listing = roles_pb2.ListRoleAssignmentsRequest(user_id=user_id)
    assert not (await _roles(server).ListRoleAssignments(listing)).role_assignments
    await _assign(server, role_id="gone", user_id=user_id)
    await server.users().DeleteUser(users_pb2.DeleteUserRequest(user_id=user_id))
    assert not (await _roles(server).ListRoleAssignments(listing)).role_assignments


async def test_roles_on_each_database(at: Running) -> None:
    await at.resource("urn:each")
    refs = await _permission(at, "urn:each", "a", "b")
    await _create(at, "each", permissions=refs)
    user_id = await _user(at)
    revision = (await _assign(at, role_id="each", user_id=user_id)).revision
    assert (await _update(at, "each", "permissions", permissions=refs[1:])).revision > revision
    assert await _delete_permission(at, refs[1]) > revision
    listing = roles_pb2.ListRoleAssignmentsRequest(role_id="each")
    (held,) = (await _roles(at).ListRoleAssignments(listing)).role_assignments
    assert held.user_id == user_id
    assert await _unassign(at, role_id="each", user_id=user_id) > revision
    assert await _delete(at, "each", "3") > revision
