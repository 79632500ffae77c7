"""Rows that one worker read, for the others: never one that is older than what is applied."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import pytest

from authsvc.cache import redis_rows
from authsvc.cache.redis import RedisLink
from authsvc.cache.redis_rows import SharedRows
from authsvc.errors import AuthError, Reason
from authsvc.feed.compact import Compact
from authsvc.feed.follow import Follow
from authsvc.keys.secrets import Mac, Sealer
from authsvc.model import AuthMethod, Client, ClientState, GrantType
from authsvc.permissions import Permissions
from authsvc.store import sql_store
from authsvc.store.cached import CachedClients
from authsvc.store.port import RowKind
from authsvc.store.sql import Database
from authsvc.telemetry import Metrics
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State
from tests.cache.links import linked, raw
from tests.clocks import HandClock
from tests.harness import migrated
from tests.redis_servers import Redis
from tests.rig import Step, no_step
from tests.store.test_contract import a_client, step
from tests.store.test_roles import OTHER, READ, WRITE, a_role, scene, to

KEY = b"\x33" * 32


class Counted:
    """Notes the reads of rows, and takes a step after each: the read is done, nothing is put."""

    def __init__(self, store: Any, worker: "Worker") -> None:
        self._worker = worker
        self._store = store

    def __getattr__(self, name: str) -> Any:
        read = getattr(self._store, name)

        async def counted(*given: Any) -> Any:
            self._worker.reads += 1
            found = await read(*given)
            await self._worker.step()
            return found

        return counted


class Worker:
    """Clients and permissions of one worker."""

    def __init__(
        self,
        url: str,
        link: RedisLink,
        issuer: str,
        clock: HandClock,
        *,
        key: bytes = KEY,
        sqlite_id: str = "ab" * 16,
    ) -> None:
        self.database = Database(url, clock, sqlite_id=sqlite_id)
        self.store = sql_store(self.database)
        self.state = State(120)
        self.reads = 0
        self.step: Step = no_step
        self.metrics = Metrics()
        mac = Mac(Sealer((key,)), issuer)
        self.shared = SharedRows(link, mac, issuer, self.state, clock, self.metrics)
        clients: Any = Counted(self.store.clients, self)
        roles: Any = Counted(self.store.roles, self)
        self.clients = CachedClients(clients, self.shared)
        self.permissions = Permissions(roles, self.state, self.reach, self.shared)
        listeners = (self.shared.changed, self.clients.changed, self.permissions.changed)
        self.follow = Follow(self.store.feed, self.state, clock, listeners=listeners)

    async def reach(self, _revision: int) -> None:
        await self.follow.poll()

    async def client(self, client_id: str = "shop") -> Client:
        found = await self.clients.get(client_id)
        assert found is not None
        return found

    async def names(self, subject: str = "alice", audience: str = "urn:a") -> set[str]:
        return set((await self.permissions(subject, audience)).names)

    def outcomes(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(
            "authsvc_shared_rows_total", {"outcome": name}
        )
        return found or 0.0


class World:
    """Workers on one database and one Redis."""

    def __init__(self, url: str, redis: Redis, stack: AsyncExitStack) -> None:
        self.url = url
        self.redis = redis
        self.clock = HandClock()
        self.issuer = f"https://{uuid4().hex}.test"
        self._stack = stack

    async def worker(self, *, budget_ms: float = 5000, **more: Any) -> Worker:
        """One more, which knows nothing yet."""
        link = await self._stack.enter_async_context(linked(self.redis, budget_ms))
        made = Worker(self.url, link, more.pop("issuer", self.issuer), self.clock, **more)
        self._stack.push_async_callback(made.database.close)
        await made.follow.poll()
        return made

    def rows(self) -> dict[str, bytes]:
        """What is in Redis."""
        deployment = sha256(self.issuer.encode()).hexdigest()[:16]
        found = raw(self.redis, "KEYS", f"authsvc:{deployment}:row:*")
        return {key.decode(): raw(self.redis, "GET", key) for key in found}

    def put(self, rows: Mapping[str, bytes]) -> None:
        """As somebody does who may write to Redis."""
        for key, value in rows.items():
            raw(self.redis, "SET", key, value)


@asynccontextmanager
async def worlds(directory: Path, redis: Redis) -> AsyncIterator[World]:
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - a moment
    async with AsyncExitStack() as stack:
        made = World(await migrated(directory), redis, stack)
        worker = await made.worker()
        await scene(worker.store)
        await worker.store.clients.move(step("shop", ClientState.PENDING, ClientState.APPROVED))
        await worker.store.roles.add(a_role("editor", READ))
        await worker.store.roles.add(a_role("wide", WRITE, OTHER))
        await worker.store.roles.assign(to("alice"))
        yield made


@pytest.fixture
async def world(tmp_path: Path, redis: Redis) -> AsyncIterator[World]:
    async with worlds(tmp_path, redis) as made:
        yield made


# --- what is gained ---


async def test_second_worker_reads_no_row_that_the_first_one_read(world: World) -> None:
    one, two = await world.worker(), await world.worker()
    known = await one.client(), await one.names()
    assert one.reads == 3  # a client, a holder, a role
    assert (await two.client(), await two.names()) == known
    assert two.reads == 0
    assert (one.outcomes("miss"), two.outcomes("hit")) == (3, 3)


async def test_row_is_shared_while_others_change(world: World) -> None:
    one, two = await world.worker(), await world.worker()
    known = await one.client(), await one.names()
    await one.store.clients.add(a_client("other"))
    await one.store.roles.assign(to("bob", "wide"))
    await two.follow.poll()
    assert (await two.client(), await two.names()) == known
    assert two.reads == 0


async def test_every_field_of_a_row_comes_back(world: World) -> None:
    one, two = await world.worker(), await world.worker()
    plain = a_client("full", "full")
    full = replace(
        plain,
        metadata=replace(
            plain.metadata,
            grant_types=frozenset(GrantType),
            auth_methods=frozenset(AuthMethod),
            bound_access_tokens=True,
            validates=frozenset({"urn:ä", "*"}),
            texts=MappingProxyType({"client_uri": "https://x.test/\u2028"}),
            contacts=("a@x.test", "b@x.test"),
            jwks='{"keys":[]}',
            may_act="shop",
            first_party=True,
        ),
        secret_digest=bytes(range(224, 256)),
        registration_digest=bytes(32),
    )
    await one.store.clients.add(full)
    for worker in (one, two):
        await worker.follow.poll()
    found = await one.client("full"), await two.client("full")
    assert two.reads == 0
    assert found[0] == found[1]
    assert found[0].metadata == full.metadata
    assert found[0].secret_digest == full.secret_digest


async def test_what_is_not_there_is_not_shared(world: World) -> None:
    one, two = await world.worker(), await world.worker()
    for worker in (one, two):
        assert await worker.clients.get("nobody") is None
    assert two.reads == 1
    assert not world.rows()


async def test_failure_of_the_database_is_told(world: World) -> None:
    one = await world.worker()

    async def away() -> None:
        raise AuthError(Reason.STORE_UNAVAILABLE)

    one.step = away
    with pytest.raises(AuthError):
        await one.client()
    assert not world.rows()


async def test_redis_learns_no_name_and_forgets_by_itself(world: World) -> None:
    one = await world.worker()
    await one.client()
    await one.names()
    rows = world.rows()
    assert len(rows) == 3
    for key in rows:
        assert not {"shop", "alice", "editor"} & set(re.findall(r"\w+", key))
        assert 0 < raw(world.redis, "TTL", key) <= redis_rows.TTL_S


async def test_before_the_first_poll_nothing_is_asked(world: World) -> None:
    one = await world.worker()
    one.state.__init__(120)  # type: ignore[misc]
    await one.client()
    assert (one.reads, one.outcomes("miss")) == (1, 0)
    assert not world.rows()


# --- what must not happen ---

Scenario = Callable[[World], Awaitable[tuple[object, object]]]
"""Answers what a worker says, and what is true."""


async def _suspend(worker: Worker) -> None:
    await worker.store.clients.move(step("shop", ClientState.APPROVED, ClientState.SUSPENDED))


async def _not_now() -> None:
    """The feed is not read."""


async def suspended(world: World) -> tuple[object, object]:
    """A client changed after another worker put it."""
    one, two = await world.worker(), await world.worker()
    await one.client()
    await _suspend(one)
    await two.follow.poll()
    return (await two.client()).state, ClientState.SUSPENDED


async def withdrawn(world: World) -> tuple[object, object]:
    """A role was taken away after another worker put what its holder has."""
    one, two = await world.worker(), await world.worker()
    await one.names()
    await one.store.roles.unassign(to("alice"))
    await two.follow.poll()
    return await two.names(), set()


async def narrowed(world: World) -> tuple[object, object]:
    """A role lost a permission after another worker put it."""
    one, two = await world.worker(), await world.worker()
    await one.names()
    await one.store.roles.update("editor", None, permissions=frozenset())
    await two.follow.poll()
    return await two.names(), set()


async def delayed(world: World) -> tuple[object, object]:
    """A worker was paused between its read and its put, in which time the client changed."""
    one, two = await world.worker(), await world.worker()
    one.step = partial(_suspend, two)
    await one.client()
    assert world.rows()
    await two.follow.poll()
    return (await two.client()).state, ClientState.SUSPENDED


async def leapt(world: World) -> tuple[object, object]:
    """The database's clock leapt ahead and back, and meanwhile the change was compacted away."""
    one = await world.worker()
    await one.client()
    await _suspend(one)
    await one.store.roles.assign(to("bob"))  # the last change always stays
    at = world.clock.wall()
    world.clock.set_wall(at + 2 * MARKER_LIFETIME_S)
    await Compact(one.store.sweeps)()
    world.clock.set_wall(at)
    late = await world.worker()
    return (await late.client()).state, ClientState.SUSPENDED


