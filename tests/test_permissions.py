"""Permissions at hand: what they are made of, what they cost, and that no change is missed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.feed.follow import Follow
from authsvc.permissions import TRIES, Permissions
from authsvc.store import sql_store
from authsvc.store.port import ANY_KEY, AssignmentFilter, change
from authsvc.store.reads import READS_MAX, Reads
from authsvc.store.sql import Database
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from authsvc_client.core.state import State
from tests.clocks import HandClock
from tests.harness import migrated
from tests.rig import Step, Stepped, no_step
from tests.store.test_contract import a_client
from tests.store.test_roles import (
    OTHER,
    READ,
    WRITE,
    a_role,
    add_permission,
    add_resource,
    add_user,
    scene,
    to,
    to_client,
)

KIND = MarkerKind


class Counted:
    """Roles: counts the reads of the cache."""

    def __init__(self, roles: Any) -> None:
        self._roles = roles
        self.reads = 0

    async def assignments_of(self, holder_id: str) -> Any:
        self.reads += 1
        return await self._roles.assignments_of(holder_id)

    async def role_by_uid(self, role_uid: str) -> Any:
        self.reads += 1
        return await self._roles.role_by_uid(role_uid)


class World:
    """One worker that knows permissions alone, on a SQLite file."""

    def __init__(self, url: str) -> None:
        self.database = Database(url, HandClock(), sqlite_id="ab" * 16)
        self.store = sql_store(self.database)
        self.state = State(120)
        self.follow = Follow(self.store.feed, self.state, HandClock(), listeners=(self._changed,))
        self.counted = Counted(self.store.roles)
        self.step: Step = no_step
        self.begin()

    def begin(self, **more: Any) -> None:
        """Knows nothing any more."""
        stepped: Any = Stepped(self.counted, self._step)
        self.permissions = Permissions(stepped, self.state, self.reach, **more)

    async def _step(self) -> None:
        await self.step()

    async def _changed(self, markers: tuple[Marker, ...]) -> None:
        await self.permissions.changed(markers)

    async def reach(self, _revision: int) -> None:
        await self.follow.poll()

    async def names(self, subject: str = "alice", audience: str = "urn:a") -> set[str]:
        return set((await self.permissions(subject, audience)).names)

    def at_hand(self, subject: str = "alice", audience: str = "urn:a") -> set[str] | None:
        held = self.permissions.at_hand(subject, audience)
        return None if held is None else set(held.names)

    async def truth(self, subject: str = "alice", audience: str = "urn:a") -> set[str]:
        """As the lists of administrators say it."""
        held = await self.store.roles.page_of_assignments(
            AssignmentFilter(holder_id=subject), None, 1000
        )
        found: set[str] = set()
        for one in held:
            role = await self.store.roles.get(one.role_id)
            assert role is not None
            if one.resource_id in ("", audience):
                found |= {ref.name for ref in role.permissions if ref.resource_id == audience}
        return found

    async def reads_of(self, call: Awaitable[Any]) -> int:
        before = self.counted.reads
        await call
        return self.counted.reads - before


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(await migrated(tmp_path))
    await scene(made.store)
    yield made
    await made.database.close()


async def _hold(world: World) -> None:
    """Alice may read a by one role, and by another what it says of b."""
    roles = world.store.roles
    await roles.add(a_role("editor", READ))
    await roles.add(a_role("wide", WRITE, OTHER))
    await roles.assign(to("alice"))
    await roles.assign(to("alice", "wide", "urn:b"))
    await world.follow.poll()


async def test_permissions_are_the_union_of_what_applies(world: World) -> None:
    await _hold(world)
    await world.store.roles.assign(to_client("shop", "wide"))
    await world.store.roles.add(a_role("idle"))
    await world.store.roles.assign(to("bob", "idle"))
    for subject, audience, names in (
        ("alice", "urn:a", {"read"}),
        ("alice", "urn:b", {"read"}),
        ("alice", "", set()),
        ("alice", "urn:c", set()),
        ("shop", "urn:a", {"write"}),
        ("shop", "urn:b", {"read"}),
        ("bob", "urn:a", set()),
        ("nobody", "urn:a", set()),
    ):
        assert world.at_hand(subject, audience) in (None, names)
        assert await world.names(subject, audience) == names == await world.truth(subject, audience)
        assert world.at_hand(subject, audience) == names
    await world.store.roles.assign(to("alice", "wide"))
    await world.follow.poll()
    assert await world.names() == {"read", "write"}


async def test_what_is_known_costs_no_read_and_says_its_revision(world: World) -> None:
    await _hold(world)
    assert world.at_hand() is None
    assert await world.reads_of(world.names()) == 2
    assert await world.reads_of(world.names("alice", "urn:b")) == 1
    assert await world.reads_of(world.names("alice", "urn:c")) == 0
    assert await world.reads_of(world.names("nobody")) == 1
    held = world.permissions.at_hand("alice", "urn:a")
    assert held is not None
    assert held.revision == world.state.revision
    held.encoded = b"as an edge has it"
    await world.store.feed.append([change(KIND.TOKEN_DEAD, "x"), change(KIND.RESOURCE_CHANGED)])
    await world.store.roles.update("wide", None, display_name="Wide")
    await world.store.roles.assign(to("bob"))
    await world.follow.poll()
    for subject in ("alice", "nobody"):
        assert await world.reads_of(world.names(subject)) == 0
    assert world.permissions.at_hand("alice", "urn:a") is held
    assert await world.names("bob") == {"read"}


async def _recreate_role(world: World) -> None:
    await world.store.roles.delete("editor", None)
    await world.store.roles.add(a_role("editor", READ, WRITE))


async def _recreate_resource(world: World) -> None:
    await world.store.resources.delete("urn:a", None)
    await add_resource(world.store, "urn:a")
    await add_permission(world.store, READ)
    await world.store.roles.update("wide", None, permissions=frozenset({READ}))


async def _take_then_give(world: World) -> None:
    """What the role gets alice never had."""
    await world.store.roles.unassign(to("alice"))
    await world.store.roles.update("editor", None, permissions=frozenset({READ, WRITE}))


async def _rename(world: World) -> None:
    await _recreate_role(world)
    await world.store.roles.assign(to("alice"))


Act = Callable[[World], Awaitable[Any]]
CHANGES: dict[str, Act] = {
    "assign": lambda world: world.store.roles.assign(to("alice", "wide")),
    "assign-limited": lambda world: world.store.roles.assign(to("alice", "wide", "urn:a")),
    "unassign": lambda world: world.store.roles.unassign(to("alice")),
    "role-grows": lambda world: world.store.roles.update(
        "editor", None, permissions=frozenset({READ, WRITE})
    ),
    "role-shrinks": lambda world: world.store.roles.update("editor", None, permissions=frozenset()),
    "role-deleted": lambda world: world.store.roles.delete("editor", None),
    "role-again": _recreate_role,
    "role-again-held": _rename,
    "permission-deleted": lambda world: world.store.roles.delete_permission(READ),
    "resource-deleted": lambda world: world.store.resources.delete("urn:a", None),
    "resource-again": _recreate_resource,
    "take-then-give": _take_then_give,
}


@pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)
async def test_change_is_seen_when_it_is_applied_and_not_before(world: World, act: Act) -> None:
    await _hold(world)
    await world.store.roles.assign(to("bob", "wide", "urn:a"))
    await world.follow.poll()
    before = {subject: await world.names(subject) for subject in ("alice", "bob")}
    await act(world)
    for subject, names in before.items():
        assert await world.reads_of(world.names(subject)) == 0
        assert world.at_hand(subject) == names
    await world.follow.poll()
    for subject in before:
        assert await world.names(subject) == await world.truth(subject)
        assert world.at_hand(subject) == await world.truth(subject)


async def test_after_a_snapshot_all_is_read_again(world: World) -> None:
    await _hold(world)
    for kind in (KIND.PERMISSIONS_CHANGED, KIND.ROLE_CHANGED, KIND.RESOURCE_CHANGED):
        assert await world.names() == {"read"}
        await world.permissions.changed((Marker(kind, ANY_KEY, 1, 0.0),))
        assert world.at_hand() is None
    await world.names()
    unknown = Marker(KIND.CUTOFF_EVERYTHING, marker_key(KIND.CUTOFF_EVERYTHING), 1, 0.0)
    await world.permissions.changed((unknown,))
    assert world.at_hand() is None


# --- changes while it is read ---


class History:
    """What was true of alice on urn:a, from which revision on."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: list[tuple[int, set[str]]] = []

    async def note(self) -> None:
        head = (await self._world.store.feed.read(0)).head
        self._known.append((head, await self._world.truth()))

    def at(self, revision: int) -> set[str]:
        return [names for since, names in self._known if since <= revision][-1]


