"""What one worker commits the others are told at once; and what they must not believe."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc import config
from authsvc.clock import SystemClock
from authsvc.errors import AuthError, Reason
from authsvc.feed import follow as follow_module
from authsvc.feed import publish as publish_module
from authsvc.feed.follow import Follow, Listener
from authsvc.feed.publish import _CHANGE, _HEAD, MESSAGE_CHANGES_MAX, Publish
from authsvc.keys.secrets import Mac, Sealer
from authsvc.store.port import Change, FeedPage, change
from authsvc.store.sql import Database
from authsvc.store.sql_feed import SqlFeed, advance
from authsvc.telemetry import Metrics
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.clocks import HandClock
from tests.feed.feeds import BentFeed
from tests.harness import ISSUER, Member, Running, migrated, outcome, start, until
from tests.redis_servers import Redis

API = "https://api.test"
NEVER_S = 600.0
"""Between two polls: what is seen sooner was told."""
KEYS = Sealer((b"k" * 32,))
OTHER_KEYS = Sealer((b"o" * 32,))


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "POLL_S", NEVER_S)


@pytest.fixture
async def pair(
    migrated_url: str, redis: Redis, tmp_path: Path
) -> AsyncIterator[tuple[Running, Running]]:
    """Two servers on one database and one Redis, with the same keys."""
    shared: dict[str, Any] = {
        "url": migrated_url,
        "redis": config.Redis(url=SecretStr(redis.url), budget_ms=5000),
        "seal_keys": SecretStr("ab" * 32),
        "refresh_keys": SecretStr("cd" * 32),
    }
    first = await start(tmp_path / "first", **shared)
    second = await start(tmp_path / "second", **shared)
    try:
        await until(lambda: hears(redis, first) >= 2)
        yield first, second
    finally:
        await second.close()
        await first.close()


def channel(server: Running) -> str:
    assert server.app._publish is not None
    return server.app._publish.channel(server.app.state.revision // REVISIONS_PER_EPOCH)


def hears(redis: Redis, server: Running) -> int:
    return int(redis.ask("PUBSUB", "NUMSUB", channel(server))[1])


def counted(server: Running, outcome: str) -> int:
    assert server.app._publish is not None
    return server.app._publish.messages.labels(outcome).value


async def scene(server: Running) -> tuple[Member, Member]:
    """The owner of an API, who may validate, and a caller of it."""
    owner = await server.member("owner", "validate")
    await server.resource(API, "read", owner=owner.client_id)
    return owner, await server.member("caller", "read")


async def comes_true(what: Callable[[], Awaitable[bool]]) -> None:
    """Polls until it does, for far less than a poll of the feed is away."""
    async with asyncio.timeout(20):
        while not await what():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


# --- between servers ---


async def test_a_revocation_reaches_the_other_server_before_its_next_poll(
    seldom: None, pair: tuple[Running, Running]
) -> None:
    first, second = pair
    owner, caller = await scene(first)

    async def is_judged(how: str) -> bool:
        return await second.judged(owner.who, token, of=caller.who) == how

    for _ in range(10):
        token = (await first.token(caller, "read", resources=[API])).access_token
        await comes_true(partial(is_judged, "OK"))
        await first.auth(caller.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
        await comes_true(partial(is_judged, "TOKEN_REVOKED"))
    await comes_true(lambda: second_is_at(first, second))
    assert counted(second, "heard") >= 10
    assert counted(first, "sent") >= 10
    assert counted(first, "heard") == counted(second, "sent") == 0  # one's own are passed over


async def second_is_at(first: Running, second: Running) -> bool:
    return first.app.state.revision == second.app.state.revision


async def test_a_changed_row_is_read_again_by_the_other_server(
    seldom: None, pair: tuple[Running, Running]
) -> None:
    first, second = pair
    _, caller = await scene(first)
    await comes_true(lambda: second_is_at(first, second))
    for _ in range(5):
        assert await is_issued(second, caller, "OK")
        await first.suspend(caller.client_id)
        await comes_true(lambda: is_issued(second, caller, "CLIENT_SUSPENDED"))
        await first.clients().ResumeClient(
            clients_pb2.ResumeClientRequest(client_id=caller.client_id)
        )
        await comes_true(lambda: is_issued(second, caller, "OK"))


async def is_issued(server: Running, caller: Member, how: str) -> bool:
    return await outcome(server.token(caller, "read", resources=[API])) == how


async def test_nobody_else_is_believed(
    seldom: None, pair: tuple[Running, Running], redis: Redis
) -> None:
    first, second = pair
    owner, caller = await scene(first)
    token = (await first.token(caller, "read", resources=[API])).access_token
    await comes_true(lambda: second_is_at(first, second))
    at, head = channel(second), second.app.state.revision
    everything = change(MarkerKind.CUTOFF_EVERYTHING)
    keys = Sealer((bytes.fromhex("ab" * 32),))

    def forged(mac: Mac, label: str = at, revision: int = head + 1000) -> bytes:
        said = [(revision, int(everything.kind), everything.key)]
        body = _HEAD.pack(1, b"x" * 16) + b"".join(_CHANGE.pack(*each) for each in said)
        return mac.seal(label, body)

    good = Mac(keys, ISSUER)
    older = channel(second).rpartition(":")[0] + ":0"
    messages = (
        b"",
        b"nonsense",
        forged(Mac(OTHER_KEYS, ISSUER)),
        forged(Mac(keys, "https://other.test")),
        forged(good, older),  # a message of another history
        forged(good)[:-1],
        bytes(32) + forged(good)[32:],
    )
    for message in messages:
        redis.ask("PUBLISH", at, message)
    await until(lambda: counted(second, "forged") == len(messages))
    # Of an epoch that is not this one, though the mark is right: the table says what is.
    redis.ask("PUBLISH", at, forged(good, revision=head + 2**33))
    await until(lambda: counted(second, "not_understood") == 1)
    assert second.app.state.everything <= head
    assert await second.judged(owner.who, token, of=caller.who) == "OK"
    # The same from a worker kills, so that the test could have failed.
    redis.ask("PUBLISH", at, forged(good))
    await until(lambda: second.app.state.everything == head + 1000)
    assert await second.judged(owner.who, token, of=caller.who) == "TOKEN_CUT_OFF"
    assert second.app.state.revision == head


async def test_a_new_epoch_is_told_on_a_channel_of_its_own(
    seldom: None, pair: tuple[Running, Running], redis: Redis
) -> None:
    first, second = pair
    owner, caller = await scene(first)
    old = channel(first)
    feed = first.store.feed
    page = await feed.read(0)
    await feed.raise_epoch(page, page.head, cut_off=False)
    for server in pair:
        await server.app.follow.poll()
    await until(lambda: hears(redis, first) >= 2)
    assert old != channel(first)
    assert int(redis.ask("PUBSUB", "NUMSUB", old)[1]) == 0
    token = (await first.token(caller, "read", resources=[API])).access_token
    await comes_true(lambda: is_ok(second, owner, caller, token))
    await first.auth(caller.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
    await comes_true(lambda: is_dead(second, owner, caller, token))


async def is_ok(server: Running, owner: Member, caller: Member, token: str) -> bool:
    return await server.judged(owner.who, token, of=caller.who) == "OK"


async def is_dead(server: Running, owner: Member, caller: Member, token: str) -> bool:
    return await server.judged(owner.who, token, of=caller.who) == "TOKEN_REVOKED"


# --- what is told ---


class Kept:
    """A bus that keeps what is sent (authsvc.cache.port.Bus)."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    async def publish(self, channel: str, message: bytes) -> bool:
        self.sent.append((channel, message))
        return True

    async def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        yield None


