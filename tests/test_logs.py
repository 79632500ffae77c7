"""What the log says of calls: on which replica, under which id, and never a secret."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import (
    AuthsvcClient,
    RequireInterceptor,
    SyncAuthsvcClient,
    SyncRequireInterceptor,
    request_id,
)
from authsvc_client.v1 import audit_pb2, auth_pb2, clients_pb2, keys_pb2
from authsvc_client.v1.audit_pb2_grpc import AuditServiceStub
from tests.cluster.replicas import GRANTS, Cast, Process, Replica, cast, environment
from tests.harness import (
    ADMIN,
    CA,
    SERVER,
    Failure,
    Member,
    connect,
    failure,
    identity,
    issue_request,
    migrate,
    spiffe,
    until,
)
from tests.servers import Postgres
from tests.test_sync_client import BILLS, SCOPE

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("logs")]

ROOT = Path(__file__).parents[1]
SECRET = "kept-to-myself-4711"
PLANTED = """
from authsvc.housekeeping import Housekeeping
from authsvc.rpc.keys import KeyServicer

async def fail(*_):
    raise RuntimeError("nobody's business")

KeyServicer.ListSigningKeys = fail
Housekeeping.run = fail
"""
EVERY_LINE = {"event", "level", "timestamp", "instance"}
LIST_KEYS = keys_pb2.ListSigningKeysRequest()
LIST_CLIENTS = clients_pb2.ListClientsRequest()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replicas(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[list[Replica]]:
    """Two; the second one is named by its settings."""
    root = tmp_path_factory.mktemp("logs")
    url = await postgres.database()
    await migrate(url)
    settings = environment(root, url, AUTHSVC_LOG_LEVEL="debug")
    processes = [
        Process(root, "one", settings, plant=PLANTED),
        Process(root, "two", settings | {"AUTHSVC_INSTANCE": "two"}, plant=PLANTED),
    ]
    try:
        for process in processes:
            process.launch()
        for process in processes:
            process.wait()
        made = [Replica(process) for process in processes]
        yield made
        for replica in made:
            await replica.disconnect()
    finally:
        for process in processes:
            process.kill()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def players(replicas: list[Replica]) -> Cast:
    """Like any, but for the scope that the service below asks for."""
    at, resource = replicas[0], "https://bills.test"
    owner = await at.member("owner", "validate")
    await at.resource(resource, SCOPE, owner=owner.client_id)
    return Cast(owner, await at.member("app", SCOPE, grant_types=GRANTS), resource, (SCOPE,))


def lines(replica: Replica) -> list[dict[str, Any]]:
    """All of them, each of which is JSON."""
    return [json.loads(line) for line in log(replica).splitlines() if line.startswith("{")]


def log(replica: Replica) -> str:
    return replica.process.log()


def documented() -> set[str]:
    """The fields that docs/logs.md explains."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/logs.md").read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


async def line_of(replica: Replica, failed: Failure) -> dict[str, Any]:
    """The one line about a call that failed."""
    about = str(failed.trailers["x-request-id"])
    await until(lambda: about in log(replica))
    [found] = [line for line in lines(replica) if line.get("request_id") == about]
    return found


# --- calls that fail ---

Ask = Callable[[Replica, Cast], Awaitable[Any]]
FAILING: dict[str, tuple[Ask, str, dict[str, str]]] = {
    "stranger": (
        lambda at, _: at.clients(identity("stranger")).ListClients(LIST_CLIENTS),
        "CALLER_UNKNOWN",
        {"peer": spiffe("stranger"), "method": "authsvc.v1.ClientService.ListClients"},
    ),
    "stranger_of_a_stream": (
        lambda at, _: (
            at.auth(identity("stranger")).WatchChanges(auth_pb2.WatchChangesRequest()).read()
        ),
        "CALLER_UNKNOWN",
        {"peer": spiffe("stranger"), "method": "authsvc.v1.AuthService.WatchChanges"},
    ),
    "no_administrator": (
        lambda at, cast: at.clients(cast.app.who).ListClients(LIST_CLIENTS),
        "INSUFFICIENT_SCOPE",
        {"method": "authsvc.v1.ClientService.ListClients"},
    ),
    "field": (
        lambda at, _: at.clients().ListClients(clients_pb2.ListClientsRequest(page_size=-1)),
        "FIELD_INVALID",
        {"peer": spiffe("admin"), "caller": spiffe("admin"), "address": "127.0.0.1"},
    ),
    "two_authorizations": (
        lambda at, _: at.clients().ListClients(
            LIST_CLIENTS, metadata=[("authorization", "Bearer a"), ("authorization", "Bearer b")]
        ),
        "AUTH_METHOD_AMBIGUOUS",
        {"peer": spiffe("admin")},
    ),
    "validation": (
        lambda at, cast: at.auth(cast.app.who).ValidateToken(
            auth_pb2.ValidateTokenRequest(token="x")
        ),
        "INSUFFICIENT_SCOPE",
        {"method": "authsvc.v1.AuthService.ValidateToken"},
    ),
    "secret": (
        lambda at, cast: at.auth(cast.app.who).IssueToken(
            issue_request(cast.app.client_id, secret=SECRET)
        ),
        "CLIENT_AUTHENTICATION_FAILED",
        {"method": "authsvc.v1.AuthService.IssueToken", "peer": spiffe("app")},
    ),
}


