"""Passwords: who sets them, what that ends, codes that reset them, and guesses that get nowhere."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import argon2
import pytest
from google.protobuf.duration_pb2 import Duration

from authsvc import config
from authsvc.errors import AuthError
from authsvc.keys.passwords import Passwords
from authsvc.keys.secrets import (
    ACCESS_TOKEN_PREFIX,
    RESET_CODE_PREFIX,
    digest,
    new_id,
    new_secret,
)
from authsvc.model import NOBODY, Peer
from authsvc.passwords import CheckPassword
from authsvc.store.port import StoredToken
from authsvc_client.v1 import revocations_pb2, users_pb2
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.harness import (
    ADMIN,
    ISSUER,
    Failure,
    Running,
    by_hand,
    failure,
    hand_clock,
    identity,
    outcome,
    reason,
    running,
)
from tests.rpc.test_users import create, delete, disable, enable, get

GOOD, NEW = "correct horse battery", "staple correct horse"
CHEAP = {"memory_kib": 64, "passes": 1}
SOMEBODY = identity("somebody")
PEER = replace(NOBODY, thumbprint="peer")


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Running]:
    """A server whose time stands still."""
    async with running(tmp_path, clock=hand_clock()) as server:
        yield server


class Person:
    """A user, and tokens of its own for authsvc, as a client in a session has got them."""

    def __init__(self, server: Running, user: users_pb2.User) -> None:
        self.server = server
        self.user_id = user.user_id
        self.client_id = ""

    async def token(self, session: str = "", scope: str = "validate") -> str:
        """One that is found, not read: nobody has to be asked for it."""
        if not self.client_id:
            member = await self.server.member(f"client-of-{self.user_id}")
            self.client_id = member.client_id
        value, now = new_secret(ACCESS_TOKEN_PREFIX), int(self.server.clock.wall())
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "sub": self.user_id,
            "aud": [ISSUER],
            "exp": now + 300,
            "iat": now,
            "jti": new_id(),
            "client_id": self.client_id,
            "scope": scope,
            "rev": self.server.app.state.revision,
        }
        if session:
            claims["sid"] = session
        stored = StoredToken(digest(value), "", claims, now + 300.0)
        await self.server.store.tokens.add(stored)
        return value

    async def set_password(
        self,
        current: str = GOOD,
        new: str = NEW,
        *,
        token: str = "",
        user_id: str = "",
        keep: bool = False,
        who: Any = SOMEBODY,
    ) -> int:
        """By the user itself."""
        request = users_pb2.SetPasswordRequest(
            user_id=user_id, current_password=current, new_password=new, keep_session=keep
        )
        given = (("authorization", f"Bearer {token or await self.token()}"),)
        return (await self.server.users(who).SetPassword(request, metadata=given)).revision

    async def alive(self, token: str) -> bool:
        """Whether a bearer is still taken: another's password is refused for another reason."""
        told = await reason(self.set_password(token=token, user_id="0" * 32))
        assert told in ("INSUFFICIENT_SCOPE", "CALLER_TOKEN_INVALID")
        return told == "INSUFFICIENT_SCOPE"


async def person(server: Running, username: str, password: str = GOOD) -> Person:
    return Person(server, await create(server, username, password=password))


async def by_admin(server: Running, user_id: str, new: str = NEW, **more: Any) -> int:
    request = users_pb2.SetPasswordRequest(user_id=user_id, new_password=new, **more)
    return (await server.users().SetPassword(request)).revision


async def code_for(server: Running, user_id: str, **more: Any) -> str:
    request = users_pb2.CreatePasswordResetCodeRequest(user_id=user_id, **more)
    return (await server.users().CreatePasswordResetCode(request)).code


async def reset(server: Running, code: str, new: str = NEW, who: Any = SOMEBODY) -> int:
    request = users_pb2.ResetPasswordRequest(code=code, new_password=new)
    return (await server.users(who).ResetPassword(request)).revision


