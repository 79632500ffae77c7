"""Between the wire's messages and the model's values; dull, and complete."""

from dataclasses import replace
from typing import Any, NamedTuple

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from authsvc.errors import AuthError, Reason, not_implemented
from authsvc.feed.recent import Beat, Event
from authsvc.grants.proof import Exchange, Password
from authsvc.identify import NEVER
from authsvc.mint import Reissued, TokenAnswer
from authsvc.model import (
    Resource,
    SigningKey,
    TokenFormat,
)
from authsvc.rpc.limits import field_invalid
from authsvc.validate import Answer
from authsvc_client.core.claims import Claims
from authsvc_client.core.judge import REUSABLE_S, Question, Verdict, Verified
from authsvc_client.core.step_up import NO_STEP_UP, StepUp, is_acr
from authsvc_client.v1 import auth_pb2, error_reason_pb2, keys_pb2, resources_pb2


def timestamp(seconds: float | None) -> Timestamp | None:
    """Seconds since the epoch; None stays unset."""
    if seconds is None:
        return None
    stamp = Timestamp()
    _set_time(stamp, seconds)
    return stamp


def _set_time(stamp: Timestamp, seconds: float) -> None:
    whole = int(seconds)
    stamp.seconds = whole
    stamp.nanos = int((seconds - whole) * 1e9)


def require_absent(message: object, *fields: str) -> None:
    """Raises AuthError NOT_IMPLEMENTED where a field is set that this version cannot honour."""
    for field in fields:
        if getattr(message, field):
            raise not_implemented(field)


def version_of(etag: str) -> int | None:
    """The version that an etag names; None takes any. AuthError ETAG_MISMATCH for what is none."""
    if not etag:
        return None
    if not (etag.isascii() and etag.isdigit() and len(etag) < 10):
        raise AuthError(Reason.ETAG_MISMATCH)
    return int(etag)


def resource(message: resources_pb2.Resource) -> Resource:
    """A resource as it is asked for, defaults filled in."""
    names = [scope.name for scope in message.scopes]
    if len(set(names)) != len(names):
        raise field_invalid("resource.scopes", "has an item twice")
    bounded = message.HasField("staleness_max")
    lifetime = message.token_lifetime.seconds if message.HasField("token_lifetime") else 300
    return Resource(
        resource_id=message.resource_id,
        scopes={scope.name: scope.description for scope in message.scopes},
        create_time=0.0,
        update_time=0.0,
        display_name=message.display_name,
        owner_client_id=message.owner_client_id,
        token_format=TokenFormat(message.token_format or TokenFormat.JWT),
        token_lifetime_s=lifetime,
        staleness_max_s=message.staleness_max.seconds if bounded else None,
        encryption_jwk=message.encryption_jwk,
        freeze_permissions=message.freeze_permissions,
    )


def resource_pb(found: Resource) -> resources_pb2.Resource:
    """A resource."""
    bound = found.staleness_max_s
    return resources_pb2.Resource(
        resource_id=found.resource_id,
        display_name=found.display_name,
        owner_client_id=found.owner_client_id,
        scopes=[
            resources_pb2.Scope(name=name, description=text)
            for name, text in sorted(found.scopes.items())
        ],
        token_format=resources_pb2.TokenFormat.ValueType(found.token_format),
        token_lifetime=Duration(seconds=found.token_lifetime_s),
        staleness_max=Duration(seconds=bound) if bound is not None else None,
        encryption_jwk=found.encryption_jwk,
        freeze_permissions=found.freeze_permissions,
        etag=str(found.version),
        create_time=timestamp(found.create_time),
        update_time=timestamp(found.update_time),
    )


def signing_key_pb(key: SigningKey) -> keys_pb2.SigningKey:
    """A signing key, without its key material."""
    return keys_pb2.SigningKey(
        kid=key.kid,
        alg=key.alg,
        state=keys_pb2.SigningKeyState.Value(f"SIGNING_KEY_STATE_{key.state.name}"),
        create_time=timestamp(key.create_time),
        ready_time=timestamp(key.ready_time),
        activate_time=timestamp(key.activate_time),
        retire_time=timestamp(key.retire_time),
        taint_time=timestamp(key.taint_time),
    )


def exchange(grant: auth_pb2.TokenExchangeGrant) -> Exchange:
    """Parameters of a token exchange."""
    return Exchange(
        grant.subject_token,
        grant.subject_token_type,
        grant.actor_token,
        grant.actor_token_type,
        grant.requested_token_type,
    )


