"""SyncRequireInterceptor: what RequireInterceptor enforces, on `grpc.server` and its threads."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import grpc_testing
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import (
    Caller,
    Certificates,
    Reason,
    RuleRefused,
    SyncRequireInterceptor,
    caller,
    sync_channel,
)
from authsvc_client.v1.annotations_pb2 import Require

from .support import AUDIENCE, Pki, describe, handlers_of, inactive, stub_of, verdict
from .sync_support import (
    BEHAVIOURS,
    KINDS,
    THREADS,
    WAIT_S,
    Gate,
    SyncAuthsvc,
    at_once,
    call,
    fail,
    many,
    one,
    refused,
    running_authsvc,
    serving,
)

Code = grpc.StatusCode
BEHAVIOURS_OF = {name: {name: BEHAVIOURS[name]} for name in KINDS}


@pytest.fixture
def authsvc(
    server_certificates: Certificates, client_certificates: Certificates
) -> Iterator[SyncAuthsvc]:
    with running_authsvc(server_certificates, client_certificates) as running:
        yield running


@contextmanager
def guarded(
    validator: Any,
    server: Certificates,
    client: Certificates,
    service: ServiceDescriptor,
    behaviours: dict[str, Any],
    **settings: Any,
) -> Iterator[grpc.Channel]:
    """A user's service behind the interceptor, and a channel to it."""
    settings = {"audience": AUDIENCE, "services": [service]} | settings
    interceptor = SyncRequireInterceptor(validator, **settings)
    handlers = handlers_of(service, behaviours)
    with (
        serving(server, handlers, interceptors=[interceptor]) as target,
        sync_channel(target, client) as opened,
    ):
        yield opened


@pytest.fixture
def guard(authsvc: SyncAuthsvc, server_certificates: Certificates) -> Any:
    """`guarded`, which asks authsvc."""

    def opened(service: ServiceDescriptor, behaviours: dict[str, Any], **settings: Any) -> Any:
        client = settings.pop("client", authsvc.certificates)
        return guarded(authsvc.client, server_certificates, client, service, behaviours, **settings)

    return opened


def shown(*values: str) -> dict[str, Any]:
    return {"timeout": WAIT_S, "metadata": tuple(("authorization", value) for value in values)}


