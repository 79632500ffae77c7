"""Typed errors: one class per thing that a caller can do about it, rebuilt from `ErrorInfo`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from .core.reason import Reason

DOMAIN = "authsvc"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request that breaks its limit."""

    field: str
    description: str


class AuthsvcError(Exception):
    """A call failed. What its subclasses are named for is what can be done about it."""

    def __init__(
        self,
        message: str = "",
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: Reason = Reason.UNSPECIFIED,
        reason_name: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[Violation, ...] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        """The server's words, for people."""
        self.code = code
        self.reason = reason
        """UNSPECIFIED where the error is not authsvc's, or newer than this package."""
        self.reason_name = reason_name or (reason.name if reason else "")
        """The reason as it was sent, known or not; empty where the error is not authsvc's."""
        self.metadata: Mapping[str, str] = dict(metadata or {})
        """Of the `ErrorInfo`; `error_reason.proto` says which reason has which keys."""
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        """Tells the server's operators which call it was."""

    def __str__(self) -> str:
        text = f"{self.reason_name or self.code.name}: {self.message}"
        return f"{text} (request {self.request_id})" if self.request_id else text

    @staticmethod
    def of_item(code: int, reason: int, message: str) -> "AuthsvcError":
        """Of one item of many (ItemError)."""
        status = _CODES.get(code, grpc.StatusCode.UNKNOWN)
        return _KINDS.get(status, AuthsvcError)(message, code=status, reason=reason_of(reason))

    @classmethod
    def from_rpc_error(cls, error: grpc.RpcError) -> "AuthsvcError":
        """The typed error of a failed call; also of one that is not authsvc's."""
        return _rebuild(error)


class Unauthenticated(AuthsvcError):
    """Show another credential: certificate, secret or token."""


class PermissionDenied(AuthsvcError):
    """Ask an administrator: approval, a scope, ownership."""


class InvalidRequest(AuthsvcError):
    """Repair the request; `violations` names its fields."""


class NotFound(AuthsvcError):
    """There is no such object."""


class Conflict(AuthsvcError):
    """The state of things does not allow it: read again, then decide."""


class Unavailable(AuthsvcError):
    """Try again, after `retry_after_s` where it is given."""


class TokenUnavailable(Unavailable):
    """A TokenSource has no live token and may not ask for one yet; `__cause__` says why."""

    @classmethod
    def after(cls, failure: BaseException | None, retry_after_s: float) -> Self:
        """With the reason of the renewal that failed."""
        known = failure if isinstance(failure, AuthsvcError) else AuthsvcError()
        return cls(
            "no access token",
            code=grpc.StatusCode.UNAVAILABLE,
            reason=known.reason,
            reason_name=known.reason_name,
            metadata=known.metadata,
            retry_after_s=retry_after_s,
            request_id=known.request_id,
        )


class DeadlineExceeded(AuthsvcError):
    """Time ran out; whether it was done is not known."""


class ResourceExhausted(AuthsvcError):
    """Slow down, for `retry_after_s`."""


class NotImplementedByServer(AuthsvcError):
    """This server cannot do it (yet)."""


class Internal(AuthsvcError):
    """A fault of the server: give its operators `incident` and `request_id`."""

    @property
    def incident(self) -> str:
        """Id under which the server logged it."""
        return self.metadata.get("incident", "")


_KINDS: Mapping[grpc.StatusCode, type[AuthsvcError]] = {
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.OUT_OF_RANGE: Conflict,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedByServer,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.DATA_LOSS: Internal,
}


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _rebuild(error: Any) -> AuthsvcError:
    """Takes the error of either API: both are a call as well, which the types do not say."""
    code: grpc.StatusCode = error.code()
    trailers = _trailers(error)
    details: dict[str, Any] = {}
    for detail in _details(trailers.get(DETAILS_KEY, b"")):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            details |= _error_info(detail)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            details["violations"] = _violations(detail)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            details["retry_after_s"] = _retry_after_s(detail)
    request_id = trailers.get(REQUEST_ID_KEY, "")
    kind = _KINDS.get(code, AuthsvcError)
    return kind(error.details() or "", code=code, request_id=request_id, **details)


def _trailers(error: Any) -> dict[str, Any]:
    trailers: Iterable[tuple[str, Any]] = error.trailing_metadata() or ()
    return {key: value for key, value in trailers}  # noqa: C416 - Metadata has keys() of its own


def _details(raw: bytes) -> Iterable[Any]:
    """Details of the status; none where they are not readable."""
    try:
        return list(status_pb2.Status.FromString(raw).details)
    except DecodeError:
        return ()


def _unpack(detail: Any, message: Any) -> Any:
    try:
        detail.Unpack(message)
    except DecodeError:
        message.Clear()
    return message


def _error_info(detail: Any) -> dict[str, Any]:
    info = _unpack(detail, error_details_pb2.ErrorInfo())
    if info.domain != DOMAIN:
        return {}
    reason = Reason.__members__.get(info.reason, Reason.UNSPECIFIED)
    return {"reason": reason, "reason_name": info.reason, "metadata": dict(info.metadata)}


def _violations(detail: Any) -> tuple[Violation, ...]:
    bad = _unpack(detail, error_details_pb2.BadRequest())
    return tuple(Violation(item.field, item.description) for item in bad.field_violations)


def _retry_after_s(detail: Any) -> float | None:
    info = _unpack(detail, error_details_pb2.RetryInfo())
    delay = info.retry_delay
    return max(0.0, delay.seconds + delay.nanos / 1e9) if info.HasField("retry_delay") else None


def reason_of(number: int) -> Reason:
    """The reason of an enum field; UNSPECIFIED where it is newer than this package."""
    return _BY_NUMBER.get(number, Reason.UNSPECIFIED)


_BY_NUMBER = {reason.value: reason for reason in Reason}


def error_trailers(
    code: grpc.StatusCode,
    message: str,
    reason: Reason,
    metadata: Mapping[str, str] | None = None,
    retry_after_s: float | None = None,
) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata from which `from_rpc_error` rebuilds the error."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if reason:
        info = error_details_pb2.ErrorInfo(reason=reason.name, domain=DOMAIN, metadata=metadata)
        status.details.add().Pack(info)
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(retry_after_s * 1000))
        status.details.add().Pack(retry)
    return ((DETAILS_KEY, status.SerializeToString()),)
