"""Refresh tokens raced over two servers on one PostgreSQL."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import SecretStr

from authsvc_client.v1 import auth_pb2, clients_pb2, keys_pb2
from tests.harness import Running, read_failure, reason, running
from tests.rpc.test_refresh import API, OTHER, Scene, exchange, scene

ROUNDS = 12
SECRETS = {"refresh_keys": SecretStr("11" * 32), "seal_keys": SecretStr("22" * 32)}


@pytest.fixture
async def pair(migrated_url: str, tmp_path: Path) -> AsyncIterator[list[Scene]]:
    """One cast, seen by two servers."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(running(tmp_path / name, url=migrated_url, **SECRETS))
            for name in "ab"
        ]
        first = await scene(servers[0])
        await caught_up(servers)
        yield [first, Scene(servers[1], first.member, first.owner)]


async def caught_up(servers: list[Running]) -> None:
    for server in servers:
        await server.app.follow.poll()


async def attempt(call: Any) -> auth_pb2.IssuedToken | str:
    """What was answered, or the reason of the refusal."""
    try:
        found = await call
    except grpc.aio.AioRpcError as error:
        return read_failure(error).reason
    assert isinstance(found, auth_pb2.IssuedToken)
    return found


def issued(found: list[Any]) -> list[auth_pb2.IssuedToken]:
    return [each for each in found if isinstance(each, auth_pb2.IssuedToken)]


async def test_one_token_raced_on_two_servers_has_one_successor(pair: list[Scene]) -> None:
    """Design section 6: one live generation, however many race for it."""
    token = await pair[0].open()
    for _ in range(ROUNDS):
        found = await asyncio.gather(*(pair[m % 2].use(token) for m in range(32)))
        successors = {each.refresh_token for each in found}
        assert len(successors) == 1
        assert len({each.jti for each in found}) == len({each.access_token for each in found}) == 32
        for at in pair:
            assert await at.judged(found[0]) == await at.judged(found[-1]) == "OK"
        (token,) = successors
    await pair[1].use(token)
    reused = await asyncio.gather(*(attempt(pair[m % 2].use(token)) for m in range(4)))
    assert len({each.refresh_token for each in issued(reused)}) == 1


async def test_two_generations_raced_end_in_one_successor_or_none(pair: list[Scene]) -> None:
    """The one before and the live one at once: a retry that was overtaken, or a thief."""
    seen = Counter[str]()
    for n in range(ROUNDS):
        first = await pair[n % 2].open()
        second = (await pair[n % 2].use(first)).refresh_token
        calls = [pair[m % 2].use((first, second)[m // 2 % 2]) for m in range(8)]
        found = await asyncio.gather(*map(attempt, calls))
        seen.update(each if isinstance(each, str) else "OK" for each in found)
        assert {each for each in found if isinstance(each, str)} <= {
            "REFRESH_TOKEN_REUSED",
            "INVALID_GRANT",
        }
        assert list(found).count("REFRESH_TOKEN_REUSED") <= 1
        successors = {each.refresh_token for each in issued(found)} - {second}
        assert len(successors) <= 1
        dead = "REFRESH_TOKEN_REUSED" in found
        await caught_up([at.server for at in pair])
        for each in issued(found):
            assert await pair[1].judged(each) == ("GRANT_REVOKED" if dead else "OK")
        for token in successors if dead else ():
            assert await reason(pair[0].use(token)) == "INVALID_GRANT"
    assert seen["OK"]


async def by_token(at: Scene, token: str, _subject: auth_pb2.IssuedToken) -> None:
    """The owner revokes the refresh token."""
    await at.server.auth(at.member.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=token))


async def by_root(at: Scene, _token: str, subject: auth_pb2.IssuedToken) -> None:
    """The owner revokes the token that the grant was exchanged from."""
    request = auth_pb2.RevokeTokenRequest(token=subject.access_token)
    await at.server.auth(at.member.who).RevokeToken(request)


async def by_taint(at: Scene, _token: str, _subject: auth_pb2.IssuedToken) -> None:
    """The key that the subject token was signed with leaked."""
    keys = (await at.server.keys().ListSigningKeys(keys_pb2.ListSigningKeysRequest())).signing_keys
    (current,) = [key.kid for key in keys if key.state == keys_pb2.SIGNING_KEY_STATE_CURRENT]
    await at.server.keys().TaintSigningKey(keys_pb2.TaintSigningKeyRequest(kid=current))


async def by_suspension(at: Scene, _token: str, _subject: auth_pb2.IssuedToken) -> None:
    """The client is suspended, and let in again at once."""
    await at.server.suspend(at.member.client_id)
    request = clients_pb2.ResumeClientRequest(client_id=at.member.client_id)
    await at.server.clients().ResumeClient(request)


@pytest.mark.parametrize("kill", [by_token, by_root, by_taint, by_suspension])
async def test_after_a_death_raced_by_refreshes_nothing_is_alive(
    pair: list[Scene], kill: Any
) -> None:
    """Once both have returned and the feed is applied, nothing of the grant is active."""
    alive: list[str] = []
    seen = Counter[str]()
    for n in range(3 if kill is by_taint else ROUNDS):
        at, other = pair if n % 2 else reversed(pair)
        await caught_up([at.server, other.server])
        subject = await at.server.token(at.member, resources=[API, OTHER])
        token = (await exchange(at.server, at.member, subject.access_token)).refresh_token
        got = [await at.use(token)]
        before = [pair[m % 2].use(token) for m in range(n % 4)]
        after = [pair[m % 2].use(token) for m in range(6)]
        found: list[Any] = await asyncio.gather(
            *map(attempt, before), kill(at, got[0].refresh_token, subject), *map(attempt, after)
        )
        got += issued(found)
        seen.update(each if isinstance(each, str) else "OK" for each in found)
        await caught_up([at.server, other.server])
        for seer in (at, other):
            # At once: a token of a key that is gone waits for the poll that may bring it.
            judged = await asyncio.gather(*(seer.judged(each) for each in got))
            alive += [f"access {n}"] * judged.count("OK")
            for refresh in {token, *(each.refresh_token for each in got)}:
                answer = await attempt(seer.use(refresh))
                alive += [f"refresh {n}"] if isinstance(answer, auth_pb2.IssuedToken) else []
    assert alive == []
    assert seen["OK"]
    assert seen.keys() <= {"OK", "INVALID_GRANT", "CLIENT_SUSPENDED", "REFRESH_TOKEN_REUSED"}
