"""SyncAuthsvcClient: the same questions and answers as AuthsvcClient's, from threads."""

import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc_testing
import pytest

from authsvc_client import (
    AuthsvcClient,
    Certificates,
    DeadlineExceeded,
    PermissionDenied,
    Reason,
    RequireInterceptor,
    SyncAuthsvcClient,
    SyncRequireInterceptor,
    SyncTokenSource,
    SyncValidator,
    TokenSource,
    TokenUnavailable,
    Unavailable,
    Validator,
    sync_channel,
)
from authsvc_client.core.step_up import StepUp
from authsvc_client.messages import ACCESS_TOKEN_TYPE, REFRESH_TOKEN_TYPE
from authsvc_client.v1 import auth_pb2

from .support import AUDIENCE, inactive, verdict
from .sync_support import (
    THREADS,
    WAIT_S,
    Gate,
    SyncAuthsvc,
    at_once,
    fail,
    own_threads,
    running_authsvc,
)

AUTH = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]


@pytest.fixture
def authsvc(
    server_certificates: Certificates, client_certificates: Certificates
) -> Iterator[SyncAuthsvc]:
    with running_authsvc(server_certificates, client_certificates) as running:
        yield running


def surface(it: Any) -> dict[str, list[tuple[str, Any, Any]]]:
    """Methods with the names, kinds and defaults of their parameters."""
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for name, method in inspect.getmembers(it, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(
    ("blocking", "other"),
    [
        (SyncAuthsvcClient, AuthsvcClient),
        (SyncRequireInterceptor, RequireInterceptor),
        (SyncValidator, Validator),
    ],
)
def test_both_halves_have_the_same_methods(blocking: Any, other: Any) -> None:
    assert surface(blocking) == surface(other)


def test_both_token_sources_have_the_same_methods() -> None:
    wanted = {name.replace("aclose", "close") for name in surface(TokenSource)}
    assert set(surface(SyncTokenSource)) == wanted


def test_issue_asks_for_client_credentials_and_answers_a_token(authsvc: SyncAuthsvc) -> None:
    token = authsvc.client.issue_client_credentials(
        "orders", ["a", "b"], [AUDIENCE], client_secret="s"
    )
    (request,) = authsvc.fake.issued
    assert request.WhichOneof("grant") == "client_credentials"
    assert (request.client_id, list(request.resources)) == ("orders", [AUDIENCE])
    assert request.client_credential.client_secret == "s"
    assert (token.value, token.lifetime_s, token.scopes) == ("t1", 300, ("a", "b"))


@pytest.mark.parametrize(
    ("refreshable", "wanted"), [(False, ACCESS_TOKEN_TYPE), (True, REFRESH_TOKEN_TYPE)]
)
def test_exchange_hands_the_subject_token_over(
    authsvc: SyncAuthsvc, refreshable: bool, wanted: str
) -> None:
    authsvc.client.exchange(
        "orders", "subject", ["a"], [AUDIENCE], refreshable=refreshable, client_secret="s"
    )
    (request,) = authsvc.fake.issued
    grant = request.token_exchange
    assert (grant.subject_token, grant.requested_token_type) == ("subject", wanted)
    assert (request.client_id, request.client_credential.client_secret) == ("orders", "s")
    assert (list(request.scopes), list(request.resources)) == (["a"], [AUDIENCE])


def test_refresh_answers_the_token_to_use_next(authsvc: SyncAuthsvc) -> None:
    token = authsvc.client.refresh("orders", "r", ["a"], [AUDIENCE], client_secret="s")
    (request,) = authsvc.fake.refreshed
    assert (request.refresh_token, request.client_id) == ("r", "orders")
    assert request.client_credential.client_secret == "s"
    assert (list(request.scopes), list(request.resources)) == (["a"], [AUDIENCE])
    assert (token.value, token.refresh_token) == ("t", "next")


def test_validate_asks_all_that_it_was_given(authsvc: SyncAuthsvc) -> None:
    authsvc.fake.verdicts["t"] = verdict("a", subject="ann")
    found = authsvc.client.validate(
        "t",
        audience=AUDIENCE,
        scopes={"a"},
        thumbprint="p" * 43,
        require_bound=True,
        permissions={"doc.read"},
        step_up=StepUp(("gold",), 300),
        full=True,
    )
    (request,) = authsvc.fake.validated
    assert (request.token, request.audience, list(request.required_scopes)) == (
        "t",
        AUDIENCE,
        ["a"],
    )
    assert (request.presenter.certificate_thumbprint, request.require_bound) == ("p" * 43, True)
    assert (list(request.required_permissions), list(request.acr_values)) == (
        ["doc.read"],
        ["gold"],
    )
    assert (request.max_age.seconds, request.view) == (300, auth_pb2.TOKEN_VIEW_FULL)
    assert found.active
    assert found.claims is not None
    assert found.claims.subject == "ann"


def test_validate_of_an_inactive_token_is_an_answer(authsvc: SyncAuthsvc) -> None:
    authsvc.fake.verdicts["t"] = inactive(Reason.INSUFFICIENT_SCOPE, "a")
    found = authsvc.client.validate("t")
    assert (found.active, found.claims) == (False, None)
    assert (found.reason, found.missing_scopes) == (Reason.INSUFFICIENT_SCOPE, frozenset({"a"}))


def test_revoke_by_token_and_by_jti_answers_the_revision(authsvc: SyncAuthsvc) -> None:
    assert authsvc.client.revoke("t", client_id="c", client_secret="s") == 42
    assert authsvc.client.revoke_jti("j") == 42
    by_token, by_jti = authsvc.fake.revoked
    assert (by_token.token, by_token.client_id) == ("t", "c")
    assert by_token.client_credential.client_secret == "s"
    assert (by_jti.WhichOneof("target"), by_jti.jti) == ("jti", "j")


def test_keys_answers_jwks(authsvc: SyncAuthsvc) -> None:
    found = authsvc.client.keys()
    assert found.max_age_s == 60
    assert [key["kid"] for key in found.keys] == ["k1"]


def test_failure_is_raised_typed(authsvc: SyncAuthsvc) -> None:
    code, reason = grpc.StatusCode.PERMISSION_DENIED, Reason.CLIENT_PENDING
    authsvc.service.before = lambda _, context: fail(context, code, reason, "told", scope="a")
    with pytest.raises(PermissionDenied) as caught:
        authsvc.client.issue_client_credentials("orders")
    assert (caught.value.reason, caught.value.message) == (reason, "told")
    assert caught.value.metadata == {"scope": "a"}


def test_call_that_hangs_is_given_up(
    authsvc: SyncAuthsvc, client_certificates: Certificates
) -> None:
    gate = Gate()
    authsvc.service.before = lambda *_: gate()
    opened = sync_channel(authsvc.target, client_certificates)
    with SyncAuthsvcClient(opened, timeout_s=0.2) as client, pytest.raises(DeadlineExceeded):
        client.keys()
    gate.opened.set()


def test_unavailable_is_retried_where_repeating_is_harmless(authsvc: SyncAuthsvc) -> None:
    left = iter([True, True])

    def before(_: Any, context: Any) -> None:
        if next(left, False):
            fail(context, grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE)

    authsvc.service.before = before
    assert authsvc.client.keys().keys


# --- its token source ----------------------------------------------------------------------------


def test_threads_at_once_cost_authsvc_one_token(authsvc: SyncAuthsvc) -> None:
    with authsvc.client.token_source("orders", ["a"], [AUDIENCE], client_secret="s") as source:
        assert at_once(lambda _: source.token()) == ["t1"] * THREADS
    (request,) = authsvc.fake.issued
    assert (list(request.scopes), list(request.resources)) == (["a"], [AUDIENCE])
    assert request.client_credential.client_secret == "s"


def test_authsvc_down_is_said_with_its_reason(authsvc: SyncAuthsvc) -> None:
    code, reason = grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE
    authsvc.service.before = lambda _, context: fail(context, code, reason)
    with authsvc.client.token_source("orders") as source:
        with pytest.raises(TokenUnavailable) as caught:
            source.token()
        assert caught.value.reason is reason
        assert isinstance(caught.value.__cause__, Unavailable)


def test_close_does_not_wait_for_an_authsvc_that_hangs(authsvc: SyncAuthsvc) -> None:
    gate, ended = Gate(), threading.Event()

    def before(_: Any, context: Any) -> None:
        context.add_callback(ended.set)
        gate()

    authsvc.service.before = before
    source = authsvc.client.token_source("orders")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(source.token)
        assert gate.entered.wait(WAIT_S)
        source.close()
        assert own_threads() == []
        assert ended.wait(WAIT_S)
        assert not gate.opened.is_set()
        with pytest.raises(TokenUnavailable, match="closed"):
            waiting.result(WAIT_S)
    gate.opened.set()


def test_fetch_that_begins_after_the_close_asks_nobody(authsvc: SyncAuthsvc) -> None:
    source = authsvc.client.token_source("orders")
    source.close()
    with pytest.raises(TokenUnavailable, match="closed"):
        source._fetch()
    assert authsvc.fake.issued == []


# --- with grpcio-testing -------------------------------------------------------------------------


def test_client_works_over_a_channel_of_grpcio_testing() -> None:
    opened = grpc_testing.channel([AUTH], grpc_testing.strict_real_time())
    client = SyncAuthsvcClient(opened)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.validate, "t", audience=AUDIENCE)
        _, request, server = opened.take_unary_unary(AUTH.methods_by_name["ValidateToken"])
        assert (request.token, request.audience) == ("t", AUDIENCE)
        server.send_initial_metadata(())
        server.terminate(verdict("a"), (), grpc.StatusCode.OK, "")
        assert asked.result(WAIT_S).active
        asked_keys = pool.submit(client.keys)
        _, _, server = opened.take_unary_unary(AUTH.methods_by_name["GetKeys"])
        server.send_initial_metadata(())
        server.terminate(None, (), grpc.StatusCode.PERMISSION_DENIED, "no")
        with pytest.raises(PermissionDenied):
            asked_keys.result(WAIT_S)


def test_token_source_fetches_over_a_channel_of_grpcio_testing() -> None:
    opened = grpc_testing.channel([AUTH], grpc_testing.strict_real_time())
    source = SyncAuthsvcClient(opened).token_source("orders", ["a"])
    with source, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(source.token)
        _, request, server = opened.take_unary_unary(AUTH.methods_by_name["IssueToken"])
        assert (request.client_id, list(request.scopes)) == ("orders", ["a"])
        answer = auth_pb2.IssueTokenResponse()
        answer.token.access_token = "t1"
        answer.token.expires_in.FromSeconds(300)
        server.send_initial_metadata(())
        server.terminate(answer, (), grpc.StatusCode.OK, "")
        assert asked.result(WAIT_S) == "t1"
