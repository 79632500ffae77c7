"""ValidateToken: judge by the state at hand; only an unknown key waits for the poll that is due."""

from typing import Protocol

from authsvc.clock import Clock
from authsvc_client.core.judge import Judge, Question, Verdict
from authsvc_client.core.reason import Reason

WAITERS_MAX = 64
"""Calls that may wait for a key at once; the next one is judged as things stand."""


class Poll(Protocol):
    """The follower."""

    async def next_poll(self) -> None:
        """Waits for the poll that is due."""


class ValidateToken:
    """Judges access tokens."""

    def __init__(self, judge: Judge, follow: Poll, clock: Clock) -> None:
        self._judge = judge
        self._follow = follow
        self._clock = clock
        self._waiters = 0

    async def __call__(self, token: str, question: Question) -> Verdict:
        """Raises StateStale where no answer is safe."""
        verdict = self._judge(token, question, self._clock.boot())
        if verdict.reason is Reason.TOKEN_KEY_UNKNOWN and self._waiters < WAITERS_MAX:
            # Another worker may have begun to sign with a key that this one reads within a second.
            self._waiters += 1
            try:
                await self._follow.next_poll()
            finally:
                self._waiters -= 1
            verdict = self._judge(token, question, self._clock.boot())
        return verdict
