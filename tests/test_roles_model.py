"""Roles against a small model: whatever is done to them, and in whatever order it is learned."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from authsvc.errors import AuthError, Reason
from authsvc.feed.follow import Follow
from authsvc.model import HolderKind, PermissionRef, RoleAssignment
from authsvc.permissions import Permissions
from authsvc.store import sql_roles, sql_store
from authsvc.store.port import AssignmentFilter
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import State
from tests.harness import hand_clock, migrate
from tests.rig import fresh_database
from tests.store.test_contract import a_client
from tests.store.test_roles import a_role, add_permission, add_resource, add_user

KIND = MarkerKind
HOLDERS = {"alice": HolderKind.USER, "bob": HolderKind.USER, "shop": HolderKind.CLIENT}
RESOURCES, NAMES, ROLES = ("urn:a", "urn:b"), ("read", "write"), ("editor", "reader")
REFS = [PermissionRef(resource_id, name) for resource_id in RESOURCES for name in NAMES]
holders, resources, refs, roles = map(st.sampled_from, (list(HOLDERS), RESOURCES, REFS, ROLES))
limits = st.sampled_from(("", *RESOURCES))
some_refs = st.frozensets(refs)
T = TypeVar("T")

Standing = tuple[dict[str, frozenset[PermissionRef]], frozenset[tuple[str, str, str]]]


class Worker:
    """Follows the feed when it is told to."""

    def __init__(self, store: Any) -> None:
        self.state = State(120)
        self.permissions = Permissions(store.roles, self.state, self.reach)
        self.follow = Follow(
            store.feed, self.state, hand_clock(), listeners=(self.permissions.changed,)
        )

    async def reach(self, _revision: int) -> None:
        await self.follow.poll()


class RoleMachine(RuleBasedStateMachine):
    """Three holders, two resources, two roles, and two workers that lag behind as they like."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # every step waits for the disk
        self.directory = Path(tempfile.mkdtemp(prefix="authsvc-machine-", dir=memory))
        self.resources: set[str] = set()
        self.known: set[PermissionRef] = set()
        self.roles: dict[str, frozenset[PermissionRef]] = {}
        self.held: set[tuple[str, str, str]] = set()
        """Holder, role, limit."""
        self.past: list[tuple[int, Standing]] = []
        """What held from each revision on."""

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.database.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.directory)

    @initialize()
    def start(self) -> None:
        self.database = fresh_database(self.template, self.directory, hand_clock())
        self.store = sql_store(self.database)
        for name, kind in HOLDERS.items():
            if kind is HolderKind.USER:
                self.run(add_user(self.store, name))
            else:
                self.run(self.store.clients.add(a_client(name)))
        for resource_id in RESOURCES:
            self.make_resource(resource_id)
        for ref in REFS[:3]:
            self.make_permission(ref)
        self.workers = [Worker(self.store), Worker(self.store)]
        for worker in self.workers:
            self.run(worker.follow.poll())

    # --- the model ---

    def does(self, call: Coroutine[Any, Any, T], *refused: tuple[Reason, bool]) -> T | None:
        """Does it, or is refused for the first reason that holds."""
        expected = next((reason for reason, holds in refused if holds), None)
        reason, answer = None, None
        try:
            answer = self.run(call)
        except AuthError as error:
            reason = error.reason
        assert reason is expected
        return answer

    def note(self) -> None:
        """Says from which revision on the model is as it is now."""
        head = self.run(self.store.feed.read(0)).head
        self.past.append((head, (dict(self.roles), frozenset(self.held))))

    def names_at(self, revision: int, holder: str, audience: str) -> set[str]:
        held_roles, held = [state for since, state in self.past if since <= revision][-1]
        return {
            ref.name
            for who, role_id, limit in held
            if who == holder and limit in ("", audience)
            for ref in held_roles[role_id]
            if ref.resource_id == audience
        }

    # --- what is done ---

    @rule(resource_id=resources)
    def make_resource(self, resource_id: str) -> None:
        taken = resource_id in self.resources
        self.does(add_resource(self.store, resource_id), (Reason.ALREADY_EXISTS, taken))
        self.resources.add(resource_id)
        self.note()

    @rule(resource_id=resources)
    def delete_resource(self, resource_id: str) -> None:
        missing = resource_id not in self.resources
        call = self.store.resources.delete(resource_id, None)
        self.does(call, (Reason.RESOURCE_NOT_FOUND, missing))
        self.resources.discard(resource_id)
        gone = {ref for ref in self.known if ref.resource_id == resource_id}
        self.known -= gone
        self.roles = {role_id: has - gone for role_id, has in self.roles.items()}
        self.held = {each for each in self.held if each[2] != resource_id}
        self.note()

    @rule(ref=refs)
    def make_permission(self, ref: PermissionRef) -> None:
        self.does(
            add_permission(self.store, ref),
            (Reason.RESOURCE_NOT_FOUND, ref.resource_id not in self.resources),
            (Reason.ALREADY_EXISTS, ref in self.known),
        )
        if ref.resource_id in self.resources:
            self.known.add(ref)
        self.note()

    @rule(ref=refs)
    def delete_permission(self, ref: PermissionRef) -> None:
        missing = ref not in self.known
        revision = self.does(
            self.store.roles.delete_permission(ref), (Reason.PERMISSION_NOT_FOUND, missing)
        )
        if not missing:
            assert bool(revision) is any(ref in has for has in self.roles.values())
        self.known.discard(ref)
        self.roles = {role_id: has - {ref} for role_id, has in self.roles.items()}
        self.note()

    @rule(role_id=roles, permissions=some_refs)
    def make_role(self, role_id: str, permissions: frozenset[PermissionRef]) -> None:
        missing, taken = not permissions <= self.known, role_id in self.roles
        self.does(
            self.store.roles.add(a_role(role_id, *permissions)),
            (Reason.PERMISSION_NOT_FOUND, missing),
            (Reason.ALREADY_EXISTS, taken),
        )
        if not missing and not taken:
            self.roles[role_id] = permissions
        self.note()

    @rule(role_id=roles, permissions=some_refs)
    def change_role(self, role_id: str, permissions: frozenset[PermissionRef]) -> None:
        missing, unknown = not permissions <= self.known, role_id not in self.roles
        self.does(
            self.store.roles.update(role_id, None, permissions=permissions),
            (Reason.ROLE_NOT_FOUND, unknown),
            (Reason.PERMISSION_NOT_FOUND, missing),
        )
        if not missing and not unknown:
            self.roles[role_id] = permissions
        self.note()

    @rule(role_id=roles)
    def delete_role(self, role_id: str) -> None:
        unknown = role_id not in self.roles
        self.does(self.store.roles.delete(role_id, None), (Reason.ROLE_NOT_FOUND, unknown))
        self.roles.pop(role_id, None)
        self.held = {each for each in self.held if each[1] != role_id}
        self.note()

    def _names(self, role_id: str, limit: str) -> tuple[tuple[Reason, bool], ...]:
        return (
            (Reason.RESOURCE_NOT_FOUND, limit not in {"", *self.resources}),
            (Reason.ROLE_NOT_FOUND, role_id not in self.roles),
        )

    @rule(holder=holders, role_id=roles, limit=limits)
    def assign(self, holder: str, role_id: str, limit: str) -> None:
        asked = RoleAssignment(role_id, HOLDERS[holder], holder, limit)
        done = self.does(self.store.roles.assign(asked), *self._names(role_id, limit))
        if done is not None:
            assert bool(done[1]) is ((holder, role_id, limit) not in self.held)
            self.held.add((holder, role_id, limit))
        self.note()

    @rule(holder=holders, role_id=roles, limit=limits)
    def unassign(self, holder: str, role_id: str, limit: str) -> None:
        asked = RoleAssignment(role_id, HOLDERS[holder], holder, limit)
        revision = self.does(self.store.roles.unassign(asked), *self._names(role_id, limit))
        if revision is not None:
            assert bool(revision) is ((holder, role_id, limit) in self.held)
            self.held.discard((holder, role_id, limit))
        self.note()

    @rule(which=st.integers(0, 1))
    def apply(self, which: int) -> None:
        """A worker learns of what was done."""
        self.run(self.workers[which].follow.poll())

    @rule(which=st.integers(0, 1), holder=holders, audience=resources)
    def ask(self, which: int, holder: str, audience: str) -> None:
        worker = self.workers[which]
        found = self.run(worker.permissions(holder, audience))
        for revision in (found.revision, worker.state.revision):
            assert found.names == self.names_at(revision, holder, audience)

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.workers[which] = Worker(self.store)
        self.run(self.workers[which].follow.poll())

    # --- what holds ---

    @invariant()
    def what_is_at_hand_is_of_the_applied_revision(self) -> None:
        for worker in self.workers:
            for holder in HOLDERS:
                for audience in RESOURCES:
                    found = worker.permissions.at_hand(holder, audience)
                    if found is not None:
                        expected = self.names_at(worker.state.revision, holder, audience)
                        assert found.names == expected

    @invariant()
    def administrators_see_what_there_is(self) -> None:
        found = self.run(self.store.roles.page("", "", 100))
        assert {role.role_id: role.permissions for role in found} == self.roles
        held = self.run(self.store.roles.page_of_assignments(AssignmentFilter(), None, 100))
        seen = [(each.holder_id, each.role_id, each.resource_id) for each in held]
        assert seen == sorted(self.held)
        known = self.run(self.store.roles.page_of_permissions("", None, 100))
        assert [permission.ref for permission in known] == sorted(self.known)


