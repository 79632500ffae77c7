"""Links to the Redis servers of tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import redis
from pydantic import SecretStr

from authsvc import config
from authsvc.cache.redis import RedisLink
from authsvc.telemetry import Metrics
from tests.harness import Running, running
from tests.redis_servers import Redis


@asynccontextmanager
async def linked(server: Redis, budget_ms: float = 5000, url: str = "") -> AsyncIterator[RedisLink]:
    """A link of one worker's, as patient as a busy machine needs."""
    settings = config.Redis(url=SecretStr(url or server.url), budget_ms=budget_ms)
    link = RedisLink(settings, Metrics())
    await link.start()
    try:
        yield link
    finally:
        await link.close()


def raw(server: Redis, *command: Any) -> Any:
    """One command, whose answer stays bytes."""
    with redis.Redis(port=server.port, protocol=2) as client:
        return client.execute_command(*command)


@asynccontextmanager
async def pair(
    directory: Path, url: str, redis: Redis, **more: Any
) -> AsyncIterator[tuple[Running, Running]]:
    """Two workers on one database and one Redis."""
    more |= {"url": url, "seal_keys": SecretStr("ab" * 32)}
    more["redis"] = config.Redis(url=SecretStr(redis.url), budget_ms=more.pop("budget_ms", 5000))
    async with running(directory / "one", **more) as one, running(directory / "two", **more) as two:
        yield one, two
