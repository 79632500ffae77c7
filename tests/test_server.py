"""A server as a process: its end, its death, and what it leaves behind."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc

from authsvc import pki
from authsvc.rpc.peer import x5t_s256
from authsvc.store.port import Store
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
from tests.harness import (
    ADMIN,
    TIMEOUT_S,
    failure,
    hand_clock,
    issue_request,
    outcome,
    start,
    to_the_end,
    until,
)
from tests.servers import launcher

SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
AUDIENCE = "https://billing.internal"


@dataclass
class Process:
    """`authsvc serve` without any configuration, in a directory of its own."""

    root: Path
    program: tuple[str, ...] = ("-m", "authsvc")
    arguments: tuple[str, ...] = ()
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.root / "state"

    async def start(self) -> None:
        folders = {name: self.root / name for name in ("cwd", "home", "tmp", "run")}
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        ready = folders["run"] / "ready.json"
        ready.unlink(missing_ok=True)
        ports = ("--port", "0", "--metrics-port", "0", "--health-port", "0")
        self.log = (self.root / "log").open("ab")
        self.process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
            [
                *(*launcher(), sys.executable, *self.program, "serve"),
                *("--state-dir", str(self.state), *ports),
                *("--ready-file", str(ready), *self.arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            cwd=folders["cwd"],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folders["home"]),
                "TMPDIR": str(folders["tmp"]),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        await until(lambda: ready.exists() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, (self.root / "log").read_text()
        self.where = json.loads(ready.read_text())

    def certificate(self, name: str) -> tuple[Path, Path]:
        files = (self.state / "pki" / f"{name}.pem", self.state / "pki" / f"{name}-key.pem")
        if not files[0].exists():
            authority = pki.load(self.state / "pki")
            pair = pki.issue(authority, now=time.time(), spiffe_path=name)
            pki.write_pair(*pair, self.state / "pki", name)
        return files

    def channel(self, name: str) -> grpc.aio.Channel:
        if name not in self.channels:
            certificate, key = self.certificate(name)
            credentials = grpc.ssl_channel_credentials(
                Path(self.where["ca"]).read_bytes(), key.read_bytes(), certificate.read_bytes()
            )
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
            target = f"localhost:{self.where['port']}"
            self.channels[name] = grpc.aio.secure_channel(target, credentials, options)
        return self.channels[name]

    def auth(self, name: str) -> Any:
        return AuthServiceStub(self.channel(name))

    def presenter(self, name: str) -> auth_pb2.Presenter:
        certificate = x509.load_pem_x509_certificate(self.certificate(name)[0].read_bytes())
        return auth_pb2.Presenter(certificate_thumbprint=x5t_s256(certificate))

    async def member(self, name: str, *scopes: str) -> str:
        """A client, registered by itself and approved."""
        metadata = clients_pb2.ClientMetadata(
            client_name=name,
            tls_client_auth_san_uri=f"spiffe://authsvc.local/{name}",
            scopes=scopes,
        )
        request = auth_pb2.RegisterClientRequest(metadata=metadata)
        client_id: str = (await self.auth(name).RegisterClient(request)).client.client_id
        clients = ClientServiceStub(self.channel("admin"))
        await clients.ApproveClient(clients_pb2.ApproveClientRequest(client_id=client_id))
        return client_id

    async def scene(self) -> str:
        """`orders`, whose tokens are for what `billing` owns; answers the id of `orders`."""
        billing = await self.member("billing", "validate", "watch")
        resource = resources_pb2.Resource(
            resource_id=AUDIENCE,
            owner_client_id=billing,
            scopes=[resources_pb2.Scope(name="billing.read")],
        )
        await ResourceServiceStub(self.channel("admin")).CreateResource(
            resources_pb2.CreateResourceRequest(resource=resource)
        )
        return await self.member("orders", "billing.read")

    async def token(self, client_id: str, name: str = "orders") -> str:
        answer = await self.auth(name).IssueToken(issue_request(client_id))
        token: str = answer.token.access_token
        return token

    def validate(self, token: str, name: str = "orders") -> Any:
        request = auth_pb2.ValidateTokenRequest(token=token, presenter=self.presenter(name))
        return self.auth("billing").ValidateToken(request, timeout=TIMEOUT_S)

    async def judged(self, token: str, name: str = "orders") -> str:
        verdict = await self.validate(token, name)
        return "OK" if verdict.active else Reason(verdict.reason).name

    async def disconnect(self) -> None:
        for channel in self.channels.values():
            await channel.close()
        self.channels.clear()

    async def ended(self, timeout_s: float = TIMEOUT_S) -> int:
        await until(lambda: self.process.poll() is not None, timeout_s)
        self.log.close()
        return self.process.returncode

    async def kill(self) -> None:
        await self.disconnect()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        await self.ended()


@asynccontextmanager
async def process(root: Path, *arguments: str) -> AsyncIterator[Process]:
    made = Process(root, arguments=arguments)
    await made.start()
    try:
        yield made
    finally:
        await made.kill()


async def test_sigterm_drains_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with process(tmp_path) as server:
        orders = await server.scene()
        token = await server.token(orders)
        assert await server.judged(token) == "OK"
        watch = server.auth("billing").WatchChanges(auth_pb2.WatchChangesRequest())
        assert await watch.read() is not grpc.aio.EOF
        health_address = server.where["health_address"]
        async with grpc.aio.insecure_channel(health_address) as plain:
            request = health_pb2.HealthCheckRequest(service="authsvc.v1.AuthService")
            health = health_pb2_grpc.HealthStub(plain).Watch(request)
            assert (await health.read()).status == SERVING
            # A key that nobody knows is waited for until the next poll: a call under way.
            claims = jwt.decode(token, options={"verify_signature": False})
            key = ec.generate_private_key(ec.SECP256R1())
            headers = {"kid": "unknown", "typ": "at+jwt"}
            unknown = jwt.encode(claims, key, "ES256", headers=headers)
            waiting = [asyncio.ensure_future(_wait(server.validate(unknown))) for _ in range(8)]
            # Streams of a connection are taken in order: when this is answered, those have begun.
            assert await server.judged(token) == "OK"
            server.process.send_signal(signal.SIGTERM)
            assert (await health.read()).status == NOT_SERVING
        ended = await failure(to_the_end(watch))
        assert ended.code == "UNAVAILABLE"
        assert ended.reason in ("DRAINING", "")
        for answer in await asyncio.gather(*waiting):
            assert Reason(answer.reason) is Reason.TOKEN_KEY_UNKNOWN
        assert await server.ended() == 0
        for folder in ("cwd", "home", "tmp", "run"):
            assert not list((tmp_path / folder).rglob("*")), folder
        for file in server.state.rglob("*"):
            if file.is_file() and file.suffix != ".db":
                public = file.suffix == ".pem" and not file.stem.endswith("-key")
                assert public or file.stat().st_mode & 0o077 == 0, file
        log = (tmp_path / "log").read_text()
        for text in (token, (server.state / "seal.key").read_text().strip(), "Traceback"):
            assert text not in log


async def _wait(call: Any) -> Any:
    return await call


async def test_sigkill_forgets_nothing_that_was_answered(tmp_path: Path) -> None:
    """faults.md 1: I3 no resurrection, I4 no false revocation, I5 an OK survives."""
    async with process(tmp_path) as server:
        orders = await server.scene()
        other = await server.member("other", "billing.read")
        kept = await server.token(orders)
        cut_off = await server.token(other, "other")
        revoked = []
        for _ in range(3):
            token = await server.token(orders)
            await server.auth("orders").RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
            revoked.append(token)
        await ClientServiceStub(server.channel("admin")).SuspendClient(
            clients_pb2.SuspendClientRequest(client_id=other)
        )
        before = {token: await server.judged(token) for token in (kept, *revoked)}
        for _ in range(2):
            await server.kill()
            await server.start()
            assert {token: await server.judged(token) for token in before} == before
            assert await server.judged(cut_off, "other") == "TOKEN_CUT_OFF"
            assert await outcome(server.auth("other").IssueToken(issue_request(other))) == (
                "CLIENT_SUSPENDED"
            )
            assert await server.judged(await server.token(orders)) == "OK"
        assert before == {kept: "OK"} | dict.fromkeys(revoked, "TOKEN_REVOKED")


HANDSHAKES, AT_ONCE, RENEWALS = 2_000, 16, 5


async def test_handshakes_at_once_while_the_certificate_is_renewed_all_succeed(
    tmp_path: Path,
) -> None:
    """gRPC's core crashed in the first few hundred, with and without a renewal."""
    config = tmp_path / "authsvc.toml"
    config.write_text("[tls]\nreload_s = 0.1\n")
    async with process(tmp_path, "--config", str(config)) as server:
        context = ssl.create_default_context(cafile=server.where["ca"])
        context.load_cert_chain(*server.certificate("orders"))
        context.set_alpn_protocols(["h2"])
        address = ("127.0.0.1", server.where["port"])

        def shake_hands(_: int) -> bytes | None:
            with (
                socket.create_connection(address, TIMEOUT_S) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as session,
            ):
                assert session.recv(1), "hung up on"
                return session.getpeercert(binary_form=True)

        seen = set[bytes | None]()
        authority = pki.load(server.state / "pki")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for renewal in range(1, RENEWALS + 1):
                seen |= set(pool.map(shake_hands, range(HANDSHAKES // RENEWALS)))
                pair = pki.issue(authority, now=time.time(), spiffe_path="authsvc", server=True)
                pki.write_pair(*pair, server.state / "pki", "server")
                under_way = pool.map(shake_hands, range(AT_ONCE))
                log = tmp_path / "log"
                await until(lambda: log.read_text().count('"tls_reloaded"') == renewal)  # noqa: B023
                seen |= set(under_way)
                der = x509.load_pem_x509_certificate(pair[0]).public_bytes(Encoding.DER)
                assert shake_hands(0) == der
        assert len(seen) >= RENEWALS
        assert server.process.poll() is None


# --- in this process, where a call can be held ---


class Held:
    """A store of clients whose answers wait for a gate."""

    def __init__(self, clients: Any) -> None:
        self._clients = clients
        self.gate = asyncio.Event()
        self.entered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clients, name)

    async def page(self, *args: Any) -> Any:
        self.entered += 1
        await self.gate.wait()
        return await self._clients.page(*args)


async def test_stop_says_not_serving_first_and_calls_under_way_end(tmp_path: Path) -> None:
    held: list[Held] = []

    def wrap(store: Store) -> Store:
        held.append(Held(store.clients))
        clients: Any = held[0]
        return replace(store, clients=clients)

    server = await start(tmp_path, clock=hand_clock(), wrap=wrap, drain_s=TIMEOUT_S)
    watching = await server.member("watching", "watch")
    watch = server.auth(watching.who).WatchChanges(auth_pb2.WatchChangesRequest())
    await watch.read()
    call = asyncio.ensure_future(
        _wait(server.clients().ListClients(clients_pb2.ListClientsRequest()))
    )
    await until(lambda: held[0].entered)
    stopping = asyncio.create_task(server.app.stop())
    async with asyncio.timeout(TIMEOUT_S):
        while await server.health() != NOT_SERVING:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        ended = await failure(to_the_end(watch))
    assert (ended.code, ended.reason) == ("UNAVAILABLE", "DRAINING")
    assert not stopping.done()
    assert not call.done()
    refused = server.auth(ADMIN).GetKeys(auth_pb2.GetKeysRequest(), timeout=5)
    assert await outcome(refused) == "DRAINING"
    held[0].gate.set()
    assert (await call).clients[0].client_id == watching.client_id
    await stopping
    await server.disconnect()


async def test_call_that_never_ends_does_not_hold_the_stop_up_for_ever(tmp_path: Path) -> None:
    held: list[Held] = []

    def wrap(store: Store) -> Store:
        held.append(Held(store.clients))
        clients: Any = held[0]
        return replace(store, clients=clients)

    server = await start(tmp_path, clock=hand_clock(), wrap=wrap, drain_s=0.2)
    call = asyncio.ensure_future(
        outcome(server.clients().ListClients(clients_pb2.ListClientsRequest()))
    )
    await until(lambda: held[0].entered)
    async with asyncio.timeout(TIMEOUT_S):
        await server.app.stop()
    assert await call in ("UNAVAILABLE", "CANCELLED")
    await server.disconnect()


async def test_stop_leaves_no_task_behind(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    server = await start(tmp_path)
    await server.auth(ADMIN).GetKeys(auth_pb2.GetKeysRequest())
    await server.close()
    await until(lambda: asyncio.all_tasks() <= before)
