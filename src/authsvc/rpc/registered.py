"""Clients between the wire's messages and the model's values."""

from collections.abc import Callable

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from authsvc.model import ApiKey, AuthMethod, Client, GrantType, IdentityKind, InitialAccessToken
from authsvc.oauth.registration import RegistrationPolicy, beyond
from authsvc.register import Registration, invalid
from authsvc.rpc.convert import require_absent, timestamp
from authsvc.rpc.limits import field_invalid
from authsvc.rpc.peer import canonical_dn
from authsvc_client.v1 import clients_pb2

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
_METADATA_LATER = ("redirect_uris", "jwks_uri", "software_statement")


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
        jwks=metadata.jwks,
        may_act=metadata.may_act,
        first_party=metadata.first_party,
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


class ClientEncoder:
    """Clients as messages, as they are now, with what they ask for beyond the policy; never a
    secret.
    """

    def __init__(self, policy: RegistrationPolicy, as_of_now: Callable[[Client], Client]) -> None:
        self._policy = policy
        self._as_of_now = as_of_now

    def __call__(self, client: Client) -> clients_pb2.Client:
        """A client."""
        message = _client_pb(self._as_of_now(client))
        message.policy_diff.extend(beyond(client.metadata, self._policy))
        return message


def _client_pb(client: Client) -> clients_pb2.Client:
    metadata = client.metadata
    identity = metadata.identity
    message = clients_pb2.Client(
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
            jwks=metadata.jwks,
            may_act=metadata.may_act,
            first_party=metadata.first_party,
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
    if identity is not None:
        setattr(message.metadata, f"tls_client_auth_{identity.kind.value}", identity.value)
    for name, value in metadata.texts.items():
        setattr(message.metadata, name, value)
    return message


def api_key_pb(key: ApiKey) -> clients_pb2.ApiKey:
    """An API key, never its value."""
    return clients_pb2.ApiKey(
        api_key_id=key.api_key_id,
        client_id=key.client_id,
        display_name=key.display_name,
        scopes=sorted(key.scopes),
        expire_time=timestamp(key.expire_time),
        create_time=timestamp(key.create_time),
    )


def edited(
    request: clients_pb2.UpdateClientRequest,
) -> tuple[Callable[[Client], Registration], Callable[[Client], float | None]]:
    """What the fields of the mask make of the metadata, and of the end of the approval.

    Raises AuthError FIELD_INVALID for a mask that names something else.
    """
    paths = frozenset(request.update_mask.paths)
    names = frozenset(path.removeprefix("metadata.") for path in paths - {"approval_expire_time"})
    known = clients_pb2.ClientMetadata.DESCRIPTOR.fields_by_name
    if not paths or not all(f"metadata.{name}" in paths and name in known for name in names):
        raise field_invalid("update_mask", "names no fields that can be changed")

    def metadata(client: Client) -> Registration:
        message = _client_pb(client).metadata
        mask = FieldMask(paths=sorted(names))
        mask.MergeMessage(request.client.metadata, message, True, True)
        return registration(message)

    def expire_time(client: Client) -> float | None:
        if "approval_expire_time" not in paths:
            return client.approval_expire_time
        if not request.client.HasField("approval_expire_time"):
            return None
        return seconds(request.client.approval_expire_time)

    return metadata, expire_time


def seconds(stamp: Timestamp) -> float:
    """Since the epoch."""
    return stamp.seconds + stamp.nanos / 1e9


def initial_access_token_pb(token: InitialAccessToken) -> clients_pb2.InitialAccessToken:
    """Without its value."""
    return clients_pb2.InitialAccessToken(
        initial_access_token_id=token.initial_access_token_id,
        display_name=token.display_name,
        uses_left=token.uses_left,
        expire_time=timestamp(token.expire_time),
        create_time=timestamp(token.create_time),
    )