class Answers:
    """A validator without an authsvc."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def validate(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


# --- at the start --------------------------------------------------------------------------------


def test_method_without_a_rule_refuses_to_start() -> None:
    service = describe({"GetFirst": Require(public=True), "Get": None})
    with pytest.raises(RuleRefused):
        SyncRequireInterceptor(Answers(None), audience=AUDIENCE, services=[service])


def test_no_audience_refuses_to_start() -> None:
    with pytest.raises(ValueError, match="audience"):
        SyncRequireInterceptor(Answers(None), audience="", services=[])


# --- each call -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_call_with_a_good_token_passes(authsvc: SyncAuthsvc, guard: Any, name: str) -> None:
    authsvc.fake.verdicts["good"] = verdict("read")
    rule = Require(
        scopes=["read"], permissions=["p"], acr=["gold"], max_age=Duration(seconds=9), mtls=True
    )
    service = describe({name: rule})
    with guard(service, BEHAVIOURS_OF[name]) as opened:
        for _ in range(2):
            assert call(opened, service, name, **shown("Bearer good")) == "hello"
    asked, _ = authsvc.fake.validated
    assert (asked.token, asked.audience, asked.require_bound) == ("good", AUDIENCE, True)
    assert (list(asked.required_scopes), list(asked.required_permissions)) == (["read"], ["p"])
    assert (list(asked.acr_values), asked.max_age.seconds) == (["gold"], 9)
    assert len(asked.presenter.certificate_thumbprint) == 43


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "values", [(), ("Bearer good", "Bearer good"), ("",), ("good",), ("Basic good",)], ids=str
)
def test_call_without_exactly_one_bearer_token_is_refused(
    authsvc: SyncAuthsvc, guard: Any, name: str, values: tuple[str, ...]
) -> None:
    ran: list[bool] = []

    def behaviour(*_: Any) -> Any:
        ran.append(True)

    service = describe({name: Require(scopes=["read"])})
    with guard(service, {name: behaviour}) as opened:
        error = refused(opened, service, name, **shown(*values))
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.TOKEN_MISSING)
    assert (authsvc.fake.validated, ran) == ([], [])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.TOKEN_REVOKED, Code.UNAUTHENTICATED),
        (Reason.TOKEN_EXPIRED, Code.UNAUTHENTICATED),
        (Reason.INSUFFICIENT_SCOPE, Code.PERMISSION_DENIED),
        (Reason.INSUFFICIENT_PERMISSIONS, Code.PERMISSION_DENIED),
        (Reason.INSUFFICIENT_USER_AUTHENTICATION, Code.PERMISSION_DENIED),
    ],
)
def test_inactive_token_is_refused_with_its_reason(
    authsvc: SyncAuthsvc, guard: Any, name: str, reason: Reason, code: grpc.StatusCode
) -> None:
    authsvc.fake.verdicts["bad"] = inactive(reason)
    service = describe({name: Require()})
    with guard(service, BEHAVIOURS_OF[name]) as opened:
        error = refused(opened, service, name, **shown("Bearer bad"))
    assert (error.code, error.reason) == (code, reason)


@pytest.mark.parametrize("name", KINDS)
def test_authsvc_down_refuses_and_tells_nothing(
    authsvc: SyncAuthsvc, guard: Any, name: str, caplog: Any
) -> None:
    authsvc.service.before = lambda _, context: fail(
        context, Code.PERMISSION_DENIED, Reason.CALLER_UNKNOWN, "password=hunter2"
    )
    service = describe({name: Require()})
    with (
        caplog.at_level(logging.WARNING, "authsvc_client"),
        guard(service, BEHAVIOURS_OF[name]) as opened,
    ):
        error = refused(opened, service, name, **shown("Bearer good"))
    assert (error.code, error.message) == (Code.UNAVAILABLE, "the token could not be checked")
    assert error.reason is Reason.STATE_STALE
    assert "CALLER_UNKNOWN" in caplog.text
    assert "good" not in caplog.text


@pytest.mark.parametrize(
    "answer", [RuntimeError("password=hunter2"), TimeoutError(), None, "yes"], ids=repr
)
def test_validator_that_breaks_refuses_and_tells_nothing(
    server_certificates: Certificates, client_certificates: Certificates, answer: Any
) -> None:
    service = describe({"Get": Require()})
    validator, behaviours = Answers(answer), BEHAVIOURS_OF["Get"]
    with guarded(
        validator, server_certificates, client_certificates, service, behaviours
    ) as opened:
        error = refused(opened, service, "Get", **shown("Bearer good"))
    assert (error.code, error.message) == (Code.UNAVAILABLE, "the token could not be checked")


def test_certificate_that_ran_out_on_an_open_connection_is_refused(
    authsvc: SyncAuthsvc, guard: Any, pki: Pki
) -> None:
    service = describe({"Get": Require()})
    settings = {"now": lambda: 4_000_000_000.0, "client": pki.issue("brief")}
    with guard(service, BEHAVIOURS_OF["Get"], **settings) as opened:
        error = refused(opened, service, "Get", **shown("Bearer good"))
    assert error.reason is Reason.PEER_CERTIFICATE_EXPIRED
    assert authsvc.fake.validated == []


def test_call_without_tls_shows_no_proof(authsvc: SyncAuthsvc) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require()})
    interceptor = SyncRequireInterceptor(authsvc.client, audience=AUDIENCE, services=[service])
    handlers = handlers_of(service, BEHAVIOURS_OF["Get"])
    with (
        serving(None, handlers, interceptors=[interceptor]) as target,
        grpc.insecure_channel(target) as opened,
    ):
        assert call(opened, service, "Get", **shown("Bearer good")) == "hello"
    assert not authsvc.fake.validated[0].HasField("presenter")


@pytest.mark.parametrize("name", KINDS)
def test_public_method_asks_for_nothing_and_has_no_caller(
    authsvc: SyncAuthsvc, guard: Any, name: str
) -> None:
    nobody: list[bool] = []

    def noted(request: Any, context: Any) -> Any:
        with pytest.raises(LookupError):
            caller()
        nobody.append(True)
        return BEHAVIOURS[name](request, context)

    service = describe({name: Require(public=True)})
    with guard(service, {name: noted}) as opened:
        assert call(opened, service, name, **shown("Bearer bad")) == "hello"
    assert (nobody, authsvc.fake.validated) == ([True], [])


# --- services that it was not told about ---------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_service_that_was_not_named_is_refused(authsvc: SyncAuthsvc, guard: Any, name: str) -> None:
    ran: list[bool] = []

    def behaviour(*_: Any) -> Any:
        ran.append(True)

    authsvc.fake.verdicts["good"] = verdict()
    told, untold = describe({"Get": Require()}), describe({name: Require(public=True)})
    with guard(untold, {name: behaviour}, services=[told]) as opened:
        error = refused(opened, untold, name, **shown("Bearer good"))
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.CALLER_UNKNOWN)
    assert (authsvc.fake.validated, ran) == ([], [])


def test_open_service_passes(guard: Any) -> None:
    service = describe({"Get": None})
    with guard(
        service, BEHAVIOURS_OF["Get"], services=[], open_services=[service.full_name]
    ) as opened:
        assert call(opened, service, "Get", timeout=WAIT_S) == "hello"


@pytest.mark.parametrize("health_open", [True, False])
def test_health_is_open_unless_it_is_taken_out(
    authsvc: SyncAuthsvc, server_certificates: Certificates, health_open: bool
) -> None:
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda *_: b"ok")
    health = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})
    settings: dict[str, Any] = {} if health_open else {"open_services": ()}
    interceptor = SyncRequireInterceptor(authsvc.client, audience=AUDIENCE, services=[], **settings)
    with (
        serving(server_certificates, health, interceptors=[interceptor]) as target,
        sync_channel(target, authsvc.certificates) as opened,
    ):
        check: Any = opened.unary_unary("/grpc.health.v1.Health/Check")
        if health_open:
            assert check(b"", timeout=WAIT_S) == b"ok"
        else:
            with pytest.raises(grpc.RpcError) as caught:
                check(b"", timeout=WAIT_S)
            assert caught.value.code() is Code.UNAUTHENTICATED


def test_method_that_does_not_exist_is_unimplemented(guard: Any) -> None:
    service = describe({"Get": Require(), "GetAway": Require()})
    with guard(service, BEHAVIOURS_OF["Get"]) as opened:
        assert refused(opened, service, "GetAway", timeout=WAIT_S).code is Code.UNIMPLEMENTED


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("public", [True, False])
def test_handler_that_is_async_is_refused(guard: Any, name: str, public: bool) -> None:
    async def one_answer(request: Any, _: Any) -> Any:
        return request

    async def answers(request: Any, _: Any) -> Any:
        yield request

    service = describe({name: Require(public=public)})
    behaviour = answers if name in {"List", "Chat"} else one_answer
    with guard(service, {name: behaviour}) as opened:
        error = refused(opened, service, name, **shown("Bearer good"))
    assert (error.code, error.reason) == (Code.INTERNAL, Reason.INTERNAL)


# --- what a handler sees -------------------------------------------------------------------------


def test_handler_learns_who_calls(authsvc: SyncAuthsvc, guard: Any) -> None:
    seen: list[Caller] = []

    def get(request: StringValue, _: Any) -> StringValue:
        seen.append(caller())
        return request

    authsvc.fake.verdicts["good"] = verdict("read", subject="ann")
    service = describe({"Get": Require()})
    with guard(service, {"Get": get}) as opened:
        call(opened, service, "Get", **shown("Bearer good"))
    (found,) = seen
    assert (found.subject, found.client_id, found.token) == ("ann", "orders", "good")
    with pytest.raises(LookupError):
        caller()


@pytest.mark.parametrize("name", KINDS)
def test_callers_of_calls_at_once_are_not_mixed_up(
    authsvc: SyncAuthsvc, guard: Any, name: str
) -> None:
    """Also not by calls that follow in the same thread, and while a stream is read."""
    arrived = threading.Barrier(THREADS, timeout=WAIT_S)

    def answers(request: Any, context: Any) -> StringValue:
        before = caller().subject
        one(request, context)
        arrived.wait()
        assert before == caller().subject
        return StringValue(value=before)

    def yields(request: Any, context: Any) -> Iterator[StringValue]:
        yield answers(request, context)
        arrived.wait()
        yield StringValue(value="/" + caller().subject)

    streams = name in {"List", "Chat"}
    service = describe({name: Require()})
    for number in range(THREADS):
        authsvc.fake.verdicts[f"t{number}"] = verdict(subject=f"s{number}")
    with guard(service, {name: yields if streams else answers}) as opened:
        for shift in range(3):
            numbers = [(n + shift) % THREADS for n in range(THREADS)]
            answered = at_once(
                lambda n, them=numbers: call(  # type: ignore[misc]
                    opened, service, name, **shown(f"Bearer t{them[n]}")
                )
            )
            assert answered == [f"s{n}/s{n}" if streams else f"s{n}" for n in numbers]


def test_caller_of_an_earlier_call_is_not_that_of_a_public_one(
    authsvc: SyncAuthsvc, server_certificates: Certificates
) -> None:
    """One thread serves both."""
    seen: list[str] = []

    def get(request: StringValue, _: Any) -> StringValue:
        try:
            seen.append(caller().subject)
        except LookupError:
            seen.append("nobody")
        return request

    authsvc.fake.verdicts["good"] = verdict(subject="ann")
    service = describe({"Get": Require(), "GetOpen": Require(public=True)})
    interceptor = SyncRequireInterceptor(authsvc.client, audience=AUDIENCE, services=[service])
    handlers = handlers_of(service, {"Get": get, "GetOpen": get})
    with (
        serving(server_certificates, handlers, interceptors=[interceptor], threads=1) as target,
        sync_channel(target, authsvc.certificates) as opened,
    ):
        call(opened, service, "Get", **shown("Bearer good"))
        call(opened, service, "GetOpen", timeout=WAIT_S)
    assert seen == ["ann", "nobody"]


def test_abort_of_a_handler_passes_as_it_is(authsvc: SyncAuthsvc, guard: Any) -> None:
    def get(_: Any, context: Any) -> None:
        fail(context, Code.NOT_FOUND, Reason.CLIENT_NOT_FOUND, "own text")

    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require()})
    with guard(service, {"Get": get}) as opened:
        error = refused(opened, service, "Get", **shown("Bearer good"))
    assert (error.code, error.message) == (Code.NOT_FOUND, "own text")
    assert error.reason is Reason.CLIENT_NOT_FOUND


@pytest.mark.parametrize("name", ["List", "Chat"])
def test_cancelled_stream_closes_its_handler(authsvc: SyncAuthsvc, guard: Any, name: str) -> None:
    closed, gate = threading.Event(), Gate()

    def yields(_: Any, context: Any) -> Iterator[StringValue]:
        context.add_callback(gate.opened.set)
        try:
            yield StringValue(value="first")
            gate()
            yield StringValue(value="never read")
        finally:
            closed.set()

    sent: Any = StringValue()
    if name == "Chat":
        sent = iter(lambda: gate.opened.wait(WAIT_S), True)
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({name: Require()})
    with guard(service, {name: yields}) as opened:
        running = stub_of(opened, service, name)(sent, **shown("Bearer good"))
        assert next(running).value == "first"
        running.cancel()
        assert closed.wait(WAIT_S)


# --- with grpcio-testing -------------------------------------------------------------------------


class WithoutTls:
    """A context of grpcio-testing, which cannot say how a call came."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("good", [True, False])
