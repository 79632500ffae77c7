"""Redis away, slow, frozen, moved: callers wait no longer than the budget, and get their own."""

import asyncio
import itertools
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import SecretStr, ValidationError
from redis.asyncio.connection import Connection

from authsvc import config
from authsvc.cache import redis as module
from authsvc.cache.redis import COMMANDS_MAX, FAILURES_MAX, Commands, RedisLink
from authsvc.telemetry import Metrics
from tests.harness import CA, SERVER, UNKNOWN_CA, identity
from tests.proxy import Proxy, proxied
from tests.redis_servers import Redis

BUDGET_MS = 200.0
AWAY = object()


@pytest.fixture(autouse=True)
def _soon_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST_S", 0.05)


@asynccontextmanager
async def linked(url: str, **settings: Any) -> AsyncIterator[RedisLink]:
    made = config.Redis(url=SecretStr(url), **({"budget_ms": BUDGET_MS} | settings))
    link = RedisLink(made, Metrics())
    await link.start()
    try:
        yield link
    finally:
        await link.close()


def command(*parts: Any) -> Callable[[Commands], Awaitable[Any]]:
    return lambda redis: redis.execute_command(*parts)


async def get(link: RedisLink, key: str = "key") -> Any:
    return await link.run(command("GET", key), AWAY)


async def answers(link: RedisLink, timeout_s: float = 30) -> None:
    """Waits until it does."""
    async with asyncio.timeout(timeout_s):
        while await link.run(command("PING"), AWAY) is AWAY:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def counted(link: RedisLink, outcome: str) -> int:
    return link.outcomes.labels(outcome).value


async def costs_nothing(link: RedisLink) -> None:
    """Not even a turn of the event loop."""
    for _ in range(1000):
        answer = get(link)
        with pytest.raises(StopIteration) as ended:
            answer.send(None)
        assert ended.value.value is AWAY


# --- ways to it ---


async def test_it_is_reached_by_address_and_by_socket(redis: Redis) -> None:
    for url in (redis.url, redis.socket_url, f"redis://localhost:{redis.port}"):
        async with linked(url) as link:
            assert await link.run(command("SET", "way", url), AWAY) in (True, b"OK")
            assert await get(link, "way") == url.encode()


async def test_a_password_is_in_the_url_or_a_setting_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first/@:\n")
    with Redis(password="first/@:") as server:
        plain = f"redis://127.0.0.1:{server.port}"
        for url, more in (
            (f"redis://:first%2F%40%3A@127.0.0.1:{server.port}", {}),
            (f"redis://default:first%2F%40%3A@127.0.0.1:{server.port}/0", {}),
            (plain, {"password": SecretStr("first/@:")}),
            (plain, {"password_file": file}),
        ):
            async with linked(url, **more) as link:
                assert link.up
        for url, more in ((plain, {}), (plain, {"password": SecretStr("wrong")})):
            async with linked(url, **more) as link:
                assert not link.up


async def test_a_password_that_was_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first")
    with Redis(password="first") as server:
        async with linked(f"redis://127.0.0.1:{server.port}", password_file=file) as link:
            server.ask("CONFIG", "SET", "requirepass", "second")
            server.password = "second"
            server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            for _ in range(FAILURES_MAX):
                await get(link)
            assert not link.up
            file.write_text("second")
            await answers(link)


