"""A fault inside any RPC reaches the caller as an incident, and the log as what it was."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from structlog.testing import capture_logs

from authsvc.errors import AuthError, Reason
from authsvc.identify import Identify
from authsvc.rpc.audit import AuditServicer
from authsvc.rpc.auth import AuthServicer
from authsvc.rpc.clients import ClientServicer
from authsvc.rpc.explain import ExplainServicer
from authsvc.rpc.keys import KeyServicer
from authsvc.rpc.paging import Pages
from authsvc.rpc.peer import Peers
from authsvc.rpc.pipeline import Pipeline
from authsvc.rpc.policy import Policy
from authsvc.rpc.resources import ResourceServicer
from authsvc.rpc.revocations import RevocationServicer
from authsvc.rpc.roles import RoleServicer
from authsvc.rpc.server import Listener, RpcServer
from authsvc.rpc.sessions import SessionServicer
from authsvc.rpc.tls import ServerTls
from authsvc.rpc.users import UserServicer
from authsvc.store import sql_store
from authsvc.store.cached import CachedCatalog, CachedClients
from authsvc.store.sql import Database
from authsvc.telemetry import Metrics, Subject
from authsvc_client.core.judge import Judge
from authsvc_client.core.state import State
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.users_pb2_grpc import UserServiceStub
from tests.harness import (
    ADMIN,
    CA,
    ISSUER,
    TIMEOUT_S,
    Failure,
    build,
    connect,
    hand_clock,
    migrated,
    raw_unary,
    read_failure,
    settings_for,
    spiffe,
)
from tests.rpc.test_limits import METHODS

SECRET = "secret detail: password=hunter2"


class Fails:
    """Anything at all, and whatever is asked of it fails."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error

    def __getattr__(self, name: str) -> Any:
        raise self._error


