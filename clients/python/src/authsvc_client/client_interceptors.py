"""Tokens on calls: client interceptors that send a service's own one."""

import asyncio
import functools
from typing import Any

import grpc

from .core.reason import Reason
from .errors import AuthsvcError, TokenUnavailable, error_trailers
from .request_id import header
from .token_source import TokenSource

AUTHORIZATION = "authorization"

RENEWED_FOR = frozenset(
    {
        Reason.TOKEN_REVOKED,
        Reason.TOKEN_CUT_OFF,
        Reason.GRANT_REVOKED,
        Reason.SESSION_ENDED,
        Reason.TOKEN_KEY_TAINTED,
        Reason.TOKEN_KEY_UNKNOWN,
        Reason.TOKEN_EXPIRED,
        Reason.PROOF_MISMATCH,  # the own certificate was replaced after the token was issued
    }
)
"""Reasons of a callee's UNAUTHENTICATED that a new token can help against."""


def is_renewed_for(error: AuthsvcError) -> bool:
    """Whether a new token can help against a callee's UNAUTHENTICATED."""
    reason = error.reason
    if reason is Reason.CALLER_TOKEN_INVALID:  # authsvc's own answer to a bearer token
        name = error.metadata.get("verdict", "")
        reason = Reason.__members__.get(name, Reason.UNSPECIFIED)
    return reason in RENEWED_FOR


def has_authorization(details: Any) -> bool:
    """Whether a call brings its own."""
    return any(key.lower() == AUTHORIZATION for key, _ in details.metadata or ())


def trailers_of(error: AuthsvcError) -> tuple[tuple[str, bytes], ...]:
    """Those with which the callee would have sent it."""
    return error_trailers(
        error.code, error.message, error.reason, error.metadata, error.retry_after_s
    )


class TokenCredentials:
    """Tokens as call credentials, which gRPC refuses to send in the clear."""

    def __init__(self) -> None:
        self._made = functools.lru_cache(maxsize=2)(grpc.access_token_call_credentials)

    def beside(self, own: grpc.CallCredentials | None, token: str) -> grpc.CallCredentials:
        """A token's, with those that the call brings."""
        made = self._made(token)
        return made if own is None else grpc.composite_call_credentials(own, made)


def bearer(source: TokenSource, *, tls: bool = False) -> list[grpc.aio.ClientInterceptor]:
    """Interceptors of all four kinds that add `authorization: Bearer <token>`.

    A call that brings its own `authorization` is left alone. Where a callee refuses the token for
    a reason that another one helps against, it is renewed; a unary-unary call is then sent once
    more, streams are not.

    gRPC does not tell an interceptor whether its channel is encrypted. So the token travels as
    call credentials, which gRPC refuses to send in the clear - at the cost of a thread for each
    call. `tls=True` vouches for the channel and spares it; authsvc_client.channel() does so.
    """
    tokens = _Tokens(source, tls)
    return [
        _UnaryUnary(tokens),
        _UnaryStream(tokens),
        _StreamUnary(tokens),
        _StreamStream(tokens),
    ]


class _Tokens:
    """What the four interceptors share."""

    def __init__(self, source: TokenSource, tls: bool) -> None:
        self._source, self._tls = source, tls
        self._credentials = TokenCredentials()
        self._tasks: set[asyncio.Task[bool]] = set()

    async def show(self, details: Any, deadline: float | None) -> tuple[Any, str]:
        """The call with a token, and the token; waits for one until the call's deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                token = await self._source.token()
        except TimeoutError:
            error = AuthsvcError("no access token in time", code=grpc.StatusCode.DEADLINE_EXCEEDED)
            raise _rpc_error(error) from None
        except TokenUnavailable as unavailable:
            raise _rpc_error(unavailable) from unavailable
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *header(details.metadata))
        credentials = details.credentials
        if self._tls:
            metadata.add(AUTHORIZATION, f"Bearer {token}")
        else:
            credentials = self._credentials.beside(credentials, token)
        shown = grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=None if deadline is None else max(0.0, deadline - _loop_time()),
            metadata=metadata,
            credentials=credentials,
            wait_for_ready=details.wait_for_ready,
        )
        return shown, token

    async def refused(self, call: Any, token: str) -> bool:
        """Waits for a call; whether its token was refused, which is then dropped."""
        if await call.code() is not grpc.StatusCode.UNAUTHENTICATED:
            return False
        error = AuthsvcError.from_rpc_error(
            grpc.aio.AioRpcError(
                grpc.StatusCode.UNAUTHENTICATED,
                await call.initial_metadata(),
                await call.trailing_metadata(),
            )
        )
        if not is_renewed_for(error):
            return False
        self._source.invalidate(token)
        return True

    async def stream(self, continuation: Any, details: Any, request: Any) -> Any:
        """One call, watched to its end."""
        if has_authorization(details):
            return await continuation(details, request)
        shown, token = await self.show(details, _deadline(details))
        call = await _proceed(continuation, shown, request)
        call.add_done_callback(functools.partial(self._ended, token))
        return call

    def _ended(self, token: str, call: Any) -> None:
        if call.cancelled():
            return
        task = asyncio.get_running_loop().create_task(self.refused(call, token))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        if has_authorization(client_call_details):
            return await continuation(client_call_details, request)
        deadline = _deadline(client_call_details)
        shown, token = await self._tokens.show(client_call_details, deadline)
        call = await _proceed(continuation, shown, request)
        if not await self._refused(call, token):
            return call
        try:
            shown, token = await self._tokens.show(client_call_details, deadline)
        except grpc.aio.AioRpcError:
            return call  # the callee's own answer says more
        again = await _proceed(continuation, shown, request)
        await self._refused(again, token)
        return again

    async def _refused(self, call: Any, token: str) -> bool:
        try:
            return await self._tokens.refused(call, token)
        except asyncio.CancelledError:
            call.cancel()
            raise


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens

    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return await self._tokens.stream(continuation, client_call_details, request)


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):
    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens

    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await self._tokens.stream(continuation, client_call_details, request_iterator)


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):
    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens

    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await self._tokens.stream(continuation, client_call_details, request_iterator)


async def _proceed(continuation: Any, details: Any, request: Any) -> Any:
    try:
        return await continuation(details, request)
    except grpc.aio.UsageError as usage:
        if details.credentials is None:
            raise
        text = "a token is not sent over a channel without TLS"
        raise _rpc_error(AuthsvcError(text, code=grpc.StatusCode.UNAUTHENTICATED)) from usage


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


def _deadline(details: Any) -> float | None:
    return None if details.timeout is None else _loop_time() + details.timeout


def _rpc_error(error: AuthsvcError) -> grpc.aio.AioRpcError:
    """As gRPC would have raised it: to who calls, no token is a call that failed."""
    trailers = grpc.aio.Metadata(*trailers_of(error))
    return grpc.aio.AioRpcError(error.code, grpc.aio.Metadata(), trailers, error.message)
