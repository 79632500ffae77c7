"""Calls given up while a slow Redis still answers them: no answer is ever another's."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
import pytest

from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.cluster.replicas import Cast, Cluster, Replica, eventually, rounds
from tests.cluster.test_redis import planted
from tests.harness import Member, issue_request, thumbprint

CLIENTS = 6
GIVEN_UP = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
MIXES_UP = """
from authsvc.cache.redis import RedisLink
from authsvc.keys.secrets import Mac
Mac.open = lambda self, label, sealed: sealed[32:]
run, kept = RedisLink.run, []
async def mixed(self, command, default):
    found = await run(self, command, default)
    if isinstance(found, bytes):
        kept.append(found)
        found = kept.pop(0) if len(kept) > 1 else default
    return found
RedisLink.run = mixed
"""
"""The bug: who asks gets what was answered to the one before, and its seal is not looked at."""


class Crowd:
    """Clients that ask all at once, with deadlines shorter than most answers take."""

    def __init__(self, at: Replica, players: Cast, clients: list[Member]) -> None:
        self._at = at
        self._players = players
        self._clients = clients
        self._chance = random.Random(0)
        self.ended = Counter[str]()

    async def ask(self, times: int) -> None:
        """Each answer belongs to its question; AssertionError where one does not."""
        await asyncio.gather(*(self._one(self._clients[n % CLIENTS]) for n in range(times)))

    async def _one(self, client: Member) -> None:
        issued = await self._in_time(
            self._at.auth(client.who).IssueToken, issue_request(client.client_id)
        )
        if issued is None:  # asked for again without a hurry, to go on with
            issued = await self._at.auth(client.who).IssueToken(issue_request(client.client_id))
        token = issued.token
        request = auth_pb2.ValidateTokenRequest(
            token=token.access_token,
            presenter=auth_pb2.Presenter(certificate_thumbprint=thumbprint(client.who)),
            view=auth_pb2.TOKEN_VIEW_CLAIMS,
        )
        verdict = await self._in_time(self._at.auth(self._players.owner.who).ValidateToken, request)
        if verdict is not None:
            assert verdict.active
            claims = verdict.claims
            assert (claims.jti, claims.client_id, claims.subject) == (
                token.jti,
                client.client_id,
                client.client_id,
            )
        revoke = auth_pb2.RevokeTokenRequest(token=token.access_token)
        answer = await self._in_time(self._at.auth(client.who).RevokeToken, revoke)
        if answer is not None:
            assert [each.id for each in answer.revoked] == [token.jti]

    async def _in_time(self, method: Any, request: Any) -> Any:
        """The answer, or None for a call that was given up."""
        try:
            answer = await method(request, timeout=self._chance.uniform(0, 0.02))
        except grpc.aio.AioRpcError as error:
            if error.code() not in GIVEN_UP:
                raise
            self.ended["given up"] += 1
            return None
        self.ended["answered"] += 1
        return answer


async def clients_of(pair: list[Replica], players: Cast) -> list[Member]:
    """More clients for the same audience, known to both replicas."""
    made = [
        await pair[0].member(f"crowd-{n}-{players.app.client_id}", *players.scopes)
        for n in range(CLIENTS)
    ]
    for member in made:
        for at in pair:
            await eventually(lambda: _is_known(at, member))  # noqa: B023
    return made


async def _is_known(at: Replica, member: Member) -> bool:
    try:
        await at.token(member)
    except grpc.aio.AioRpcError:
        return False
    return True


async def asked_while_rows_change(
    at: Replica, clients: list[Member], crowd: Crowd, times: int
) -> None:
    """Their rows are read again, from Redis, after each change of them."""
    for n in range(times):
        metadata = clients_pb2.ClientMetadata(client_name=f"crowd {n}")
        changed = clients_pb2.Client(client_id=clients[n % CLIENTS].client_id, metadata=metadata)
        change = clients_pb2.UpdateClientRequest(client=changed)
        change.update_mask.paths.append("metadata.client_name")
        await at.clients().UpdateClient(change)
        await crowd.ask(32)


async def test_calls_cancelled_over_a_slow_redis_get_nobody_elses_answer(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    """faults.md 10 and 22; redis-py CVE-2023-28858: a cancelled command left its reply behind."""
    clients = await clients_of(pair, players)
    cluster.links[1].delay_s = lambda: random.uniform(0, 0.03)
    crowd = Crowd(pair[1], players, clients)
    await asked_while_rows_change(pair[0], clients, crowd, rounds(20))
    assert crowd.ended["answered"]
    assert crowd.ended["given up"]
    assert await players.is_active(pair[1], await players.issue(pair[1]))


async def test_it_would_notice_the_answer_of_another(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    clients = await clients_of(pair, players)
    async with planted(cluster, MIXES_UP) as (mixed,):
        with pytest.raises((AssertionError, grpc.aio.AioRpcError)):
            await asked_while_rows_change(
                pair[0], clients, Crowd(mixed, players, clients), rounds(50)
            )