async def test_tls_takes_both_sides_at_their_certificates(redis: Redis, tmp_path: Path) -> None:
    who = identity("authsvc")
    files = {"ca": CA.pem, "unknown": UNKNOWN_CA.pem, "certificate": who.pem, "key": who.key_pem}
    at = {name: tmp_path / name for name in files}
    for name, content in files.items():
        at[name].write_bytes(content)
    (tmp_path / "server").write_bytes(SERVER.pem + SERVER.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server")
    context.load_verify_locations(at["ca"])
    context.verify_mode = ssl.CERT_REQUIRED
    shown = {"certificate": at["certificate"], "key": at["key"]}
    async with proxied(redis.port, context) as proxy:
        url = f"rediss://localhost:{proxy.port}"
        async with linked(url, ca=at["ca"], **shown, budget_ms=5000) as link:
            assert await link.run(command("SET", "tls", "1"), AWAY) is not AWAY
        for where, more in (
            (url, {"ca": at["unknown"]} | shown),
            (url, {"ca": at["ca"]}),
            (f"rediss://127.0.0.1:{proxy.port}", {"ca": at["ca"]} | shown),  # not its name
        ):
            async with linked(where, **more, budget_ms=5000) as link:
                assert not link.up


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:hunter2@host:port",
        "redis://hunter2@a:1:2",
        "redis://:hunter2@[::1",
        "redis+sentinel://:hunter2@one:1,two:2",
        "redis://:hunter2@host/0?db=1&x=2",
        "http://:hunter2@host",
    ],
)
def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises((ValueError, ValidationError)) as caught:
        RedisLink(config.Redis(url=SecretStr(url)), Metrics())
    assert "hunter2" not in str(caught.value)


# --- away ---


async def test_stopped_at_the_start_nobody_waits_and_it_is_found_later() -> None:
    with Redis() as server:
        server.stop()
        async with linked(server.url) as link:
            assert not link.up
            await costs_nothing(link)
            server.start()
            await answers(link)


async def test_stopped_and_started_again() -> None:
    with Redis() as server:
        async with linked(server.url) as link:
            await link.run(command("SET", "key", "value"), AWAY)
            server.stop()
            for _ in range(FAILURES_MAX):
                assert await get(link) is AWAY
            await costs_nothing(link)
            server.start()
            await answers(link)
            assert await get(link) is None


async def test_frozen_it_costs_a_few_budgets_and_then_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit in ("ANSWER_S", "CUT_S"):  # so that the budget alone ends a wait
        monkeypatch.setattr(module, limit, 60.0)
    with Redis() as server:
        async with linked(server.url) as link:
            server.freeze()
            with structlog.testing.capture_logs() as logs:
                for number in range(FAILURES_MAX):
                    assert link.up, number
                    async with asyncio.timeout(20):
                        assert await get(link) is AWAY
                await costs_nothing(link)
                server.thaw()
                await answers(link)
            assert [(each["event"], each["log_level"]) for each in logs] == [
                ("redis.away", "warning"),
                ("redis.back", "info"),
            ]


async def test_slow_it_is_away_until_it_is_fast_enough(redis: Redis) -> None:
    async with proxied(redis.port) as proxy, linked(f"redis://127.0.0.1:{proxy.port}") as link:
        assert link.up
        proxy.delay = lambda: 2 * BUDGET_MS / 1000
        for _ in range(FAILURES_MAX):
            assert await get(link) is AWAY
        await costs_nothing(link)
        proxy.delay = lambda: 0.0
        await answers(link)


async def test_led_elsewhere_connections_are_made_anew(redis: Redis) -> None:
    with Redis() as other:
        other.ask("SET", "key", "elsewhere")
        async with proxied(redis.port) as proxy, linked(f"redis://127.0.0.1:{proxy.port}") as link:
            assert link.up
            proxy.target = other.port
            await proxy.cut()
            async with asyncio.timeout(30):
                while await get(link) != b"elsewhere":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_what_it_refuses_to_do_does_not_make_it_away(redis: Redis) -> None:
    async with linked(redis.url) as link:
        await link.run(command("RPUSH", "list", "1"), AWAY)
        for _ in range(2 * FAILURES_MAX):
            assert await get(link, "list") is AWAY
        assert link.up
        assert counted(link, "refused") == 2 * FAILURES_MAX


