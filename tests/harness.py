"""A whole server in this process, callers with certificates of their own, and errors read back."""

import asyncio
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from authsvc.app import App, prepare
from authsvc.clock import Clock, SystemClock
from authsvc.config import Database, Listen, Passwords, Settings, Tls
from authsvc.errors import RULES
from authsvc.rpc.peer import x5t_s256
from authsvc.store import sql as sql_module
from authsvc.store import sql_store
from authsvc.store.migrate import upgrade
from authsvc.store.port import Store
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub
from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
from authsvc_client.v1.users_pb2_grpc import UserServiceStub
from tests import certs
from tests.certs import DAY, HOUR, Issued
from tests.clocks import HandClock

if TYPE_CHECKING:  # they are names of the type stubs alone
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceAsyncStub
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceAsyncStub
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceAsyncStub
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceAsyncStub
    from authsvc_client.v1.users_pb2_grpc import UserServiceAsyncStub

ISSUER: Final = "https://issuer.test"
TIMEOUT_S: Final = 60.0
M = TypeVar("M", bound=Message)
# gRPC judges certificates by the machine's clock, so they are good around now.
NOW: Final = SystemClock().wall()
SPAN: Final = (NOW - HOUR, NOW + 12 * HOUR)

CA: Final = certs.ca("Clients", span=(NOW - DAY, NOW + DAY))
SECOND_CA: Final = certs.ca("More clients", span=(NOW - DAY, NOW + DAY))
UNKNOWN_CA: Final = certs.ca("Nobody's", span=(NOW - DAY, NOW + DAY))
SERVER: Final = certs.leaf(
    CA, uris=(), dns=("localhost",), extended=(ExtendedKeyUsageOID.SERVER_AUTH,), span=SPAN
)


def spiffe(name: str) -> str:
    return f"spiffe://test.local/{name}"


def identity(
    name: str = "",
    *,
    ca: Issued = CA,
    uris: Sequence[str] | None = None,
    dns: Sequence[str] = (),
    subject: str = "",
    span: certs.Span = SPAN,
) -> Issued:
    """A client's certificate; with a SPIFFE ID where a name is given."""
    ids = ((spiffe(name),) if name else ()) if uris is None else uris
    return certs.leaf(ca, uris=ids, dns=dns, subject=subject, span=span)


ADMIN: Final = identity("admin")


def thumbprint(who: Issued) -> str:
    return x5t_s256(who.certificate)


# --- errors ---


@dataclass(frozen=True)
class Failure:
    """What a caller sees of a failed call."""

    code: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    retry_after_s: float | None = None
    text: str = ""
    trailers: Mapping[str, str | bytes] = field(default_factory=dict)


def read_failure(error: grpc.aio.AioRpcError) -> Failure:
    """Reads it without the client package, as a program in another language would."""
    trailers = {key: value for key, value in error.trailing_metadata()}  # noqa: C416
    status = status_pb2.Status()
    raw = trailers.get("grpc-status-details-bin", b"")
    assert isinstance(raw, bytes)
    status.ParseFromString(raw)
    reason, metadata = "", {}
    fields: tuple[str, ...] = ()
    retry = None
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        later = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "authsvc"
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
            assert all(violation.description for violation in bad.field_violations)
        elif detail.Unpack(later):
            retry = later.retry_delay.ToMilliseconds() / 1000
    code = error.code().name
    if raw:
        assert status.code == error.code().value[0]
        assert status.message == (error.details() or "")
    if reason:
        assert RULES[Reason[reason]].code.name == code, (reason, code)
    return Failure(code, reason, metadata, fields, retry, error.details() or "", trailers)


async def failure(call: Awaitable[Any]) -> Failure:
    """How a call fails."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return read_failure(error)
    raise AssertionError(f"not refused: {answer}")


async def reason(call: Awaitable[Any]) -> str:
    """The reason of a refusal, whose code is the one that the contract says."""
    found = await failure(call)
    return found.reason or found.code


async def outcome(call: Awaitable[Any]) -> str:
    """OK, the reason of a refusal, or the code of what is no refusal of authsvc's."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        found = read_failure(error)
        return found.reason or found.code
    return "OK"


