"""What every service of the example does at start: certificates, authsvc, its port, its end."""

import argparse
import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from authsvc_client import (
    AuthsvcClient,
    Certificates,
    LocalValidator,
    RequireInterceptor,
    channel,
)


@dataclass(frozen=True)
class Service:
    """What a service is told on its command line."""

    name: str
    client_id: str
    certificates: Certificates
    authsvc: str
    issuer: str
    billing: str


def arguments(name: str) -> tuple[Service, Path]:
    """The command line: the service, and where to write its port once it serves."""
    parser = argparse.ArgumentParser(description=f"The {name} service of the example")
    parser.add_argument("--client-id", required=True, help="its client at authsvc")
    parser.add_argument("--pki", type=Path, required=True, help="directory with its certificate")
    parser.add_argument("--authsvc", required=True, help="address of authsvc")
    parser.add_argument("--issuer", default="https://authsvc.local", help="its `iss`")
    parser.add_argument("--billing", default="", help="address of billing")
    parser.add_argument("--port-file", type=Path, required=True)
    given = parser.parse_args()
    certificates = Certificates.from_files(
        given.pki / "ca.pem", given.pki / f"{name}.pem", given.pki / f"{name}-key.pem"
    )
    service = Service(
        name, given.client_id, certificates, given.authsvc, given.issuer, given.billing
    )
    return service, given.port_file


async def serve(
    service: Service,
    authsvc: AuthsvcClient,
    descriptor: ServiceDescriptor,
    add: Callable[[grpc.aio.Server], None],
    port_file: Path,
) -> None:
    """Serves until SIGTERM. The interceptor enforces the options that stand in the proto; tokens
    are judged in this process, and authsvc says what was revoked.
    """
    async with LocalValidator(authsvc, issuer=service.issuer) as validator:
        await validator.ready()
        require = RequireInterceptor(
            validator, audience=f"https://{service.name}.example", services=[descriptor]
        )
        server = grpc.aio.server(interceptors=[require])
        add(server)
        port = server.add_secure_port("localhost:0", service.certificates.server_credentials())
        await server.start()
        port_file.write_text(str(port))  # noqa: ASYNC240 - once, before the first call
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()
        await server.stop(1)


def main(name: str, run: Callable[[Service, AuthsvcClient, Path], Awaitable[None]]) -> None:
    """Runs a service."""

    async def connected() -> None:
        service, port_file = arguments(name)
        async with AuthsvcClient(channel(service.authsvc, service.certificates)) as authsvc:
            await run(service, authsvc, port_file)

    asyncio.run(connected())
