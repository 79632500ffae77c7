"""The one table of what request fields may hold."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc_client.core.jws import TOKEN_CHARS_MAX

MESSAGE_BYTES_MAX = 4 * 2**20
METADATA_BYTES_MAX = 16 * 2**10
VIOLATIONS_MAX = 16


def field_invalid(field: str, wrong: str) -> AuthError:
    """The refusal of one field, for what no table can say."""
    return AuthError(
        Reason.FIELD_INVALID, f"{field} {wrong}", violations=(FieldViolation(field, wrong),)
    )


Check = Callable[[Any], str | None]


def text(chars_max: int) -> Check:
    """A text of at most so many characters, which any database can hold."""

    def check(value: str) -> str | None:
        if len(value) > chars_max:
            return f"is longer than {chars_max}"
        return "holds a NUL" if "\0" in value else None

    return check


def compared(chars_max: int) -> Check:
    """A text that is compared, and never stored or looked up."""
    return lambda value: f"is longer than {chars_max}" if len(value) > chars_max else None


def texts(items_max: int, chars_max: int) -> Check:
    """So many texts, none empty, none twice."""

    def check(values: Any) -> str | None:
        if len(values) > items_max:
            return f"has more than {items_max} items"
        unique = set(values)
        for value in unique:
            if not 0 < len(value) <= chars_max:
                return f"has an item that is empty or longer than {chars_max}"
        return "has an item twice" if len(unique) != len(values) else None

    return check


def items(items_max: int) -> Check:
    """So many messages, each of which is checked by itself."""
    return lambda value: f"has more than {items_max} items" if len(value) > items_max else None


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
REVOCATION: Mapping[str, Check] = {"comment": text(1024), "validate_only": anything}

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
    "RefreshTokenRequest": {
        "refresh_token": text(512),
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
    "Presenter": {"certificate_thumbprint": compared(43), "dpop": inside},
    "ValidateTokenRequest": {
        "token": anything,  # one over TOKEN_CHARS_MAX is not active
        "audience": compared(512),
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
        "tls_client_auth_ca": text(264),
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
        "may_act": ID,
        "first_party": anything,
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
    "Client": {
        "client_id": ID,
        "metadata": inside,
        "approval_expire_time": moment,
        "etag": ID,
        "state": choice,
        **dict.fromkeys(  # output only
            (
                "reviewer",
                "review_comment",
                "review_time",
                "create_time",
                "update_time",
                "registrant",
                "policy_diff",
            ),
            anything,
        ),
    },
    "UpdateClientRequest": {"client": inside, "update_mask": inside},
    "DeleteClientRequest": {"client_id": ID, "etag": ID},
    "RotateClientSecretRequest": {"client_id": ID, "overlap_end_time": moment},
    "InitialAccessToken": {
        "initial_access_token_id": anything,  # output only
        "display_name": text(128),
        "uses_left": number(0, 1000),
        "expire_time": moment,
        "create_time": anything,  # output only
    },
    "CreateInitialAccessTokenRequest": {"initial_access_token": inside},
    "ListInitialAccessTokensRequest": PAGE,
    "DeleteInitialAccessTokenRequest": {"initial_access_token_id": ID},
    "GetOwnClientRequest": {"registration_access_token": text(256)},
    "UpdateOwnClientRequest": {
        "registration_access_token": text(256),
        "client_id": ID,
        "metadata": inside,
    },
    "DeleteOwnClientRequest": {"registration_access_token": text(256)},
    "ApproveClientRequest": {**REVIEW, "approval_expire_time": moment},
    "RejectClientRequest": REVIEW,
    "SuspendClientRequest": REVIEW,
    "ResumeClientRequest": REVIEW,
    "FieldMask": {"paths": texts(64, 128)},
    "ApiKey": {
        "api_key_id": anything,  # output only
        "client_id": ID,
        "display_name": text(128),
        "scopes": texts(256, 128),
        "expire_time": moment,
        "create_time": anything,  # output only
    },
    "CreateApiKeyRequest": {"api_key": inside},
    "ListApiKeysRequest": {**PAGE, "client_id": ID},
    "DeleteApiKeyRequest": {"api_key_id": ID},
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
    "UpdateResourceRequest": {"resource": inside, "update_mask": inside},
    "DeleteResourceRequest": {"resource_id": RESOURCE_ID, "etag": ID},
    # A sealed id of a resource is longer than the id itself.
    "ListResourcesRequest": {**PAGE, "page_token": text(1024), "owner_client_id": ID},
    "User": {
        "user_id": ID,
        "username": text(254),
        "display_name": text(128),
        "email": text(254),
        "etag": ID,
        "state": choice,
        **dict.fromkeys(  # output only
            ("password_set_time", "create_time", "update_time"), anything
        ),
    },
    "CreateUserRequest": {"user": inside, "password": compared(1024), "request_id": ID},
    "GetUserRequest": {"user_id": ID},
    "ListUsersRequest": {**PAGE, "username": text(254), "email": text(254), "state": choice},
    "UpdateUserRequest": {"user": inside, "update_mask": inside},
    "DisableUserRequest": {"user_id": ID, "etag": ID, "comment": text(1024)},
    "EnableUserRequest": {"user_id": ID, "etag": ID, "comment": text(1024)},
    "DeleteUserRequest": {"user_id": ID, "etag": ID},
    "SetPasswordRequest": {
        "user_id": ID,
        "current_password": compared(1024),
        "new_password": compared(1024),
        "keep_session": anything,
    },
    "CreatePasswordResetCodeRequest": {"user_id": ID, "lifetime": span(60, 24 * 3600)},
    "ResetPasswordRequest": {"code": compared(256), "new_password": compared(1024)},
    "ImportUsersRequest": {"rows": items(100)},
    "ImportUsersRow": {
        "username": text(254),
        "display_name": text(128),
        "email": text(254),
        "password": compared(1024),
    },
    "PermissionRef": {"resource_id": RESOURCE_ID, "name": text(128)},
    "Permission": {
        "ref": inside,
        "description": text(256),
        "create_time": anything,  # output only
    },
    "Role": {
        "role_id": ID,
        "display_name": text(128),
        "description": text(256),
        "permissions": inside,
        "etag": ID,
        "create_time": anything,  # output only
        "update_time": anything,  # output only
    },
    "RoleAssignment": {
        "role_id": ID,
        "user_id": ID,
        "client_id": ID,
        "resource_id": RESOURCE_ID,
        "create_time": anything,  # output only
    },
    "CreateRoleRequest": {"role": inside},
    "GetRoleRequest": {"role_id": ID},
    "ListRolesRequest": {**PAGE, "resource_id": RESOURCE_ID},
    "UpdateRoleRequest": {"role": inside, "update_mask": inside},
    "DeleteRoleRequest": {"role_id": ID, "etag": ID},
    "CreatePermissionRequest": {"permission": inside},
    # As of resources: a sealed place holds the id of one.
    "ListPermissionsRequest": {**PAGE, "page_token": text(1024), "resource_id": RESOURCE_ID},
    "DeletePermissionRequest": {"ref": inside},
    "AssignRoleRequest": {"role_assignment": inside},
    "UnassignRoleRequest": {"role_assignment": inside},
    "ListRoleAssignmentsRequest": {
        **PAGE,
        "page_token": text(1024),
        "user_id": ID,
        "client_id": ID,
        "role_id": ID,
        "resource_id": RESOURCE_ID,
    },
    "RevokeSubjectRequest": {"subject": ID, **REVOCATION},
    "RevokeClientRequest": {"client_id": ID, **REVOCATION},
    "RevokeSubjectClientRequest": {"subject": ID, "client_id": ID, **REVOCATION},
    "RevokeSessionRequest": {"session_id": ID, **REVOCATION},
    "RevokeGrantRequest": {"grant_id": ID, **REVOCATION},
    "RevokeEverythingRequest": REVOCATION,
    "ListSessionsRequest": {**PAGE, "user_id": ID},
    "EndSessionRequest": {"session_id": ID},
    "SignOutEverywhereRequest": {"user_id": ID},
    "ListGrantsRequest": {**PAGE, "subject": ID, "client_id": ID, "session_id": ID},
    "EndGrantRequest": {"grant_id": ID},
    "ListSigningKeysRequest": PAGE,
    "PrepareSigningKeyRequest": {"alg": text(16)},
    "ActivateSigningKeyRequest": {"kid": ID},
    "RetireSigningKeyRequest": {"kid": ID},
    "TaintSigningKeyRequest": {"kid": ID, "comment": text(1024), "validate_only": anything},
    "ListAuditEventsRequest": {
        **PAGE,
        "start_time": moment,
        "end_time": moment,
        "actor": URI,
        "subject": ID,
        "client_id": ID,
        "action": ID,
        "outcome": choice,
    },
    "ExplainTokenRequest": {"question": inside, "caller_client_id": ID},
}
"""Message -> field -> check. A field that is not here makes the server refuse to start."""

ITEMS_MAX = {"Resource.scopes": 256, "Role.permissions": 256}
"""Of repeated messages."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "IssueTokenRequest": ("client_id",),
    "PasswordGrant": ("username", "password"),
    "TokenExchangeGrant": ("subject_token", "subject_token_type"),
    "RefreshTokenRequest": ("refresh_token", "client_id"),
    "ValidateTokenRequest": ("token",),
    "ClientMetadata": ("client_name",),
    "RegisterClientRequest": ("metadata",),
    "GetClientRequest": ("client_id",),
    "UpdateClientRequest": ("client", "update_mask"),
    "DeleteClientRequest": ("client_id",),
    "RotateClientSecretRequest": ("client_id",),
    "InitialAccessToken": ("expire_time",),
    "CreateInitialAccessTokenRequest": ("initial_access_token",),
    "DeleteInitialAccessTokenRequest": ("initial_access_token_id",),
    "GetOwnClientRequest": ("registration_access_token",),
    "UpdateOwnClientRequest": ("registration_access_token", "client_id", "metadata"),
    "DeleteOwnClientRequest": ("registration_access_token",),
    "ApproveClientRequest": ("client_id",),
    "RejectClientRequest": ("client_id",),
    "SuspendClientRequest": ("client_id",),
    "ResumeClientRequest": ("client_id",),
    "CreateApiKeyRequest": ("api_key",),
    "DeleteApiKeyRequest": ("api_key_id",),
    "Scope": ("name",),
    "Resource": ("resource_id",),
    "CreateResourceRequest": ("resource",),
    "GetResourceRequest": ("resource_id",),
    "UpdateResourceRequest": ("resource", "update_mask"),
    "DeleteResourceRequest": ("resource_id",),
    "CreateUserRequest": ("user",),
    "GetUserRequest": ("user_id",),
    "UpdateUserRequest": ("user", "update_mask"),
    "DisableUserRequest": ("user_id",),
    "EnableUserRequest": ("user_id",),
    "DeleteUserRequest": ("user_id",),
    "SetPasswordRequest": ("new_password",),
    "CreatePasswordResetCodeRequest": ("user_id",),
    "ResetPasswordRequest": ("code", "new_password"),
    "PermissionRef": ("resource_id", "name"),
    "Permission": ("ref",),
    "Role": ("role_id",),
    "RoleAssignment": ("role_id",),
    "CreateRoleRequest": ("role",),
    "GetRoleRequest": ("role_id",),
    "UpdateRoleRequest": ("role", "update_mask"),
    "DeleteRoleRequest": ("role_id",),
    "CreatePermissionRequest": ("permission",),
    "DeletePermissionRequest": ("ref",),
    "AssignRoleRequest": ("role_assignment",),
    "UnassignRoleRequest": ("role_assignment",),
    "RevokeSubjectRequest": ("subject",),
    "RevokeClientRequest": ("client_id",),
    "RevokeSubjectClientRequest": ("subject", "client_id"),
    "RevokeSessionRequest": ("session_id",),
    "RevokeGrantRequest": ("grant_id",),
    "EndSessionRequest": ("session_id",),
    "SignOutEverywhereRequest": ("user_id",),
    "EndGrantRequest": ("grant_id",),
    "ActivateSigningKeyRequest": ("kid",),
    "RetireSigningKeyRequest": ("kid",),
    "TaintSigningKeyRequest": ("kid",),
    "ExplainTokenRequest": ("question",),
}

