"""Tokens on calls: a server interceptor that asks each caller for one."""

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
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


class Validator(Protocol):
    """Judges tokens: LocalValidator in this process, AuthsvcClient by asking authsvc."""

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
        when_stale: Mapping[str, WhenStale] = MappingProxyType({}),
        now: Callable[[], float] = clock.wall,
    ) -> None:
        """Raises RuleRefused unless every method of `services` has a rule that can be enforced.

        `audience` is the resource id of this server, for rules that name none. Services in
        `open_services` (reflection, say) ask for no token; any other one refuses all calls.
        `when_stale` is for a LocalValidator, by method (`/package.Service/Method`) or by scope.
        """
        self._validator, self._now = validator, now
        self._guard = Guard(
            self._behaviour,
            _refusing,
            audience=audience,
            services=services,
            open_services=open_services,
            when_stale=when_stale,
        )

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        return self._guard.handler(handler_call_details.method, handler)

    def _behaviour(self, method: str, rule: Rule, handler: Any) -> Any:
        inner = behaviour_of(handler)
        admit = _admit_anyone if rule.public else functools.partial(self._admit, rule)
        if inspect.isasyncgenfunction(inner):

            async def yields(request: Any, context: Any) -> AsyncIterator[Any]:
                begin(context)
                current.set(await admit(context))
                async with aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        yield response

            return yields
        if inspect.iscoroutinefunction(inner):

            async def returns(request: Any, context: Any) -> Any:
                begin(context)
                current.set(await admit(context))
                return await inner(request, context)

            return returns
        _log.error("%s is refused: its handler is not async", method)
        return _refusing(NOT_SERVED)

    async def _admit(self, rule: Rule, context: Any) -> Caller:
        try:
            answer = await self._judge(rule, context)
        except Exception as error:
            answer = unchecked(error)
        if isinstance(answer, Refusal):
            await _abort(context, answer)
        return answer

    async def _judge(self, rule: Rule, context: Any) -> Caller | Refusal:
        found = shown(context, self._now)
        if isinstance(found, Refusal):
            return found
        verdict = await self._validator.validate(found.token, **question(rule, found))
        return judged(verdict, rule, found.token)


async def _admit_anyone(_: Any) -> None:
    return None


async def _abort(context: Any, refusal: Refusal) -> NoReturn:
    await context.abort(refusal.code, refusal.text, refusal.trailers)
    raise AssertionError("abort raises")


def _refusing(refusal: Refusal) -> Any:
    async def behaviour(_: Any, context: Any) -> NoReturn:
        await _abort(context, refusal)

    return behaviour
