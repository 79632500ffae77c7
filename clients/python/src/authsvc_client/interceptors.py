"""Tokens on calls: a server interceptor that asks each caller for one."""

import base64
import functools
import inspect
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf.descriptor import ServiceDescriptor

from . import clock
from .core.claims import Claims
from .core.jws import TOKEN_CHARS_MAX
from .core.reason import Reason
from .core.step_up import StepUp
from .errors import AuthsvcError, error_trailers
from .identity import Caller, current
from .rules import Rule, rules_of

AUTHORIZATION = "authorization"
HEALTH = "grpc.health.v1.Health"
PEERS_MAX = 1024

_log = logging.getLogger("authsvc_client")


class Verdict(Protocol):
    """What a Validator says of a token; core's Verdict is one."""

    @property
    def active(self) -> bool: ...
    @property
    def reason(self) -> Reason: ...
    @property
    def claims(self) -> Claims | None: ...
    @property
    def missing_scopes(self) -> frozenset[str]: ...
    @property
    def missing_permissions(self) -> frozenset[str]: ...


class Validator(Protocol):
    """Judges tokens: AuthsvcClient does, by asking authsvc."""

    async def validate(
        self,
        token: str,
        *,
        audience: str,
        scopes: frozenset[str],
        thumbprint: str,
        require_bound: bool,
        permissions: frozenset[str],
        step_up: StepUp,
    ) -> Verdict:
        """Raises where no answer can be had: the call is then refused."""


