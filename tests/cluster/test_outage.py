"""A replica that lost PostgreSQL and Redis at once: it judges as long as it may, and no longer."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.cluster.replicas import (
    Cast,
    Cluster,
    Link,
    Process,
    Replica,
    attempt,
    cast,
    environment,
    eventually,
)
from tests.harness import migrate
from tests.servers import Postgres

STALENESS_S = 5.0
SERVING, NOT_SERVING = 1, 2
SLACK_S = 1.5
"""Between two looks of health at the state, and of this test at health."""

NEVER_STALE = """
from authsvc_client.core.state import State
State.require_fresh = lambda self, boot, *more: None
"""
"""The bug: the age of the state is not looked at."""


@pytest.fixture
def links(postgres: Postgres, cluster: Cluster) -> Iterator[list[Link]]:
    """To PostgreSQL, and to Redis."""
    made = [Link(postgres.socket), Link(("127.0.0.1", cluster.redis.port))]
    yield made
    for link in made:
        link.close()


@pytest.fixture
def processes(
    postgres: Postgres, links: list[Link], cluster: Cluster, tmp_path: Path
) -> Iterator[list[Process]]:
    """A replica, and one with the bug, on a database of their own."""
    url = asyncio.run(postgres.database())
    asyncio.run(migrate(url))
    database, redis = links
    name = url.partition("?")[0].rpartition("/")[2]
    over_tcp = f"postgresql+asyncpg://postgres@127.0.0.1:{database.port}/{name}?ssl=disable"
    shared = environment(tmp_path, over_tcp)
    shared |= cluster.by(redis) | {"AUTHSVC_STALENESS_MAX_S": str(STALENESS_S)}
    made = [
        Process(tmp_path, "c", shared),
        Process(tmp_path, "planted", shared, plant=NEVER_STALE),
    ]
    try:
        for each in made:
            each.launch()
        for each in made:
            each.wait()
        yield made
    finally:
        for each in made:
            each.kill()


async def lasts(at: Replica, players: Cast, live: str, dead: str) -> float:
    """How long a live token is judged to be good; the dead one never is, and nothing is guessed."""
    started = time.monotonic()
    while True:
        found = await attempt(players.is_active(at, live))
        assert await attempt(players.is_active(at, dead)) is not True
        if found == "STATE_STALE":
            return time.monotonic() - started
        assert found is True
        assert time.monotonic() - started < STALENESS_S + SLACK_S
        await asyncio.sleep(0.05)


async def test_without_both_stores_it_judges_until_its_state_is_stale_and_heals_by_itself(
    processes: list[Process], links: list[Link]
) -> None:
    """faults.md 14: JWTs validate by the state, then UNAVAILABLE and NOT_SERVING."""
    at, planted = (Replica(process) for process in processes)
    players = await cast(at)
    live, dead = [await players.issue(at) for _ in range(2)]
    await players.revoke(at, dead)
    for each in (at, planted):
        await eventually(lambda: players.is_active(each, live))  # noqa: B023
        assert not await players.is_active(each, dead)
    for link in links:
        link.cut()

    async def would_notice() -> None:
        with pytest.raises(AssertionError):
            await lasts(planted, players, live, dead)

    took, _ = await asyncio.gather(lasts(at, players, live, dead), would_notice())
    assert took > STALENESS_S / 2
    assert await eventually(lambda: is_told(at, NOT_SERVING), 30) < SLACK_S
    assert (await at.http("/readyz"))[0] == 503
    assert (await at.http("/livez"))[0] == 200  # who restarts it gains nothing
    with pytest.raises(grpc.aio.AioRpcError):
        await players.revoke(at, live)  # not durable, so not answered
    for link in links:
        link.mend()
    await eventually(lambda: is_told(at, SERVING))
    assert await attempt(players.is_active(at, dead)) is False
    assert await players.is_active(at, live)
    await players.revoke(at, live)
    assert not await players.is_active(at, live)
    for each in (at, planted):
        await each.disconnect()


async def is_told(at: Replica, status: int) -> bool:
    return await at.health("authsvc.v1.AuthService") == status