def checker(server: Running) -> CheckPassword:
    """What a login asks, on the server's own store."""
    store = server.store
    return CheckPassword(store.users, store.failures, server.app._passwords)


async def told(call: Awaitable[Any]) -> tuple[str, Any]:
    """OK or the reason, and how long to wait."""
    try:
        await call
    except AuthError as error:
        return error.reason.name, error.retry_after_s or 0.0
    return "OK", 0.0


async def checked(server: Running, username: str, password: str, peer: Peer = PEER) -> str:
    """What a login with it comes to."""
    return (await told(checker(server)(username, password, peer, "")))[0]


@contextmanager
def hashes() -> Iterator[list[str]]:
    """What argon2 was asked to do."""
    calls: list[str] = []
    verify, hash_ = argon2.PasswordHasher.verify, argon2.PasswordHasher.hash

    def count_verify(self: argon2.PasswordHasher, stored: Any, password: Any) -> bool:
        calls.append("verify")
        return verify(self, stored, password)

    def count_hash(self: argon2.PasswordHasher, password: Any, **more: Any) -> str:
        calls.append("hash")
        return hash_(self, password, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argon2.PasswordHasher, "verify", count_verify)
        patched.setattr(argon2.PasswordHasher, "hash", count_hash)
        yield calls


async def rows(directory: Path, statement: str) -> list[Any]:
    return await by_hand(directory / "authsvc.db", statement)


# --- SetPassword: who may ---


async def test_user_sets_its_own_with_the_current_one(server: Running) -> None:
    alice = await person(server, "alice")
    for user_id in ("", alice.user_id):
        current, new = (GOOD, NEW) if not user_id else (NEW, GOOD)
        at = await alice.set_password(current, new, user_id=user_id)
        assert at <= server.app.state.revision
        assert await checked(server, "alice", new) == "OK"
        assert await checked(server, "alice", current) == "INVALID_GRANT"
    assert await reason(alice.set_password("wrong password", NEW)) == "INVALID_GRANT"
    assert await reason(alice.set_password("", NEW)) == "INVALID_GRANT"
    assert await checked(server, "alice", GOOD) == "OK"


async def test_administrator_sets_anybodys(server: Running) -> None:
    bob = await person(server, "bob", "")
    assert not (await get(server, bob.user_id)).HasField("password_set_time")
    await by_admin(server, bob.user_id)
    assert await checked(server, "bob", NEW) == "OK"
    after = await get(server, bob.user_id)
    assert after.HasField("password_set_time")
    assert after.etag == "2"
    await by_admin(server, bob.user_id, GOOD, current_password="not read", keep_session=True)
    assert await checked(server, "bob", GOOD) == "OK"
    assert await reason(by_admin(server, "0" * 32)) == "USER_NOT_FOUND"
    assert await reason(by_admin(server, "")) == "TOKEN_MISSING"
    await disable(server, bob.user_id)
    refused = await failure(by_admin(server, bob.user_id))
    assert (refused.reason, refused.metadata) == ("USER_STATE_CONFLICT", {"state": "DISABLED"})


async def test_nobody_else_sets_it(server: Running) -> None:
    carol, dave = await person(server, "carol"), await person(server, "dave")
    refused = await failure(dave.set_password(GOOD, NEW, user_id=carol.user_id))
    assert (refused.reason, refused.metadata) == ("INSUFFICIENT_SCOPE", {"scope": "admin"})
    request = users_pb2.SetPasswordRequest(
        user_id=carol.user_id, current_password=GOOD, new_password=NEW
    )
    plain = await server.member("plain", "validate")
    for who in (SOMEBODY, plain.who):
        assert await reason(server.users(who).SetPassword(request)) == "TOKEN_MISSING"
    given = (("authorization", "Bearer nonsense"),)
    call = server.users(SOMEBODY).SetPassword(request, metadata=given)
    assert await reason(call) == "CALLER_TOKEN_INVALID"
    assert await checked(server, "carol", GOOD) == "OK"


