"""WatchChanges over the wire: what a validator elsewhere can make of the stream."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from authsvc.feed import watch as watch_module
from authsvc.store.port import change
from authsvc_client.core.judge import Judge, Question
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ADMIN,
    ISSUER,
    Member,
    Running,
    failure,
    hand_clock,
    reason,
    running,
    thumbprint,
)
from tests.store.conftest import sql

ORDERS = "https://orders.test"


class Watcher:
    """A state that is fed by nothing but the stream, as a validator in another process has it."""

    def __init__(self, server: Running, who: Any, resume: int = 0) -> None:
        request = auth_pb2.WatchChangesRequest(resume_revision=resume)
        self.call = server.auth(who).WatchChanges(request)
        self.state = State(120)
        self.judge = Judge(ISSUER, self.state)
        self.events: list[auth_pb2.WatchChangesResponse] = []
        self.clock = server.clock
        self._chunks: list[auth_pb2.SnapshotChunk] = []

    async def read(self) -> auth_pb2.WatchChangesResponse:
        async with asyncio.timeout(20):
            event = await self.call.read()
        assert isinstance(event, auth_pb2.WatchChangesResponse)
        self.events.append(event)
        kind = event.WhichOneof("event")
        if kind == "snapshot":
            self._chunks.append(event.snapshot)
            if event.snapshot.last:
                for chunk in self._chunks:
                    self._take(chunk)
        elif kind == "delta":
            self._take(event.delta)
        elif kind == "heartbeat":
            beat = event.heartbeat
            assert beat.revision >= self.state.revision
            age = beat.age.ToNanoseconds() / 1e9
            self.state.confirm(
                self.clock.boot() - age, beat.database_time.ToNanoseconds() / 1e9 - age
            )
        return event

    def _take(self, part: Any) -> None:
        if part.keys:
            self.state.replace_keys(
                [{field.name: value for field, value in key.ListFields()} for key in part.keys]
            )
        if part.staleness:
            self.state.staleness = {
                row.resource_id: row.staleness_max.seconds for row in part.staleness
            }
        markers = [
            Marker(
                MarkerKind(marker.kind),
                marker.key,
                marker.revision,
                marker.until.ToNanoseconds() / 1e9,
            )
            for marker in part.markers
        ]
        self.state.apply(markers, part.revision)

    async def until_at(self, revision: int) -> None:
        """Reads until confirmed at a revision."""
        while self.state.revision < revision or self.events[-1].WhichOneof("event") != "heartbeat":
            await self.read()

    def judged(self, token: str, who: Any) -> str:
        question = Question(frozenset({"*"}), thumbprint=thumbprint(who))
        verdict = self.judge(token, question, self.clock.boot())
        return "OK" if verdict.active else verdict.reason.name


async def _scene(server: Running, name: str) -> tuple[Member, Member]:
    await server.resource(f"https://{name}.test", f"{name}.read")
    return await server.member(name, f"{name}.read"), await server.member(f"{name}_w", "watch")


async def test_snapshot_then_deltas_judge_tokens_elsewhere(server: Running) -> None:
    client, watching = await _scene(server, "elsewhere")
    before, after, alive = [(await server.token(client)).access_token for _ in range(3)]
    revoke = auth_pb2.RevokeTokenRequest(token=before)
    await server.auth(client.who).RevokeToken(revoke)
    watcher = Watcher(server, watching.who)
    first = await watcher.read()
    assert first.WhichOneof("event") == "snapshot"
    assert first.snapshot.last
    assert first.snapshot.keys
    await watcher.until_at(first.snapshot.revision)
    assert watcher.judged(before, client.who) == "TOKEN_REVOKED"
    assert watcher.judged(after, client.who) == "OK"
    answer = await server.auth(client.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=after))
    await watcher.until_at(answer.revision)
    assert watcher.judged(after, client.who) == "TOKEN_REVOKED"
    assert watcher.judged(alive, client.who) == "OK"
    cut = await server.suspend(client.client_id)
    await watcher.until_at(cut.revision)
    assert watcher.judged(alive, client.who) == "TOKEN_CUT_OFF"
    await server.clients().ResumeClient(clients_pb2.ResumeClientRequest(client_id=client.client_id))
    new = (await server.token(client)).access_token
    await watcher.until_at(await server.head())
    assert watcher.judged(new, client.who) == "OK"
    assert watcher.judged(alive, client.who) == "TOKEN_CUT_OFF"
    late = Watcher(server, watching.who)  # who comes later hears the same from the snapshot
    await late.until_at(await server.head())
    for token, told in ((before, "TOKEN_REVOKED"), (alive, "TOKEN_CUT_OFF"), (new, "OK")):
        assert late.judged(token, client.who) == told
    for one in (watcher, late):
        one.call.cancel()


async def test_markers_are_digests_that_name_nobody(server: Running) -> None:
    client, watching = await _scene(server, "digest")
    token = await server.token(client)
    watcher = Watcher(server, watching.who)
    await watcher.until_at(await server.head())
    request = auth_pb2.RevokeTokenRequest(jti=token.jti)
    answer = await server.auth(ADMIN).RevokeToken(request)
    await watcher.until_at(answer.revision)
    deltas = [e.delta for e in watcher.events if e.WhichOneof("event") == "delta"]
    (marker,) = deltas[-1].markers
    assert marker.kind == auth_pb2.MARKER_KIND_TOKEN_DEAD
    assert marker.key == marker_key(MarkerKind.TOKEN_DEAD, token.jti)
    assert marker.revision == answer.revision
    left = marker.until.seconds - token.expire_time.seconds
    assert MARKER_LIFETIME_S - 300 - 5 <= left <= MARKER_LIFETIME_S - 300 + 5
    raw = b"".join(event.SerializeToString() for event in watcher.events)
    for secret in (token.jti, client.client_id):
        assert secret.encode() not in raw
    watcher.call.cancel()


async def test_heartbeat_comes_at_least_every_second_and_is_young(server: Running) -> None:
    watching = await server.member("beats", "watch")
    watcher = Watcher(server, watching.who)
    loop = asyncio.get_running_loop()
    beats: list[tuple[float, auth_pb2.Heartbeat]] = []
    while len(beats) < 4:
        event = await watcher.read()
        if event.WhichOneof("event") == "heartbeat":
            beats.append((loop.time(), event.heartbeat))
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(beats)]
    assert max(gaps) < 1.9  # a second, and what a busy machine adds
    for _, beat in beats:
        assert 0 <= beat.age.ToNanoseconds() < 3e9
        assert abs(beat.database_time.ToNanoseconds() / 1e9 - server.clock.wall()) < 30
    assert [b.revision for _, b in beats] == sorted(b.revision for _, b in beats)
    watcher.call.cancel()


async def test_resume_brings_what_was_missed_and_no_snapshot(server: Running) -> None:
    client, watching = await _scene(server, "resumed")
    token = (await server.token(client)).access_token
    first = Watcher(server, watching.who)
    await first.until_at(await server.head())
    first.call.cancel()
    at = first.state.revision
    answer = await server.auth(client.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
    again = Watcher(server, watching.who, resume=at)
    again.state, again.judge = first.state, first.judge
    await again.until_at(answer.revision)
    assert {event.WhichOneof("event") for event in again.events} <= {"delta", "heartbeat"}
    markers = [m for e in again.events for m in e.delta.markers]
    assert [(m.kind, m.revision) for m in markers] == [
        (auth_pb2.MARKER_KIND_TOKEN_DEAD, answer.revision)
    ]
    assert again.judged(token, client.who) == "TOKEN_REVOKED"
    again.call.cancel()
    same = Watcher(server, watching.who, resume=answer.revision)
    await same.read()
    assert not [m for e in same.events for m in e.delta.markers]
    same.call.cancel()


async def test_revision_above_the_head_is_unavailable(server: Running) -> None:
    watching = await server.member("above", "watch")
    head = await server.head()
    for revision in (head + 1, head + 1000, head + REVISIONS_PER_EPOCH, 2**63 - 1):
        refused = await failure(Watcher(server, watching.who, resume=revision).call.read())
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "STATE_STALE")
    at_head = Watcher(server, watching.who, resume=await server.head())
    await at_head.read()
    at_head.call.cancel()


def _url(directory: Path) -> str:
    return f"sqlite+aiosqlite:///{directory / 'authsvc.db'}"


async def test_compacted_revision_is_out_of_range(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        watching = await server.member("late", "watch")
        head = await server.head()
    await sql(_url(tmp_path), f"UPDATE feed_head SET compacted_to = {head}")
    async with running(tmp_path, clock=hand_clock()) as server:  # which holds nothing of before
        for number in range(3):
            await server.resource(f"https://{number}.test", f"s{number}")
        refused = await failure(Watcher(server, watching.who, resume=head - 1).call.read())
        assert (refused.code, refused.reason) == ("OUT_OF_RANGE", "REVISION_COMPACTED")
        assert refused.metadata == {"compacted_to": str(head)}
        for good in (head, 0):
            watcher = Watcher(server, watching.who, resume=good)
            await watcher.until_at(head + 3)
            watcher.call.cancel()


async def test_who_missed_too_much_is_sent_for_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "MISSED_MAX", 2)
    async with running(tmp_path, clock=hand_clock()) as server:
        watching = await server.member("late", "watch")
        for number in range(3):
            await server.resource(f"https://{number}.test", f"s{number}")
        head = await server.head()
    async with running(tmp_path, clock=hand_clock()) as server:
        assert await reason(Watcher(server, watching.who, resume=head - 3).call.read()) == (
            "REVISION_COMPACTED"
        )
        watcher = Watcher(server, watching.who, resume=head - 2)
        await watcher.until_at(head)
        told = [m.revision for e in watcher.events for m in e.delta.markers]
        assert told == [head - 1, head]
        watcher.call.cancel()


async def test_what_is_large_comes_in_pieces(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        watching = await server.member("large", "watch")
        early = Watcher(server, watching.who)
        before = await server.head()
        await early.until_at(before)
        changes = [change(MarkerKind.TOKEN_DEAD, f"t{number}") for number in range(10_000)]
        head = await server.store.feed.append(changes)
        assert await server.head() == head
        await early.until_at(head)
        deltas = [e.delta for e in early.events if e.HasField("delta")]
        # A revision that comes in pieces is not reached before the last of them.
        assert [delta.revision for delta in deltas] == [before] * 4 + [head]
        early.call.cancel()
    async with running(tmp_path, clock=hand_clock()) as server:
        late = Watcher(server, watching.who)
        while not (await late.read()).snapshot.last:
            pass
        chunks = [event.snapshot for event in late.events]
        assert len(chunks) == 5
        assert {chunk.revision for chunk in chunks} == {head}
        assert [bool(chunk.keys) for chunk in chunks] == [True] + [False] * 4
        for watcher in (early, late):
            assert all(watcher.state.is_dead(one.key) for one in changes)
        late.call.cancel()


async def test_resources_staleness_and_keys_are_told(server: Running) -> None:
    watching = await server.member("bounds", "watch")
    watcher = Watcher(server, watching.who)
    await watcher.until_at(await server.head())
    await server.resource("https://bound.test", "bound.read", staleness_max={"seconds": 30})
    await watcher.until_at(await server.head())
    assert watcher.state.staleness["https://bound.test"] == 30
    keys = (await server.auth(ADMIN).GetKeys(auth_pb2.GetKeysRequest())).keys
    assert set(watcher.state.keys.by_kid) == {key.kid for key in keys}
    assert all(not key.DESCRIPTOR.fields_by_name.get("d") for key in keys)
    watcher.call.cancel()


async def test_watching_asks_for_its_own_scope(server: Running) -> None:
    for name, scope, expected in (
        ("watch_no", "validate", "INSUFFICIENT_SCOPE"),
        ("watch_yes", "watch", "OK"),
    ):
        member = await server.member(name, scope)
        watcher = Watcher(server, member.who)
        if expected == "OK":
            await watcher.read()
            watcher.call.cancel()
        else:
            assert await reason(watcher.call.read()) == expected


async def test_epoch_that_begins_ends_the_stream_or_is_told(tmp_path: Path) -> None:
    """design section 5: after another history nobody goes on as if nothing had been."""
    async with running(tmp_path, clock=hand_clock()) as server:
        await server.resource(ORDERS, "orders.read")
        client = await server.member("client", "orders.read")
        watching = await server.member("epoch", "watch")
        old = (await server.token(client)).access_token
        watcher = Watcher(server, watching.who)
        await watcher.until_at(await server.head())
        assert watcher.judged(old, client.who) == "OK"
        await sql(_url(tmp_path), "UPDATE feed_head SET fingerprint = 'another database'")
        await server.app.follow.poll()
        assert server.app.state.revision >= 2 * REVISIONS_PER_EPOCH
        try:
            async with asyncio.timeout(20):
                while watcher.state.everything == 0:
                    await watcher.read()
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.OUT_OF_RANGE  # noqa: PT017
            watcher = Watcher(server, watching.who)
            await watcher.until_at(server.app.state.revision)
        assert watcher.judged(old, client.who) == "TOKEN_CUT_OFF"
        new = (await server.token(client)).access_token
        assert watcher.judged(new, client.who) == "OK"
        watcher.call.cancel()
