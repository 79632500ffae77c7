"""ValidateToken: judge by the state at hand, or by one as fresh as is asked for."""

from typing import Protocol

from authsvc.errors import AuthError, Reason
from authsvc.identify import Identify
from authsvc_client.core.judge import Question, Verdict
from authsvc_client.core.state import State

WAITERS_MAX = 64
"""Calls that may wait for a key at once; the next one is judged as things stand."""


class Poll(Protocol):
    """The follower."""

    async def next_poll(self) -> None:
        """Waits for the poll that is due."""

    async def fresh(self) -> None:
        """Waits for a poll that begins now; AuthError STORE_UNAVAILABLE where it fails."""


class ValidateToken:
    """Judges access tokens of every form."""

    def __init__(self, identify: Identify, follow: Poll, state: State) -> None:
        self._identify = identify
        self._follow = follow
        self._state = state
        self._waiters = 0

    async def __call__(
        self, token: str, question: Question, *, at_least: int = 0, strong: bool = False
    ) -> Verdict:
        """By a state at or above the revision `at_least`, and with `strong` one of after the call.

        Raises StateStale where no answer is safe, AuthError REVISION_UNKNOWN, and STORE_UNAVAILABLE
        where that needs the database; a JWT and the state at hand do not.
        """
        if strong or at_least > self._state.revision:
            await self._follow.fresh()
            if at_least > self._state.revision:
                metadata = {"revision": str(self._state.revision)}
                raise AuthError(Reason.REVISION_UNKNOWN, metadata=metadata)
        verdict = await self._identify(token, question)
        if verdict.reason is Reason.TOKEN_KEY_UNKNOWN and self._waiters < WAITERS_MAX:
            # Another worker may have begun to sign with a key that this one reads within a second.
            self._waiters += 1
            try:
                await self._follow.next_poll()
            finally:
                self._waiters -= 1
            verdict = await self._identify(token, question)
        return verdict