@pytest.mark.parametrize("case", FAILING)
async def test_a_call_that_fails_is_one_line(
    case: str, replicas: list[Replica], players: Cast
) -> None:
    ask, reason, says = FAILING[case]
    failed = await failure(ask(replicas[0], players))
    assert failed.reason == reason
    line = await line_of(replicas[0], failed)
    assert line.keys() >= EVERY_LINE | {"method", "request_id", "reason", "address"}
    assert line.keys() <= documented()
    assert {"event": "rpc.refused", "reason": reason} | says == {
        key: line[key] for key in ("event", "reason", *says)
    }


async def test_incident_is_found_on_the_replica_that_answered(replicas: list[Replica]) -> None:
    for here, there in (replicas, replicas[::-1]):
        failed = await failure(here.keys().ListSigningKeys(LIST_KEYS))
        assert failed.code == "INTERNAL"
        assert "business" not in repr(failed)
        line = await line_of(here, failed)
        assert line["incident"] == failed.metadata["incident"]
        assert (line["event"], line["caller"]) == ("rpc.incident", spiffe("admin"))
        assert "RuntimeError: nobody's business" in line["exception"]
        assert line["incident"] not in log(there)


async def test_every_line_is_json_and_names_the_replica(replicas: list[Replica]) -> None:
    for replica in replicas:
        written = log(replica)
        begun = written.index("\n{")  # after what serve tells a person
        assert all(
            json.loads(line).keys() >= EVERY_LINE for line in written[begun:].splitlines()[1:]
        )
    one, two = ({line["instance"] for line in lines(replica)} for replica in replicas)
    assert two == {"two"}
    [name] = one
    assert name.rpartition(":")[2].isdecimal()


async def test_a_task_is_named_by_its_lines(replicas: list[Replica]) -> None:
    def failed() -> list[Any]:
        return [line["task"] for line in lines(replicas[0]) if line["event"] == "task.failed"]

    await until(failed)
    assert set(failed()) == {"housekeeping"}


async def test_no_secret_is_in_any_line(replicas: list[Replica], players: Cast) -> None:
    at = replicas[0]
    refresh_token = await players.open(at)
    token = await players.issue(at)
    for metadata in (("authorization", f"Bearer {token}"), ("authorization", f"Basic {SECRET}")):
        await failure(at.clients(players.app.who).ListClients(LIST_CLIENTS, metadata=[metadata]))
        failed = await failure(at.keys().ListSigningKeys(LIST_KEYS, metadata=[metadata]))
    await failure(
        at.auth(players.app.who).RefreshToken(
            auth_pb2.RefreshTokenRequest(refresh_token=refresh_token[:-1] + "!", client_id=SECRET)
        )
    )
    await line_of(at, failed)
    for secret in (SECRET, token, token.split(".")[2], refresh_token[:-1], refresh_token[8:-1]):
        assert secret not in log(at)


@pytest.mark.parametrize("sent", ["x" * 65, 'a" "caller": "root', "a b", "{}", "a/../b"])
async def test_an_id_that_is_none_is_not_logged(sent: str, replicas: list[Replica]) -> None:
    stranger = replicas[0].clients(identity("stranger"))
    call = stranger.ListClients(LIST_CLIENTS, metadata=[("x-request-id", sent)])
    line = await line_of(replicas[0], await failure(call))
    assert len(line["request_id"]) == 32
    assert sent not in str(lines(replicas[0]))


# --- one request through a service ---


