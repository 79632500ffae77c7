"""Who may call what: every method of every service, by every kind of caller, in one table."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from authsvc.clock import SystemClock
from authsvc.rpc.pipeline import Pipeline
from authsvc.rpc.policy import rule_of
from authsvc.rpc.server import SERVICES
from authsvc.telemetry import Metrics
from authsvc_client.v1 import annotations_pb2, auth_pb2, clients_pb2, keys_pb2, revocations_pb2
from authsvc_client.v1.annotations_pb2 import require
from tests import certs
from tests.certs import Issued
from tests.harness import (
    ADMIN,
    SPAN,
    TIMEOUT_S,
    UNKNOWN_CA,
    Failure,
    Member,
    Running,
    identity,
    read_failure,
    running,
)

METHODS = [method for service in SERVICES for method in service.methods]

# What the methods of this version answer to an empty request of one who may call them. All others
# say NOT_IMPLEMENTED.
BUILT = {
    "IssueToken": "FIELD_INVALID",
    "RefreshToken": "FIELD_INVALID",
    "ValidateToken": "FIELD_INVALID",
    "BatchValidateTokens": "FIELD_INVALID",
    "RevokeToken": "FIELD_INVALID",
    "RegisterClient": "FIELD_INVALID",
    "WatchChanges": "OK",
    "GetKeys": "OK",
    "GetClient": "FIELD_INVALID",
    "ListClients": "OK",
    "ApproveClient": "FIELD_INVALID",
    "RejectClient": "FIELD_INVALID",
    "SuspendClient": "FIELD_INVALID",
    "ResumeClient": "FIELD_INVALID",
    "UpdateClient": "FIELD_INVALID",
    "DeleteClient": "FIELD_INVALID",
    "RotateClientSecret": "FIELD_INVALID",
    "CreateInitialAccessToken": "FIELD_INVALID",
    "ListInitialAccessTokens": "OK",
    "DeleteInitialAccessToken": "FIELD_INVALID",
    "GetOwnClient": "FIELD_INVALID",
    "UpdateOwnClient": "FIELD_INVALID",
    "DeleteOwnClient": "FIELD_INVALID",
    "CreateResource": "FIELD_INVALID",
    "GetResource": "FIELD_INVALID",
    "ListResources": "OK",
    "UpdateResource": "FIELD_INVALID",
    "DeleteResource": "FIELD_INVALID",
    "CreateApiKey": "FIELD_INVALID",
    "DeleteApiKey": "FIELD_INVALID",
    "RevokeSubject": "FIELD_INVALID",
    "RevokeClient": "FIELD_INVALID",
    "RevokeSubjectClient": "FIELD_INVALID",
    "RevokeSession": "FIELD_INVALID",
    "RevokeGrant": "FIELD_INVALID",
    "RevokeEverything": "OK",
    "ListGrants": "OK",
    "EndGrant": "FIELD_INVALID",
    "ListSigningKeys": "OK",
    "PrepareSigningKey": "SIGNING_KEY_STATE_CONFLICT",
    "ActivateSigningKey": "FIELD_INVALID",
    "RetireSigningKey": "FIELD_INVALID",
    "TaintSigningKey": "FIELD_INVALID",
    "CreateUser": "FIELD_INVALID",
    "GetUser": "FIELD_INVALID",
    "UpdateUser": "FIELD_INVALID",
    "DisableUser": "FIELD_INVALID",
    "EnableUser": "FIELD_INVALID",
    "DeleteUser": "FIELD_INVALID",
    "SetPassword": "FIELD_INVALID",
    "CreatePasswordResetCode": "FIELD_INVALID",
    "ResetPassword": "FIELD_INVALID",
    "ImportUsers": "FIELD_INVALID",
    "CreateRole": "FIELD_INVALID",
    "GetRole": "FIELD_INVALID",
    "UpdateRole": "FIELD_INVALID",
    "DeleteRole": "FIELD_INVALID",
    "CreatePermission": "FIELD_INVALID",
    "DeletePermission": "FIELD_INVALID",
    "AssignRole": "FIELD_INVALID",
    "UnassignRole": "FIELD_INVALID",
    "EndSession": "FIELD_INVALID",
    "SignOutEverywhere": "FIELD_INVALID",
    "ExplainToken": "FIELD_INVALID",
    "ListUsers": "OK",
    "ListRoles": "OK",
    "ListPermissions": "OK",
    "ListRoleAssignments": "OK",
    "ListSessions": "OK",
    "ListAuditEvents": "OK",
}
PUBLIC = {
    "IssueToken",
    "RefreshToken",
    "RevokeToken",
    "RegisterClient",
    "GetKeys",
    "CreateApiKey",
    "ListApiKeys",
    "DeleteApiKey",
    "GetOwnClient",
    "UpdateOwnClient",
    "DeleteOwnClient",
    "SetPassword",
    "ResetPassword",
}
BY_SCOPE = {
    "ValidateToken": "validate",
    "BatchValidateTokens": "validate",
    "WatchChanges": "watch",
}
"""What is neither public nor here asks for `admin`."""
ALL = frozenset({"admin", "validate", "watch", "register"})


@dataclass
class Caller:
    """A way to call, and what comes of it: a refusal, or scopes that are held."""

    who: Issued | None
    refused: str = ""
    """Reason for which no method that asks for anything is reached."""
    scopes: frozenset[str] = frozenset()
    bearer: str = ""
    twice: bool = False
    verdict: str = ""
    """In the metadata of CALLER_TOKEN_INVALID."""
    connects: bool = True
    chain: bytes = field(default=b"", repr=False)

    def expected(self, method: MethodDescriptor) -> str:
        if not self.connects:
            return "UNAVAILABLE"
        if self.twice:
            return "AUTH_METHOD_AMBIGUOUS"
        admitted = BUILT.get(method.name, "NOT_IMPLEMENTED")
        if method.name == "ListApiKeys":  # the caller's; by the settings it is no client
            is_admin = self.who is ADMIN and not self.bearer
            return self.refused or ("FIELD_INVALID" if is_admin else "OK")
        if method.name in PUBLIC:
            return admitted
        if self.refused:
            return self.refused
        needed = BY_SCOPE.get(method.name, "admin")
        return admitted if needed in self.scopes else "INSUFFICIENT_SCOPE"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        given = (("authorization", self.bearer),) if self.bearer else ()
        return given * 2 if self.twice else given


async def _call(server: Running, caller: Caller, method: MethodDescriptor) -> Failure:
    """An empty request; code OK where it is answered."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    request = GetMessageClass(method.input_type)()
    if isinstance(request, revocations_pb2.RevokeEverythingRequest):
        request.validate_only = True
    answer = GetMessageClass(method.output_type).FromString
    channel = server.channel(caller.who, caller.chain)
    settled: dict[str, Any] = {"metadata": caller.metadata, "timeout": TIMEOUT_S}
    try:
        if method.server_streaming:
            stream = channel.unary_stream(path, type(request).SerializeToString, answer)
            call = stream(request, **settled)
            await call.read()
            call.cancel()
        else:
            unary = channel.unary_unary(path, type(request).SerializeToString, answer)
            await unary(request, **settled)
    except grpc.aio.AioRpcError as error:
        return read_failure(error)
    return Failure("OK")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def callers(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[tuple[Running, dict[str, Caller]]]:
    async with running(tmp_path_factory.mktemp("who")) as server:
        await server.resource("https://orders.test", "orders.read")
        await server.keys().PrepareSigningKey(keys_pb2.PrepareSigningKeyRequest())
        members: dict[str, Member] = {}
        for name, scopes in {
            "scopeless": ("orders.read",),
            "watcher": ("watch",),
            "validator": ("validate",),
            "registrar": ("register",),
            "administrator": ("admin",),
            "everything": ("admin", "validate", "watch", "register", "orders.read"),
            "suspended": ("admin",),
        }.items():
            members[name] = await server.member(name, *scopes)
        members["pending"] = await server.member("pending", "admin", approve=False)
        members["rejected"] = await server.member("rejected", "admin", approve=False)
        reject = clients_pb2.RejectClientRequest(client_id=members["rejected"].client_id)
        await server.clients().RejectClient(reject)
        lost = await server.token(members["suspended"], "admin")
        await server.suspend(members["suspended"].client_id)
        full, stranger = members["everything"], identity("stranger")
        own = (await server.token(full, *ALL)).access_token
        narrow = (await server.token(full, "validate")).access_token
        foreign = (await server.token(full, "orders.read")).access_token
        unbound = await server.member(
            "unbound", "validate", tls_client_certificate_bound_access_tokens=False
        )
        free = (await server.token(unbound)).access_token
        methods = [
            clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
            clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
        ]
        keyed = await server.member("keyed", *ALL, token_endpoint_auth_methods=methods)
        make = clients_pb2.CreateApiKeyRequest(api_key=clients_pb2.ApiKey())
        api_key = (await server.clients(keyed.who).CreateApiKey(make)).value
        bad = "CALLER_TOKEN_INVALID"
        found = {
            "no certificate": Caller(None, connects=False),
            "certificate of an unknown CA": Caller(
                identity("everything", ca=UNKNOWN_CA), connects=False
            ),
            "self-signed certificate": Caller(certs.leaf(None, span=SPAN), connects=False),
            "verified peer that is no client": Caller(stranger, "CALLER_UNKNOWN"),
            "pending": Caller(members["pending"].who, "CLIENT_PENDING"),
            "rejected": Caller(members["rejected"].who, "CALLER_UNKNOWN"),
            "suspended": Caller(members["suspended"].who, "CLIENT_SUSPENDED"),
            "approved without the scopes": Caller(members["scopeless"].who),
            "approved with watch": Caller(members["watcher"].who, scopes=frozenset({"watch"})),
            "approved with validate": Caller(
                members["validator"].who, scopes=frozenset({"validate"})
            ),
            "approved with register": Caller(
                members["registrar"].who, scopes=frozenset({"register"})
            ),
            "approved with admin": Caller(
                members["administrator"].who, scopes=frozenset({"admin"})
            ),
            "approved with all scopes": Caller(full.who, scopes=ALL),
            "administrator by the settings": Caller(ADMIN, scopes=ALL),
            "token for authsvc on its own connection": Caller(
                full.who, scopes=ALL, bearer=f"Bearer {own}"
            ),
            "token, scheme in another case": Caller(full.who, scopes=ALL, bearer=f"bEARER {own}"),
            "token with fewer scopes than its client": Caller(
                full.who, scopes=frozenset({"validate"}), bearer=f"Bearer {narrow}"
            ),
            "token bound to another certificate": Caller(
                stranger, bad, bearer=f"Bearer {own}", verdict="PROOF_MISMATCH"
            ),
            "token of another, over an administrator's connection": Caller(
                ADMIN, bad, bearer=f"Bearer {own}", verdict="PROOF_MISMATCH"
            ),
            "token that is not bound, over any connection": Caller(
                stranger, scopes=frozenset({"validate"}), bearer=f"Bearer {free}"
            ),
            "API key of one with all scopes": Caller(
                stranger, scopes=frozenset({"validate", "watch"}), bearer=f"Bearer {api_key}"
            ),
            "API key with another end": Caller(
                stranger, bad, bearer=f"Bearer {api_key[:-1]}", verdict="TOKEN_MALFORMED"
            ),
            "token of another audience": Caller(
                full.who, bad, bearer=f"Bearer {foreign}", verdict="TOKEN_INACTIVE"
            ),
            "token that was cut off": Caller(
                members["suspended"].who,
                bad,
                bearer=f"Bearer {lost.access_token}",
                verdict="TOKEN_CUT_OFF",
            ),
            "no token behind the scheme": Caller(
                full.who, bad, bearer="Bearer garbage", verdict="TOKEN_MALFORMED"
            ),
            "another scheme": Caller(ADMIN, bad, bearer="Basic YTpi", verdict="TOKEN_MALFORMED"),
            "authorization twice": Caller(full.who, bearer=f"Bearer {own}", twice=True),
        }
        yield server, found


def test_table_names_only_methods_that_are_there() -> None:
    names = {method.name for method in METHODS}
    assert len(names) == len(METHODS)
    assert names >= BUILT.keys() | PUBLIC | BY_SCOPE.keys()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name[11:])
