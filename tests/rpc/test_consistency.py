"""How fresh the state is by which a token is judged: bounded, at_least, strong."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from authsvc.errors import AuthError, Reason
from authsvc.feed import follow
from authsvc.store.port import FeedPage, FeedStore, Store
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.resources_pb2 import TOKEN_FORMAT_OPAQUE
from tests.harness import Member, Running, failure, reason, running, until

RESOURCE = "https://orders.test"
ROUNDS = 1000
AT_ONCE = 20
STRONG = auth_pb2.Consistency(strong=auth_pb2.StrongConsistency())
BOUNDED = auth_pb2.Consistency(bounded=auth_pb2.BoundedConsistency())


def at_least(revision: int) -> auth_pb2.Consistency:
    return auth_pb2.Consistency(at_least=revision)


class HeldFeed:
    """A feed whose answers can be held back on their way, and that can be gone."""

    def __init__(self, feed: FeedStore) -> None:
        self._feed = feed
        self.reads = 0
        self.gone = False
        self.lag_s = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = 0
        """Answers that are made and have not arrived."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feed, name)

    async def read(self, cursor: int) -> FeedPage:
        self.reads += 1
        if self.gone:
            raise AuthError(Reason.STORE_UNAVAILABLE)
        page = await self._feed.read(cursor)
        self.held += 1
        await asyncio.sleep(self.lag_s)
        await self.gate.wait()
        self.held -= 1
        return page


@dataclass
class Two:
    """Two workers on one database; `b` follows by a feed that can be held."""

    a: Running
    b: Running
    feed: HeldFeed
    owner: Member
    client: Member

    async def token(self) -> str:
        return (await self.a.token(self.client)).access_token

    async def revoke(self, token: str) -> int:
        request = auth_pb2.RevokeTokenRequest(token=token)
        return (await self.a.auth(self.client.who).RevokeToken(request)).revision

    async def judged(self, token: str, consistency: auth_pb2.Consistency) -> bool:
        """At `b`."""
        verdict = await self.b.verdict(
            self.owner.who, token, of=self.client.who, consistency=consistency
        )
        assert verdict.active or Reason(verdict.reason) is Reason.TOKEN_REVOKED
        return verdict.active

    async def hold(self) -> None:
        """From here on `b` learns nothing; the answer on its way is of now."""
        self.feed.gate.clear()
        await until(lambda: self.feed.held)


@asynccontextmanager
async def _two(directory: Path, url: str) -> AsyncIterator[Two]:
    feeds: list[HeldFeed] = []

    def wrap(store: Store) -> Store:
        feeds.append(HeldFeed(store.feed))
        feed: Any = feeds[0]
        return replace(store, feed=feed)

    async with running(directory, url=url) as a, running(directory, url=url, wrap=wrap) as b:
        owner = await a.member("owner", "validate")
        await a.resource(RESOURCE, "orders.read", owner=owner.client_id)
        client = await a.member("client", "orders.read")
        two = Two(a, b, feeds[0], owner, client)
        await b.app.follow.reach(a.app.state.revision)  # who may validate is judged before
        try:
            yield two
        finally:
            feeds[0].gate.set()


@pytest.fixture
async def two(tmp_path: Path, migrated_url: str) -> AsyncIterator[Two]:
    async with _two(tmp_path, migrated_url) as made:
        yield made


@pytest.mark.parametrize("strong", [True, False])
async def test_what_an_asker_may_see_is_as_fresh_as_the_answer(
    two: Two, monkeypatch: pytest.MonkeyPatch, strong: bool
) -> None:
    """A resource made elsewhere, of which this worker knows nothing until it looks."""
    monkeypatch.setattr(follow, "POLL_S", 300.0)
    await two.b.app.follow.fresh()  # from here on it looks only when it is asked to
    assert await two.judged(await two.token(), BOUNDED)
    name = "https://new.test"
    await two.a.resource(name, "new.read", owner=two.owner.client_id)
    client = await two.a.member("newcomer", "new.read")
    token = (await two.a.token(client, resources=[name])).access_token
    consistency = STRONG if strong else at_least(two.a.app.state.revision)
    bounded, fresh = [
        await two.b.verdict(two.owner.who, token, of=client.who, consistency=each)
        for each in (BOUNDED, consistency)
    ]
    assert not bounded.active  # else this shows nothing
    assert fresh.active


