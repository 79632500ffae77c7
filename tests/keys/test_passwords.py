"""Passwords: which are taken, what is kept of them, and a pool that refuses rather than grows."""

import asyncio
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import argon2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from authsvc.errors import AuthError, Reason
from authsvc.keys.passwords import Passwords
from authsvc.oauth.usernames import is_username, username_key

GOOD = "correct horse battery"
CHEAP: dict[str, int] = {"memory_kib": 64, "passes": 1, "threads": 1}


@asynccontextmanager
async def made(**more: int) -> AsyncIterator[Passwords]:
    passwords = Passwords(**{**CHEAP, **more})
    try:
        yield passwords
    finally:
        await passwords.close()


async def reason(call: Awaitable[Any]) -> str:
    try:
        await call
    except AuthError as error:
        return error.reason.name
    return "OK"


# --- what is kept ---


async def test_password_verifies_against_its_own_hash_alone() -> None:
    async with made() as passwords:
        one, two = await passwords.hash(GOOD), await passwords.hash(GOOD)
        assert one != two
        assert one.startswith("$argon2id$v=19$m=64,t=1,p=1$")
        assert GOOD not in one
        assert await passwords.verify(one, GOOD)
        assert await passwords.verify(two, GOOD)
        for wrong in ("", GOOD + " ", GOOD[:-1], GOOD.upper(), f" {GOOD}", "\0", GOOD + "\0"):
            assert not await passwords.verify(one, wrong)


async def test_none_verifies_against_no_password() -> None:
    async with made() as passwords:
        for password in ("", GOOD, "\0" * 32):
            assert not await passwords.verify("", password)
        for damaged in ("x", "$argon2id$", "$argon2id$v=19$m=64,t=1,p=1$!$!"):
            assert not await passwords.verify(damaged, GOOD)


async def test_one_password_however_it_is_typed() -> None:
    async with made() as passwords:
        stored = await passwords.hash("Zo\u00eb geht heim jetzt")
        for same in ("Zoe\u0308 geht heim jetzt", "Zo\u00eb\u00a0geht\u2003heim jetzt"):
            assert await passwords.verify(stored, same)
        assert not await passwords.verify(stored, "Zoe geht heim jetzt")
        # A compatible form is another character (RFC 8265 section 4.2.2).
        assert not await passwords.verify(await passwords.hash("\ufb01" * 12), "fi" * 12)


async def test_hash_of_other_parameters_still_verifies_and_is_to_be_replaced() -> None:
    async with made() as old, made(passes=2) as new, made(memory_kib=128) as bigger:
        stored = await old.hash(GOOD)
        assert not old.needs_rehash(stored)
        for other in (new, bigger):
            assert other.needs_rehash(stored)
            assert await other.verify(stored, GOOD)
            assert not await other.verify(stored, GOOD + "x")
            assert not other.needs_rehash(await other.hash(GOOD))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stored hashes that argon2 was called with."""
    calls: list[str] = []
    verify = argon2.PasswordHasher.verify

    def count(self: argon2.PasswordHasher, stored: str, password: Any) -> bool:
        calls.append(re.sub(r"[^$]*\$[^$]*$", "", str(stored)))
        return verify(self, stored, password)

    with monkeypatch.context() as patched:
        patched.setattr(argon2.PasswordHasher, "verify", count)
        yield calls


async def test_same_work_for_whoever_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async with made() as passwords:
        stored = await passwords.hash(GOOD)
        with counted(monkeypatch) as calls:
            for each in (stored, ""):
                await passwords.verify(each, "wrong")
        assert calls == ["$argon2id$v=19$m=64,t=1,p=1$"] * 2


# --- which are taken ---


@pytest.mark.parametrize(
    ("password", "told"),
    [
        (GOOD, "OK"),
        ("x" * 12, "OK"),
        ("x" * 11, "fewer than 12"),
        ("", "fewer than 12"),
        ("\U0001f511" * 12, "OK"),
        ("e\u0308" * 11, "fewer than 12"),
        ("with\ttab-in-it-all", "control character"),
        ("with\0nul-in-it-all", "control character"),
        ("with\x85next-line-all", "control character"),
        ("private-\ue000-character", "control character"),
        ("unassigned-\U000e0fff-one", "control character"),
        ("Alice@Example.test", "is the username"),
        ("\uff21lice@example.test", "is the username"),
        ("Alice@Example.tests", "OK"),
    ],
)
async def test_policy(password: str, told: str) -> None:
    async with made() as passwords:
        if told == "OK":
            passwords.require_good(password, "alice@example.test")
            return
        with pytest.raises(AuthError) as refused:
            passwords.require_good(password, "alice@example.test")
        assert refused.value.reason is Reason.PASSWORD_NOT_ACCEPTED
        assert told in refused.value.text
        assert not password or password not in repr(refused.value) + refused.value.text


async def test_least_length_is_a_setting() -> None:
    async with made(min_chars=20) as passwords:
        passwords.require_good("x" * 20, "")
        with pytest.raises(AuthError):
            passwords.require_good("x" * 19, "")


# --- the pool ---


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hashes that wait until they are let go."""
    gate = threading.Event()
    hash_ = argon2.PasswordHasher.hash

    def wait(self: argon2.PasswordHasher, password: Any, **more: Any) -> str:
        assert gate.wait(30)
        return hash_(self, password, **more)

    with monkeypatch.context() as patched:
        patched.setattr(argon2.PasswordHasher, "hash", wait)
        try:
            yield gate
        finally:
            gate.set()


