"""Rows that one server read and another one uses, over real servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.links import pair
from tests.harness import Running, reason
from tests.redis_servers import Redis

API = "https://api.test"


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    with Redis() as server:
        yield server


async def _hits(server: Running) -> float:
    found = server.app.metrics.registry.get_sample_value(
        "authsvc_shared_rows_total", {"outcome": "hit"}
    )
    return found or 0.0


async def test_second_server_uses_what_the_first_one_read_until_it_changes(
    tmp_path: Path, migrated_url: str, own_redis: Redis
) -> None:
    async with pair(tmp_path, migrated_url, own_redis) as (one, two):
        await one.resource(API, "read")
        app = await one.member("app", "read")
        await two.app.follow.poll()
        await one.token(app, "read")
        before = await _hits(two)
        await two.token(app, "read")
        assert await _hits(two) > before
        revision = (await one.suspend(app.client_id)).revision
        await two.app.follow.reach(revision)
        assert await reason(two.token(app, "read")) == "CLIENT_SUSPENDED"
