"""Limits: every field of every built request, at its limit and one over it, and the wire's own."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from authsvc.errors import AuthError
from authsvc.rpc.limits import ITEMS_MAX, LIMITS, REQUIRED, Shape
from authsvc.rpc.server import SERVICES
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from tests.harness import (
    ADMIN,
    TIMEOUT_S,
    Running,
    connect,
    failure,
    outcome,
    raw_stream,
    raw_unary,
    reason,
)

# What each field of each message may hold, written here once more: characters of a text, (items,
# characters) of a list, [low, high] of a number, seconds of a Duration. None: no limit of its own.
TEXTS: dict[str, int | None] = {
    "ClientCredential.client_secret": 256,
    "ClientCredential.client_assertion": 8192,
    "PasswordGrant.username": 254,
    "PasswordGrant.password": 1024,
    "AuthorizationCodeGrant.code": 256,
    "AuthorizationCodeGrant.redirect_uri": 2048,
    "AuthorizationCodeGrant.code_verifier": 128,
    "DeviceCodeGrant.device_code": 256,
    "TokenExchangeGrant.subject_token": 8192,
    "TokenExchangeGrant.subject_token_type": 128,
    "TokenExchangeGrant.actor_token": 8192,
    "TokenExchangeGrant.actor_token_type": 128,
    "TokenExchangeGrant.requested_token_type": 128,
    "JwtBearerGrant.assertion": 8192,
    "IssueTokenRequest.client_id": 64,
    "IssueTokenRequest.dpop_proof": 4096,
    "DpopPresentation.proof": 4096,
    "DpopPresentation.method": 16,
    "DpopPresentation.uri": 2048,
    "Presenter.certificate_thumbprint": 43,
    "ValidateTokenRequest.token": None,
    "ValidateTokenRequest.audience": 512,
    "RevokeTokenRequest.token": None,
    "RevokeTokenRequest.jti": 64,
    "RevokeTokenRequest.client_id": 64,
    "RevokeTokenRequest.token_type_hint": 64,
    "ClientMetadata.client_name": 128,
    "ClientMetadata.tls_client_auth_san_uri": 2048,
    "ClientMetadata.tls_client_auth_san_dns": 253,
    "ClientMetadata.tls_client_auth_subject_dn": 1024,
    "ClientMetadata.tls_client_auth_ca": 264,
    "ClientMetadata.jwks": 16384,
    "ClientMetadata.jwks_uri": 2048,
    "ClientMetadata.client_uri": 2048,
    "ClientMetadata.logo_uri": 2048,
    "ClientMetadata.policy_uri": 2048,
    "ClientMetadata.tos_uri": 2048,
    "ClientMetadata.software_id": 128,
    "ClientMetadata.software_version": 64,
    "ClientMetadata.software_statement": 16384,
    "ClientMetadata.may_act": 64,
    "RegisterClientRequest.request_id": 64,
    "RegisterClientRequest.initial_access_token": 256,
    "GetClientRequest.client_id": 64,
    "ListClientsRequest.page_token": 512,
    "ApproveClientRequest.client_id": 64,
    "ApproveClientRequest.etag": 64,
    "ApproveClientRequest.comment": 1024,
    "RejectClientRequest.client_id": 64,
    "RejectClientRequest.etag": 64,
    "RejectClientRequest.comment": 1024,
    "SuspendClientRequest.client_id": 64,
    "SuspendClientRequest.etag": 64,
    "SuspendClientRequest.comment": 1024,
    "ResumeClientRequest.client_id": 64,
    "ResumeClientRequest.etag": 64,
    "ResumeClientRequest.comment": 1024,
    "Scope.name": 128,
    "Scope.description": 256,
    "RefreshTokenRequest.refresh_token": 512,
    "RefreshTokenRequest.client_id": 64,
    "RefreshTokenRequest.dpop_proof": 4096,
    "Client.client_id": 64,
    "Client.etag": 64,
    "DeleteClientRequest.client_id": 64,
    "DeleteClientRequest.etag": 64,
    "RotateClientSecretRequest.client_id": 64,
    "InitialAccessToken.display_name": 128,
    "ListInitialAccessTokensRequest.page_token": 512,
    "DeleteInitialAccessTokenRequest.initial_access_token_id": 64,
    "GetOwnClientRequest.registration_access_token": 256,
    "UpdateOwnClientRequest.registration_access_token": 256,
    "UpdateOwnClientRequest.client_id": 64,
    "DeleteOwnClientRequest.registration_access_token": 256,
    "Resource.resource_id": 512,
    "Resource.display_name": 128,
    "Resource.owner_client_id": 64,
    "Resource.encryption_jwk": 4096,
    "Resource.etag": 64,
    "GetResourceRequest.resource_id": 512,
    "DeleteResourceRequest.resource_id": 512,
    "DeleteResourceRequest.etag": 64,
    "ApiKey.client_id": 64,
    "ApiKey.display_name": 128,
    "ListApiKeysRequest.client_id": 64,
    "ListApiKeysRequest.page_token": 512,
    "DeleteApiKeyRequest.api_key_id": 64,
    "ListResourcesRequest.page_token": 1024,
    "ListResourcesRequest.owner_client_id": 64,
    "ListSigningKeysRequest.page_token": 512,
    "PrepareSigningKeyRequest.alg": 16,
    "ActivateSigningKeyRequest.kid": 64,
    "RetireSigningKeyRequest.kid": 64,
    "TaintSigningKeyRequest.kid": 64,
    "TaintSigningKeyRequest.comment": 1024,
    "EndGrantRequest.grant_id": 64,
    "EndSessionRequest.session_id": 64,
    "SignOutEverywhereRequest.user_id": 64,
    "ListSessionsRequest.user_id": 64,
    "ListSessionsRequest.page_token": 512,
    "ExplainTokenRequest.caller_client_id": 64,
    "ListAuditEventsRequest.page_token": 512,
    "ListAuditEventsRequest.actor": 2048,
    "ListAuditEventsRequest.subject": 64,
    "ListAuditEventsRequest.client_id": 64,
    "ListAuditEventsRequest.action": 64,
    "ListGrantsRequest.client_id": 64,
    "ListGrantsRequest.page_token": 512,
    "ListGrantsRequest.session_id": 64,
    "ListGrantsRequest.subject": 64,
    "PermissionRef.resource_id": 512,
    "PermissionRef.name": 128,
    "Permission.description": 256,
    "Role.role_id": 64,
    "Role.display_name": 128,
    "Role.description": 256,
    "Role.etag": 64,
    "RoleAssignment.role_id": 64,
    "RoleAssignment.user_id": 64,
    "RoleAssignment.client_id": 64,
    "RoleAssignment.resource_id": 512,
    "GetRoleRequest.role_id": 64,
    "DeleteRoleRequest.role_id": 64,
    "DeleteRoleRequest.etag": 64,
    "ListRolesRequest.page_token": 512,
    "ListRolesRequest.resource_id": 512,
    "ListPermissionsRequest.page_token": 1024,
    "ListPermissionsRequest.resource_id": 512,
    "ListRoleAssignmentsRequest.page_token": 1024,
    "ListRoleAssignmentsRequest.user_id": 64,
    "ListRoleAssignmentsRequest.client_id": 64,
    "ListRoleAssignmentsRequest.role_id": 64,
    "ListRoleAssignmentsRequest.resource_id": 512,
    "RevokeClientRequest.client_id": 64,
    "RevokeClientRequest.comment": 1024,
    "RevokeEverythingRequest.comment": 1024,
    "RevokeGrantRequest.comment": 1024,
    "RevokeGrantRequest.grant_id": 64,
    "RevokeSessionRequest.comment": 1024,
    "RevokeSessionRequest.session_id": 64,
    "RevokeSubjectClientRequest.client_id": 64,
    "RevokeSubjectClientRequest.comment": 1024,
    "RevokeSubjectClientRequest.subject": 64,
    "RevokeSubjectRequest.comment": 1024,
    "RevokeSubjectRequest.subject": 64,
    "User.user_id": 64,
    "User.username": 254,
    "User.display_name": 128,
    "User.email": 254,
    "User.etag": 64,
    "CreateUserRequest.password": 1024,
    "CreateUserRequest.request_id": 64,
    "GetUserRequest.user_id": 64,
    "ListUsersRequest.page_token": 512,
    "ListUsersRequest.username": 254,
    "ListUsersRequest.email": 254,
    "DisableUserRequest.user_id": 64,
    "DisableUserRequest.etag": 64,
    "DisableUserRequest.comment": 1024,
    "EnableUserRequest.user_id": 64,
    "EnableUserRequest.etag": 64,
    "EnableUserRequest.comment": 1024,
    "DeleteUserRequest.user_id": 64,
    "DeleteUserRequest.etag": 64,
    "SetPasswordRequest.user_id": 64,
    "SetPasswordRequest.current_password": 1024,
    "SetPasswordRequest.new_password": 1024,
    "CreatePasswordResetCodeRequest.user_id": 64,
    "ResetPasswordRequest.code": 256,
    "ResetPasswordRequest.new_password": 1024,
    "ImportUsersRow.username": None,  # each row is refused by itself
    "ImportUsersRow.display_name": None,  # each row is refused by itself
    "ImportUsersRow.email": None,  # each row is refused by itself
    "ImportUsersRow.password": None,  # each row is refused by itself
}
LISTS: dict[str, tuple[int, int]] = {
    "IssueTokenRequest.scopes": (64, 128),
    "IssueTokenRequest.resources": (8, 512),
    "RefreshTokenRequest.scopes": (64, 128),
    "RefreshTokenRequest.resources": (8, 512),
    "ValidateTokenRequest.required_scopes": (64, 128),
    "ValidateTokenRequest.required_permissions": (64, 128),
    "ValidateTokenRequest.acr_values": (16, 128),
    "ClientMetadata.scopes": (256, 128),
    "ClientMetadata.redirect_uris": (32, 2048),
    "ClientMetadata.contacts": (8, 254),
    "ClientMetadata.validates": (64, 512),
    "ApiKey.scopes": (256, 128),
}
NUMBERS: dict[str, tuple[int, int]] = {
    "InitialAccessToken.uses_left": (0, 1000),
    "ListInitialAccessTokensRequest.page_size": (0, 200),
    "Consistency.at_least": (0, 2**63 - 1),
    "WatchChangesRequest.resume_revision": (0, 2**63 - 1),
    "ListClientsRequest.page_size": (0, 200),
    "ListResourcesRequest.page_size": (0, 200),
    "ListSigningKeysRequest.page_size": (0, 200),
    "ListApiKeysRequest.page_size": (0, 200),
    "ListGrantsRequest.page_size": (0, 200),
    "ListSessionsRequest.page_size": (0, 200),
    "ListAuditEventsRequest.page_size": (0, 200),
    "ListRolesRequest.page_size": (0, 200),
    "ListPermissionsRequest.page_size": (0, 200),
    "ListRoleAssignmentsRequest.page_size": (0, 200),
    "ListUsersRequest.page_size": (0, 200),
}
DURATIONS: dict[str, tuple[int, int]] = {
    "ValidateTokenRequest.max_age": (0, 10**9),
    "Resource.token_lifetime": (60, 3600),
    "Resource.staleness_max": (5, 3600),
    "CreatePasswordResetCodeRequest.lifetime": (60, 24 * 3600),
}
FREE = {
    "User.password_set_time",
    "User.create_time",
    "User.update_time",
    "UpdateUserRequest.update_mask",
    "SetPasswordRequest.keep_session",
    "Client.policy_diff",
    "Client.registrant",
    "Client.review_comment",
    "Client.reviewer",
    "InitialAccessToken.initial_access_token_id",
    "RevokeClientRequest.validate_only",
    "RevokeEverythingRequest.validate_only",
    "RevokeGrantRequest.validate_only",
    "RevokeSessionRequest.validate_only",
    "RevokeSubjectClientRequest.validate_only",
    "RevokeSubjectRequest.validate_only",
    "ValidateTokenRequest.require_bound",
    "RevokeTokenRequest.validate_only",
    "ClientMetadata.tls_client_certificate_bound_access_tokens",
    "ClientMetadata.first_party",
    "RegisterClientRequest.validate_only",
    "Resource.freeze_permissions",
    "TaintSigningKeyRequest.validate_only",
    "Resource.create_time",
    "Resource.update_time",
    "ApiKey.api_key_id",
    "ApiKey.create_time",
    "UpdateResourceRequest.update_mask",
    "Permission.create_time",
    "Role.create_time",
    "Role.update_time",
    "RoleAssignment.create_time",
    "UpdateRoleRequest.update_mask",
    "UpdateClientRequest.update_mask",
    "Client.create_time",
    "Client.review_time",
    "Client.update_time",
    "InitialAccessToken.create_time",
}
"""Flags, what only the server sets, and masks: the verb knows what they may name."""
TIMES = {
    "ListAuditEventsRequest.start_time",
    "ListAuditEventsRequest.end_time",
    "ApiKey.expire_time",
    "ApproveClientRequest.approval_expire_time",
    "Client.approval_expire_time",
    "InitialAccessToken.expire_time",
    "RotateClientSecretRequest.overlap_end_time",
}

BUILT = {
    "CreateUser",
    "GetUser",
    "ListUsers",
    "UpdateUser",
    "DisableUser",
    "EnableUser",
    "DeleteUser",
    "SetPassword",
    "CreatePasswordResetCode",
    "ResetPassword",
    "ImportUsers",
    "IssueToken",
    "RefreshToken",
    "ValidateToken",
    "RevokeToken",
    "RegisterClient",
    "WatchChanges",
    "GetKeys",
    "GetClient",
    "ListClients",
    "ApproveClient",
    "RejectClient",
    "SuspendClient",
    "ResumeClient",
    "UpdateClient",
    "DeleteClient",
    "RotateClientSecret",
    "CreateInitialAccessToken",
    "ListInitialAccessTokens",
    "DeleteInitialAccessToken",
    "GetOwnClient",
    "UpdateOwnClient",
    "DeleteOwnClient",
    "CreateResource",
    "GetResource",
    "ListResources",
    "UpdateResource",
    "DeleteResource",
    "CreateApiKey",
    "ListApiKeys",
    "DeleteApiKey",
    "ListSigningKeys",
    "PrepareSigningKey",
    "ActivateSigningKey",
    "RetireSigningKey",
    "TaintSigningKey",
    "RevokeSubject",
    "RevokeClient",
    "RevokeSubjectClient",
    "RevokeSession",
    "RevokeGrant",
    "RevokeEverything",
    "ListGrants",
    "EndGrant",
    "ListSessions",
    "EndSession",
    "SignOutEverywhere",
    "ListAuditEvents",
    "ExplainToken",
    "CreateRole",
    "GetRole",
    "ListRoles",
    "UpdateRole",
    "DeleteRole",
    "CreatePermission",
    "ListPermissions",
    "DeletePermission",
    "AssignRole",
    "UnassignRole",
    "ListRoleAssignments",
}
METHODS = {
    method.name: method
    for service in SERVICES
    for method in service.methods
    if method.name in BUILT
}


def _owner(field: FieldDescriptor) -> str:
    """The message that a field is of."""
    assert field.containing_type is not None
    return str(field.containing_type.name)


def _message(field: FieldDescriptor) -> Any:
    """The class of a field's messages."""
    assert field.message_type is not None
    return GetMessageClass(field.message_type)


