"""ValidateToken: judge by the state at hand, or by one as fresh as is asked for."""

from typing import NamedTuple, Protocol

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.identify import Identify
from authsvc.model import ANY_AUDIENCE
from authsvc.permissions import Held, Permissions
from authsvc_client.core.claims import Claims
from authsvc_client.core.judge import Question, Verdict
from authsvc_client.core.standing import Standing
from authsvc_client.core.state import State

TRIES = 8
"""How often permissions are looked for that change while they are read."""
WAITERS_MAX = 64
"""Calls that may wait for a key at once; the next one is judged as things stand."""


class Poll(Protocol):
    """The follower."""

    async def next_poll(self) -> None:
        """Waits for the poll that is due."""

    async def fresh(self) -> None:
        """Waits for a poll that begins now; AuthError STORE_UNAVAILABLE where it fails."""


class Answer(NamedTuple):
    """A verdict, and the live permissions by which it was made, where they were asked for."""

    verdict: Verdict
    permissions: Held | None = None


class ValidateToken:
    """Judges access tokens of every form."""

    def __init__(
        self, identify: Identify, permissions: Permissions, follow: Poll, state: State
    ) -> None:
        self._identify = identify
        self._permissions = permissions
        self._follow = follow
        self._state = state
        self._waiters = 0

    def at_hand(self, token: str, question: Question, *, full: bool = False) -> Answer | None:
        """As `__call__`, by what this process knows; None where something has to be waited for."""
        verdict = self._identify.at_hand(token, question)
        if verdict is None or verdict.reason is Reason.TOKEN_KEY_UNKNOWN:
            return None
        if verdict.active and (full or question.permissions):
            return self._permitted(question, verdict)
        return Answer(verdict)

    def standing(self, answer: Answer, question: Question) -> Standing | None:
        """An answer that was just given, for the next time; None where it does not stand."""
        try:
            return self._identify.standing(answer.verdict, question)
        except ValueError:
            return None

    async def catch_up(self, at_least: int) -> None:
        """Applies all that was written before this call. It comes before whatever is judged by
        that state, the asker above all.

        Raises AuthError STORE_UNAVAILABLE, and REVISION_UNKNOWN where that is below `at_least`.
        """
        await self._follow.fresh()
        if at_least > self._state.revision:
            metadata = {"revision": str(self._state.revision)}
            raise AuthError(Reason.REVISION_UNKNOWN, metadata=metadata)

    async def __call__(self, token: str, question: Question, *, full: bool = False) -> Answer:
        """By the state at hand; `full` with all the permissions of its subject on the audience.

        Raises StateStale where no answer is safe, AuthError FIELD_INVALID where permissions are
        asked for without saying of which audience, and STORE_UNAVAILABLE where that needs the
        database; a JWT and the state at hand do not.
        """
        verdict = await self._identify(token, question)
        if verdict.reason is Reason.TOKEN_KEY_UNKNOWN and self._waiters < WAITERS_MAX:
            # Another worker may have begun to sign with a key that this one reads within a second.
            self._waiters += 1
            try:
                await self._follow.next_poll()
            finally:
                self._waiters -= 1
            verdict = await self._identify(token, question)
        if verdict.active and (full or question.permissions):
            return await self._with_permissions(token, question, verdict)
        return Answer(verdict)

    async def _with_permissions(self, token: str, question: Question, verdict: Verdict) -> Answer:
        """Verdict and permissions of one moment: nothing is awaited between the two."""
        for _ in range(TRIES):
            claims = verdict.claims
            if not verdict.active or claims is None:
                return Answer(verdict)
            answer = self._permitted(question, verdict)
            if answer is not None:
                return answer
            await self._permissions(claims.subject, _audience(question, claims))
            verdict = await self._identify(token, question)
        raise AuthError(
            Reason.STORE_UNAVAILABLE, retry_after_s=1.0, cause="permissions change all the time"
        )

    def _permitted(self, question: Question, verdict: Verdict) -> Answer | None:
        """An active token with its subject's permissions; None where they are not at hand."""
        assert verdict.claims is not None
        audience = _audience(question, verdict.claims)
        held = self._permissions.at_hand(verdict.claims.subject, audience)
        if held is None:
            return None
        missing = question.permissions - held.names
        if missing:
            verdict.reason = Reason.INSUFFICIENT_PERMISSIONS
            verdict.missing_permissions = missing
        return Answer(verdict, held)


def _audience(question: Question, claims: Claims) -> str:
    """Whose permissions are meant: the expected one, or the only one that the asker may see."""
    if question.audience:
        return question.audience
    every = ANY_AUDIENCE in question.audiences
    found = [each for each in claims.audiences if every or each in question.audiences]
    if len(found) != 1:
        text = "is required: the token has several"
        violation = FieldViolation("audience", text)
        raise AuthError(Reason.FIELD_INVALID, f"audience {text}", violations=(violation,))
    return found[0]
