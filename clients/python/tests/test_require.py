"""RequireInterceptor: the rule in the proto is what is enforced, and nobody passes it by."""

import asyncio
import base64
import hashlib
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import (
    Caller,
    Certificates,
    Reason,
    RequireInterceptor,
    RuleRefused,
    caller,
    channel,
)
from authsvc_client.core.jws import TOKEN_CHARS_MAX
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.annotations_pb2 import Require

from .support import (
    AUDIENCE,
    Authsvc,
    Gate,
    Pki,
    call,
    describe,
    fail,
    handlers_of,
    inactive,
    refused,
    serving,
    stub_of,
    verdict,
)

KINDS = ("Get", "List", "Put", "Chat")
Code = grpc.StatusCode


async def one(request: Any, _: Any) -> StringValue:
    if isinstance(request, StringValue):
        return request
    return StringValue(value="".join([item.value async for item in request]))


async def many(request: Any, _: Any) -> AsyncIterator[StringValue]:
    if isinstance(request, StringValue):
        yield request
    else:
        async for item in request:
            yield item


BEHAVIOURS: dict[str, Any] = {"Get": one, "List": many, "Put": one, "Chat": many}


@asynccontextmanager
async def guarded(
    authsvc: Authsvc,
    server: Certificates,
    service: ServiceDescriptor,
    behaviours: dict[str, Any],
    *,
    client: Certificates | None = None,
    **settings: Any,
) -> AsyncIterator[grpc.aio.Channel]:
    """A user's service behind the interceptor, and a channel to it."""
    settings = {"audience": AUDIENCE, "services": [service]} | settings
    interceptor = RequireInterceptor(authsvc.client, **settings)
    handlers = handlers_of(service, behaviours)
    async with (
        serving(server, handlers, interceptors=[interceptor]) as target,
        channel(target, client or authsvc.certificates) as opened,
    ):
        yield opened


def shown(*values: str) -> dict[str, Any]:
    return {"timeout": 5, "metadata": tuple(("authorization", value) for value in values)}


# --- at the start --------------------------------------------------------------------------------


def refused_at_start(rule: Require | bytes | None, **settings: Any) -> RuleRefused:
    service = describe({"GetFirst": Require(public=True), "Get": rule})
    with pytest.raises(RuleRefused) as caught:
        RequireInterceptor(NoValidator(), audience=AUDIENCE, services=[service], **settings)
    assert caught.value.method == f"{service.full_name}.Get"
    assert caught.value.method in str(caught.value)
    assert caught.value.field in str(caught.value)
    return caught.value


DENIED = {
    Reason.INSUFFICIENT_SCOPE,
    Reason.INSUFFICIENT_PERMISSIONS,
    Reason.INSUFFICIENT_USER_AUTHENTICATION,
}
"""Of a token that is good, but not enough."""


class NoValidator:
    async def validate(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("nobody is to be asked")


def test_method_without_a_rule_refuses_to_start() -> None:
    assert refused_at_start(None).field == "(authsvc.v1.require)"


def test_field_of_a_newer_option_refuses_to_start() -> None:
    assert refused_at_start(b"\x0a\x01a\xa2\x06\x01x").field == "100"


@pytest.mark.parametrize(
    "rule",
    [
        Require(public=True, scopes=["a"]),
        Require(public=True, mtls=True),
        Require(public=True, audience="urn:x"),
        Require(public=True, permissions=["p"]),
        Require(public=True, acr=["a"]),
        Require(public=True, max_age=Duration()),
    ],
)
def test_public_with_anything_else_refuses_to_start(rule: Require) -> None:
    assert refused_at_start(rule).field == "public"


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (Require(scopes=[""]), "scopes"),
        (Require(scopes=["a b"]), "scopes"),
        (Require(scopes=["é"]), "scopes"),
        (Require(scopes=["a" * 129]), "scopes"),
        (Require(scopes=[f"s{n}" for n in range(65)]), "scopes"),
        (Require(audience="u" * 513), "audience"),
        (Require(permissions=[""]), "permissions"),
        (Require(permissions=["a b"]), "permissions"),
        (Require(permissions=["p" * 129]), "permissions"),
        (Require(permissions=[f"p{n}" for n in range(65)]), "permissions"),
        (Require(acr=[""]), "acr"),
        (Require(acr=["a b"]), "acr"),
        (Require(acr=['a"b']), "acr"),
        (Require(acr=[f"a{n}" for n in range(17)]), "acr"),
        (Require(max_age=Duration(seconds=-1)), "max_age"),
        (Require(max_age=Duration(seconds=1, nanos=1)), "max_age"),
    ],
)
def test_rule_that_authsvc_would_refuse_refuses_to_start(rule: Require, field: str) -> None:
    assert refused_at_start(rule).field == field


