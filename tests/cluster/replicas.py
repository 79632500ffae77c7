"""Replicas as real processes on one database, and the ways in which each of them fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg
import grpc

from authsvc.clock import SystemClock
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    CA,
    ISSUER,
    SERVER,
    TIMEOUT_S,
    Member,
    Running,
    issue_request,
    migrate,
    read_failure,
    spiffe,
)
from tests.redis_servers import Redis
from tests.servers import Postgres, launcher

START_S_MAX = 60.0
GRANTS = (
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
)
TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"
T = TypeVar("T")


class Process:
    """One `authsvc serve` with a state directory of its own; it can be started many times.

    `plant` is Python that runs in the process before it serves: a bug, or a death at a point of its
    own choosing. The product has no switch for that.
    """

    def __init__(
        self, root: Path, name: str, environment: dict[str, str], *, plant: str = ""
    ) -> None:
        self.name = name
        self.root = root / name
        self.root.mkdir(parents=True)
        self.environment = environment
        self.plant = plant
        self.ready = self.root / "ready.json"
        self.port = self.health_port = self.metrics_port = 0
        """Chosen by the kernel at the first start, and kept from then on."""
        self._child: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Starts it and does not wait. It dies with the thread that calls this: the main one."""
        self.ready.unlink(missing_ok=True)
        code = f"{self.plant}\nfrom authsvc.cli import main\nmain()"
        program = ("-c", code) if self.plant else ("-m", "authsvc")
        ports = {"port": self.port, "metrics-port": self.metrics_port}
        ports["health-port"] = self.health_port
        flags = [part for name, port in ports.items() for part in (f"--{name}", str(port))]
        with (self.root / "log").open("ab") as log:
            self._child = subprocess.Popen(
                [
                    *(*launcher(), sys.executable, *program, "serve", *flags),
                    *("--state-dir", str(self.root / "state"), "--ready-file", str(self.ready)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                env={"PATH": os.environ["PATH"], "HOME": str(self.root)} | self.environment,
            )

    def wait(self) -> None:
        """Until it serves."""
        give_up = time.monotonic() + START_S_MAX
        while not self.ready.exists():
            if not self.lives or time.monotonic() > give_up:
                raise RuntimeError(f"{self.name} does not serve:\n{self.log()[-4000:]}")
            time.sleep(0.01)
        where = json.loads(self.ready.read_text())
        self.port, self.health_port = where["port"], where["health_port"]
        self.metrics_port = where["metrics_port"]

    def start(self) -> None:
        """Serves when it returns."""
        self.launch()
        self.wait()

    @property
    def lives(self) -> bool:
        """Whether the process is there, stopped or not."""
        return self._child is not None and self._child.poll() is None

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is there."""
        if self._child is not None and self.lives:
            self._child.send_signal(number)

    def freeze(self) -> None:
        """Stops it in the middle of whatever it does; its connections stay open."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it as a power cut would."""
        self.signal(signal.SIGKILL)
        self.ended()

    def ended(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for its end: the exit code."""
        return self._child.wait(timeout_s) if self._child is not None else 0

    def log(self) -> str:
        """All that it ever wrote."""
        return (self.root / "log").read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The structured lines of its log."""
        found = []
        for line in self.log().splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found


class Replica(Running):
    """A process as a caller sees it; the connections are those of one test."""

    def __init__(self, process: Process) -> None:
        where: Any = process  # the ports are all that a caller knows
        super().__init__(where, SystemClock(), where)
        self.process = process


def environment(root: Path, url: str, redis: str = "", **settings: str) -> dict[str, str]:
    """Settings that all replicas of a cluster share: files of secrets, as in production."""
    files = {
        "AUTHSVC_TLS__CERTIFICATE": ("server.pem", SERVER.pem),
        "AUTHSVC_TLS__KEY": ("server-key.pem", SERVER.key_pem),
        "AUTHSVC_TLS__CLIENT_CA": ("clients.pem", CA.pem),
        "AUTHSVC_DATABASE__URL_FILE": ("database.url", url.encode()),
        "AUTHSVC_SEAL_KEYS_FILE": ("seal.key", b"11" * 32),
        "AUTHSVC_REFRESH_KEYS_FILE": ("refresh.key", b"22" * 32),
    }
    for name, content in files.values():
        (root / name).write_bytes(content)
    found = {variable: str(root / name) for variable, (name, _) in files.items()}
    found |= {"AUTHSVC_ISSUER": ISSUER, "AUTHSVC_ADMINS": spiffe("admin")}
    found |= {"AUTHSVC_DRAIN_S": "5", "PYTHONDONTWRITEBYTECODE": "1"}
    if redis:
        found["AUTHSVC_REDIS__URL"] = redis
    return found | settings


# --- who plays ---


@dataclass(frozen=True)
class Cast:
    """`app`, whose tokens are for what `owner` owns and judges."""

    owner: Member
    app: Member
    resource: str
    scopes: tuple[str, ...]

    async def open(self, at: Running) -> str:
        """The first refresh token of a new grant."""
        subject = (await at.token(self.app)).access_token
        request = auth_pb2.IssueTokenRequest(
            token_exchange=auth_pb2.TokenExchangeGrant(
                subject_token=subject,
                subject_token_type=TOKEN_TYPE + "access_token",
                requested_token_type=TOKEN_TYPE + "refresh_token",
            ),
            client_id=self.app.client_id,
        )
        return (await at.auth(self.app.who).IssueToken(request)).token.refresh_token

    async def use(self, at: Running, token: str) -> auth_pb2.IssuedToken:
        """Uses a refresh token."""
        request = auth_pb2.RefreshTokenRequest(refresh_token=token, client_id=self.app.client_id)
        return (await at.auth(self.app.who).RefreshToken(request, timeout=TIMEOUT_S)).token

    async def revoke(self, at: Running, token: str) -> int:
        """Revokes a token: the revision."""
        request = auth_pb2.RevokeTokenRequest(token=token)
        answer = await at.auth(self.app.who).RevokeToken(request, timeout=TIMEOUT_S)
        return int(answer.revision)

    async def is_active(self, at: Running, token: str, **consistency: Any) -> bool:
        """Whether the token is judged to be good, by the state at hand or a fresher one."""
        more: dict[str, Any] = {}
        if consistency:
            more["consistency"] = auth_pb2.Consistency(**consistency)
        return bool((await at.verdict(self.owner.who, token, of=self.app.who, **more)).active)

    async def issue(self, at: Running) -> str:
        """An access token."""
        request = issue_request(self.app.client_id)
        return str((await at.auth(self.app.who).IssueToken(request)).token.access_token)


STRONG = {"strong": auth_pb2.StrongConsistency()}


async def cast(at: Running) -> Cast:
    """Registers and approves it, under names of its own, so that many can play on one database."""
    name = uuid4().hex[:8]
    owner = await at.member(f"owner-{name}", "validate", "watch")
    resource, scope = f"https://{name}.test", f"{name}.read"
    await at.resource(resource, scope, owner=owner.client_id)
    app = await at.member(f"app-{name}", scope, grant_types=GRANTS)
    return Cast(owner, app, resource, (scope,))


async def known(pair: list[Replica], made: Cast) -> None:
    """Waits until every replica has read that the cast exists."""
    token = await made.issue(pair[0])
    for replica in pair:
        await eventually(partial(made.is_active, replica, token))


async def attempt(call: Awaitable[T]) -> T | str:
    """What was answered, or the reason or code of the refusal."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        found = read_failure(error)
        return found.reason or found.code


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_s: float = TIMEOUT_S) -> float:
    """Asks until it holds: the seconds that it took."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not await holds():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.002)
    return time.monotonic() - started


def rounds(number: int) -> int:
    """How often a race is run: AUTHSVC_TEST_ROUNDS multiplies it."""
    return max(1, int(number * float(os.environ.get("AUTHSVC_TEST_ROUNDS", "1"))))


async def in_turn(jobs: Sequence[Callable[[], Awaitable[None]]], width: int) -> None:
    """Does all of them, `width` at any time; the first failure ends it."""
    left = iter(jobs)

    async def worker() -> None:
        for job in left:
            await job()

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(worker())


# --- the network ---


@dataclass
class Link:
    """TCP from one replica to a server, in a thread of its own: it can be cut, frozen and slowed.

    Nothing waits in it but what it was told to hold back.
    """

    target: tuple[str, int] | Path
    port: int = 0
    delay_s: Callable[[], float] = field(default=lambda: 0.0)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _is_cut: bool = False

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._moving = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._open())

    def _do(self, what: Any) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(TIMEOUT_S)

    async def _open(self) -> None:
        self._moving.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self._is_cut:
                return
            far_reader, far_writer = await (
                asyncio.open_unix_connection(self.target)
                if isinstance(self.target, Path)
                else asyncio.open_connection(*self.target)
            )
            self._writers.add(far_writer)
            try:
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
            finally:
                self._writers.discard(far_writer)
                far_writer.close()
        except OSError:
            return
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if delay := self.delay_s():
                    await asyncio.sleep(delay)
                await self._moving.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        """Ends every connection and takes no new one."""
        self._do(self._cut())

    async def _cut(self) -> None:
        self._is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def freeze(self) -> None:
        """Takes everything and passes nothing on."""
        self._loop.call_soon_threadsafe(self._moving.clear)

    def mend(self, target: tuple[str, int] | None = None) -> None:
        """Works as at first; to another server where one is given."""
        self._do(self._mend(target))

    async def _mend(self, target: tuple[str, int] | None) -> None:
        if target is not None and target != self.target:
            await self._cut()  # who was connected to the old one finds the new one
            self.target = target
        self._is_cut = False
        self.delay_s = lambda: 0.0
        self._moving.set()

    def close(self) -> None:
        """Leaves no thread behind."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        self._moving.set()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


# --- all of it ---


class Cluster:
    """Two replicas on one PostgreSQL and one Redis, to which each has a link of its own."""

    def __init__(self, root: Path, postgres: Postgres, url: str, **settings: str) -> None:
        self.postgres = postgres
        self.url = url
        self.root = root
        self.redis = Redis()
        try:
            self.links = [Link(("127.0.0.1", self.redis.port)) for _ in "ab"]
            shared = environment(root, url, **settings)
            self.processes = [
                Process(root, name, shared | self.by(link))
                for name, link in zip("ab", self.links, strict=True)
            ]
        except BaseException:
            self.redis.close()
            raise

    def by(self, link: Link) -> dict[str, str]:
        """The setting of a replica that comes to Redis over this link."""
        return {"AUTHSVC_REDIS__URL": f"redis://127.0.0.1:{link.port}/0"}

    def start(self) -> None:
        """Both serve when it returns."""
        for process in self.processes:
            process.launch()
        for process in self.processes:
            process.wait()

    def mend(self) -> None:
        """Undoes what a test did: everything runs and is connected."""
        for process in self.processes:
            process.thaw()
            if not process.lives:
                process.launch()
        if not self.redis.runs:
            self.redis.start()
        self.redis.thaw()
        for link in self.links:
            link.mend(("127.0.0.1", self.redis.port))
        for process in self.processes:
            process.wait()

    def close(self) -> None:
        """Leaves no process behind."""
        for process in self.processes:
            process.kill()
        for link in self.links:
            link.close()
        self.redis.close()

    async def beside(self) -> str:
        """The URL of another, migrated database."""
        url = await self.postgres.database()
        await migrate(url)
        return url

    async def sql(self, *statements: str) -> None:
        """Does what nobody may: writes by hand."""
        connection = await asyncpg.connect(self.url.replace("+asyncpg", ""))
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()