class Noted:
    """The store, each of whose changes is noted."""

    def __init__(self, inner: Any, history: History) -> None:
        self._inner = inner
        self._history = history

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)

        async def call(*given: Any, **named: Any) -> Any:
            answer = await found(*given, **named)
            await self._history.note()
            return answer

        return call


async def _changed_at(world: World, act: Act, at: int, *, polled: bool) -> bool:
    """Answers whether there is a step of this number; asserts that nothing wrong is told."""
    history = History(world)
    await history.note()
    await world.follow.poll()
    world.begin()
    steps = 0

    async def step() -> None:
        nonlocal steps
        steps += 1
        if steps == at + 1:
            noted: Any = _Changes(world, history)
            await act(noted)
            if polled:
                await world.follow.poll()

    world.step = step
    held = await world.permissions("alice", "urn:a")
    world.step = no_step
    assert set(held.names) == history.at(world.state.revision), (at, polled)
    assert set(held.names) == history.at(held.revision), (at, polled)
    await world.follow.poll()
    assert await world.names() == await world.truth(), (at, polled)
    return steps > at


class _Changes:
    """A world as CHANGES see it."""

    def __init__(self, world: World, history: History) -> None:
        self.store = _Noting(world, history)


class _Noting:
    def __init__(self, world: World, history: History) -> None:
        self.roles = Noted(world.store.roles, history)
        self.resources = Noted(world.store.resources, history)