def test_every_field_of_the_option_is_enforced_or_refused() -> None:
    """A field that the option gains must be decided on here."""
    assert [field.name for field in Require.DESCRIPTOR.fields] == [
        "scopes",
        "permissions",
        "acr",
        "max_age",
        "audience",
        "mtls",
        "public",
    ]


def test_no_audience_refuses_to_start() -> None:
    with pytest.raises(ValueError, match="audience"):
        RequireInterceptor(NoValidator(), audience="", services=[])


def test_authsvcs_own_services_can_be_read() -> None:
    service = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]
    RequireInterceptor(NoValidator(), audience=AUDIENCE, services=[service])


# --- each call -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
async def test_call_with_a_good_token_passes(
    authsvc: Authsvc, server_certificates: Certificates, name: str
) -> None:
    authsvc.fake.verdicts["good"] = verdict("read")
    service = describe({name: Require(scopes=["read"])})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF[name]) as opened:
        for _ in range(2):
            assert await call(opened, service, name, **shown("Bearer good")) == "hello"
    request, _ = authsvc.fake.validated
    assert (request.token, request.audience) == ("good", AUDIENCE)
    assert list(request.required_scopes) == ["read"]
    assert request.view == auth_pb2.TOKEN_VIEW_CLAIMS
    der = ssl.PEM_cert_to_DER_cert(authsvc.certificates.certificate.decode())
    digest = base64.urlsafe_b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")
    assert request.presenter.certificate_thumbprint == digest
    assert not request.require_bound


BEHAVIOURS_OF = {name: {name: BEHAVIOURS[name]} for name in KINDS}


async def test_rule_with_an_audience_and_mtls_asks_for_them(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require(audience="urn:other", mtls=True)})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        await call(opened, service, "Get", **shown("Bearer good"))
    (request,) = authsvc.fake.validated
    assert (request.audience, request.require_bound) == ("urn:other", True)


async def test_empty_rule_asks_for_a_token_without_scopes(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        assert (await refused(opened, service, "Get", timeout=5)).code is Code.UNAUTHENTICATED
        assert await call(opened, service, "Get", **shown("Bearer good")) == "hello"


async def test_call_without_tls_shows_no_proof(authsvc: Authsvc) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require()})
    interceptor = RequireInterceptor(authsvc.client, audience=AUDIENCE, services=[service])
    handlers = handlers_of(service, BEHAVIOURS_OF["Get"])
    async with (
        serving(None, handlers, interceptors=[interceptor]) as target,
        grpc.aio.insecure_channel(target) as opened,
    ):
        await call(opened, service, "Get", **shown("Bearer good"))
    assert not authsvc.fake.validated[0].HasField("presenter")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "values",
    [
        (),
        ("Bearer good", "Bearer good"),
        ("Bearer good", "Basic eDp5"),
        ("",),
        ("Bearer",),
        ("Bearer ",),
        ("good",),
        ("Basic good",),
        ("DPoP good",),
        ("Bearergood",),
    ],
    ids=str,
)
async def test_call_without_exactly_one_bearer_token_is_refused(
    authsvc: Authsvc, server_certificates: Certificates, name: str, values: tuple[str, ...]
) -> None:
    service = describe({name: Require(scopes=["read"])})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF[name]) as opened:
        error = await refused(opened, service, name, **shown(*values))
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.TOKEN_MISSING)
    assert authsvc.fake.validated == []


