"""Passwords: argon2id (RFC 9106) in threads of its own, and never more of them than wait well."""

import asyncio
import base64
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from unicodedata import category, normalize

import structlog
from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from authsvc.errors import AuthError, Reason
from authsvc.oauth.usernames import username_key

T = TypeVar("T")

RETRY_S = 1.0
_NICE = 10
_HASH_BYTES, _SALT_BYTES = 32, 16
_REFUSED = frozenset({"Cc", "Cn", "Co", "Cs"})

log = structlog.get_logger()


class Passwords:
    """Hashes and verifies passwords; its threads give way to the event loop."""

    def __init__(
        self,
        *,
        memory_kib: int = 65536,
        passes: int = 3,
        threads: int = 0,
        queue: int = 32,
        min_chars: int = 12,
        workers: int = 1,
    ) -> None:
        """`threads` 0: half of a worker's share of the processors, of which `workers` 0 has one
        each. `queue` bounds those that wait for a thread.
        """
        processors = os.cpu_count() or 1
        threads = threads or max(1, processors // (workers or processors) // 2)
        self._hasher = PasswordHasher(passes, memory_kib, 1, _HASH_BYTES, _SALT_BYTES, type=Type.ID)
        self._dummy = _dummy(self._hasher)
        self._min_chars = min_chars
        self._pool = ThreadPoolExecutor(threads, "password", initializer=_give_way)
        self._room = threading.BoundedSemaphore(threads + queue)

    def require_good(self, password: str, username: str) -> None:
        """Raises AuthError PASSWORD_NOT_ACCEPTED where this user may not have this password."""
        plain = _plain(password)
        if len(plain) < self._min_chars:
            raise _not_accepted(f"it has fewer than {self._min_chars} characters")
        if any(category(char) in _REFUSED for char in plain):
            raise _not_accepted("it holds a control character, or one that means nothing")
        if username_key(plain) == username_key(username):
            raise _not_accepted("it is the username")

    async def hash(self, password: str) -> str:
        """In argon2's own format. AuthError RATE_LIMITED where too many wait."""
        raw = _plain(password).encode()
        return await self._run(lambda: self._hasher.hash(raw))

    async def verify(self, stored: str, password: str) -> bool:
        """Whether it is the stored one; for none the same work, and never.

        AuthError RATE_LIMITED where too many wait; then nothing was done.
        """
        raw = _plain(password).encode()
        matches = await self._run(lambda: self._matches(stored or self._dummy, raw))
        return matches and bool(stored)

    def _matches(self, stored: str, raw: bytes) -> bool:
        try:
            return self._hasher.verify(stored, raw)
        except VerifyMismatchError:
            return False
        except (InvalidHashError, VerificationError) as error:
            if stored == self._dummy:  # it is not the hash that is wrong
                raise
            log.error("password.hash_unreadable", cause=repr(error))
            return self._matches(self._dummy, raw)

    def needs_rehash(self, stored: str) -> bool:
        """Whether it was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(stored)

    async def close(self) -> None:
        """Waits for the hashes under way; those that wait are dropped."""
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        """In a thread. What its caller no longer waits for is not begun, but keeps its place until
        a thread comes to it: so the queue is never longer than it may be.
        """
        if not self._room.acquire(blocking=False):
            raise AuthError(
                Reason.RATE_LIMITED,
                "too many passwords wait",
                retry_after_s=RETRY_S,
                cause="the queue of passwords is full",
            )
        abandoned = False

        def job() -> T:
            try:
                if abandoned:
                    raise RuntimeError("nobody waits for it")
                return work()
            finally:
                self._room.release()

        try:
            done = self._pool.submit(job)
        except RuntimeError as error:  # closed
            self._room.release()
            raise AuthError(Reason.DRAINING) from error
        try:
            return await asyncio.shield(asyncio.wrap_future(done))
        except asyncio.CancelledError:
            abandoned = True
            raise


def _plain(password: str) -> str:
    """As it is hashed (RFC 8265, OpaqueString): one form of each character, one kind of space."""
    spaced = "".join(" " if category(char) == "Zs" else char for char in password)
    return normalize("NFC", spaced)


def _dummy(hasher: PasswordHasher) -> str:
    """A hash of nothing known: to verify against it takes as long as against another."""
    salt, digest = (
        base64.b64encode(os.urandom(size)).rstrip(b"=").decode()
        for size in (hasher.salt_len, hasher.hash_len)
    )
    parameters = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    return f"$argon2id$v=19${parameters}${salt}${digest}"


def _not_accepted(why: str) -> AuthError:
    return AuthError(Reason.PASSWORD_NOT_ACCEPTED, why)


def _give_way() -> None:
    """Lowers the priority of this thread, where a thread has one of its own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, nice + _NICE)
