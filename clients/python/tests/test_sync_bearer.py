"""sync_bearer(): a token on every blocking call, renewed where that helps, never in the clear."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import grpc_testing
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import (
    AuthsvcError,
    Certificates,
    Pace,
    PermissionDenied,
    Reason,
    SyncTokenSource,
    Token,
    sync_bearer,
    sync_channel,
)
from authsvc_client.client_interceptors import RENEWED_FOR
from authsvc_client.errors import error_trailers

from .support import ManualClock, describe, handlers_of, stub_of
from .sync_support import (
    KINDS,
    THREADS,
    WAIT_S,
    Gate,
    at_once,
    call,
    fail,
    many,
    one,
    own_threads,
    refused,
    serving,
)

SERVICE = describe(dict.fromkeys(KINDS))
Code = grpc.StatusCode


class Fetch:
    """Issues t1, t2, ...; then fails, if it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.failure: Exception | None = None
        self.gate: Gate | None = None

    def __call__(self) -> Token:
        if self.gate is not None:
            self.gate()
        if self.failure is not None:
            raise self.failure
        self.count += 1
        return Token(f"t{self.count}", 100)


class Callee:
    """Keeps what it was shown; refuses the tokens of `refused`."""

    def __init__(self) -> None:
        self.shown: list[list[str]] = []
        self.refused: dict[str, Reason] = {}
        self.metadata: dict[str, str] = {}
        self.code = Code.UNAUTHENTICATED

    def _admit(self, context: Any) -> None:
        values = [v for k, v in context.invocation_metadata() if k == "authorization"]
        self.shown.append(values)
        for value in values:
            reason = self.refused.get(value.removeprefix("Bearer "))
            if reason is not None:
                fail(context, self.code, reason, **self.metadata)

    def one(self, request: Any, context: Any) -> StringValue:
        self._admit(context)
        return one(request, context)

    def many(self, request: Any, context: Any) -> Iterator[StringValue]:
        self._admit(context)
        yield from many(request, context)

    def handlers(self) -> Any:
        methods = {"Get": self.one, "List": self.many, "Put": self.one, "Chat": self.many}
        return handlers_of(SERVICE, methods)


class World:
    """A caller and a callee."""

    def __init__(self) -> None:
        self.callee, self.fetch, self.clock = Callee(), Fetch(), ManualClock()
        self.source = SyncTokenSource(self.fetch, pace=Pace(), now=self.clock, draw=lambda: 0.5)

    @contextmanager
    def open(
        self, server: Certificates, client: Certificates, *, vouched: bool = True
    ) -> Iterator[grpc.Channel]:
        with serving(server, self.callee.handlers()) as target, self.source:
            if vouched:
                opened = sync_channel(target, client, token_source=self.source)
            else:
                opened = sync_channel(target, client, interceptors=sync_bearer(self.source))
            with opened:
                yield opened
            if self.fetch.gate is not None:
                self.fetch.gate.opened.set()
        assert own_threads() == []


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=[True, False], ids=["metadata", "call credentials"])
def opened(
    world: World,
    request: pytest.FixtureRequest,
    server_certificates: Certificates,
    client_certificates: Certificates,
) -> Iterator[grpc.Channel]:
    with world.open(server_certificates, client_certificates, vouched=request.param) as channel:
        yield channel


@pytest.mark.parametrize("name", KINDS)
def test_call_carries_the_token(world: World, opened: grpc.Channel, name: str) -> None:
    for _ in range(3):
        assert call(opened, SERVICE, name, timeout=5) == "hello"
    assert world.callee.shown == [["Bearer t1"]] * 3
    assert world.fetch.count == 1


def test_call_keeps_its_other_metadata(
    world: World, server_certificates: Certificates, client_certificates: Certificates
) -> None:
    seen: list[Any] = []

    def get(request: StringValue, context: Any) -> StringValue:
        seen.extend(value for key, value in context.invocation_metadata() if key == "x-a")
        return request

    with (
        serving(server_certificates, handlers_of(SERVICE, {"Get": get})) as target,
        world.source,
        sync_channel(target, client_certificates, token_source=world.source) as opened,
    ):
        call(opened, SERVICE, "Get", timeout=5, metadata=(("x-a", "1"), ("x-a", "2")))
    assert seen == ["1", "2"]


@pytest.mark.parametrize("name", KINDS)
def test_call_with_an_authorization_of_its_own_is_left_alone(
    world: World, opened: grpc.Channel, name: str
) -> None:
    world.callee.refused = {"mine": Reason.TOKEN_REVOKED}
    metadata = (("authorization", "Bearer mine"),)
    error = refused(opened, SERVICE, name, timeout=5, metadata=metadata)
    assert error.reason is Reason.TOKEN_REVOKED
    assert (world.callee.shown, world.fetch.count) == ([["Bearer mine"]], 0)


