"""Whatever happens to Redis: nothing revoked comes alive, and nothing valid is refused."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
import redis

from authsvc_client.core.markers import MarkerKind, marker_key
from authsvc_client.v1 import revocations_pb2
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.cluster.replicas import (
    Cast,
    Cluster,
    Process,
    Replica,
    attempt,
    cast,
    environment,
    eventually,
)
from tests.harness import ADMIN, until
from tests.redis_servers import Redis

BOUND_S = 5.0
"""A revocation is seen by the poll of each second; the rest is for a machine that is busy."""


@dataclass
class Asked:
    """One answer, and when it was asked for."""

    replica: str
    started: float
    active: bool | str


@dataclass
class Checker:
    """Judges live and revoked tokens at both replicas all the time, and keeps every answer."""

    pair: list[Replica]
    players: Cast
    live: list[str] = field(default_factory=list)
    dead: dict[str, float] = field(default_factory=dict)
    """Tokens, and when their revocation was answered."""
    told: dict[str, list[Asked]] = field(default_factory=dict)

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.ask()
            await asyncio.sleep(0.02)

    async def ask(self) -> None:
        """About each token at each replica."""
        tokens = [*self.live, *self.dead]
        await asyncio.gather(*(self._ask(at, token) for at in self.pair for token in tokens))

    async def _ask(self, at: Replica, token: str) -> None:
        started = time.monotonic()
        active = await attempt(self.players.is_active(at, token))
        self.told.setdefault(token, []).append(Asked(at.process.name, started, active))

    def verify(self) -> None:
        """Nothing valid was refused; nothing dead was active after the bound, or came alive."""
        for token in self.live:
            assert {asked.active for asked in self.told[token]} == {True}
        for token, since in self.dead.items():
            gone: set[str] = set()
            for asked in sorted(self.told[token], key=lambda asked: asked.started):
                assert isinstance(asked.active, bool)
                assert not (asked.active and asked.replica in gone), "it came alive"
                assert not asked.active or asked.started < since + BOUND_S, "it lives on"
                if not asked.active:
                    gone.add(asked.replica)
            assert gone == {at.process.name for at in self.pair}


@asynccontextmanager
async def checking(pair: list[Replica], players: Cast) -> AsyncIterator[Checker]:
    """Verifies at the end what was answered until then."""
    checker = Checker(pair, players, [await players.issue(at) for at in pair])
    watching = asyncio.create_task(checker.watch())
    try:
        yield checker
        for token in checker.dead:
            for at in pair:
                await eventually(partial(_is_dead, players, at, token), BOUND_S)
        await checker.ask()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    checker.verify()


async def _is_dead(players: Cast, at: Replica, token: str) -> bool:
    return await attempt(players.is_active(at, token)) is False


async def revoke_some(checker: Checker, times: int = 4) -> None:
    """By turns at each replica; the other one knows at once where it is asked for the revision."""
    players = checker.players
    for n in range(times):
        at, other = checker.pair if n % 2 else checker.pair[::-1]
        token = await players.issue(at)
        revision = await players.revoke(at, token)
        checker.dead[token] = time.monotonic()
        assert not await players.is_active(other, token, at_least=revision)
        assert not await players.is_active(at, token)


# --- the faults: what is done before, and after, some tokens were revoked ---


class Fault:
    """What happens to Redis; nothing of it needs to be undone, as the cluster mends itself."""

    def __init__(self, cluster: Cluster, undo: AsyncExitStack) -> None:
        self.cluster = cluster
        self.undo = undo

    async def before(self) -> None:
        """Before the first revocation."""

    async def strike(self) -> None:
        """Between the first ones and those that follow."""

    async def after(self) -> None:
        """After these."""


class CutFromOne(Fault):
    async def strike(self) -> None:
        self.cluster.links[1].cut()


class Stopped(Fault):
    async def strike(self) -> None:
        self.cluster.redis.kill()

    async def after(self) -> None:
        self.cluster.redis.start()


class Frozen(Fault):
    async def strike(self) -> None:
        self.cluster.redis.freeze()

    async def after(self) -> None:
        self.cluster.redis.thaw()  # and does all that was sent meanwhile


class Slow(Fault):
    async def strike(self) -> None:
        for link in self.cluster.links:
            link.delay_s = lambda: random.uniform(0, 0.5)


class Flushed(Fault):
    async def strike(self) -> None:
        self.cluster.redis.flush()

    async def after(self) -> None:
        self.cluster.redis.flush()


class Garbled(Fault):
    """Every value is another's, or nobody's."""

    async def strike(self) -> None:
        redis = self.cluster.redis
        for key in redis.ask("KEYS", "*"):
            if redis.ask("TYPE", key) == "string":
                redis.ask("SET", key, random.choice(["", "x", "{}", "\x00" * 64]), "KEEPTTL")


class OldDump(Fault):
    """Everything that was revoked since is alive in it."""

    async def before(self) -> None:
        self.cluster.redis.save()

    async def after(self) -> None:
        self.cluster.redis.kill()
        self.cluster.redis.start()


class FailedOver(Fault):
    """To a replica of it that was cut off before the first revocation."""

    async def before(self) -> None:
        old = self.cluster.redis
        self.new = Redis(f"replicaof 127.0.0.1 {old.port}")
        self.undo.callback(self.new.close)
        await eventually(self._is_synchronised)
        self.new.ask("REPLICAOF", "NO", "ONE")

    async def _is_synchronised(self) -> bool:
        return bool(self.new.ask("INFO", "replication")["master_link_status"] == "up")

    async def strike(self) -> None:
        self.cluster.redis.kill()
        for link in self.cluster.links:
            link.mend(("127.0.0.1", self.new.port))


class Forged(Fault):
    """Whoever can write to Redis says again what was said, elsewhere, and with other words."""

    async def before(self) -> None:
        self.ears = untyped(redis.Redis(port=self.cluster.redis.port))
        self.undo.callback(self.ears.close)
        self.heard = self.ears.pubsub()
        self.undo.callback(self.heard.close)
        self.heard.psubscribe("*")
        self.heard.get_message(timeout=5)

    async def strike(self) -> None:
        said = []
        while (message := self.heard.get_message(timeout=0.2)) is not None:
            said.append((message["channel"], message["data"]))
        assert said
        for channel, data in said:
            # A change is its revision, its kind and its key, in this order.
            kind = MarkerKind.CUTOFF_EVERYTHING
            everything = (2**32 + 2**31).to_bytes(8, "big") + bytes([kind.value]) + marker_key(kind)
            for forged in (
                data,
                *(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (0, 31, 33, 50)),
                data[: -len(everything)] + everything,
                data[32:],
                data[:32],
                data + data[-len(everything) :],
                b"",
                b"x" * 100,
            ):
                self.ears.publish(channel, forged)
            self.ears.publish(channel.rpartition(b":")[0] + b":2", data)

    async def after(self) -> None:
        for process in self.cluster.processes:
            await eventually(partial(_noticed_forgery, Replica(process)))


def untyped(what: Any) -> Any:
    """Of redis-py not all has types."""
    return what


async def _noticed_forgery(at: Replica) -> bool:
    _, told = await at.http("/metrics")
    return bool(re.search(r'authsvc_feed_messages_total{outcome="forged"} [1-9]', told))


class AnotherDeployment(Fault):
    """With the same issuer and keys of its own, on the same Redis; there everything dies."""

    async def before(self) -> None:
        url = await self.cluster.beside()
        root = self.cluster.root / f"beside-{uuid4().hex[:8]}"
        root.mkdir()
        settings = environment(root, url) | self.cluster.by(self.cluster.links[0])
        (root / "seal.key").write_text("33" * 32)
        self.other = Process(root, "z", settings)
        self.undo.callback(self.other.kill)
        self.other.launch()
        await until(lambda: self.other.ready.exists() or not self.other.lives, 60)
        self.other.wait()

    async def strike(self) -> None:
        at = Replica(self.other)
        players = await cast(at)
        await players.issue(at)
        revocations = RevocationServiceStub(at.channel(ADMIN))
        for _ in range(3):
            request = revocations_pb2.RevokeEverythingRequest()
            assert (await revocations.RevokeEverything(request)).revision
        await at.disconnect()


FAULTS: list[type[Fault]] = [
    Forged,
    AnotherDeployment,
    CutFromOne,
    Stopped,
    Frozen,
    Slow,
    Flushed,
    Garbled,
    OldDump,
    FailedOver,
]


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
async def test_nothing_revoked_comes_alive_and_nothing_valid_is_refused(
    kind: type[Fault], cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    async with AsyncExitStack() as undo:
        fault = kind(cluster, undo)
        await fault.before()
        async with checking(pair, players) as checker:
            await revoke_some(checker)
            other = await cast(pair[0])
            await other.issue(pair[0])
            await eventually(partial(is_let_in, pair[1], other))
            await fault.strike()
            await revoke_some(checker)
            await pair[0].suspend(other.app.client_id)
            await fault.after()
            await revoke_some(checker, 2)
            for at in pair:
                await eventually(partial(is_suspended, at, other), BOUND_S)
                assert await is_let_in(at, players)
    for at in pair:
        assert await is_suspended(at, other)


async def is_let_in(at: Replica, players: Cast) -> bool:
    return await attempt(players.issue(at)) not in {"CLIENT_SUSPENDED", "CLIENT_PENDING"}


async def is_suspended(at: Replica, players: Cast) -> bool:
    return await attempt(players.issue(at)) == "CLIENT_SUSPENDED"


# --- what these tests must notice ---

BELIEVES_REDIS_ALONE = """
from dataclasses import replace
from authsvc.store.sql_feed import SqlFeed
read = SqlFeed.read
async def deaf(self, cursor):
    page = await read(self, cursor)
    return replace(page, markers=()) if cursor else page