async def restored(world: World) -> tuple[object, object]:
    """Redis came back with an old dump."""
    one, two = await world.worker(), await world.worker()
    await one.client()
    dump = world.rows()
    await _suspend(one)
    for worker in (one, two):
        await worker.follow.poll()
    await one.client()
    world.put(dump)
    return (await two.client()).state, ClientState.SUSPENDED


async def bounded_out(world: World) -> tuple[object, object]:
    """So many others changed since that this change is not remembered by itself."""
    one, two = await world.worker(), await world.worker()
    await one.client()
    await _suspend(one)
    for number in range(redis_rows.CHANGES_MAX + 1):
        await one.store.clients.add(a_client(f"c{number}"))
        await one.store.clients.move(step(f"c{number}", ClientState.PENDING, ClientState.APPROVED))
    await two.follow.poll()
    assert len(two.shared._changes) == redis_rows.CHANGES_MAX
    return (await two.client()).state, ClientState.SUSPENDED


async def old(world: World) -> tuple[object, object]:
    """A row is older than its time to live, and Redis keeps it all the same."""
    one, two = await world.worker(), await world.worker()
    await one.client()
    rows = world.rows()
    world.clock.advance(601)
    world.put(rows)
    await two.follow.poll()
    await two.client()
    return two.reads, 1


