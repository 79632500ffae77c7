"""A server with people: two first parties, a third party, a resource, users, and what they get."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from authsvc.config import Grants
from authsvc.config import Passwords as PasswordSettings
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import auth_pb2, roles_pb2, sessions_pb2, users_pb2
from authsvc_client.v1.clients_pb2 import (
    GRANT_TYPE_CLIENT_CREDENTIALS,
    GRANT_TYPE_PASSWORD,
    GRANT_TYPE_REFRESH_TOKEN,
    GRANT_TYPE_TOKEN_EXCHANGE,
)
from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub
from authsvc_client.v1.users_pb2_grpc import UserServiceStub
from tests.certs import Issued
from tests.harness import ADMIN, ISSUER, Member, Running, running

API: Final = "https://api.test"
PASSWORD: Final = "correct horse battery"
NEW_PASSWORD: Final = "staple of another kind"
CHEAP: Final = PasswordSettings(memory_kib=64, passes=1)
"""As little work as argon2 can be made to do."""
ACCESS = "urn:ietf:params:oauth:token-type:access_token"
REFRESH = "urn:ietf:params:oauth:token-type:refresh_token"


@dataclass
class People:
    """The scene, and what one does in it."""

    server: Running
    app: Member
    """A first party with refresh tokens, as all three."""
    other: Member
    """Another first party."""
    partner: Member
    """A third party: it gets at users by exchange alone."""
    owner: Member
    """Owns the resource, and validates its tokens."""
    users: dict[str, str] = field(default_factory=dict)
    """Username -> id."""

    def user_service(self, who: Issued | None = ADMIN) -> Any:
        return UserServiceStub(self.server.channel(who))

    def roles(self, who: Issued | None = ADMIN) -> Any:
        return RoleServiceStub(self.server.channel(who))

    def sessions(self, who: Issued | None = ADMIN) -> Any:
        return SessionServiceStub(self.server.channel(who))

    async def user(self, username: str, password: str = PASSWORD) -> str:
        """Creates a user; answers its id."""
        request = users_pb2.CreateUserRequest(
            user=users_pb2.User(username=username), password=password
        )
        made = (await self.user_service().CreateUser(request)).user
        self.users[username] = made.user_id
        return str(made.user_id)

    def login_request(
        self, username: str, password: str = PASSWORD, *, at: Member | None = None, **more: Any
    ) -> auth_pb2.IssueTokenRequest:
        return auth_pb2.IssueTokenRequest(
            password=auth_pb2.PasswordGrant(username=username, password=password),
            client_id=(at or self.app).client_id,
            **more,
        )

    async def login(
        self, username: str, password: str = PASSWORD, *, at: Member | None = None, **more: Any
    ) -> auth_pb2.IssuedToken:
        """The tokens of a login at a client."""
        at = at or self.app
        request = self.login_request(username, password, at=at, **more)
        return (await self.server.auth(at.who).IssueToken(request)).token

    async def exchange(
        self, token: str, *, by: Member | None = None, refreshable: bool = False, **more: Any
    ) -> auth_pb2.IssuedToken:
        """What a client that the token was sent to makes of it."""
        by = by or self.partner
        grant = auth_pb2.TokenExchangeGrant(
            subject_token=token,
            subject_token_type=ACCESS,
            requested_token_type=REFRESH if refreshable else ACCESS,
        )
        request = auth_pb2.IssueTokenRequest(token_exchange=grant, client_id=by.client_id, **more)
        return (await self.server.auth(by.who).IssueToken(request)).token

    async def refresh(self, refresh_token: str, *, by: Member | None = None) -> Any:
        """The answer of RefreshToken."""
        by = by or self.app
        request = auth_pb2.RefreshTokenRequest(refresh_token=refresh_token, client_id=by.client_id)
        return (await self.server.auth(by.who).RefreshToken(request)).token

    async def verdict(self, token: str, **asked: Any) -> auth_pb2.ValidateTokenResponse:
        """What the owner of the resource is told."""
        request = auth_pb2.ValidateTokenRequest(token=token, audience=API, **asked)
        return await self.server.auth(self.owner.who).ValidateToken(request)

    async def judged(self, token: str, **asked: Any) -> str:
        """OK, or the reason."""
        verdict = await self.verdict(token, **asked)
        return "OK" if verdict.active else Reason(verdict.reason).name

    async def claims(self, token: str) -> auth_pb2.TokenClaims:
        return (await self.verdict(token, view=auth_pb2.TOKEN_VIEW_CLAIMS)).claims

    async def role(self, role_id: str, *permissions: str) -> None:
        """Creates a role, and its permissions on the resource where they are missing."""
        known = await self.roles().ListPermissions(roles_pb2.ListPermissionsRequest())
        there = {(one.ref.resource_id, one.ref.name) for one in known.permissions}
        refs = [roles_pb2.PermissionRef(resource_id=API, name=name) for name in permissions]
        for ref in refs:
            if (ref.resource_id, ref.name) not in there:
                permission = roles_pb2.Permission(ref=ref)
                await self.roles().CreatePermission(
                    roles_pb2.CreatePermissionRequest(permission=permission)
                )
        role = roles_pb2.Role(role_id=role_id, permissions=refs)
        await self.roles().CreateRole(roles_pb2.CreateRoleRequest(role=role))

    async def assign(self, role_id: str, user_id: str, resource_id: str = "") -> int:
        """Gives a user a role; answers the revision."""
        assignment = roles_pb2.RoleAssignment(
            role_id=role_id, user_id=user_id, resource_id=resource_id
        )
        request = roles_pb2.AssignRoleRequest(role_assignment=assignment)
        return int((await self.roles().AssignRole(request)).revision)

    async def unassign(self, role_id: str, user_id: str) -> int:
        """Takes it away again."""
        assignment = roles_pb2.RoleAssignment(role_id=role_id, user_id=user_id)
        request = roles_pb2.UnassignRoleRequest(role_assignment=assignment)
        return int((await self.roles().UnassignRole(request)).revision)

    async def living_sessions(self, user_id: str) -> list[sessions_pb2.Session]:
        request = sessions_pb2.ListSessionsRequest(user_id=user_id)
        return list((await self.sessions().ListSessions(request)).sessions)

    async def living_grants(self, user_id: str) -> list[sessions_pb2.Grant]:
        request = sessions_pb2.ListGrantsRequest(subject=user_id)
        return list((await self.sessions().ListGrants(request)).grants)


@asynccontextmanager
async def people(directory: Path, **settings: Any) -> AsyncIterator[People]:
    """The scene on a fresh server."""
    settings.setdefault("grants", Grants(password=True))
    settings.setdefault("passwords", CHEAP)
    async with running(directory, **settings) as server:
        yield await enter(server)


async def enter(server: Running) -> People:
    """Makes the scene on a server that has none."""
    first = [GRANT_TYPE_PASSWORD, GRANT_TYPE_REFRESH_TOKEN, GRANT_TYPE_TOKEN_EXCHANGE]
    third = [GRANT_TYPE_TOKEN_EXCHANGE, GRANT_TYPE_REFRESH_TOKEN, GRANT_TYPE_CLIENT_CREDENTIALS]
    unbound = {"tls_client_certificate_bound_access_tokens": False}
    owner = await server.member("owner", "validate")
    await server.resource(API, "api.read", "api.write", owner=owner.client_id)
    app = await server.member(
        "app", "api.read", "api.write", grant_types=first, first_party=True, **unbound
    )
    other = await server.member("other", "api.read", grant_types=first, first_party=True, **unbound)
    partner = await server.member(
        "partner", "api.read", grant_types=third, validates=[API], **unbound
    )
    return People(server, app, other, partner, owner)


def self_service(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that a person makes for itself."""
    return (("authorization", f"Bearer {token}"),)


__all__ = [
    "API",
    "CHEAP",
    "ISSUER",
    "NEW_PASSWORD",
    "PASSWORD",
    "People",
    "enter",
    "people",
    "self_service",
]
