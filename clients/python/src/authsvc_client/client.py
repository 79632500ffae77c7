"""AuthsvcClient: the calls that people want, typed; `stub` has the rest."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from .core.claims import Claims
from .core.reason import Reason
from .core.step_up import NO_STEP_UP, StepUp
from .errors import AuthsvcError, reason_of
from .token_source import Token, TokenSource
from .v1 import auth_pb2
from .v1.auth_pb2_grpc import AuthServiceStub

TIMEOUT_S = 5.0
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - no password
REFRESH_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:refresh_token"  # noqa: S105


@dataclass(frozen=True, slots=True)
class RemoteVerdict:
    """What ValidateToken answered."""

    active: bool
    reason: Reason
    """UNSPECIFIED when active."""
    claims: Claims | None
    """Of an active token."""
    missing_scopes: frozenset[str]
    revision: int
    reusable_until: float
    """Until when, in seconds since the epoch by authsvc's clock, the same question may be answered
    by this again."""
    missing_permissions: frozenset[str] = frozenset()
    permissions: frozenset[str] = frozenset()
    """Live ones of the subject, where they were asked for."""
    www_authenticate: str = ""
    """Ready text of that header, where a stronger or more recent authentication is needed."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """Public signing keys (RFC 7517)."""

    keys: tuple[dict[str, str], ...]
    """JWKs."""
    max_age_s: float
    """How long they may be kept."""


class AuthsvcClient:
    """Calls authsvc over a channel, which it closes with itself; raises AuthsvcError.

    `stub` is the generated one, for the RPCs and fields that have no method here; its errors are
    gRPC's own, AuthsvcError.from_rpc_error() makes them typed.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float = TIMEOUT_S) -> None:
        """The channel carries no bearer token; `timeout_s` bounds each call."""
        self._channel, self._timeout_s = channel, timeout_s
        self.stub = AuthServiceStub(channel)

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
        request = auth_pb2.IssueTokenRequest(
            client_credentials=auth_pb2.ClientCredentialsGrant(),
            client_id=client_id,
            client_credential=_credential(client_secret),
            scopes=scopes,
            resources=resources,
        )
        return _token(await self._call(self.stub.IssueToken, request))

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
        grant = auth_pb2.TokenExchangeGrant(
            subject_token=subject_token,
            subject_token_type=ACCESS_TOKEN_TYPE,
            requested_token_type=REFRESH_TOKEN_TYPE if refreshable else ACCESS_TOKEN_TYPE,
        )
        request = auth_pb2.IssueTokenRequest(
            token_exchange=grant,
            client_id=client_id,
            client_credential=_credential(client_secret),
            scopes=scopes,
            resources=resources,
        )
        return _token(await self._call(self.stub.IssueToken, request))

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
        request = auth_pb2.RefreshTokenRequest(
            refresh_token=refresh_token,
            client_id=client_id,
            client_credential=_credential(client_secret),
            scopes=scopes,
            resources=resources,
        )
        return _token(await self._call(self.stub.RefreshToken, request))

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
    ) -> RemoteVerdict:
        """Judges an access token; one that is not active is an answer, no error. `permissions` of
        its subject must be held now; `full` answers all of them."""
        request = auth_pb2.ValidateTokenRequest(
            token=token,
            audience=audience,
            required_scopes=scopes,
            require_bound=require_bound,
            required_permissions=permissions,
            acr_values=step_up.acr_values,
            view=auth_pb2.TOKEN_VIEW_FULL if full else auth_pb2.TOKEN_VIEW_CLAIMS,
        )
        if step_up.max_age_s is not None:
            request.max_age.FromSeconds(step_up.max_age_s)
        if thumbprint:
            request.presenter.certificate_thumbprint = thumbprint
        return _verdict(await self._call(self.stub.ValidateToken, request))

    async def revoke(
        self, token: str, *, client_id: str = "", client_secret: str | None = None
    ) -> int:
        """Revokes a token of the calling client; the revision from which it is dead everywhere,
        0 where there was nothing to revoke."""
        request = auth_pb2.RevokeTokenRequest(
            token=token, client_id=client_id, client_credential=_credential(client_secret)
        )
        response: auth_pb2.RevokeTokenResponse = await self._call(self.stub.RevokeToken, request)
        return response.revision

    async def revoke_jti(self, jti: str) -> int:
        """Revokes an access token by its `jti`; administrators only. Answers as `revoke`."""
        request = auth_pb2.RevokeTokenRequest(jti=jti)
        response: auth_pb2.RevokeTokenResponse = await self._call(self.stub.RevokeToken, request)
        return response.revision

    async def keys(self) -> KeySet:
        """The public signing keys."""
        response = await self._call(self.stub.GetKeys, auth_pb2.GetKeysRequest())
        keys = ({field.name: value for field, value in jwk.ListFields()} for jwk in response.keys)
        return KeySet(tuple(keys), _seconds(response.max_age))

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

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s)
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


def _credential(client_secret: str | None) -> auth_pb2.ClientCredential | None:
    return None if client_secret is None else auth_pb2.ClientCredential(client_secret=client_secret)


def _token(
    response: auth_pb2.IssueTokenResponse | auth_pb2.RefreshTokenResponse,
) -> Token:
    token = response.token
    return Token(
        value=token.access_token,
        lifetime_s=_seconds(token.expires_in),
        scopes=tuple(token.scopes),
        audiences=tuple(token.audiences),
        jti=token.jti,
        refresh_token=token.refresh_token,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _verdict(response: auth_pb2.ValidateTokenResponse) -> RemoteVerdict:
    reason = reason_of(response.reason)
    if response.active:
        reason = Reason.UNSPECIFIED
    elif not reason:  # newer than this package
        reason = Reason.TOKEN_INACTIVE
    until = response.reusable_until
    return RemoteVerdict(
        active=response.active,
        reason=reason,
        claims=_claims(response.claims) if response.active else None,
        missing_scopes=frozenset(response.missing_scopes),
        revision=response.revision,
        reusable_until=until.seconds + until.nanos / 1e9,
        missing_permissions=frozenset(response.missing_permissions),
        permissions=frozenset(response.permissions),
        www_authenticate=response.step_up_challenge.www_authenticate,
    )


def _claims(claims: auth_pb2.TokenClaims) -> Claims:
    return Claims(
        issuer=claims.issuer,
        subject=claims.subject,
        audiences=tuple(claims.audiences),
        expires=claims.expire_time.seconds,
        issued=claims.issue_time.seconds,
        jti=claims.jti,
        client_id=claims.client_id,
        scopes=frozenset(claims.scopes),
        revision=claims.revision,
        grant_id=claims.grant_id,
        session_id=claims.session_id,
        root_jti=claims.root_jti,
        certificate_thumbprint=claims.certificate_thumbprint,
        jwk_thumbprint=claims.jwk_thumbprint,
        auth_time=claims.auth_time.seconds if claims.HasField("auth_time") else None,
        acr=claims.acr,
        amr=tuple(claims.amr),
        actors=_actors(claims),
        may_act=claims.may_act,
        key_ids=tuple(claims.key_ids),
        permissions=tuple(claims.permissions),
        permissions_revision=claims.permissions_revision,
    )


def _actors(claims: auth_pb2.TokenClaims) -> tuple[str, ...]:
    """Outermost first."""
    actors: list[str] = []
    holder: auth_pb2.TokenClaims | auth_pb2.Actor = claims
    while holder.HasField("actor"):
        holder = holder.actor
        actors.append(holder.subject)
    return tuple(actors)