async def of_the_future(world: World) -> tuple[object, object]:
    """The clock of the database went back, and a row would live too long."""
    one, two = await world.worker(), await world.worker()
    one.state.confirm(world.clock.boot(), world.clock.wall() + 3600)
    await one.client()
    assert world.rows()
    await two.client()
    return two.reads, 1


async def ahead(world: World) -> tuple[object, object]:
    """The other worker has applied what this one has not: it is not as of what is applied here."""
    one, two = await world.worker(), await world.worker()
    await one.store.roles.assign(to("alice", "wide"))
    await one.follow.poll()
    await one.names()
    two.follow.poll = _not_now  # type: ignore[method-assign]
    with suppress(AuthError):
        await two.names()
    return two.reads > 0, True


async def forged(world: World) -> tuple[object, object]:
    """Somebody who may write to Redis makes a suspended client of an approved one."""
    one, two = await world.worker(), await world.worker()
    await one.client()
    world.put({key: row.replace(b'"state":2', b'"state":5') for key, row in world.rows().items()})
    return (await two.client()).state, ClientState.APPROVED


async def swapped(world: World) -> tuple[object, object]:
    """Somebody gives one the row of another."""
    one, two = await world.worker(), await world.worker()
    await one.permissions("bob", "urn:a")
    (bob,) = world.rows()
    await one.names()
    alice = next(row for row in world.rows().values() if b'"editor",""' in row)
    world.put({bob: alice})
    return await two.names("bob"), set()


