"""What is asked of authsvc, and what its answers mean: the same for both clients."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import grpc
from google.protobuf.duration_pb2 import Duration

from .core.claims import Claims
from .core.reason import Reason
from .core.step_up import NO_STEP_UP, StepUp
from .errors import AuthsvcError, DeadlineExceeded, Internal, reason_of
from .token_source import Token
from .v1 import auth_pb2

ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - no password
REFRESH_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:refresh_token"  # noqa: S105


_SECRET_PREFIXES = ("asvc_at_", "asvc_ak_")
"""Of opaque access tokens and API keys."""


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

    def but(self, reason: Reason) -> "RemoteVerdict":
        """The same; or a refusal, where another reason counts."""
        if reason is self.reason:
            return self
        nothing: frozenset[str] = frozenset()
        return replace(self, active=False, reason=reason, claims=None, permissions=nothing)


@dataclass(frozen=True, slots=True)
class KeySet:
    """Public signing keys (RFC 7517)."""

    keys: tuple[dict[str, str], ...]
    """JWKs."""
    max_age_s: float
    """How long they may be kept."""


def client_credentials(
    client_id: str,
    scopes: Iterable[str],
    resources: Iterable[str],
    client_secret: str | None,
) -> auth_pb2.IssueTokenRequest:
    return auth_pb2.IssueTokenRequest(
        client_credentials=auth_pb2.ClientCredentialsGrant(),
        client_id=client_id,
        client_credential=_credential(client_secret),
        scopes=scopes,
        resources=resources,
    )


def exchange(
    client_id: str,
    subject_token: str,
    scopes: Iterable[str],
    resources: Iterable[str],
    refreshable: bool,
    client_secret: str | None,
) -> auth_pb2.IssueTokenRequest:
    grant = auth_pb2.TokenExchangeGrant(
        subject_token=subject_token,
        subject_token_type=ACCESS_TOKEN_TYPE,
        requested_token_type=REFRESH_TOKEN_TYPE if refreshable else ACCESS_TOKEN_TYPE,
    )
    return auth_pb2.IssueTokenRequest(
        token_exchange=grant,
        client_id=client_id,
        client_credential=_credential(client_secret),
        scopes=scopes,
        resources=resources,
    )


def refresh(
    client_id: str,
    refresh_token: str,
    scopes: Iterable[str],
    resources: Iterable[str],
    client_secret: str | None,
) -> auth_pb2.RefreshTokenRequest:
    return auth_pb2.RefreshTokenRequest(
        refresh_token=refresh_token,
        client_id=client_id,
        client_credential=_credential(client_secret),
        scopes=scopes,
        resources=resources,
    )


def validate(
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
) -> auth_pb2.ValidateTokenRequest:
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
    if at_least:
        request.consistency.at_least = at_least
    return request


def knowing(request: auth_pb2.ValidateTokenRequest, revision: int) -> auth_pb2.ValidateTokenRequest:
    """The same question to a state that knows this revision too."""
    if request.consistency.HasField("strong") or request.consistency.at_least >= revision:
        return request
    asked = auth_pb2.ValidateTokenRequest()
    asked.CopyFrom(request)
    asked.consistency.at_least = revision
    return asked


def is_jwt(token: str) -> bool:
    """Whether it may be one; opaque and encrypted tokens and API keys only authsvc can tell."""
    return not token.startswith(_SECRET_PREFIXES) and token.count(".", 0, 16384) != 4


def revoke(token: str, client_id: str, client_secret: str | None) -> auth_pb2.RevokeTokenRequest:
    return auth_pb2.RevokeTokenRequest(
        token=token, client_id=client_id, client_credential=_credential(client_secret)
    )


def key_set_of(response: auth_pb2.GetKeysResponse) -> KeySet:
    keys = ({field.name: value for field, value in jwk.ListFields()} for jwk in response.keys)
    return KeySet(tuple(keys), _seconds(response.max_age))


def _credential(client_secret: str | None) -> auth_pb2.ClientCredential | None:
    return None if client_secret is None else auth_pb2.ClientCredential(client_secret=client_secret)


def token_of(
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


def verdict_of(response: auth_pb2.ValidateTokenResponse) -> RemoteVerdict:
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


Result = auth_pb2.ValidateTokenResponse | AuthsvcError


def results_of(response: auth_pb2.BatchValidateTokensResponse, asked: int) -> list[Result]:
    """Answers in the order of the questions; raises AuthsvcError where they are not as many."""
    if len(response.results) != asked:
        raise Internal("not as many answers as questions", code=grpc.StatusCode.INTERNAL)
    return [
        AuthsvcError.of_item(result.error.code, result.error.reason, result.error.message)
        if result.HasField("error")
        else result.verdict
        for result in response.results
    ]


def waited_too_long(timeout_s: float) -> DeadlineExceeded:
    """For a question that found no place in a call in time."""
    return DeadlineExceeded(f"no answer in {timeout_s:g} s", code=grpc.StatusCode.DEADLINE_EXCEEDED)


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