@pytest.mark.parametrize("reason", sorted(RENEWED_FOR), ids=lambda reason: reason.name)
def test_refused_token_is_renewed_and_the_call_sent_once_more(
    world: World, opened: grpc.Channel, reason: Reason
) -> None:
    world.callee.refused = {"t1": reason}
    assert call(opened, SERVICE, "Get", timeout=5) == "hello"
    assert world.callee.shown == [["Bearer t1"], ["Bearer t2"]]


def test_call_sent_once_more_answers_its_metadata_as_well(
    world: World, opened: grpc.Channel
) -> None:
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    response, made = stub_of(opened, SERVICE, "Get").with_call(StringValue(value="a"), timeout=5)
    assert (response.value, made.code(), len(world.callee.shown)) == ("a", Code.OK, 2)


def test_call_refused_again_is_not_sent_a_third_time_and_makes_no_storm(
    world: World, opened: grpc.Channel
) -> None:
    world.callee.refused = {f"t{n}": Reason.TOKEN_REVOKED for n in range(99)}
    assert refused(opened, SERVICE, "Get", timeout=5).reason is Reason.TOKEN_REVOKED
    assert world.callee.shown == [["Bearer t1"], ["Bearer t2"]]
    for _ in range(20):
        refused(opened, SERVICE, "Get", timeout=5)
    assert world.fetch.count == 2


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (Code.UNAUTHENTICATED, Reason.TOKEN_MALFORMED),
        (Code.UNAUTHENTICATED, Reason.TOKEN_MISSING),
        (Code.FAILED_PRECONDITION, Reason.TOKEN_REVOKED),
        (Code.PERMISSION_DENIED, Reason.INSUFFICIENT_SCOPE),
    ],
)
def test_other_refusals_are_not_repeated(
    world: World, opened: grpc.Channel, code: grpc.StatusCode, reason: Reason
) -> None:
    world.callee.refused, world.callee.code = {"t1": reason}, code
    assert refused(opened, SERVICE, "Get", timeout=5).reason is reason
    assert (world.callee.shown, world.fetch.count) == ([["Bearer t1"]], 1)


@pytest.mark.parametrize(("verdict", "times"), [("TOKEN_REVOKED", 2), ("TOKEN_MALFORMED", 1)])
def test_authsvcs_own_refusal_counts_by_its_verdict(
    world: World, opened: grpc.Channel, verdict: str, times: int
) -> None:
    world.callee.refused = {"t1": Reason.CALLER_TOKEN_INVALID}
    world.callee.metadata = {"verdict": verdict}
    try:
        call(opened, SERVICE, "Get", timeout=5)
    except grpc.RpcError:
        assert times == 1
    assert len(world.callee.shown) == times


@pytest.mark.parametrize("name", KINDS[1:])
def test_refused_stream_is_not_sent_again_but_the_next_call_has_another_token(
    world: World, opened: grpc.Channel, name: str
) -> None:
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    error = refused(opened, SERVICE, name, timeout=5)
    assert error.reason is Reason.TOKEN_REVOKED
    assert world.callee.shown == [["Bearer t1"]]
    assert call(opened, SERVICE, name, timeout=5) == "hello"
    assert world.callee.shown[1:] == [["Bearer t2"]]


@pytest.mark.parametrize("name", ["Get", "Put"])
@pytest.mark.parametrize("way", ["result", "exception", "callback"])
def test_refused_future_renews_the_token_however_its_end_is_learned(
    world: World, opened: grpc.Channel, name: str, way: str
) -> None:
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    sent: Any = StringValue() if name == "Get" else iter(())
    future = stub_of(opened, SERVICE, name).future(sent, timeout=5)
    if way == "callback":
        told: list[Any] = []
        ended = threading.Event()

        def tell(it: Any) -> None:
            told.append(it.exception())
            ended.set()

        future.add_done_callback(tell)
        assert ended.wait(WAIT_S)
        failure = told[0]
    elif way == "exception":
        failure = future.exception(timeout=WAIT_S)
    else:
        with pytest.raises(grpc.RpcError) as caught:
            future.result(WAIT_S)
        failure = caught.value
    assert AuthsvcError.from_rpc_error(failure).reason is Reason.TOKEN_REVOKED
    assert call(opened, SERVICE, name, timeout=5) == "hello"
    assert world.callee.shown[-1] == ["Bearer t2"]


