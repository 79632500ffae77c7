"""bearer(): a token on every call, renewed where that helps, never in the clear."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import (
    Certificates,
    Pace,
    PermissionDenied,
    Reason,
    Token,
    TokenSource,
    bearer,
    channel,
)
from authsvc_client.client_interceptors import RENEWED_FOR

from .support import Gate, ManualClock, call, describe, fail, handlers_of, refused, serving, stub_of

KINDS = ("Get", "List", "Put", "Chat")
SERVICE = describe(dict.fromkeys(KINDS))


class Fetch:
    """Issues t1, t2, ...; then fails, if it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.failure: Exception | None = None
        self.gate: Gate | None = None

    async def __call__(self) -> Token:
        if self.gate is not None:
            await self.gate()
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
        self.code = grpc.StatusCode.UNAUTHENTICATED

    async def _admit(self, context: Any) -> None:
        values = [v for k, v in context.invocation_metadata() if k == "authorization"]
        self.shown.append(values)
        for value in values:
            reason = self.refused.get(value.removeprefix("Bearer "))
            if reason is not None:
                await fail(context, self.code, reason, **self.metadata)

    async def one(self, request: Any, context: Any) -> StringValue:
        await self._admit(context)
        if isinstance(request, StringValue):
            return request
        return StringValue(value="".join([item.value async for item in request]))

    async def many(self, request: Any, context: Any) -> AsyncIterator[StringValue]:
        await self._admit(context)
        if isinstance(request, StringValue):
            yield request
        else:
            async for item in request:
                yield item

    def handlers(self) -> Any:
        methods = {"Get": self.one, "List": self.many, "Put": self.one, "Chat": self.many}
        return handlers_of(SERVICE, methods)


