"""What the benches ask authsvc: two clients, a resource, tokens; all made over its API."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509

from authsvc import pki
from authsvc.rpc.peer import x5t_s256
from authsvc_client import Certificates, channel
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

from .load import Method

AUDIENCE = "https://billing.internal"
SCOPE = "billing.read"
GRANTS = (
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
)
TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"


@dataclass(frozen=True, slots=True)
class Scene:
    """`orders` gets tokens for `billing`, which asks authsvc about each."""

    pki: Path
    orders: Method
    """IssueToken, as orders calls it."""
    issue_request: bytes
    client_id: str
    """Of orders."""
    thumbprint: str

    def validation(self, token: str, view: auth_pb2.TokenView.ValueType) -> bytes:
        """The request that the interceptor of a server sends for each call that it serves."""
        return auth_pb2.ValidateTokenRequest(
            token=token,
            audience=AUDIENCE,
            required_scopes=[SCOPE],
            presenter=auth_pb2.Presenter(certificate_thumbprint=self.thumbprint),
            view=view,
        ).SerializeToString()

    async def tokens(self, count: int) -> list[str]:
        """Fresh tokens, bound to the certificate of orders."""
        answers = await self.orders.burst([self.issue_request] * count)
        issued = map(auth_pb2.IssueTokenResponse.FromString, answers)
        return [response.token.access_token for response in issued]

    async def refresh_tokens(self, count: int) -> list[str]:
        """The first refresh tokens of as many grants of orders."""
        requests = [
            auth_pb2.IssueTokenRequest(
                client_id=self.client_id,
                token_exchange=auth_pb2.TokenExchangeGrant(
                    subject_token=token,
                    subject_token_type=TOKEN_TYPE + "access_token",
                    requested_token_type=TOKEN_TYPE + "refresh_token",
                ),
            ).SerializeToString()
            for token in await self.tokens(count)
        ]
        answers = await self.orders.burst(requests)
        issued = map(auth_pb2.IssueTokenResponse.FromString, answers)
        return [response.token.refresh_token for response in issued]

    def refresh(self, token: str) -> bytes:
        """A use of a refresh token of orders."""
        request = auth_pb2.RefreshTokenRequest(refresh_token=token, client_id=self.client_id)
        return request.SerializeToString()


def connect(pki_directory: Path, name: str, port: int) -> grpc.aio.Channel:
    """A connection with the certificate of `name`."""
    files = (pki_directory / file for file in ("ca.pem", f"{name}.pem", f"{name}-key.pem"))
    return channel(f"localhost:{port}", Certificates.from_files(*files))


@asynccontextmanager
async def scene(state_dir: Path, port: int) -> AsyncIterator[Scene]:
    """Registers and approves what is needed."""
    directory = state_dir / "pki"
    authority = pki.load(directory)
    for name in ("orders", "billing"):
        pair = pki.issue(authority, now=time.time(), spiffe_path=name)
        pki.write_pair(*pair, directory, name)
    async with AsyncExitStack() as stack:
        admin, orders, billing = [
            await stack.enter_async_context(connect(directory, name, port))
            for name in ("admin", "orders", "billing")
        ]
        billing_id = await _register(billing, admin, "billing", ["validate"])
        await ResourceServiceStub(admin).CreateResource(
            resources_pb2.CreateResourceRequest(
                resource=resources_pb2.Resource(
                    resource_id=AUDIENCE,
                    owner_client_id=billing_id,
                    scopes=[resources_pb2.Scope(name=SCOPE)],
                )
            )
        )
        request = auth_pb2.IssueTokenRequest(
            client_id=await _register(orders, admin, "orders", [SCOPE]),
            client_credentials=auth_pb2.ClientCredentialsGrant(),
            scopes=[SCOPE],
        )
        leaf = x509.load_pem_x509_certificate((directory / "orders.pem").read_bytes())
        yield Scene(
            directory,
            Method(orders, "IssueToken"),
            request.SerializeToString(),
            request.client_id,
            x5t_s256(leaf),
        )


async def _register(
    own: grpc.aio.Channel, admin: grpc.aio.Channel, name: str, scopes: Sequence[str]
) -> str:
    metadata = clients_pb2.ClientMetadata(
        client_name=name,
        grant_types=GRANTS,
        tls_client_auth_san_uri=f"spiffe://authsvc.local/{name}",
        scopes=scopes,
    )
    request = auth_pb2.RegisterClientRequest(metadata=metadata)
    client_id = (await AuthServiceStub(own).RegisterClient(request)).client.client_id
    approve = clients_pb2.ApproveClientRequest(client_id=client_id)
    await ClientServiceStub(admin).ApproveClient(approve)
    return client_id
