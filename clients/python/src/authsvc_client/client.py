"""AuthsvcClient: the calls that people want, typed; `stub` has the rest."""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from . import messages
from .coalesce import Coalesce, Request, Response
from .core.step_up import NO_STEP_UP, StepUp
from .errors import AuthsvcError
from .messages import ACCESS_TOKEN_TYPE as ACCESS_TOKEN_TYPE
from .messages import REFRESH_TOKEN_TYPE as REFRESH_TOKEN_TYPE
from .messages import KeySet, RemoteVerdict, is_jwt
from .request_id import header
from .token_source import Token, TokenSource
from .v1 import auth_pb2
from .v1.auth_pb2_grpc import AuthServiceStub

TIMEOUT_S = 5.0


class AuthsvcClient:
    """Calls authsvc over a channel, which it closes with itself; raises AuthsvcError.

    `stub` is the generated one, for the RPCs and fields that have no method here; its errors are
    gRPC's own, AuthsvcError.from_rpc_error() makes them typed.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float = TIMEOUT_S) -> None:
        """The channel carries no bearer token; `timeout_s` bounds each call."""
        self._channel, self._timeout_s = channel, timeout_s
        self.stub = AuthServiceStub(channel)
        self._at_hand, self._looked_up = (
            Coalesce(self._validate_one, self._validate_many, timeout_s) for _ in range(2)
        )

    async def issue_client_credentials(
        self,
        client_id: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        client_secret: str | None = None,
    ) -> Token:
        """A token for the client itself (RFC 6749 section 4.4), which authenticates by the
        channel's certificate or by `client_secret`."""
        request = messages.client_credentials(client_id, scopes, resources, client_secret)
        return messages.token_of(await self._call(self.stub.IssueToken, request))

    async def exchange(
        self,
        client_id: str,
        subject_token: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        refreshable: bool = False,
        client_secret: str | None = None,
    ) -> Token:
        """A token to act for the subject of one that was sent to the client (RFC 8693): with no
        more scopes, and no longer life. `refreshable`: a refresh token instead, for `refresh`."""
        request = messages.exchange(
            client_id, subject_token, scopes, resources, refreshable, client_secret
        )
        return messages.token_of(await self._call(self.stub.IssueToken, request))

    async def refresh(
        self,
        client_id: str,
        refresh_token: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        client_secret: str | None = None,
    ) -> Token:
        """An access token, with the refresh token to use next (RFC 6749 section 6). Whoever loses
        the answer asks again with the same one; one that was used before its successor ends all."""
        request = messages.refresh(client_id, refresh_token, scopes, resources, client_secret)
        return messages.token_of(await self._call(self.stub.RefreshToken, request))

    async def validate(
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
        """Judges an access token; one that is not active is an answer, no error. `permissions` of
        its subject must be held now; `full` answers all of them. Whoever answers knows what was
        done up to the revision `at_least`, as `revoke` answered it."""
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
        return messages.verdict_of(await self.ask(request))

    async def ask(self, request: Request) -> Response:
        """As the stub's ValidateToken; questions that are asked at once travel in one call."""
        if request.view == auth_pb2.TOKEN_VIEW_FULL:  # an answer of any size
            return await self._validate_one(request)
        # What may have to be looked up holds up only its like.
        is_at_hand = is_jwt(request.token) and not request.required_permissions
        coalesce = self._at_hand if is_at_hand else self._looked_up
        return await coalesce(request)

    async def revoke(
        self, token: str, *, client_id: str = "", client_secret: str | None = None
    ) -> int:
        """Revokes a token of the calling client; the revision from which it is dead everywhere,
        0 where there was nothing to revoke."""
        request = messages.revoke(token, client_id, client_secret)
        response: auth_pb2.RevokeTokenResponse = await self._call(self.stub.RevokeToken, request)
        return response.revision

    async def revoke_jti(self, jti: str) -> int:
        """Revokes an access token by its `jti`; administrators only. Answers as `revoke`."""
        request = auth_pb2.RevokeTokenRequest(jti=jti)
        response: auth_pb2.RevokeTokenResponse = await self._call(self.stub.RevokeToken, request)
        return response.revision

    async def keys(self) -> KeySet:
        """The public signing keys."""
        return messages.key_set_of(await self._call(self.stub.GetKeys, auth_pb2.GetKeysRequest()))

    def token_source(
        self,
        client_id: str,
        scopes: Iterable[str] = (),
        resources: Iterable[str] = (),
        *,
        client_secret: str | None = None,
        **settings: Any,
    ) -> TokenSource:
        """A TokenSource by client_credentials; `settings` are its own. Close it before this."""
        scopes, resources = tuple(scopes), tuple(resources)

        async def fetch() -> Token:
            return await self.issue_client_credentials(
                client_id, scopes, resources, client_secret=client_secret
            )

        return TokenSource(fetch, **settings)

    async def close(self) -> None:
        """Closes the channel; calls that run are cancelled."""
        await self._channel.close()

    async def _validate_one(self, request: Request) -> Response:
        answer: Response = await self._call(self.stub.ValidateToken, request)
        return answer

    async def _validate_many(self, requests: Sequence[Request]) -> list[messages.Result]:
        request = auth_pb2.BatchValidateTokensRequest(requests=requests)
        answer = await self._call(self.stub.BatchValidateTokens, request)
        return messages.results_of(answer, len(requests))

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s, metadata=header())
        except grpc.RpcError as error:
            raise AuthsvcError.from_rpc_error(error) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()
