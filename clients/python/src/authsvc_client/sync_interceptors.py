"""Tokens on calls: a server interceptor for `grpc.server` that asks each caller for one."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from . import clock
from .admission import (
    HEALTH,
    NOT_SERVED,
    Guard,
    Refusal,
    Verdict,
    behaviour_of,
    judged,
    question,
    shown,
    unchecked,
)
from .core.step_up import StepUp
from .identity import Caller, current
from .request_id import begin
from .rules import Rule
from .staleness import WhenStale

_log = logging.getLogger("authsvc_client")


class SyncValidator(Protocol):
    """Judges tokens: SyncAuthsvcClient does, by asking authsvc."""

    def validate(
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


class SyncRequireInterceptor(grpc.ServerInterceptor):
    """As RequireInterceptor, for `grpc.server`: enforces the option `(authsvc.v1.require)` of a
    service's own proto; fails closed.

    A handler learns who calls by `caller()`, in the thread that gRPC runs it in. Each check of a
    token takes such a thread for its time. Handlers that are async are refused.
    """

    def __init__(
        self,
        validator: SyncValidator,
        *,
        audience: str,
        services: Iterable[ServiceDescriptor],
        open_services: Iterable[str] = (HEALTH,),
        when_stale: Mapping[str, WhenStale] = MappingProxyType({}),
        now: Callable[[], float] = clock.wall,
    ) -> None:
        """Raises RuleRefused unless every method of `services` has a rule that can be enforced;
        the parameters are those of RequireInterceptor."""
        self._validator, self._now = validator, now
        self._guard = Guard(
            self._behaviour,
            _refusing,
            audience=audience,
            services=services,
            open_services=open_services,
            when_stale=when_stale,
        )

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        return self._guard.handler(handler_call_details.method, handler)

    def _behaviour(self, method: str, rule: Rule, handler: Any) -> Any:
        inner = behaviour_of(handler)
        if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
            _log.error("%s is refused: its handler is async", method)
            return _refusing(NOT_SERVED)
        admit = _admit_anyone if rule.public else functools.partial(self._admit, rule)

        def behaviour(request: Any, context: Any) -> Any:
            # gRPC reads a stream of answers in the thread and the context of this very call.
            begin(context)
            current.set(admit(context))
            return inner(request, context)

        return behaviour

    def _admit(self, rule: Rule, context: Any) -> Caller:
        try:
            answer = self._judge(rule, context)
        except Exception as error:
            answer = unchecked(error)
        if isinstance(answer, Refusal):
            _abort(context, answer)
        return answer

    def _judge(self, rule: Rule, context: Any) -> Caller | Refusal:
        found = shown(context, self._now)
        if isinstance(found, Refusal):
            return found
        verdict = self._validator.validate(found.token, **question(rule, found))
        return judged(verdict, rule, found.token)


def _admit_anyone(_: Any) -> None:
    return None


def _abort(context: Any, refusal: Refusal) -> NoReturn:
    context.set_trailing_metadata(refusal.trailers)
    context.abort(refusal.code, refusal.text)
    raise AssertionError("abort raises")


def _refusing(refusal: Refusal) -> Any:
    def behaviour(_: Any, context: Any) -> NoReturn:
        _abort(context, refusal)

    return behaviour
