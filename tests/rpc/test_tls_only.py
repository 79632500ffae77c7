"""The listener without client certificates: who may do what, and that no certificate counts."""

import asyncio
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from authsvc.app import StartError, open_app
from authsvc.cli.serve import _where
from authsvc.config import Listen, load
from authsvc.model import NOBODY, CertificateIdentity, IdentityKind
from authsvc.rpc.limits import MESSAGE_BYTES_MAX
from authsvc.rpc.policy import rule_of
from authsvc.rpc.server import SERVICES
from authsvc_client.v1 import auth_pb2, clients_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from tests import certs
from tests.certs import Issued
from tests.harness import (
    ADMIN,
    CA,
    NOW,
    SPAN,
    TIMEOUT_S,
    UNKNOWN_CA,
    Member,
    Running,
    connect,
    failure,
    identity,
    issue_request,
    outcome,
    raw_unary,
    read_failure,
    reason,
    running,
    spiffe,
    to_the_end,
)

KEYS: Final = auth_pb2.GetKeysRequest()
LIST: Final = clients_pb2.ListClientsRequest()
WATCH: Final = auth_pb2.WatchChangesRequest()
METHODS: Final = [method for service in SERVICES for method in service.methods]


@asynccontextmanager
async def both(directory: Path, **settings: Any) -> AsyncIterator[tuple[Running, grpc.aio.Channel]]:
    """A server with both listeners, and a connection without a certificate."""
    async with running(directory, tls_only=True, **settings) as server:
        await server.resource("https://a.test", "a")
        async with connect(server.app.tls_port, None) as channel:
            yield server, channel


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def with_secret(server: Running, *scopes: str, **more: Any) -> Member:
    """A client that has a secret and no certificate of its own."""
    made = await server.register(ADMIN, secret=True, scopes=scopes, **more)
    await server.approve(made.client.client_id)
    return Member(ADMIN, made.client.client_id, made.client_secret)


async def token_of(channel: grpc.aio.Channel, member: Member, *scopes: str) -> str:
    """By client_secret_post, over a connection without a certificate."""
    request = issue_request(member.client_id, scopes=scopes, secret=member.secret)
    return (await AuthServiceStub(channel).IssueToken(request)).token.access_token


