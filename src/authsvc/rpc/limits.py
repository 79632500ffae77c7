"""The one table of what request fields may hold (bytes of UTF-8 count as characters)."""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc_client.core.jws import TOKEN_CHARS_MAX

MESSAGE_BYTES_MAX = 4 * 2**20
METADATA_BYTES_MAX = 16 * 2**10
VIOLATIONS_MAX = 16

Check = Callable[[Any], str | None]


def text(chars_max: int) -> Check:
    """A text of at most so many characters."""
    return lambda value: f"is longer than {chars_max}" if len(value) > chars_max else None


def texts(items_max: int, chars_max: int) -> Check:
    """So many texts, none empty, none twice."""

    def check(values: Any) -> str | None:
        if len(values) > items_max:
            return f"has more than {items_max} items"
        if any(not 0 < len(value) <= chars_max for value in values):
            return f"has an item that is empty or longer than {chars_max}"
        return "has an item twice" if len(set(values)) != len(values) else None

    return check


def number(low: int, high: int) -> Check:
    """A whole number in a span."""
    return lambda value: None if low <= value <= high else f"is not within {low} and {high}"


def span(low_s: int, high_s: int) -> Check:
    """A Duration in whole seconds."""

    def check(value: Any) -> str | None:
        if value.nanos or not low_s <= value.seconds <= high_s:
            return f"is not a whole number of seconds within {low_s} and {high_s}"
        return None

    return check


def moment(value: Any) -> str | None:
    """A Timestamp within the years that protobuf allows."""
    good = 0 <= value.seconds < 253402300800 and 0 <= value.nanos < 10**9
    return None if good else "is no time"


def choice(value: Any) -> str | None:
    """A known enum value; `_known` fills in which."""
    raise NotImplementedError


def anything(_value: Any) -> str | None:
    """No limit of its own: flags, empty messages, and what is judged rather than refused."""
    return None


def inside(_value: Any) -> str | None:
    """A message, whose fields have limits of their own."""
    return None


ID, URI, RESOURCE_ID, SCOPE = text(64), text(2048), text(512), text(128)
PAGE: Mapping[str, Check] = {"page_size": number(0, 200), "page_token": text(512)}
REVIEW: Mapping[str, Check] = {"client_id": ID, "etag": ID, "comment": text(1024)}

LIMITS: Mapping[str, Mapping[str, Check]] = {
    "ClientCredential": {"client_secret": text(256), "client_assertion": text(8192)},
    "ClientCredentialsGrant": {},
    "PasswordGrant": {"username": text(254), "password": text(1024)},
    "AuthorizationCodeGrant": {
        "code": text(256),
        "redirect_uri": URI,
        "code_verifier": text(128),
    },
    "DeviceCodeGrant": {"device_code": text(256)},
    "TokenExchangeGrant": {
        "subject_token": text(8192),
        "subject_token_type": text(128),
        "actor_token": text(8192),
        "actor_token_type": text(128),
        "requested_token_type": text(128),
    },
    "JwtBearerGrant": {"assertion": text(8192)},
    "IssueTokenRequest": {
        "client_credentials": inside,
        "password": inside,
        "authorization_code": inside,
        "device_code": inside,
        "token_exchange": inside,
        "jwt_bearer": inside,
        "client_id": ID,
        "client_credential": inside,
        "scopes": texts(64, 128),
        "resources": texts(8, 512),
        "dpop_proof": text(4096),
    },
    "BoundedConsistency": {},
    "StrongConsistency": {},
    "Consistency": {"bounded": inside, "at_least": number(0, 2**63 - 1), "strong": inside},
    "DpopPresentation": {"proof": text(4096), "method": text(16), "uri": URI},
    "Presenter": {"certificate_thumbprint": text(43), "dpop": inside},
    "ValidateTokenRequest": {
        "token": anything,  # one over TOKEN_CHARS_MAX is not active
        "audience": RESOURCE_ID,
        "required_scopes": texts(64, 128),
        "required_permissions": texts(64, 128),
        "acr_values": texts(16, 128),
        "max_age": span(0, 10**9),
        "presenter": inside,
        "require_bound": anything,
        "consistency": inside,
        "view": choice,
    },
    "RevokeTokenRequest": {
        "token": anything,  # one over TOKEN_CHARS_MAX is none of ours
        "jti": ID,
        "client_id": ID,
        "client_credential": inside,
        "token_type_hint": ID,
        "validate_only": anything,
    },
    "ClientMetadata": {
        "client_name": text(128),
        "grant_types": choice,
        "token_endpoint_auth_methods": choice,
        "scopes": texts(256, 128),
        "tls_client_auth_san_uri": URI,
        "tls_client_auth_san_dns": text(253),
        "tls_client_auth_subject_dn": text(1024),
        "tls_client_auth_ca": ID,
        "tls_client_certificate_bound_access_tokens": anything,
        "redirect_uris": texts(32, 2048),
        "jwks": text(16384),
        "jwks_uri": URI,
        "contacts": texts(8, 254),
        "client_uri": URI,
        "logo_uri": URI,
        "policy_uri": URI,
        "tos_uri": URI,
        "software_id": text(128),
        "software_version": ID,
        "software_statement": text(16384),
        "validates": texts(64, 512),
    },
    "RegisterClientRequest": {
        "metadata": inside,
        "request_id": ID,
        "initial_access_token": text(256),
        "validate_only": anything,
    },
    "WatchChangesRequest": {"resume_revision": number(0, 2**63 - 1)},
    "GetKeysRequest": {},
    "GetClientRequest": {"client_id": ID},
    "ListClientsRequest": {**PAGE, "state": choice},
    "ApproveClientRequest": {**REVIEW, "approval_expire_time": moment},
    "RejectClientRequest": REVIEW,
    "SuspendClientRequest": REVIEW,
    "ResumeClientRequest": REVIEW,
    "Scope": {"name": SCOPE, "description": text(256)},
    "Resource": {
        "resource_id": RESOURCE_ID,
        "display_name": text(128),
        "owner_client_id": ID,
        "scopes": inside,
        "token_format": choice,
        "token_lifetime": span(60, 3600),
        "staleness_max": span(5, 3600),
        "encryption_jwk": text(4096),
        "freeze_permissions": anything,
        "etag": ID,
        "create_time": anything,  # output only
        "update_time": anything,  # output only
    },
    "CreateResourceRequest": {"resource": inside},
    "GetResourceRequest": {"resource_id": RESOURCE_ID},
    "ListResourcesRequest": {**PAGE, "owner_client_id": ID},
}
"""Message -> field -> check. A field that is not here makes the server refuse to start."""