async def test_more_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with made(threads=2, queue=3) as passwords:
        with stopped(monkeypatch) as gate:
            under_way = [asyncio.create_task(passwords.hash(GOOD)) for _ in range(5)]
            await asyncio.sleep(0)
            for call in (passwords.hash, lambda given: passwords.verify("", given)):
                with pytest.raises(AuthError) as refused:
                    await call(GOOD)
                assert refused.value.reason is Reason.RATE_LIMITED
                assert refused.value.retry_after_s
            gate.set()
            assert len(await asyncio.gather(*under_way)) == 5
        assert await passwords.hash(GOOD)


async def test_whoever_goes_away_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    hash_ = argon2.PasswordHasher.hash

    def count(self: argon2.PasswordHasher, password: Any, **more: Any) -> str:
        hashed.append(password)
        return hash_(self, password, **more)

    monkeypatch.setattr(argon2.PasswordHasher, "hash", count)
    async with made(queue=2) as passwords:
        with stopped(monkeypatch) as gate:
            tasks = [asyncio.create_task(passwords.hash(f"{GOOD} {n}")) for n in range(3)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            assert await asyncio.gather(*tasks, return_exceptions=True)
            assert all(task.cancelled() for task in tasks)
            # Their places are free when a thread came to them: the queue never grows meanwhile.
            assert await reason(passwords.hash(GOOD)) == "RATE_LIMITED"
            gate.set()
        async with asyncio.timeout(30):
            while await reason(passwords.hash(GOOD)) == "RATE_LIMITED":  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert await reason(asyncio.gather(*(passwords.hash(GOOD) for _ in range(3)))) == "OK"
    assert f"{GOOD} 1".encode() not in hashed
    assert f"{GOOD} 2".encode() not in hashed


async def test_error_of_a_hash_leaves_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with made(queue=0) as passwords:

        def fail(*_: Any) -> bool:
            raise argon2.exceptions.VerificationError("Memory allocation error")

        with monkeypatch.context() as patched:
            patched.setattr(argon2.PasswordHasher, "verify", fail)
            for _ in range(3):
                with pytest.raises(argon2.exceptions.VerificationError):
                    await passwords.verify("", GOOD)
        assert not await passwords.verify("", GOOD)


async def test_closed_pool_takes_nothing_and_leaves_no_thread() -> None:
    async with made() as passwords:
        await passwords.hash(GOOD)
        assert _threads()
    assert not _threads()
    assert await reason(passwords.hash(GOOD)) == "DRAINING"


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("password")]


async def test_threads_give_way_to_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []
    hash_ = argon2.PasswordHasher.hash

    def look(self: argon2.PasswordHasher, password: Any, **more: Any) -> str:
        found.append(nice())
        return hash_(self, password, **more)

    monkeypatch.setattr(argon2.PasswordHasher, "hash", look)
    before = nice()
    async with made(threads=2) as passwords:
        await asyncio.gather(*(passwords.hash(GOOD) for _ in range(4)))
    lower = min(before + 10, 19)  # on Linux alone a thread has a priority of its own
    assert set(found) == {lower if sys.platform == "linux" else before}
    assert nice() == before


# --- usernames ---


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Alice", "aLICE"),
        ("Stra\u00dfe", "STRASSE"),
        ("\uff21lice", "alice"),
        ("Zoe\u0308", "zo\u00eb"),
        (
            "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
            "\u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c3",
        ),
        ("\u212bngstr\u00f6m", "a\u030angstro\u0308m"),
    ],
)
def test_names_that_are_one(one: str, other: str) -> None:
    assert username_key(one) == username_key(other)


@given(st.text(max_size=20))
def test_key_is_the_same_for_what_looks_the_same(text: str) -> None:
    key = username_key(text)
    assert username_key(key) == key
    assert username_key(text.casefold()) == key


@pytest.mark.parametrize("name", ["a", "Alice Smith", "zo\u00eb@x.test", "\u738b", "x" * 254])
def test_name_that_somebody_may_have(name: str) -> None:
    assert is_username(name)


UNSEEN = ["\0", "\n", "\x7f", "\u200b", "\u202e", "\ufeff", "\ue000", "\u2028"]


@pytest.mark.parametrize(
    "name", ["", " a", "a ", "\u00a0a", "x" * 255, *(f"a{char}b" for char in UNSEEN)]
)
def test_name_that_nobody_may_have(name: str) -> None:
    assert not is_username(name)