@pytest.mark.parametrize("name", KINDS)
def test_no_token_to_be_had_is_an_rpc_error_with_its_reason(
    world: World, opened: grpc.Channel, name: str
) -> None:
    world.fetch.failure = PermissionDenied("secret detail", reason=Reason.CLIENT_SUSPENDED)
    error = refused(opened, SERVICE, name, timeout=5)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.CLIENT_SUSPENDED)
    assert error.retry_after_s is not None
    assert "secret" not in str(error)
    assert world.callee.shown == []


def test_no_token_to_be_had_fails_a_future_as_grpc_would(
    world: World, opened: grpc.Channel
) -> None:
    world.fetch.failure = PermissionDenied("no", reason=Reason.CLIENT_SUSPENDED)
    future = stub_of(opened, SERVICE, "Get").future(StringValue(), timeout=5)
    told: list[Any] = []
    future.add_done_callback(told.append)
    assert (told, future.done(), future.code()) == ([future], True, Code.UNAVAILABLE)
    assert future.exception() is future
    with pytest.raises(grpc.RpcError):
        future.result()


def test_refused_call_whose_token_cannot_be_renewed_keeps_its_answer(
    world: World, opened: grpc.Channel
) -> None:
    call(opened, SERVICE, "Get", timeout=5)
    world.callee.refused = {"t1": Reason.TOKEN_CUT_OFF}
    world.fetch.failure = PermissionDenied("no", reason=Reason.CLIENT_SUSPENDED)
    error = refused(opened, SERVICE, "Get", timeout=5)
    assert error.reason is Reason.TOKEN_CUT_OFF


def test_failing_renewal_fails_no_call_while_the_old_token_lives(
    world: World, opened: grpc.Channel
) -> None:
    call(opened, SERVICE, "Get", timeout=5)
    world.fetch.failure = OSError("authsvc is down")
    world.clock.now += 60
    for _ in range(5):
        assert call(opened, SERVICE, "Get", timeout=5) == "hello"
    assert set(map(tuple, world.callee.shown)) == {("Bearer t1",)}


@pytest.mark.parametrize("name", KINDS)
def test_wait_for_a_token_ends_with_the_deadline_of_the_call(
    world: World, opened: grpc.Channel, name: str
) -> None:
    world.fetch.gate = Gate()
    error = refused(opened, SERVICE, name, timeout=0.02)
    assert error.code is Code.DEADLINE_EXCEEDED
    assert world.callee.shown == []