@pytest.mark.parametrize("new", ["short", "control\x01character", "erIN@example.test", "nul\0" * 9])
async def test_new_one_has_to_be_good(server: Running, new: str) -> None:
    name = f"erin@example.test{'' if '@' in new else new[:3]}"
    erin = await person(server, name)
    code = await code_for(server, erin.user_id)
    for call in (
        by_admin(server, erin.user_id, new),
        erin.set_password(GOOD, new),
        reset(server, code, new),
    ):
        refused = await failure(call)
        assert refused.reason == "PASSWORD_NOT_ACCEPTED"
        assert new not in refused.text
    assert await checked(server, name, GOOD) == "OK"
    await reset(server, code)
    assert await reason(by_admin(server, erin.user_id, "")) == "FIELD_INVALID"


# --- SetPassword: what it ends ---


async def test_it_ends_every_token(server: Running) -> None:
    frank = await person(server, "frank")
    changes: list[Callable[[], Awaitable[int]]] = [
        lambda: by_admin(server, frank.user_id),
        lambda: by_admin(server, frank.user_id, keep_session=True),
        lambda: frank.set_password(NEW, GOOD),
        lambda: frank.set_password(GOOD, NEW, keep=True),  # by a token of no session
    ]
    for change in changes:
        tokens = [await frank.token(), await frank.token("session")]
        assert [await frank.alive(token) for token in tokens] == [True, True]
        await change()
        assert [await frank.alive(token) for token in tokens] == [False, False]


async def test_administrator_keeps_no_session_but_its_own(server: Running) -> None:
    boss, minion = await person(server, "boss"), await person(server, "minion")
    token = await boss.token("mine", "admin")
    other = await minion.token("other")
    await boss.set_password("not read", token=token, user_id=minion.user_id, keep=True)
    assert not await minion.alive(other)
    await boss.set_password("not read", token=token, user_id=boss.user_id, keep=True)
    await boss.set_password("not read", GOOD, token=token)
    assert await checked(server, "minion", NEW) == "OK"
    assert await checked(server, "boss", GOOD) == "OK"
    refused = boss.set_password("not read", token=token)
    assert await reason(refused) == "CALLER_TOKEN_INVALID"


