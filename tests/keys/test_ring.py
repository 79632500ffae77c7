"""Rotation and taint as workers live through them: real databases, and time moved by hand."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from authsvc.config import Keys
from authsvc.errors import AuthError
from authsvc.keys.jwt import Signer, generate
from authsvc.keys.ring import KEYS_MAX_AGE_S, READY_MARGIN_S, KeyRing
from authsvc.keys.secrets import Sealer, new_id, new_seal_key
from authsvc.model import KeyState, SigningKey
from authsvc.store.port import Tainted
from authsvc_client.core.judge import Judge, Question
from authsvc_client.core.jws import decode
from tests.clocks import HandClock
from tests.harness import ISSUER, Running, hand_clock, migrate, start
from tests.servers import Postgres

NEXT, CURRENT, RETIRED, TAINTED = KeyState
HOUR, DAY = 3600.0, 86400.0
LIFE_S = 3000
ASK = Question(frozenset({"*"}))


class Worker:
    """A server, used without the wire: certificates would not outlive the days that pass here."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.state = server.app.state
        self.ring: KeyRing = server.app._ring
        self.keys = server.store.keys
        self.poll = server.app.follow.poll
        self._judge = Judge(ISSUER, self.state)

    async def rotate(self) -> None:
        await self.ring.rotate(self.state.now(self.server.clock.boot()))

    def token(self) -> str:
        """An access token by the worker's signer, as of now."""
        now = int(self.state.now(self.server.clock.boot()))
        claims: dict[str, Any] = {"iss": ISSUER, "sub": "s", "aud": "https://a.test", "iat": now}
        claims |= {"exp": now + LIFE_S, "jti": new_id(), "client_id": "s", "scope": "a"}
        return self.ring.signer.sign(claims | {"rev": self.state.revision})

    def judged(self, token: str) -> str:
        verdict = self._judge(token, ASK, self.server.clock.boot())
        return "OK" if verdict.active else verdict.reason.name

    @property
    def published(self) -> set[str]:
        return set(self.state.keys.by_kid)

    async def states(self) -> dict[str, KeyState]:
        return {key.kid: key.state for key in await self.keys.all()}

    async def one(self, state: KeyState) -> SigningKey:
        [found] = [key for key in await self.keys.all() if key.state is state]
        return found


def kid_of(token: str) -> str:
    return str(json.loads(decode(token.split(".")[0]))["kid"])


@asynccontextmanager
async def workers(folder: Path, clock: HandClock, number: int = 2, **settings: Any) -> Any:
    """Workers on one database."""
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(number):
            server = await start(folder, clock=clock, **settings)
            stack.push_async_callback(server.close)
            await server.app._tasks.stop()  # a poll under way while time jumps reads half of it
            made.append(Worker(server))
        yield made


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Worker, Worker, HandClock]]:
    """Two workers on one SQLite file, and its clock."""
    clock = hand_clock()
    async with workers(tmp_path, clock) as (one, two):
        yield one, two, clock


async def all_poll(*found: Worker) -> None:
    await asyncio.gather(*(worker.poll() for worker in found))


async def test_two_workers_rotate_for_seventy_days_and_every_token_verifies(
    pair: tuple[Worker, Worker, HandClock],
) -> None:
    """faults.md I11 is what this is about; no step of either worker is waited for by the other."""
    one, two, clock = pair
    begun = clock.wall()
    signed: dict[str, float] = {}
    seen: dict[str, float] = {}
    for _ in range(70 * 4):
        clock.advance(6 * HOUR)
        await one.poll()
        tokens = [one.token()]
        await asyncio.gather(one.rotate(), two.poll())
        tokens += [one.token(), two.token()]
        assert {worker.judged(token) for worker in (one, two) for token in tokens} == {"OK"}
        await asyncio.gather(one.poll(), two.rotate())
        tokens += [one.token(), two.token()]
        await two.poll()
        tokens += [one.token(), two.token()]
        assert {worker.judged(token) for worker in (one, two) for token in tokens} == {"OK"}
        days = (clock.wall() - begun) / DAY
        for kid in one.published & two.published:
            seen.setdefault(kid, days)
        for token in tokens:
            signed.setdefault(kid_of(token), days)
        counted = Counter((await one.states()).values())
        assert (counted[CURRENT], counted[NEXT] <= 1) == (1, True)
    assert list(signed.values()) == [0.25, 30.0, 60.0]
    assert [round(seen[kid], 2) for kid in signed] == [0.25, 29.0, 59.0]
    assert list(signed)[-1:] == list(one.published) == list(two.published), "old ones are dropped"
    assert Counter((await one.states()).values()) == {CURRENT: 1, RETIRED: 2}


