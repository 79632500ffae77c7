"""Redis as several servers: one that is watched by Sentinels, and a Cluster."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from pydantic import SecretStr

from authsvc import config
from authsvc.cache import redis as module
from authsvc.cache.redis import RedisLink
from authsvc.telemetry import Metrics
from tests.harness import until
from tests.redis_servers import Redis

MASTERS = 3
SLOTS = 16384
PASSWORD = "hunter2"


@asynccontextmanager
async def linked(url: str, **settings: Any) -> AsyncIterator[RedisLink]:
    """As patient as a busy machine needs."""
    link = RedisLink(config.Redis(url=SecretStr(url), budget_ms=2000, **settings), Metrics())
    await link.start()
    try:
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def hearing(link: RedisLink, channel: str) -> AsyncIterator[list[bytes]]:
    """What is heard, as a worker listens: again where a connection ends."""
    heard: list[bytes] = []

    async def listen() -> None:
        while True:
            async for message in link.listen(channel):
                heard.extend([message] if message else [])
            await asyncio.sleep(0.05)

    task = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def command(*parts_and_client: Any) -> Any:
    *parts, client = parts_and_client
    return await client.execute_command(*parts)


async def works(link: RedisLink, heard: list[bytes], keys: int = 20) -> None:
    """Commands for many keys, and messages, before long."""
    async with asyncio.timeout(60):
        for number in range(keys):
            key, value = f"key{number}", f"{number}".encode()
            write = partial(command, "SET", key, value)
            while await link.run(write, None) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while await link.run(partial(command, "GET", key), None) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        word = f"word{len(heard)}".encode()
        while word not in heard:
            await link.publish("channel", word)
            await asyncio.sleep(0.05)


@pytest.fixture(autouse=True)
def _soon_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST_S", 0.1)


# --- Sentinel ---


async def test_sentinels_lead_to_the_master_also_after_a_failover() -> None:
    with ExitStack() as servers:
        master = servers.enter_context(Redis(password=PASSWORD))
        replica = servers.enter_context(
            Redis(f"replicaof 127.0.0.1 {master.port}", password=PASSWORD)
        )
        await until(lambda: master.ask("ROLE")[2])
        watch = (
            f"sentinel monitor service 127.0.0.1 {master.port} 2",
            f"sentinel auth-pass service {PASSWORD}",
            "sentinel down-after-milliseconds service 500",
            "sentinel failover-timeout service 3000",
        )
        watching = [servers.enter_context(Redis(*watch, sentinel=True)) for _ in range(3)]
        await until(lambda: all(knows(each, others=2) for each in watching))
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in watching)
        url = f"redis+sentinel://:{PASSWORD}@{hosts}/service"
        async with linked(url) as link, hearing(link, "channel") as heard:
            assert link.up
            await works(link, heard)
            master.kill()
            watching[0].kill()
            await until(lambda: replica.ask("ROLE")[0] == "master", timeout_s=60)
            await works(link, heard)
            assert replica.ask("GET", "key1") == "1"


def knows(sentinel: Redis, others: int) -> bool:
    """Whether it knows of the others and of the replica."""
    told = sentinel.ask("SENTINEL", "MASTER", "service")
    about = told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=True))
    return int(about["num-other-sentinels"]) == others and int(about["num-slaves"]) == 1


# --- Cluster ---


@pytest.fixture
def nodes() -> Iterator[list[Redis]]:
    """Three masters, and a replica of the first."""
    lines = ("cluster-enabled yes", "cluster-node-timeout 1500", "cluster-require-full-coverage no")
    with ExitStack() as servers:
        yield [servers.enter_context(Redis(*lines, password=PASSWORD)) for _ in range(MASTERS + 1)]


async def test_a_cluster_is_used_also_after_a_failover(nodes: list[Redis]) -> None:
    first, replica = nodes[0], nodes[MASTERS]
    for at, node in enumerate(nodes[:MASTERS]):
        low, high = at * SLOTS // MASTERS, (at + 1) * SLOTS // MASTERS
        node.ask("CLUSTER", "ADDSLOTS", *range(low, high))
        if at:
            node.ask("CLUSTER", "MEET", "127.0.0.1", first.port)
    replica.ask("CLUSTER", "MEET", "127.0.0.1", first.port)
    await until(lambda: all(told(node, "cluster_known_nodes") == "4" for node in nodes))
    await until(lambda: all(told(node, "cluster_state") == "ok" for node in nodes))
    replica.ask("CLUSTER", "REPLICATE", first.ask("CLUSTER", "MYID"))
    await until(lambda: first.ask("ROLE")[2] and replica.ask("ROLE")[3] == "connected")
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes[:2])
    url = f"redis+cluster://:{PASSWORD}@{hosts}"
    async with linked(url) as link, hearing(link, "channel") as heard:
        assert link.up
        await works(link, heard)
        first.kill()
        await until(lambda: replica.ask("ROLE")[0] == "master", timeout_s=60)
        await works(link, heard)


def told(node: Redis, name: str) -> str:
    answer = node.ask("CLUSTER", "INFO")
    if isinstance(answer, dict):
        return str(answer[name])
    return dict(line.split(":") for line in str(answer).split())[name]
