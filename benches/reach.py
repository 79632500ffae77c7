"""How soon a revocation that one replica answered is seen at another, with Redis and without."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from authsvc.app import migrate
from authsvc.config import load
from authsvc.feed.follow import POLL_S
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from tests.redis_servers import Redis
from tests.servers import Postgres

from .processes import authsvc
from .scene import Scene, connect, scene
from .stage import Line, Stage

WITH_S_MAX, WITHOUT_S_MAX = 0.05, 1.1
"""Budgets of the slowest of a hundred, with Redis and without."""
SEEN_S_MAX = 30.0
MANY = 50
"""Watchers at one replica."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Seconds from the answer of RevokeToken at one replica until the other one knew."""

    refused: float
    """The first ValidateToken that says so; 0 where one did before the answer was there."""
    told: float
    """The last of the watchers."""
    gap: float
    """Between two of the questions: by so much `refused` may be too long."""


async def revocation_reach(stage: Stage) -> Line:
    """Two replicas on a PostgreSQL: revoked at one, asked and watched at the other. Revocations
    come at any moment between two polls."""
    rounds = stage.size.rounds
    with ExitStack() as stack:
        postgres, redis = stack.enter_context(Postgres()), stack.enter_context(Redis())
        async with _replicas(stage, postgres, redis.url) as pair:
            one = await pair.revoke(rounds * 5, pause_s=0.1)
            many = await pair.revoke(rounds, pause_s=0.1, watchers=MANY)
        async with _replicas(stage, postgres, "") as pair:
            alone = await pair.revoke(rounds * 2, pause_s=POLL_S)
    fast, slow = [seen.refused for seen in one], [seen.refused for seen in alone]
    gap = median(seen.gap for seen in one)
    return {
        "value": _ms(max(gap, _p99(fast))),  # what is less cannot be seen
        "unit": "ms, p99 with Redis",
        "floor": WITH_S_MAX * 1000,
        "ratio": max(_p99(fast) / WITH_S_MAX, _p99(slow) / WITHOUT_S_MAX),
        "p50": _ms(median(fast)),
        "watcher_p50": _ms(median(seen.told for seen in one)),
        "watcher_p99": _ms(_p99([seen.told for seen in one])),
        f"watchers_{MANY}_p50": _ms(median(seen.told for seen in many)),
        f"watchers_{MANY}_p99": _ms(_p99([seen.told for seen in many])),
        "alone_p50": _ms(median(slow)),
        "alone_p99": _ms(_p99(slow)),
        "alone_watcher_p99": _ms(_p99([seen.told for seen in alone])),
        "resolution": _ms(gap),
        "revocations": len(fast),
        "alone_revocations": len(slow),
    }


def _p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) * 99 // 100]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


class Pair:
    """Revokes at one replica what the other one judges."""

    def __init__(self, made: Scene, revoker: grpc.aio.Channel, judge: grpc.aio.Channel) -> None:
        self._scene = made
        self._revoker: Any = AuthServiceStub(revoker)
        self._judge: Any = AuthServiceStub(judge)
        self._chance = random.Random(0)

    async def ready(self) -> None:
        """Waits until the replica that judges knows of the scene."""
        [token] = await self._scene.tokens(1)
        question = self._question(token)
        while not (await self._judge.ValidateToken(question)).active:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)

    async def revoke(self, times: int, *, pause_s: float, watchers: int = 1) -> list[Seen]:
        """One after another, each after a pause of any length up to the one given."""
        found = []
        async with AsyncExitStack() as stack:
            watching = [
                await stack.enter_async_context(_watch(self._judge)) for _ in range(watchers)
            ]
            for token in await self._scene.tokens(times):
                await asyncio.sleep(self._chance.uniform(0, pause_s))
                found.append(await self._revoke(token, watching))
        return found

    async def _revoke(self, token: str, watching: Sequence["Watcher"]) -> Seen:
        refusing = asyncio.create_task(self._refused(self._question(token)))
        async with asyncio.timeout(SEEN_S_MAX):
            answer = await self._revoker.RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
            answered = time.perf_counter()
            told = max([await watcher.told(answer.revision) for watcher in watching])
            refused, gap = await refusing
        return Seen(max(0.0, refused - answered), max(0.0, told - answered), gap)

    def _question(self, token: str) -> auth_pb2.ValidateTokenRequest:
        asked = self._scene.validation(token, auth_pb2.TOKEN_VIEW_VERDICT)
        return auth_pb2.ValidateTokenRequest.FromString(asked)

    async def _refused(self, question: auth_pb2.ValidateTokenRequest) -> tuple[float, float]:
        """Asks without a pause: when a refusal came, and how long after the answer before it."""
        before = time.perf_counter()
        while (await self._judge.ValidateToken(question)).active:
            before = time.perf_counter()
        now = time.perf_counter()
        return now, now - before


class Watcher:
    """A WatchChanges stream, and when it told of which revision."""

    def __init__(self) -> None:
        self._told: dict[int, float] = {}
        self._revision = 0
        self._more = asyncio.Condition()

    async def read(self, stream: Any) -> None:
        """Until it is cancelled."""
        while (event := await stream.read()) is not grpc.aio.EOF:
            async with self._more:
                if event.WhichOneof("event") == "delta":
                    now = time.perf_counter()
                    for marker in event.delta.markers:
                        self._told.setdefault(marker.revision, now)
                        self._revision = max(self._revision, marker.revision)
                self._more.notify_all()

    async def told(self, revision: int) -> float:
        """When the change of this revision was there."""
        async with self._more:
            await self._more.wait_for(lambda: self._revision >= revision)
            return self._told[revision]


@asynccontextmanager
async def _watch(judge: Any) -> AsyncIterator[Watcher]:
    """Follows from now on."""
    stream = judge.WatchChanges(auth_pb2.WatchChangesRequest())
    while not (await stream.read()).snapshot.last:
        pass
    watcher = Watcher()
    reading = asyncio.create_task(watcher.read(stream))
    try:
        yield watcher
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        stream.cancel()


@asynccontextmanager
async def _replicas(stage: Stage, postgres: Postgres, redis: str) -> AsyncIterator[Pair]:
    """Two on a fresh database; `redis` is its URL, or nothing."""
    with ExitStack() as stack:
        state_dir = Path(stack.enter_context(TemporaryDirectory(prefix="authsvc-bench-")))
        url = await postgres.database()
        await migrate(load(state_dir=state_dir, database={"url": url}), check=False)
        first, second = (
            stack.enter_context(authsvc(state_dir, stage.cores.servers, url, redis=redis))
            for _ in range(2)
        )
        async with (
            scene(state_dir, first.port) as made,
            connect(made.pki, "orders", first.port) as revoker,
            connect(made.pki, "billing", second.port) as judge,
        ):
            pair = Pair(made, revoker, judge)
            await pair.ready()
            yield pair