SETTINGS = settings(
    max_examples=25,
    stateful_step_count=40,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> type[RoleMachine]:
    file = tmp_path_factory.mktemp("template") / "migrated.db"
    asyncio.run(migrate(f"sqlite+aiosqlite:///{file}"))
    RoleMachine.template = file
    return RoleMachine


def test_roles_are_as_the_model_says(machine: type[RoleMachine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


def _keeps_assignments_of_a_deleted_resource(patch: pytest.MonkeyPatch) -> None:
    real = Permissions.changed

    async def changed(self: Permissions, markers: tuple[Marker, ...]) -> None:
        await real(self, tuple(m for m in markers if m.kind is not KIND.CUTOFF_RESOURCE))

    patch.setattr(Permissions, "changed", changed)


def _limits_an_assignment_to_nothing_that_comes_back(state: RoleMachine) -> None:
    ref = REFS[0]
    state.make_role("editor", frozenset())
    state.assign("alice", "editor", ref.resource_id)
    state.ask(0, "alice", ref.resource_id)
    state.delete_resource(ref.resource_id)
    state.make_resource(ref.resource_id)
    state.make_permission(ref)
    state.change_role("editor", frozenset({ref}))
    state.apply(0)
    state.ask(0, "alice", ref.resource_id)


def _gives_a_role_its_old_uid(patch: pytest.MonkeyPatch) -> None:
    """A role that is made again is held by those who held the one before."""
    patch.setattr(sql_roles, "os", SimpleNamespace(urandom=bytes))


def _makes_a_role_again_that_was_held(state: RoleMachine) -> None:
    refs = frozenset(REFS[:1])
    state.make_role("editor", refs)
    state.assign("alice", "editor", "")
    state.ask(0, "alice", "urn:a")
    state.delete_role("editor")
    state.make_role("editor", refs)
    state.apply(0)
    state.ask(0, "alice", "urn:a")


@pytest.mark.parametrize(
    ("plant", "steps"),
    [
        (
            _keeps_assignments_of_a_deleted_resource,
            _limits_an_assignment_to_nothing_that_comes_back,
        ),
        (_gives_a_role_its_old_uid, _makes_a_role_again_that_was_held),
    ],
)
def test_the_model_sees_what_is_planted(
    machine: type[RoleMachine], plant: Any, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_planted in (False, True):
        if is_planted:
            plant(monkeypatch)
        state = machine()
        try:
            state.start()
            if not is_planted:
                steps(state)
                continue
            with pytest.raises(AssertionError):
                steps(state)
        finally:
            state.teardown()