@dataclass(frozen=True)
class Place:
    """A field somewhere in a request."""

    method: MethodDescriptor
    path: tuple[FieldDescriptor, ...]

    @property
    def field(self) -> FieldDescriptor:
        return self.path[-1]

    @property
    def key(self) -> str:
        return f"{_owner(self.field)}.{self.field.name}"

    @property
    def name(self) -> str:
        """As BadRequest says it."""
        parts = [f.name + ("[0]" if f.is_repeated else "") for f in self.path[:-1]]
        return ".".join([*parts, self.field.name])

    def request(self, value: Any) -> Message:
        """A request that is right but for this field, perhaps."""
        request = GetMessageClass(self.method.input_type)()
        message = _fill(request)
        for field in self.path[:-1]:
            inner = getattr(message, field.name)
            message = inner.add() if field.is_repeated else inner
            _fill(message)
            if not field.is_repeated:
                message.SetInParent()
        name = self.field.name
        if self.field.is_repeated:
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        elif isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
        return request


def _fill(message: Any) -> Any:
    """Sets what is required."""
    for name in REQUIRED.get(message.DESCRIPTOR.name, ()):
        field = message.DESCRIPTOR.fields_by_name[name]
        if field.message_type is not None:
            getattr(message, name).SetInParent()
            _fill(getattr(message, name))
        else:
            setattr(message, name, "x")
    return message