class Watched(TokenSource):
    """Says when a token was invalidated, which a stream's end sets off."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.invalidated = asyncio.Event()

    def invalidate(self, token: str) -> None:
        super().invalidate(token)
        self.invalidated.set()


class World:
    """A caller and a callee."""

    def __init__(self) -> None:
        self.callee, self.fetch, self.clock = Callee(), Fetch(), ManualClock()
        self.source = Watched(self.fetch, pace=Pace(), now=self.clock, draw=lambda: 0.5)

    @asynccontextmanager
    async def open(
        self, server: Certificates, client: Certificates, *, vouched: bool = True
    ) -> AsyncIterator[grpc.aio.Channel]:
        async with serving(server, self.callee.handlers()) as target, self.source:
            if vouched:
                opened = channel(target, client, token_source=self.source)
            else:
                opened = channel(target, client, interceptors=bearer(self.source))
            async with opened:
                yield opened


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=[True, False], ids=["metadata", "call credentials"])
async def opened(
    world: World,
    request: pytest.FixtureRequest,
    server_certificates: Certificates,
    client_certificates: Certificates,
) -> AsyncIterator[grpc.aio.Channel]:
    async with world.open(
        server_certificates, client_certificates, vouched=request.param
    ) as channel_:
        yield channel_


@pytest.mark.parametrize("name", KINDS)
async def test_call_carries_the_token(world: World, opened: grpc.aio.Channel, name: str) -> None:
    for _ in range(3):
        assert await call(opened, SERVICE, name, timeout=5) == "hello"
    assert world.callee.shown == [["Bearer t1"]] * 3
    assert world.fetch.count == 1


async def test_call_keeps_its_other_metadata(world: World, opened: grpc.aio.Channel) -> None:
    metadata = (("x-a", "1"), ("x-a", "2"))
    method = stub_of(opened, SERVICE, "Get")
    await method(StringValue(), timeout=5, metadata=metadata)
    assert world.callee.shown == [["Bearer t1"]]


@pytest.mark.parametrize("name", KINDS)
async def test_call_with_an_authorization_of_its_own_is_left_alone(
    world: World, opened: grpc.aio.Channel, name: str
) -> None:
    world.callee.refused = {"mine": Reason.TOKEN_REVOKED}
    metadata = (("authorization", "Bearer mine"),)
    error = await refused(opened, SERVICE, name, timeout=5, metadata=metadata)
    assert error.reason is Reason.TOKEN_REVOKED
    assert (world.callee.shown, world.fetch.count) == ([["Bearer mine"]], 0)


@pytest.mark.parametrize("reason", sorted(RENEWED_FOR), ids=lambda reason: reason.name)
async def test_refused_token_is_renewed_and_the_call_sent_once_more(
    world: World, opened: grpc.aio.Channel, reason: Reason
) -> None:
    world.callee.refused = {"t1": reason}
    assert await call(opened, SERVICE, "Get", timeout=5) == "hello"
    assert world.callee.shown == [["Bearer t1"], ["Bearer t2"]]


async def test_call_refused_again_is_not_sent_a_third_time(
    world: World, opened: grpc.aio.Channel
) -> None:
    world.callee.refused = {f"t{n}": Reason.TOKEN_REVOKED for n in range(9)}
    error = await refused(opened, SERVICE, "Get", timeout=5)
    assert error.reason is Reason.TOKEN_REVOKED
    assert world.callee.shown == [["Bearer t1"], ["Bearer t2"]]


async def test_callee_that_refuses_everything_does_not_make_a_storm_of_renewals(
    world: World, opened: grpc.aio.Channel
) -> None:
    world.callee.refused = {f"t{n}": Reason.TOKEN_REVOKED for n in range(99)}
    for _ in range(20):
        await refused(opened, SERVICE, "Get", timeout=5)
    assert world.fetch.count == 2


@pytest.mark.parametrize(
    "reason",
    sorted(set(Reason) - RENEWED_FOR - {Reason.UNSPECIFIED}),
    ids=lambda reason: reason.name,
)
async def test_other_refusals_are_not_repeated(
    world: World,
    reason: Reason,
    server_certificates: Certificates,
    client_certificates: Certificates,
) -> None:
    world.callee.refused = {"t1": reason}
    async with world.open(server_certificates, client_certificates) as opened:
        error = await refused(opened, SERVICE, "Get", timeout=5)
    assert error.reason is reason
    assert (world.callee.shown, world.fetch.count) == ([["Bearer t1"]], 1)


async def test_reason_under_another_code_is_not_repeated(
    world: World, opened: grpc.aio.Channel
) -> None:
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    world.callee.code = grpc.StatusCode.FAILED_PRECONDITION
    await refused(opened, SERVICE, "Get", timeout=5)
    assert len(world.callee.shown) == 1


@pytest.mark.parametrize(("verdict", "times"), [("TOKEN_REVOKED", 2), ("TOKEN_MALFORMED", 1)])
async def test_authsvcs_own_refusal_counts_by_its_verdict(
    world: World, opened: grpc.aio.Channel, verdict: str, times: int
) -> None:
    world.callee.refused = {"t1": Reason.CALLER_TOKEN_INVALID}
    world.callee.metadata = {"verdict": verdict}
    try:
        await call(opened, SERVICE, "Get", timeout=5)
    except grpc.aio.AioRpcError:
        assert times == 1
    assert len(world.callee.shown) == times


@pytest.mark.parametrize("name", KINDS[1:])
async def test_refused_stream_is_not_sent_again_but_the_next_call_has_another_token(
    world: World, opened: grpc.aio.Channel, name: str
) -> None:
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    error = await refused(opened, SERVICE, name, timeout=5)
    assert error.reason is Reason.TOKEN_REVOKED
    assert world.callee.shown == [["Bearer t1"]]
    async with asyncio.timeout(5):
        await world.source.invalidated.wait()
    assert await call(opened, SERVICE, name, timeout=5) == "hello"
    assert world.callee.shown[1:] == [["Bearer t2"]]


@pytest.mark.parametrize("name", KINDS)
async def test_no_token_to_be_had_is_an_rpc_error_with_its_reason(
    world: World, opened: grpc.aio.Channel, name: str
) -> None:
    world.fetch.failure = PermissionDenied("secret detail", reason=Reason.CLIENT_SUSPENDED)
    error = await refused(opened, SERVICE, name, timeout=5)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.CLIENT_SUSPENDED)
    assert error.retry_after_s is not None
    assert "secret" not in str(error)
    assert world.callee.shown == []


async def test_refused_call_whose_token_cannot_be_renewed_keeps_its_answer(
    world: World, opened: grpc.aio.Channel
) -> None:
    await call(opened, SERVICE, "Get", timeout=5)
    world.callee.refused = {"t1": Reason.TOKEN_CUT_OFF}
    world.fetch.failure = PermissionDenied("no", reason=Reason.CLIENT_SUSPENDED)
    error = await refused(opened, SERVICE, "Get", timeout=5)
    assert error.reason is Reason.TOKEN_CUT_OFF


@pytest.mark.parametrize("name", KINDS)
async def test_wait_for_a_token_ends_with_the_deadline_of_the_call(
    world: World, opened: grpc.aio.Channel, name: str
) -> None:
    world.fetch.gate = Gate()
    error = await refused(opened, SERVICE, name, timeout=0.02)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert world.callee.shown == []


async def test_call_sent_once_more_has_what_is_left_of_its_time(
    world: World, server_certificates: Certificates, client_certificates: Certificates
) -> None:
    timeouts: list[float] = []

    class Notes(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(
            self, continuation: Any, client_call_details: Any, request: Any
        ) -> Any:
            timeouts.append(client_call_details.timeout)
            return await continuation(client_call_details, request)

    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    inner = [*bearer(world.source, tls=True), Notes()]
    async with (
        serving(server_certificates, world.callee.handlers()) as target,
        world.source,
        channel(target, client_certificates, interceptors=inner) as opened,
    ):
        await call(opened, SERVICE, "Get", timeout=5)
    first, second = timeouts
    assert 0 < second < first < 5


async def test_cancelled_call_is_cancelled_at_the_callee(
    world: World, server_certificates: Certificates, client_certificates: Certificates
) -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def hangs(_: Any, context: Any) -> StringValue:
        context.add_done_callback(lambda _: ended.set())
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        serving(server_certificates, handlers_of(SERVICE, {"Get": hangs})) as target,
        world.source,
        channel(target, client_certificates, token_source=world.source) as opened,
    ):
        running = asyncio.ensure_future(stub_of(opened, SERVICE, "Get")(StringValue()))
        await entered.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(5):
            await ended.wait()


@pytest.mark.parametrize("name", KINDS)
async def test_token_does_not_travel_in_the_clear(world: World, name: str) -> None:
    async with (
        serving(None, world.callee.handlers()) as target,
        world.source,
        grpc.aio.insecure_channel(target, interceptors=bearer(world.source)) as opened,
    ):
        error = await refused(opened, SERVICE, name, timeout=5)
    assert (error.code, error.message) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "a token is not sent over a channel without TLS",
    )
    assert world.callee.shown == []


async def test_call_credentials_of_the_call_itself_are_kept(
    world: World, server_certificates: Certificates, client_certificates: Certificates
) -> None:
    seen: list[Any] = []

    async def one(request: StringValue, context: Any) -> StringValue:
        seen.extend(pair for pair in context.invocation_metadata() if pair[0] == "x-own")
        return request

    class Own(grpc.AuthMetadataPlugin):
        def __call__(self, _: Any, callback: Any) -> None:
            callback((("x-own", "1"),), None)

    credentials = grpc.metadata_call_credentials(Own())
    async with (
        serving(server_certificates, handlers_of(SERVICE, {"Get": one})) as target,
        world.source,
        channel(target, client_certificates, interceptors=bearer(world.source)) as opened,
    ):
        await call(opened, SERVICE, "Get", timeout=5, credentials=credentials)
    assert seen == [("x-own", "1")]


async def test_hundred_calls_at_once_share_a_token_and_its_replacement(
    world: World, opened: grpc.aio.Channel
) -> None:
    world.callee.refused = {"t1": Reason.TOKEN_REVOKED}
    calls = [call(opened, SERVICE, "Get", timeout=10) for _ in range(100)]
    assert set(await asyncio.gather(*calls)) == {"hello"}
    assert world.fetch.count == 2
