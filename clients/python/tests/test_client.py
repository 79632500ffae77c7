"""AuthsvcClient: what it asks, what it makes of the answers, and its errors."""

from typing import Any

import grpc
import grpc_testing
import pytest

from authsvc_client import (
    AuthsvcClient,
    AuthsvcError,
    Certificates,
    Claims,
    DeadlineExceeded,
    InvalidRequest,
    NotImplementedByServer,
    PermissionDenied,
    Reason,
    channel,
)
from authsvc_client.client import ACCESS_TOKEN_TYPE, REFRESH_TOKEN_TYPE
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

from .support import AUDIENCE, Authsvc, Gate, fail, inactive, verdict


async def test_issue_asks_for_client_credentials_and_answers_a_token(authsvc: Authsvc) -> None:
    token = await authsvc.client.issue_client_credentials("orders", ["a", "b"], [AUDIENCE])
    (request,) = authsvc.fake.issued
    assert request.WhichOneof("grant") == "client_credentials"
    assert (request.client_id, list(request.scopes), list(request.resources)) == (
        "orders",
        ["a", "b"],
        [AUDIENCE],
    )
    assert not request.HasField("client_credential")
    assert (token.value, token.lifetime_s, token.scopes) == ("t1", 300, ("a", "b"))
    assert (token.audiences, token.jti) == ((AUDIENCE,), "j1")


async def test_issue_with_a_secret_sends_it(authsvc: Authsvc) -> None:
    await authsvc.client.issue_client_credentials("orders", client_secret="s")
    assert authsvc.fake.issued[0].client_credential.client_secret == "s"


@pytest.mark.parametrize(
    ("refreshable", "wanted"), [(False, ACCESS_TOKEN_TYPE), (True, REFRESH_TOKEN_TYPE)]
)
async def test_exchange_hands_the_subject_token_over(
    authsvc: Authsvc, refreshable: bool, wanted: str
) -> None:
    token = await authsvc.client.exchange(
        "orders", "subject", ["a"], [AUDIENCE], refreshable=refreshable, client_secret="s"
    )
    (request,) = authsvc.fake.issued
    grant = request.token_exchange
    assert (grant.subject_token, grant.subject_token_type) == ("subject", ACCESS_TOKEN_TYPE)
    assert grant.requested_token_type == wanted
    assert (request.client_id, request.client_credential.client_secret) == ("orders", "s")
    assert (list(request.scopes), list(request.resources)) == (["a"], [AUDIENCE])
    assert token.value == "t1"


async def test_refresh_answers_the_token_to_use_next(authsvc: Authsvc) -> None:
    token = await authsvc.client.refresh("orders", "r", ["a"], [AUDIENCE], client_secret="s")
    (request,) = authsvc.fake.refreshed
    assert (request.refresh_token, request.client_id) == ("r", "orders")
    assert request.client_credential.client_secret == "s"
    assert (token.value, token.refresh_token, token.lifetime_s) == ("t", "next", 300)
    assert (token.scopes, token.audiences) == (("a",), (AUDIENCE,))
    assert "next" not in repr(token)


async def test_validate_asks_what_it_was_given(authsvc: Authsvc) -> None:
    await authsvc.client.validate(
        "t", audience=AUDIENCE, scopes={"a"}, thumbprint="p" * 43, require_bound=True
    )
    await authsvc.client.validate("t")
    full, bare = authsvc.fake.validated
    assert (full.token, full.audience, list(full.required_scopes)) == ("t", AUDIENCE, ["a"])
    assert (full.presenter.certificate_thumbprint, full.require_bound) == ("p" * 43, True)
    assert full.view == bare.view == auth_pb2.TOKEN_VIEW_CLAIMS
    assert not bare.HasField("presenter")


async def test_validate_answers_typed_claims(authsvc: Authsvc) -> None:
    answer = verdict("a", "b", grant_id="g", session_id="s", root_jti="r", acr="x", amr=["pwd"])
    answer.claims.auth_time.FromSeconds(1_800_000_000)
    answer.claims.actor.subject = "outer"
    answer.claims.actor.actor.subject = "inner"
    answer.claims.may_act = "m"
    answer.claims.key_ids.extend(["k", "l"])
    answer.claims.certificate_thumbprint = "p"
    answer.reusable_until.FromMilliseconds(1500)
    authsvc.fake.verdicts["t"] = answer
    found = await authsvc.client.validate("t")
    assert (found.active, found.reason, found.revision) == (True, Reason.UNSPECIFIED, 7)
    assert found.reusable_until == 1.5
    assert found.claims == Claims(
        issuer="https://authsvc",
        subject="orders",
        audiences=(AUDIENCE,),
        expires=2_000_000_000,
        issued=1_900_000_000,
        jti="jti-orders",
        client_id="orders",
        scopes=frozenset({"a", "b"}),
        revision=5,
        grant_id="g",
        session_id="s",
        root_jti="r",
        certificate_thumbprint="p",
        auth_time=1_800_000_000,
        acr="x",
        amr=("pwd",),
        actors=("outer", "inner"),
        may_act="m",
        key_ids=("k", "l"),
    )