def worker(bus: Kept, *listeners: Listener) -> tuple[Publish, Follow, State]:
    clock, state = HandClock(), State(120.0)
    follow = Follow(BentFeed(clock), state, clock, listeners=listeners)
    made = Publish(bus, Mac(KEYS, ISSUER), ISSUER, follow, state, clock, Metrics())
    return made, follow, state


async def send(publish: Publish, done: Callable[[], bool]) -> None:
    task = asyncio.create_task(publish.send())
    try:
        await until(done)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_comes_together_is_one_message() -> None:
    bus = Kept()
    publish, _, _ = worker(bus)
    first = REVISIONS_PER_EPOCH + 1
    for revision in range(first, first + 20):
        publish.offer(revision, [change(MarkerKind.TOKEN_DEAD, str(revision))])
    await send(publish, lambda: bool(bus.sent))
    assert len(bus.sent) == 1
    other, _, state = worker(bus)
    await other._heard(1, *bus.sent[0])
    assert all(
        state.is_dead(marker_key(MarkerKind.TOKEN_DEAD, str(revision)))
        for revision in range(first, first + 20)
    )


async def test_of_too_much_the_newest_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_module, "QUEUE_MAX", 2 * MESSAGE_CHANGES_MAX)
    bus = Kept()
    publish, _, _ = worker(bus)
    all_of_them = [
        change(MarkerKind.TOKEN_DEAD, str(at)) for at in range(2 * MESSAGE_CHANGES_MAX + 500)
    ]
    publish.offer(REVISIONS_PER_EPOCH + 1, all_of_them)
    await send(publish, lambda: len(bus.sent) >= 2)
    assert len(bus.sent) == 2
    assert max(len(message) for _, message in bus.sent) < 32768
    other, _, state = worker(bus)
    for each in bus.sent:
        await other._heard(1, *each)
    assert not any(state.is_dead(one.key) for one in all_of_them[:500])
    assert all(state.is_dead(one.key) for one in all_of_them[500:])


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("migrated_url")) if request.param == "postgres" else ""


