"""Redis: standalone, Sentinel or Cluster. It may be away, slow or empty at any moment."""

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from ssl import TLSVersion
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import structlog
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from authsvc import config
from authsvc.keys.secrets import jitter
from authsvc.telemetry import Counters, Metrics, log_about

T = TypeVar("T")
D = TypeVar("D")

COMMANDS_MAX = 64
"""Under way at once, and connections; who comes then does without."""
FAILURES_MAX = 3
"""In a row, after which no call waits until a probe was answered in time."""
REST_S = 0.5
"""Between two probes."""
ANSWER_S = 1.0
"""A connection that does not answer for so long is given up; a caller has gone on long before."""
CUT_S = 3.0
"""A command that takes longer, with all that it needs, is cut off, and its connection with it."""
IDLE_S = 1.0
"""Without a message, after which a subscription asks whether its connection is alive."""

log = structlog.get_logger()


class Commands(Protocol):
    """A client of redis-py. A command that was sent is never sent again."""

    async def execute_command(self, *args: Any) -> Any:
        """The answer, texts as bytes."""


class RedisLink:
    """Commands for callers who never wait longer than a budget, and not at all while it is away."""

    def __init__(self, settings: config.Redis, metrics: Metrics) -> None:
        """ValueError, without its text, where the URL is malformed."""
        self._place = Place(settings)
        self._budget_s = settings.budget_ms / 1000
        self._client = self._place.open()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self._turns = itertools.count()
        self.up = False
        """Whether commands are sent."""
        self.outcomes = Counters(
            "authsvc_redis_commands",
            "Commands to Redis, by outcome (ok, late, failed, refused; away, full: not sent)",
            ("outcome",),
        )
        metrics.registry.register(self.outcomes)
        metrics.gauges(("authsvc_redis_up", "Whether Redis is used", lambda: float(self.up)))

    async def start(self) -> None:
        """Asks once whether it is there; where it is not, goes on asking."""
        if cause := await self._answers():
            self._rest(cause)
        else:
            self.up = True

    async def close(self) -> None:
        """Gives connections back."""
        self.up = False
        tasks = [*self._under_way, *([self._probing] if self._probing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)
        await self._client.close()

    async def run(self, command: Callable[[Commands], Awaitable[T]], default: D) -> T | D:
        """Its result, or the default where that is not there within the budget. Never raises.

        The command belongs to a task of its own: a caller that goes away does not leave an answer
        behind that the next one on its connection would take for its own.
        """
        if not self.up or len(self._under_way) >= COMMANDS_MAX:
            self.outcomes.labels("full" if self.up else "away").inc()
            return default
        task = asyncio.create_task(self._run(command, default))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        done, _ = await asyncio.wait({task}, timeout=self._budget_s)
        return task.result() if done else default

    async def _run(self, command: Callable[[Commands], Awaitable[T]], default: D) -> T | D:
        """Counts a command once: when it is late, else when it ends."""
        client, is_counted = self._client, False

        def count(outcome: str, error: Exception | None = None) -> None:
            nonlocal is_counted
            if not is_counted:
                is_counted = True
                self._count(client, outcome, error)

        late = asyncio.get_running_loop().call_later(self._budget_s, count, "late")
        try:
            async with asyncio.timeout(CUT_S):
                answer = await command(client.commands)
        except TimeoutError:
            count("late")
            self._replace(client, self._place.open())
        except ResponseError as error:  # it is there, and does not want to
            count("refused", error)
        except (RedisError, OSError) as error:
            count("failed", error)
        except Exception as error:
            count("refused")
            log.error("redis.command_failed", exc_info=error)
        else:
            count("ok")
            return answer
        finally:
            late.cancel()
        return default

    def _count(self, client: "_Client", outcome: str, error: Exception | None) -> None:
        self.outcomes.labels(outcome).inc()
        if outcome == "ok":
            self._failures = 0
        elif outcome != "refused" and client is self._client:
            self._failures += 1
            if self.up and self._failures >= FAILURES_MAX:
                self._rest(_cause(error) if error else outcome)

    def _rest(self, cause: str) -> None:
        """Nobody waits for it from here on, but for the one task that asks whether it is back."""
        log.warning("redis.away", cause=cause)
        self.up = False
        self._probing = asyncio.create_task(self._probe(), name="redis-probe")

    async def _probe(self) -> None:
        log_about(lambda: {"task": "redis-probe"})  # not the call that found it away
        while True:
            await asyncio.sleep(REST_S / 2 + jitter(REST_S))
            if not await self._answers():
                break
        self._failures = 0
        self.up = True
        log.info("redis.back")

    async def _answers(self) -> str:
        """Why a new connection cannot be had, or is not fast enough. If it is: nothing."""
        client = self._place.open()
        try:
            async with asyncio.timeout(ANSWER_S):
                await client.commands.execute_command("PING")
            async with asyncio.timeout(self._budget_s):
                await client.commands.execute_command("PING")
        except Exception as error:
            await client.close()
            return _cause(error)
        except BaseException:
            await client.close()
            raise
        self._replace(self._client, client)
        return ""

    def _replace(self, old: "_Client", new: "_Client") -> None:
        """All connections are made anew: names are looked up again, the password read again."""
        if old is not self._client:
            old = new
        else:
            self._client = new
        closing = asyncio.create_task(_close(old, after=set(self._under_way)))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def publish(self, channel: str, message: bytes) -> bool:
        """See `Bus`."""
        sent = await self.run(
            lambda redis: redis.execute_command("PUBLISH", channel, message), None
        )
        return sent is not None

    async def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        """See `Bus`; over a connection of its own."""
        client = self._place.open_listener(self._masters(), next(self._turns))
        pubsub = client.commands.pubsub()
        try:
            await pubsub.subscribe(channel)
            heard = True
            while True:
                found = await pubsub.get_message(timeout=IDLE_S)
                if found is None:
                    if not heard:  # not even that it is alive
                        return
                    heard = False
                    await pubsub.ping()
                    yield None
                    continue
                heard = True
                if found["type"] == "message":
                    yield bytes(found["data"])
                elif found["type"] == "subscribe":
                    yield None
        except (RedisError, OSError) as error:
            log.debug("redis.not_heard", cause=_cause(error))
        finally:
            with suppress(RedisError, OSError):
                await pubsub.aclose()
            await client.close()

    def _masters(self) -> list[tuple[str, int]]:
        """Of a Cluster, as far as they are known."""
        cluster = self._client.commands
        nodes = cluster.get_primaries() if isinstance(cluster, RedisCluster) else []
        return [(node.host, int(node.port)) for node in nodes]


async def _close(client: "_Client", after: set[asyncio.Task[Any]]) -> None:
    """Once nobody uses it: a connection that is made later would stay open."""
    if after:
        await asyncio.wait(after)
    await client.close()


def _cause(error: BaseException) -> str:
    """For the log: errors about connections name no more than the address."""
    text = str(error) if isinstance(error, (RedisConnectionError, OSError)) else ""
    return f"{type(error).__name__} {text}".strip()


# --- where it is ---


@dataclass(frozen=True, slots=True)
class _Client:
    """Connections, made when they are needed."""

    commands: Any
    also: tuple[Any, ...] = ()
    """What is closed with it."""

    async def close(self) -> None:
        for each in (self.commands, *self.also):
            with suppress(RedisError, OSError):
                await each.aclose()


class Place:
    """Where Redis is, and how connections to it are made."""

    def __init__(self, settings: config.Redis) -> None:
        url = settings.url.get_secret_value() if settings.url is not None else ""
        scheme, _, rest = url.partition("://")
        found = re.fullmatch(r"(?:(.*)@)?([^@/?]*)(/[^?]*)?(?:\?db=(\d+))?", rest)
        if found is None:
            raise ValueError("redis.url is malformed")
        userinfo, hosts, path, db = found.groups(default="")
        user, _, password = map(unquote, userinfo.partition(":"))
        is_tls, self._mode = scheme.startswith("rediss"), scheme.partition("+")[2]
        self._path = unquote(path) if scheme == "unix" else ""
        if self._mode == "sentinel":
            self._service, _, path = path[1:].partition("/")
            path = "/" + path
        self._db = int(db or (path[1:] if path[1:].isdecimal() and not self._path else 0))
        self._hosts = [_host(each) for each in hosts.split(",")] if not self._path else []
        if self._mode == "sentinel" and not self._service:
            raise ValueError("redis.url names no service of the Sentinels")
        self._common: dict[str, Any] = {
            "socket_timeout": ANSWER_S,
            "socket_connect_timeout": ANSWER_S,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "client_name": "authsvc",
        }
        if is_tls:
            self._common |= {
                "ssl": True,
                "ssl_ca_certs": _text(settings.ca),
                "ssl_certfile": _text(settings.certificate),
                "ssl_keyfile": _text(settings.key),
                "ssl_min_version": TLSVersion.TLSv1_2,
            }
        self._sentinels = dict(self._common)
        if settings.sentinel_password is not None:
            self._sentinels["password"] = settings.sentinel_password.get_secret_value()
        if password or settings.password is not None or settings.password_file is not None:
            self._common["credential_provider"] = _Credentials(settings, user, password)

    def open(self) -> _Client:
        """A client for commands."""
        if self._mode == "cluster":
            nodes = [ClusterNode(host, port) for host, port in self._hosts]
            cluster = RedisCluster(
                startup_nodes=nodes,
                max_connections=COMMANDS_MAX,
                require_full_coverage=False,
                **self._common,
            )
            return _Client(cluster)
        if self._mode == "sentinel":
            sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
                self._hosts, sentinel_kwargs=self._sentinels, **self._common
            )
            master = sentinel.master_for(self._service, db=self._db, max_connections=COMMANDS_MAX)
            return _Client(master, tuple(sentinel.sentinels))
        return _Client(self._single(self._hosts[0] if self._hosts else None))

    def open_listener(self, nodes: list[tuple[str, int]], turn: int) -> _Client:
        """A client to subscribe with. Of a Cluster any of its nodes says what is published."""
        if self._mode == "cluster":
            nodes = nodes or self._hosts
            return _Client(self._single(nodes[turn % len(nodes)]))
        return self.open()

    def _single(self, host: tuple[str, int] | None) -> Redis:
        where: dict[str, Any] = {"unix_socket_path": self._path}
        if host is not None:
            where = {"host": host[0], "port": host[1]}
        return Redis(db=self._db, max_connections=COMMANDS_MAX, **where, **self._common)


class _Credentials(CredentialProvider):
    """User and password for a new connection; a file with it is read each time."""

    def __init__(self, settings: config.Redis, user: str, password: str) -> None:
        if not password and settings.password is not None:
            password = settings.password.get_secret_value()
        self._user, self._password, self._file = user, password, settings.password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """As redis-py wants them."""
        password = self._password
        if not password and self._file is not None:
            password = self._file.read_text(encoding="utf-8").strip()
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """As `get_credentials`."""
        return self.get_credentials()


def _host(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?", text)
    if found is None:
        raise ValueError("redis.url: each host is `host:port`")
    return found[1].strip("[]"), int(found[2] or 6379)


def _text(path: Path | None) -> str | None:
    return str(path) if path is not None else None