def _is_well_known(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.full_name.startswith("google.")


def _places() -> Iterator[Place]:
    def walk(method: MethodDescriptor, path: tuple[FieldDescriptor, ...], of: Any) -> Any:
        for field in of.fields:
            place = Place(method, (*path, field))
            yield place
            if field.message_type is not None and not _is_well_known(field):
                yield from walk(method, place.path, field.message_type)

    for method in METHODS.values():
        yield from walk(method, (), method.input_type)


PLACES = list(_places())
LEAVES = [p for p in PLACES if p.field.message_type is None or _is_well_known(p.field)]
ENUMS = [p for p in LEAVES if p.field.enum_type is not None]


def test_every_field_of_every_built_request_is_in_this_table() -> None:
    known = TEXTS.keys() | LISTS.keys() | NUMBERS.keys() | DURATIONS.keys() | FREE | TIMES
    known |= {place.key for place in ENUMS}
    assert {place.key for place in LEAVES} == known
    assert {name for message in LIMITS for name in [message]} == (
        {_owner(place.field) for place in PLACES}
        | {p.field.message_type.name for p in PLACES if p.field.message_type} - {"Duration"}
        | {"GetKeysRequest"}
    ) - {"Timestamp"}


def _cases(place: Place) -> Iterator[tuple[Any, bool]]:
    """Values, and whether they are within the limit."""
    key = place.key
    if key in TEXTS:
        limit = TEXTS[key]
        if limit is None:
            yield "x" * 9000, True
            return
        for char in ("x", "ü", "\U0001f511"):
            yield char * limit, True
            yield char * (limit + 1), False
    elif key in LISTS:
        items, chars = LISTS[key]
        full = [f"{number:03}" + "x" * (chars - 3) for number in range(items)]
        yield full, True
        yield [*full, "one more"], False
        yield [full[0] + "x"], False
        yield [""], False
        yield ["twice", "twice"], False
    elif key in NUMBERS:
        low, high = NUMBERS[key]
        yield low, True
        yield high, True
        yield low - 1, False
        if high < 2**31 - 1:
            yield high + 1, False
    elif key in DURATIONS:
        low, high = DURATIONS[key]
        duration = _message(place.field)
        for seconds, nanos, good in (
            (low, 0, True),
            (high, 0, True),
            (low - 1, 0, False),
            (high + 1, 0, False),
            (low, 1, False),
        ):
            yield duration(seconds=seconds, nanos=nanos), good
    elif key in TIMES:
        timestamp = _message(place.field)
        for seconds, nanos, good in (
            (0, 0, True),
            (253402300799, 999_999_999, True),
            (253402300800, 0, False),
            (-1, 0, False),
            (1, 10**9, False),
            (1, -1, False),
        ):
            yield timestamp(seconds=seconds, nanos=nanos), good
    elif place.field.enum_type is not None:
        numbers = [value.number for value in place.field.enum_type.values]
        if place.field.is_repeated:
            yield [number for number in numbers if number], True
            yield [0], False
            yield [numbers[1], numbers[1]], False
            yield [max(numbers) + 1], False
        else:
            yield from ((number, True) for number in numbers)
            yield max(numbers) + 1, False


@pytest.mark.parametrize("place", LEAVES, ids=lambda p: f"{p.method.name}.{p.name}")
def test_limit_is_hit_exactly(place: Place) -> None:
    shape = Shape(place.method.input_type)
    for value, good in _cases(place):
        request = place.request(value)
        if good:
            shape.check(request)
            continue
        with pytest.raises(AuthError) as caught:
            shape.check(request)
        assert [v.field for v in caught.value.violations] == [place.name]


@pytest.mark.parametrize("place", LEAVES, ids=lambda p: f"{p.method.name}.{p.name}")
async def test_over_the_limit_is_named_over_the_wire(server: Running, place: Place) -> None:
    bad = [value for value, good in _cases(place) if not good][:1]
    for value in bad:
        found = await _call(server.channel(ADMIN), place.method, place.request(value))
        assert (found.code, found.reason) == ("INVALID_ARGUMENT", "FIELD_INVALID")
        assert found.fields == (place.name,)


async def _call(channel: grpc.aio.Channel, method: MethodDescriptor, request: Message) -> Any:
    path = f"/{method.containing_service.full_name}/{method.name}"
    answer = GetMessageClass(method.output_type).FromString
    if method.server_streaming:
        stream = channel.unary_stream(path, type(request).SerializeToString, answer)
        return await failure(stream(request, timeout=TIMEOUT_S).read())
    unary = channel.unary_unary(path, type(request).SerializeToString, answer)
    return await failure(unary(request, timeout=TIMEOUT_S))


@pytest.mark.parametrize("message", REQUIRED)
def test_required_fields_are_named(message: str) -> None:
    for place in PLACES:
        if _owner(place.field) != message or place.field.name not in REQUIRED[message]:
            continue
        request = (
            place.request("x")
            if place.field.message_type is None
            else place.request(_fill(_message(place.field)()))
        )
        shape = Shape(place.method.input_type)
        shape.check(request)
        inner: Any = request
        for field in place.path[:-1]:
            inner = getattr(inner, field.name)
            inner = inner[0] if field.is_repeated else inner
        inner.ClearField(place.field.name)
        with pytest.raises(AuthError) as caught:
            shape.check(request)
        assert place.name in [v.field for v in caught.value.violations]


def test_repeated_messages_have_a_limit() -> None:
    assert ITEMS_MAX == {"Resource.scopes": 256, "Role.permissions": 256}
    shape = Shape(resources_pb2.CreateResourceRequest.DESCRIPTOR)
    scopes = [resources_pb2.Scope(name=f"s{number}") for number in range(257)]
    for count in (256, 257):
        resource = resources_pb2.Resource(resource_id="x", scopes=scopes[:count])
        request = resources_pb2.CreateResourceRequest(resource=resource)
        if count == 256:
            shape.check(request)
            continue
        with pytest.raises(AuthError) as caught:
            shape.check(request)
        assert [v.field for v in caught.value.violations] == ["resource.scopes"]


async def test_many_violations_are_answered_in_part(server: Running) -> None:
    scopes = [resources_pb2.Scope(name="x" * 129, description="y" * 257) for _ in range(200)]
    resource = resources_pb2.Resource(resource_id="x" * 513, scopes=scopes)
    request = resources_pb2.CreateResourceRequest(resource=resource)
    for _ in range(10):
        refused = await failure(server.resources().CreateResource(request))
        assert refused.reason == "FIELD_INVALID"
        assert len(refused.fields) == 16


async def test_unknown_fields_of_a_newer_client_are_passed_over(server: Running) -> None:
    raw = b"\xfa\x3f\x03new"  # field 1023
    call = raw_unary(server.channel(ADMIN), "/authsvc.v1.AuthService/GetKeys")
    assert auth_pb2.GetKeysResponse.FromString(await call(raw, timeout=TIMEOUT_S)).keys


# --- the wire ---


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x00", b"\x0b" * 1000],
    ids=["cut_off", "length", "not_utf8", "tag_zero", "groups"],
)
@pytest.mark.parametrize("name", ["ValidateToken", "RevokeToken", "WatchChanges"])
async def test_bytes_that_are_no_message_are_a_fault_of_the_request(
    server: Running, raw: bytes, name: str
) -> None:
    channel, path = server.channel(ADMIN), f"/authsvc.v1.AuthService/{name}"
    if name == "WatchChanges":
        if raw == b"\x0a\x02\xff\xfe":
            return  # it has no text
        refused = await failure(raw_stream(channel, path)(raw, timeout=TIMEOUT_S).read())
    else:
        refused = await failure(raw_unary(channel, path)(raw, timeout=TIMEOUT_S))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "FIELD_INVALID")
    assert "google" not in refused.text
    assert "Error" not in refused.text