async def test_what_is_revoked_elsewhere_is_never_active(two: Two) -> None:
    """Of 1,000 tokens, over a slow network; `bounded` may be late, by a poll."""
    two.feed.lag_s = 0.02
    left = iter(range(ROUNDS))
    late = 0

    async def revoke_and_ask() -> None:
        nonlocal late
        for number in left:
            token = await two.token()
            assert await two.judged(token, BOUNDED)
            revision = await two.revoke(token)
            late += await two.judged(token, BOUNDED)
            if number % 2:
                assert not await two.judged(token, STRONG)
            else:
                assert not await two.judged(token, at_least(revision))
            assert not await two.judged(token, BOUNDED)

    await asyncio.gather(*(revoke_and_ask() for _ in range(AT_ONCE)))
    assert next(left, None) is None
    assert late > ROUNDS / 20  # else the rounds would prove nothing


async def test_bounded_is_late_where_polling_is_held_up_and_the_others_wait(two: Two) -> None:
    token = await two.token()
    await two.hold()
    revision = await two.revoke(token)
    assert await two.judged(token, BOUNDED)
    asked = [
        asyncio.ensure_future(two.judged(token, level)) for level in (STRONG, at_least(revision))
    ]
    done, _ = await asyncio.wait(asked, timeout=0.3)
    assert not done
    assert await two.judged(token, BOUNDED)
    two.feed.gate.set()  # what arrives now was read before it was revoked
    assert [await answer for answer in asked] == [False, False]


async def test_read_that_hangs_ends_with_the_deadline(two: Two) -> None:
    token = await two.token()
    await two.hold()
    revision = await two.revoke(token)
    auth = two.b.auth(two.owner.who)
    for level in (STRONG, at_least(revision), at_least(2**63 - 1)):
        request = auth_pb2.ValidateTokenRequest(token=token, consistency=level)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await auth.ValidateToken(request, timeout=0.3)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    two.feed.gate.set()
    assert not await two.judged(token, STRONG)


async def test_read_that_fails_is_no_answer(two: Two) -> None:
    token = await two.token()
    two.feed.gone = True
    for level in (STRONG, at_least(two.a.app.state.revision + 1)):
        call = two.b.verdict(two.owner.who, token, consistency=level)
        assert await reason(call) == "STORE_UNAVAILABLE"
    assert await two.judged(token, BOUNDED)
    assert await two.judged(token, at_least(two.b.app.state.revision))
    two.feed.gone = False
    assert await two.judged(token, STRONG)


async def test_revision_that_is_there_needs_no_read_and_none_is_there_above_the_head(
    two: Two,
) -> None:
    token = await two.token()
    head = await two.b.head()
    await two.hold()
    for revision in (0, 1, head - 1, head):
        assert await two.judged(token, at_least(revision))
    two.feed.gate.set()
    for revision in (head + 1, head + 2**32, 2**63 - 1):
        refused = await failure(two.b.verdict(two.owner.who, token, consistency=at_least(revision)))
        assert (refused.reason, refused.metadata) == ("REVISION_UNKNOWN", {"revision": str(head)})
    answer = await two.b.verdict(
        two.owner.who, token, of=two.client.who, consistency=at_least(await two.revoke(token))
    )
    assert answer.revision > head


async def test_those_who_wait_share_a_read(two: Two) -> None:
    token = await two.token()
    await two.hold()
    asked = [asyncio.ensure_future(two.judged(token, STRONG)) for _ in range(50)]
    await asyncio.wait(asked, timeout=0.5)
    before = two.feed.reads
    two.feed.gate.set()
    assert all([await answer for answer in asked])
    # Those who came while the gate was shut share one; on a slow machine some come later.
    assert two.feed.reads <= before + 25


async def test_caller_that_goes_away_takes_nothing_from_the_others(two: Two) -> None:
    token = await two.token()
    await two.hold()
    first, second = [asyncio.ensure_future(two.judged(token, STRONG)) for _ in range(2)]
    await asyncio.wait([first, second], timeout=0.3)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    two.feed.gate.set()
    assert await second


async def test_stored_tokens_are_as_fresh(two: Two) -> None:
    opaque = "https://opaque.test"
    await two.a.resource(
        opaque, "opaque.read", owner=two.owner.client_id, token_format=TOKEN_FORMAT_OPAQUE
    )
    client = await two.a.member("opaque-client", "opaque.read")
    token = (await two.a.token(client)).access_token

    async def judged(level: auth_pb2.Consistency) -> bool:
        answer = await two.b.verdict(two.owner.who, token, of=client.who, consistency=level)
        return answer.active

    await two.b.app.follow.reach(two.a.app.state.revision)
    assert await judged(STRONG)
    await two.hold()
    await two.a.auth(client.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
    assert await judged(BOUNDED)
    two.feed.gate.set()
    assert not await judged(STRONG)
