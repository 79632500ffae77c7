"""What the benches ask authsvc: clients, a resource, a user, tokens; all made over its API."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from authsvc import pki
from authsvc.rpc.peer import x5t_s256
from authsvc_client import Certificates, channel
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2, roles_pb2, users_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
from authsvc_client.v1.users_pb2_grpc import UserServiceStub

from .load import Method

AUDIENCE = "https://billing.internal"
SCOPE = "billing.read"
GRANTS = (
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
)
USER, PASSWORD = "ada", "correct horse battery"
ROLE, PERMISSION = "clerk", roles_pb2.PermissionRef(resource_id=AUDIENCE, name="invoice.read")
TOKEN_TYPE = "urn:ietf:params:oauth:token-type:"


@dataclass(frozen=True, slots=True)
class Scene:
    """`orders` gets tokens for `billing`, which asks authsvc about each; a user, who holds a role
    there, logs in at `till`."""

    pki: Path
    admin: grpc.aio.Channel
    orders: Method
    """IssueToken, as orders calls it."""
    issue_request: bytes
    client_id: str
    """Of orders."""
    thumbprint: str
    till: Method
    """IssueToken, as the till calls it."""
    till_id: str
    till_thumbprint: str

    def validation(self, token: str, view: auth_pb2.TokenView.ValueType) -> bytes:
        """The request that the interceptor of a server sends for each call that it serves."""
        return _validation(token, self.thumbprint, view=view).SerializeToString()

    def user_validation(self, token: str, **asked: Any) -> bytes:
        """As `validation`, of a user's token."""
        return _validation(token, self.till_thumbprint, **asked).SerializeToString()

    def login(self, username: str = USER) -> bytes:
        """An IssueToken by the password of a user."""
        grant = auth_pb2.PasswordGrant(username=username, password=PASSWORD)
        request = auth_pb2.IssueTokenRequest(password=grant, client_id=self.till_id)
        return request.SerializeToString()

    async def user_tokens(self, *usernames: str) -> list[str]:
        """A token of each."""
        found = []
        for username in usernames:
            [answer] = await self.till.burst([self.login(username)])
            found.append(auth_pb2.IssueTokenResponse.FromString(answer).token.access_token)
        return found

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


def _validation(token: str, thumbprint: str, **asked: Any) -> auth_pb2.ValidateTokenRequest:
    return auth_pb2.ValidateTokenRequest(
        token=token,
        audience=AUDIENCE,
        required_scopes=[SCOPE],
        presenter=auth_pb2.Presenter(certificate_thumbprint=thumbprint),
        **asked,
    )


def connect(pki_directory: Path, name: str, port: int) -> grpc.aio.Channel:
    """A connection with the certificate of `name`."""
    return channel(f"localhost:{port}", Certificates.from_files(*files_of(pki_directory, name)))


def files_of(pki_directory: Path, name: str) -> tuple[Path, Path, Path]:
    """CA, certificate and key of `name`."""
    ca, certificate, key = ("ca.pem", f"{name}.pem", f"{name}-key.pem")
    return pki_directory / ca, pki_directory / certificate, pki_directory / key


@asynccontextmanager
async def scene(state_dir: Path, port: int) -> AsyncIterator[Scene]:
    """Registers and approves what is needed."""
    directory = state_dir / "pki"
    authority = pki.load(directory)
    for name in ("orders", "billing", "till"):
        pair = pki.issue(authority, now=time.time(), spiffe_path=name)
        pki.write_pair(*pair, directory, name)
    async with AsyncExitStack() as stack:
        admin, orders, billing, till = [
            await stack.enter_async_context(connect(directory, name, port))
            for name in ("admin", "orders", "billing", "till")
        ]
        billing_id = await _register(billing, admin, "billing", ["validate", "watch"])
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
        first_party = {"grant_types": [clients_pb2.GRANT_TYPE_PASSWORD], "first_party": True}
        till_id = await _register(till, admin, "till", [SCOPE], **first_party)
        await _hire(admin)
        yield Scene(
            directory,
            admin,
            Method(orders, "IssueToken"),
            request.SerializeToString(),
            request.client_id,
            _thumbprint(directory, "orders"),
            Method(till, "IssueToken"),
            till_id,
            _thumbprint(directory, "till"),
        )


async def _register(
    own: grpc.aio.Channel, admin: grpc.aio.Channel, name: str, scopes: Sequence[str], **more: Any
) -> str:
    """A client, approved: its id."""
    metadata = clients_pb2.ClientMetadata(
        client_name=name,
        tls_client_auth_san_uri=f"spiffe://authsvc.local/{name}",
        scopes=scopes,
        **{"grant_types": GRANTS} | more,
    )
    request = auth_pb2.RegisterClientRequest(metadata=metadata)
    client_id = (await AuthServiceStub(own).RegisterClient(request)).client.client_id
    approve = clients_pb2.ApproveClientRequest(client_id=client_id)
    await ClientServiceStub(admin).ApproveClient(approve)
    return client_id


async def _hire(admin: grpc.aio.Channel) -> None:
    """Makes the user, and gives it the role with the permission."""
    roles = RoleServiceStub(admin)
    await roles.CreatePermission(
        roles_pb2.CreatePermissionRequest(permission=roles_pb2.Permission(ref=PERMISSION))
    )
    role = roles_pb2.Role(role_id=ROLE, permissions=[PERMISSION])
    await roles.CreateRole(roles_pb2.CreateRoleRequest(role=role))
    user = users_pb2.CreateUserRequest(user=users_pb2.User(username=USER), password=PASSWORD)
    made = (await UserServiceStub(admin).CreateUser(user)).user
    assignment = roles_pb2.RoleAssignment(role_id=ROLE, user_id=made.user_id)
    await roles.AssignRole(roles_pb2.AssignRoleRequest(role_assignment=assignment))


def _thumbprint(directory: Path, name: str) -> str:
    return x5t_s256(x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes()))