class RequireInterceptor(grpc.aio.ServerInterceptor):
    """Enforces the option `(authsvc.v1.require)` of a service's own proto; fails closed.

    A handler learns who calls by `caller()`. Put it before interceptors that act for a caller.
    Handlers must be async: grpc.aio would run others in a thread, where they are refused here.
    """

    def __init__(
        self,
        validator: Validator,
        *,
        audience: str,
        services: Iterable[ServiceDescriptor],
        open_services: Iterable[str] = (HEALTH,),
        now: Callable[[], float] = clock.wall,
    ) -> None:
        """Raises RuleRefused unless every method of `services` has a rule that can be enforced.

        `audience` is the resource id of this server, for rules that name none. Services in
        `open_services` (reflection, say) ask for no token; any other one refuses all calls.
        """
        if not audience:
            raise ValueError("audience: without one, tokens for other services would do")
        self._validator, self._now = validator, now
        self._rules: Mapping[str, Rule] = rules_of(services, audience)
        self._open = frozenset(open_services)
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None:
            return None
        rule = self._rules.get(method)
        if rule is None:
            if method[1:].rpartition("/")[0] in self._open:
                return handler
            _say_once(method)
            return _with_behaviour(handler, _NO_RULE.behaviour)
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, rule, handler))
        return known[1]

    def _wrap(self, method: str, rule: Rule, handler: Any) -> Any:
        inner = getattr(handler, _KINDS[handler.request_streaming, handler.response_streaming][0])
        admit = _admit_anyone if rule.public else functools.partial(self._admit, rule)
        if inspect.isasyncgenfunction(inner):

            async def yields(request: Any, context: Any) -> AsyncIterator[Any]:
                current.set(await admit(context))
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response

            return _with_behaviour(handler, yields)
        if inspect.iscoroutinefunction(inner):

            async def returns(request: Any, context: Any) -> Any:
                current.set(await admit(context))
                return await inner(request, context)

            return _with_behaviour(handler, returns)
        _log.error("%s is refused: its handler is not async", method)
        return _with_behaviour(handler, _NOT_ASYNC.behaviour)

    async def _admit(self, rule: Rule, context: Any) -> Caller:
        try:
            answer = await self._judge(rule, context)
        except Exception as error:
            known = isinstance(error, AuthsvcError)
            _log.warning("a token could not be checked: %s", error if known else repr(error))
            answer = _UNCHECKED
        if isinstance(answer, _Refusal):
            await answer.abort(context)
        return answer

    async def _judge(self, rule: Rule, context: Any) -> "Caller | _Refusal":
        token = _bearer_token(context.invocation_metadata() or ())
        if isinstance(token, _Refusal):
            return token
        peer = _peer(context.auth_context())
        if peer is not None and not peer.not_before <= self._now() <= peer.not_after:
            return _CERTIFICATE_EXPIRED  # an open connection outlives the certificate
        verdict = await self._validator.validate(
            token,
            audience=rule.audience,
            scopes=rule.scopes,
            thumbprint=peer.thumbprint if peer else "",
            require_bound=rule.require_bound,
            permissions=rule.permissions,
            step_up=rule.step_up,
        )
        if not verdict.active:
            return _inactive(verdict, rule.step_up)
        if verdict.claims is None:
            raise ValueError("active without claims")
        return Caller.of(verdict.claims, token)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An answer to a call that is not let in."""

    code: grpc.StatusCode
    text: str
    trailers: tuple[tuple[str, bytes], ...]

    async def abort(self, context: Any) -> NoReturn:
        await context.abort(self.code, self.text, self.trailers)
        raise AssertionError("abort raises")

    async def behaviour(self, _: Any, context: Any) -> NoReturn:
        await self.abort(context)


def _refusal(
    code: grpc.StatusCode, text: str, reason: Reason, metadata: Mapping[str, str] | None = None
) -> _Refusal:
    return _Refusal(code, text, error_trailers(code, text, reason, metadata))


@functools.cache
def _unauthenticated(reason: Reason) -> _Refusal:
    return _refusal(grpc.StatusCode.UNAUTHENTICATED, "the token is not good here", reason)


_TOKEN_MISSING = _refusal(
    grpc.StatusCode.UNAUTHENTICATED, "one bearer token is needed", Reason.TOKEN_MISSING
)
_CERTIFICATE_EXPIRED = _refusal(
    grpc.StatusCode.UNAUTHENTICATED,
    "the client certificate is not valid now",
    Reason.PEER_CERTIFICATE_EXPIRED,
)
_UNCHECKED = _refusal(
    grpc.StatusCode.UNAVAILABLE, "the token could not be checked", Reason.STATE_STALE
)
_NO_RULE = _refusal(
    grpc.StatusCode.UNAUTHENTICATED, "nobody may call this method", Reason.CALLER_UNKNOWN
)
_NOT_ASYNC = _refusal(grpc.StatusCode.INTERNAL, "the method cannot be served", Reason.INTERNAL)


def _inactive(verdict: Verdict, step_up: StepUp) -> _Refusal:
    if verdict.reason is Reason.INSUFFICIENT_SCOPE:
        return _refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            "the token lacks a scope",
            Reason.INSUFFICIENT_SCOPE,
            {"scope": " ".join(sorted(verdict.missing_scopes))},
        )
    if verdict.reason is Reason.INSUFFICIENT_PERMISSIONS:
        return _refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            "a permission is missing",
            Reason.INSUFFICIENT_PERMISSIONS,
            {"permission": " ".join(sorted(verdict.missing_permissions))},
        )
    if verdict.reason is Reason.INSUFFICIENT_USER_AUTHENTICATION:
        return _refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            "a stronger or more recent authentication is needed",
            Reason.INSUFFICIENT_USER_AUTHENTICATION,
            step_up.metadata(),
        )
    return _unauthenticated(verdict.reason or Reason.TOKEN_INACTIVE)


_bearer = re.compile(r"bearer +(\S.*)", re.ASCII | re.IGNORECASE | re.DOTALL).fullmatch
_b64token = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII).fullmatch  # RFC 6750 section 2.1


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | _Refusal:
    values = [value for key, value in metadata if key == AUTHORIZATION]
    found = _bearer(values[0]) if len(values) == 1 and isinstance(values[0], str) else None
    if found is None:
        return _TOKEN_MISSING
    token = found[1]
    if len(token) > TOKEN_CHARS_MAX or _b64token(token) is None:
        return _unauthenticated(Reason.TOKEN_MALFORMED)
    return token


@dataclass(frozen=True, slots=True)
class _Peer:
    thumbprint: str
    """`x5t#S256` (RFC 8705 section 3.1)."""
    not_before: float
    not_after: float


def _peer(auth_context: Mapping[str, Iterable[bytes]]) -> _Peer | None:
    for pem in auth_context.get("x509_pem_cert", ()):
        return _read_peer(pem)
    return None


@functools.lru_cache(maxsize=PEERS_MAX)
def _read_peer(pem: bytes) -> _Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    digest = certificate.fingerprint(hashes.SHA256())
    return _Peer(
        base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


@functools.lru_cache(maxsize=256)
def _say_once(method: str) -> None:
    _log.error("%s is refused: its service was not given to RequireInterceptor", method)


async def _admit_anyone(_: Any) -> None:
    return None


_KINDS: Mapping[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _with_behaviour(handler: Any, behaviour: Any) -> Any:
    make = _KINDS[handler.request_streaming, handler.response_streaming][1]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