async def _at_every_step(directory: Path, act: Act, *, polled: bool) -> int:
    """Answers how many steps there are."""
    url = await migrated(directory)
    world = World(url)
    await scene(world.store)
    await _hold(world)
    await world.database.close()
    scenery = (directory / "authsvc.db").read_bytes()
    for at in range(100):
        (directory / "authsvc.db").write_bytes(scenery)
        world = World(url)
        try:
            if not await _changed_at(world, act, at, polled=polled):
                return at
        finally:
            await world.database.close()
    raise AssertionError("it never ends")


@pytest.mark.parametrize("polled", [True, False], ids=["applied", "not-applied"])
@pytest.mark.parametrize("act", CHANGES.values(), ids=CHANGES)
async def test_change_at_any_moment_of_a_read_is_not_missed(
    tmp_path: Path, act: Act, polled: bool
) -> None:
    assert await _at_every_step(tmp_path, act, polled=polled) >= 4


def _keeps_what_was_overtaken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reads, "overtake", lambda _self, _key: None)


def _uses_what_is_newer(patch: pytest.MonkeyPatch) -> None:
    """As if a read were of the applied revision, whatever the database knew."""

    async def read(self: Permissions, *row: Any) -> Any:
        return (await self._share(*row))[1]

    patch.setattr(Permissions, "_applied", read)


def _forgets_no_role(patch: pytest.MonkeyPatch) -> None:
    real = Permissions.changed

    async def changed(self: Permissions, markers: tuple[Marker, ...]) -> None:
        await real(self, tuple(m for m in markers if m.kind is not KIND.ROLE_CHANGED))

    patch.setattr(Permissions, "changed", changed)


