"""What every call passes through, composed once per method at start.

Order: deadline, peer, who may call, how often, limits of fields, the verb; around it errors,
metrics and the log.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from authsvc import acting
from authsvc.acting import Act
from authsvc.clock import Clock
from authsvc.errors import AuthError, Code, Reason, not_implemented
from authsvc.keys.secrets import new_id
from authsvc.model import NOBODY, SCOPE_ADMIN, Caller, Peer
from authsvc.rpc import status
from authsvc.rpc.limits import Shape
from authsvc.rpc.peer import AuthContext
from authsvc.rpc.policy import Callers, Grounds, Rule, rule_of
from authsvc.rpc.rates import Limit, Rates
from authsvc.rpc.repeats import Repeat, Repeats
from authsvc.rpc.timelimit import TimeLimit
from authsvc.telemetry import Metrics, log_about

DEADLINE_S_MAX = 30.0
SEND_S_MAX = 10.0
"""So long the caller of a stream may take no message."""
AUTHORIZATION_KEY = "authorization"
REQUEST_ID_KEY = "x-request-id"
KEYS_READ = frozenset((AUTHORIZATION_KEY, REQUEST_ID_KEY))
"""Of the metadata of a call: all that anything here reads."""
REFUSALS_MAX = 10
"""How many of a caller's refusals a worker audits in a minute; the others are in the log alone."""

log = structlog.get_logger()

_request_id = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_seconds = time.perf_counter
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Call:
    """What a servicer may know of a call beside the request."""

    peer: Peer
    authorization: str = field(repr=False)
    now: float
    """This machine's clock, in seconds: certificates are judged by it."""
    admitted: Caller | None
    """Of a public method once it was asked for."""
    _policy: Callers
    _context: Context
    method: str = ""
    """Its full name."""
    known_id: str = ""
    """The request's id, if there is one yet."""
    _address: str | None = None
    repeat: Repeat | None = None
    """Gives the answer again, where the verb says that it stands."""
    grounds: Grounds | None = None
    """Of the client of a public method, where it authenticated by its certificate alone."""

    @property
    def request_id(self) -> str:
        """That of the caller, else one that is made when somebody first asks for it."""
        if not self.known_id:
            self.known_id = new_id()
        return self.known_id

    def line(self) -> dict[str, str]:
        """What each line of the log says of it."""
        return {
            "method": self.method,
            "request_id": self.request_id,
            "caller": self.admitted.name if self.admitted is not None else "",
            "peer": name_of(self.peer),
        }

    @property
    def caller(self) -> Caller:
        """The caller of a method that is not public."""
        assert self.admitted is not None
        return self.admitted

    @property
    def address(self) -> str:
        """Network address of the peer, without the port; empty for a socket that has none."""
        if self._address is None:
            kind, _, rest = self._context.peer().partition(":")
            host = unquote(rest).rpartition(":")[0].strip("[]")
            self._address = host if kind in ("ipv4", "ipv6") else ""
        return self._address

    @property
    def source(self) -> str:
        """Where the call comes from: a certificate, or without one an address."""
        return self.peer.thumbprint or self.address

    def may_go_by(self, name: str) -> bool:
        """Whether nobody else is known by a name in the peer's certificate."""
        return not self._policy.is_taken(name, self.peer, self.now)

    async def find_caller(self) -> Caller | None:
        """The caller of a public method, if it is anybody yet."""
        self.admitted = await self._policy.find(self.peer, self.authorization, self.now)
        return self.admitted

    async def require_caller(self, *scopes: str) -> Caller:
        """The caller of a public method that asks for scopes after all."""
        rule = Rule(False, frozenset(scopes))
        self.admitted = await self._policy(rule, self.peer, self.authorization, self.now)
        return self.admitted