async def test_who_may_call(
    callers: tuple[Running, dict[str, Caller]], method: MethodDescriptor
) -> None:
    server, table = callers
    found = {name: await _call(server, caller, method) for name, caller in table.items()}
    assert {name: f.reason or f.code for name, f in found.items()} == {
        name: caller.expected(method) for name, caller in table.items()
    }
    for name, refusal in found.items():
        caller = table[name]
        if refusal.reason == "INSUFFICIENT_SCOPE":
            assert refusal.metadata == {"scope": BY_SCOPE.get(method.name, "admin")}
        elif refusal.reason == "CALLER_TOKEN_INVALID":
            assert refusal.metadata == {"verdict": caller.verdict}
        elif refusal.reason == "NOT_IMPLEMENTED":
            assert refusal.metadata == {"feature": method.full_name}
        elif refusal.code != "OK" and caller.connects:
            assert refusal.reason


async def test_revoke_by_jti_asks_for_admin_after_all(
    callers: tuple[Running, dict[str, Caller]],
) -> None:
    server, table = callers
    found = {}
    for name in (
        "verified peer that is no client",
        "pending",
        "approved without the scopes",
        "approved with all scopes",
        "token with fewer scopes than its client",
        "administrator by the settings",
    ):
        caller = table[name]
        try:
            await server.auth(caller.who).RevokeToken(
                auth_pb2.RevokeTokenRequest(jti="x", validate_only=True), metadata=caller.metadata
            )
            found[name] = "OK"
        except grpc.aio.AioRpcError as error:
            found[name] = read_failure(error).reason
    assert list(found.values()) == [
        "CALLER_UNKNOWN",
        "CLIENT_PENDING",
        "INSUFFICIENT_SCOPE",
        "OK",
        "INSUFFICIENT_SCOPE",
        "OK",
    ]


