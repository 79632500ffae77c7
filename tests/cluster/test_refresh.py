"""Refresh tokens over two replicas: raced, paused in the middle, and revoked meanwhile."""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import pytest

from authsvc_client.v1 import auth_pb2
from tests.cluster.replicas import STRONG, Cast, Cluster, Replica, attempt, in_turn, rounds

RACERS = 32
FAMILIES = 4
"""Grants raced for at the same time."""


def issued(found: list[Any]) -> list[auth_pb2.IssuedToken]:
    return [each for each in found if isinstance(each, auth_pb2.IssuedToken)]


async def race(players: Cast, pair: list[Replica], token: str) -> str:
    """32 use one token at once, half of them on each replica: the one successor of all."""
    found = await asyncio.gather(*(attempt(players.use(pair[n % 2], token)) for n in range(RACERS)))
    assert [each for each in found if isinstance(each, str)] == []
    successors = {each.refresh_token for each in issued(found)}
    assert len(successors) == 1
    assert len({each.jti for each in issued(found)}) == RACERS
    successor = successors.pop()
    assert successor != token
    return successor


async def family(players: Cast, pair: list[Replica], times: int) -> None:
    token = await players.open(pair[0])
    for _ in range(times):
        token = await race(players, pair, token)
    last = [await players.use(at, token) for at in pair]
    assert len({each.refresh_token for each in last}) == 1
    assert await players.is_active(pair[1], last[0].access_token)


async def test_a_token_raced_32_ways_over_two_replicas_has_one_successor(
    pair: list[Replica], players: Cast
) -> None:
    """Design section 6: one live generation; after hundreds of races the grant works on."""
    times = rounds(200) // FAMILIES
    await asyncio.gather(*(family(players, pair, times) for _ in range(FAMILIES)))


TWO_SUCCESSORS = (
    "CREATE FUNCTION plant() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN NEW.generation := OLD.generation + 1; RETURN NEW; END $$",
    'CREATE TRIGGER plant BEFORE UPDATE ON "grant" FOR EACH ROW'
    " WHEN (NEW.generation = OLD.generation AND NEW.end_time IS NULL) EXECUTE FUNCTION plant()",
)
"""The bug: who comes second gets a successor of its own."""
ENDS_NOTHING = (
    "CREATE FUNCTION plant() RETURNS trigger LANGUAGE plpgsql AS"
    ' $$ BEGIN UPDATE "grant" SET end_time = NULL WHERE grant_id = NEW.grant_id;'
    " RETURN NULL; END $$",
    'CREATE CONSTRAINT TRIGGER plant AFTER UPDATE ON "grant" DEFERRABLE INITIALLY DEFERRED'
    " FOR EACH ROW WHEN (OLD.end_time IS NULL AND NEW.end_time IS NOT NULL)"
    " EXECUTE FUNCTION plant()",
)
"""The bug: a revocation is told to everybody, but its grant lives on in its row."""
UPROOT = "DROP FUNCTION plant CASCADE"


async def test_the_race_would_notice_a_second_successor(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    await cluster.sql(*TWO_SUCCESSORS)
    try:
        with pytest.raises(AssertionError):
            await family(players, pair, 5)
    finally:
        await cluster.sql(UPROOT)


async def test_a_replica_paused_in_the_middle_of_a_race_does_no_harm(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    """It stops between any two steps, while the other one goes on; later it ends what it began.

    As long as the successor was not used it answers that one, to everybody. Afterwards it answers
    it to those whom it had served in time, and to others refuses: it opens no second generation.
    """
    frozen, other = cluster.processes[0], pair[1]
    caught = 0
    for n in range(rounds(40)):
        token, goes_on = await players.open(other), n % 2 == 1
        calls = [asyncio.ensure_future(attempt(players.use(pair[m % 2], token))) for m in range(8)]
        await asyncio.sleep(0.0003 * n)
        frozen.freeze()
        last = await players.use(other, token)
        successor = last.refresh_token
        caught += not all(call.done() for call in calls)
        if goes_on:
            last = await players.use(other, successor)
        frozen.thaw()
        found = await asyncio.gather(*calls)
        assert {each.refresh_token for each in issued(found)} <= {successor}
        told = {each for each in found if isinstance(each, str)}
        assert told <= ({"REFRESH_TOKEN_REUSED", "INVALID_GRANT"} if goes_on else set())
        is_dead = bool(told)  # who presents what was replaced and used ends the grant
        for at in pair:
            assert await players.is_active(at, last.access_token, **STRONG) is not is_dead
        again = await attempt(players.use(pair[0], last.refresh_token))
        assert again == "INVALID_GRANT" if is_dead else not isinstance(again, str)
    assert caught


async def death(players: Cast, pair: list[Replica], n: int) -> str:
    """A refresh on one replica and a revocation on the other at once: how the refresh ended."""
    at, other = pair if n % 2 else reversed(pair)
    first = await players.use(at, await players.open(at))
    revoking = players.revoke(other, first.refresh_token)
    using = attempt(players.use(at, first.refresh_token))
    if n % 4 < 2:
        used, revision = await asyncio.gather(using, revoking)
    else:
        revision, used = await asyncio.gather(revoking, using)
    assert revision
    tokens = [first, *issued([used])]
    ways: list[dict[str, Any]] = [STRONG, {"at_least": revision}]
    checks = [
        players.is_active(replica, each.access_token, **way)
        for each in tokens
        for replica, way in zip(pair, ways, strict=True)
    ]
    assert not any(await asyncio.gather(*checks))
    for each in tokens:
        assert await attempt(players.use(at, each.refresh_token)) == "INVALID_GRANT"
    return used if isinstance(used, str) else "OK"


async def test_after_a_refresh_raced_a_revocation_nothing_of_the_grant_is_active(
    pair: list[Replica], players: Cast
) -> None:
    """Design section 6: whichever comes first, when both have returned all of it is dead."""
    seen = Counter[str]()

    async def one(n: int) -> None:
        seen[await death(players, pair, n)] += 1

    await in_turn([partial(one, n) for n in range(rounds(1000))], 16)
    assert seen.keys() == {"OK", "INVALID_GRANT"}


async def test_the_deaths_would_notice_a_grant_that_lives_on(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    await cluster.sql(*ENDS_NOTHING)
    try:
        with pytest.raises(AssertionError):
            await asyncio.gather(*(death(players, pair, n) for n in range(4)))
    finally:
        await cluster.sql(UPROOT)