async def test_message_too_large_is_refused_and_the_connection_lives(server: Running) -> None:
    """faults.md 24, CVE-2023-32731: the next call has the right identity."""
    member = await server.member("large", "validate")
    options: dict[str, Any] = {"grpc.max_send_message_length": -1}
    async with connect(server.app.port, member.who, **options) as channel:
        auth = AuthServiceStub(channel)
        for size, expected in ((4 * 2**20 - 100, "OK"), (4 * 2**20 + 1, "RESOURCE_EXHAUSTED")):
            request = auth_pb2.ValidateTokenRequest(token="x" * size)
            assert await outcome(auth.ValidateToken(request, timeout=TIMEOUT_S)) == expected
        assert not (await auth.ValidateToken(auth_pb2.ValidateTokenRequest(token="x"))).active
        listing = clients_pb2.ListClientsRequest()
        refused = await failure(server.clients(member.who).ListClients(listing))
        assert refused.reason == "INSUFFICIENT_SCOPE"


async def test_metadata_too_large_is_refused_and_the_connection_lives(server: Running) -> None:
    member = await server.member("wide", "validate")
    async with connect(server.app.port, member.who) as channel:
        auth = AuthServiceStub(channel)
        request = auth_pb2.ValidateTokenRequest(token="x")
        for key in ("x-filler", "authorization", "x-request-id"):
            call = auth.ValidateToken(request, metadata=((key, "x" * 17_000),), timeout=TIMEOUT_S)
            assert (await failure(call)).code == "RESOURCE_EXHAUSTED"
            assert not (await auth.ValidateToken(request, timeout=TIMEOUT_S)).active
        fits = (("x-filler", "x" * 12_000),)
        assert not (await auth.ValidateToken(request, metadata=fits)).active


async def test_many_at_once_keep_their_identities(server: Running) -> None:
    """Each caller of many, over connections of their own, is answered as itself."""
    members = [await server.member(f"mixed{number}", "validate") for number in range(4)]
    await server.resource("https://mixed.test", "mixed.read", owner=members[0].client_id)
    client = await server.member("mixed_client", "mixed.read")
    token = (await server.token(client)).access_token

    async def ask(number: int) -> tuple[int, str]:
        who = members[number % 4].who
        verdict = await server.verdict(who, token, of=client.who)
        return number % 4, "active" if verdict.active else "nothing"

    found = await asyncio.gather(*(ask(number) for number in range(200)))
    assert set(found) == {(0, "active"), (1, "nothing"), (2, "nothing"), (3, "nothing")}
    assert await reason(server.verdict(client.who, token)) == "INSUFFICIENT_SCOPE"
