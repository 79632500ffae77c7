"""Questions about tokens, alone and in batches: read once for the same bytes, answered in order."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog
from google.protobuf.unknown_fields import UnknownFieldSet

from authsvc.errors import AuthError, not_implemented
from authsvc.model import SCOPE_VALIDATE
from authsvc.rpc import status
from authsvc.rpc.convert import Asked, Terms, VerdictEncoder
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

TERMS_BYTES_MAX = 8 * 2**20
ITEMS_MAX = 256
TURN_ITEMS = 32
"""After so many the event loop has its turn: each may ask for a signature check."""

log = structlog.get_logger()


class Questions:
    """Reads requests. Most differ from others in the token alone, so what is around it is decoded
    and checked once.
    """

    def __init__(self) -> None:
        self._shape = Shape(auth_pb2.ValidateTokenRequest.DESCRIPTOR)
        self._known: BytesCache[bytes, Terms] = BytesCache(TERMS_BYTES_MAX)

    def one(self, raw: bytes) -> Asked:
        """Raises AuthError FIELD_INVALID, NOT_IMPLEMENTED, and DecodeError."""
        token, rest = _parted(raw)
        terms = self._known.get(rest) if token else None
        if terms is not None:
            return Asked(token, terms, raw)
        request = auth_pb2.ValidateTokenRequest.FromString(raw)
        self._shape.check(request)
        terms = Terms(request)
        # A second token behind the first would be the one that counts, also the next time.
        if not auth_pb2.ValidateTokenRequest.FromString(rest).token:
            self._known.put(rest, terms, len(rest) + 2048)
        return Asked(request.token, terms, raw)

    def many(self, raw: bytes) -> list[Asked | AuthError]:
        """Each, or why it cannot be asked. Raises as `one` for what is wrong with the whole."""
        batch = auth_pb2.BatchValidateTokensRequest.FromString(raw)
        if len(UnknownFieldSet(batch)):
            raise not_implemented("a field of a newer contract")
        if not 0 < len(batch.requests) <= ITEMS_MAX:
            raise field_invalid("requests", f"has not 1 to {ITEMS_MAX} items")
        return [self._item(request.SerializeToString()) for request in batch.requests]

    def _item(self, raw: bytes) -> Asked | AuthError:
        try:
            return self.one(raw)
        except AuthError as error:
            return error


def _parted(raw: bytes) -> tuple[str, bytes]:
    """Token and what follows it in a ValidateTokenRequest that begins with its field 1, as all
    encoders write it: a tag, a length in one byte or two, and UTF-8. Else no token.
    """
    if len(raw) < 3 or raw[0] != 0x0A:
        return "", raw
    length, begins = raw[1], 2
    if length > 0x7F:
        length, begins = length & 0x7F | raw[2] << 7, 3
    ends = begins + length
    if (begins == 3 and raw[2] > 0x7F) or ends > len(raw):
        return "", raw
    try:
        return raw[begins:ends].decode(), raw[ends:]
    except UnicodeDecodeError:
        return "", raw


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
        terms = asked.terms
        if terms.is_beyond(self._state.revision):
            return None
        question = terms.by(call.caller.audiences)
        answer = self._validate.at_hand(asked.token, question, full=terms.full)
        return self._told(answer, terms) if answer is not None else None

    async def __call__(self, asked: Asked, call: Call) -> bytes:
        """See Source. Warm: no database, no signature check."""
        terms = asked.terms
        if terms.is_beyond(self._state.revision):
            await self._validate.catch_up(terms.at_least)
            await call.require_caller(SCOPE_VALIDATE)  # what it may see, it may since then
        question = terms.by(call.caller.audiences)
        answer = await self._validate(asked.token, question, full=terms.full)
        call.repeat = self._repeat(terms, question, answer)
        return self._told(answer, terms)

    def _repeat(self, terms: Terms, question: Question, answer: Answer) -> Repeat | None:
        verified = answer.verdict.verified
        if terms.strong or terms.full or verified is None or not answer.verdict.active:
            return None
        if not verified.seen:  # most tokens that come once never come again
            verified.seen = True
            return None
        standing = self._validate.standing(answer, question)
        if standing is None:
            return None
        return _Repeat(
            standing, terms, self._state, self._encode, self._count[Verdicts.UNSPECIFIED]
        )

    def _told(self, answer: Answer, terms: Terms) -> bytes:
        self._count[answer.verdict.reason].value += 1
        return self._encode(answer, terms.view)


class _Repeat:
    """An active answer, to be given again."""

    __slots__ = ("_at", "_at_least", "_claims", "_count", "_encode", "_state")

    def __init__(
        self,
        standing: Standing,
        terms: Terms,
        state: State,
        encode: VerdictEncoder,
        count: Counter,
    ) -> None:
        self._at = standing.at
        self._at_least = terms.at_least
        self._claims = encode.claims(standing.verified, terms.view)
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
