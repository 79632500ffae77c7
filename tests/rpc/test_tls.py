"""TLS of the listener over real connections: what is refused, and what a reload changes."""

import asyncio
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.experimental import session_cache
from structlog.testing import capture_logs

from authsvc import pki
from authsvc.clock import SystemClock
from authsvc.errors import AuthError
from authsvc.rpc.peer import Peers
from authsvc.rpc.tls import ServerTls
from tests import certs
from tests.certs import DAY, HOUR, Issued

# gRPC judges validity by the machine's clock.
NOW = SystemClock().wall()
SPAN = (NOW - HOUR, NOW + HOUR)
CALL_TIMEOUT_S = 20.0


def _client(ca: Issued, name: str = "orders") -> Issued:
    return certs.leaf(ca, uris=(f"spiffe://test.local/{name}",), span=SPAN)


def _ca(name: str) -> Issued:
    return certs.ca(name, span=(NOW - DAY, NOW + DAY))


def _server(directory: Path) -> tuple[pki.Authority, tuple[bytes, bytes]]:
    authority = pki.init(directory, "test.local", NOW)
    return authority, pki.issue(authority, spiffe_path="authsvc", server=True, now=NOW)


@dataclass
class Listener:
    """A server with its files, its client CAs, and a clock for what it makes of certificates."""

    directory: Path
    tls: ServerTls
    server_ca: bytes
    now: float = NOW
    port: int = 0
    peers: Peers = field(init=False)
    resumed: bool = False
    """Whether the TLS session of the last call was one that another connection had begun."""

    def __post_init__(self) -> None:
        self.peers = Peers(lambda: self.tls.trust)

    def write_pair(self, pair: tuple[bytes, bytes]) -> None:
        pki.write_pair(*pair, self.directory, "server")

    def write_client_cas(self, *cas: Issued) -> None:
        (self.directory / "clients.pem").write_bytes(b"".join(ca.pem for ca in cas))

    async def whoami(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.resumed = [*context.auth_context()["ssl_session_reused"]] == [b"true"]
        try:
            return self.peers(context.auth_context(), self.now).spiffe_id.encode()
        except AuthError as error:
            return error.reason.name.encode()

    def channel(
        self,
        client: Issued | None,
        *,
        chain: bytes = b"",
        server_ca: bytes = b"",
        port: int = 0,
        sessions: Any = None,
    ) -> grpc.aio.Channel:
        """A connection of its own."""
        credentials = grpc.ssl_channel_credentials(
            server_ca or self.server_ca,
            client.key_pem if client else None,
            client.pem + chain if client else None,
        )
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        options += [("grpc.ssl_session_cache", sessions)] if sessions is not None else []
        return grpc.aio.secure_channel(f"localhost:{port or self.port}", credentials, options)


def _tls(directory: Path) -> ServerTls:
    return ServerTls(
        directory / "server.pem", directory / "server-key.pem", directory / "clients.pem"
    )


CA = _ca("Clients")
NEXT_CA = _ca("Next clients")
CLIENT = _client(CA)
NEXT_CLIENT = _client(NEXT_CA, "next")


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncIterator[Listener]:
    authority, pair = _server(tmp_path / "pki")
    pki.write_pair(*pair, tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(CA.pem)
    made = Listener(tmp_path, _tls(tmp_path), authority.certificate_pem)
    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(made.whoami)
    handlers = grpc.method_handlers_generic_handler("test", {"WhoAmI": handler})
    server.add_generic_rpc_handlers((handlers,))
    made.port = server.add_secure_port("127.0.0.1:0", made.tls.credentials())
    await server.start()
    yield made
    await server.stop(None)


async def _ask(channel: grpc.aio.Channel) -> str:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/WhoAmI")
    return (await call(b"", timeout=CALL_TIMEOUT_S)).decode()


async def _answer(channel: grpc.aio.Channel) -> str:
    async with channel:
        return await _ask(channel)


async def _refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _answer(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- who gets in ---


async def test_listener_certificate_of_a_client_ca_gets_in(listener: Listener) -> None:
    assert await _answer(listener.channel(CLIENT)) == "spiffe://test.local/orders"


@pytest.mark.parametrize(
    "client",
    [
        None,
        NEXT_CLIENT,
        certs.leaf(None, span=SPAN),
        certs.leaf(CA, span=(NOW - DAY, NOW - HOUR)),
        certs.leaf(CA, span=(NOW + HOUR, NOW + DAY)),
    ],
    ids=["none", "other_ca", "self_signed", "expired", "not_yet_valid"],
)
async def test_listener_other_certificates_are_refused_also_after_a_reload(
    listener: Listener, client: Issued | None
) -> None:
    await _refused(listener.channel(client))
    listener.write_pair(_server(listener.directory / "next")[1])
    assert listener.tls.reload()
    listener.server_ca = (listener.directory / "next" / "ca.pem").read_bytes()
    await _refused(listener.channel(client))
    assert await _answer(listener.channel(CLIENT)) == "spiffe://test.local/orders"


async def test_listener_old_tls_versions_are_refused_also_after_a_reload(
    listener: Listener,
) -> None:
    """RFC 8996: nothing below TLS 1.2, and a reload does not bring it back."""
    for _ in range(2):
        assert await asyncio.to_thread(_negotiated, listener, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.raises((ssl.SSLError, ConnectionError)) as caught:
            await asyncio.to_thread(_negotiated, listener, ssl.TLSVersion.TLSv1_1)
        # The server hung up, with or without an alert: not this side's own refusal to try.
        reason = getattr(caught.value, "reason", "")
        assert reason in {"", "UNEXPECTED_EOF_WHILE_READING", "TLSV1_ALERT_PROTOCOL_VERSION"}
        listener.write_client_cas(CA, NEXT_CA)
        listener.tls.reload()


def _negotiated(listener: Listener, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cadata=listener.server_ca.decode())
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")  # else this side is the one that refuses
    context.set_alpn_protocols(["h2"])
    pair = pki.write_pair(CLIENT.pem, CLIENT.key_pem, listener.directory, "client")
    context.load_cert_chain(*pair)
    address = ("127.0.0.1", listener.port)
    with (
        socket.create_connection(address, CALL_TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as session,
    ):
        return session.version()


async def test_listener_certificate_that_expires_on_an_open_connection_is_refused(
    listener: Listener,
) -> None:
    async with listener.channel(CLIENT) as channel:
        assert await _ask(channel) == "spiffe://test.local/orders"
        listener.now = NOW + 2 * HOUR
        assert await _ask(channel) == "PEER_CERTIFICATE_EXPIRED"
        listener.now = NOW
        assert await _ask(channel) == "spiffe://test.local/orders"


async def test_listener_chain_presented_over_the_wire_is_read(listener: Listener) -> None:
    middle = certs.ca("Middle", issuer=CA, span=SPAN)
    for name in ("a", "b"):
        channel = listener.channel(_client(middle, name), chain=middle.pem)
        assert await _answer(channel) == f"spiffe://test.local/{name}"


async def test_resumed_session_is_judged_by_the_certificate_that_it_began_with(
    listener: Listener,
) -> None:
    """RFC 8446 section 2.2: nothing is presented again."""
    sessions: Any = session_cache.ssl_session_cache_lru(1)  # type: ignore[no-untyped-call]
    assert (
        await _answer(listener.channel(CLIENT, sessions=sessions)) == "spiffe://test.local/orders"
    )
    assert not listener.resumed
    async with asyncio.timeout(CALL_TIMEOUT_S):
        while not listener.resumed:  # the ticket comes after the handshake
            answer = await _answer(listener.channel(CLIENT, sessions=sessions))
            assert answer == "spiffe://test.local/orders"
    listener.now = NOW + 2 * HOUR
    answer = await _answer(listener.channel(CLIENT, sessions=sessions))
    assert (answer, listener.resumed) == ("PEER_CERTIFICATE_EXPIRED", True)
    listener.now = NOW
    listener.write_client_cas(NEXT_CA)
    assert listener.tls.reload()
    await _refused(listener.channel(CLIENT, sessions=sessions))


# --- reload ---


async def test_reload_certificate_is_seen_by_new_connections_and_the_old_one_lives(
    listener: Listener,
) -> None:
    async with listener.channel(CLIENT) as old:
        await _ask(old)
        next_ca, pair = _server(listener.directory / "next")
        listener.write_pair(pair)
        before = listener.tls.trust
        assert listener.tls.reload()
        assert listener.tls.trust is not before
        await _refused(listener.channel(CLIENT))  # it trusts the issuer of the old certificate
        renewed = listener.channel(CLIENT, server_ca=next_ca.certificate_pem)
        assert await _answer(renewed) == "spiffe://test.local/orders"
        assert await _ask(old) == "spiffe://test.local/orders"


async def test_reload_client_ca_is_seen_by_new_connections_and_by_calls_on_old_ones(
    listener: Listener,
) -> None:
    async with listener.channel(CLIENT) as old:
        await _ask(old)
        await _refused(listener.channel(NEXT_CLIENT))
        listener.write_client_cas(CA, NEXT_CA)
        assert listener.tls.reload()
        assert await _answer(listener.channel(NEXT_CLIENT)) == "spiffe://test.local/next"
        assert await _ask(old) == "spiffe://test.local/orders"
        listener.write_client_cas(NEXT_CA)
        assert listener.tls.reload()
        await _refused(listener.channel(CLIENT))
        assert await _answer(listener.channel(NEXT_CLIENT)) == "spiffe://test.local/next"
        # The connection itself lives: it is the call that is judged anew.
        assert await _ask(old) == "PEER_CERTIFICATE_INVALID"


@dataclass
class Gate:
    """A TCP proxy that holds what a client sends once the server has spoken."""

    server_port: int
    held: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, server = await asyncio.open_connection("127.0.0.1", self.server_port)
        spoken = asyncio.Event()

        async def hold() -> None:
            if spoken.is_set():
                self.held.set()
                await self.open.wait()

        async def note() -> None:
            spoken.set()

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_pump(reader, server, hold))
                tasks.create_task(_pump(upstream, writer, note))
        finally:
            server.close()
            writer.close()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    before: Callable[[], Awaitable[None]],
) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            await before()
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def _gate(port: int) -> AsyncIterator[tuple[Gate, int]]:
    gate = Gate(port)
    async with await asyncio.start_server(gate, "127.0.0.1", 0) as proxy:
        yield gate, proxy.sockets[0].getsockname()[1]


@pytest.mark.parametrize("removed", [False, True], ids=["unchanged", "ca_removed"])
async def test_reload_during_a_handshake_judges_the_call_by_the_new_cas(
    listener: Listener, removed: bool
) -> None:
    """The handshake ends under the CAs it began with; the call on it does not."""
    async with _gate(listener.port) as (gate, port), listener.channel(CLIENT, port=port) as channel:
        call = asyncio.create_task(_ask(channel))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await gate.held.wait()
        if removed:
            listener.write_client_cas(NEXT_CA)
            assert listener.tls.reload()
        gate.open.set()
        expected = "PEER_CERTIFICATE_INVALID" if removed else "spiffe://test.local/orders"
        assert await call == expected


async def test_reload_half_replaced_pair_is_kept_out_until_it_is_whole(listener: Listener) -> None:
    next_ca, (certificate, key) = _server(listener.directory / "next")
    before = listener.tls.trust
    listener.write_client_cas(CA, NEXT_CA)  # whole, and waits for the others all the same
    for name, content in (("server.pem", certificate), ("server-key.pem", key)):
        assert not listener.tls.reload() or name == "server.pem"
        (listener.directory / name).write_bytes(content)
    assert listener.tls.trust is not before
    assert listener.tls.reload()
    renewed = listener.channel(NEXT_CLIENT, server_ca=next_ca.certificate_pem)
    assert await _answer(renewed) == "spiffe://test.local/next"


def test_reload_unchanged_files_change_nothing(listener: Listener) -> None:
    before = listener.tls.trust
    with capture_logs() as logs:
        assert not listener.tls.reload()
    assert listener.tls.trust is before
    assert logs == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("server.pem", b""),
        ("server.pem", CLIENT.pem),
        ("server.pem", None),
        ("server-key.pem", b"cut off"),
        ("server-key.pem", None),
        ("clients.pem", CA.pem + NEXT_CA.pem[:-30]),
        ("clients.pem", CLIENT.pem),
        ("clients.pem", b""),
        ("clients.pem", None),
    ],
)
async def test_reload_what_cannot_be_used_is_logged_once_and_the_old_stays(
    listener: Listener, name: str, content: bytes | None
) -> None:
    file = listener.directory / name
    good, before = file.read_bytes(), listener.tls.trust
    with capture_logs() as logs:
        for _ in range(3):
            _put(file, content)
            assert not listener.tls.reload()
            assert listener.tls.trust is before
        assert await _answer(listener.channel(CLIENT)) == "spiffe://test.local/orders"
        file.write_bytes(good)
        assert not listener.tls.reload()
        _put(file, content)
        assert not listener.tls.reload()
    assert [(entry["event"], entry["log_level"]) for entry in logs] == (
        [("tls_reload_refused", "error")] * 2
    )
    assert all(name in entry["error"] for entry in logs)


def _put(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(content)


async def test_watch_follows_the_files_past_a_failure_until_cancelled(listener: Listener) -> None:
    before = listener.tls.trust
    (listener.directory / "clients.pem").write_bytes(b"")
    with capture_logs() as logs:
        watch = asyncio.create_task(listener.tls.watch(0.001))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await _until(lambda: bool(logs))
            listener.write_client_cas(NEXT_CA)
            await _until(lambda: listener.tls.trust is not before)
        watch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watch
    assert [entry["event"] for entry in logs] == ["tls_reload_refused", "tls_reloaded"]
    assert listener.tls.trust.client_cas == (NEXT_CA.certificate,)


async def _until(done: Callable[[], bool]) -> None:
    while not done():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)


# --- bundles of outside trust domains ---


PARTNER = _ca("Partner")
NEW_PARTNER = _ca("Partner")
RIVAL = _ca("Rival")
WORKLOAD = certs.leaf(PARTNER, uris=("spiffe://partner.test/a",), span=SPAN)


def _with_bundles(directory: Path) -> ServerTls:
    _, pair = _server(directory / "pki")
    pki.write_pair(*pair, directory, "server")
    (directory / "clients.pem").write_bytes(CA.pem)
    (directory / "partner.json").write_bytes(certs.bundle(PARTNER))
    (directory / "rival.pem").write_bytes(RIVAL.pem)
    return _tls_with_bundles(directory)


def _tls_with_bundles(directory: Path) -> ServerTls:
    files = (directory / name for name in ("server.pem", "server-key.pem", "clients.pem"))
    bundles = {"partner.test": "partner.json", "rival.test": "rival.pem"}
    certificate, key, client_ca = files
    return ServerTls(
        certificate, key, client_ca, {name: directory / file for name, file in bundles.items()}
    )


def _cas(tls: ServerTls) -> tuple[object, ...]:
    trust = tls.trust
    return trust.client_cas, trust.bundles["partner.test"], trust.bundles["rival.test"]


def _just(*cas: Issued) -> tuple[object, ...]:
    return tuple((ca.certificate,) for ca in cas)


def test_bundles_are_read_and_followed_each_by_itself(tmp_path: Path) -> None:
    tls = _with_bundles(tmp_path)
    assert _cas(tls) == _just(CA, PARTNER, RIVAL)
    assert not tls.reload()
    (tmp_path / "partner.json").write_bytes(certs.bundle(NEW_PARTNER))
    before = tls.trust
    assert tls.reload()
    assert tls.trust is not before
    assert _cas(tls) == _just(CA, NEW_PARTNER, RIVAL)
    (tmp_path / "partner.json").write_bytes(certs.bundle())
    with capture_logs() as logs:
        assert tls.reload()
    assert tls.trust.bundles["partner.test"] == ()
    assert ("tls_bundle_empty", "partner.test") in [
        (entry["event"], entry.get("trust_domain")) for entry in logs
    ]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        certs.bundle(NEW_PARTNER)[:-9],
        NEW_PARTNER.pem[:-9],
        b"{}",
        certs.bundle(certs.jwk(NEW_PARTNER, d="AAAA")),
        certs.bundle(certs.jwk(CLIENT)),
        certs.bundle(NEW_PARTNER, CA),
        certs.bundle(NEW_PARTNER, RIVAL),
        b"{" * 100_000,
    ],
    ids=[
        "gone",
        "empty",
        "half_written",
        "half_written_pem",
        "no_keys",
        "private_key",
        "leaf",
        "client_ca",
        "ca_of_another_bundle",
        "deep",
    ],
)
def test_bundle_that_cannot_be_used_holds_up_nothing_else(
    tmp_path: Path, content: bytes | None
) -> None:
    """The attack: a partner's file that keeps us from changing our own."""
    tls = _with_bundles(tmp_path)
    with capture_logs() as logs:
        for _ in range(3):
            _put(tmp_path / "partner.json", content)
            assert not tls.reload()
            assert _cas(tls) == _just(CA, PARTNER, RIVAL)
        (tmp_path / "clients.pem").write_bytes(CA.pem + NEXT_CA.pem)
        (tmp_path / "rival.pem").write_bytes(certs.bundle())
        assert tls.reload()
    own = (CA.certificate, NEXT_CA.certificate)
    assert _cas(tls) == (own, (PARTNER.certificate,), ())
    assert logs[0]["event"] == "tls_reload_refused"
    assert "partner.json" in logs[0]["error"]
    (tmp_path / "partner.json").write_bytes(certs.bundle(NEW_PARTNER))
    assert tls.reload()
    assert _cas(tls) == (own, (NEW_PARTNER.certificate,), ())