async def test_eight_rounds_at_once_do_what_is_due_once(
    pair: tuple[Worker, Worker, HandClock],
) -> None:
    one, two, clock = pair
    for expected in ({CURRENT: 1, NEXT: 1}, {CURRENT: 1, RETIRED: 1}):
        clock.advance(29 * DAY if NEXT in expected else DAY)
        await all_poll(one, two)
        before = one.state.revision
        await asyncio.gather(*(worker.rotate() for worker in (one, two) * 4))
        await all_poll(one, two)
        assert one.state.revision == before + 1
        assert Counter((await one.states()).values()) == expected


async def test_rotation_waits_for_the_next_key_to_be_ready(
    pair: tuple[Worker, Worker, HandClock],
) -> None:
    """The service slept over the day: the new key is published first, signs when it is known."""
    one, two, clock = pair
    first = (await one.one(CURRENT)).kid
    clock.advance(90 * DAY)
    await all_poll(one, two)
    await one.rotate()
    wait_s = max(one.state.staleness_max_s, KEYS_MAX_AGE_S) + READY_MARGIN_S
    heir = await one.one(NEXT)
    assert heir.ready_time == heir.create_time + wait_s
    for passed, state in ((0.0, NEXT), (wait_s - 1, NEXT), (1.0, CURRENT)):
        clock.advance(passed)
        await all_poll(one, two)
        await two.rotate()
        assert (await two.states())[heir.kid] is state
    await all_poll(one, two)
    assert {kid_of(one.token()), kid_of(two.token())} == {heir.kid}
    assert (await one.states())[first] is RETIRED


async def test_no_rotation_where_it_is_switched_off(tmp_path: Path) -> None:
    clock = hand_clock()
    settings = Keys(rotate_days=0)
    async with workers(tmp_path, clock, 1, keys=settings) as [worker]:
        for _ in range(5):
            clock.advance(100 * DAY)
            await worker.poll()
            await worker.rotate()
        assert list((await worker.states()).values()) == [CURRENT]


async def test_a_worker_that_dies_after_publishing_leaves_the_rest_to_another(
    tmp_path: Path,
) -> None:
    clock = hand_clock()
    async with workers(tmp_path, clock, 1) as [dead]:
        clock.advance(29 * DAY)
        await dead.poll()
        await dead.rotate()
        heir, token = await dead.one(NEXT), dead.token()
    async with workers(tmp_path, clock, 1) as [other]:
        assert other.judged(token) == "OK"
        await other.rotate()
        assert (await other.one(NEXT)).kid == heir.kid
        clock.advance(DAY)
        await other.poll()
        await other.rotate()
        await other.poll()
        assert kid_of(other.token()) == heir.kid