async def test_of_a_thousand_callers_few_wait_for_a_frozen_one() -> None:
    with Redis() as server:
        async with linked(server.url, budget_ms=500) as link:
            server.freeze()
            asked = [asyncio.create_task(get(link)) for _ in range(1000)]
            assert await asyncio.gather(*asked) == [AWAY] * 1000
            assert counted(link, "full") == 1000 - COMMANDS_MAX
            server.thaw()
            await answers(link)


async def test_its_log_names_no_password() -> None:
    with Redis(password="hunter2") as server:
        server.stop()
        with structlog.testing.capture_logs() as logs:
            async with linked(server.url):
                pass
    assert [each["event"] for each in logs] == ["redis.away"]
    assert "hunter2" not in str(logs)


async def test_a_store_that_is_full_or_emptied_is_there() -> None:
    with Redis("maxmemory 2mb", "maxmemory-policy allkeys-lru") as server:
        async with linked(server.url) as link:
            for number in range(300):
                await link.run(command("SET", f"key{number}", b"x" * 20_000), AWAY)
            assert server.ask("DBSIZE") < 300
            server.flush()
            assert await get(link, "key299") is None
            assert link.up


# --- an answer belongs to its question ---


@dataclass
class Tally:
    """Of callers many of whom lose patience."""

    right: int = 0
    wrong: int = 0
    cancelled: int = 0

    @property
    def is_enough(self) -> bool:
        return self.wrong > 0 or (self.right >= 300 and self.cancelled >= 2000)


async def tally(
    ask: Callable[[int], Awaitable[Any]],
    is_enough: Callable[[Tally], bool],
    *,
    callers: int = 12,
    patience_s: float = 0.02,
) -> Tally:
    """Asks and loses patience until it is enough."""
    found, numbers = Tally(), itertools.count()

    async def caller() -> None:
        while not is_enough(found):
            number = next(numbers)
            try:
                async with asyncio.timeout(random.uniform(0, patience_s)):
                    answer = await ask(number)
            except TimeoutError:
                found.cancelled += 1
                continue
            if answer is AWAY:
                await asyncio.sleep(0.001)
            elif answer == b"%d" % number:
                found.right += 1
            else:
                found.wrong += 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(caller() for _ in range(callers)))
    return found


def hasty(proxy: Proxy) -> None:
    proxy.delay = lambda: random.uniform(0, 0.004)


async def test_cancelled_callers_leave_no_answer_to_the_next(redis: Redis) -> None:
    async with (
        proxied(redis.port) as proxy,
        linked(f"redis://127.0.0.1:{proxy.port}", budget_ms=1000) as link,
    ):
        hasty(proxy)
        found = await tally(
            lambda number: link.run(command("ECHO", str(number)), AWAY),
            lambda so_far: so_far.is_enough,
        )
    assert found.wrong == 0


async def test_commands_that_are_cut_off_leave_none_either(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CUT_S", 0.1)
    async with (
        proxied(redis.port) as proxy,
        linked(f"redis://127.0.0.1:{proxy.port}", budget_ms=1000) as link,
    ):
        proxy.delay = lambda: random.choice([0.0] * 50 + [0.11])
        found = await tally(
            lambda number: link.run(command("ECHO", str(number)), AWAY),
            lambda so_far: so_far.wrong > 0 or (so_far.right >= 100 and counted(link, "late") >= 5),
            callers=3,
            patience_s=10,
        )
    assert found.wrong == 0


async def test_a_client_that_keeps_a_cut_connection_is_found_out(redis: Redis) -> None:
    """The tests above can fail: by a client as redis-py 4.5.1 was."""
    async with proxied(redis.port) as proxy:
        connection = Connection(port=proxy.port, protocol=2, socket_timeout=5)
        hasty(proxy)
        turn = asyncio.Lock()

        async def ask(number: int) -> Any:
            async with turn:
                await connection.send_command("ECHO", str(number))
                return await connection.read_response(disconnect_on_error=False)

        found = await tally(ask, lambda so_far: so_far.is_enough)
        await connection.disconnect(nowait=True)
    assert found.wrong > 0