async def test_validate_of_an_inactive_token_is_an_answer(authsvc: Authsvc) -> None:
    authsvc.fake.verdicts["t"] = inactive(Reason.INSUFFICIENT_SCOPE, "a")
    found = await authsvc.client.validate("t")
    assert (found.active, found.claims) == (False, None)
    assert (found.reason, found.missing_scopes) == (Reason.INSUFFICIENT_SCOPE, frozenset({"a"}))


async def test_validate_with_a_reason_of_a_newer_server_is_inactive(authsvc: Authsvc) -> None:
    answer = auth_pb2.ValidateTokenResponse()
    answer.MergeFromString(b"\x10\x8f\x4e")  # reason = 9999
    authsvc.fake.verdicts["t"] = answer
    found = await authsvc.client.validate("t")
    assert (found.active, found.reason) == (False, Reason.TOKEN_INACTIVE)


async def test_revoke_by_token_and_by_jti_answers_the_revision(authsvc: Authsvc) -> None:
    assert await authsvc.client.revoke("t", client_id="c", client_secret="s") == 42
    assert await authsvc.client.revoke_jti("j") == 42
    by_token, by_jti = authsvc.fake.revoked
    assert (by_token.token, by_token.client_id) == ("t", "c")
    assert by_token.client_credential.client_secret == "s"
    assert (by_jti.WhichOneof("target"), by_jti.jti) == ("jti", "j")


async def test_keys_answers_jwks(authsvc: Authsvc) -> None:
    found = await authsvc.client.keys()
    assert found.max_age_s == 60
    assert found.keys == (
        {"kid": "k1", "kty": "EC", "alg": "ES256", "use": "sig", "crv": "P-256", "x": "x"},
    )


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, Reason.CLIENT_PENDING, PermissionDenied),
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.SCOPE_UNKNOWN, InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.NOT_IMPLEMENTED, NotImplementedByServer),
    ],
)
async def test_failure_is_raised_typed(
    authsvc: Authsvc, code: grpc.StatusCode, reason: Reason, kind: type[AuthsvcError]
) -> None:
    async def before(_: Any, context: Any) -> None:
        await fail(context, code, reason, "told", scope="a")

    authsvc.fake.before = before
    with pytest.raises(kind) as caught:
        await authsvc.client.issue_client_credentials("orders")
    assert (caught.value.reason, caught.value.message) == (reason, "told")
    assert caught.value.metadata == {"scope": "a"}


async def test_call_that_hangs_is_given_up(
    authsvc: Authsvc, client_certificates: Certificates
) -> None:
    gate = Gate()

    async def before(*_: Any) -> None:
        await gate()

    authsvc.fake.before = before
    opened = channel(authsvc.target, client_certificates)
    async with AuthsvcClient(opened, timeout_s=0.2) as client:
        with pytest.raises(DeadlineExceeded):
            await client.keys()


async def test_token_source_of_a_client_asks_as_it_was_told(authsvc: Authsvc) -> None:
    async with authsvc.client.token_source("orders", ["a"], [AUDIENCE], client_secret="s") as it:
        assert [await it.token(), await it.token()] == ["t1", "t1"]
    (request,) = authsvc.fake.issued
    assert (list(request.scopes), request.client_credential.client_secret) == (["a"], "s")


def test_blocking_stub_errors_are_rebuilt_too() -> None:
    """grpcio-testing: the error of the blocking API is a call as well."""
    service = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]
    clock = grpc_testing.strict_fake_time(0)
    opened = grpc_testing.channel([service], clock)
    future = AuthServiceStub(opened).GetKeys.future(auth_pb2.GetKeysRequest())
    method = service.methods_by_name["GetKeys"]
    _, _, server = opened.take_unary_unary(method)
    server.send_initial_metadata(())
    trailers = (("x-request-id", "r-1"),)
    server.terminate(None, trailers, grpc.StatusCode.PERMISSION_DENIED, "no")
    with pytest.raises(grpc.RpcError) as caught:
        future.result()
    error = AuthsvcError.from_rpc_error(caught.value)
    assert isinstance(error, PermissionDenied)
    assert (error.message, error.request_id) == ("no", "r-1")