def test_every_kind_of_handler_is_guarded_in_a_server_of_grpcio_testing(
    authsvc: SyncAuthsvc, name: str, good: bool
) -> None:
    authsvc.fake.verdicts["good"] = verdict(subject="ann")
    seen: list[str] = []

    def noted(request: Any, context: Any) -> Any:
        if name in {"Get", "Put"}:
            seen.append(caller().subject)
            return one(request, context)
        return streamed(request, context)

    def streamed(request: Any, context: Any) -> Iterator[StringValue]:
        for response in many(request, context):
            seen.append(caller().subject)
            yield response

    service = describe({name: Require()})
    method = service.methods_by_name[name]
    interceptor = SyncRequireInterceptor(authsvc.client, audience=AUDIENCE, services=[service])
    details = SimpleNamespace(method=f"/{service.full_name}/{name}")
    handler = handlers_of(service, {name: noted}).service(details)
    guarded_handler = interceptor.intercept_service(lambda _: handler, details)
    kinds = {"Get": "unary_unary", "List": "unary_stream", "Put": "stream_unary"}
    kind = kinds.get(name, "stream_stream")

    class Servicer:
        pass

    behaviour = getattr(guarded_handler, kind)
    setattr(Servicer, name, lambda _, request, context: behaviour(request, WithoutTls(context)))
    server = grpc_testing.server_from_dictionary(
        {service: Servicer()}, grpc_testing.strict_real_time()
    )
    metadata = (("authorization", "Bearer good" if good else "Bearer bad"),)
    hello, streams = StringValue(value="hello"), name in {"Put", "Chat"}
    arguments = (metadata, None) if streams else (metadata, hello, None)
    made = getattr(server, f"invoke_{kind}")(method, *arguments)
    if streams and good:
        made.send_request(hello)
        made.requests_closed()
    if name in {"Get", "Put"}:
        response, _, code, text = made.termination()
        answered = [response] if code is Code.OK else []
    else:
        answered = [made.take_response()] if good else []
        _, code, text = made.termination()
    if good:
        assert (code, answered, seen) == (Code.OK, [hello], ["ann"])
    else:
        # It loses the trailers of what is aborted.
        assert (code, text, answered) == (Code.UNAUTHENTICATED, "the token is not good here", [])
        assert seen == []
