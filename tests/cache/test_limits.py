"""How many calls pass a rate limit, counted by one process and by Redis."""

import asyncio
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authsvc.cache.local import LocalRateLimits
from authsvc.cache.port import Rate, RateLimits
from authsvc.cache.redis_limits import RedisRateLimits
from tests.cache.links import linked, raw
from tests.clocks import HandClock
from tests.harness import until
from tests.redis_servers import Redis

SLOW = Rate(per_minute=1, burst=5)
"""Nothing comes back while a test runs."""


async def passed(limits: RateLimits, calls: int, rate: Rate = SLOW, who: str = "tom") -> int:
    """How many of so many calls pass, one after the other."""
    return [await limits("test", who, rate) for _ in range(calls)].count(0)


# --- in this process ---


@given(
    per_minute=st.integers(1, 100_000),
    burst=st.integers(1, 20),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.5, 1.0, 7.0, 60.0]), max_size=60),
)
async def test_in_any_time_no_more_pass_than_the_burst_and_the_rate(
    per_minute: int, burst: int, pauses: list[float]
) -> None:
    clock, rate = HandClock(), Rate(per_minute, burst)
    limits = LocalRateLimits(clock)
    times = []
    for pause in pauses:
        clock.advance(pause)
        wait_s = await limits("test", "tom", rate)
        if not wait_s:
            times.append(clock.boot())
            continue
        assert 0 < wait_s <= rate.interval_s * 1.0001
        clock.advance(wait_s)  # who waits as long as it was told to is let through
        assert await limits("test", "tom", rate) == 0
        times.append(clock.boot())
    for number, first in enumerate(times):
        for more, last in enumerate(times[number:], 1):
            assert more <= burst + (last - first) / rate.interval_s + 1e-3


async def test_callers_and_limits_are_counted_each_for_itself() -> None:
    limits = LocalRateLimits(HandClock())
    assert await passed(limits, 9) == 5
    assert await passed(limits, 9, who="ann") == 5
    assert await limits("other", "tom", SLOW) == 0


async def test_what_is_kept_of_callers_is_bounded() -> None:
    limits = LocalRateLimits(HandClock(), bytes_max=10_000)
    for number in range(1000):
        await limits("test", str(number), SLOW)
    assert len(limits._paid) < 50


# --- over Redis ---


class Never:
    async def __call__(self, name: str, who: str, rate: Rate) -> float:
        raise AssertionError(f"Redis was to decide: {name} {who} {rate}")


NEVER = Never()


@pytest.fixture
async def two(redis: Redis) -> AsyncIterator[tuple[RateLimits, RateLimits, str]]:
    """Two workers of a deployment, and its issuer."""
    issuer = f"https://{uuid4().hex}.test"
    async with linked(redis) as first, linked(redis) as second:
        yield (
            RedisRateLimits(first, issuer, NEVER),
            RedisRateLimits(second, issuer, NEVER),
            issuer,
        )


Two = tuple[RateLimits, RateLimits, str]


def keys(redis: Redis) -> list[str]:
    found = redis.ask("KEYS", "authsvc:*:limit:*")
    assert isinstance(found, list)
    return found


async def test_of_32_at_once_at_two_workers_the_burst_passes(two: Two) -> None:
    rate = Rate(per_minute=1, burst=10)
    waits = await asyncio.gather(
        *(limits("test", "tom", rate) for _ in range(16) for limits in two[:2])
    )
    assert waits.count(0) == 10
    assert all(0 < wait_s <= 60 for wait_s in waits if wait_s)


async def test_rate_is_kept_by_the_clock_of_redis(two: Two) -> None:
    rate = Rate(per_minute=6000, burst=5)
    began = time.monotonic()
    found = 0
    while found < 25:
        waits = await asyncio.gather(*(limits("test", "tom", rate) for limits in two[:2]))
        found += waits.count(0)
    assert found <= 5 + (time.monotonic() - began) / rate.interval_s + 1