class FailsLater:
    """A stream that fails behind its first event."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def __call__(self, *args: Any) -> AsyncIterator[Any]:
        yield auth_pb2.WatchChangesResponse().SerializeToString()
        raise self._error


@dataclass
class Broken:
    """A server whose verbs all fail."""

    port: int
    metrics: Metrics


@asynccontextmanager
async def broken(directory: Path, error: BaseException, **verbs: Any) -> AsyncIterator[Broken]:
    settings = settings_for(directory)
    clock = hand_clock()
    database = Database(await migrated(directory), clock)
    store = sql_store(database)
    assert settings.tls.certificate is not None
    assert settings.tls.key is not None
    assert settings.tls.client_ca is not None
    tls = ServerTls(settings.tls.certificate, settings.tls.key, settings.tls.client_ca)
    state = State(120)
    state.confirm(clock.boot(), clock.wall())
    metrics, fails = Metrics(), Fails(error)
    anything: Any = fails
    clients, catalog = CachedClients(store.clients), CachedCatalog(store.resources)
    identify = Identify(
        ISSUER, Judge(ISSUER, state), store.tokens, store.api_keys, clients.get, catalog, clock
    )
    admins = frozenset({spiffe("admin")})
    policy = Policy(ISSUER, admins, lambda: CA.pin, clients, catalog, identify, state, clock)
    names = AuthServicer.__init__.__annotations__.keys() - {"return", "metrics"}
    given: dict[str, Any] = dict.fromkeys(names, fails) | verbs
    pages = Pages(anything)
    pipeline = Pipeline(Peers(lambda: tls.trust), policy, store.audit.refused, metrics, clock)
    server = RpcServer(
        [Listener("127.0.0.1:0", tls.credentials(), pipeline)],
        {
            "AuthService": AuthServicer(metrics=metrics, **given),
            "ClientService": ClientServicer(*(anything,) * 6, pages, anything, 1.0),
            "ResourceService": ResourceServicer(anything, pages),
            "KeyService": KeyServicer(anything, anything, pages),
            "RevocationService": RevocationServicer(anything),
            "SessionService": SessionServicer(anything, pages),
            "RoleService": RoleServicer(anything, pages),
            "UserService": UserServicer(anything, anything, pages),
            "AuditService": AuditServicer(anything, pages),
            "ExplainService": ExplainServicer(anything),
        },
        state,
        clock,
        reflect=False,
    )
    (port,), _ = await server.start("127.0.0.1:0")
    try:
        yield Broken(port, metrics)
    finally:
        await server.stop(0)
        await database.close()


REQUESTS: dict[str, dict[str, Any]] = {
    "IssueToken": {"client_credentials": {}, "client_id": "x"},
    "RefreshToken": {"refresh_token": "x", "client_id": "x"},
    "ValidateToken": {"token": "x"},
    "RevokeToken": {"jti": "x"},
    "RegisterClient": {"metadata": {"client_name": "x"}},
    "WatchChanges": {},
    "GetKeys": {},
    "GetClient": {"client_id": "x"},
    "ListClients": {},
    "ApproveClient": {"client_id": "x"},
    "RejectClient": {"client_id": "x"},
    "SuspendClient": {"client_id": "x"},
    "ResumeClient": {"client_id": "x"},
    "UpdateClient": {
        "client": {"client_id": "x"},
        "update_mask": {"paths": ["metadata.client_name"]},
    },
    "DeleteClient": {"client_id": "x"},
    "RotateClientSecret": {"client_id": "x"},
    "CreateInitialAccessToken": {"initial_access_token": {"expire_time": {"seconds": 2**31}}},
    "ListInitialAccessTokens": {},
    "DeleteInitialAccessToken": {"initial_access_token_id": "x"},
    "GetOwnClient": {"registration_access_token": "x"},
    "UpdateOwnClient": {
        "registration_access_token": "x",
        "client_id": "x",
        "metadata": {"client_name": "x"},
    },
    "DeleteOwnClient": {"registration_access_token": "x"},
    "CreateApiKey": {"api_key": {"client_id": "x"}},
    "ListApiKeys": {},
    "DeleteApiKey": {"api_key_id": "x"},
    "CreateResource": {"resource": {"resource_id": "urn:x"}},
    "GetResource": {"resource_id": "urn:x"},
    "ListResources": {},
    "UpdateResource": {
        "resource": {"resource_id": "urn:x"},
        "update_mask": {"paths": ["display_name"]},
    },
    "DeleteResource": {"resource_id": "urn:x"},
    "ListSigningKeys": {},
    "PrepareSigningKey": {},
    "ActivateSigningKey": {"kid": "x"},
    "RetireSigningKey": {"kid": "x"},
    "TaintSigningKey": {"kid": "x"},
    "RevokeSubject": {"subject": "x"},
    "RevokeClient": {"client_id": "x"},
    "RevokeSubjectClient": {"subject": "x", "client_id": "x"},
    "RevokeSession": {"session_id": "x"},
    "RevokeGrant": {"grant_id": "x"},
    "RevokeEverything": {},
    "ListGrants": {},
    "EndGrant": {"grant_id": "x"},
    "CreateRole": {"role": {"role_id": "x"}},
    "GetRole": {"role_id": "x"},
    "ListRoles": {},
    "UpdateRole": {"role": {"role_id": "x"}, "update_mask": {"paths": ["display_name"]}},
    "DeleteRole": {"role_id": "x"},
    "CreatePermission": {"permission": {"ref": {"resource_id": "urn:x", "name": "x"}}},
    "ListPermissions": {},
    "DeletePermission": {"ref": {"resource_id": "urn:x", "name": "x"}},
    "AssignRole": {"role_assignment": {"role_id": "x", "user_id": "x"}},
    "UnassignRole": {"role_assignment": {"role_id": "x", "user_id": "x"}},
    "ListRoleAssignments": {},
    "CreateUser": {"user": {"username": "x"}},
    "GetUser": {"user_id": "x"},
    "ListUsers": {},
    "UpdateUser": {"user": {"user_id": "x"}, "update_mask": {"paths": ["display_name"]}},
    "DisableUser": {"user_id": "x"},
    "EnableUser": {"user_id": "x"},
    "DeleteUser": {"user_id": "x"},
    "SetPassword": {"user_id": "x", "new_password": "x"},
    "CreatePasswordResetCode": {"user_id": "x"},
    "ResetPassword": {"code": "x", "new_password": "x"},
    "ImportUsers": {"rows": [{"username": "x"}]},
    "ListSessions": {},
    "EndSession": {"session_id": "x"},
    "SignOutEverywhere": {"user_id": "x"},
    "ListAuditEvents": {},
    "ExplainToken": {"question": {"token": "x"}},
}
FAILING = [method for name, method in METHODS.items() if name != "ImportUsers"]
"""Whole; the rows of an import fail singly."""


def _request(method: MethodDescriptor) -> Message:
    return GetMessageClass(method.input_type)(**REQUESTS[method.name])


def _leak(text: str) -> str:
    """The text where it holds what nobody may see."""
    return text if "hunter2" in text else ""


async def _fail(channel: grpc.aio.Channel, method: MethodDescriptor) -> Failure:
    path = f"/{method.containing_service.full_name}/{method.name}"
    answer = GetMessageClass(method.output_type).FromString
    given: dict[str, Any] = {
        "timeout": TIMEOUT_S,
        "metadata": (("x-request-id", "req-1"),),
    }
    request = _request(method)
    try:
        if method.server_streaming:
            stream = channel.unary_stream(path, type(request).SerializeToString, answer)
            call = stream(request, **given)
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await channel.unary_unary(path, type(request).SerializeToString, answer)(
                request, **given
            )
    except grpc.aio.AioRpcError as error:
        found = read_failure(error)
        return replace(found, text=found.text + _leak(f"{error!r} {error.debug_error_string()}"))
    raise AssertionError(f"{method.name} did not fail")


def test_every_built_method_is_here() -> None:
    assert REQUESTS.keys() == METHODS.keys()


async def test_text_of_an_exception_goes_nowhere_but_the_log(tmp_path: Path) -> None:
    errors = (
        RuntimeError(SECRET),
        KeyError(SECRET),
        AuthError(Reason.INTERNAL, SECRET, metadata={"x": SECRET}, cause=SECRET),
        AssertionError(SECRET),
        ValueError(SECRET),
    )
    for error in errors:
        async with broken(tmp_path, error) as server, connect(server.port, ADMIN) as channel:
            for method in FAILING:
                with capture_logs([Subject("here")]) as logs:
                    found = await _fail(channel, method)
                assert (found.code, found.reason) == ("INTERNAL", "INTERNAL"), method.name
                assert found.text == "internal error"
                assert found.metadata.keys() == {"incident"}
                assert "hunter2" not in repr(found), method.name
                assert found.trailers["x-request-id"] == "req-1"
                (logged,) = [entry for entry in logs if entry["event"] == "rpc.incident"]
                assert logged["incident"] == found.metadata["incident"]
                assert (logged["method"], logged["request_id"]) == (method.full_name, "req-1")
                assert logged["exc_info"] is error
                count = server.metrics.registry.get_sample_value(
                    "authsvc_rpc_calls_total", {"method": method.full_name, "code": "INTERNAL"}
                )
                assert count == 1


async def test_row_of_an_import_that_fails_tells_no_more(tmp_path: Path) -> None:
    async with (
        broken(tmp_path, RuntimeError(SECRET)) as server,
        connect(server.port, ADMIN) as channel,
    ):
        with capture_logs() as logs:
            request: Any = _request(METHODS["ImportUsers"])
            answer = await UserServiceStub(channel).ImportUsers(request)
        (result,) = answer.results
        assert (result.error.code, result.error.message) == (13, "internal error")
        assert "hunter2" not in repr(answer)
        assert "rpc.incident" in {entry["event"] for entry in logs}


async def test_stream_that_fails_behind_an_event_tells_no_more(tmp_path: Path) -> None:
    error = RuntimeError(SECRET)
    async with (
        broken(tmp_path, error, watch=FailsLater(error)) as server,
        connect(server.port, ADMIN) as channel,
    ):
        with capture_logs() as logs:
            found = await _fail(channel, METHODS["WatchChanges"])
        assert found.reason == "INTERNAL"
        assert "hunter2" not in repr(found)
        assert [e["incident"] for e in logs if e["event"] == "rpc.incident"] == [
            found.metadata["incident"]
        ]


async def test_answer_that_cannot_be_encoded_is_a_fault_of_the_server(tmp_path: Path) -> None:
    error = RuntimeError(SECRET)

    class Answers:
        async def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return SECRET  # not what the servicer expects

    async with (
        broken(tmp_path, error, issue=Answers(), validate=Answers()) as server,
        connect(server.port, ADMIN) as channel,
    ):
        for name in ("IssueToken", "ValidateToken"):
            found = await _fail(channel, METHODS[name])
            assert found.reason == "INTERNAL"
            assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("error", "code", "reason", "metadata"),
    [
        (TimeoutError(SECRET), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", {"limit_seconds": "30"}),
        (
            AuthError(Reason.STORE_UNAVAILABLE, cause=SECRET),
            "UNAVAILABLE",
            "STORE_UNAVAILABLE",
            {},
        ),
        (AuthError(Reason.COMMIT_UNKNOWN, cause=SECRET), "UNAVAILABLE", "COMMIT_UNKNOWN", {}),
        (AuthError(Reason.CLIENT_NOT_FOUND, cause=SECRET), "NOT_FOUND", "CLIENT_NOT_FOUND", {}),
    ],
    ids=["timeout", "store", "commit", "refusal"],
)
async def test_what_is_no_fault_has_no_incident(
    tmp_path: Path, error: Exception, code: str, reason: str, metadata: dict[str, str]
) -> None:
    async with broken(tmp_path, error) as server, connect(server.port, ADMIN) as channel:
        for method in FAILING:
            with capture_logs() as logs:
                found = await _fail(channel, method)
            assert (found.code, found.reason, found.metadata) == (code, reason, metadata)
            assert "hunter2" not in repr(found)
            assert "rpc.incident" not in {entry["event"] for entry in logs}


async def test_request_is_never_in_the_log(tmp_path: Path) -> None:
    error = RuntimeError("x")
    async with broken(tmp_path, error) as server, connect(server.port, ADMIN) as channel:
        stub = raw_unary(channel, "/authsvc.v1.AuthService/IssueToken")
        request = build(
            auth_pb2.IssueTokenRequest,
            client_credentials={},
            client_id="x",
            client_credential={"client_secret": "hunter2"},
        )
        with capture_logs([Subject("here")]) as logs, pytest.raises(grpc.aio.AioRpcError):
            await stub(request.SerializeToString(), metadata=(("authorization", "Bearer hunter2"),))
        assert logs
        assert "hunter2" not in json.dumps(logs, default=repr)
