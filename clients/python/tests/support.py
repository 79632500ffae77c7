"""What the client is tested against: certificates, services made at run time, an authsvc."""

import asyncio
import datetime
import ipaddress
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import AuthsvcClient, AuthsvcError, Certificates, Reason, channel
from authsvc_client.errors import error_trailers
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.annotations_pb2 import Require, require
from authsvc_client.v1.auth_pb2_grpc import (
    AuthServiceServicer,
    add_AuthServiceServicer_to_server,
)

AUDIENCE = "urn:shop"
DAY = datetime.timedelta(days=1)


class Pki:
    """A CA, and what it signs."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("test CA")
        certificate = (
            _builder(self._name, self._name, self._key.public_key(), DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = certificate.public_bytes(Encoding.PEM)

    def issue(self, name: str, lifetime: datetime.timedelta = DAY) -> Certificates:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [
            x509.DNSName("localhost"),
            x509.DNSName(name),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.UniformResourceIdentifier(f"spiffe://test/{name}"),
        ]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        certificate = (
            _builder(_name(name), self._name, key.public_key(), lifetime)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Certificates(self.ca, certificate.public_bytes(Encoding.PEM), pem)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + lifetime)
    )


@asynccontextmanager
async def serving(
    certificates: Certificates | None,
    *handlers: grpc.GenericRpcHandler,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    add: Callable[[grpc.aio.Server], None] = lambda server: None,
) -> AsyncIterator[str]:
    """A server on a port of its own, without TLS where there are no certificates."""
    # gRPC's own limit would answer long before ours is met.
    limit = [("grpc.max_metadata_size", 64 * 1024)]
    server = grpc.aio.server(interceptors=interceptors, options=limit)
    server.add_generic_rpc_handlers(handlers)
    add(server)
    if certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", certificates.server_credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


# --- an authsvc that answers what a test wants ---------------------------------------------------

Answer = Callable[[Any, Any], Awaitable[Any]]


def verdict(*scopes: str, subject: str = "orders", **claims: Any) -> auth_pb2.ValidateTokenResponse:
    """An active one."""
    response = auth_pb2.ValidateTokenResponse(active=True, revision=7)
    response.claims.MergeFrom(
        auth_pb2.TokenClaims(
            issuer="https://authsvc",
            subject=subject,
            audiences=[AUDIENCE],
            jti=f"jti-{subject}",
            client_id="orders",
            scopes=scopes,
            revision=5,
            **claims,
        )
    )
    response.claims.expire_time.FromSeconds(2_000_000_000)
    response.claims.issue_time.FromSeconds(1_900_000_000)
    return response


def inactive(reason: Reason, *missing: str) -> auth_pb2.ValidateTokenResponse:
    number: Any = reason.value
    return auth_pb2.ValidateTokenResponse(reason=number, missing_scopes=missing)


async def fail(
    context: Any,
    code: grpc.StatusCode,
    reason: Reason,
    text: str = "no",
    **metadata: str,
) -> None:
    await context.abort(code, text, error_trailers(code, text, reason, metadata))


class FakeAuthService(AuthServiceServicer):
    """Issues t1, t2, ...; validates by `verdicts`; keeps the requests."""

    def __init__(self) -> None:
        self.verdicts: dict[str, Any] = {}
        self.lifetime_s = 300
        self.issued: list[auth_pb2.IssueTokenRequest] = []
        self.refreshed: list[auth_pb2.RefreshTokenRequest] = []
        self.validated: list[auth_pb2.ValidateTokenRequest] = []
        self.revoked: list[auth_pb2.RevokeTokenRequest] = []
        self.batches: list[int] = []
        """How many tokens each held."""
        self.before: Answer | None = None
        """Runs before every answer; may abort."""
        self.token_of: Callable[[int], str] = lambda number: f"t{number}"
        self.keys: list[auth_pb2.Jwk] = []
        """What watchers are told."""

    async def _answer(self, request: Any, context: Any) -> None:
        if self.before is not None:
            await self.before(request, context)

    async def IssueToken(
        self, request: auth_pb2.IssueTokenRequest, context: Any
    ) -> auth_pb2.IssueTokenResponse:
        self.issued.append(request)
        await self._answer(request, context)
        number = len(self.issued)
        response = auth_pb2.IssueTokenResponse()
        response.token.access_token = self.token_of(number)
        response.token.jti = f"j{number}"
        response.token.scopes.extend(request.scopes)
        response.token.audiences.extend(request.resources)
        response.token.expires_in.FromSeconds(self.lifetime_s)
        return response

    async def ValidateToken(
        self, request: auth_pb2.ValidateTokenRequest, context: Any
    ) -> auth_pb2.ValidateTokenResponse:
        self.validated.append(request)
        await self._answer(request, context)
        found = self.verdicts.get(request.token, inactive(Reason.TOKEN_SIGNATURE_INVALID))
        response: auth_pb2.ValidateTokenResponse = found
        return response

    async def RevokeToken(
        self, request: auth_pb2.RevokeTokenRequest, context: Any
    ) -> auth_pb2.RevokeTokenResponse:
        self.revoked.append(request)
        await self._answer(request, context)
        return auth_pb2.RevokeTokenResponse(revision=42)

    async def GetKeys(
        self, request: auth_pb2.GetKeysRequest, context: Any
    ) -> auth_pb2.GetKeysResponse:
        await self._answer(request, context)
        response = auth_pb2.GetKeysResponse(
            keys=[auth_pb2.Jwk(kid="k1", kty="EC", alg="ES256", use="sig", crv="P-256", x="x")]
        )
        response.max_age.FromSeconds(60)
        return response

    async def BatchValidateTokens(
        self, request: auth_pb2.BatchValidateTokensRequest, context: Any
    ) -> auth_pb2.BatchValidateTokensResponse:
        self.batches.append(len(request.requests))
        verdicts = [await self.ValidateToken(one, context) for one in request.requests]
        results = [auth_pb2.BatchValidateTokensResult(verdict=verdict) for verdict in verdicts]
        return auth_pb2.BatchValidateTokensResponse(results=results)

    async def RefreshToken(
        self, request: auth_pb2.RefreshTokenRequest, context: Any
    ) -> auth_pb2.RefreshTokenResponse:
        self.refreshed.append(request)
        await self._answer(request, context)
        response = auth_pb2.RefreshTokenResponse()
        response.token.access_token = "t"
        response.token.refresh_token = "next"
        response.token.scopes.extend(request.scopes)
        response.token.audiences.extend(request.resources)
        response.token.expires_in.FromSeconds(self.lifetime_s)
        return response

    def RegisterClient(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def WatchChanges(
        self, request: auth_pb2.WatchChangesRequest, context: Any
    ) -> AsyncIterator[auth_pb2.WatchChangesResponse]:
        chunk = auth_pb2.SnapshotChunk(revision=2**32, keys=self.keys, last=True)
        yield auth_pb2.WatchChangesResponse(snapshot=chunk)
        while True:
            beat = auth_pb2.Heartbeat(revision=2**32)
            beat.database_time.GetCurrentTime()
            yield auth_pb2.WatchChangesResponse(heartbeat=beat)
            await asyncio.sleep(0.5)


@dataclass
class Authsvc:
    """A running one, and a client of it."""

    fake: FakeAuthService
    target: str
    client: AuthsvcClient
    certificates: Certificates


@asynccontextmanager
async def running_authsvc(server: Certificates, client: Certificates) -> AsyncIterator[Authsvc]:
    fake = FakeAuthService()
    add = lambda it: add_AuthServiceServicer_to_server(fake, it)  # noqa: E731
    async with (
        serving(server, add=add) as target,
        AuthsvcClient(channel(target, client)) as authsvc,
    ):
        yield Authsvc(fake, target, authsvc, client)


# --- a user's own service ------------------------------------------------------------------------

_numbers = itertools.count()


def describe(
    methods: Mapping[str, Require | bytes | None], *, service: str = "Orders"
) -> ServiceDescriptor:
    """The descriptor of a service as if it had been compiled: its methods with their rules.

    The name says the kind of a method: Get, List (answers a stream), Put (takes one), Chat (both).
    A rule of bytes is one that was written with another version of the option.
    """
    number = next(_numbers)
    file = descriptor_pb2.FileDescriptorProto(
        name=f"shop{number}/v1/orders.proto",
        package=f"shop{number}.v1",
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto", "authsvc/v1/annotations.proto"],
    )
    made = file.service.add(name=service)
    for name, rule in methods.items():
        method = made.method.add(
            name=name,
            input_type=".google.protobuf.StringValue",
            output_type=".google.protobuf.StringValue",
            client_streaming=name.startswith(("Put", "Chat")),
            server_streaming=name.startswith(("List", "Chat")),
        )
        if isinstance(rule, bytes):
            tag = require.number << 3 | 2
            raw = bytes((tag & 0x7F | 0x80, tag >> 7 & 0x7F | 0x80, tag >> 14, len(rule)))
            method.options.MergeFromString(raw + rule)
        elif rule is not None:
            method.options.Extensions[require].CopyFrom(rule)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    found: ServiceDescriptor = pool.FindServiceByName(f"{file.package}.{service}")
    return found


_MAKE = {
    "Get": grpc.unary_unary_rpc_method_handler,
    "List": grpc.unary_stream_rpc_method_handler,
    "Put": grpc.stream_unary_rpc_method_handler,
    "Chat": grpc.stream_stream_rpc_method_handler,
}


def handlers_of(service: ServiceDescriptor, behaviours: Mapping[str, Any]) -> Any:
    """The handler that generated code would register."""
    made = {
        name: _MAKE[_kind(name)](
            behaviour,
            request_deserializer=StringValue.FromString,
            response_serializer=StringValue.SerializeToString,
        )
        for name, behaviour in behaviours.items()
    }
    return grpc.method_handlers_generic_handler(service.full_name, made)


def _kind(name: str) -> str:
    return next(kind for kind in _MAKE if name.startswith(kind))


_CALLABLES = {
    "Get": "unary_unary",
    "List": "unary_stream",
    "Put": "stream_unary",
    "Chat": "stream_stream",
}


def stub_of(opened: grpc.aio.Channel | grpc.Channel, service: ServiceDescriptor, name: str) -> Any:
    """The callable that generated code would have."""
    return getattr(opened, _CALLABLES[_kind(name)])(
        f"/{service.full_name}/{name}",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )


async def stream_of(*texts: str) -> AsyncIterator[StringValue]:
    for text in texts:
        yield StringValue(value=text)


async def call(opened: grpc.aio.Channel, service: ServiceDescriptor, name: str, **kw: Any) -> str:
    """Calls a method of any kind with `hello`; what it answered, joined."""
    method = stub_of(opened, service, name)
    sent = stream_of("hel", "lo") if _kind(name) in {"Put", "Chat"} else StringValue(value="hello")
    answer = method(sent, **kw)
    if _kind(name) in {"Get", "Put"}:
        value: str = (await answer).value
        return value
    return "".join([response.value async for response in answer])


async def refused(
    opened: grpc.aio.Channel, service: ServiceDescriptor, name: str, **kw: Any
) -> AuthsvcError:
    """The error that a call of any kind fails with.

    Streams send nothing: whoever writes while the server ends the call may be told INTERNAL
    instead of the server's own status (grpc#36066).
    """
    method = stub_of(opened, service, name)
    made = method(**kw) if _kind(name) in {"Put", "Chat"} else method(StringValue(), **kw)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (made.read() if _kind(name) in {"List", "Chat"} else made)
    return AuthsvcError.from_rpc_error(caught.value)


# --- clocks and signals --------------------------------------------------------------------------


@dataclass
class ManualClock:
    """Moved by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Gate:
    """Something that waits until a test opens it, and says that it waits."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> None:
        self.entered.set()
        await self.opened.wait()