async def of_another_deployment(world: World) -> tuple[object, object]:
    """Two deployments with the same keys share a Redis, and somebody copies rows."""
    one, two = await world.worker(), await world.worker(issuer="https://other.test")
    await one.client()
    (row,) = world.rows().values()
    key = marker_key(MarkerKind.CLIENT_CHANGED, "shop")
    world.put({two.shared._place(RowKind.CLIENT, key, "shop"): row})
    await two.client()
    return two.reads, 1


async def _without_floor(rows: SharedRows, markers: tuple[Marker, ...]) -> None:
    """Knows of the changes of single keys alone."""
    await _changed(rows, markers)
    rows._floor = 0


_changed = SharedRows.changed
SCENARIOS: list[Scenario] = [
    suspended,
    withdrawn,
    narrowed,
    delayed,
    leapt,
    restored,
    bounded_out,
    old,
    of_the_future,
    ahead,
    forged,
    swapped,
    of_another_deployment,
]


# A guard that is not there, and what then goes wrong.
PLANTED: dict[str, tuple[tuple[object, str, Any], set[Scenario]]] = {
    "no revisions": (
        (SharedRows, "_is_current", lambda *_: True),
        {suspended, withdrawn, narrowed, delayed, leapt, restored, bounded_out},
    ),
    "no mark": (
        (Mac, "open", lambda _self, _label, sealed: sealed[32:]),
        {forged, swapped, of_another_deployment},
    ),
    "no time": ((redis_rows, "TTL_S", 10**6), {old}),
    "no present": ((redis_rows, "SKEW_S", math.inf), {of_the_future}),
    "no floor": ((SharedRows, "changed", _without_floor), {leapt, bounded_out}),
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_row_that_may_be_wrong_is_not_taken(
    world: World, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_rows, "CHANGES_MAX", 3)
    said, true = await scenario(world)
    assert said == true


@pytest.mark.parametrize("planted", PLANTED)
async def test_without_each_guard_a_wrong_row_is_taken(
    tmp_path: Path, redis: Redis, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_rows, "CHANGES_MAX", 3)
    (owner, name, bug), caught = PLANTED[planted]
    monkeypatch.setattr(owner, name, bug)
    for number, scenario in enumerate(SCENARIOS):
        if scenario in caught:
            async with worlds(tmp_path / str(number), redis) as world:
                said, true = await scenario(world)
            assert said != true, scenario.__name__


# --- Redis is away ---


async def test_frozen_redis_holds_nobody_up(world: World) -> None:
    with Redis() as frozen:
        world.redis = frozen
        one = await world.worker(budget_ms=50)
        frozen.freeze()
        async with asyncio.timeout(20):
            for number in range(50):
                one.clients._rows.clear()
                assert (await one.client()).client_id == "shop", number
        assert one.reads == 50


async def test_redis_that_lost_everything_is_filled_again(world: World) -> None:
    one, two = await world.worker(), await world.worker()
    await one.client()
    raw(world.redis, "DEL", *world.rows())
    await two.client()
    assert two.reads == 1
    assert world.rows()


async def test_another_epoch_shares_nothing_with_the_one_before(world: World) -> None:
    one = await world.worker()
    await one.client()
    moved = await world.worker(sqlite_id="cd" * 16)  # another lineage: it raises the epoch
    assert moved.state.revision // REVISIONS_PER_EPOCH > one.state.revision // REVISIONS_PER_EPOCH
    await moved.client()
    assert moved.reads == 1
