"""What every call passes through, composed once per method at start.

Order: deadline, peer, who may call, limits, the verb; around it errors, metrics and the log.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from authsvc.clock import Clock
from authsvc.errors import AuthError, Code, Reason, not_implemented
from authsvc.model import Caller, Peer
from authsvc.rpc import status
from authsvc.rpc.limits import Shape
from authsvc.rpc.peer import Peers
from authsvc.rpc.policy import Policy, Rule, rule_of
from authsvc.telemetry import Metrics

DEADLINE_S_MAX = 30.0
REQUEST_ID_KEY = "x-request-id"

log = structlog.get_logger()

_request_id = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_seconds = time.perf_counter
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Call:
    """What a servicer may know of a call beside the request."""

    peer: Peer
    authorization: str
    now: float
    """This machine's clock, in seconds: certificates are judged by it."""
    admitted: Caller | None
    _policy: Policy

    @property
    def caller(self) -> Caller:
        """The caller of a method that is not public."""
        assert self.admitted is not None
        return self.admitted

    async def find_caller(self) -> Caller | None:
        """The caller of a public method, if it is anybody yet."""
        return await self._policy.find(self.peer, self.authorization, self.now)

    async def require_caller(self, *scopes: str) -> Caller:
        """The caller of a public method that asks for scopes after all."""
        return await self._policy(
            Rule(False, frozenset(scopes)), self.peer, self.authorization, self.now
        )


Unary = Callable[[Any, Call], Awaitable[Message]]
Stream = Callable[[Any, Call], AsyncIterator[Message]]


class Pipeline:
    """Makes gRPC handlers of servicer methods."""

    def __init__(self, peers: Peers, policy: Policy, metrics: Metrics, clock: Clock) -> None:
        self._peers = peers
        self._policy = policy
        self._metrics = metrics
        self._clock = clock

    def handler(
        self, method: MethodDescriptor, servicer: object
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a method; what the servicer lacks answers UNIMPLEMENTED.

        ValueError or KeyError where the method has no rule, or a field of it no limit.
        """
        rule = rule_of(method)
        implementation = getattr(servicer, method.name, None)
        request = GetMessageClass(method.input_type)
        decode, encode = request.FromString, GetMessageClass(method.output_type).SerializeToString
        shape = Shape(method.input_type) if implementation is not None else None
        implementation = implementation or _not_built(method)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, rule, shape, implementation), decode, encode
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, rule, shape, implementation), decode, encode
        )

    async def _admit(
        self, rule: Rule, shape: Shape | None, request: Message, context: Context, given: str
    ) -> Call:
        now = self._clock.wall()
        peer = self._peers(context.auth_context(), now)
        caller = None if rule.public else await self._policy(rule, peer, given, now)
        if shape is not None:
            shape.check(request)
        return Call(peer, given, now, caller, self._policy)

    def _unary(
        self, method: MethodDescriptor, rule: Rule, shape: Shape | None, implementation: Unary
    ) -> Callable[[Message, Context], Awaitable[Message]]:
        name = method.full_name
        observe = self._metrics.seconds.labels(name).observe
        succeeded = self._metrics.calls.labels(name, "OK").inc

        async def unary(request: Message, context: Context) -> Message:
            started = _seconds()
            authorization = request_id = ""
            try:
                authorization, request_id = _metadata(context)
                async with asyncio.timeout(DEADLINE_S_MAX):
                    call = await self._admit(rule, shape, request, context, authorization)
                    response = await implementation(request, call)
            except Exception as error:
                await self._fail(name, error, context, request_id)
                raise  # not reached: _fail aborts
            finally:
                observe(_seconds() - started)
            if request_id:
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
            succeeded()
            return response

        return unary

    def _stream(
        self, method: MethodDescriptor, rule: Rule, shape: Shape | None, implementation: Stream
    ) -> Callable[[Message, Context], AsyncIterator[Message]]:
        name = method.full_name
        succeeded = self._metrics.calls.labels(name, "OK").inc

        async def stream(request: Message, context: Context) -> AsyncIterator[Message]:
            request_id = ""
            try:
                authorization, request_id = _metadata(context)
                call = await self._admit(rule, shape, request, context, authorization)
                async for response in implementation(request, call):
                    yield response
            except Exception as error:
                await self._fail(name, error, context, request_id)
            succeeded()

        return stream

    async def _fail(self, name: str, error: Exception, context: Context, request_id: str) -> None:
        """Ends the call with what may be told; cancellation and aborts never come here."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        told, incident = status.public(error)
        code = status.grpc_code(told.rule.code)
        self._metrics.calls.labels(name, code.name).inc()
        if incident:
            log.error("rpc.incident", method=name, incident=incident, exc_info=error)
        elif told.rule.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
            log.warning("rpc.unavailable", method=name, reason=told.reason.name, cause=told.cause)
        else:
            log.info("rpc.refused", method=name, reason=told.reason.name, cause=told.cause)
        trailers: list[tuple[str, str | bytes]] = [(status.DETAILS_KEY, status.details(told))]
        if request_id:
            trailers.append((REQUEST_ID_KEY, request_id))
        await context.abort(code, told.text, tuple(trailers))


def _metadata(context: Context) -> tuple[str, str]:
    """`authorization` and `x-request-id` of a call; AuthError where one comes twice."""
    authorization = request_id = ""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            if authorization or not isinstance(value, str):
                raise AuthError(Reason.AUTH_METHOD_AMBIGUOUS, "authorization comes twice")
            authorization = value
        elif key == REQUEST_ID_KEY and isinstance(value, str) and _request_id(value):
            request_id = value
    return authorization, request_id


def _not_built(method: MethodDescriptor) -> Any:
    async def unary(_request: Message, _call: Call) -> Message:
        raise not_implemented(method.full_name)

    async def stream(_request: Message, _call: Call) -> AsyncIterator[Message]:
        raise not_implemented(method.full_name)
        yield  # makes it a generator

    return stream if method.server_streaming else unary