async def test_who_waits_as_told_is_let_through(two: Two) -> None:
    rate = Rate(per_minute=600, burst=2)
    assert await passed(two[0], 2, rate) == 2
    wait_s = await two[1]("test", "tom", rate)
    assert 0 < wait_s <= 0.1
    await asyncio.sleep(wait_s)
    assert await two[0]("test", "tom", rate) == 0


async def test_keys_name_nobody_and_end_by_themselves(two: Two, redis: Redis) -> None:
    before = set(keys(redis))
    rate = Rate(per_minute=60, burst=5)
    assert await two[0]("test", "spiffe://test.local/tom", rate) == 0
    (key,) = set(keys(redis)) - before
    assert "tom" not in key
    assert two[2] not in key
    assert 0 < redis.ask("PTTL", key) <= 1000


async def test_clock_of_redis_that_went_back_holds_nobody_up_for_long(
    two: Two, redis: Redis
) -> None:
    before = set(keys(redis))
    rate = Rate(per_minute=600, burst=2)
    assert await two[0]("test", "tom", rate) == 0
    (key,) = set(keys(redis)) - before
    redis.ask("SET", key, 2_000_000_000_000_000 * 2)
    wait_s = await two[0]("test", "tom", rate)
    assert 0 < wait_s <= 0.1
    await asyncio.sleep(wait_s)
    assert await two[1]("test", "tom", rate) == 0


@pytest.mark.parametrize("value", ["", "x", "nan", "-inf", "-1", "0x10"])
async def test_garbage_in_redis_is_no_debt(two: Two, redis: Redis, value: str) -> None:
    before = set(keys(redis))
    assert await two[0]("test", "tom", SLOW) == 0
    (key,) = set(keys(redis)) - before
    redis.ask("SET", key, value)
    assert await passed(two[0], 9) == 5


async def test_deployments_on_one_redis_are_counted_each_for_itself(redis: Redis) -> None:
    async with linked(redis) as link:
        issuers = [f"https://{uuid4().hex}.test" for _ in range(2)]
        limits = [RedisRateLimits(link, issuer, NEVER) for issuer in issuers]
        assert [await passed(each, 9) for each in limits] == [5, 5]


async def test_flushed_redis_begins_anew() -> None:
    with Redis() as redis:
        async with linked(redis) as link:
            limits = RedisRateLimits(link, "https://x.test", NEVER)
            assert await passed(limits, 9) == 5
            redis.flush()
            assert await passed(limits, 9) == 5


async def test_without_redis_each_worker_counts_by_itself() -> None:
    with Redis() as redis:
        async with linked(redis, budget_ms=50) as link:
            local = LocalRateLimits(HandClock())
            limits = RedisRateLimits(link, "https://x.test", local)
            redis.freeze()
            assert await passed(limits, 9) == 5
            redis.thaw()
            redis.kill()
            assert await passed(limits, 9) == 0
            assert await passed(limits, 9, who="ann") == 5


async def test_value_of_another_type_leaves_it_to_the_worker(redis: Redis) -> None:
    async with linked(redis) as link:
        issuer = f"https://{uuid4().hex}.test"
        limits = RedisRateLimits(link, issuer, LocalRateLimits(HandClock()))
        before = set(keys(redis))
        assert await limits("test", "tom", SLOW) == 0
        (key,) = set(keys(redis)) - before
        redis.ask("DEL", key)
        redis.ask("LPUSH", key, "x")
        assert await passed(limits, 9) == 5


async def test_cluster_counts_as_one_server_does() -> None:
    with Redis("cluster-enabled yes") as node:
        node.ask("CLUSTER", "ADDSLOTS", *range(16384))
        await until(lambda: "cluster_state:ok" in str(raw(node, "CLUSTER", "INFO")))
        url = f"redis+cluster://127.0.0.1:{node.port}"
        async with linked(node, url=url) as link:
            limits = RedisRateLimits(link, "https://x.test", NEVER)
            assert [await passed(limits, 9, who=who) for who in ("tom", "ann", "")] == [5, 5, 5]