def password(grant: auth_pb2.PasswordGrant) -> Password:
    """What a person told the client."""
    return Password(grant.username, grant.password)


def issued_pb(answer: TokenAnswer) -> auth_pb2.IssuedToken:
    """What was issued: an access token, or a refresh token alone (RFC 8693 section 2.2.1)."""
    return auth_pb2.IssuedToken(
        access_token=answer.access_token,
        token_type="Bearer" if answer.access_token else "N_A",
        expire_time=Timestamp(seconds=answer.expires),
        expires_in=Duration(seconds=answer.lifetime_s),
        scopes=answer.scopes,
        audiences=answer.audiences,
        jti=answer.jti,
        refresh_token=answer.refresh_token,
        issued_token_type=answer.issued_token_type,
    )


def reissue(token: auth_pb2.IssuedToken, answer: Reissued) -> None:
    """Makes of one the next for the same request: to make a message took longer than to fill it."""
    token.access_token = answer.access_token
    token.jti = answer.jti
    token.expire_time.seconds = answer.expires
    token.expires_in.seconds = answer.lifetime_s


class Terms:
    """What a ValidateTokenRequest asks of its token, whatever that is, and whoever sends it."""

    __slots__ = ("_question", "at_least", "full", "strong", "view")

    def __init__(self, request: auth_pb2.ValidateTokenRequest) -> None:
        """Raises AuthError NOT_IMPLEMENTED for what is not judged yet."""
        parts = (request, request.consistency, request.presenter)
        if any(len(UnknownFieldSet(part)) for part in parts):
            raise not_implemented("a field of a newer contract")
        if not all(map(is_acr, request.acr_values)):
            raise field_invalid("acr_values", "has an item with a space, a quote or no content")
        max_age_s = request.max_age.seconds if request.HasField("max_age") else None
        acr_values = tuple(request.acr_values)
        thumbprint = ""
        if request.HasField("presenter"):
            if request.presenter.HasField("dpop"):
                raise not_implemented("presenter dpop")
            thumbprint = request.presenter.certificate_thumbprint
        self.view = request.view
        self.full = request.view == auth_pb2.TOKEN_VIEW_FULL
        self.at_least = request.consistency.at_least
        self.strong = request.consistency.HasField("strong")
        self._question = Question(
            frozenset(),
            request.audience,
            frozenset(request.required_scopes),
            thumbprint,
            request.require_bound,
            StepUp(acr_values, max_age_s) if acr_values or max_age_s is not None else NO_STEP_UP,
            frozenset(request.required_permissions),
        )

    def is_beyond(self, revision: int) -> bool:
        """Whether a state of this revision is not fresh enough to answer."""
        return self.strong or self.at_least > revision

    def by(self, audiences: frozenset[str]) -> Question:
        """The question of an asker who may validate for these audiences."""
        if self._question.audiences is not audiences:
            self._question = replace(self._question, audiences=audiences)
        return self._question


class Asked(NamedTuple):
    """A ValidateTokenRequest."""

    token: str
    terms: Terms
    raw: bytes

    @property
    def request(self) -> auth_pb2.ValidateTokenRequest:
        """The message."""
        return auth_pb2.ValidateTokenRequest.FromString(self.raw)


class VerdictEncoder:
    """Verdicts as bytes of ValidateTokenResponse.

    For an active token one message is filled in again and again: to make one took longer than to
    judge. Its claims are encoded once and put behind, which protobuf reads as one message.
    """

    def __init__(self) -> None:
        self._active = auth_pb2.ValidateTokenResponse(active=True)
        self._check_time = self._active.check_time
        self._reusable_until = self._active.reusable_until
        self._again = (0, 0)
        self._same = b""

    def __call__(self, answer: Answer, view: auth_pb2.TokenView.ValueType) -> bytes:
        verdict, held = answer
        verified = verdict.verified
        if not verdict.active or verified is None:
            return bytes(_refusal_pb(verdict).SerializeToString())
        raw = self.active(verdict.revision, verdict.check_time, verdict.reusable_until)
        raw += self.claims(verified, view)
        if view != auth_pb2.TOKEN_VIEW_FULL or held is None:
            return raw
        if held.encoded is None:
            permissions = auth_pb2.ValidateTokenResponse(permissions=sorted(held.names))
            held.encoded = permissions.SerializeToString()
        return raw + held.encoded

    def active(self, revision: int, check_time: float, reusable_until: float) -> bytes:
        """What every active answer begins with."""
        self._active.revision = revision
        _set_time(self._check_time, check_time)
        _set_time(self._reusable_until, reusable_until)
        return bytes(self._active.SerializeToString())

    def again(self, revision: int, check_time: float) -> bytes:
        """As `active`, in whole milliseconds: those of one say the same."""
        tick = (revision, int(check_time * 1000))
        if tick != self._again:
            check_time = tick[1] / 1000
            self._same = self.active(revision, check_time, check_time + REUSABLE_S)
            self._again = tick
        return self._same

    def claims(self, verified: Verified, view: auth_pb2.TokenView.ValueType) -> bytes:
        """What comes behind: nothing, or the claims."""
        if view < auth_pb2.TOKEN_VIEW_CLAIMS:
            return b""
        if verified.encoded is None:
            claims = auth_pb2.ValidateTokenResponse(claims=claims_pb(verified.claims))
            verified.encoded = claims.SerializeToString()
        return bytes(verified.encoded)


