"""What a bench is given, and the line that it answers."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from authsvc_client.v1 import auth_pb2

from .load import Compared, Contender, Method, Round, take_turns
from .processes import Answer, Cores, Server, floor
from .scene import Scene, connect

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Budget:
    """The bounds of a ratio."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        bounds = ((">=", self.least), ("<=", self.most))
        return " ".join(f"{sign}{bound:.2f}" for sign, bound in bounds if bound is not None)

    def holds(self, ratio: float) -> bool:
        """Whether the ratio keeps it, unrounded."""
        above = self.least is None or ratio >= self.least
        return above and (self.most is None or ratio <= self.most)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int
    calls: int
    """Of a burst."""
    holders: int
    """Users who hold one role."""
    grown: int
    """Live revocations of a grown system, and its clients."""


FULL = Size(rounds=60, calls=400, holders=1000, grown=1_000_000)
QUICK = Size(rounds=3, calls=60, holders=20, grown=2000)


@dataclass(frozen=True, slots=True)
class Stage:
    """authsvc, its scene, and where to put the floor."""

    scene: Scene
    authsvc: Server
    cores: Cores
    size: Size

    def same(self, request: bytes) -> list[list[bytes]]:
        """Batches of one request; one more than are counted."""
        return [[request] * self.size.calls] * (self.size.rounds + 1)

    @asynccontextmanager
    async def contenders(
        self, peer: str, method: str, request: bytes, *, signs: bool = False
    ) -> AsyncIterator[tuple[Contender, Contender]]:
        """The floor, which answers what authsvc answers to the request, and authsvc."""
        async with connect(self.scene.pki, peer, self.authsvc.port) as channel:
            real = Method(channel, method)
            [response] = await real.burst([request])
            answers = {method: Answer.of(f"{method}Request", response, signs=signs)}
            with floor(self.scene.pki, answers, self.cores.servers) as server:
                async with connect(self.scene.pki, peer, server.port) as floor_channel:
                    yield (
                        Contender(server, Method(floor_channel, method)),
                        Contender(self.authsvc, real),
                    )


async def warm(stage: Stage, request: bytes) -> Compared:
    """ValidateToken of one token again and again, beside the floor."""
    async with stage.contenders("billing", "ValidateToken", request) as (echo, real):
        rounds = await take_turns(echo, real, stage.same(request))
    require_active(rounds)
    return Compared.of(rounds)


def rates(compared: Compared) -> Line:
    """What a line says of a comparison with the floor."""
    return {
        "value": round(compared.rate),
        "unit": "requests/s",
        "floor": round(compared.floor_rate),
        "ratio": compared.rate_ratio,
        "cpu_us": round(compared.cpu_us, 1),
        "floor_cpu_us": round(compared.floor_cpu_us, 1),
        "busy": round(compared.busy, 2),
    }


def require_active(rounds: Sequence[Round]) -> None:
    """That authsvc found every token alive; else a figure would mean nothing."""
    answers = (a for r in rounds for a in r.real.answers)
    if not all(auth_pb2.ValidateTokenResponse.FromString(answer).active for answer in answers):
        raise RuntimeError("an answer that is not active")