def test_bundle_is_followed_while_the_own_files_are_not_whole(tmp_path: Path) -> None:
    tls = _with_bundles(tmp_path)
    (tmp_path / "server-key.pem").write_bytes(b"")
    (tmp_path / "partner.json").write_bytes(certs.bundle(NEW_PARTNER))
    assert tls.reload()
    assert _cas(tls) == _just(CA, NEW_PARTNER, RIVAL)


def test_ca_of_a_bundle_does_not_become_a_client_ca_by_a_reload(tmp_path: Path) -> None:
    """Also where both files change: the CA has to leave the one before it enters the other."""
    tls = _with_bundles(tmp_path)
    (tmp_path / "clients.pem").write_bytes(CA.pem + PARTNER.pem)
    assert not tls.reload()
    assert _cas(tls) == _just(CA, PARTNER, RIVAL)
    (tmp_path / "partner.json").write_bytes(certs.bundle(NEW_PARTNER))
    assert tls.reload()
    assert tls.reload()
    assert _cas(tls) == (
        (CA.certificate, PARTNER.certificate),
        *_just(NEW_PARTNER, RIVAL),
    )


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("partner.json", None, "partner.json"),
        ("partner.json", b"", "partner.json"),
        ("partner.json", certs.bundle(PARTNER)[:-9], "partner.json"),
        ("partner.json", certs.bundle(CA), "Clients.* is in tls.client_ca as well"),
        ("partner.json", CA.pem, "Clients.* is in tls.client_ca as well"),
        (
            "partner.json",
            certs.ca("Renamed", key=CA.key, span=SPAN).pem,
            "Renamed.* is in tls.client_ca as well",
        ),
        ("clients.pem", CA.pem + PARTNER.pem, "Partner.* is in tls.client_ca as well"),
        ("rival.pem", PARTNER.pem, "Partner.* is in the bundle of partner.test as well"),
    ],
)
def test_construction_bundle_that_cannot_be_used_is_named(
    tmp_path: Path, file: str, content: bytes | None, cause: str
) -> None:
    _with_bundles(tmp_path)
    _put(tmp_path / file, content)
    with pytest.raises(ValueError, match=cause):
        _tls_with_bundles(tmp_path)


# --- construction ---


@pytest.mark.parametrize("name", ["server.pem", "server-key.pem", "clients.pem"])
@pytest.mark.parametrize("content", [None, b"", b"no PEM", CLIENT.pem, CLIENT.key_pem])
def test_construction_unusable_file_is_named(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    _, pair = _server(tmp_path / "pki")
    pki.write_pair(*pair, tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(CA.pem)
    assert _tls(tmp_path).trust.client_cas == (CA.certificate,)
    _put(tmp_path / name, content)
    with pytest.raises(ValueError, match=name):
        _tls(tmp_path)


def test_material_repr_holds_no_key(listener: Listener) -> None:
    assert "PRIVATE" not in repr((listener.tls, listener.tls.trust, listener.tls._own.value))