@asynccontextmanager
async def billing(validator: AuthsvcClient, resource: str, get: Any) -> AsyncIterator[str]:
    """A service whose method does something at authsvc."""
    handler = grpc.unary_unary_rpc_method_handler(
        get,
        request_deserializer=StringValue.FromString,
        response_serializer=StringValue.SerializeToString,
    )
    interceptor = RequireInterceptor(validator, audience=resource, services=[BILLS])
    server = grpc.aio.server(interceptors=[interceptor])
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(BILLS.full_name, {"Get": handler})]
    )
    port = server.add_secure_port("localhost:0", server_credentials())
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def billing_of_threads(
    validator: SyncAuthsvcClient, resource: str, get: Any
) -> AsyncIterator[str]:
    handler = grpc.unary_unary_rpc_method_handler(
        get,
        request_deserializer=StringValue.FromString,
        response_serializer=StringValue.SerializeToString,
    )
    interceptor = SyncRequireInterceptor(validator, audience=resource, services=[BILLS])
    generic = grpc.method_handlers_generic_handler(BILLS.full_name, {"Get": handler})
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, [generic], [interceptor])
        port = server.add_secure_port("localhost:0", server_credentials())
        server.start()
        try:
            yield f"localhost:{port}"
        finally:
            await asyncio.to_thread(server.stop(None).wait)


def server_credentials() -> grpc.ServerCredentials:
    pair = [(SERVER.key_pem, SERVER.pem)]
    return grpc.ssl_server_credentials(pair, CA.pem, require_client_auth=True)


def client_credentials(who: Member) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(CA.pem, who.who.key_pem, who.who.pem)


async def ask(target: str, who: Member, token: str, sent: str) -> str:
    metadata = [("authorization", f"Bearer {token}"), *([("x-request-id", sent)] if sent else [])]
    async with grpc.aio.secure_channel(target, client_credentials(who)) as channel:
        method = channel.unary_unary(
            f"/{BILLS.full_name}/Get",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )
        return str((await method(StringValue(), metadata=metadata)).value)


@asynccontextmanager
async def service(kind: str, at: Replica, players: Cast) -> AsyncIterator[str]:
    """One whose method revokes a token, and answers under which id it was called."""
    owner, port = players.owner, at.process.port
    if kind == "asyncio":
        async with AuthsvcClient(connect(port, owner.who)) as client:

            async def get(_request: Any, _context: Any) -> StringValue:
                token = await client.issue_client_credentials(owner.client_id)
                await client.revoke(token.value)
                return StringValue(value=request_id())

            async with billing(client, players.resource, get) as target:
                yield target
        return
    channel = grpc.secure_channel(f"localhost:{port}", client_credentials(owner))
    with SyncAuthsvcClient(channel) as blocking:

        def blocking_get(_request: Any, _context: Any) -> StringValue:
            token = blocking.issue_client_credentials(owner.client_id)
            blocking.revoke(token.value)
            return StringValue(value=request_id())

        async with billing_of_threads(blocking, players.resource, blocking_get) as target:
            yield target


@pytest.mark.parametrize("kind", ["asyncio", "threads"])
@pytest.mark.parametrize("sent", ["till-17.of_4", "", "not one"])
async def test_a_request_is_followed_through_a_service_to_the_audit(
    kind: str, sent: str, replicas: list[Replica], players: Cast
) -> None:
    at = replicas[0]
    sent = sent and f"{sent}{kind}"
    token = await players.issue(at)
    async with service(kind, at, players) as target:
        found = await ask(target, players.app, token, sent)
        another = await ask(target, players.app, token, "")
    assert (found == sent) is sent.startswith("till")
    assert len({found, another, request_id()}) == 3
    assert request_id() == ""
    await until(lambda: [line for line in lines(at) if line.get("request_id") == found])
    events = [line["event"] for line in lines(at) if line.get("request_id") == found]
    assert events == ["token.issued", "token.revoked"]
    listed = await AuditServiceStub(at.channel(ADMIN)).ListAuditEvents(
        audit_pb2.ListAuditEventsRequest(page_size=200)
    )
    rows = [event.action for event in listed.audit_events if event.x_request_id == found]
    assert rows == ["RevokeToken"]


async def test_what_is_written_without_an_id_gets_one_that_its_caller_is_told(
    replicas: list[Replica],
) -> None:
    at = replicas[0]
    request = clients_pb2.SuspendClientRequest(client_id=(await cast(at)).app.client_id)
    call = at.clients().SuspendClient(request)
    await call
    told = dict(await call.trailing_metadata())["x-request-id"]
    listed = await AuditServiceStub(at.channel(ADMIN)).ListAuditEvents(
        audit_pb2.ListAuditEventsRequest(page_size=200)
    )
    assert [e.action for e in listed.audit_events if e.x_request_id == told] == ["SuspendClient"]
    assert [line["event"] for line in lines(at) if line.get("request_id") == told]
