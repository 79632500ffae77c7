"""KeyService over a real server: each call in each state, keys published ahead, two workers."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest

from authsvc.keys.ring import KEYS_MAX_AGE_S, READY_MARGIN_S
from authsvc.model import KeyState
from authsvc_client.core.jws import decode
from authsvc_client.v1 import auth_pb2, keys_pb2
from tests.harness import (
    ADMIN,
    ISSUER,
    NOW,
    Member,
    Running,
    failure,
    hand_clock,
    migrate,
    outcome,
    reason,
    running,
    start,
    until,
)
from tests.rpc.test_watch import Watcher
from tests.servers import Postgres

BILLS = "https://bills.test"
WAIT_S = 300 + READY_MARGIN_S
NEXT, CURRENT, RETIRED, TAINTED = KeyState


def state_of(key: keys_pb2.SigningKey) -> KeyState:
    return KeyState[keys_pb2.SigningKeyState.Name(key.state).removeprefix("SIGNING_KEY_STATE_")]


def kid_of(token: str) -> str:
    return str(json.loads(decode(token.split(".")[0]))["kid"])


async def prepare(server: Running, alg: str = "") -> keys_pb2.SigningKey:
    request = keys_pb2.PrepareSigningKeyRequest(alg=alg)
    return (await server.keys().PrepareSigningKey(request)).signing_key


async def activate(server: Running, kid: str) -> keys_pb2.ActivateSigningKeyResponse:
    return await server.keys().ActivateSigningKey(keys_pb2.ActivateSigningKeyRequest(kid=kid))


async def retire(server: Running, kid: str) -> keys_pb2.RetireSigningKeyResponse:
    return await server.keys().RetireSigningKey(keys_pb2.RetireSigningKeyRequest(kid=kid))


async def taint(server: Running, kid: str, **more: Any) -> keys_pb2.TaintSigningKeyResponse:
    return await server.keys().TaintSigningKey(keys_pb2.TaintSigningKeyRequest(kid=kid, **more))


async def listed(server: Running) -> dict[str, KeyState]:
    """The newest first."""
    answer = await server.keys().ListSigningKeys(keys_pb2.ListSigningKeysRequest(page_size=200))
    return {key.kid: state_of(key) for key in answer.signing_keys}


async def in_state(server: Running, state: KeyState) -> str:
    [kid] = [kid for kid, found in (await listed(server)).items() if found is state]
    return kid


async def jwk_set(server: Running) -> dict[str, auth_pb2.Jwk]:
    answer = await server.auth(ADMIN).GetKeys(auth_pb2.GetKeysRequest())
    assert answer.max_age.seconds == KEYS_MAX_AGE_S
    return {key.kid: key for key in answer.keys}


async def scene(server: Running) -> Member:
    """Who gets tokens for BILLS, which the administrator validates."""
    await server.resource(BILLS, "bills.read")
    return await server.member("orders", "bills.read")


async def issue(server: Running, member: Member) -> str:
    return (await server.token(member, "bills.read")).access_token


async def judged(server: Running, member: Member, token: str) -> str:
    return await server.judged(ADMIN, token, of=member.who)


@pytest.fixture
async def hand(tmp_path: Path) -> AsyncIterator[Running]:
    """A server whose time is moved by hand."""
    async with running(tmp_path, clock=hand_clock()) as server:
        yield server


async def a_ring(server: Running) -> dict[KeyState, str]:
    """One key of each state."""
    first = await in_state(server, CURRENT)
    await taint(server, first)
    retired = await in_state(server, CURRENT)
    current = await prepare(server)
    await server.advance(WAIT_S)
    await activate(server, current.kid)
    following = await prepare(server)
    made = {TAINTED: first, RETIRED: retired, CURRENT: current.kid, NEXT: following.kid}
    assert await listed(server) == {kid: state for state, kid in made.items()}
    return made


async def test_each_call_in_each_state(hand: Running) -> None:
    kids: dict[str, str] = {state.value: kid for state, kid in (await a_ring(hand)).items()}
    kids["nobody"] = "nobody"
    before, head = await listed(hand), await hand.head()
    refused = {
        f"{call.__name__} {name}": await outcome(call(hand, kids[name]))
        for call in (activate, retire)
        for name in ("current", "retired", "tainted", "nobody")
    }
    conflict, missing = "SIGNING_KEY_STATE_CONFLICT", "SIGNING_KEY_NOT_FOUND"
    assert refused == {name: missing if name.endswith("nobody") else conflict for name in refused}
    assert await outcome(taint(hand, "nobody")) == missing
    assert await outcome(taint(hand, "nobody", validate_only=True)) == missing
    assert (await failure(prepare(hand))).metadata == {"state": "NEXT"}
    assert (await failure(retire(hand, kids["current"]))).metadata == {"state": "CURRENT"}
    assert await reason(activate(hand, kids["next"])) == "SIGNING_KEY_NOT_READY"
    for name, signs in (("next", "current"), ("current", "next"), ("retired", "current")):
        told = await taint(hand, kids[name], validate_only=True)
        assert (told.revision, state_of(told.signing_key)) == (0, TAINTED)
        assert (told.signing_key.kid, told.current_signing_key.kid) == (kids[name], kids[signs])
        assert state_of(told.current_signing_key) is CURRENT
        assert told.signing_key.HasField("taint_time")
    again = await taint(hand, kids["tainted"])
    assert (again.revision, again.current_signing_key.kid) == (0, kids["current"])
    assert (await listed(hand), await hand.head()) == (before, head), "nothing has changed"

    assert state_of((await retire(hand, kids["next"])).signing_key) is RETIRED
    told = await taint(hand, kids["current"], validate_only=True)
    assert not told.HasField("current_signing_key"), "it has yet to be made"
    done = await taint(hand, kids["current"], comment="found in a log")
    assert done.revision == await hand.head()
    assert (await listed(hand))[done.current_signing_key.kid] is CURRENT
    assert Counter((await listed(hand)).values()) == {CURRENT: 1, TAINTED: 2, RETIRED: 2}


async def test_next_is_not_ready_before_every_validator_knows_it(hand: Running) -> None:
    key = await prepare(hand)
    assert key.ready_time.seconds - key.create_time.seconds == WAIT_S
    assert not any(key.HasField(name) for name in ("activate_time", "retire_time", "taint_time"))
    for passed, left in ((0, WAIT_S), (WAIT_S - 10, 10)):
        await hand.advance(passed)
        early = await failure(activate(hand, key.kid))
        assert (early.code, early.reason) == ("FAILED_PRECONDITION", "SIGNING_KEY_NOT_READY")
        assert early.retry_after_s == pytest.approx(left, abs=0.01)
    await hand.advance(10)
    active = (await activate(hand, key.kid)).signing_key
    assert state_of(active) is CURRENT
    assert active.activate_time.seconds == int(NOW) + WAIT_S


async def test_a_longer_staleness_makes_next_wait_longer(tmp_path: Path) -> None:
    async with running(tmp_path, staleness_max_s=600) as server:
        key = await prepare(server)
        assert key.ready_time.seconds - key.create_time.seconds == 600 + READY_MARGIN_S


async def test_list_is_paged_the_newest_first_and_holds_no_key_material(hand: Running) -> None:
    made = [await in_state(hand, CURRENT)]
    for _ in range(4):
        await hand.advance(1)
        made.append((await prepare(hand)).kid)
        await retire(hand, made[-1])
    stub, found, token = hand.keys(), [], ""
    for _ in range(3):
        request = keys_pb2.ListSigningKeysRequest(page_size=2, page_token=token)
        page = await stub.ListSigningKeys(request)
        found += [key.kid for key in page.signing_keys]
        token = page.next_page_token
    assert (found, token) == (made[::-1], "")
    fields = {field.name for field in keys_pb2.SigningKey.DESCRIPTOR.fields}
    assert fields == {"kid", "alg", "state"} | {
        f"{what}_time" for what in ("create", "ready", "activate", "retire", "taint")
    }
    first = await stub.ListSigningKeys(keys_pb2.ListSigningKeysRequest(page_size=1))
    for wrong in ("x", first.next_page_token[:-1], "A" + first.next_page_token[1:]):
        request = keys_pb2.ListSigningKeysRequest(page_token=wrong)
        assert await reason(stub.ListSigningKeys(request)) == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize("alg", ["none", "HS256", "es256", "ES384", "RSA-OAEP", " "])
async def test_an_algorithm_that_is_none_of_ours_is_refused(hand: Running, alg: str) -> None:
    refused = await failure(prepare(hand, alg))
    assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("alg",))
    assert list((await listed(hand)).values()) == [CURRENT]


@pytest.mark.parametrize("alg", ["ES256", "RS256", "PS256", "EdDSA"])
async def test_each_algorithm_from_the_key_to_the_verdict(hand: Running, alg: str) -> None:
    """RFC 9068 section 4; the JWK set (RFC 7517 section 5) is read by another implementation."""
    member = await scene(hand)
    old = await issue(hand, member)
    made = await prepare(hand, alg)
    assert made.alg == alg
    await hand.advance(WAIT_S)
    old = await issue(hand, member)
    await activate(hand, made.kid)
    token = await issue(hand, member)
    assert [kid_of(old) == made.kid, kid_of(token) == made.kid] == [False, True]
    assert [await judged(hand, member, each) for each in (old, token)] == ["OK", "OK"]
    jwk = (await jwk_set(hand))[made.kid]
    assert (jwk.alg, jwk.use) == (alg, "sig")
    key = jwt.PyJWK({field.name: value for field, value in jwk.ListFields()})
    claims = jwt.decode(token, key, algorithms=[alg], audience=BILLS, options={"verify_iat": False})
    assert claims["iss"] == ISSUER
    flipped = token[:-8] + ("A" if token[-8] != "A" else "B") + token[-7:]
    assert await judged(hand, member, flipped) == "TOKEN_SIGNATURE_INVALID"


# Published ahead


async def test_next_is_in_the_jwk_set_and_the_stream_before_it_signs(hand: Running) -> None:
    member, watching = await scene(hand), await hand.member("watching", "watch")
    early = Watcher(hand, watching.who)
    await early.until_at(await hand.head())
    made = await prepare(hand)
    late = Watcher(hand, watching.who)
    for watcher in (early, late):
        await watcher.until_at(await hand.head())
        assert made.kid in watcher.state.keys.by_kid
    assert made.kid in await jwk_set(hand)
    assert kid_of(await issue(hand, member)) != made.kid
    await hand.advance(WAIT_S)
    before = await issue(hand, member)
    active = await activate(hand, made.kid)
    after = await issue(hand, member)
    for watcher in (early, late):
        held = watcher.state.keys.by_kid[made.kid]
        await watcher.until_at(active.revision)
        assert watcher.state.keys.by_kid[made.kid] is held
        assert [watcher.judged(token, member.who) for token in (before, after)] == ["OK", "OK"]
    done = await taint(hand, made.kid)
    for watcher in (early, late):
        await watcher.until_at(done.revision)
        assert made.kid not in watcher.state.keys.by_kid
        assert watcher.judged(before, member.who) == "OK"
        assert watcher.judged(after, member.who) != "OK"
        assert watcher.judged(await issue(hand, member), member.who) == "OK"
    early.call.cancel()
    late.call.cancel()


async def test_a_snapshot_of_a_worker_that_is_behind_is_followed_by_the_keys(hand: Running) -> None:
    """The table has a revision that the worker has not applied: its keys are older than that."""
    watching = await hand.member("watching", "watch")
    await hand.app._tasks.stop()
    await hand.head()
    key = await hand.app._ring.prepare()
    watcher = Watcher(hand, watching.who)
    first = await watcher.read()
    assert first.snapshot.revision == hand.app.state.revision < key[1]
    assert key[0].kid not in watcher.state.keys.by_kid
    await hand.app.follow.poll()
    await watcher.until_at(key[1])
    async with asyncio.timeout(10):
        while key[0].kid not in watcher.state.keys.by_kid:
            await watcher.read()
    watcher.call.cancel()


# Taint


async def test_taint_bites_everywhere_and_the_service_goes_on(hand: Running) -> None:
    member, admin = await scene(hand), await hand.member("operator", "admin")
    dead = await issue(hand, member)
    bearer = (await hand.token(admin, "admin")).access_token
    metadata = (("authorization", f"Bearer {bearer}"),)
    everything = keys_pb2.ListSigningKeysRequest()
    assert (await hand.keys(admin.who).ListSigningKeys(everything, metadata=metadata)).signing_keys
    done = await taint(hand, kid_of(dead), comment="stolen")
    assert await judged(hand, member, dead) in ("TOKEN_KEY_TAINTED", "TOKEN_KEY_UNKNOWN")
    refused = await failure(hand.keys(admin.who).ListSigningKeys(everything, metadata=metadata))
    assert refused.reason == "CALLER_TOKEN_INVALID"
    fresh = await issue(hand, member)
    assert kid_of(fresh) == done.current_signing_key.kid
    assert await judged(hand, member, fresh) == "OK"
    assert kid_of(dead) not in await jwk_set(hand)


# Two workers


async def test_two_workers_rotate_and_taint_at_once_and_every_good_token_verifies_on_both(
    tmp_path: Path, migrated_url: str
) -> None:
    """faults.md I11: a token that was issued verifies on every worker, from then on."""
    async with AsyncExitStack() as stack:
        pair: list[Running] = []
        for _ in range(2):
            pair.append(await start(tmp_path, url=migrated_url))
            stack.push_async_callback(pair[-1].close)
        one, two = pair
        member = await scene(one)
        await two.app.follow.reach(await one.head())
        tainting: set[str] = set()
        good: list[str] = []
        ended = asyncio.Event()

        async def work(server: Running) -> None:
            while not ended.is_set():
                token = await issue(server, member)
                for judge in pair:
                    verdict = await judged(judge, member, token)
                    assert verdict == "OK" or kid_of(token) in tainting, verdict
                good.append(token)

        workers = [asyncio.create_task(work(server)) for server in pair]
        async with asyncio.timeout(90):
            for number in range(12):
                current = await in_state(one, CURRENT)
                made = await asyncio.gather(*map(_try(prepare), pair), return_exceptions=True)
                heir = await in_state(two, NEXT)
                assert len([each for each in made if each == "OK"]) <= 1
                await until(lambda: all(heir in s.app.state.keys.by_kid for s in pair))  # noqa: B023
                if number % 3 == 0:
                    tainting.add(current)
                    done = await asyncio.gather(*(taint(server, current) for server in pair))
                    assert [bool(each.revision) for each in done].count(True) == 1
                elif number % 3 == 1:
                    tainting |= {current, heir}
                    found = await asyncio.gather(taint(one, heir), taint(two, current))
                    assert all(each.revision for each in found)
                else:
                    await _make_ready(pair)
                    taken = await asyncio.gather(
                        *(outcome(activate(server, heir)) for server in pair)
                    )
                    assert sorted(taken) == ["OK", "SIGNING_KEY_STATE_CONFLICT"]
                seen = Counter((await listed(one)).values())
                assert (seen[CURRENT], seen[NEXT] <= 1) == (1, True)
                assert not any(worker.done() for worker in workers), workers
        ended.set()
        await asyncio.gather(*workers)
        head = await one.head()
        await two.app.follow.reach(head)
        one_of_each = {kid_of(token): token for token in good}
        assert len(one_of_each) > 4
        for judge in pair:
            verdicts = await asyncio.gather(
                *(judged(judge, member, token) for token in one_of_each.values())
            )
            assert [verdict == "OK" for verdict in verdicts] == [
                kid not in tainting for kid in one_of_each
            ]


def _try(call: Any) -> Any:
    async def tried(server: Running) -> str:
        return await outcome(call(server))

    return tried


async def _make_ready(pair: list[Running]) -> None:
    """Both have it: nobody needs the rest of the wait."""
    keys: Any = pair[0].store.keys
    async with keys._db.write() as connection:
        await connection.exec_driver_sql("UPDATE signing_key SET ready_time = 0")


# What fails


async def test_without_a_database_every_call_is_unavailable_and_nothing_is_half_done(
    tmp_path: Path,
) -> None:
    with Postgres() as postgres:
        url = await postgres.database()
        await migrate(url)
        async with running(tmp_path, url=url) as server:
            made = await prepare(server)
            before = await listed(server)
            [current] = [kid for kid, state in before.items() if state is CURRENT]
            postgres._quit()
            calls = {
                "list": await outcome(listed(server)),
                "prepare": await outcome(prepare(server)),
                "activate": await outcome(activate(server, made.kid)),
                "retire": await outcome(retire(server, made.kid)),
                "taint": await outcome(taint(server, current)),
                "dry": await outcome(taint(server, current, validate_only=True)),
            }
            assert calls == dict.fromkeys(calls, "STORE_UNAVAILABLE")
            postgres._process = postgres._launch()
            async with asyncio.timeout(30):
                while await outcome(listed(server)) != "OK":  # noqa: ASYNC110 - it starts
                    await asyncio.sleep(0.05)
            assert await listed(server) == before
            assert (await taint(server, current)).current_signing_key.kid == made.kid


async def test_a_caller_who_goes_away_leaves_a_whole_taint(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for number in range(8):
            current = await in_state(server, CURRENT)
            call = server.keys().TaintSigningKey(keys_pb2.TaintSigningKeyRequest(kid=current))
            await asyncio.sleep(0.001 * number)
            call.cancel()
            with suppress(asyncio.CancelledError):  # or it was faster
                await call
            done = await taint(server, current)
            assert state_of(done.signing_key) is TAINTED
            assert Counter((await listed(server)).values()) == {CURRENT: 1, TAINTED: number + 1}


async def test_nobody_but_administrators_is_told_anything(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        member = await server.member("validator", "validate", "watch")
        stub = server.keys(member.who)
        for call in (
            stub.ListSigningKeys(keys_pb2.ListSigningKeysRequest()),
            stub.TaintSigningKey(keys_pb2.TaintSigningKeyRequest(kid="x", validate_only=True)),
        ):
            refused = await failure(call)
            assert (refused.code, refused.reason) == (
                grpc.StatusCode.PERMISSION_DENIED.name,
                "INSUFFICIENT_SCOPE",
            )