def _refusal_pb(verdict: Verdict) -> auth_pb2.ValidateTokenResponse:
    """One that the asker may not see says that the token is not active, and nothing else."""
    if not verdict.visible:
        return auth_pb2.ValidateTokenResponse()
    return auth_pb2.ValidateTokenResponse(
        reason=error_reason_pb2.ErrorReason.ValueType(verdict.reason),
        revision=verdict.revision,
        check_time=timestamp(verdict.check_time),
        reusable_until=timestamp(verdict.reusable_until),
        missing_scopes=sorted(verdict.missing_scopes),
        missing_permissions=sorted(verdict.missing_permissions),
        step_up_challenge=_step_up_pb(verdict.step_up),
    )


def _step_up_pb(step_up: StepUp) -> auth_pb2.StepUpChallenge | None:
    if step_up is NO_STEP_UP:
        return None
    max_age_s = step_up.max_age_s
    return auth_pb2.StepUpChallenge(
        acr_values=step_up.acr_values,
        max_age=Duration(seconds=max_age_s) if max_age_s is not None else None,
        www_authenticate=step_up.www_authenticate(),
    )


def claims_pb(claims: Claims) -> auth_pb2.TokenClaims:
    """Claims of a token."""
    return auth_pb2.TokenClaims(
        issuer=claims.issuer,
        subject=claims.subject,
        audiences=claims.audiences,
        expire_time=timestamp(claims.expires) if claims.expires < NEVER else None,
        issue_time=timestamp(claims.issued),
        jti=claims.jti,
        client_id=claims.client_id,
        scopes=sorted(claims.scopes),
        revision=claims.revision,
        grant_id=claims.grant_id,
        session_id=claims.session_id,
        certificate_thumbprint=claims.certificate_thumbprint,
        jwk_thumbprint=claims.jwk_thumbprint,
        auth_time=timestamp(claims.auth_time),
        acr=claims.acr,
        amr=claims.amr,
        actor=_actor_pb(claims.actors),
        root_jti=claims.root_jti,
        may_act=claims.may_act,
        key_ids=claims.key_ids,
        permissions=claims.permissions,
        permissions_revision=claims.permissions_revision,
    )


def _actor_pb(actors: tuple[str, ...]) -> auth_pb2.Actor | None:
    outermost: auth_pb2.Actor | None = None
    for subject in reversed(actors):
        outermost = auth_pb2.Actor(subject=subject, actor=outermost)
    return outermost


def watched(event: Event | Beat) -> bytes:
    """A message of WatchChanges."""
    message = auth_pb2.WatchChangesResponse()
    if isinstance(event, Beat):
        beat = message.heartbeat
        beat.revision = event.revision
        beat.age.FromMilliseconds(int(event.age_s * 1000))
        _set_time(beat.database_time, event.time)
        return message.SerializeToString()
    part: Any = message.snapshot if event.snapshot else message.delta
    part.revision = event.revision
    add = part.markers.add  # in place: a snapshot has many
    for marker in event.markers:
        added = add(kind=int(marker.kind), key=marker.key, revision=marker.revision)
        _set_time(added.until, marker.until)
    part.keys.extend(auth_pb2.Jwk(**jwk) for jwk in event.keys)
    for audience, seconds in sorted(event.staleness.items()):
        part.staleness.add(resource_id=audience, staleness_max=Duration(seconds=int(seconds)))
    if event.last:
        part.last = True
    return message.SerializeToString()
