"""Who is let in: what both server interceptors read, decide and answer."""

import base64
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf.descriptor import ServiceDescriptor

from .core.claims import Claims
from .core.jws import TOKEN_CHARS_MAX
from .core.reason import Reason
from .core.step_up import StepUp
from .errors import AuthsvcError, error_trailers
from .identity import Caller
from .rules import Rule, rules_of
from .staleness import WhenStale

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


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer to a call that is not let in."""

    code: grpc.StatusCode
    text: str
    trailers: tuple[tuple[str, bytes], ...]


def _refusal(
    code: grpc.StatusCode, text: str, reason: Reason, metadata: Mapping[str, str] | None = None
) -> Refusal:
    return Refusal(code, text, error_trailers(code, text, reason, metadata))


@functools.cache
def _unauthenticated(reason: Reason) -> Refusal:
    return _refusal(grpc.StatusCode.UNAUTHENTICATED, "the token is not good here", reason)


_TOKEN_MISSING = _refusal(
    grpc.StatusCode.UNAUTHENTICATED, "one bearer token is needed", Reason.TOKEN_MISSING
)
_CERTIFICATE_EXPIRED = _refusal(
    grpc.StatusCode.UNAUTHENTICATED,
    "the client certificate is not valid now",
    Reason.PEER_CERTIFICATE_EXPIRED,
)
UNCHECKED = _refusal(
    grpc.StatusCode.UNAVAILABLE, "the token could not be checked", Reason.STATE_STALE
)
NO_RULE = _refusal(
    grpc.StatusCode.UNAUTHENTICATED, "nobody may call this method", Reason.CALLER_UNKNOWN
)
NOT_SERVED = _refusal(grpc.StatusCode.INTERNAL, "the method cannot be served", Reason.INTERNAL)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a call shows of its caller."""

    token: str
    thumbprint: str
    """Of the certificate; empty without one."""


def shown(context: Any, now: Callable[[], float]) -> Shown | Refusal:
    """Read from the context of a call, of either API."""
    token = _bearer_token(context.invocation_metadata() or ())
    if isinstance(token, Refusal):
        return token
    peer = _peer(context.auth_context())
    if peer is not None and not peer.not_before <= now() <= peer.not_after:
        return _CERTIFICATE_EXPIRED  # an open connection outlives the certificate
    return Shown(token, peer.thumbprint if peer else "")


def question(rule: Rule, found: Shown) -> dict[str, Any]:
    """What a Validator is asked beside the token; `when_stale` only where it was set."""
    asked = {
        "audience": rule.audience,
        "scopes": rule.scopes,
        "thumbprint": found.thumbprint,
        "require_bound": rule.require_bound,
        "permissions": rule.permissions,
        "step_up": rule.step_up,
    }
    return asked if rule.when_stale is None else asked | {"when_stale": rule.when_stale}


def judged(verdict: Verdict, rule: Rule, token: str) -> Caller | Refusal:
    """What a Validator's answer makes of a call."""
    if not verdict.active:
        return _inactive(verdict, rule.step_up)
    if verdict.claims is None:
        raise ValueError("active without claims")
    return Caller.of(verdict.claims, token)


def unchecked(error: Exception) -> Refusal:
    """For a call whose token nobody could judge; the log says why."""
    known = isinstance(error, AuthsvcError)
    _log.warning("a token could not be checked: %s", error if known else repr(error))
    return UNCHECKED


def _inactive(verdict: Verdict, step_up: StepUp) -> Refusal:
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


def _bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | Refusal:
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


class Guard:
    """Which methods are served, and how: each handler is wrapped once."""

    def __init__(
        self,
        wrap: Callable[[str, Rule, Any], Any],
        refuse: Callable[[Refusal], Any],
        *,
        audience: str,
        services: Iterable[ServiceDescriptor],
        open_services: Iterable[str],
        when_stale: Mapping[str, WhenStale],
    ) -> None:
        """`wrap` makes the behaviour of a method with a rule, `refuse` that of any other one."""
        if not audience:
            raise ValueError("audience: without one, tokens for other services would do")
        self._wrap, self._refuse = wrap, refuse
        self._rules: Mapping[str, Rule] = rules_of(services, audience, when_stale)
        self._open = frozenset(open_services)
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    def handler(self, method: str, handler: Any) -> Any:
        """What serves a method in place of its own handler."""
        if handler is None:
            return None
        rule = self._rules.get(method)
        if rule is None:
            if method[1:].rpartition("/")[0] in self._open:
                return handler
            _say_once(method)
            return with_behaviour(handler, self._refuse(NO_RULE))
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            made = with_behaviour(handler, self._wrap(method, rule, handler))
            known = self._wrapped[method] = (handler, made)
        return known[1]


def behaviour_of(handler: Any) -> Any:
    """The function in a handler, whatever its kind."""
    return getattr(handler, _KINDS[handler.request_streaming, handler.response_streaming][0])


_KINDS: Mapping[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def with_behaviour(handler: Any, behaviour: Any) -> Any:
    make = _KINDS[handler.request_streaming, handler.response_streaming][1]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