ITEMS_MAX = {"Resource.scopes": 256}
"""Of repeated messages."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "IssueTokenRequest": ("client_id",),
    "ValidateTokenRequest": ("token",),
    "ClientMetadata": ("client_name",),
    "RegisterClientRequest": ("metadata",),
    "GetClientRequest": ("client_id",),
    "ApproveClientRequest": ("client_id",),
    "RejectClientRequest": ("client_id",),
    "SuspendClientRequest": ("client_id",),
    "ResumeClientRequest": ("client_id",),
    "Scope": ("name",),
    "Resource": ("resource_id",),
    "CreateResourceRequest": ("resource",),
    "GetResourceRequest": ("resource_id",),
}

assert TOKEN_CHARS_MAX < MESSAGE_BYTES_MAX

Fields = Mapping[str, tuple[Check, "Shape | None", bool]]


class Shape:
    """The prepared limits of one message type."""

    def __init__(self, descriptor: Descriptor | None) -> None:
        """KeyError where a field has no limit in the table."""
        assert descriptor is not None
        name = descriptor.name
        table = LIMITS[name]
        self._required = REQUIRED.get(name, ())
        self._fields: Fields = {
            field.name: (
                _known(field) if table[field.name] is choice else table[field.name],
                Shape(field.message_type) if table[field.name] is inside else None,
                field.is_repeated,
            )
            for field in descriptor.fields
        }
        self._items_max = {
            field.name: ITEMS_MAX.get(f"{name}.{field.name}", 1) for field in descriptor.fields
        }

    def check(self, message: Message) -> None:
        """Raises AuthError FIELD_INVALID that names what is wrong."""
        wrong = self.violations(message, "")
        if wrong:
            first = wrong[0]
            raise AuthError(
                Reason.FIELD_INVALID,
                f"{first.field} {first.text}",
                violations=tuple(wrong[:VIOLATIONS_MAX]),
            )

    def violations(self, message: Message, prefix: str) -> list[FieldViolation]:
        """What is wrong with a message that stands at `prefix` of the request."""
        wrong = []
        present = message.ListFields()
        for field, value in present:
            check, shape, repeated = self._fields[field.name]
            found = check(value)
            if found is not None:
                wrong.append(FieldViolation(prefix + field.name, found))
            elif shape is not None and repeated:
                if len(value) > self._items_max[field.name]:
                    wrong.append(FieldViolation(prefix + field.name, "has too many items"))
                    continue
                for index, item in enumerate(value):
                    wrong += shape.violations(item, f"{prefix}{field.name}[{index}].")
            elif shape is not None:
                wrong += shape.violations(value, f"{prefix}{field.name}.")
        if self._required:
            names = {field.name for field, _ in present}
            wrong += [
                FieldViolation(prefix + name, "is required")
                for name in self._required
                if name not in names
            ]
        return wrong


def _known(field: FieldDescriptor) -> Check:
    """Known values of an enum field, in a list none twice and none unspecified."""
    assert field.enum_type is not None
    numbers = frozenset(value.number for value in field.enum_type.values)
    if not field.is_repeated:
        return lambda value: None if value in numbers else "is no known value"
    named = numbers - {0}

    def check(values: Any) -> str | None:
        if len(set(values)) != len(values):
            return "has an item twice"
        return None if named.issuperset(values) else "has an item that is no known value"

    return check
