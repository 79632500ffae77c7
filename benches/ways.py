"""Four ways to have a token judged, by one client for one answer: remote, in a batch, by the agent,
and in the caller's own process."""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from authsvc_client import AuthsvcClient
from authsvc_client.v1 import auth_pb2

from .local import asked, issuer, watching
from .processes import cpu_s, own_environment, pin, until_ready
from .scene import connect, files_of
from .stage import Line, Stage

BATCH = 100

Ask = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Way:
    """How a token is judged."""

    ask: Ask
    """Judges `tokens` at once; raises where one is not active."""
    server: Callable[[], float] | None = None
    """CPU seconds so far of the process that is asked."""
    tokens: int = 1
    times: int = 1
    """Asked in place of once: for what takes next to nothing."""


class Took:
    """What one way took, round by round."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self.seconds: list[float] = []
        """Each call."""
        self._caller: list[float] = []
        self._server: list[float] = []

    async def round(self, times: int) -> None:
        """Calls one after another."""
        ask, server = self._way.ask, self._way.server or _nobody
        gc.collect()
        theirs, own = server(), time.process_time()
        for _ in range(times * self._way.times):
            started = time.perf_counter()
            await ask()
            self.seconds.append(time.perf_counter() - started)
        count = times * self._way.times * self._way.tokens
        self._caller.append((time.process_time() - own) / count)
        self._server.append((server() - theirs) / count)

    @property
    def cpu_s(self) -> float:
        """Of caller and server, a token."""
        return median(map(sum, zip(self._caller, self._server, strict=True)))

    def line(self) -> dict[str, float]:
        """In microseconds; CPU time is a token's."""
        each = sorted(self.seconds)
        return {
            "p50_us": _us(median(each)),
            "p99_us": _us(each[len(each) * 99 // 100]),
            "cpu_us": _us(self.cpu_s),
            "caller_cpu_us": _us(median(self._caller)),
            "server_cpu_us": _us(median(self._server)),
        }


def _nobody() -> float:
    return 0.0


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


async def _measure(stage: Stage, ways: Mapping[str, Way]) -> dict[str, Took]:
    """They take turns, after a round that warms up."""
    found: dict[str, Took] = {}
    for number in range(stage.size.rounds + 1):
        if number < 2:
            found = {name: Took(way) for name, way in ways.items()}
        for took in found.values():
            await took.round(stage.size.calls // 16)
    return found


async def ways(stage: Stage) -> Line:
    """All four in one run, a call at a time; `ratio` is the CPU time of local to that of remote."""
    async with AsyncExitStack() as stack:
        [token] = await stage.scene.tokens(1)
        given = asked(stage.scene)
        remote = await stack.enter_async_context(_client(stage, stage.authsvc.port))
        beside = await stack.enter_async_context(_agent(stage))
        validator = await stack.enter_async_context(watching(stage))
        found = await _measure(
            stage,
            {
                "remote": Way(_asking(remote.validate, token, given), stage.authsvc.cpu),
                "batch": Way(
                    _asking(remote.validate, token, given, BATCH), stage.authsvc.cpu, BATCH
                ),
                "agent": Way(_asking(beside.client.validate, token, given), beside.cpu),
                "local": Way(_asking(validator.validate, token, given), times=100),
            },
        )
    remote_s, local_s = found["remote"].cpu_s, found["local"].cpu_s
    return {
        "value": _us(local_s),
        "unit": "us of CPU a token",
        "floor": _us(remote_s),
        "ratio": local_s / remote_s,
        "batch_tokens": BATCH,
        "ways": {name: took.line() for name, took in found.items()},
    }


async def agent(stage: Stage) -> Line:
    """ValidateToken of an agent on its Unix socket; `ratio` is its CPU time, with its caller's, to
    that of the floor by TCP and mTLS, where authsvc answers beside it."""
    async with AsyncExitStack() as stack:
        [token] = await stage.scene.tokens(1)
        given = asked(stage.scene)
        request = stage.scene.validation(token, auth_pb2.TOKEN_VIEW_CLAIMS)
        pair = stage.contenders("billing", "ValidateToken", request)
        empty, _ = await stack.enter_async_context(pair)
        least = await stack.enter_async_context(_client(stage, empty.server.port))
        remote = await stack.enter_async_context(_client(stage, stage.authsvc.port))
        beside = await stack.enter_async_context(_agent(stage))
        found = await _measure(
            stage,
            {
                "floor": Way(_asking(least.validate, token, given), empty.server.cpu),
                "remote": Way(_asking(remote.validate, token, given), stage.authsvc.cpu),
                "agent": Way(_asking(beside.client.validate, token, given), beside.cpu),
            },
        )
    floor_s, agent_s = found["floor"].cpu_s, found["agent"].cpu_s
    return {
        "value": _us(median(found["agent"].seconds)),
        "unit": "us, p50",
        "floor": _us(median(found["floor"].seconds)),
        "ratio": agent_s / floor_s,
        **{
            f"{name}_{figure}": value
            for name, took in found.items()
            for figure, value in took.line().items()
        },
    }


def _asking(
    validate: Callable[..., Awaitable[Any]], token: str, given: Mapping[str, Any], times: int = 1
) -> Ask:
    """All at once, which travel in one call."""

    async def one() -> None:
        if not (await validate(token, **given)).active:
            raise RuntimeError("an answer that is not active")

    async def many() -> None:
        await asyncio.gather(*(one() for _ in range(times)))

    return one if times == 1 else many


@asynccontextmanager
async def _client(stage: Stage, port: int) -> AsyncIterator[AuthsvcClient]:
    async with AuthsvcClient(connect(stage.scene.pki, "billing", port)) as client:
        yield client


@dataclass(frozen=True, slots=True)
class _Agent:
    """An agent, and a process beside it."""

    client: AuthsvcClient
    pid: int

    def cpu(self) -> float:
        """CPU seconds of the agent so far."""
        return cpu_s(self.pid)


@asynccontextmanager
async def _agent(stage: Stage) -> AsyncIterator[_Agent]:
    """`authsvc agent`, where the servers run."""
    async with AsyncExitStack() as stack:
        # The path of a socket has 107 characters at most.
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="a-")))
        path, ready = directory / "agent", directory / "ready"
        ca, certificate, key = files_of(stage.scene.pki, "billing")
        process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
            [
                *(sys.executable, "-m", "authsvc", "agent", "--issuer", issuer(stage)),
                *("--address", f"localhost:{stage.authsvc.port}", "--ready-file", str(ready)),
                *("--ca", str(ca), "--cert", str(certificate), "--key", str(key)),
                *("--socket", str(path)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=own_environment(),
        )
        pin(stage.cores.servers, process.pid)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        await until_ready(process, ready)
        channel = grpc.aio.insecure_channel(f"unix:{path}")
        yield _Agent(await stack.enter_async_context(AuthsvcClient(channel)), process.pid)