async def test_it_keeps_the_session_that_asks_for_it(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        grace = await person(server, "grace")
        now = server.clock.wall()
        for session in ("mine", "other"):
            await rows(
                tmp_path,
                "INSERT INTO session (session_id, user_id, rev, cutoff_keys, address, acr, amr,"
                f" create_time, auth_time, expire_time) VALUES ('{session}', '{grace.user_id}',"
                f" {2**40}, '[]', '', '', '[]', {now}, {now}, {now + 1000})",
            )
        mine, also, other = [await grace.token(sid) for sid in ("mine", "mine", "other")]
        await grace.set_password(token=mine, keep=True)
        assert [await grace.alive(token) for token in (mine, also, other)] == [True, True, False]
        assert await checked(server, "grace", NEW) == "OK"
        await grace.set_password(NEW, GOOD, token=mine)
        assert not await grace.alive(mine)


async def test_of_two_changes_at_once_one_counts(tmp_path: Path, url: str) -> None:
    async with running(tmp_path, url=url) as server:
        heidi = await person(server, "heidi")
        tokens = [await heidi.token("mine") for _ in range(3)]
        calls = [
            heidi.set_password(GOOD, f"{NEW} {n}", token=token, keep=True)
            for n, token in enumerate(tokens)
        ]
        found = await asyncio.gather(*map(outcome, calls))
        assert sorted(found) == ["INVALID_GRANT", "INVALID_GRANT", "OK"]
        assert await checked(server, "heidi", f"{NEW} {found.index('OK')}") == "OK"


async def test_disabled_user_has_no_way_in(server: Running) -> None:
    ivan = await person(server, "ivan")
    token, code = await ivan.token("session"), await code_for(server, ivan.user_id)
    await disable(server, ivan.user_id)
    assert not await ivan.alive(token)
    assert await checked(server, "ivan", GOOD) == "INVALID_GRANT"
    assert await reason(reset(server, code)) == "INVALID_GRANT"
    assert await reason(code_for(server, ivan.user_id)) == "USER_STATE_CONFLICT"
    await enable(server, ivan.user_id)
    assert not await ivan.alive(token)
    assert await reason(reset(server, code)) == "INVALID_GRANT"
    assert await checked(server, "ivan", GOOD) == "OK"
    await delete(server, ivan.user_id)
    assert await checked(server, "ivan", GOOD) == "INVALID_GRANT"
    assert await reason(code_for(server, ivan.user_id)) == "USER_NOT_FOUND"


# --- codes ---


async def test_code_sets_a_password_once(server: Running) -> None:
    judy = await person(server, "judy", "")
    token = await judy.token("session")
    dead, code = await code_for(server, judy.user_id), await code_for(server, judy.user_id)
    assert code.startswith(RESET_CODE_PREFIX)
    assert await judy.alive(token)
    assert await reason(reset(server, dead)) == "INVALID_GRANT"
    assert await reset(server, code) <= server.app.state.revision
    assert not await judy.alive(token)
    assert await checked(server, "judy", NEW) == "OK"
    assert await reason(reset(server, code, GOOD)) == "INVALID_GRANT"
    assert await checked(server, "judy", NEW) == "OK"


async def test_of_those_who_use_one_code_at_once_one_wins(tmp_path: Path, url: str) -> None:
    async with running(tmp_path, url=url) as server:
        user = await person(server, "kim")
        code = await code_for(server, user.user_id)
        calls = [reset(server, code, f"{NEW} {n}") for n in range(8)]
        found = await asyncio.gather(*map(outcome, calls))
        assert sorted(found) == ["INVALID_GRANT"] * 7 + ["OK"]
        assert await checked(server, "kim", f"{NEW} {found.index('OK')}") == "OK"


async def test_code_ends_in_time(at: Running) -> None:
    user, now = await person(at, "leo"), at.clock.wall()
    for seconds, lifetime in ((3600, None), (60, Duration(seconds=60))):
        request = users_pb2.CreatePasswordResetCodeRequest(user_id=user.user_id, lifetime=lifetime)
        made = await at.users().CreatePasswordResetCode(request)
        assert made.expire_time.ToMilliseconds() == int((now + seconds) * 1000)
        await at.advance(seconds - 0.5)
        assert await reason(reset(at, made.code, "short")) == "PASSWORD_NOT_ACCEPTED"
        await at.advance(0.5)
        assert await reason(reset(at, made.code)) == "INVALID_GRANT"
        now += seconds
    for seconds in (59, 24 * 3600 + 1):
        call = code_for(at, user.user_id, lifetime={"seconds": seconds})
        assert await reason(call) == "FIELD_INVALID"
    await code_for(at, user.user_id, lifetime={"seconds": 24 * 3600})


@pytest.mark.parametrize("everything", [True, False])
async def test_code_does_not_outlive_a_cutoff(tmp_path: Path, everything: bool) -> None:
    async with running(tmp_path) as server:
        user = await person(server, "mia")
        code = await code_for(server, user.user_id)
        stub: Any = RevocationServiceStub(server.channel(ADMIN))
        if everything:
            await stub.RevokeEverything(revocations_pb2.RevokeEverythingRequest())
        else:
            request = revocations_pb2.RevokeSubjectRequest(subject=user.user_id)
            await stub.RevokeSubject(request)
        assert await reason(reset(server, code)) == "INVALID_GRANT"
        await reset(server, await code_for(server, user.user_id))


async def test_bad_codes_are_told_nothing_and_counted(at: Running, tmp_path: Path) -> None:
    user = await person(at, "nina")
    code = await code_for(at, user.user_id)
    bad = [
        new_secret(RESET_CODE_PREFIX),
        code[:-1] + ("0" if code[-1] != "0" else "1"),
        code.swapcase(),
        code + " ",
        "x",
        "\0",
        "\u00fc" * 60,
    ]
    with hashes() as calls:
        found = [await failure(reset(at, each)) for each in bad]
    assert calls == []
    assert len({(each.code, each.reason, each.text, *each.metadata) for each in found}) == 1
    counts = "SELECT count FROM failure"
    assert await rows(tmp_path, counts) == [(len(bad),)]
    assert await reason(reset(at, code, "short")) == "PASSWORD_NOT_ACCEPTED"
    assert await rows(tmp_path, counts) == [(len(bad),)]
    await rows(tmp_path, "UPDATE failure SET count = 99")
    assert await reason(reset(at, bad[0])) == "INVALID_GRANT"
    refused = await failure(reset(at, code))
    assert (refused.reason, refused.retry_after_s) == ("RATE_LIMITED", 1.0)
    await reset(at, code, who=identity("another"))
    assert sorted(await rows(tmp_path, counts)) == [(0,), (100,)]


# --- guesses ---


def seen(found: Failure) -> Any:
    """All of a refusal but the id of the call."""
    metadata = json.dumps(dict(found.metadata))
    return (found.code, found.reason, found.text, metadata, found.fields, found.retry_after_s)


async def test_unknown_and_wrong_cost_and_say_the_same(at: Running, tmp_path: Path) -> None:
    await person(at, "known")
    await person(at, "no-password", "")
    stopped = await person(at, "stopped")
    await disable(at, stopped.user_id)
    check = checker(at)
    stories = {}
    for name, password in (
        ("known", "wrong"),
        ("unknown", GOOD),
        ("no-password", ""),
        ("stopped", GOOD),
        ("", "control\0character"),
    ):
        story: list[Any] = []
        with hashes() as calls:
            for _ in range(12):
                with pytest.raises(AuthError) as refused:
                    await check(name, password, replace(PEER, thumbprint=name), "")
                error = refused.value
                story.append((error.reason, error.text, error.metadata, error.retry_after_s))
                await at.advance(0.5)
            story.append(list(calls))
        stories[name] = story
    known = stories["known"]
    assert all(story == known for story in stories.values())
    assert known[-1] == ["verify"] * len([each for each in known[:-1] if each[3] is None])
    audited = await rows(tmp_path, "SELECT outcome, reason, action FROM audit WHERE outcome = 2")
    assert len(audited) == len(stories) * len(known[-1])


async def test_unknown_and_wrong_are_one_over_the_wire(at: Running) -> None:
    """A subject that is no user, and a user with another password."""
    nobody, known = Person(at, users_pb2.User(user_id="0" * 32)), await person(at, "known")
    stories = []
    for each in (nobody, known):
        who, token = identity(f"guesser-{each.user_id}"), await each.token()
        calls = [each.set_password("wrong", token=token, who=who) for _ in range(8)]
        stories.append([seen(await failure(call)) for call in calls])
    assert stories[0] == stories[1]
    assert [each[1] for each in stories[0]] == ["INVALID_GRANT"] * 5 + ["RATE_LIMITED"] * 3


async def test_waits_grow_and_end(at: Running) -> None:
    await person(at, "olga")
    check = checker(at)

    async def guess(name: str = "olga", password: str = "wrong") -> tuple[str, Any]:
        return await told(check(name, password, PEER, ""))

    with hashes() as calls:
        for _ in range(5):
            assert await guess() == ("INVALID_GRANT", 0.0)
        for wait in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
            for name in ("olga", "OLGA"):
                found = await guess(name, GOOD)  # whatever it is, nobody looks
                assert found == ("RATE_LIMITED", pytest.approx(wait))
            await at.advance(wait)
            assert await guess() == ("INVALID_GRANT", 0.0)
        assert calls == ["verify"] * 13
    await at.advance(60)
    assert await guess(password=GOOD) == ("OK", 0.0)
    for _ in range(5):
        assert await guess() == ("INVALID_GRANT", 0.0)
    assert await guess() == ("RATE_LIMITED", pytest.approx(1.0))
    await at.advance(15 * 60)
    for _ in range(5):
        assert await guess() == ("INVALID_GRANT", 0.0)


async def test_many_guesses_at_once_are_few(tmp_path: Path, url: str) -> None:
    async with running(tmp_path, url=url) as server:
        peggy = await person(server, "peggy")
        token = await peggy.token()
        with hashes() as calls:
            guesses = [peggy.set_password(f"guess {n}", token=token) for n in range(50)]
            found = await asyncio.gather(*map(failure, guesses))
        told = [each.reason for each in found]
        assert set(told) == {"INVALID_GRANT", "RATE_LIMITED"}
        assert len(calls) == told.count("INVALID_GRANT") <= 6  # one more if it took a second
        assert all(each.retry_after_s for each in found if each.reason == "RATE_LIMITED")


async def test_waits_outlive_the_server(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        quinn = await person(server, "quinn")
        token = await quinn.token()
        for _ in range(5):
            assert await reason(quinn.set_password("wrong", token=token)) == "INVALID_GRANT"
        before = await failure(quinn.set_password(token=token))
    async with running(tmp_path, clock=clock) as server:
        quinn.server = server
        with hashes() as calls:
            after = await failure(quinn.set_password(token=token))
        assert seen(after) == seen(before)
        assert (after.reason, after.retry_after_s) == ("RATE_LIMITED", 1.0)
        assert calls == []
        await server.advance(1)
        await quinn.set_password(token=token)


async def test_success_forgets_the_account_and_not_the_peer(at: Running, tmp_path: Path) -> None:
    await person(at, "rita")
    await person(at, "sam")
    counts = "SELECT count FROM failure ORDER BY count"
    for _ in range(4):
        assert await checked(at, "rita", "wrong") == "INVALID_GRANT"
    assert await checked(at, "sam", "wrong") == "INVALID_GRANT"
    assert await rows(tmp_path, counts) == [(1,), (4,), (5,)]
    for _ in range(3):
        assert await checked(at, "rita", GOOD) == "OK"
    assert await rows(tmp_path, counts) == [(1,), (5,)]


async def test_account_is_counted_over_all_peers_and_a_peer_over_all_accounts(
    at: Running, tmp_path: Path
) -> None:
    check = checker(at)
    peers: list[tuple[Peer, str]] = [
        (replace(NOBODY, thumbprint="one"), "10.0.0.1"),
        (replace(NOBODY, thumbprint="two"), "10.0.0.1"),
        (NOBODY, "10.0.0.1"),
        (NOBODY, "10.0.0.2"),
        (NOBODY, "one"),
    ]
    found = [await told(check("tom", "wrong", *each)) for each in peers]
    assert found == [("INVALID_GRANT", 0.0)] * 5
    assert sorted(await rows(tmp_path, "SELECT count FROM failure")) == [(1,)] * 5 + [(5,)]
    assert (await told(check("tom", "wrong", NOBODY, "10.0.0.3")))[0] == "RATE_LIMITED"
    await rows(tmp_path, "DELETE FROM failure")
    for number in range(100):
        assert (await told(check(f"n{number}", "wrong", NOBODY, "10.0.0.1")))[0] == "INVALID_GRANT"
    assert await told(check("new", "wrong", NOBODY, "10.0.0.1")) == (
        "RATE_LIMITED",
        pytest.approx(1.0),
    )
    assert (await told(check("new", "wrong", NOBODY, "10.0.0.2")))[0] == "INVALID_GRANT"
    await at.advance(1)
    assert (await told(check("new", "wrong", NOBODY, "10.0.0.1")))[0] == "INVALID_GRANT"
    assert await told(check("newer", "wrong", NOBODY, "10.0.0.1")) == (
        "RATE_LIMITED",
        pytest.approx(2.0),
    )


async def test_full_queue_hashes_and_counts_nothing(tmp_path: Path) -> None:
    tight = config.Passwords(threads=1, queue=0, **CHEAP)
    async with running(tmp_path, passwords=tight) as server:
        user = await person(server, "uma")
        token, code = await user.token(), await code_for(server, user.user_id)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: user.set_password(token=token),
            lambda: by_admin(server, user.user_id),
            lambda: reset(server, code),
            lambda: create(server, "victor", password=GOOD),
        ]
        room = server.app._passwords._room
        assert room.acquire(blocking=False)  # as one whose hash takes long
        with hashes() as done:
            for call in calls * 30:
                refused = await failure(call())
                assert refused.reason == "RATE_LIMITED"
                assert refused.retry_after_s == 1.0
        assert done == []
        assert set(await rows(tmp_path, "SELECT count FROM failure")) == {(0,)}
        room.release()
        await reset(server, code)
        await create(server, "victor", password=GOOD)


async def test_old_hash_is_replaced_when_it_was_right(tmp_path: Path) -> None:
    column = 'SELECT password_hash FROM "user"'
    async with running(tmp_path, passwords=config.Passwords(**CHEAP)) as server:
        await person(server, "wanda")
    [(old,)] = await rows(tmp_path, column)
    stronger = config.Passwords(memory_kib=128, passes=2)
    async with running(tmp_path, passwords=stronger) as server:
        assert await checked(server, "wanda", "wrong") == "INVALID_GRANT"
        assert await rows(tmp_path, column) == [(old,)]
        assert await checked(server, "wanda", GOOD) == "OK"
        [(new,)] = await rows(tmp_path, column)
        assert new.startswith("$argon2id$v=19$m=128,t=2,p=1$")
        assert await checked(server, "wanda", GOOD) == "OK"
        assert await rows(tmp_path, column) == [(new,)]


async def test_hashing_of_another_password_that_was_set_meanwhile_is_no_rehash(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as server:
        xena = await person(server, "xena")
        stronger = Passwords(memory_kib=128)
        try:

            class Late(Passwords):
                async def hash(self, password: str) -> str:
                    await by_admin(server, xena.user_id)
                    return await super().hash(password)

            late = Late(memory_kib=128)
            store = server.store
            await CheckPassword(store.users, store.failures, late)("xena", GOOD, PEER, "")
            await late.close()
        finally:
            await stronger.close()
        assert await checked(server, "xena", NEW) == "OK"
        assert await checked(server, "xena", GOOD) == "INVALID_GRANT"


# --- what is left behind ---


async def test_no_password_and_no_code_is_left_anywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as server:
        yuri = await person(server, "yuri")
        code = await code_for(server, yuri.user_id)
        wrong, weak = "wrong password here", "weak\x01password here"
        for call in (
            yuri.set_password(wrong),
            yuri.set_password(GOOD, weak),
            create(server, "yuri", password=NEW),
            create(server, "zelda", password=weak),
            reset(server, code, weak),
            reset(server, code + "x"),
        ):
            await failure(call)
        await reset(server, code)
        kept = _written(tmp_path)
    said = capfd.readouterr()
    kept += (said.out + said.err).encode()
    assert b"yuri" in kept
    for secret in (GOOD, NEW, wrong, weak.partition("\x01")[2], code):
        assert secret.encode() not in kept
    assert code.removeprefix(RESET_CODE_PREFIX)[:-6].encode() not in kept


def _written(directory: Path) -> bytes:
    """The database, and what is on its way into it."""
    return b"".join(file.read_bytes() for file in directory.glob("authsvc.db*"))
