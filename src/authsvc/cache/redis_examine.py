"""What a Redis tells about itself, for who sets it up. Nothing is changed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from redis.asyncio.cluster import RedisCluster

from authsvc import config
from authsvc.cache.redis import Place
from authsvc.clock import Clock

PINGS = 5


class RedisServer(NamedTuple):
    """One server that commands go to."""

    version: tuple[int, ...]
    is_replica: bool
    maxmemory: int
    policy: str


def addresses(settings: config.Redis) -> list[str]:
    """Hosts or path of the URL. ValueError, without its text, where it is malformed."""
    place = Place(settings)
    return [host for host, _ in place._hosts] or [place._path]  # noqa: SLF001


class RedisExamination:
    """Questions to a Redis; each raises RedisError, OSError or TimeoutError."""

    def __init__(self, commands: Any, clock: Clock) -> None:
        self._commands = commands
        self._clock = clock
        cluster = isinstance(commands, RedisCluster)
        self._everywhere = {"target_nodes": RedisCluster.PRIMARIES} if cluster else {}

    async def latency_s(self) -> float:
        """The middle one of a few round trips."""
        await self._commands.execute_command("PING", **self._everywhere)  # connects
        took = []
        for _ in range(PINGS):
            before = self._clock.boot()
            await self._commands.execute_command("PING", **self._everywhere)
            took.append(self._clock.boot() - before)
        return sorted(took)[PINGS // 2]

    async def servers(self) -> list[RedisServer]:
        """All of a Cluster that take writes, else the one."""
        found = await self._commands.execute_command("INFO", **self._everywhere)
        nodes = found.values() if "redis_version" not in found else [found]
        return [
            RedisServer(
                tuple(int(part) for part in str(info["redis_version"]).split(".")[:3]),
                info["role"] != "master",
                int(info["maxmemory"]),
                str(info["maxmemory_policy"]),
            )
            for info in nodes
        ]


@asynccontextmanager
async def examined(settings: config.Redis, clock: Clock) -> AsyncIterator[RedisExamination]:
    """Connections of its own, closed at the end."""
    client = Place(settings).open()
    try:
        yield RedisExamination(client.commands, clock)
    finally:
        await client.close()