Peers = Callable[[AuthContext, float], Peer]
"""The peer of a connection at a time; raises AuthError."""
Unary = Callable[[Any, Call], Awaitable[Message | bytes]]
Stream = Callable[[Any, Call], AsyncGenerator[bytes, None]]
Decode = Callable[[bytes], Message]
Read = Callable[[bytes], Any]
"""Makes a request of bytes; raises AuthError for what is not within its limits."""
Encode = Callable[[Any], bytes]
Admit = Callable[[Rule, Context, str], Awaitable[Call]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Handlers(NamedTuple):
    """The handler of a method, and a cheaper one of calls without any of KEYS_READ."""

    all: Handler
    silent: Handler


_ANYBODY = Rule(public=True, scopes=frozenset())


class Pipeline:
    """Makes gRPC handlers of servicer methods."""

    def __init__(
        self,
        peers: Peers,
        policy: Callers,
        refused: Callable[[Reason], Awaitable[None]],
        metrics: Metrics,
        clock: Clock,
        rates: Rates | None = None,
        repeats: Callable[[], Repeats] | None = None,
    ) -> None:
        """`refused` records that a known caller asked for what only administrators may; `rates`
        limits how often anybody calls; `repeats` makes what keeps answers of a method.
        """
        self._peers = peers
        self._policy = policy
        self._refused = refused
        self._metrics = metrics
        self._clock = clock
        self._rates = rates
        self._repeats = repeats
        self._limit = TimeLimit(DEADLINE_S_MAX)
        self._streams: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._released = asyncio.Event()
        self._refusals: Counter[str] = Counter()
        self._minute = 0

    def drain(self) -> None:
        """Ends the streams, each with its next message; new calls wait, those under way go on."""
        self._draining = True

    async def idle(self, within_s: float) -> bool:
        """Waits until none is under way that began before `drain`; whether it came to that."""
        until = _seconds() + within_s
        if not await self._limit.idle(within_s):
            return False
        if not self._streams:
            return True
        _, going_on = await asyncio.wait(self._streams, timeout=max(0.0, until - _seconds()))
        return not going_on

    def release(self) -> None:
        """Refuses the calls that waited, and all others."""
        self._released.set()

    async def _refuse(self) -> None:
        await self._released.wait()
        raise AuthError(Reason.DRAINING)

    def handlers(self, method: MethodDescriptor, servicer: object) -> Handlers:
        """Those of a method; what the servicer lacks answers UNIMPLEMENTED. It may have a
        reader of its own, which then keeps to the limits itself.

        ValueError or KeyError where the method has no rule, or a field of it no limit.
        """
        rule = rule_of(method)
        implementation = getattr(servicer, method.name, None)
        # Bytes are decoded within: what gRPC itself cannot decode it answers with Python's words.
        decode = GetMessageClass(method.input_type).FromString
        encode = GetMessageClass(method.output_type).SerializeToString
        own: Read | None = getattr(servicer, "readers", {}).get(method.name)
        shape = Shape(method.input_type) if implementation is not None and own is None else None
        read = own or _reader(decode, shape)
        audited = own is None
        implementation = implementation or _not_built(method)
        if method.server_streaming:
            stream: Handler = grpc.unary_stream_rpc_method_handler(
                self._stream(method, rule, read, implementation)
            )
            return Handlers(stream, stream)
        admit: Admit = self._admit
        rates = self._rates
        repeats = None
        if self._repeats is not None and method.name in getattr(servicer, "repeated", ()):
            repeats = self._repeats()
        if rates is not None and (limit := rates.limit_of(method)) is not None:
            if rates.counts(limit):
                repeats = None  # each call is to be counted
            if rule.public:
                implementation = _limited(implementation, rates, limit)
            else:
                admit = partial(self._admit_within, rates, limit)
        made = partial(
            self._unary, method, rule, admit, read, implementation, encode, repeats, audited=audited
        )
        return Handlers(
            *(grpc.unary_unary_rpc_method_handler(made(silent=each)) for each in (False, True))
        )

    async def _admit(self, rule: Rule, context: Context, given: str) -> Call:
        now = self._clock.wall()
        peer = self._peers(context.auth_context(), now)
        caller = None if rule.public else await self._policy(rule, peer, given, now)
        return Call(peer, given, now, caller, self._policy, context)

    async def _admit_within(
        self, rates: Rates, limit: Limit, rule: Rule, context: Context, given: str
    ) -> Call:
        """As `_admit`, of a caller that did not call too often."""
        call = await self._admit(_ANYBODY, context, given)
        rates.turn_away(call.source)
        try:
            call.admitted = await self._policy(rule, call.peer, given, call.now)
        except AuthError as error:
            await rates.failed(call.source, error)
            raise
        await rates.count(limit, call.caller.name)
        return call

    async def _tell(
        self,
        action: str,
        rule: Rule,
        error: AuthError,
        context: Context,
        authorization: str,
        request_id: str,
    ) -> None:
        """Audits that a caller who is known, and no administrator, asked for what these may do."""
        if error.reason is not Reason.INSUFFICIENT_SCOPE or SCOPE_ADMIN not in rule.scopes:
            return
        call = await self._admit(_ANYBODY, context, authorization)
        caller = await call.find_caller()
        if caller is None or not self._is_told(caller.name, call.now):
            return
        acting.begin(partial(_act, action, call, call.address, None, request_id))
        try:
            await self._refused(error.reason)
        except AuthError as lost:
            log.warning("audit.refusal_lost", method=action, cause=lost.cause)

    def _is_told(self, name: str, now: float) -> bool:
        """Whether one more refusal of a caller is audited, which asks for a row that is kept."""
        minute = int(now / 60)
        if minute != self._minute:
            self._refusals.clear()
            self._minute = minute
        self._refusals[name] += 1
        return self._refusals[name] <= REFUSALS_MAX

    def _unary(
        self,
        method: MethodDescriptor,
        rule: Rule,
        admit: Admit,
        read: Read,
        implementation: Unary,
        encode: Encode,
        repeats: Repeats | None,
        *,
        audited: bool,
        silent: bool,
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        name, limit = method.full_name, self._limit
        observe = self._metrics.seconds.labels(name).observe
        succeeded = self._metrics.calls.labels(name, "OK")

        async def unary(raw: bytes, context: Context) -> bytes:
            started = _seconds()
            if repeats is not None and not self._draining:
                again = repeats(raw, context) if silent else _again(repeats, raw, context)
                if again is not None:
                    observe(_seconds() - started)
                    succeeded.value += 1
                    return again
            request_id = ""
            call: Call | None = None
            task = limit.begin(started)
            try:
                authorization, request_id = ("", "") if silent else _metadata(context)
                if self._draining:
                    limit.end(task)
                    await self._refuse()
                try:
                    call = await admit(rule, context, authorization)
                except AuthError as error:
                    request_id = request_id or new_id()
                    await self._tell(method.name, rule, error, context, authorization, request_id)
                    raise
                call.method, call.known_id = name, request_id
                log_about(call.line)
                request = read(raw)
                if audited:
                    # Now: what is written after a caller has gone away cannot ask any more.
                    acting.begin(
                        partial(_act, method.name, call, call.address, request, call.request_id)
                    )
                answer = await implementation(request, call)
                response = answer if isinstance(answer, bytes) else encode(answer)
                if repeats is not None and call.repeat is not None and not authorization:
                    grounds = call.grounds or self._policy.grounds(call.caller)
                    if grounds is not None:
                        repeats.keep(raw, context.auth_context(), grounds, call.repeat, call.now)
            except asyncio.CancelledError:
                if not limit.exceeded(task):
                    self._metrics.calls.labels(name, "CANCELLED").inc()
                    raise
                await self._fail(name, TimeoutError(), context, call, request_id)
                raise  # not reached: _fail aborts
            except Exception as error:
                limit.end(task)
                await self._fail(name, error, context, call, request_id)
                raise  # not reached
            finally:
                limit.end(task)
                observe(_seconds() - started)
            if call.known_id:
                context.set_trailing_metadata(((REQUEST_ID_KEY, call.known_id),))
            succeeded.value += 1
            return response

        return unary

    def _stream(
        self, method: MethodDescriptor, rule: Rule, read: Read, implementation: Stream
    ) -> Callable[[bytes, Context], Awaitable[None]]:
        name = method.full_name
        succeeded = self._metrics.calls.labels(name, "OK").inc

        async def stream(raw: bytes, context: Context) -> None:
            request_id = ""
            call: Call | None = None
            task = asyncio.current_task()
            assert task is not None
            self._streams.add(task)
            try:
                authorization, request_id = _metadata(context)
                call = await self._admit(rule, context, authorization)
                call.method, call.known_id = name, request_id
                log_about(call.line)
                async with aclosing(implementation(read(raw), call)) as responses:
                    async for response in responses:
                        # A stream outlives certificates, tokens and approvals.
                        await self._admit(rule, context, authorization)
                        if self._draining:
                            raise AuthError(Reason.DRAINING)
                        await _send(context, response)
            except grpc.aio.BaseError:
                raise  # the caller has gone away
            except Exception as error:
                self._streams.discard(task)  # who does not read is not told before he does
                try:
                    await self._fail(name, error, context, call, request_id)
                except grpc.aio.InternalError:
                    raise asyncio.CancelledError from None  # he went away instead
            finally:
                self._streams.discard(task)
            succeeded()

        return stream

    def _line_of(
        self, name: str, context: Context, call: Call | None, request_id: str
    ) -> dict[str, str]:
        """What the log says of a call that failed, whether or not its caller was let in."""
        if call is None:
            now = self._clock.wall()
            try:
                peer = self._peers(context.auth_context(), now)
            except AuthError:
                peer = NOBODY
            call = Call(peer, "", now, None, self._policy, context)
        call.method, call.known_id = name, call.known_id or request_id
        return {**call.line(), "address": call.address}

    async def _fail(
        self, name: str, error: Exception, context: Context, call: Call | None, request_id: str
    ) -> None:
        """Ends the call with what may be told; cancellation and aborts never come here."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        told, incident = status.public(_as_refusal(error))
        line = self._line_of(name, context, call, request_id)
        log_about(lambda: line)
        request_id = line["request_id"]
        about = {"reason": told.reason.name}
        code = status.grpc_code(told.rule.code)
        self._metrics.calls.labels(name, code.name).inc()
        if incident:
            log.error("rpc.incident", **about, incident=incident, exc_info=error)
        elif told.rule.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
            log.warning("rpc.unavailable", **about, cause=told.cause)
        else:
            log.info("rpc.refused", **about, cause=told.cause)
        trailers = ((status.DETAILS_KEY, status.details(told)), (REQUEST_ID_KEY, request_id))
        await context.abort(code, status.text(told), trailers)


async def _send(context: Context, response: bytes) -> None:
    """Waits until it is on its way: who does not read makes nothing pile up, and is cut off."""
    try:
        async with asyncio.timeout(SEND_S_MAX):
            await context.write(response)
    except TimeoutError:
        raise AuthError(Reason.WATCHER_TOO_SLOW) from None


def _limited(implementation: Unary, rates: Rates, limit: Limit) -> Unary:
    """A public method: a client is counted by what it says, since only the verb finds it out.

    So clients that share a certificate or an address do not share a count, and who lies counts for
    nobody who comes from elsewhere.
    """

    async def limited(request: Any, call: Call) -> Message | bytes:
        who = f"{call.source} {getattr(request, 'client_id', '')}"
        rates.turn_away(who)
        await rates.count(limit, who)
        try:
            answer = await implementation(request, call)
        except AuthError as error:
            await rates.failed(who, error)
            raise
        if (repeat := call.repeat) is not None:
            call.repeat = lambda *of: None if rates.away_s(who) else repeat(*of)
        return answer

    return limited


def _again(repeats: Repeats, raw: bytes, context: Context) -> bytes | None:
    """As `repeats`, of a call that says something by its metadata."""
    try:
        authorization, request_id = _metadata(context)
    except Exception:  # whatever it is, it is told by what judges in full
        return None
    response = None if authorization else repeats(raw, context, request_id)
    if response is not None and request_id:
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
    return response


def _as_refusal(error: Exception) -> Exception:
    """What the pipeline itself raises, as what it means to the caller."""
    if isinstance(error, DecodeError):
        return AuthError(Reason.FIELD_INVALID, "the message cannot be decoded")
    if isinstance(error, TimeoutError):
        limit = {"limit_seconds": f"{DEADLINE_S_MAX:g}"}
        return AuthError(Reason.DEADLINE_EXCEEDED, metadata=limit)
    return error


def name_of(peer: Peer) -> str:
    """The identity in a certificate."""
    return peer.spiffe_id or next(iter(sorted(peer.dns_names)), peer.subject_dn)


def _act(action: str, call: Call, address: str, request: Any, request_id: str) -> Act:
    """What the audit says of a call, once something is written."""
    caller, peer = call.admitted, name_of(call.peer)
    # A client that authenticates in a public method has done so before anything is written.
    actor = caller.name if caller is not None else getattr(request, "client_id", "")
    if not actor and call.may_go_by(peer):
        actor = peer
    behalf = caller.subject if caller is not None and caller.subject != actor else ""
    mask = getattr(request, "update_mask", None)
    return Act(
        action,
        actor,
        behalf,
        peer,
        address,
        getattr(request, "comment", ""),
        tuple(mask.paths) if mask is not None else (),
        request_id,
    )


def _reader(decode: Decode, shape: Shape | None) -> Read:
    """From bytes to a request within its limits."""

    def read(raw: bytes) -> Message:
        request = decode(raw)
        if shape is not None:
            shape.check(request)
        return request

    return read


def _metadata(context: Context) -> tuple[str, str]:
    """`authorization` and `x-request-id` of a call; AuthError where one comes twice."""
    authorization: str | None = None
    request_id = ""
    for key, value in context.invocation_metadata() or ():
        if key == AUTHORIZATION_KEY:
            if authorization is not None or not isinstance(value, str):
                raise AuthError(Reason.AUTH_METHOD_AMBIGUOUS, "authorization comes twice")
            authorization = value
        elif key == REQUEST_ID_KEY and isinstance(value, str) and _request_id(value):
            request_id = value
    return authorization or "", request_id


def _not_built(method: MethodDescriptor) -> Any:
    async def unary(_request: Message, _call: Call) -> Message:
        raise not_implemented(method.full_name)

    async def stream(_request: Message, _call: Call) -> AsyncIterator[bytes]:
        raise not_implemented(method.full_name)
        yield  # makes it a generator

    return stream if method.server_streaming else unary