# --- the option ---


def _method(**rule: Any) -> MethodDescriptor:
    """A method that carries this rule; none at all without one."""
    file = descriptor_pb2.FileDescriptorProto(
        name="synthetic.proto", package="synthetic", syntax="proto3"
    )
    file.message_type.add(name="Empty")
    method = file.service.add(name="Service").method.add(
        name="Method", input_type=".synthetic.Empty", output_type=".synthetic.Empty"
    )
    if rule:
        method.options.Extensions[require].CopyFrom(annotations_pb2.Require(**rule))
    pool = descriptor_pool.DescriptorPool()
    for dependency in (descriptor_pb2.DESCRIPTOR, *annotations_pb2.DESCRIPTOR.dependencies):
        pool.AddSerializedFile(dependency.serialized_pb)
    pool.AddSerializedFile(annotations_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return pool.FindServiceByName("synthetic.Service").methods[0]


@pytest.mark.parametrize("rule", [{"public": True}, {"scopes": ["admin"]}])
def test_rule_that_can_be_enforced_is_taken(rule: dict[str, Any]) -> None:
    found = rule_of(_method(**rule))
    assert found.public is rule.get("public", False)
    assert found.scopes == frozenset(rule.get("scopes", ()))


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"public": False},
        {"public": True, "scopes": ["admin"]},
        {"permissions": ["p"]},
        {"acr": ["gold"]},
        {"max_age": {"seconds": 60}},
        {"audience": "https://issuer.test"},
        {"mtls": True},
        {"scopes": ["admin"], "mtls": True},
        {"scopes": ["admin"], "max_age": {}},
    ],
    ids=str,
)
def test_method_without_a_rule_that_is_enforced_does_not_start(rule: dict[str, Any]) -> None:
    pipeline: Any = Pipeline.__new__(Pipeline)
    with pytest.raises(ValueError, match=r"synthetic\.Service\.Method"):
        pipeline.handlers(_method(**rule), object())


def test_nearest_method_with_a_rule_starts() -> None:
    nothing: Any = None
    pipeline = Pipeline(nothing, nothing, nothing, Metrics(), SystemClock())
    assert pipeline.handlers(_method(public=True), object()).all.unary_unary


def test_every_method_of_the_contract_has_a_rule_of_this_table() -> None:
    for method in METHODS:
        rule = rule_of(method)
        asked = set() if method.name in PUBLIC else {BY_SCOPE.get(method.name, "admin")}
        assert rule.public is (method.name in PUBLIC), method.full_name
        assert rule.scopes == asked, method.full_name
