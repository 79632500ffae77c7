"""SessionService over a real server: grants listed and ended."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from authsvc.config import Grants
from authsvc_client.v1 import clients_pb2, sessions_pb2
from authsvc_client.v1 import revocations_pb2 as pb
from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub
from tests.harness import ADMIN, Member, Running, failure, hand_clock, outcome, reason, running
from tests.rpc.test_revocations import JWT, Scene, made, revoking, sql

HOUR, DAY = 3600.0, 24 * 3600.0
SHORT = Grants(lifetime_days=4 / 24, idle_days=1 / 24)
"""So that certificates outlive them."""


def sessions(server: Running, who: Any = ADMIN) -> Any:
    return SessionServiceStub(server.channel(who))


async def listed(server: Running, **wanted: Any) -> list[sessions_pb2.Grant]:
    request = sessions_pb2.ListGrantsRequest(**wanted)
    found: list[sessions_pb2.Grant] = []
    while True:
        page = await sessions(server).ListGrants(request)
        found += page.grants
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def end(server: Running, grant_id: str, who: Any = ADMIN) -> sessions_pb2.EndGrantResponse:
    request = sessions_pb2.EndGrantRequest(grant_id=grant_id)
    answer: sessions_pb2.EndGrantResponse = await sessions(server, who).EndGrant(request)
    return answer


async def opened(scene: Scene, member: Member) -> str:
    """The refresh token of a grant."""
    return await scene.exchange(member, (await scene.issue(member, JWT)).access_token)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running(tmp_path, clock=hand_clock(), grants=SHORT) as server:
        yield await made(server)


async def test_a_grant_is_listed_with_what_was_granted(scene: Scene) -> None:
    server, app = scene.server, scene.app
    assert await listed(server) == []
    refresh = await opened(scene, app)
    [grant] = await listed(server)
    assert (grant.subject, grant.client_id) == (app.client_id, app.client_id)
    assert (list(grant.scopes), list(grant.audiences)) == (["jwt.read"], [JWT])
    assert grant.grant_type == clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE
    assert not grant.HasField("last_use_time")
    assert not grant.session_id
    assert grant.expire_time.seconds - grant.create_time.seconds == 4 * HOUR
    await server.advance(60)
    await scene.refresh(app, refresh)
    [used] = await listed(server)
    assert used.last_use_time.seconds >= grant.create_time.seconds + 60
    used.ClearField("last_use_time")
    assert used == grant


async def test_pages_the_newest_first_and_by_filter(scene: Scene) -> None:
    server = scene.server
    for member in (scene.app, scene.other, scene.app, scene.app, scene.other):
        await opened(scene, member)
        await server.advance(1)
    everything = await listed(server)
    assert len(everything) == 5
    times = [grant.create_time.seconds for grant in everything]
    assert times == sorted(times, reverse=True)
    for size in (1, 2, 5):
        assert await listed(server, page_size=size) == everything
    app = scene.app.client_id
    for wanted in ({"subject": app}, {"client_id": app}, {"subject": app, "client_id": app}):
        found = await listed(server, page_size=2, **wanted)
        assert found == [grant for grant in everything if grant.client_id == app]
    assert await listed(server, subject=app, client_id=scene.other.client_id) == []
    assert await listed(server, session_id="none") == []


async def test_page_token_is_good_for_its_filter_alone(scene: Scene) -> None:
    for _ in range(3):
        await opened(scene, scene.app)
    request = sessions_pb2.ListGrantsRequest(page_size=1, client_id=scene.app.client_id)
    request.page_token = (await sessions(scene.server).ListGrants(request)).next_page_token
    assert await outcome(sessions(scene.server).ListGrants(request)) == "OK"
    for field, value in (("client_id", ""), ("subject", "x"), ("page_token", "forged")):
        wrong = sessions_pb2.ListGrantsRequest()
        wrong.CopyFrom(request)
        setattr(wrong, field, value)
        refused = sessions(scene.server).ListGrants(wrong)
        assert await reason(refused) == "PAGE_TOKEN_INVALID"
    request.page_size = 201
    assert await reason(sessions(scene.server).ListGrants(request)) == "FIELD_INVALID"


async def test_ended_grant_is_dead_and_so_are_its_tokens(scene: Scene) -> None:
    server, app = scene.server, scene.app
    first = await scene.refresh(app, await opened(scene, app))
    await server.advance(1)
    second = await scene.refresh(app, await opened(scene, app))
    [newer, older] = await listed(server)
    head = await server.head()
    answer = await end(server, older.grant_id)
    assert answer.revision == head + 1 == await server.head()
    assert await listed(server) == [newer]
    owner = scene.owner.who
    assert await server.judged(owner, first.access_token, of=app.who) == "GRANT_REVOKED"
    assert await reason(scene.refresh(app, first.refresh_token)) == "INVALID_GRANT"
    assert await server.judged(owner, second.access_token, of=app.who) == "OK"
    assert await outcome(scene.refresh(app, second.refresh_token)) == "OK"
    for over in (older.grant_id, "unknown"):
        assert await reason(end(server, over)) == "GRANT_NOT_FOUND"
    assert (await failure(end(server, ""))).fields == ("grant_id",)
    assert await server.head() == head + 1


@pytest.mark.parametrize("how", ["idle", "absolute", "cut off"])
async def test_grant_that_is_over_is_neither_listed_nor_ended(scene: Scene, how: str) -> None:
    server, refresh = scene.server, await opened(scene, scene.app)
    [grant] = await listed(server)
    if how == "cut off":
        await revoking(server).RevokeEverything(pb.RevokeEverythingRequest())
    elif how == "idle":
        await server.advance(HOUR - 1)
        assert await listed(server) == [grant]
        await server.advance(2)
    else:
        for _ in range(4):
            await server.advance(0.9 * HOUR)
            refresh = (await scene.refresh(scene.app, refresh)).refresh_token
        await server.advance(0.4 * HOUR - 1)
        assert len(await listed(server)) == 1
        await server.advance(2)
    assert await listed(server) == []
    assert await reason(end(server, grant.grant_id)) == "GRANT_NOT_FOUND"


async def test_swept_grant_is_refused_like_an_unknown_one(scene: Scene, tmp_path: Path) -> None:
    server = scene.server
    ended = await opened(scene, scene.app)
    await server.advance(1)
    good = await opened(scene, scene.app)
    newer, older = await listed(server)
    await end(server, older.grant_id)
    await server.app.housekeeping.run_once()
    assert await sql(tmp_path, {}, 'SELECT count(*) FROM "grant"') == [(2,)]
    await sql(tmp_path, {}, f'UPDATE "grant" SET end_time = end_time - {DAY + 1}')
    await server.app.housekeeping.run_once()
    assert await sql(tmp_path, {}, 'SELECT grant_id FROM "grant"') == [(newer.grant_id,)]
    assert await reason(scene.refresh(scene.app, ended)) == "INVALID_GRANT"
    assert await outcome(scene.refresh(scene.app, good)) == "OK"


async def test_administrators_alone_list_and_end(scene: Scene) -> None:
    await opened(scene, scene.app)
    [grant] = await listed(scene.server)
    head = await scene.server.head()
    for who in (scene.app.who, scene.owner.who):
        refused = sessions(scene.server, who).ListGrants(sessions_pb2.ListGrantsRequest())
        assert await reason(refused) == "INSUFFICIENT_SCOPE"
        assert await reason(end(scene.server, grant.grant_id, who)) == "INSUFFICIENT_SCOPE"
    assert await scene.server.head() == head


async def test_grant_is_ended_by_two_at_once(scene: Scene) -> None:
    await opened(scene, scene.app)
    [grant] = await listed(scene.server)
    told = await asyncio.gather(*(outcome(end(scene.server, grant.grant_id)) for _ in range(4)))
    assert "OK" in told
    assert set(told) <= {"OK", "GRANT_NOT_FOUND"}
    assert await listed(scene.server) == []
