"""Tokens on blocking calls: client interceptors that send a service's own one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import grpc

from . import clock
from .client_interceptors import (
    AUTHORIZATION,
    TokenCredentials,
    has_authorization,
    is_renewed_for,
    trailers_of,
)
from .errors import AuthsvcError, TokenUnavailable
from .request_id import header
from .sync_token_source import SyncTokenSource


def sync_bearer(source: SyncTokenSource, *, tls: bool = False) -> list[Any]:
    """As `bearer`, for `grpc.intercept_channel(channel, *sync_bearer(source))`.

    A unary-unary call is sent once more where it blocks; one made by `future()` is not, as its
    maker does not wait. `tls=True` vouches for the channel; authsvc_client.sync_channel() does so.
    """
    return [_Bearer(source, tls)]


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Of all four kinds."""

    def __init__(self, source: SyncTokenSource, tls: bool) -> None:
        self._source, self._tls = source, tls
        self._credentials = TokenCredentials()

    def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        if has_authorization(client_call_details):
            return continuation(client_call_details, request)
        timeout_s = client_call_details.timeout
        deadline = None if timeout_s is None else clock.boot() + timeout_s
        try:
            shown, token = self._show(client_call_details, deadline)
        except _FailedCall as failed:
            return failed
        call = continuation(shown, request)
        if not call.done():  # made by future()
            return _Watched(call, self._refused, token)
        if not self._refused(call, token):
            return call
        try:
            shown, token = self._show(client_call_details, deadline)
        except _FailedCall:
            return call  # the callee's own answer says more
        return _Watched(continuation(shown, request), self._refused, token)

    def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return self._once(continuation, client_call_details, request)

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return self._once(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return self._once(continuation, client_call_details, request_iterator)

    def _once(self, continuation: Any, details: Any, request: Any) -> Any:
        if has_authorization(details):
            return continuation(details, request)
        deadline = None if details.timeout is None else clock.boot() + details.timeout
        try:
            shown, token = self._show(details, deadline)
        except _FailedCall as failed:
            return failed
        return _Watched(continuation(shown, request), self._refused, token)

    def _show(self, details: Any, deadline: float | None) -> tuple["_Details", str]:
        """The call with a token, and the token; waits for one until the call's deadline."""
        try:
            token = self._source.token(None if deadline is None else deadline - clock.boot())
        except TimeoutError as timeout:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise _FailedCall(AuthsvcError("no access token in time", code=code)) from timeout
        except TokenUnavailable as unavailable:
            raise _FailedCall(unavailable) from unavailable
        metadata = (*(details.metadata or ()), *header(details.metadata))
        credentials = details.credentials
        if self._tls:
            metadata = (*metadata, (AUTHORIZATION, f"Bearer {token}"))
        else:
            credentials = self._credentials.beside(credentials, token)
        shown = _Details(
            method=details.method,
            timeout=None if deadline is None else max(0.0, deadline - clock.boot()),
            metadata=metadata,
            credentials=credentials,
            wait_for_ready=details.wait_for_ready,
            compression=details.compression,
        )
        return shown, token

    def _refused(self, call: Any, token: str) -> bool:
        """Whether the token of a call that ended was refused, which is then dropped."""
        if call.code() is not grpc.StatusCode.UNAUTHENTICATED:
            return False
        if not is_renewed_for(AuthsvcError.from_rpc_error(call)):
            return False
        self._source.invalidate(token)
        return True


@dataclass(frozen=True, slots=True)
class _Details(grpc.ClientCallDetails):
    method: str
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: Any


class _Watched:
    """A call that is looked at when its caller learns of its end.

    It hangs no callback on the call, or gRPC would no longer cancel one that its caller dropped.
    """

    def __init__(self, call: Any, ended: Callable[[Any, str], object], token: str) -> None:
        self._call, self._ended, self._token = call, ended, token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._looked_at(self._call.__next__)

    def result(self, *timeout: Any, **named: Any) -> Any:
        return self._looked_at(self._call.result, *timeout, **named)

    def exception(self, *timeout: Any, **named: Any) -> Any:
        found = self._call.exception(*timeout, **named)
        if isinstance(found, grpc.RpcError):
            self._ended(self._call, self._token)
        return found

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        self._call.add_done_callback(lambda _: fn(self))

    def _looked_at(self, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return read(*args, **kwargs)
        except grpc.RpcError:
            self._ended(self._call, self._token)
            raise


class _FailedCall(grpc.RpcError, grpc.Call, grpc.Future):  # type: ignore[type-arg]
    """As gRPC would have made it: to who calls, no token is a call that failed."""

    def __init__(self, error: AuthsvcError) -> None:
        super().__init__(error.message)
        self._error = error

    def code(self) -> grpc.StatusCode:
        return self._error.code

    def details(self) -> str:
        return self._error.message

    def initial_metadata(self) -> Any:
        return ()

    def trailing_metadata(self) -> Any:
        return trailers_of(self._error)

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return False

    def add_callback(self, *_: Any) -> bool:
        return False

    def cancelled(self) -> bool:
        return False

    def running(self) -> bool:
        return False

    def done(self) -> bool:
        return True

    def result(self, *_: Any, **__: Any) -> NoReturn:
        raise self

    def exception(self, *_: Any, **__: Any) -> Self:
        return self

    def traceback(self, *_: Any, **__: Any) -> Any:
        return self.__traceback__

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        fn(self)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> NoReturn:
        raise self
