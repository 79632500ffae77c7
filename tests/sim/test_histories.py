"""Worlds that are told what to do, where chance would take too long to come upon it."""

import asyncio
from contextvars import Context

import pytest

from authsvc.authenticate import Credentials
from authsvc.issue import TokenRequest
from authsvc.model import GrantType
from authsvc_client.core.state import REVISIONS_PER_EPOCH
from tests.sim.memory import Tables
from tests.sim.nodes import Worker
from tests.sim.world import API, Failed, Token, World, peer_of, play, question


def world() -> World:
    """One worker, one validator, PostgreSQL that loses commits, and nothing else that fails."""
    made = World(1)
    made.lossy = made.slow = 0.0
    made.is_postgres, made.synchronous = True, False
    made.database.tables.beat = 0.0
    made.database.fingerprint = made.database.tables.fingerprint = "system:1"
    made.workers = [Worker(made, "w0")]
    made.validators = made.validators[:1]
    return made


async def token(world: World) -> Token:
    worker, began = world.workers[0], world.loop.time()
    request = TokenRequest(GrantType.CLIENT_CREDENTIALS, Credentials("c0"), resources=(API,))
    answer = await worker.issue(request, peer_of("c0"))
    return world._add_token("c0", answer, "client_credentials", began)


async def revoke(world: World, jti: str) -> None:
    await world.workers[0].revoke.by_jti(jti, dry=False)


async def current(world: World) -> None:
    """Waits until the validator has applied the head."""
    async with asyncio.timeout(60):
        while not world._is_current(world.validators[0]):  # noqa: ASYNC110 - nothing to wait for
            await asyncio.sleep(0.1)


def promoted(world: World, tables: Tables) -> None:
    """A standby as of these tables takes over."""
    world._lose(-1.0)
    world.hosts += 1
    old, world.database = world.database, world._database(tables.copy())
    old.is_down = True
    for worker in world.workers:
        worker.database = world.database


async def a_second_time_to_where_nobody_knows_of_the_first(world: World) -> None:
    """The history of the first failover is lost with its worker; a validator has seen it. What is
    opened then must not go on by numbers that the validator takes for its own.
    """
    world.workers[0].serve()
    world.validators[0].serve()
    await asyncio.sleep(2)
    old = world.database.tables.copy()
    promoted(world, old)
    await asyncio.sleep(3)
    for n in range(5):
        await revoke(world, f"in the history that is lost {n}")
    await current(world)
    world.workers[0].kill()
    for stream in list(world.streams):
        stream.reset(loses=True)
    promoted(world, old)
    world.workers[0] = Worker(world, "w1")
    world.workers[0].serve()
    await asyncio.sleep(3)
    dead = await token(world)
    await revoke(world, dead.claims.jti)
    for n in range(5):
        await revoke(world, f"another {n}")
    await current(world)
    verdict = world.validators[0].judge(dead.value, question(dead))
    assert verdict is not None
    assert not verdict.active
    world.check()


def test_a_second_failover_to_where_nobody_knows_of_the_first() -> None:
    made = world()
    play(made, a_second_time_to_where_nobody_knows_of_the_first(made))


def test_it_would_be_noticed_if_two_epochs_opened_at_one_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(above: int, _time: float) -> int:
        return (above // REVISIONS_PER_EPOCH + 1) * REVISIONS_PER_EPOCH

    monkeypatch.setattr("tests.sim.memory.opening", first)
    made = world()
    with pytest.raises(Failed):
        play(made, a_second_time_to_where_nobody_knows_of_the_first(made))


async def a_worker_sleeps_in_a_read(world: World) -> None:
    """The machine of a worker sleeps while a question is on its way: what time it is in the answer
    is no word of when it was asked, and judged time would never go back.
    """
    worker, transit = world.workers[0], world.transit
    world.database.tables.beat = None  # of SQLite: a beat that old would confirm nothing
    worker.serve()
    await asyncio.sleep(2)

    async def falls_asleep() -> None:
        world.transit = transit  # type: ignore[method-assign]
        worker.paused = True
        world.loop.call_later(20, worker.resume, context=Context())
        await transit()

    world.transit = falls_asleep  # type: ignore[method-assign]
    await asyncio.sleep(25)
    assert worker.state.age(worker.boot()) < 3
    assert abs(worker.state.now(worker.boot()) - world.database_time()) < 1


def test_who_slept_in_a_read_knows_what_time_it_is() -> None:
    made = world()
    play(made, a_worker_sleeps_in_a_read(made))


def test_it_would_be_noticed_if_a_read_could_take_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sim.world.SMALL", ())
    monkeypatch.setattr("authsvc.feed.follow.READ_S_MAX", 1e9)
    made = world()
    with pytest.raises(Failed):
        play(made, a_worker_sleeps_in_a_read(made))