assert TOKEN_CHARS_MAX < MESSAGE_BYTES_MAX


class _Field(NamedTuple):
    """A field with a limit."""

    name: str
    has_presence: bool
    """A message that may be absent; other fields are checked unless they hold their default."""
    check: Check
    shape: "Shape | None"
    items_max: int
    """Of a repeated message; 0 for others."""


class Shape:
    """The prepared limits of one message type.

    Fields are read by name: `ListFields` makes objects for all, which took longer than the checks.
    """

    def __init__(self, descriptor: Descriptor | None) -> None:
        """KeyError where a field has no limit in the table."""
        assert descriptor is not None
        table = LIMITS[descriptor.name]
        limited = [(field, table[field.name]) for field in descriptor.fields]
        self._fields = [
            _field(field, check, descriptor.name)
            for field, check in limited
            if check is not anything
        ]
        required = REQUIRED.get(descriptor.name, ())
        self._required = [
            (name, descriptor.fields_by_name[name].message_type is not None) for name in required
        ]

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
        wrong: list[FieldViolation] = []
        for name, has_presence, check, shape, items_max in self._fields:
            if has_presence and not message.HasField(name):
                continue
            value = getattr(message, name)
            if not value:
                continue
            found = check(value)
            if found is not None:
                wrong.append(FieldViolation(prefix + name, found))
            elif items_max:
                wrong += _in_items(value, shape, f"{prefix}{name}", items_max)
            elif shape is not None:
                wrong += shape.violations(value, f"{prefix}{name}.")
        for name, is_message in self._required:
            if not (message.HasField(name) if is_message else getattr(message, name)):
                wrong.append(FieldViolation(prefix + name, "is required"))
        return wrong


def _field(field: FieldDescriptor, check: Check, message: str) -> _Field:
    is_message = field.message_type is not None
    has_shape = check is inside
    return _Field(
        name=field.name,
        has_presence=is_message and not field.is_repeated,
        check=_known(field) if check is choice else check,
        shape=Shape(field.message_type) if has_shape else None,
        items_max=ITEMS_MAX[f"{message}.{field.name}"] if has_shape and field.is_repeated else 0,
    )


def _in_items(
    items: Any, shape: Shape | None, place: str, items_max: int
) -> Iterable[FieldViolation]:
    assert shape is not None
    if len(items) > items_max:
        yield FieldViolation(place, "has too many items")
        return
    for index, item in enumerate(items):
        yield from shape.violations(item, f"{place}[{index}].")


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
