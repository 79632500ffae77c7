"""Bursts of calls, and rounds in which the contenders take turns."""

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import grpc

from .processes import Server

WIDTH = 16
"""Calls under way at any time: enough to keep a server busy without a pause."""


class Method:
    """A unary method as bytes to bytes: the load generator must cost less than the servers."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._call: Any = channel.unary_unary(f"/authsvc.v1.AuthService/{name}")

    async def burst(self, requests: Sequence[bytes], width: int = WIDTH) -> list[bytes]:
        """Makes all the calls, `width` of them at any time; raises what a call raises."""
        answers: list[bytes] = []
        left = iter(requests)

        async def caller() -> None:
            answers.extend([await self._call(request) for request in left])

        await asyncio.gather(*(caller() for _ in range(width)))
        return answers

    async def one_by_one(self, request: bytes, count: int) -> list[float]:
        """Makes as many calls, one after another; the seconds that each took."""
        took = []
        for _ in range(count):
            started = time.perf_counter()
            await self._call(request)
            took.append(time.perf_counter() - started)
        return took


@dataclass(frozen=True, slots=True)
class Burst:
    """What one burst took, per call."""

    wall_s: float
    cpu_s: float
    """Of the server."""
    answers: list[bytes]


class Contender:
    """A server, and the method of it that is measured."""

    def __init__(self, server: Server, method: Method) -> None:
        self.server = server
        self._method = method

    async def run(self, requests: Sequence[bytes]) -> Burst:
        """One measured burst."""
        gc.collect()
        cpu, wall = self.server.cpu(), time.perf_counter()
        answers = await self._method.burst(requests)
        wall = time.perf_counter() - wall
        cpu = self.server.cpu() - cpu
        return Burst(wall / len(requests), cpu / len(requests), answers)


@dataclass(frozen=True, slots=True)
class Round:
    """Two bursts that follow each other, and what bare operations cost meanwhile."""

    floor: Burst
    real: Burst
    bare_s: float = 0.0


async def take_turns(
    floor: Contender,
    real: Contender,
    batches: Sequence[Sequence[bytes]],
    bare: str | None = None,
) -> list[Round]:
    """A round for each batch, the first of which only warms up."""
    rounds = [await turn(n, floor, real, batch, bare) for n, batch in enumerate(batches)]
    return rounds[1:]


async def turn(
    number: int,
    floor: Contender,
    real: Contender,
    batch: Sequence[bytes],
    bare: str | None = None,
    *,
    theirs: Sequence[bytes] = (),
) -> Round:
    """One round; who begins changes with its number. `theirs` is asked of `real` in place of
    `batch`, where tokens of one are none of the other.
    """
    turns = [(floor, batch), (real, theirs or batch)][:: 1 if number % 2 else -1]
    bursts = {each: await each.run(requests) for each, requests in turns}
    bare_s = floor.server.bare(bare) if bare else 0.0
    return Round(bursts[floor], bursts[real], bare_s)


@dataclass(frozen=True, slots=True)
class Compared:
    """Medians of all rounds."""

    rate: float
    floor_rate: float
    rate_ratio: float
    cpu_us: float
    floor_cpu_us: float
    busy: float
    """Share of the bursts in which the servers computed: near 1, or rates say little of them."""

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> "Compared":
        """From the rounds; a ratio is the median of the rounds' ratios."""
        bursts = [burst for r in rounds for burst in (r.floor, r.real)]
        return cls(
            rate=median(1 / r.real.wall_s for r in rounds),
            floor_rate=median(1 / r.floor.wall_s for r in rounds),
            rate_ratio=median(r.floor.wall_s / r.real.wall_s for r in rounds),
            cpu_us=median(r.real.cpu_s for r in rounds) * 1e6,
            floor_cpu_us=median(r.floor.cpu_s for r in rounds) * 1e6,
            busy=median(burst.cpu_s / burst.wall_s for burst in bursts),
        )
