"""Permissions, roles and assignments, each change one transaction."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    HolderKind,
    Permission,
    PermissionRef,
    Resource,
    Role,
    RoleAssignment,
    User,
)
from authsvc.store import sql_roles
from authsvc.store.port import AssignmentFilter, Change, Holding, Store, change
from authsvc_client.core.markers import MarkerKind
from tests.store.conftest import Place
from tests.store.test_contract import a_client, outcome, refused

KIND = MarkerKind
READ, WRITE = PermissionRef("urn:a", "read"), PermissionRef("urn:a", "write")
OTHER = PermissionRef("urn:b", "read")
EVERY = AssignmentFilter()


def a_role(role_id: str = "editor", *permissions: PermissionRef, **texts: Any) -> Role:
    return Role(role_id, frozenset(permissions), 0.0, 0.0, **texts)


def to(
    holder_id: str,
    role_id: str = "editor",
    resource_id: str = "",
    kind: HolderKind = HolderKind.USER,
) -> RoleAssignment:
    return RoleAssignment(role_id, kind, holder_id, resource_id)


def to_client(client_id: str, role_id: str = "editor", resource_id: str = "") -> RoleAssignment:
    return to(client_id, role_id, resource_id, HolderKind.CLIENT)


async def add_user(store: Store, user_id: str) -> None:
    await store.users.add(User(user_id, user_id, 0.0, 0.0), "")


async def add_resource(store: Store, resource_id: str) -> None:
    await store.resources.add(Resource(resource_id, {}, 0.0, 0.0))


async def add_permission(store: Store, *refs: PermissionRef) -> None:
    for ref in refs:
        await store.roles.add_permission(Permission(ref, "", 0.0))


async def scene(store: Store) -> None:
    """Two resources, three permissions, two users and a client."""
    for resource_id in ("urn:a", "urn:b"):
        await add_resource(store, resource_id)
    await add_permission(store, READ, WRITE, OTHER)
    for user_id in ("alice", "bob"):
        await add_user(store, user_id)
    await store.clients.add(a_client("shop"))


async def holdings(store: Store, holder_id: str) -> tuple[Holding, ...]:
    revision, found = await store.roles.assignments_of(holder_id)
    assert revision == await head(store)
    return found


async def head(store: Store) -> int:
    return (await store.feed.read(0)).head


async def told(store: Store, call: Awaitable[Any]) -> tuple[Any, set[bytes]]:
    """What a change answers, and the keys of what it tells everybody."""
    before = await head(store)
    answer = await call
    page = await store.feed.read(before)
    assert page.head <= before + 1
    return answer, {marker.key for marker in page.markers}


def keys(*changes: Change) -> set[bytes]:
    return {one.key for one in changes}


def role_changed(*role_ids: str) -> set[bytes]:
    return keys(*(change(KIND.ROLE_CHANGED, role_id) for role_id in role_ids))


def holder_changed(holder_id: str) -> set[bytes]:
    return keys(change(KIND.PERMISSIONS_CHANGED, holder_id))


async def audited(place: Place) -> list[tuple[str, str, str, int]]:
    """Subject, client, object and revision of each change, the newest last."""
    rows = await place.sql(
        "SELECT subject, client_id, object_id, revision FROM audit ORDER BY create_time"
    )
    return [tuple(row) for row in rows]


async def count(place: Place, table: str) -> int:
    return int((await place.sql(f"SELECT count(*) FROM {table}"))[0][0])


# --- roles ---


async def test_role_is_kept_as_it_is_made_and_tells_nobody(place: Place, store: Store) -> None:
    await scene(store)
    asked = a_role("editor", READ, OTHER, display_name="Ä", description="Edits")
    made, markers = await told(store, store.roles.add(asked))
    assert made == replace(asked, create_time=made.create_time, update_time=made.update_time)
    assert 0 < made.create_time <= made.update_time
    assert await store.roles.get("editor") == made
    assert markers == set()
    assert (await audited(place))[-1] == ("", "", "editor", 0)
    bare = await store.roles.add(a_role("bare"))
    assert await store.roles.get("bare") == bare
    assert await store.roles.get("Bare") is None
    assert await outcome(store.roles.add(a_role("editor"))) is Reason.ALREADY_EXISTS
    assert await store.roles.get("editor") == made


async def test_role_of_what_is_not_there_is_refused_and_named(store: Store) -> None:
    await scene(store)
    none = PermissionRef("urn:b", "write")
    made = await store.roles.add(a_role("editor", READ))
    for call in (
        store.roles.add(a_role("new", READ, none)),
        store.roles.update("editor", None, permissions=frozenset({READ, none})),
        store.roles.delete_permission(none),
    ):
        error = await refused(call)
        assert error.reason is Reason.PERMISSION_NOT_FOUND
        assert error.metadata == {"resource_id": "urn:b", "name": "write"}
    assert await store.roles.get("new") is None
    assert await store.roles.get("editor") == made


async def test_update_changes_what_is_given_and_is_one_row_of_the_feed(
    place: Place, store: Store
) -> None:
    await scene(store)
    role = await store.roles.add(a_role("editor", READ, display_name="E", description="d"))
    changes: list[dict[str, Any]] = [
        {"display_name": "F"},
        {"description": ""},
        {"permissions": frozenset({WRITE, OTHER})},
        {"permissions": frozenset()},
        {"display_name": "", "permissions": frozenset({READ})},
    ]
    for fields in changes:
        (changed, revision), markers = await told(
            store, store.roles.update("editor", role.version, **fields)
        )
        expected = replace(role, **fields, version=role.version + 1)
        role = replace(expected, update_time=changed.update_time)
        assert changed == role == await store.roles.get("editor")
        assert changed.update_time >= changed.create_time
        assert markers == role_changed("editor")
        assert revision == await head(store)
        assert (await audited(place))[-1] == ("", "", "editor", revision)
    before = await head(store)
    for version in (1, role.version + 1):
        error = await refused(store.roles.update("editor", version, display_name="x"))
        assert error.reason is Reason.ETAG_MISMATCH
        assert await outcome(store.roles.delete("editor", version)) is Reason.ETAG_MISMATCH
    for call in (store.roles.update("none", None), store.roles.delete("none", None)):
        assert await outcome(call) is Reason.ROLE_NOT_FOUND
    assert await head(store) == before
    assert await store.roles.get("editor") == role


async def test_deleted_role_is_taken_from_all_and_stays_gone(place: Place, store: Store) -> None:
    await scene(store)
    await store.roles.add(a_role("editor", READ))
    await store.roles.add(a_role("kept", READ))
    for asked in (to("alice"), to("bob", resource_id="urn:a"), to_client("shop")):
        await store.roles.assign(asked)
    await store.roles.assign(to("alice", "kept"))
    (uid,) = {held.role_uid for held in await holdings(store, "bob")}
    revision, markers = await told(store, store.roles.delete("editor", 1))
    assert markers == role_changed("editor")
    assert revision == await head(store)
    assert [held.role_id for held in await holdings(store, "alice")] == ["kept"]
    assert await count(place, "role_assignment") == await count(place, "role_permission") == 1
    await store.roles.add(a_role("editor", WRITE))
    assert (await store.roles.role_by_uid(uid))[1] is None
    assert await holdings(store, "bob") == ()
    await store.roles.assign(to("bob"))
    (held,) = await holdings(store, "bob")
    assert held.role_uid != uid
    assert (await store.roles.role_by_uid(held.role_uid))[1] == await store.roles.get("editor")


async def test_roles_in_pages_and_by_resource(store: Store) -> None:
    await scene(store)
    wanted = {"a": (READ, WRITE, OTHER), "b": (), "c": (OTHER,), "d": (WRITE,)}
    made = [await store.roles.add(a_role(name, *refs)) for name, refs in wanted.items()]
    assert await store.roles.page("", "", 10) == tuple(made)
    assert await store.roles.page("", "a", 2) == tuple(made[1:3])
    assert await store.roles.page("urn:a", "", 10) == (made[0], made[3])
    assert await store.roles.page("urn:b", "a", 1) == (made[2],)
    assert await store.roles.page("urn:c", "", 1) == ()


# --- permissions ---


async def test_permission_is_kept_and_has_a_resource(place: Place, store: Store) -> None:
    await add_resource(store, "urn:a")
    asked = Permission(READ, "Reads", 0.0)
    made, markers = await told(store, store.roles.add_permission(asked))
    assert made == replace(asked, create_time=made.create_time)
    assert made.create_time > 0
    assert await store.roles.page_of_permissions("", None, 9) == (made,)
    assert markers == set()
    assert (await audited(place))[-1] == ("", "", "urn:a read", 0)
    assert await outcome(store.roles.add_permission(asked)) is Reason.ALREADY_EXISTS
    nowhere = store.roles.add_permission(replace(asked, ref=OTHER))
    assert await outcome(nowhere) is Reason.RESOURCE_NOT_FOUND


async def test_permissions_in_pages_and_by_resource(store: Store) -> None:
    await scene(store)

    async def page(resource_id: str, after: PermissionRef | None, limit: int) -> list[Any]:
        found = await store.roles.page_of_permissions(resource_id, after, limit)
        return [each.ref for each in found]

    assert await page("", None, 9) == [READ, WRITE, OTHER]
    assert await page("", READ, 1) == [WRITE]
    assert await page("", WRITE, 9) == [OTHER]
    assert await page("urn:b", None, 9) == [OTHER]
    assert await page("urn:a", READ, 9) == [WRITE]


async def test_deleted_permission_is_out_of_every_role(place: Place, store: Store) -> None:
    await scene(store)
    both = await store.roles.add(a_role("both", READ, WRITE))
    only = await store.roles.add(a_role("only", READ))
    without = await store.roles.add(a_role("without", OTHER))
    revision, markers = await told(store, store.roles.delete_permission(READ))
    assert markers == role_changed("both", "only")
    assert revision == await head(store)
    assert (await audited(place))[-1] == ("", "", "urn:a read", revision)
    for before, left in ((both, {WRITE}), (only, set())):
        after = await store.roles.get(before.role_id)
        assert after is not None
        assert after.permissions == left
        assert after.version == before.version + 1
    assert await store.roles.get("without") == without
    assert await outcome(store.roles.delete_permission(READ)) is Reason.PERMISSION_NOT_FOUND
    await store.roles.delete("without", None)
    assert await told(store, store.roles.delete_permission(OTHER)) == (0, set())
    assert (await audited(place))[-1] == ("", "", "urn:b read", 0)
    await add_permission(store, READ)
    again = await store.roles.get("both")
    assert again is not None
    assert again.permissions == {WRITE}


async def test_deleted_resource_takes_along_what_names_it(place: Place, store: Store) -> None:
    await scene(store)
    for role in (a_role("wide", READ, OTHER), a_role("narrow", WRITE), a_role("else", OTHER)):
        await store.roles.add(role)
    for asked in (
        to("alice", "wide"),
        to("alice", "wide", "urn:a"),
        to("bob", "else", "urn:a"),
        to("bob", "else", "urn:b"),
    ):
        await store.roles.assign(asked)
    _, markers = await told(store, store.resources.delete("urn:a", None))
    assert markers == role_changed("wide", "narrow") | keys(
        change(KIND.CUTOFF_RESOURCE, "urn:a"), change(KIND.RESOURCE_CHANGED)
    )
    assert (await audited(place))[-1][2] == "urn:a"
    left = await store.roles.page_of_permissions("", None, 9)
    assert [permission.ref for permission in left] == [OTHER]
    wide = await store.roles.get("wide")
    assert wide is not None
    assert wide.permissions == {OTHER}
    assert wide.version == 2
    found = await store.roles.page_of_assignments(EVERY, None, 9)
    assert [(held.holder_id, held.role_id, held.resource_id) for held in found] == [
        ("alice", "wide", ""),
        ("bob", "else", "urn:b"),
    ]
    await add_resource(store, "urn:a")
    await add_permission(store, READ)
    assert await count(place, "role_permission") == 2


# --- assignments ---


async def test_assignment_is_made_once_and_tells_of_its_holder(place: Place, store: Store) -> None:
    await scene(store)
    await store.roles.add(a_role("editor", READ))
    for asked, touched in (
        (to("alice"), ("alice", "", "editor")),
        (to("alice", resource_id="urn:b"), ("alice", "", "editor")),
        (to_client("shop"), ("shop", "shop", "editor")),
    ):
        (held, revision), markers = await told(store, store.roles.assign(asked))
        assert held == replace(asked, create_time=held.create_time)
        assert held.create_time > 0
        assert markers == holder_changed(asked.holder_id)
        assert revision == await head(store)
        assert (await audited(place))[-1] == (*touched, revision)
        rows = await count(place, "audit")
        assert await told(store, store.roles.assign(asked)) == ((held, 0), set())
        assert await count(place, "audit") == rows
    assert len(await holdings(store, "alice")) == 2
    for _ in range(2):
        revision, markers = await told(store, store.roles.unassign(to("alice")))
        assert bool(revision) is bool(markers)
        assert markers in (holder_changed("alice"), set())
    assert revision == 0
    (left,) = await holdings(store, "alice")
    assert left.resource_id == "urn:b"


@pytest.mark.parametrize("what", ["assign", "unassign"])
async def test_assignment_names_what_is_there(store: Store, what: str) -> None:
    await scene(store)
    await store.roles.add(a_role("editor", READ))
    call: Callable[[RoleAssignment], Awaitable[Any]] = getattr(store.roles, what)
    before = await head(store)
    for asked, reason in (
        (to("alice", "none"), Reason.ROLE_NOT_FOUND),
        (to("shop"), Reason.USER_NOT_FOUND),
        (to_client("alice"), Reason.CLIENT_NOT_FOUND),
        (to("alice", resource_id="urn:c"), Reason.RESOURCE_NOT_FOUND),
    ):
        assert await outcome(call(asked)) is reason
    assert await head(store) == before


async def test_assignments_in_pages_and_by_each_filter(store: Store) -> None:
    await scene(store)
    for name in ("b", "a"):  # their uids are in an order of their own
        await store.roles.add(a_role(name, READ))
    every = [
        to("alice", "a"),
        to("alice", "a", "urn:a"),
        to("alice", "b", "urn:b"),
        to("bob", "b"),
        to_client("shop", "a", "urn:b"),
    ]
    for asked in reversed(every):
        await store.roles.assign(asked)

    async def page(wanted: AssignmentFilter, after: Any = None, limit: int = 9) -> list[Any]:
        found = await store.roles.page_of_assignments(wanted, after, limit)
        return [replace(held, create_time=0.0) for held in found]

    assert await page(EVERY) == every
    for number, before in enumerate(every):
        place = (before.holder_id, before.role_id, before.resource_id)
        assert await page(EVERY, place, 2) == every[number + 1 : number + 3]
    assert await page(AssignmentFilter(HolderKind.USER, "alice")) == every[:3]
    assert await page(AssignmentFilter(HolderKind.CLIENT, "alice")) == []
    assert await page(AssignmentFilter(HolderKind.CLIENT, "shop")) == every[4:]
    assert await page(AssignmentFilter(role_id="b")) == every[2:4]
    assert await page(AssignmentFilter(resource_id="urn:b")) == [every[2], every[4]]
    narrow = AssignmentFilter(HolderKind.USER, "alice", "b", "urn:b")
    assert await page(narrow) == [every[2]]
    assert await page(narrow, ("alice", "b", "urn:b")) == []


async def test_deleted_client_holds_nothing_more(place: Place, store: Store) -> None:
    await scene(store)
    await store.clients.add(a_client("idle"))
    await store.roles.add(a_role())
    await store.roles.assign(to_client("shop"))
    _, markers = await told(store, store.clients.delete("shop", None))
    assert holder_changed("shop") <= markers
    assert await count(place, "role_assignment") == 0
    _, markers = await told(store, store.clients.delete("idle", None))
    assert not holder_changed("idle") & markers


@pytest.mark.parametrize("piece", [300, 1000, 2000])
async def test_change_of_a_role_that_a_thousand_hold_is_one_row(
    place: Place, store: Store, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_roles, "PIECE", piece)
    await scene(store)
    await store.roles.add(a_role("editor", READ))
    await store.roles.assign(to("alice"))
    (uid,) = {held.role_uid for held in await holdings(store, "alice")}
    await place.sql(
        "INSERT INTO role_assignment (holder_id, role_uid, resource_id, holder_kind, create_time)"
        f" SELECT 'u' || n, '{uid}', '', 'user', 0 FROM"
        " (WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 999)"
        " SELECT n FROM c) AS numbers"
    )
    assert await count(place, "role_assignment") == 1000
    for call in (
        store.roles.update("editor", None, permissions=frozenset({READ, WRITE})),
        store.roles.delete_permission(READ),
        store.roles.delete("editor", None),
    ):
        rows = await count(place, "feed")
        _, markers = await told(store, call)
        assert markers == role_changed("editor")
        assert await count(place, "feed") == rows + 1
    assert await count(place, "role_assignment") == 0


# --- at once ---


async def _all(*calls: Awaitable[Any]) -> list[Any]:
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert all(not isinstance(each, Exception) or isinstance(each, AuthError) for each in found)
    return [each.reason if isinstance(each, AuthError) else each for each in found]


async def test_of_the_same_at_once_one_is_written(place: Place) -> None:
    stores = [place.open() for _ in range(3)]
    await scene(stores[0])
    made = await _all(*(store.roles.add(a_role("editor", READ)) for store in stores))
    assert made.count(Reason.ALREADY_EXISTS) == 2
    added = await _all(*(store.roles.assign(to("alice")) for store in stores * 3))
    assert sorted(revision == 0 for _, revision in added) == [False] + [True] * 8
    assert len({held for held, _ in added}) == 1
    taken = await _all(*(store.roles.unassign(to("alice")) for store in stores * 3))
    assert sorted(map(bool, taken)) == [False] * 8 + [True]
    gone = await _all(*(store.roles.delete("editor", 1) for store in stores))
    assert gone.count(Reason.ROLE_NOT_FOUND) == 2


async def test_nothing_is_left_behind_by_whatever_is_deleted_meanwhile(place: Place) -> None:
    """Of each pair the second may come before, between and after the first."""
    stores = [place.open() for _ in range(3)]
    store = stores[0]
    await scene(store)
    for number in range(12):
        name, user = f"r{number}", f"u{number}"
        limit = PermissionRef(f"urn:{number}", "read")
        await add_resource(store, limit.resource_id)
        await add_permission(store, limit)
        await add_user(store, user)
        await store.clients.add(a_client(name))
        await store.roles.add(a_role(name, READ))
        first = [
            stores[0].roles.assign(to("alice", name)),
            stores[1].roles.assign(to_client(name, name)),
            stores[2].roles.assign(to(user, name, limit.resource_id)),
            stores[0].roles.update(name, None, permissions=frozenset({WRITE, limit})),
            stores[1].roles.add(a_role(f"{name}.new", limit)),
            stores[2].roles.add_permission(Permission(limit._replace(name="write"), "", 0.0)),
        ]
        second: list[Awaitable[Any]] = [
            stores[0].clients.delete(name, None),
            stores[1].users.delete(user, None),
            stores[2].resources.delete(limit.resource_id, None),
        ]
        if number % 2:
            second.append(stores[0].roles.delete(name, None))
        if number % 3 == 0:
            second.append(stores[1].roles.delete_permission(limit))
        calls = [*first, *second] if number % 4 < 2 else [*second, *first]
        found = await _all(*calls)
        assert Reason.STORE_UNAVAILABLE not in found
        assert await _orphans(place) == [], found


async def _orphans(place: Place) -> list[Any]:
    return await place.sql(
        "SELECT 'permission', resource_id, name FROM permission"
        " WHERE resource_id NOT IN (SELECT resource_id FROM resource)"
        " UNION ALL SELECT 'role_permission', role_uid, name FROM role_permission AS rp"
        " WHERE role_uid NOT IN (SELECT role_uid FROM role) OR NOT EXISTS (SELECT 1"
        " FROM permission AS p WHERE p.resource_id = rp.resource_id AND p.name = rp.name)"
        " UNION ALL SELECT 'role_assignment', holder_id, role_uid FROM role_assignment"
        " WHERE role_uid NOT IN (SELECT role_uid FROM role)"
        " OR resource_id NOT IN (SELECT resource_id FROM resource UNION SELECT '')"
        ' OR holder_id NOT IN (SELECT client_id FROM client UNION SELECT user_id FROM "user")'
    )