async def test_the_database_tells_the_time_not_the_worker(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = await postgres.database()
    await migrate(url)
    for off in (-40 * DAY, 40 * DAY):
        clock = hand_clock()
        clock.set_wall(clock.wall() + off)
        async with workers(tmp_path, clock, 1, url=url) as [worker]:
            await worker.rotate()
            [key] = await worker.keys.all()
            now = worker.state.now(clock.boot())
            assert abs(now - clock.wall() + off) < HOUR
            assert now - 600 < key.create_time <= now
            assert (key.state, key.activate_time) == (CURRENT, key.create_time)


# Taint


@pytest.mark.parametrize("published", [True, False], ids=["next is there", "none is there"])
async def test_taint_kills_at_once_what_two_workers_sign(
    pair: tuple[Worker, Worker, HandClock], published: bool
) -> None:
    one, two, _ = pair
    before = await one.one(CURRENT)
    if published:
        await one.ring.prepare()
        await all_poll(one, two)
    old = [one.token(), two.token()]
    assert {worker.judged(token) for worker in (one, two) for token in old} == {"OK"}
    done = await one.ring.taint(before.kid, dry=False)
    late = two.token()
    assert kid_of(late) == before.kid, "it does not know yet"
    await two.poll()
    assert two.state.revision == done.revision
    for token in (*old, late):
        assert two.judged(token) != "OK"
    fresh = two.token()
    assert done.current is not None
    assert kid_of(fresh) == done.current.kid
    await one.poll()
    assert [one.judged(t) == "OK" for t in (*old, late, fresh)] == [False, False, False, True]
    assert before.kid not in one.published | two.published


async def test_taint_of_a_retired_key_and_of_the_next_one_kill_theirs_alone(
    pair: tuple[Worker, Worker, HandClock],
) -> None:
    one, two, clock = pair
    first = one.token()
    heir, _ = await one.ring.prepare()
    clock.advance(600)
    await one.ring.activate(heir.kid)
    await all_poll(one, two)
    second = two.token()
    following, _ = await two.ring.prepare()
    await all_poll(one, two)
    assert (kid_of(second), one.published) == (heir.kid, {kid_of(first), heir.kid, following.kid})
    assert {one.judged(first), one.judged(second)} == {"OK"}
    await one.ring.taint(following.kid, dry=False)
    await one.ring.taint(kid_of(first), dry=False)
    await all_poll(one, two)
    assert one.published == two.published == {heir.kid}
    for worker in (one, two):
        assert [worker.judged(token) == "OK" for token in (first, second)] == [False, True]
    with pytest.raises(AuthError) as caught:
        await one.ring.activate(following.kid)
    assert caught.value.metadata == {"state": "TAINTED"}


@pytest.mark.parametrize("how", ["tainted", "retired"])
async def test_a_thief_of_an_old_key_signs_in_vain_for_ever(tmp_path: Path, how: str) -> None:
    """Marks run out; the key is gone from every worker, and from one that starts later."""
    clock = hand_clock()
    async with workers(tmp_path, clock, 1) as [worker]:
        thief, kid = Worker(worker.server), kid_of(worker.token())
        stolen = worker.ring.signer
        if how == "tainted":
            await worker.ring.taint(kid, dry=False)
        else:
            heir, _ = await worker.ring.prepare()
            clock.advance(600)
            await worker.poll()
            await worker.ring.activate(heir.kid)
        for _ in range(3):
            clock.advance(HOUR)
            await worker.poll()
            await worker.rotate()
        await worker.poll()
        thief.ring._signer = stolen
        forged = thief.token()
        assert kid_of(forged) == kid
        async with workers(tmp_path, clock, 1) as [later]:
            for judge in (worker, later):
                assert judge.judged(forged) == "TOKEN_KEY_UNKNOWN"
                assert kid not in judge.published


async def test_tokens_of_a_tainted_key_die_though_the_new_key_cannot_be_opened(
    pair: tuple[Worker, Worker, HandClock],
) -> None:
    """A worker with another seal key put it there: this one serves nothing rather than stolen."""
    one, two, _ = pair
    good = one.token()
    assert two.judged(good) == "OK"
    foreign = generate(Sealer((new_seal_key(),)), CURRENT, 0.0)
    done = await one.keys.taint(kid_of(good), foreign, 0.0)
    for worker in (one, two):
        before = worker.state.revision
        with pytest.raises(ValueError, match="cannot be opened"):
            await worker.poll()
        assert worker.state.revision == before < done.revision
        assert worker.judged(good) == "TOKEN_KEY_TAINTED"
        assert worker.judged(worker.token()) == "TOKEN_KEY_TAINTED"


async def test_two_workers_taint_and_rotate_at_once_and_what_is_not_tainted_verifies(
    pair: tuple[Worker, Worker, HandClock],
) -> None:
    one, two, clock = pair
    tainted: set[str] = set()
    tokens: list[str] = []
    for number in range(30):
        kid = (await one.one(CURRENT)).kid
        steps = [worker.ring.taint(kid, dry=False) for worker in pair[:2]] if number % 3 else []
        if steps:
            tainted.add(kid)
        found = await asyncio.gather(
            *steps, *(w.ring.prepare() for w in pair[:2]), return_exceptions=True
        )
        assert {type(each) for each in found} <= {AuthError, Tainted, tuple}
        clock.advance(600)
        await all_poll(one, two)
        heirs = [kid for kid, state in (await two.states()).items() if state is NEXT]
        taken = await asyncio.gather(
            *(worker.ring.activate(kid) for worker in (one, two) for kid in heirs),
            return_exceptions=True,
        )
        assert [isinstance(each, AuthError) for each in taken].count(True) == len(heirs)
        await all_poll(one, two)
        assert kid_of(one.token()) == kid_of(two.token()) == (await one.one(CURRENT)).kid
        tokens += [one.token(), two.token()]
        for token in tokens[-6:]:
            for worker in (one, two):
                assert (worker.judged(token) == "OK") is (kid_of(token) not in tainted)


# Algorithms


@pytest.mark.parametrize("alg", ["ES256", "RS256", "PS256", "EdDSA"])
async def test_the_setting_counts_from_the_next_key_on(tmp_path: Path, alg: str) -> None:
    clock = hand_clock()
    async with workers(tmp_path, clock, 1) as [worker]:
        old = worker.token()
    async with workers(tmp_path, clock, 1, keys=Keys(algorithm=alg)) as [worker]:
        assert kid_of(worker.token()) == kid_of(old), "the one that is there stays"
        clock.advance(29 * DAY)
        for _ in range(2):
            await worker.poll()
            await worker.rotate()
            clock.advance(DAY)
        await worker.poll()
        key = await worker.one(CURRENT)
        token = worker.token()
        assert (key.alg, kid_of(token), worker.judged(token)) == (alg, key.kid, "OK")
        tainted = await worker.ring.taint(key.kid, dry=False)
        assert tainted.current is not None
        assert tainted.current.alg == alg


async def test_a_key_signs_nothing_but_its_own_algorithm(tmp_path: Path) -> None:
    """RFC 8725 section 3.1: one algorithm a key."""
    clock = hand_clock()
    async with workers(tmp_path, clock, 1, keys=Keys(algorithm="RS256")) as [worker]:
        key = await worker.one(CURRENT)
        sealer = worker.server.app._prepared.sealer
        worker.ring._signer = Signer(replace(key, alg="PS256"), sealer)
        assert worker.judged(worker.token()) != "OK"