@pytest.mark.parametrize(
    "token", ["a b", "a,Bearer b", "a;b", "=", "a=b", "x" * (TOKEN_CHARS_MAX + 1)], ids=len
)
async def test_token_that_cannot_be_one_is_refused_without_asking(
    authsvc: Authsvc, server_certificates: Certificates, token: str
) -> None:
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        error = await refused(opened, service, "Get", **shown(f"Bearer {token}"))
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.TOKEN_MALFORMED)
    assert authsvc.fake.validated == []


@pytest.mark.parametrize("value", ["bearer good", "BEARER good", "Bearer   good"])
async def test_scheme_is_read_as_http_reads_it(
    authsvc: Authsvc, server_certificates: Certificates, value: str
) -> None:
    """RFC 9110 section 11.1: the scheme has no case; RFC 6750 section 2.1: 1*SP."""
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        assert await call(opened, service, "Get", **shown(value)) == "hello"


@pytest.mark.parametrize("name", KINDS)
async def test_inactive_token_is_refused_with_its_reason(
    authsvc: Authsvc, server_certificates: Certificates, name: str
) -> None:
    service = describe({name: Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF[name]) as opened:
        for reason in set(Reason) - {Reason.UNSPECIFIED, *DENIED}:
            authsvc.fake.verdicts["bad"] = inactive(reason)
            error = await refused(opened, service, name, **shown("Bearer bad"))
            assert (error.code, error.reason) == (Code.UNAUTHENTICATED, reason)


async def test_inactive_token_without_a_reason_is_refused(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    authsvc.fake.verdicts["bad"] = auth_pb2.ValidateTokenResponse()
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        error = await refused(opened, service, "Get", **shown("Bearer bad"))
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.TOKEN_INACTIVE)


async def test_missing_scopes_are_permission_denied_and_named(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    """RFC 6750 section 3.1."""
    authsvc.fake.verdicts["poor"] = inactive(Reason.INSUFFICIENT_SCOPE, "write", "read")
    service = describe({"Get": Require(scopes=["read", "write"])})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        error = await refused(opened, service, "Get", **shown("Bearer poor"))
    assert (error.code, error.reason) == (Code.PERMISSION_DENIED, Reason.INSUFFICIENT_SCOPE)
    assert error.metadata == {"scope": "read write"}


async def test_missing_permissions_are_permission_denied_and_named(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    authsvc.fake.verdicts["poor"] = auth_pb2.ValidateTokenResponse(
        reason=inactive(Reason.INSUFFICIENT_PERMISSIONS).reason,
        missing_permissions=["doc.write", "doc.read"],
    )
    service = describe({"Get": Require(permissions=["doc.read", "doc.write"])})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        error = await refused(opened, service, "Get", **shown("Bearer poor"))
    assert (error.code, error.reason) == (Code.PERMISSION_DENIED, Reason.INSUFFICIENT_PERMISSIONS)
    assert error.metadata == {"permission": "doc.read doc.write"}
    assert sorted(authsvc.fake.validated[-1].required_permissions) == ["doc.read", "doc.write"]


async def test_a_weak_or_old_authentication_is_told_what_is_needed(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    """RFC 9470 section 3."""
    reason = Reason.INSUFFICIENT_USER_AUTHENTICATION
    authsvc.fake.verdicts["weak"] = inactive(reason)
    service = describe({"Get": Require(acr=["gold", "silver"], max_age=Duration(seconds=300))})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        error = await refused(opened, service, "Get", **shown("Bearer weak"))
    assert (error.code, error.reason) == (Code.PERMISSION_DENIED, reason)
    assert error.metadata == {"acr_values": "gold silver", "max_age": "300"}
    asked = authsvc.fake.validated[-1]
    assert (list(asked.acr_values), asked.max_age.seconds) == (["gold", "silver"], 300)


async def test_an_age_of_nothing_is_asked_for_as_such(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require(max_age=Duration())})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        await call(opened, service, "Get", **shown("Bearer good"))
    assert authsvc.fake.validated[-1].HasField("max_age")


@pytest.mark.parametrize("name", KINDS)
async def test_authsvc_down_refuses_and_tells_nothing(
    authsvc: Authsvc, server_certificates: Certificates, name: str, caplog: Any
) -> None:
    async def before(_: Any, context: Any) -> None:
        await fail(context, Code.PERMISSION_DENIED, Reason.CALLER_UNKNOWN, "password=hunter2")

    authsvc.fake.before = before
    service = describe({name: Require()})
    with caplog.at_level(logging.WARNING, "authsvc_client"):
        async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF[name]) as opened:
            error = await refused(opened, service, name, **shown("Bearer good"))
    assert (error.code, error.message) == (Code.UNAVAILABLE, "the token could not be checked")
    assert error.reason is Reason.STATE_STALE
    assert "CALLER_UNKNOWN" in caplog.text
    assert "good" not in caplog.text


class Breaks:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def validate(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("password=hunter2"), TimeoutError(), KeyError("t"), None, "yes"],
    ids=repr,
)
async def test_validator_that_breaks_refuses_and_tells_nothing(
    server_certificates: Certificates, client_certificates: Certificates, answer: Any
) -> None:
    service = describe({"Get": Require()})
    interceptor = RequireInterceptor(Breaks(answer), audience=AUDIENCE, services=[service])
    handlers = handlers_of(service, BEHAVIOURS_OF["Get"])
    async with (
        serving(server_certificates, handlers, interceptors=[interceptor]) as target,
        channel(target, client_certificates) as opened,
    ):
        error = await refused(opened, service, "Get", **shown("Bearer good"))
    assert (error.code, error.message) == (Code.UNAVAILABLE, "the token could not be checked")


async def test_active_without_claims_is_no_answer(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    class Silent:
        active, reason, claims, missing_scopes = True, Reason.UNSPECIFIED, None, frozenset[str]()

    service = describe({"Get": Require()})
    interceptor = RequireInterceptor(Breaks(Silent()), audience=AUDIENCE, services=[service])
    handlers = handlers_of(service, BEHAVIOURS_OF["Get"])
    async with (
        serving(server_certificates, handlers, interceptors=[interceptor]) as target,
        channel(target, authsvc.certificates) as opened,
    ):
        error = await refused(opened, service, "Get", **shown("Bearer good"))
    assert error.code is Code.UNAVAILABLE


async def test_certificate_that_ran_out_on_an_open_connection_is_refused(
    authsvc: Authsvc, server_certificates: Certificates, pki: Pki
) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    times = [2_000_000_000.0]
    service = describe({"Get": Require()})
    settings: dict[str, Any] = {"now": lambda: times[0], "client": pki.issue("brief")}
    async with guarded(
        authsvc, server_certificates, service, BEHAVIOURS_OF["Get"], **settings
    ) as opened:
        for times[0] in (4_000_000_000.0, 0.0):
            error = await refused(opened, service, "Get", **shown("Bearer good"))
            assert error.reason is Reason.PEER_CERTIFICATE_EXPIRED
            assert error.code is Code.UNAUTHENTICATED
    assert authsvc.fake.validated == []


@pytest.mark.parametrize("name", KINDS)
async def test_public_method_asks_for_nothing_and_has_no_caller(
    authsvc: Authsvc, server_certificates: Certificates, name: str
) -> None:
    callers: list[bool] = []

    async def answers(request: Any, context: Any) -> StringValue:
        with pytest.raises(LookupError):
            caller()
        callers.append(False)
        return await one(request, context)

    async def yields(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield await answers(request, context)

    behaviour = yields if name in {"List", "Chat"} else answers
    service = describe({name: Require(public=True)})
    async with guarded(authsvc, server_certificates, service, {name: behaviour}) as opened:
        assert await call(opened, service, name, **shown("Bearer bad")) == "hello"
    assert (callers, authsvc.fake.validated) == ([False], [])


# --- services that it was not told about ---------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
async def test_service_that_was_not_named_is_refused(
    authsvc: Authsvc, server_certificates: Certificates, name: str
) -> None:
    authsvc.fake.verdicts["good"] = verdict()
    told, untold = describe({"Get": Require()}), describe({name: Require(public=True)})
    async with guarded(
        authsvc, server_certificates, untold, BEHAVIOURS_OF[name], services=[told]
    ) as opened:
        error = await refused(opened, untold, name, **shown("Bearer good"))
    assert (error.code, error.reason) == (Code.UNAUTHENTICATED, Reason.CALLER_UNKNOWN)
    assert authsvc.fake.validated == []


async def test_open_service_passes_and_the_list_replaces_the_default(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    service = describe({"Get": None})
    settings: dict[str, Any] = {"services": [], "open_services": [service.full_name]}
    async with guarded(
        authsvc, server_certificates, service, BEHAVIOURS_OF["Get"], **settings
    ) as opened:
        assert await call(opened, service, "Get", timeout=5) == "hello"


@pytest.mark.parametrize("health_open", [True, False])
async def test_health_is_open_unless_it_is_taken_out(
    authsvc: Authsvc, server_certificates: Certificates, health_open: bool
) -> None:
    health = grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(one_of_bytes)}
    )
    settings: dict[str, Any] = {} if health_open else {"open_services": ()}
    interceptor = RequireInterceptor(authsvc.client, audience=AUDIENCE, services=[], **settings)
    async with (
        serving(server_certificates, health, interceptors=[interceptor]) as target,
        channel(target, authsvc.certificates) as opened,
    ):
        check: Any = opened.unary_unary("/grpc.health.v1.Health/Check")
        if health_open:
            assert await check(b"", timeout=5) == b"ok"
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(b"", timeout=5)
            assert caught.value.code() is Code.UNAUTHENTICATED


async def one_of_bytes(_: bytes, __: Any) -> bytes:
    return b"ok"


async def test_method_that_does_not_exist_is_unimplemented(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    service = describe({"Get": Require(), "GetAway": Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        error = await refused(opened, service, "GetAway", timeout=5)
    assert error.code is Code.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["Get", "List"])
@pytest.mark.parametrize("public", [True, False])
async def test_handler_that_is_not_async_is_refused(
    authsvc: Authsvc, server_certificates: Certificates, name: str, public: bool
) -> None:
    ran: list[bool] = []

    def blocking(request: Any, _: Any) -> Any:
        ran.append(True)
        return request

    service = describe({name: Require(public=public)})
    async with guarded(authsvc, server_certificates, service, {name: blocking}) as opened:
        error = await refused(opened, service, name, **shown("Bearer good"))
    assert (error.code, ran) == (Code.INTERNAL, [])


# --- what a handler sees -------------------------------------------------------------------------


async def test_handler_learns_who_calls(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    seen: list[Caller] = []

    async def get(request: StringValue, _: Any) -> StringValue:
        seen.append(caller())
        return request

    authsvc.fake.verdicts["good"] = verdict("read", subject="ann")
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, {"Get": get}) as opened:
        await call(opened, service, "Get", **shown("Bearer good"))
    (found,) = seen
    assert (found.subject, found.client_id, found.scopes) == ("ann", "orders", frozenset({"read"}))
    assert (found.audiences, found.jti, found.expires) == (
        (AUDIENCE,),
        "jti-ann",
        2_000_000_000,
    )
    assert found.claims.revision == 5
    with pytest.raises(AttributeError):
        found.subject = "bob"  # type: ignore[misc]
    with pytest.raises(LookupError):
        caller()


@pytest.mark.parametrize("name", KINDS)
async def test_callers_of_calls_at_once_are_not_mixed_up(
    authsvc: Authsvc, server_certificates: Certificates, name: str
) -> None:
    count, arrived = 20, asyncio.Barrier(20)

    async def answers(request: Any, context: Any) -> StringValue:
        await one(request, context)
        before = caller().subject
        await arrived.wait()
        after = await asyncio.create_task(subject_now())
        assert before == after
        return StringValue(value=after)

    async def subject_now() -> str:
        return caller().subject

    async def yields(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield await answers(request, context)
        yield StringValue(value="/" + caller().subject)

    behaviour = yields if name in {"List", "Chat"} else answers
    service = describe({name: Require()})
    for number in range(count):
        authsvc.fake.verdicts[f"t{number}"] = verdict(subject=f"s{number}")
    async with guarded(authsvc, server_certificates, service, {name: behaviour}) as opened:
        calls = [call(opened, service, name, **shown(f"Bearer t{n}")) for n in range(count)]
        answered = await asyncio.gather(*calls)
    wanted = [f"s{n}" if behaviour is answers else f"s{n}/s{n}" for n in range(count)]
    assert answered == wanted


async def test_abort_of_a_handler_passes_as_it_is(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    async def get(_: Any, context: Any) -> StringValue:
        await fail(context, Code.NOT_FOUND, Reason.CLIENT_NOT_FOUND, "own text")
        raise AssertionError

    authsvc.fake.verdicts["good"] = verdict()
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, {"Get": get}) as opened:
        error = await refused(opened, service, "Get", **shown("Bearer good"))
    assert (error.code, error.message) == (Code.NOT_FOUND, "own text")
    assert error.reason is Reason.CLIENT_NOT_FOUND


@pytest.mark.parametrize("name", ["List", "Chat"])
@pytest.mark.parametrize("generator", [True, False])
async def test_cancelled_stream_cancels_its_handler(
    authsvc: Authsvc, server_certificates: Certificates, name: str, generator: bool
) -> None:
    """A handler that swallows it leaks (grpc#43360); it must arrive there in the first place."""
    cancelled, closed = asyncio.Event(), asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        finally:
            closed.set()

    async def yields(_: Any, __: Any) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        await waits()

    async def writes(_: Any, context: Any) -> None:
        await context.write(StringValue(value="first"))
        await waits()

    authsvc.fake.verdicts["good"] = verdict()
    service = describe({name: Require()})
    behaviours = {name: yields if generator else writes}
    async with guarded(authsvc, server_certificates, service, behaviours) as opened:
        sent: Any = StringValue() if name == "List" else None
        running = stub_of(opened, service, name)(sent, **shown("Bearer good"))
        assert (await running.read()).value == "first"
        running.cancel()
        async with asyncio.timeout(5):
            await cancelled.wait()
            await closed.wait()


async def test_cancelled_call_cancels_the_question(
    authsvc: Authsvc, server_certificates: Certificates
) -> None:
    gate, ended = Gate(), asyncio.Event()

    async def before(_: Any, context: Any) -> None:
        context.add_done_callback(lambda _: ended.set())
        await gate()

    authsvc.fake.before = before
    service = describe({"Get": Require()})
    async with guarded(authsvc, server_certificates, service, BEHAVIOURS_OF["Get"]) as opened:
        running = asyncio.ensure_future(call(opened, service, "Get", **shown("Bearer good")))
        await gate.entered.wait()
        running.cancel()
        async with asyncio.timeout(5):
            await ended.wait()


async def test_wrapped_handler_is_made_once_and_follows_a_new_one() -> None:
    service = describe({"Get": Require(public=True)})
    interceptor = RequireInterceptor(NoValidator(), audience=AUDIENCE, services=[service])

    class Details:
        method = f"/{service.full_name}/Get"

    handlers: list[Any] = [grpc.unary_unary_rpc_method_handler(one) for _ in range(2)]
    made = []
    for handler in (handlers[0], handlers[0], handlers[1]):

        async def continuation(_: Any, handler: Any = handler) -> Any:
            return handler

        made.append(await interceptor.intercept_service(continuation, Details()))
    assert made[0] is made[1]
    assert made[0] is not made[2]