async def by_hand(file: Path, statement: str, *values: Any) -> list[Any]:
    """The rows of a statement that nobody may make. In a thread, as a server of this loop may hold
    the lock until the loop goes on.
    """

    def execute() -> list[Any]:
        with closing(sqlite3.connect(file, timeout=TIMEOUT_S)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    return await asyncio.to_thread(execute)


async def to_the_end(stream: Any) -> None:
    """Reads a stream until it ends, and raises as it ends."""
    async with asyncio.timeout(TIMEOUT_S):
        while await stream.read() is not grpc.aio.EOF:
            pass


def named(value: object) -> str:
    """For `ids` of what holds generated keys: workers of xdist must find the same tests."""
    return re.sub(r"[A-Za-z0-9_-]{40,}", "...", str(value))


def build(message: type[M], **fields: Any) -> M:
    """A message, with dictionaries for the messages in it."""
    return message(**fields)


def raw_unary(channel: grpc.aio.Channel, path: str) -> Any:
    """A method, of bytes."""
    return channel.unary_unary(path)


def raw_stream(channel: grpc.aio.Channel, path: str) -> Any:
    """A streaming method, of bytes."""
    return channel.unary_stream(path)


async def until(done: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Polls until something holds."""
    async with asyncio.timeout(timeout_s):
        while not done():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


# --- the server ---


@dataclass(frozen=True)
class Member:
    """A registered client and its certificate."""

    who: Issued
    client_id: str
    secret: str = ""


class Running:
    """A server that runs, and connections to it."""

    def __init__(self, app: App, clock: Clock, store: Store) -> None:
        self.app = app
        self.clock = clock
        self.store = store
        self._channels: dict[tuple[int, bytes], tuple[Issued | None, grpc.aio.Channel]] = {}

    def channel(self, who: Issued | None, chain: bytes = b"") -> grpc.aio.Channel:
        """The connection of an identity, with what it presents beside its certificate."""
        key = (id(who), chain)
        if key not in self._channels:
            self._channels[key] = (who, connect(self.app.port, who, chain))
        return self._channels[key][1]

    def auth(self, who: Issued | None, chain: bytes = b"") -> "AuthServiceAsyncStub":
        return AuthServiceStub(self.channel(who, chain))

    def clients(self, who: Issued | None = ADMIN) -> "ClientServiceAsyncStub":
        return ClientServiceStub(self.channel(who))

    def resources(self, who: Issued | None = ADMIN) -> "ResourceServiceAsyncStub":
        return ResourceServiceStub(self.channel(who))

    def users(self, who: Issued | None = ADMIN) -> "UserServiceAsyncStub":
        return UserServiceStub(self.channel(who))

    def keys(self, who: Issued | None = ADMIN) -> "KeyServiceAsyncStub":
        return KeyServiceStub(self.channel(who))

    async def advance(self, seconds: float) -> None:
        """Lets time pass, and the state be confirmed after it."""
        assert isinstance(self.clock, HandClock)
        async with self.app.follow._lock:  # a poll under way would read half of it
            self.clock.advance(seconds)
        await self.app.follow.poll()

    async def resource(
        self, resource_id: str, *scopes: str, owner: str = "", **more: Any
    ) -> resources_pb2.Resource:
        resource = resources_pb2.Resource(
            resource_id=resource_id,
            owner_client_id=owner,
            scopes=[resources_pb2.Scope(name=scope) for scope in scopes],
            **more,
        )
        request = resources_pb2.CreateResourceRequest(resource=resource)
        return (await self.resources().CreateResource(request)).resource

    async def register(
        self, who: Issued, *, by: Issued = ADMIN, **metadata: Any
    ) -> auth_pb2.RegisterClientResponse:
        """Registers a client; by its SPIFFE ID unless another name, or `secret=True`, is given."""
        names = {"tls_client_auth_san_uri", "tls_client_auth_san_dns", "tls_client_auth_subject_dn"}
        metadata.setdefault("client_name", "test")
        if not metadata.pop("secret", False) and not names & metadata.keys():
            metadata["tls_client_auth_san_uri"] = certs_spiffe(who)
        request = auth_pb2.RegisterClientRequest(metadata=clients_pb2.ClientMetadata(**metadata))
        return await self.auth(by).RegisterClient(request)

    async def member(
        self, name: str, *scopes: str, approve: bool = True, **metadata: Any
    ) -> Member:
        """A client with a certificate of its own, registered and approved."""
        who = metadata.pop("who", None) or identity(name)
        made = await self.register(who, scopes=scopes, **metadata)
        member = Member(who, made.client.client_id, made.client_secret)
        if approve:
            await self.approve(member.client_id)
        return member

    async def approve(self, client_id: str, **more: Any) -> clients_pb2.ApproveClientResponse:
        return await self.clients().ApproveClient(
            clients_pb2.ApproveClientRequest(client_id=client_id, **more)
        )

    async def suspend(self, client_id: str) -> clients_pb2.SuspendClientResponse:
        return await self.clients().SuspendClient(
            clients_pb2.SuspendClientRequest(client_id=client_id)
        )

    async def token(
        self, member: Member, *scopes: str, resources: Sequence[str] = (), secret: bool = False
    ) -> auth_pb2.IssuedToken:
        return (
            await self.auth(member.who).IssueToken(
                issue_request(
                    member.client_id,
                    scopes=scopes,
                    resources=resources,
                    secret=member.secret if secret else "",
                )
            )
        ).token

    async def verdict(
        self, asker: Issued, token: str, *, of: Issued | None = None, **more: Any
    ) -> auth_pb2.ValidateTokenResponse:
        """What the asker is told of a token that came over the connection of `of`."""
        if of is not None:
            more["presenter"] = auth_pb2.Presenter(certificate_thumbprint=thumbprint(of))
        request = auth_pb2.ValidateTokenRequest(token=token, **more)
        return await self.auth(asker).ValidateToken(request)

    async def judged(self, asker: Issued, token: str, *, of: Issued | None = None) -> str:
        """OK for an active token, else the reason of the verdict."""
        verdict = await self.verdict(asker, token, of=of)
        return "OK" if verdict.active else Reason(verdict.reason).name

    async def head(self) -> int:
        """Revision of the last change that was ever written."""
        await self.app.follow.poll()
        return self.app.state.revision

    async def health(self, service: str = "") -> int:
        """What the plain port says."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.app.health_port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            return int(answer.status)

    async def http(self, path: str) -> tuple[int, str]:
        """GET on the metrics port."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.app.metrics_port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            raw = (await reader.read()).decode()
        finally:
            writer.close()
            await writer.wait_closed()
        head, _, body = raw.partition("\r\n\r\n")
        return int(head.split(" ")[1]), body

    async def disconnect(self) -> None:
        for _, channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def close(self) -> None:
        await self.disconnect()
        await self.app.stop()


def connect(port: int, who: Issued | None, chain: bytes = b"", **options: Any) -> grpc.aio.Channel:
    """A connection of its own."""
    credentials = grpc.ssl_channel_credentials(
        CA.pem, who.key_pem if who else None, who.pem + chain if who else None
    )
    settled = {"grpc.use_local_subchannel_pool": 1, "grpc.enable_retries": 0} | options
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, list(settled.items()))


def certs_spiffe(who: Issued) -> str:
    """The SPIFFE ID in a certificate."""
    names = who.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)[0]


def issue_request(
    client_id: str, *, secret: str = "", assertion: str = "", **more: Any
) -> auth_pb2.IssueTokenRequest:
    """client_credentials; by the certificate of the connection without a secret."""
    credential = None
    if secret or assertion:
        credential = auth_pb2.ClientCredential(
            **({"client_secret": secret} if secret else {"client_assertion": assertion})
        )
    return auth_pb2.IssueTokenRequest(
        client_credentials=auth_pb2.ClientCredentialsGrant(),
        client_id=client_id,
        client_credential=credential,
        **more,
    )


def settings_for(
    directory: Path,
    *,
    client_cas: Sequence[Issued] = (CA,),
    bundles: Mapping[str, Path] = MappingProxyType({}),
    tls_only: bool = False,
    **more: Any,
) -> Settings:
    """Settings of a server whose state, certificates and all, is in a directory."""
    directory.mkdir(exist_ok=True, parents=True)
    files = {"server.pem": SERVER.pem, "server-key.pem": SERVER.key_pem}
    files["clients.pem"] = b"".join(ca.pem for ca in client_cas)
    for file, content in files.items():
        (directory / file).write_bytes(content)
    more.setdefault("admins", (spiffe("admin"),))
    more.setdefault("drain_s", 2.0)
    more.setdefault("passwords", Passwords(memory_kib=64, passes=1))
    return Settings(
        state_dir=directory,
        issuer=ISSUER,
        listen=Listen(port=0, metrics_port=0, health_port=0, tls_port=0, tls_only=tls_only),
        tls=Tls(
            certificate=directory / "server.pem",
            key=directory / "server-key.pem",
            client_ca=directory / "clients.pem",
            bundles=dict(bundles),
            reload_s=0.05,
        ),
        **more,
    )


async def migrate(url: str) -> None:
    """Brings an empty database up to date."""
    database = sql_module.Database(url, SystemClock())
    await upgrade(database)
    await database.close()


_template: Path | None = None


async def migrated(directory: Path) -> str:
    """Puts an empty, migrated SQLite database where the server looks for its own: its URL."""
    global _template  # noqa: PLW0603 - made once for all tests
    if _template is None or not _template.exists():  # noqa: ASYNC240 - a moment
        file = directory / "template.db"
        await migrate(f"sqlite+aiosqlite:///{file}")
        _template = file
    file = directory / "authsvc.db"
    shutil.copyfile(_template, file)
    return f"sqlite+aiosqlite:///{file}"


async def start(
    directory: Path,
    *,
    url: str = "",
    clock: Clock | None = None,
    wrap: Callable[[Store], Store] = lambda store: store,
    **settings: Any,
) -> Running:
    """Starts a server on a SQLite file of its own, or on a migrated database at `url`."""
    if url:
        settings.setdefault("database", Database(url=SecretStr(url)))
    elif not (directory / "authsvc.db").exists():
        await migrated(directory)
    made = settings_for(directory, **settings)
    clock = clock or SystemClock()
    prepared = prepare(made, clock)
    database = sql_module.Database(prepared.database_url, clock, sqlite_id=prepared.database_id)
    store = wrap(sql_store(database))
    app = App(made, prepared, store, clock)
    await app.start()
    return Running(app, clock, store)


@asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[Running]:
    """As `start`, and ends it."""
    server = await start(directory, **options)
    try:
        yield server
    finally:
        await server.close()


def hand_clock() -> HandClock:
    """A clock that stands at now, where certificates are good."""
    return HandClock(wall=NOW)
