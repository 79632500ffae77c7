"""What an agent answers, and to whom."""

from collections.abc import Mapping, Sequence

from authsvc.errors import AuthError, Reason
from authsvc.model import SCOPE_VALIDATE, Caller, Peer
from authsvc.rpc.answers import Batch, Questions
from authsvc.rpc.convert import Asked, VerdictEncoder
from authsvc.rpc.pipeline import Call, Read
from authsvc.rpc.policy import Rule
from authsvc.validate import Answer
from authsvc_client import AuthsvcClient, AuthsvcError
from authsvc_client.core.judge import require_entitled
from authsvc_client.core.jws import Refused
from authsvc_client.errors import reason_of
from authsvc_client.messages import is_jwt, knowing
from authsvc_client.v1 import auth_pb2, error_reason_pb2
from authsvc_client.validator import Local

_SCOPES = frozenset({SCOPE_VALIDATE})


class Everybody:
    """Lets everybody in who can connect."""

    def __init__(self, audiences: frozenset[str]) -> None:
        self._audiences = audiences

    async def __call__(self, rule: Rule, peer: Peer, authorization: str, now: float) -> Caller:
        if not rule.scopes <= _SCOPES:
            raise AuthError(Reason.INSUFFICIENT_SCOPE)
        return await self.find(peer, authorization, now)

    async def find(self, peer: Peer, authorization: str, now: float) -> Caller:  # noqa: ARG002
        return Caller("local", "", _SCOPES, self._audiences, peer)

    def grounds(self, caller: Caller) -> None:  # noqa: ARG002
        return None

    def is_taken(self, name: str, peer: Peer, now: float) -> bool:  # noqa: ARG002
        return False


async def nothing(_reason: Reason) -> None:
    """An agent keeps no audit."""


class Beside:
    """Answers by the local state, and by authsvc what only that can tell."""

    def __init__(self, local: Local, client: AuthsvcClient) -> None:
        self._local = local
        self._client = client
        self._encode = VerdictEncoder()

    def at_hand(self, asked: Asked, call: Call) -> bytes | None:
        """See answers.Source."""
        question = asked.terms.by(call.caller.audiences)
        remote = asked.terms.full or question.permissions or not is_jwt(asked.token)
        if remote or asked.terms.is_beyond(self._local.state.revision):
            return None
        try:
            verdict = self._local.judge(asked.token, question)
        except AuthsvcError as error:
            raise _known(error) from error
        return self._encode(Answer(verdict), asked.terms.view) if verdict is not None else None

    async def __call__(self, asked: Asked, call: Call) -> bytes:
        """See answers.Source."""
        found = self.at_hand(asked, call)
        if found is not None:
            return found
        question = asked.terms.by(call.caller.audiences)
        try:  # authsvc knows what the agent may ask about, and not who asks the agent
            require_entitled(question, {question.audience})
        except Refused:
            return b""
        told = asked.request
        request = knowing(told, self._local.asks())
        try:
            response = await self._client.ask(request)
        except AuthsvcError as error:
            if error.reason is Reason.REVISION_UNKNOWN and request is not told:
                raise AuthError(Reason.STATE_STALE, retry_after_s=1.0) from error
            raise _known(error) from error
        finally:
            self._local.asking -= 1
        reason = self._local.told(asked.token, reason_of(response.reason))
        if response.active and reason:
            response = auth_pb2.ValidateTokenResponse(
                reason=error_reason_pb2.ErrorReason.ValueType(reason),
                revision=response.revision,
                check_time=response.check_time,
                reusable_until=response.check_time,
            )
        return bytes(response.SerializeToString())


def _known(error: AuthsvcError) -> AuthError:
    """What authsvc says, passed on; what it does not say is that it is away."""
    if error.reason in (Reason.UNSPECIFIED, Reason.INTERNAL):
        return AuthError(Reason.STATE_STALE, retry_after_s=1.0, cause=str(error))
    return AuthError(error.reason, metadata=error.metadata, retry_after_s=error.retry_after_s)


class AgentServicer:
    """AuthService as far as an agent has it."""

    def __init__(self, source: Beside) -> None:
        self._source = source
        self._batch = Batch(source)
        questions = Questions()
        self.readers: Mapping[str, Read] = {
            "ValidateToken": questions.one,
            "BatchValidateTokens": questions.many,
        }

    async def ValidateToken(self, asked: Asked, call: Call) -> bytes:
        """As authsvc's."""
        return await self._source(asked, call)

    async def BatchValidateTokens(
        self, questions: Sequence[Asked | AuthError], call: Call
    ) -> bytes:
        """As authsvc's."""
        return await self._batch(questions, call)