@pytest.mark.parametrize(
    ("plant", "change", "polled"),
    [
        (_keeps_what_was_overtaken, "unassign", True),
        (_keeps_what_was_overtaken, "role-shrinks", True),
        (_uses_what_is_newer, "take-then-give", False),
        (_forgets_no_role, "role-deleted", True),
    ],
)
async def test_the_steps_see_what_is_planted(
    tmp_path: Path, plant: Any, change: str, polled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        await _at_every_step(tmp_path, CHANGES[change], polled=polled)


async def test_what_changes_all_the_time_is_refused(world: World) -> None:
    await _hold(world)

    async def step() -> None:
        await world.permissions.changed(
            (Marker(KIND.PERMISSIONS_CHANGED, marker_key(KIND.PERMISSIONS_CHANGED, "alice"), 1, 0),)
        )

    world.step = step
    before = world.counted.reads
    assert await _reason(world.names()) is Reason.STORE_UNAVAILABLE
    assert world.counted.reads == before + TRIES
    world.step = no_step
    assert await world.names() == {"read"}


async def _reason(call: Awaitable[object]) -> Reason:
    with pytest.raises(AuthError) as refused:
        await call
    return refused.value.reason


async def test_database_that_is_not_followed_is_not_believed(world: World) -> None:
    await _hold(world)

    async def nothing(_revision: int) -> None:
        """The follower is stuck."""

    permissions = Permissions(world.store.roles, world.state, nothing)
    await world.store.roles.assign(to("bob"))
    assert await _reason(permissions("alice", "urn:a")) is Reason.STORE_UNAVAILABLE
    await world.follow.poll()
    assert (await permissions("alice", "urn:a")).names == {"read"}
    world.state.apply((), world.state.revision + 1)  # a replica that was promoted too early
    permissions = Permissions(world.store.roles, world.state, nothing)
    assert await _reason(permissions("alice", "urn:a")) is Reason.STORE_UNAVAILABLE


async def test_failure_is_told_to_all_who_wait_and_not_remembered(world: World) -> None:
    await _hold(world)

    async def fails() -> None:
        raise AuthError(Reason.STORE_UNAVAILABLE)

    world.step = fails
    found = await asyncio.gather(*(_reason(world.names()) for _ in range(5)))
    assert found == [Reason.STORE_UNAVAILABLE] * 5
    world.step = no_step
    assert await world.names() == {"read"}


# --- what it costs ---


async def test_role_that_a_thousand_hold_is_read_once_when_it_changes(world: World) -> None:
    await world.store.roles.add(a_role("editor", READ))
    users = [f"u{number}" for number in range(20)]
    for user in users:
        await add_user(world.store, user)
        await world.store.roles.assign(to(user))
    await world.follow.poll()
    clients = [f"c{number}" for number in range(980)]
    ((_, (holding,)),) = [await world.store.roles.assignments_of("u0")]
    everybody = users + clients

    class Many(Counted):
        async def assignments_of(self, holder_id: str) -> Any:
            self.reads += 1
            return world.state.revision, (holding,)

    world.counted = Many(world.store.roles)
    world.begin()
    assert await world.reads_of(asyncio.gather(*map(world.names, users))) == 20 + 1
    assert await world.reads_of(_in_turn(world, clients)) == 980
    await world.store.roles.update("editor", None, permissions=frozenset({READ, WRITE}))
    await world.follow.poll()
    assert await world.reads_of(asyncio.gather(*map(world.names, everybody))) == 1
    for name in everybody:
        assert world.at_hand(name) == {"read", "write"}


async def _in_turn(world: World, subjects: list[str]) -> None:
    for subject in subjects:
        await world.names(subject)


async def test_who_goes_away_spoils_it_for_nobody(world: World) -> None:
    await _hold(world)
    gate, entered = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        entered.set()
        await gate.wait()

    world.step = wait
    first, second = (asyncio.create_task(world.names()) for _ in range(2))
    await entered.wait()
    first.cancel()
    gate.set()
    assert await second == {"read"}
    assert first.cancelled()
    assert world.counted.reads == 2


async def test_reads_under_way_are_bounded(world: World) -> None:
    await _hold(world)
    gate, waiting = asyncio.Event(), 0

    async def wait() -> None:
        nonlocal waiting
        waiting += 1
        await gate.wait()

    world.step = wait
    calls = [asyncio.create_task(world.names(f"s{number}")) for number in range(READS_MAX)]
    async with asyncio.timeout(10):
        while waiting < READS_MAX:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert await _reason(world.names()) is Reason.STORE_UNAVAILABLE
    world.step = no_step
    gate.set()
    assert await asyncio.gather(*calls) == [set()] * READS_MAX
    assert await world.names() == {"read"}


async def test_memory_is_bounded_and_what_was_forgotten_is_read_again(world: World) -> None:
    await _hold(world)
    world.begin(bytes_max=64 * 1024)
    for number in range(200):
        assert await world.names(f"s{number}") == set()
    assert len(world.permissions._holders) < 64
    assert world.at_hand("s0") is None
    assert await world.names("s0") == set()
    for number in range(100):  # audiences of one holder count too
        await world.names("alice", f"urn:{number}")
    assert await world.names() == {"read"}


async def test_role_made_again_under_its_id_is_another(world: World) -> None:
    """Those who held the one before cost no read each, whatever is read of the new one."""
    await _hold(world)
    await world.store.roles.assign(to("bob"))
    await world.follow.poll()
    assert await world.names("alice") == await world.names("bob") == {"read"}
    await _recreate_role(world)
    await world.store.clients.add(a_client("new"))
    await world.store.roles.assign(to_client("new"))
    await world.follow.poll()
    assert await world.reads_of(world.names("alice")) == 1
    assert await world.names("new") == {"read", "write"}
    for subject, names in (("alice", set()), ("bob", set()), ("new", {"read", "write"})):
        assert await world.reads_of(world.names(subject)) == 0
        assert world.at_hand(subject) == names