def test_call_sent_once_more_has_what_is_left_of_its_time(
    world: World, server_certificates: Certificates, client_certificates: Certificates
) -> None:
    timeouts: list[float] = []

    class Notes(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(
            self, continuation: Any, client_call_details: Any, request: Any
        ) -> Any:
            timeouts.append(client_call_details.timeout)
            return continuation(client_call_details, request)

    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    inner: list[Any] = [*sync_bearer(world.source, tls=True), Notes()]
    with (
        serving(server_certificates, world.callee.handlers()) as target,
        world.source,
        sync_channel(target, client_certificates, interceptors=inner) as opened,
    ):
        call(opened, SERVICE, "Get", timeout=5)
    first, second = timeouts
    assert 0 < second < first < 5


@pytest.mark.parametrize("name", ["List", "Chat"])
def test_stream_that_its_caller_dropped_is_cancelled_at_the_callee(
    world: World, server_certificates: Certificates, client_certificates: Certificates, name: str
) -> None:
    """As it is without the interceptor."""
    ended = threading.Event()

    def lists(_: Any, context: Any) -> Iterator[StringValue]:
        context.add_callback(ended.set)
        while not ended.is_set():
            yield StringValue(value="a")

    gate = Gate()

    def sent() -> Iterator[StringValue]:
        gate()
        yield from ()

    with (
        serving(server_certificates, handlers_of(SERVICE, {name: lists})) as target,
        world.source,
        sync_channel(target, client_certificates, token_source=world.source) as opened,
    ):
        stream = stub_of(opened, SERVICE, name)(StringValue() if name == "List" else sent())
        assert next(stream).value == "a"
        del stream
        gc.collect()
        assert ended.wait(WAIT_S)
        gate.opened.set()


@pytest.mark.parametrize("name", KINDS)
def test_token_does_not_travel_in_the_clear(world: World, name: str) -> None:
    with (
        serving(None, world.callee.handlers()) as target,
        world.source,
        grpc.insecure_channel(target) as plain,
    ):
        opened = grpc.intercept_channel(plain, *sync_bearer(world.source))
        error = refused(opened, SERVICE, name, timeout=5)
    assert error.code is Code.UNAUTHENTICATED
    assert world.callee.shown == []


def test_call_credentials_of_the_call_itself_are_kept(
    world: World, server_certificates: Certificates, client_certificates: Certificates
) -> None:
    seen: list[Any] = []

    def get(request: StringValue, context: Any) -> StringValue:
        names = ("x-own", "authorization")
        seen.extend(pair for pair in context.invocation_metadata() if pair[0] in names)
        return request

    class Own(grpc.AuthMetadataPlugin):
        def __call__(self, _: Any, callback: Any) -> None:
            callback((("x-own", "1"),), None)

    credentials = grpc.metadata_call_credentials(Own())
    bearer = sync_bearer(world.source)
    with (
        serving(server_certificates, handlers_of(SERVICE, {"Get": get})) as target,
        world.source,
        sync_channel(target, client_certificates, interceptors=bearer) as opened,
    ):
        call(opened, SERVICE, "Get", timeout=5, credentials=credentials)
    assert sorted(seen) == [("authorization", "Bearer t1"), ("x-own", "1")]


@pytest.mark.parametrize("name", KINDS)
def test_threads_at_once_share_a_token_and_its_replacement(
    world: World, opened: grpc.Channel, name: str
) -> None:
    if name != "Get":  # streams are not sent again, so the token is replaced beforehand
        world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
        refused(opened, SERVICE, name, timeout=5)
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    answers = at_once(lambda _: [call(opened, SERVICE, name, timeout=WAIT_S) for _ in range(5)])
    assert answers == [["hello"] * 5] * THREADS
    assert world.fetch.count == 2


# --- with grpcio-testing -------------------------------------------------------------------------

TYPES = {
    "Get": "unary_unary",
    "List": "unary_stream",
    "Put": "stream_unary",
    "Chat": "stream_stream",
}


def intercepted(world: World, fake: Any, name: str) -> Any:
    """A call by `future()` or of a stream; grpc.intercept_channel does not take such a channel."""
    made = stub_of(fake, SERVICE, name)
    send = made.future if name in {"Get", "Put"} else made

    def continuation(details: Any, request: Any) -> Any:
        call = send(request, timeout=details.timeout, metadata=details.metadata)
        call.done = lambda: False  # which grpcio-testing cannot say
        return call

    (bearer,) = sync_bearer(world.source, tls=True)
    details = SimpleNamespace(
        method=name,
        timeout=None,
        metadata=(("x-a", "1"),),
        credentials=None,
        wait_for_ready=None,
        compression=None,
    )
    request: Any = StringValue() if name in {"Get", "List"} else iter(())
    return getattr(bearer, f"intercept_{TYPES[name]}")(continuation, details, request)


def taken(fake: Any, name: str) -> tuple[Any, Any]:
    """Metadata of a call that arrived, and its server."""
    method = SERVICE.methods_by_name[name]
    metadata, *_, server = getattr(fake, f"take_{TYPES[name]}")(method)
    server.send_initial_metadata(())
    return metadata, server


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_call_carries_the_token_over_a_channel_of_grpcio_testing(
    world: World, name: str
) -> None:
    fake = grpc_testing.channel([SERVICE], grpc_testing.strict_real_time())
    with world.source:
        made = intercepted(world, fake, name)
        metadata, server = taken(fake, name)
        assert {("x-a", "1"), ("authorization", "Bearer t1")} <= set(metadata)
        if name in {"Get", "Put"}:
            server.terminate(StringValue(value="hello"), (), Code.OK, "")
            assert made.result().value == "hello"
        else:
            server.send_response(StringValue(value="hello"))
            server.terminate((), Code.OK, "")
            assert [response.value for response in made] == ["hello"]


@pytest.mark.parametrize("name", KINDS)
def test_refusal_over_a_channel_of_grpcio_testing_renews_the_token(world: World, name: str) -> None:
    fake = grpc_testing.channel([SERVICE], grpc_testing.strict_real_time())
    trailers = error_trailers(Code.UNAUTHENTICATED, "no", Reason.TOKEN_REVOKED)
    with world.source:
        for token in ("t1", "t2"):
            made = intercepted(world, fake, name)
            metadata, server = taken(fake, name)
            assert ("authorization", f"Bearer {token}") in metadata
            nothing = (None,) if name in {"Get", "Put"} else ()
            server.terminate(*nothing, trailers, Code.UNAUTHENTICATED, "no")
            with pytest.raises(grpc.RpcError):
                made.result() if nothing else list(made)