SqlFeed.read = deaf
"""
BELIEVES_ANYBODY = """
from authsvc.keys.secrets import Mac
Mac.open = lambda self, label, sealed: sealed[32:]
"""
DIES_UNHEARD = """
import os, signal
from authsvc.feed.publish import Publish
def offer(self, revision, changes):
    if any(one.kind == 1 for one in changes):
        os.kill(os.getpid(), signal.SIGKILL)
Publish.offer = offer
"""
"""After the commit, before a word of it was said."""


@asynccontextmanager
async def planted(cluster: Cluster, *plants: str) -> AsyncIterator[list[Replica]]:
    """More replicas of the cluster, each with one of these."""
    root = cluster.root / f"planted-{uuid4().hex[:8]}"
    shared = cluster.processes[1].environment
    made = [Process(root, str(n), shared, plant=plant) for n, plant in enumerate(plants)]
    try:
        for each in made:
            each.launch()
        for each in made:
            await until(lambda: each.ready.exists() or not each.lives, 60)  # noqa: B023
            each.wait()
        replicas = [Replica(each) for each in made]
        yield replicas
        for replica in replicas:
            await replica.disconnect()
    finally:
        for each in made:
            each.kill()


async def test_a_death_between_commit_and_word_is_learnt_from_the_table(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    """The poll of each second finds it. Who believes Redis alone never does, and who believes
    everybody there refuses what is valid."""
    async with planted(cluster, DIES_UNHEARD, BELIEVES_REDIS_ALONE, BELIEVES_ANYBODY) as (
        dying,
        deaf,
        trusting,
    ):
        live, dead = [await players.issue(pair[0]) for _ in range(2)]
        for at in (*pair, dying, deaf, trusting):
            await eventually(partial(players.is_active, at, dead))
        assert await attempt(players.revoke(dying, dead)) == "UNAVAILABLE"
        assert dying.process.ended() == -9
        for at in (*pair, trusting):
            await eventually(partial(_is_dead, players, at, dead), BOUND_S)
        assert await players.is_active(deaf, dead, strong={})
        async with AsyncExitStack() as undo:
            forger = Forged(cluster, undo)
            await forger.before()
            await players.revoke(pair[0], await players.issue(pair[0]))
            await forger.strike()
        await eventually(partial(_is_dead, players, trusting, live), BOUND_S)
        for at in pair:
            assert await players.is_active(at, live)
            assert not await players.is_active(at, dead)
