"""Between the wire's messages and the model's values; dull, and complete."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from authsvc.errors import AuthError, Reason, not_implemented
from authsvc.feed.watch import Event
from authsvc.issue import TokenAnswer
from authsvc.model import (
    AuthMethod,
    Client,
    GrantType,
    IdentityKind,
    Resource,
    TokenFormat,
)
from authsvc.register import Registration, invalid
from authsvc.rpc.limits import field_invalid
from authsvc.rpc.peer import canonical_dn
from authsvc_client.core.claims import Claims
from authsvc_client.core.judge import Question, Verdict
from authsvc_client.core.markers import Marker
from authsvc_client.v1 import auth_pb2, clients_pb2, error_reason_pb2, resources_pb2

TEXTS = (
    "client_uri",
    "logo_uri",
    "policy_uri",
    "tos_uri",
    "software_id",
    "software_version",
)
_IDENTITY_FIELDS = {f"tls_client_auth_{kind.value}": kind for kind in IdentityKind}
# Fields that a later version will honour: refused, never ignored.
_METADATA_LATER = ("redirect_uris", "jwks", "jwks_uri", "software_statement")


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


def registration(metadata: clients_pb2.ClientMetadata) -> Registration:
    """Metadata as they came. Raises AuthError NOT_IMPLEMENTED."""
    require_absent(metadata, *_METADATA_LATER)
    field = metadata.WhichOneof("tls_client_auth")
    bound = None
    if metadata.HasField("tls_client_certificate_bound_access_tokens"):
        bound = metadata.tls_client_certificate_bound_access_tokens
    return Registration(
        client_name=metadata.client_name,
        grant_types=frozenset(map(GrantType, metadata.grant_types)),
        auth_methods=frozenset(map(AuthMethod, metadata.token_endpoint_auth_methods)),
        scopes=frozenset(metadata.scopes),
        identity_kind=_IDENTITY_FIELDS[field] if field else None,
        identity_value=_identity_value(metadata, field) if field else "",
        identity_ca=metadata.tls_client_auth_ca,
        bound_access_tokens=bound,
        validates=frozenset(metadata.validates),
        texts={name: getattr(metadata, name) for name in TEXTS if getattr(metadata, name)},
        contacts=tuple(metadata.contacts),
    )


def _identity_value(metadata: clients_pb2.ClientMetadata, field: str) -> str:
    """The certificate name; a subject in the spelling that peers are compared in (RFC 4514)."""
    value: str = getattr(metadata, field)
    if value and _IDENTITY_FIELDS[field] is IdentityKind.SUBJECT_DN:
        try:
            return canonical_dn(value)
        except ValueError as error:
            raise invalid(field, "is no distinguished name of RFC 4514") from error
    return value


def client_pb(client: Client) -> clients_pb2.Client:
    """A client, never its secret."""
    metadata = client.metadata
    identity = metadata.identity
    names = {f"tls_client_auth_{identity.kind.value}": identity.value} if identity else {}
    return clients_pb2.Client(
        client_id=client.client_id,
        metadata=clients_pb2.ClientMetadata(
            client_name=metadata.client_name,
            grant_types=[
                clients_pb2.GrantType.ValueType(grant) for grant in sorted(metadata.grant_types)
            ],
            token_endpoint_auth_methods=[
                clients_pb2.ClientAuthMethod.ValueType(method)
                for method in sorted(metadata.auth_methods)
            ],
            scopes=sorted(metadata.scopes),
            tls_client_auth_ca=identity.ca if identity else "",
            tls_client_certificate_bound_access_tokens=metadata.bound_access_tokens,
            validates=sorted(metadata.validates),
            contacts=metadata.contacts,
            **names,
            **metadata.texts,
        ),
        state=clients_pb2.ClientState.ValueType(client.state),
        reviewer=client.reviewer,
        review_comment=client.review_comment,
        review_time=timestamp(client.review_time),
        approval_expire_time=timestamp(client.approval_expire_time),
        etag=str(client.version),
        create_time=timestamp(client.create_time),
        update_time=timestamp(client.update_time),
        registrant=client.registrant,
    )


def resource(message: resources_pb2.Resource) -> Resource:
    """A resource to create, defaults filled in. Raises AuthError NOT_IMPLEMENTED."""
    require_absent(message, "encryption_jwk", "freeze_permissions")
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
        etag=str(found.version),
        create_time=timestamp(found.create_time),
        update_time=timestamp(found.update_time),
    )


def issued_pb(answer: TokenAnswer) -> auth_pb2.IssuedToken:
    """A token that was issued."""
    return auth_pb2.IssuedToken(
        access_token=answer.access_token,
        token_type="Bearer",  # noqa: S106 - RFC 6750
        expire_time=Timestamp(seconds=answer.expires),
        expires_in=Duration(seconds=answer.lifetime_s),
        scopes=answer.scopes,
        audiences=answer.audiences,
        jti=answer.jti,
    )


class Asked:
    """What a ValidateTokenRequest asks, whoever sends it: made once for the same bytes."""

    __slots__ = ("_question", "token", "view")

    def __init__(self, request: auth_pb2.ValidateTokenRequest) -> None:
        """Raises AuthError NOT_IMPLEMENTED for what is not judged yet."""
        parts = (request, request.consistency, request.presenter)
        if any(len(UnknownFieldSet(part)) for part in parts):
            raise not_implemented("a field of a newer contract")
        require_absent(request, "required_permissions", "acr_values")
        if request.HasField("max_age"):
            raise not_implemented("max_age")
        if request.view == auth_pb2.TOKEN_VIEW_FULL:
            raise not_implemented("view FULL")
        if request.HasField("consistency"):
            level = request.consistency.WhichOneof("level")
            if level not in (None, "bounded"):
                raise not_implemented(f"consistency {level}")
        thumbprint = ""
        if request.HasField("presenter"):
            if request.presenter.HasField("dpop"):
                raise not_implemented("presenter dpop")
            thumbprint = request.presenter.certificate_thumbprint
        self.token = request.token
        self.view = request.view
        self._question = Question(
            frozenset(),
            request.audience,
            frozenset(request.required_scopes),
            thumbprint,
            request.require_bound,
        )

    def by(self, audiences: frozenset[str]) -> Question:
        """The question of an asker who may validate for these audiences."""
        if self._question.audiences is not audiences:
            self._question = replace(self._question, audiences=audiences)
        return self._question


class VerdictEncoder:
    """Verdicts as bytes of ValidateTokenResponse.

    For an active token one message is filled in again and again: to make one took longer than to
    judge. Its claims are encoded once and put behind, which protobuf reads as one message.
    """

    def __init__(self) -> None:
        self._active = auth_pb2.ValidateTokenResponse(active=True)
        self._check_time = self._active.check_time
        self._reusable_until = self._active.reusable_until

    def __call__(self, verdict: Verdict, view: auth_pb2.TokenView.ValueType) -> bytes:
        verified = verdict.verified
        if not verdict.active or verified is None:
            return bytes(_refusal_pb(verdict).SerializeToString())
        self._active.revision = verdict.revision
        _set_time(self._check_time, verdict.check_time)
        _set_time(self._reusable_until, verdict.reusable_until)
        raw = self._active.SerializeToString()
        if view != auth_pb2.TOKEN_VIEW_CLAIMS:
            return raw
        if verified.encoded is None:
            claims = auth_pb2.ValidateTokenResponse(claims=claims_pb(verified.claims))
            verified.encoded = claims.SerializeToString()
        return raw + bytes(verified.encoded)


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
    )


def claims_pb(claims: Claims) -> auth_pb2.TokenClaims:
    """Claims of a token."""
    return auth_pb2.TokenClaims(
        issuer=claims.issuer,
        subject=claims.subject,
        audiences=claims.audiences,
        expire_time=timestamp(claims.expires),
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
    )


def _actor_pb(actors: tuple[str, ...]) -> auth_pb2.Actor | None:
    outermost: auth_pb2.Actor | None = None
    for subject in reversed(actors):
        outermost = auth_pb2.Actor(subject=subject, actor=outermost)
    return outermost


def marker_pb(marker: Marker) -> auth_pb2.Marker:
    """One change of the feed."""
    return auth_pb2.Marker(
        kind=auth_pb2.MarkerKind.ValueType(marker.kind),
        key=marker.key,
        revision=marker.revision,
        until=timestamp(marker.until),
    )


def watched_pb(event: Event) -> Iterator[auth_pb2.WatchChangesResponse]:
    """A chunk of the snapshot; or what changed, if anything did, and the heartbeat after it."""
    content: dict[str, Any] = {
        "revision": event.revision,
        "markers": [marker_pb(marker) for marker in event.markers],
        "keys": [auth_pb2.Jwk(**jwk) for jwk in event.keys],
        "staleness": [
            auth_pb2.ResourceStaleness(
                resource_id=audience, staleness_max=Duration(seconds=int(seconds))
            )
            for audience, seconds in sorted(event.staleness.items())
        ],
    }
    if event.snapshot:
        chunk = auth_pb2.SnapshotChunk(last=event.last, **content)
        yield auth_pb2.WatchChangesResponse(snapshot=chunk)
        return
    if event.markers or event.keys or event.staleness:
        yield auth_pb2.WatchChangesResponse(delta=auth_pb2.Delta(**content))
    age = Duration()
    age.FromMilliseconds(int(event.age_s * 1000))
    beat = auth_pb2.Heartbeat(revision=event.revision, age=age, database_time=timestamp(event.time))
    yield auth_pb2.WatchChangesResponse(heartbeat=beat)