async def _empty(channel: grpc.aio.Channel, method: MethodDescriptor, *metadata: Any) -> str:
    """What an empty request is answered."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    request = GetMessageClass(method.input_type)()
    answer = GetMessageClass(method.output_type).FromString
    call: Any
    if method.server_streaming:
        call = channel.unary_stream(path, type(request).SerializeToString, answer)
    else:
        call = channel.unary_unary(path, type(request).SerializeToString, answer)
    try:
        called = call(request, metadata=metadata, timeout=TIMEOUT_S)
        if method.server_streaming:
            await called.read()
            called.cancel()
        else:
            await called
    except grpc.aio.AioRpcError as error:
        found = read_failure(error)
        return found.reason or found.code
    return "OK"


# --- who may do what ---


async def test_nobody_is_answered_as_a_stranger_with_a_certificate_is(tmp_path: Path) -> None:
    async with both(tmp_path) as (server, channel):
        stranger = server.channel(identity("stranger"))
        for method in METHODS:
            found = await _empty(channel, method)
            assert found == await _empty(stranger, method), method.full_name
            if not rule_of(method).public:
                assert found == "CALLER_UNKNOWN", method.full_name
        assert await outcome(AuthServiceStub(channel).GetKeys(KEYS)) == "OK"


async def test_client_with_a_secret_gets_a_token_and_is_known_by_it(tmp_path: Path) -> None:
    async with both(tmp_path) as (server, channel):
        member = await with_secret(server, "a", "validate", "admin")
        token = await token_of(channel, member, "a")
        validator = bearer(await token_of(channel, member, "validate"))
        auth = AuthServiceStub(channel)
        for method in METHODS:
            assert await _empty(channel, method, *validator) != "CALLER_UNKNOWN", method.full_name
        asked = auth_pb2.ValidateTokenRequest(token=token)
        assert await reason(auth.ValidateToken(asked)) == "CALLER_UNKNOWN"
        assert (await server.verdict(ADMIN, token)).active
        listing = ClientServiceStub(channel)
        assert await reason(listing.ListClients(LIST, metadata=validator)) == "INSUFFICIENT_SCOPE"
        administrator = bearer(await token_of(channel, member, "admin"))
        assert await outcome(listing.ListClients(LIST, metadata=administrator)) == "OK"


async def test_client_with_its_secret_in_metadata_gets_a_token(tmp_path: Path) -> None:
    """RFC 6749 section 2.3.1: client_secret_basic."""
    async with both(tmp_path) as (server, channel):
        methods = [
            clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST,
            clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_BASIC,
        ]
        member = await with_secret(server, "a", token_endpoint_auth_methods=methods)
        pair = b64encode(f"{member.client_id}:{member.secret}".encode()).decode()
        request = issue_request(member.client_id, scopes=["a"])
        for given, expected in ((pair, "OK"), (pair[:-4], "CLIENT_AUTHENTICATION_FAILED")):
            metadata = (("authorization", f"Basic {given}"),)
            call = AuthServiceStub(channel).IssueToken(request, metadata=metadata)
            assert await outcome(call) == expected


@pytest.mark.parametrize(
    ("secret", "expected"),
    [("", "CLIENT_AUTHENTICATION_FAILED"), ("x", "CLIENT_AUTHENTICATION_FAILED")],
)
async def test_client_without_its_secret_gets_nothing(
    tmp_path: Path, secret: str, expected: str
) -> None:
    async with both(tmp_path) as (server, channel):
        with_certificate = await server.member("orders", "a")
        for member in (with_certificate, await with_secret(server, "a")):
            auth = AuthServiceStub(channel)
            request = issue_request(member.client_id, secret=secret)
            assert await reason(auth.IssueToken(request)) == expected
            revoke = auth_pb2.RevokeTokenRequest(token="x", client_id=member.client_id)
            assert await reason(auth.RevokeToken(revoke)) == "CLIENT_AUTHENTICATION_FAILED"
        assert await outcome(server.token(with_certificate, "a")) == "OK"


async def test_client_whose_tokens_are_bound_gets_none(tmp_path: Path) -> None:
    """RFC 8705 section 3: there is no certificate that a token could be bound to."""
    async with both(tmp_path) as (server, channel):
        post = clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST
        member = await with_secret(
            server,
            "a",
            tls_client_auth_san_uri=spiffe("orders"),
            token_endpoint_auth_methods=[post, clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH],
        )
        request = issue_request(member.client_id, scopes=["a"], secret=member.secret)
        refused = AuthServiceStub(channel).IssueToken(request)
        assert await reason(refused) == "PEER_CERTIFICATE_MISSING"
        who = identity("orders")
        bound = (await server.auth(who).IssueToken(request)).token.access_token
        assert await server.judged(ADMIN, bound) == "PROOF_MISSING"
        assert await server.judged(ADMIN, bound, of=who) == "OK"


async def test_token_that_is_bound_to_a_certificate_is_no_bearer_token(tmp_path: Path) -> None:
    """RFC 8705 section 3: also where its certificate is offered, which nobody asked for."""
    async with both(tmp_path) as (server, channel):
        member = await server.member("orders", "admin")
        bound = bearer((await server.token(member, "admin")).access_token)
        call = server.clients(member.who).ListClients(LIST, metadata=bound)
        assert await outcome(call) == "OK"
        async with connect(server.app.tls_port, member.who) as offered:
            for way in (channel, offered):
                refused = await failure(ClientServiceStub(way).ListClients(LIST, metadata=bound))
                assert refused.reason == "CALLER_TOKEN_INVALID"
                assert refused.metadata["verdict"] == "PROOF_MISSING"


@pytest.mark.parametrize("kind", ["good", "administrator", "unknown_ca", "self_signed"])
async def test_certificate_that_is_offered_is_not_looked_at(tmp_path: Path, kind: str) -> None:
    async with both(tmp_path) as (server, _):
        member = await server.member("orders", "a", "validate")
        offered: dict[str, Issued] = {
            "good": member.who,
            "administrator": ADMIN,
            "unknown_ca": identity("orders", ca=UNKNOWN_CA),
            "self_signed": certs.leaf(None, uris=(spiffe("orders"),), span=SPAN),
        }
        async with connect(server.app.tls_port, offered[kind], CA.pem) as channel:
            assert await outcome(AuthServiceStub(channel).GetKeys(KEYS)) == "OK"
            issue = AuthServiceStub(channel).IssueToken(issue_request(member.client_id))
            assert await reason(issue) == "CLIENT_AUTHENTICATION_FAILED"
            forwarded = (("x-forwarded-client-cert", offered[kind].pem.decode().replace("\n", "")),)
            for metadata in ((), forwarded):
                call = ClientServiceStub(channel).ListClients(LIST, metadata=metadata)
                assert await reason(call) == "CALLER_UNKNOWN"


async def test_nobody_registers_nothing_and_a_registrar_by_token_does(tmp_path: Path) -> None:
    async with both(tmp_path) as (server, channel):
        auth = AuthServiceStub(channel)
        names: list[dict[str, Any]] = [{}, {"tls_client_auth_san_uri": spiffe("new")}]
        requests = [
            auth_pb2.RegisterClientRequest(
                metadata=clients_pb2.ClientMetadata(client_name="new", **name)
            )
            for name in names
        ]
        refused = [await reason(auth.RegisterClient(request)) for request in requests]
        assert refused == ["REGISTRATION_NOT_ALLOWED", "INVALID_CLIENT_METADATA"]
        registrar = await with_secret(server, "register")
        given = bearer(await token_of(channel, registrar, "register"))
        for request in requests:
            made = await auth.RegisterClient(request, metadata=given)
            assert made.client.client_id


async def test_certificate_stays_required_on_the_other_listener(tmp_path: Path) -> None:
    async with both(tmp_path) as (server, channel):
        member = await with_secret(server, "admin")
        given = bearer(await token_of(channel, member, "admin"))
        assert await outcome(ClientServiceStub(channel).ListClients(LIST, metadata=given)) == "OK"
        without = server.clients(None).ListClients(LIST, metadata=given)
        assert await outcome(without) == "UNAVAILABLE"


@pytest.mark.parametrize("kind", list(IdentityKind))
def test_nobody_matches_no_identity(kind: IdentityKind) -> None:
    for value in ("", "orders"):
        for ca in ("", CA.pin, "spiffe://"):
            assert not CertificateIdentity(kind, value, ca).matches(NOBODY, NOW)
    assert not NOBODY.validity.covers(NOW)


# --- limits, health, reload, end ---


async def test_limits_and_unknown_methods_are_those_of_the_other_listener(tmp_path: Path) -> None:
    async with both(tmp_path) as (_, channel):
        long = raw_unary(channel, "/authsvc.v1.AuthService/GetKeys")
        refused = await failure(long(b"\0" * (MESSAGE_BYTES_MAX + 1), timeout=TIMEOUT_S))
        assert refused.code == "RESOURCE_EXHAUSTED"
        nothing = raw_unary(channel, "/authsvc.v1.AuthService/Nothing")
        assert (await failure(nothing(b"", timeout=TIMEOUT_S))).code == "UNIMPLEMENTED"
        twice = bearer("x") * 2
        call = AuthServiceStub(channel).GetKeys(KEYS, metadata=twice)
        assert await reason(call) == "AUTH_METHOD_AMBIGUOUS"


@pytest.mark.parametrize("reflects", [False, True])
async def test_health_and_reflection_are_answered_as_there(tmp_path: Path, reflects: bool) -> None:
    async with both(tmp_path, reflection=reflects) as (_, channel):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "authsvc.v1.AuthService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        try:
            answer = await call.read()
            assert reflects
            names = [service.name for service in answer.list_services_response.service]
            assert "authsvc.v1.AuthService" in names
            call.cancel()
        except grpc.aio.AioRpcError as error:
            assert not reflects
            assert read_failure(error).code == "UNIMPLEMENTED"  # noqa: PT017


async def test_new_certificate_is_shown_by_both_listeners(tmp_path: Path) -> None:
    other = certs.ca("Other", span=SPAN)
    renewed = certs.leaf(
        other, uris=(), dns=("localhost",), extended=(ExtendedKeyUsageOID.SERVER_AUTH,), span=SPAN
    )
    async with both(tmp_path) as (server, channel):
        await AuthServiceStub(channel).GetKeys(KEYS)
        for file, content in (("server.pem", renewed.pem), ("server-key.pem", renewed.key_pem)):
            (tmp_path / file).write_bytes(content)
        for port, who in ((server.app.port, ADMIN), (server.app.tls_port, None)):
            async with asyncio.timeout(TIMEOUT_S):
                while await _shown(port, who, other) != "OK":  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0.01)
            assert await _shown(port, who, CA) == "UNAVAILABLE"
        assert await outcome(AuthServiceStub(channel).GetKeys(KEYS)) == "OK"  # the old one lives


async def _shown(port: int, who: Issued | None, trusted: Issued) -> str:
    credentials = grpc.ssl_channel_credentials(
        trusted.pem, who.key_pem if who else None, who.pem if who else None
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
        return await outcome(AuthServiceStub(channel).GetKeys(KEYS))


async def test_stop_ends_the_calls_of_both_listeners(tmp_path: Path) -> None:
    async with both(tmp_path, drain_s=TIMEOUT_S) as (server, channel):
        watcher = await server.member("watcher", "watch")
        member = await with_secret(server, "watch")
        given = bearer(await token_of(channel, member, "watch"))
        streams = [
            server.auth(watcher.who).WatchChanges(WATCH),
            AuthServiceStub(channel).WatchChanges(WATCH, metadata=given),
        ]
        for stream in streams:
            await stream.read()
        stopping = asyncio.create_task(server.app.stop())
        assert [await reason(to_the_end(stream)) for stream in streams] == ["DRAINING"] * 2
        await stopping
        for port in (server.app.port, server.app.tls_port):
            assert _is_closed(port)


def _is_closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# --- settings ---


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("on", [False, True])
async def test_port_is_open_by_setting_alone_and_told(tmp_path: Path, on: bool) -> None:
    port = _free_port()
    listen = Listen(port=0, metrics_port=0, health_port=0, tls_only=on, tls_port=port)
    settings = load(state_dir=tmp_path, listen=listen)
    app = await open_app(settings)
    await app.start()
    where = _where(settings, app)
    assert app.tls_port == (port if on else 0)
    assert where.get("tls_port") == (port if on else None)
    assert where.get("tls_address") == (f"127.0.0.1:{port}" if on else None)
    assert _is_closed(port) is not on
    await app.stop()
    assert _is_closed(port)


def test_settings_that_are_not_set_leave_it_off(tmp_path: Path) -> None:
    listen = load(state_dir=tmp_path).listen
    assert (listen.tls_only, listen.tls_host, listen.tls_port) == (False, "127.0.0.1", 7444)


async def test_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = Listen(port=0, metrics_port=0, health_port=0, tls_only=True, tls_port=port)
        app = await open_app(load(state_dir=tmp_path, listen=listen))
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}"):
            await app.start()
