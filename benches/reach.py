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

from .processes import Server, authsvc
from .scene import Scene, connect, scene
from .stage import Line, Stage

WITH_S_MAX, WITHOUT_S_MAX = 0.05, 1.1
"""Budgets of the slowest of a hundred, with Redis and without."""
SEEN_S_MAX = 30.0
MANY = (50, 200)
"""Watchers at one replica, each on a connection of its own."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Seconds from the answer of RevokeToken at one replica until the other one knew; 0 where it
    did before the answer was there."""

    refused: float
    """The first ValidateToken that says so."""
    told: float
    """The watcher."""
    gap: float
    """Between two of the questions: by so much `refused` may be too long."""


async def revocation_reach(stage: Stage) -> Line:
    """Two replicas on a PostgreSQL: revoked at one, asked and watched at the other. Revocations
    come at any moment between two polls."""
    rounds, most = stage.size.rounds, MANY[-1]
    with ExitStack() as stack:
        postgres, redis = stack.enter_context(Postgres()), stack.enter_context(Redis())
        async with _replicas(stage, postgres, redis.url) as pair:
            one = await pair.revoke(rounds * 5, pause_s=0.1)
            busy = await pair.busy(rounds / 10)
            many = {}
            for count in MANY:
                async with pair.watching(count) as watching:
                    busy_with = await pair.busy(rounds / 10)
                    many[count] = await pair.told(rounds * 2, watching, pause_s=0.1)
        async with _replicas(stage, postgres, "") as pair:
            alone = await pair.revoke(rounds * 2, pause_s=POLL_S)
            async with pair.watching(most) as watching:
                many_alone = await pair.told(rounds, watching, pause_s=POLL_S)
    fast, slow = [seen.refused for seen in one], [seen.refused for seen in alone]
    told = [seen.told for seen in one]
    gap = median(seen.gap for seen in one)
    with_redis = max(map(_p99, (fast, told, *many.values())))
    without = max(map(_p99, (slow, many_alone)))
    return {
        "value": _ms(max(gap, with_redis)),  # what is less cannot be seen
        "unit": "ms, p99 with Redis",
        "floor": WITH_S_MAX * 1000,
        "ratio": max(with_redis / WITH_S_MAX, without / WITHOUT_S_MAX),
        "p50": _ms(median(fast)),
        "p99": _ms(_p99(fast)),
        "watcher_p50": _ms(median(told)),
        "watcher_p99": _ms(_p99(told)),
        **{f"watchers_{count}_p50": _ms(median(seen)) for count, seen in many.items()},
        **{f"watchers_{count}_p99": _ms(_p99(seen)) for count, seen in many.items()},
        "alone_p50": _ms(median(slow)),
        "alone_p99": _ms(_p99(slow)),
        "alone_watcher_p99": _ms(_p99([seen.told for seen in alone])),
        f"alone_watchers_{most}_p99": _ms(_p99(many_alone)),
        f"idle_watchers_{most}_core": round(busy_with - busy, 4),
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

    def __init__(self, made: Scene, first: Server, second: Server) -> None:
        self._scene = made
        self._server = second
        self._connections = [self._connect(first, "orders"), self._connect(second)]
        self._revoker, self._judge = map(AuthServiceStub, self._connections)
        self._chance = random.Random(0)
        self._answered = 0.0
        """When the last RevokeToken was."""

    def _connect(self, server: Server, name: str = "billing") -> grpc.aio.Channel:
        return connect(self._scene.pki, name, server.port)

    async def close(self) -> None:
        """Ends the connections."""
        for connection in self._connections:
            await connection.close()

    async def ready(self) -> None:
        """Waits until the replica that judges knows of the scene."""
        [token] = await self._scene.tokens(1)
        question = self._question(token)
        while not (await self._judge.ValidateToken(question)).active:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)

    async def revoke(self, times: int, *, pause_s: float) -> list[Seen]:
        """One after another, each after a pause of any length up to the one given."""
        async with self.watching(1) as [watcher]:
            found = []
            for token in await self._scene.tokens(times):
                await asyncio.sleep(self._chance.uniform(0, pause_s))
                refusing = asyncio.create_task(self._refused(self._question(token)))
                told = await self._told(token, [watcher])
                refused, gap = await refusing
                found.append(Seen(max(0.0, refused - self._answered), told, gap))
            return found

    async def told(
        self, times: int, watching: Sequence["Watcher"], *, pause_s: float
    ) -> list[float]:
        """As `revoke`: when the last of these watchers knew."""
        found = []
        for token in await self._scene.tokens(times):
            await asyncio.sleep(self._chance.uniform(0, pause_s))
            found.append(await self._told(token, watching))
        return found

    async def busy(self, seconds: float) -> float:
        """The share of a core that the replica takes while nothing is asked of it."""
        await asyncio.sleep(1.0)
        began, cpu = time.perf_counter(), self._server.cpu()
        await asyncio.sleep(seconds)
        return (self._server.cpu() - cpu) / (time.perf_counter() - began)

    async def _told(self, token: str, watching: Sequence["Watcher"]) -> float:
        async with asyncio.timeout(SEEN_S_MAX):
            answer = await self._revoker.RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
            self._answered = time.perf_counter()
            told = max([await watcher.told(answer.revision) for watcher in watching])
        return max(0.0, told - self._answered)

    @asynccontextmanager
    async def watching(self, count: int) -> AsyncIterator[list["Watcher"]]:
        """Those who follow from now on, each over a connection of its own."""
        async with AsyncExitStack() as stack:
            connections = [
                await stack.enter_async_context(self._connect(self._server)) for _ in range(count)
            ]
            yield [await stack.enter_async_context(_watch(each)) for each in connections]

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
async def _watch(connection: grpc.aio.Channel) -> AsyncIterator[Watcher]:
    """Follows from now on."""
    stream: Any = AuthServiceStub(connection).WatchChanges(auth_pb2.WatchChangesRequest())
    while not (await stream.read()).HasField("heartbeat"):
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
        async with scene(state_dir, first.port) as made:
            pair = Pair(made, first, second)
            try:
                await pair.ready()
                yield pair
            finally:
                await pair.close()
