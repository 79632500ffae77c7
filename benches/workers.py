"""What a second worker is worth."""

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from authsvc_client.v1 import auth_pb2

from .load import Burst, Method
from .processes import Cores, cpu_s, own_environment, until_ready
from .scene import connect
from .stage import Line, Stage

CHANNELS = 32
"""Enough that the kernel, which deals them out by chance, gives each worker about half."""
_APART = (os.cpu_count() or 1) >= 4
"""Whether there are processors for two workers and for the load."""


class _Served:
    """`authsvc serve --workers N`, under load over many connections."""

    def __init__(self, methods: Sequence[Method], pids: Sequence[int]) -> None:
        self._methods = methods
        self._pids = pids

    async def run(self, requests: Sequence[bytes]) -> Burst:
        gc.collect()
        parts = [requests[at :: len(self._methods)] for at in range(len(self._methods))]
        cpu, wall = cpu_s(*self._pids), time.perf_counter()
        bursts = [m.burst(part, 1) for m, part in zip(self._methods, parts, strict=True)]
        answers = [answer for found in await asyncio.gather(*bursts) for answer in found]
        wall = time.perf_counter() - wall
        cpu = cpu_s(*self._pids) - cpu
        return Burst(wall / len(requests), cpu / len(requests), answers)


@asynccontextmanager
async def _served(stage: Stage, count: int) -> AsyncIterator[_Served]:
    """On the state of the stage's authsvc, so that its tokens are good here."""
    async with AsyncExitStack() as stack:
        ready = Path(stack.enter_context(TemporaryDirectory(prefix="authsvc-bench-"))) / "ready"
        ports = ("--port", "0", "--metrics-port", "0", "--health-port", "0")
        process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
            [
                *(sys.executable, "-m", "authsvc", "serve", *ports, "--log-level", "error"),
                *("--state-dir", str(stage.scene.pki.parent), "--workers", str(count)),
                *("--ready-file", str(ready)),
            ],
            stdout=subprocess.DEVNULL,
            env=own_environment(),
        )
        _unpin(process.pid, stage.cores)  # before it starts its workers
        stack.callback(process.wait)
        stack.callback(process.terminate)
        await until_ready(process, ready)
        where = json.loads(ready.read_text())
        channels = [
            await stack.enter_async_context(connect(stage.scene.pki, "billing", where["port"]))
            for _ in range(CHANNELS)
        ]
        methods = [Method(channel, "ValidateToken") for channel in channels]
        yield _Served(methods, where.get("workers", [where["pid"]]))


def _unpin(pid: int, cores: Cores) -> None:
    """Two workers on one core would be one; the load's is left to it where there are others."""
    if cores.pinned:
        all_cores = set(range(os.cpu_count() or 1))
        os.sched_setaffinity(pid, all_cores - {cores.load} if _APART else all_cores)


async def workers(stage: Stage) -> Line:
    """ValidateToken, warm, of two workers and of one.

    `ratio` is that of the rates where the load has processors of its own; elsewhere that of what
    they answer in the CPU time of as many cores, which leaves out what they wait for each other.
    """
    [token] = await stage.scene.tokens(1)
    request = stage.scene.validation(token, auth_pb2.TOKEN_VIEW_VERDICT)
    async with _served(stage, 1) as one, _served(stage, 2) as two:
        rounds = []
        for number, batch in enumerate(stage.same(request)):
            order = (one, two) if number % 2 else (two, one)
            found = {each: await each.run(batch) for each in order}
            if number:
                rounds.append((found[one], found[two]))
    answers = (answer for pair in rounds for burst in pair for answer in burst.answers)
    if not all(auth_pb2.ValidateTokenResponse.FromString(answer).active for answer in answers):
        raise RuntimeError("an answer that is not active")
    wall = median(first.wall_s / second.wall_s for first, second in rounds)
    by_cpu = 2 * median(first.cpu_s / second.cpu_s for first, second in rounds)
    return {
        "value": round(median(1 / second.wall_s for _, second in rounds)),
        "unit": "requests/s",
        "floor": round(median(1 / first.wall_s for first, _ in rounds)),
        "ratio": wall if _APART else by_cpu,
        "by": "wall" if _APART else "cpu",
        "wall_ratio": round(wall, 4),
        "cpu_us": round(median(second.cpu_s for _, second in rounds) * 1e6, 1),
        "floor_cpu_us": round(median(first.cpu_s for first, _ in rounds) * 1e6, 1),
    }
