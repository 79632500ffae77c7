"""From an error to what the caller sees: a `google.rpc.Status`, and nothing private."""

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from authsvc.errors import AuthError, Code, Reason
from authsvc.keys.secrets import new_id
from authsvc_client.core.state import StateStale

DOMAIN = "authsvc"
DETAILS_KEY = "grpc-status-details-bin"
TEXT_CHARS_MAX = 200
"""Of what may quote the request: gRPC drops trailers of more than 8 KiB, and the error with them.

A character is up to 12 bytes in the message, and as much again in the details.
"""
CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(code: Code) -> grpc.StatusCode:
    """The same code as grpc spells it."""
    return CODES[code.value]


def text(error: AuthError) -> str:
    """The message of an error, for people."""
    return error.text[:TEXT_CHARS_MAX]


def details(error: AuthError) -> bytes:
    """Serialised `google.rpc.Status` of an error."""
    status = status_pb2.Status(code=error.rule.code.value, message=text(error))
    info = error_details_pb2.ErrorInfo(
        reason=error.reason.name, domain=DOMAIN, metadata=dict(error.metadata)
    )
    status.details.add().Pack(info)
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(
                field=violation.field, description=violation.text[:TEXT_CHARS_MAX]
            )
        status.details.add().Pack(bad)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    raw: bytes = status.SerializeToString()
    return raw


def public(error: BaseException) -> tuple[AuthError, str]:
    """What may be told of any exception, and the incident that names it in the log, if any."""
    if isinstance(error, AuthError) and error.reason is not Reason.INTERNAL:
        return error, ""
    if isinstance(error, StateStale):
        age = f"{error.age_s:.1f}"
        return AuthError(Reason.STATE_STALE, metadata={"age_seconds": age}, retry_after_s=1.0), ""
    incident = new_id()
    return AuthError(Reason.INTERNAL, metadata={"incident": incident}), incident
