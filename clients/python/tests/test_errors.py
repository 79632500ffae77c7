"""Errors are rebuilt as they were meant, whatever a server sends."""

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from authsvc_client import (
    AuthsvcError,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    NotImplementedByServer,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    TokenUnavailable,
    Unauthenticated,
    Unavailable,
    Violation,
)
from authsvc_client.errors import DETAILS_KEY, error_trailers, reason_of
from authsvc_client.v1 import error_reason_pb2

Code = grpc.StatusCode

KINDS = {
    Code.UNAUTHENTICATED: Unauthenticated,
    Code.PERMISSION_DENIED: PermissionDenied,
    Code.INVALID_ARGUMENT: InvalidRequest,
    Code.NOT_FOUND: NotFound,
    Code.ALREADY_EXISTS: Conflict,
    Code.FAILED_PRECONDITION: Conflict,
    Code.ABORTED: Conflict,
    Code.OUT_OF_RANGE: Conflict,
    Code.UNAVAILABLE: Unavailable,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.RESOURCE_EXHAUSTED: ResourceExhausted,
    Code.UNIMPLEMENTED: NotImplementedByServer,
    Code.INTERNAL: Internal,
    Code.UNKNOWN: Internal,
    Code.DATA_LOSS: Internal,
    Code.CANCELLED: AuthsvcError,
}


def rpc_error(
    code: Code, trailers: Sequence[tuple[str, str | bytes]] = (), text: str | None = "told"
) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*trailers)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, text)


def rebuilt(code: Code, *details: Any) -> AuthsvcError:
    status = status_pb2.Status(code=code.value[0], message="told")
    for detail in details:
        status.details.add().Pack(detail)
    trailers = ((DETAILS_KEY, status.SerializeToString()), ("x-request-id", "r-1"))
    return AuthsvcError.from_rpc_error(rpc_error(code, trailers))


@pytest.mark.parametrize("reason", list(Reason)[1:], ids=lambda reason: reason.name)
def test_error_of_every_reason_is_rebuilt_under_every_code(reason: Reason) -> None:
    for code, kind in KINDS.items():
        trailers = error_trailers(code, "told", reason, {"scope": "a b"}, 1.5)
        error = AuthsvcError.from_rpc_error(rpc_error(code, trailers))
        assert type(error) is kind
        assert (error.code, error.reason, error.reason_name) == (code, reason, reason.name)
        assert error.metadata == {"scope": "a b"}
        assert error.retry_after_s == 1.5
        assert str(error) == f"{reason.name}: told"


def test_every_code_but_ok_has_a_kind() -> None:
    assert set(KINDS) == set(Code) - {Code.OK}


def test_reasons_are_those_of_the_contract() -> None:
    contract = error_reason_pb2.ErrorReason.items()
    assert {name.removeprefix("ERROR_REASON_"): number for name, number in contract} == {
        reason.name: reason.value for reason in Reason
    }


def test_error_with_field_violations_names_them() -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="client_id", description="at most 64 characters")
    info = error_details_pb2.ErrorInfo(reason="FIELD_INVALID", domain="authsvc")
    error = rebuilt(Code.INVALID_ARGUMENT, info, bad)
    assert isinstance(error, InvalidRequest)
    assert error.violations == (Violation("client_id", "at most 64 characters"),)
    assert error.request_id == "r-1"
    assert str(error) == "FIELD_INVALID: told (request r-1)"


def test_internal_error_tells_its_incident() -> None:
    info = error_details_pb2.ErrorInfo(
        reason="INTERNAL", domain="authsvc", metadata={"incident": "i-9"}
    )
    error = rebuilt(Code.INTERNAL, info)
    assert isinstance(error, Internal)
    assert error.incident == "i-9"


def test_reason_of_a_newer_server_is_kept_by_name() -> None:
    info = error_details_pb2.ErrorInfo(reason="MOON_IN_THE_WAY", domain="authsvc")
    error = rebuilt(Code.PERMISSION_DENIED, info)
    assert isinstance(error, PermissionDenied)
    assert (error.reason, error.reason_name) == (Reason.UNSPECIFIED, "MOON_IN_THE_WAY")
    assert reason_of(9999) is Reason.UNSPECIFIED
    assert reason_of(78) is Reason.TOKEN_REVOKED


def test_reason_of_another_domain_is_not_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="TOKEN_REVOKED", domain="googleapis.com")
    error = rebuilt(Code.UNAUTHENTICATED, info)
    assert (error.reason, error.reason_name, error.metadata) == (Reason.UNSPECIFIED, "", {})


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\x1a\xff\xff\xff", b"not a status"])
def test_details_that_are_garbage_leave_a_plain_error(raw: bytes) -> None:
    error = AuthsvcError.from_rpc_error(rpc_error(Code.NOT_FOUND, ((DETAILS_KEY, raw),)))
    assert isinstance(error, NotFound)
    assert error.reason is Reason.UNSPECIFIED


def test_detail_that_is_garbage_is_passed_over() -> None:
    status = status_pb2.Status(code=5)
    for kind in ("ErrorInfo", "BadRequest", "RetryInfo"):
        url = f"type.googleapis.com/google.rpc.{kind}"
        status.details.add(type_url=url, value=b"\xff\xff")
    trailers = ((DETAILS_KEY, status.SerializeToString()),)
    error = AuthsvcError.from_rpc_error(rpc_error(Code.NOT_FOUND, trailers))
    assert (error.reason, error.violations, error.retry_after_s) == (Reason.UNSPECIFIED, (), None)


def test_plain_grpc_error_is_rebuilt() -> None:
    error = AuthsvcError.from_rpc_error(rpc_error(Code.UNAVAILABLE, text=None))
    assert isinstance(error, Unavailable)
    assert (error.message, error.metadata, error.violations) == ("", {}, ())
    assert (error.retry_after_s, error.request_id) == (None, "")
    assert str(error) == "UNAVAILABLE: "


def test_token_unavailable_is_unavailable_with_the_reason_of_its_cause() -> None:
    cause = PermissionDenied("wait", code=Code.PERMISSION_DENIED, reason=Reason.CLIENT_PENDING)
    error = TokenUnavailable.after(cause, 2.0)
    assert isinstance(error, Unavailable)
    assert (error.code, error.reason, error.retry_after_s) == (
        Code.UNAVAILABLE,
        Reason.CLIENT_PENDING,
        2.0,
    )
    assert TokenUnavailable.after(OSError(), 0.0).reason is Reason.UNSPECIFIED