@pytest.fixture
async def database(url: str, tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(url or await migrated(tmp_path), SystemClock())
    yield made
    await made.close()


async def test_only_what_is_committed_is_told(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, list[Change]]] = []
    feed = SqlFeed(database)
    feed.on_commit(lambda revision, changes: told.append((revision, list(changes))))
    one, two = change(MarkerKind.TOKEN_DEAD, "one"), change(MarkerKind.TOKEN_DEAD, "two")

    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the exception ends the transaction
        async with database.write() as connection:
            await advance(database, connection, [one])
            raise ZeroDivisionError
    revision = await feed.append([two])  # over the connection of the one that was rolled back
    assert told == [(revision, [two])]

    async def lost(self: AsyncConnection) -> None:
        raise OSError("planted")

    monkeypatch.setattr(AsyncConnection, "commit", lost)
    with pytest.raises(AuthError) as caught:
        await feed.append([one])
    assert caught.value.reason is Reason.COMMIT_UNKNOWN
    monkeypatch.undo()
    revision = await feed.append([one])
    assert told[1:] == [(revision, [one])]


# --- what is heard ---


def said(revision: int, *ids: str, kind: MarkerKind = MarkerKind.TOKEN_DEAD) -> list[Marker]:
    return [Marker(kind, marker_key(kind, each), revision, 2e9) for each in ids]


async def test_a_message_kills_and_drops_and_leaves_the_revision_to_the_table() -> None:
    dropped: list[Marker] = []

    async def drop(markers: tuple[Marker, ...]) -> None:
        dropped.extend(markers)

    _, follow, state = worker(Kept(), drop)
    await follow.poll()
    dropped.clear()
    head = state.revision
    told = said(head + 1, "a") + said(head + 1, "c", kind=MarkerKind.CLIENT_CHANGED)
    for _ in range(3):  # heard again it drops nothing more: who repeats it must not starve reads
        await follow.hear(told)
        assert dropped == told
        assert state.is_dead(told[0].key)
        assert state.revision == head


async def test_what_is_applied_is_not_heard_again() -> None:
    dropped: list[Marker] = []

    async def drop(markers: tuple[Marker, ...]) -> None:
        dropped.extend(markers)

    _, follow, state = worker(Kept(), drop)
    await follow.poll()
    dropped.clear()
    await follow.hear(said(state.revision, "a"))
    assert not dropped
    assert not state.is_dead(marker_key(MarkerKind.TOKEN_DEAD, "a"))


async def test_a_message_does_not_wait_for_a_poll_that_hangs() -> None:
    _, follow, state = worker(Kept())
    await follow.poll()
    async with follow._lock:  # as a poll holds it whose database does not answer
        await follow.hear(said(state.revision + 1, "a"))
    assert state.is_dead(marker_key(MarkerKind.TOKEN_DEAD, "a"))


async def test_a_storm_of_messages_is_few_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "POLL_S", NEVER_S)
    clock, state = HandClock(), State(120.0)
    feed = BentFeed(clock)
    follow = Follow(feed, state, clock)
    reads = 0
    read = feed.read

    async def counting(cursor: int) -> FeedPage:
        nonlocal reads
        reads += 1
        return await read(cursor)

    monkeypatch.setattr(feed, "read", counting)
    running = asyncio.create_task(follow.run())
    try:
        await until(lambda: state.revision > 0)
        started = asyncio.get_running_loop().time()
        for number in range(3000):
            revision = await feed.append([change(MarkerKind.TOKEN_DEAD, str(number))])
            await follow.hear(said(revision, str(number)))
            await asyncio.sleep(0)
        await until(lambda: state.revision == feed.head)
        took = asyncio.get_running_loop().time() - started
        assert reads <= 3 + took / follow_module.HEAR_S
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
