"""SyncAuthsvcClient: the calls of AuthsvcClient, blocking."""

import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from . import messages
from .client import TIMEOUT_S
from .coalesce import Request, Response
from .core.step_up import NO_STEP_UP, StepUp
from .errors import AuthsvcError, TokenUnavailable
from .messages import KeySet, RemoteVerdict, is_jwt
from .request_id import header
from .sync_coalesce import SyncCoalesce
from .sync_token_source import SyncTokenSource
from .token_source import Token
from .v1 import auth_pb2
from .v1.auth_pb2_grpc import AuthServiceStub


class SyncAuthsvcClient:
    """As AuthsvcClient, for threads, which may share it: calls authsvc over a channel, which it
    closes with itself; raises AuthsvcError. `stub` is the generated one."""

    def __init__(self, channel: grpc.Channel, *, timeout_s: float = TIMEOUT_S) -> None:
        """The channel carries no bearer token; `timeout_s` bounds each call."""
        self._channel, self._timeout_s = channel, timeout_s
        self.stub = AuthServiceStub(channel)
        self._at_hand, self._looked_up = (
            SyncCoalesce(self._validate_one, self._validate_many, timeout_s) for _ in range(2)
        )

    def issue_client_credentials(
        self,
        client_id: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        client_secret: str | None = None,
    ) -> Token:
        """A token for the client itself, as AuthsvcClient's."""
        request = messages.client_credentials(client_id, scopes, resources, client_secret)
        return messages.token_of(self._call(self.stub.IssueToken, request))

    def exchange(
        self,
        client_id: str,
        subject_token: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        refreshable: bool = False,
        client_secret: str | None = None,
    ) -> Token:
        """A token to act for the subject of another one, as AuthsvcClient's."""
        request = messages.exchange(
            client_id, subject_token, scopes, resources, refreshable, client_secret
        )
        return messages.token_of(self._call(self.stub.IssueToken, request))

    def refresh(
        self,
        client_id: str,
        refresh_token: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        client_secret: str | None = None,
    ) -> Token:
        """An access token, with the refresh token to use next, as AuthsvcClient's."""
        request = messages.refresh(client_id, refresh_token, scopes, resources, client_secret)
        return messages.token_of(self._call(self.stub.RefreshToken, request))

    def validate(
        self,
        token: str,
        *,
        audience: str = "",
        scopes: Iterable[str] = (),
        thumbprint: str = "",
        require_bound: bool = False,
        permissions: Iterable[str] = (),
        step_up: StepUp = NO_STEP_UP,
        full: bool = False,
        at_least: int = 0,
    ) -> RemoteVerdict:
        """Judges an access token, as AuthsvcClient's: one that is not active is no error."""
        request = messages.validate(
            token,
            audience=audience,
            scopes=scopes,
            thumbprint=thumbprint,
            require_bound=require_bound,
            permissions=permissions,
            step_up=step_up,
            full=full,
            at_least=at_least,
        )
        return messages.verdict_of(self.ask(request))

    def ask(self, request: Request) -> Response:
        """As the stub's ValidateToken; questions that are asked at once travel in one call."""
        if request.view == auth_pb2.TOKEN_VIEW_FULL:  # an answer of any size
            return self._validate_one(request)
        # What may have to be looked up holds up only its like.
        is_at_hand = is_jwt(request.token) and not request.required_permissions
        coalesce = self._at_hand if is_at_hand else self._looked_up
        return coalesce(request)

    def revoke(self, token: str, *, client_id: str = "", client_secret: str | None = None) -> int:
        """Revokes a token of the calling client, as AuthsvcClient's."""
        request = messages.revoke(token, client_id, client_secret)
        response: auth_pb2.RevokeTokenResponse = self._call(self.stub.RevokeToken, request)
        return response.revision

    def revoke_jti(self, jti: str) -> int:
        """Revokes an access token by its `jti`, as AuthsvcClient's."""
        request = auth_pb2.RevokeTokenRequest(jti=jti)
        response: auth_pb2.RevokeTokenResponse = self._call(self.stub.RevokeToken, request)
        return response.revision

    def keys(self) -> KeySet:
        """The public signing keys."""
        return messages.key_set_of(self._call(self.stub.GetKeys, auth_pb2.GetKeysRequest()))

    def token_source(
        self,
        client_id: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        client_secret: str | None = None,
        **settings: Any,
    ) -> SyncTokenSource:
        """A SyncTokenSource by client_credentials; `settings` are its own. Close it before this."""
        request = messages.client_credentials(client_id, scopes, resources, client_secret)
        fetch = _Fetch(self.stub.IssueToken, request, self._timeout_s)
        return SyncTokenSource(fetch, cancel=fetch.cancel, **settings)

    def close(self) -> None:
        """Closes the channel; calls that run are cancelled."""
        self._channel.close()

    def _validate_one(self, request: Request) -> Response:
        answer: Response = self._call(self.stub.ValidateToken, request)
        return answer

    def _validate_many(self, requests: Sequence[Request]) -> list[messages.Result]:
        request = auth_pb2.BatchValidateTokensRequest(requests=requests)
        answer = self._call(self.stub.BatchValidateTokens, request)
        return messages.results_of(answer, len(requests))

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=header())
        except grpc.RpcError as error:
            raise AuthsvcError.from_rpc_error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()


class _Fetch:
    """Asks for a token, until another thread cancels it."""

    def __init__(self, method: Any, request: Any, timeout_s: float) -> None:
        self._method, self._request, self._timeout_s = method, request, timeout_s
        self._lock = threading.Lock()
        self._call: Any = None
        self._cancelled = False

    def __call__(self) -> Token:
        with self._lock:
            if self._cancelled:
                raise TokenUnavailable("the token source is closed")
            self._call = self._method.future(
                self._request, timeout=self._timeout_s, metadata=header()
            )
        try:
            return messages.token_of(self._call.result())
        except grpc.RpcError as error:
            raise AuthsvcError.from_rpc_error(error) from error

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._call is not None:
                self._call.cancel()
