"""Questions about tokens, alone and in batches: read once for the same bytes, answered in order."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog
from google.protobuf.unknown_fields import UnknownFieldSet

from authsvc.errors import AuthError, not_implemented
from authsvc.model import SCOPE_VALIDATE
from authsvc.rpc import status
from authsvc.rpc.convert import Asked, VerdictEncoder
from authsvc.rpc.limits import Shape, field_invalid
from authsvc.rpc.pipeline import Call
from authsvc.rpc.repeats import Context, Repeat
from authsvc.telemetry import Counter, Metrics
from authsvc.validate import Answer, ValidateToken
from authsvc_client.core.cache import BytesCache
from authsvc_client.core.judge import Question
from authsvc_client.core.reason import Reason as Verdicts
from authsvc_client.core.standing import Standing
from authsvc_client.core.state import State
from authsvc_client.v1 import auth_pb2, error_reason_pb2

ASKED_BYTES_MAX = 32 * 2**20
ITEMS_MAX = 256
TURN_ITEMS = 32
"""After so many the event loop has its turn: each may ask for a signature check."""

log = structlog.get_logger()


class Questions:
    """Reads requests: the same token is asked for again and again, in the same bytes."""

    def __init__(self) -> None:
        self._shape = Shape(auth_pb2.ValidateTokenRequest.DESCRIPTOR)
        self._known: BytesCache[bytes, Asked] = BytesCache(ASKED_BYTES_MAX)

    def one(self, raw: bytes) -> Asked:
        """Raises AuthError FIELD_INVALID, NOT_IMPLEMENTED, and DecodeError."""
        found = self._known.get(raw)
        if found is None:
            return self._read(raw, auth_pb2.ValidateTokenRequest.FromString(raw))
        found.again = True
        return found

    def many(self, raw: bytes) -> list[Asked | AuthError]:
        """Each, or why it cannot be asked. Raises as `one` for what is wrong with the whole."""
        batch = auth_pb2.BatchValidateTokensRequest.FromString(raw)
        if len(UnknownFieldSet(batch)):
            raise not_implemented("a field of a newer contract")
        if not 0 < len(batch.requests) <= ITEMS_MAX:
            raise field_invalid("requests", f"has not 1 to {ITEMS_MAX} items")
        return [self._item(request) for request in batch.requests]

    def _item(self, request: auth_pb2.ValidateTokenRequest) -> Asked | AuthError:
        raw = request.SerializeToString()
        found = self._known.get(raw)
        if found is not None:
            return found
        try:
            return self._read(raw, request)
        except AuthError as error:
            return error

    def _read(self, raw: bytes, request: auth_pb2.ValidateTokenRequest) -> Asked:
        self._shape.check(request)
        asked = Asked(request)
        self._known.put(raw, asked, 2 * len(raw) + 2048)  # the bytes, and what was made of them
        return asked


class Source(Protocol):
    """Whoever has answers: verdicts as bytes of ValidateTokenResponse."""

    def at_hand(self, asked: Asked, call: Call) -> bytes | None:
        """None where something has to be waited for. Raises AuthError and StateStale."""

    async def __call__(self, asked: Asked, call: Call) -> bytes:
        """Raises AuthError and StateStale."""


class Judged:
    """Answers of authsvc itself."""

    def __init__(self, validate: ValidateToken, state: State, metrics: Metrics) -> None:
        self._validate = validate
        self._state = state
        self._encode = VerdictEncoder()
        self._count = {reason: metrics.verdicts.labels(reason.name) for reason in Verdicts}

    def at_hand(self, asked: Asked, call: Call) -> bytes | None:
        """See Source."""
        if asked.is_beyond(self._state.revision):
            return None
        question = asked.by(call.caller.audiences)
        answer = self._validate.at_hand(asked.token, question, full=asked.full)
        return self._told(answer, asked) if answer is not None else None

    async def __call__(self, asked: Asked, call: Call) -> bytes:
        """See Source. Warm: no database, no signature check."""
        if asked.is_beyond(self._state.revision):
            await self._validate.catch_up(asked.at_least)
            await call.require_caller(SCOPE_VALIDATE)  # what it may see, it may since then
        question = asked.by(call.caller.audiences)
        answer = await self._validate(asked.token, question, full=asked.full)
        if asked.again:
            call.repeat = self._repeat(asked, question, answer)
        return self._told(answer, asked)

    def _repeat(self, asked: Asked, question: Question, answer: Answer) -> Repeat | None:
        if asked.strong or asked.full or not answer.verdict.active:
            return None
        standing = self._validate.standing(answer, question)
        if standing is None:
            return None
        return _Repeat(
            standing, asked, self._state, self._encode, self._count[Verdicts.UNSPECIFIED]
        )

    def _told(self, answer: Answer, asked: Asked) -> bytes:
        self._count[answer.verdict.reason].value += 1
        return self._encode(answer, asked.view)


class _Repeat:
    """An active answer, to be given again."""

    __slots__ = ("_at", "_at_least", "_claims", "_count", "_encode", "_state")

    def __init__(
        self,
        standing: Standing,
        asked: Asked,
        state: State,
        encode: VerdictEncoder,
        count: Counter,
    ) -> None:
        self._at = standing.at
        self._at_least = asked.at_least
        self._claims = encode.claims(standing.verified, asked.view)
        self._state = state
        self._encode = encode.again
        self._count = count

    def __call__(self, boot: float, _context: Context, _request_id: str) -> bytes | None:
        revision = self._state.revision
        now = self._at(boot) if revision >= self._at_least else None
        if now is None:
            return None
        self._count.value += 1
        return self._encode(revision, now) + self._claims


class Batch:
    """Answers many questions, each as if it came alone: what one waits for holds up no other."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __call__(self, questions: Sequence[Asked | AuthError], call: Call) -> bytes:
        """A BatchValidateTokensResponse."""
        results: list[bytes] = []
        waiting: dict[int, Asked] = {}
        for place, asked in enumerate(questions):
            result = self._at_hand(asked, call)
            if result is None and isinstance(asked, Asked):
                waiting[place] = asked
            results.append(result or b"")
            if place % TURN_ITEMS == TURN_ITEMS - 1:
                await asyncio.sleep(0)
        if waiting:
            later = (self._later(asked, call) for asked in waiting.values())
            for place, result in zip(waiting, await asyncio.gather(*later), strict=True):
                results[place] = result
        return b"".join(results)

    def _at_hand(self, asked: Asked | AuthError, call: Call) -> bytes | None:
        if isinstance(asked, AuthError):
            return _failed(asked)
        try:
            found = self._source.at_hand(asked, call)
        except Exception as error:
            return _failed(error)
        return _framed(_framed(found)) if found is not None else None

    async def _later(self, asked: Asked, call: Call) -> bytes:
        try:
            found = await self._source(asked, call)
        except Exception as error:
            return _failed(error)
        return _framed(_framed(found))


def _failed(error: Exception) -> bytes:
    """One item as an error, as the whole call would have told it."""
    told, incident = status.public(error)
    if incident:
        log.error("rpc.incident", incident=incident, exc_info=error)
    item = auth_pb2.ItemError(
        code=told.rule.code.value,
        reason=error_reason_pb2.ErrorReason.ValueType(told.reason),
        message=status.text(told),
    )
    result = auth_pb2.BatchValidateTokensResult(error=item)
    return _framed(result.SerializeToString())


def _framed(message: bytes) -> bytes:
    """A message as field 1 of another, in the wire format: a tag, a varint and the bytes.

    Objects of each result would cost more than to judge the token.
    """
    length, prefix = len(message), bytearray((0x0A,))
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + message
