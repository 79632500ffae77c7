"""The audit of a whole server: every act leaves one row, and is found again by ListAuditEvents."""

import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from authsvc.app import open_app
from authsvc.config import Grants, Housekeeping
from authsvc.model import AuditOutcome, Touched
from authsvc.rpc.server import SERVICES
from authsvc.store.port import AuditEvent, AuditFilter
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import audit_pb2
from authsvc_client.v1.audit_pb2_grpc import AuditServiceStub
from authsvc_client.v1.clients_pb2 import (
    CLIENT_AUTH_METHOD_API_KEY,
    CLIENT_AUTH_METHOD_CLIENT_SECRET_POST,
    CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
)
from tests.certs import Issued
from tests.harness import (
    ADMIN,
    ISSUER,
    TIMEOUT_S,
    Member,
    Running,
    by_hand,
    certs_spiffe,
    identity,
    issue_request,
    migrated,
    reason,
    running,
    settings_for,
    spiffe,
)
from tests.people import API, CHEAP, NEW_PASSWORD, PASSWORD, People, enter, self_service

METHODS = {method.name: method for service in SERVICES for method in service.methods}
READ = {name for name in METHODS if re.match(r"(Get|List)[A-Z]", name)} | {
    "ValidateToken",
    "BatchValidateTokens",
    "WatchChanges",
    "ExplainToken",
}
UNAUDITED = {"RefreshToken"}
"""Used again and again; reuse, which ends the grant, is audited in its place."""
ADMIN_ID = spiffe("admin")
ANY = AuditFilter()
_numbers: Iterator[int] = count(1)


def name() -> str:
    return f"n{next(_numbers)}"


class Plan(NamedTuple):
    """A call that changes something, and what its row says."""

    fields: dict[str, Any]
    touched: Touched | Callable[[Any], Touched]
    who: Issued = ADMIN
    actor: str = ADMIN_ID
    peer: str = ADMIN_ID
    behalf: str = ""
    bearer: str = ""
    mask: tuple[str, ...] = ()
    comment: str = ""
    secrets: tuple[str, ...] = ()


@dataclass
class Scene:
    """A server with people, where every row prepares what its call needs."""

    people: People
    keyed: Member
    secrets: set[str] = field(default_factory=set)
    """All that was ever secret here."""

    @property
    def server(self) -> Running:
        return self.people.server

    async def call(
        self, method: str, *, who: Issued | None = ADMIN, bearer: str = "", **fields: Any
    ) -> Any:
        """A method by its name, under its name as the request id."""
        found: MethodDescriptor = METHODS[method]
        request, answer = (GetMessageClass(m) for m in (found.input_type, found.output_type))
        path = f"/{found.containing_service.full_name}/{method}"
        unary = self.server.channel(who).unary_unary(
            path, request.SerializeToString, answer.FromString
        )
        metadata = [("x-request-id", f"call-{method}")]
        metadata += self_service(bearer) if bearer else ()
        answered = await unary(request(**fields), metadata=metadata, timeout=TIMEOUT_S)
        self.secrets |= set(_secrets(answered))
        return answered

    async def events(self) -> list[AuditEvent]:
        """The newest first."""
        return list(await self.server.store.audit.page(ANY, None, 100_000))

    async def client(self, *, approve: bool = True, **more: Any) -> Member:
        return await self.server.member(name(), "api.read", approve=approve, **more)

    async def user(self) -> tuple[str, str]:
        """Id and username."""
        username = name()
        return await self.people.user(username), username

    async def role(self) -> str:
        role_id = name()
        await self.people.role(role_id, "doc.read")
        return role_id

    async def resource(self) -> str:
        resource_id = f"https://{name()}.test"
        await self.server.resource(resource_id)
        return resource_id

    async def next_key(self) -> str:
        """The key that is NEXT."""
        keys = (await self.call("ListSigningKeys")).signing_keys
        ready = [key.kid for key in keys if key.state == 1]
        if ready:
            return str(ready[0])
        return str((await self.call("PrepareSigningKey")).signing_key.kid)

    async def ready_keys(self) -> None:
        """Lets every key sign at once."""
        await self.sql("UPDATE signing_key SET ready_time = 0")

    async def sql(self, statement: str) -> list[Any]:
        return await by_hand(self.file, statement)

    @property
    def file(self) -> Path:
        return self.server.app._settings.state_dir / "authsvc.db"


def _secrets(message: Any) -> Iterator[str]:
    """Values of fields that the contract calls secret, however deep."""
    for found, value in message.ListFields():
        if found.message_type is not None and found.message_type.GetOptions().map_entry:
            continue
        if found.message_type is not None:
            for each in value if found.is_repeated else (value,):
                yield from _secrets(each)
        elif found.GetOptions().debug_redact or found.name in ("value", "code"):
            yield str(value)


# --- every act ---

Row = Callable[[Scene], Awaitable[Plan]]
ROWS: dict[str, Row] = {}


def row(plan: Row) -> Row:
    """What `_DoThis` prepares is a call of DoThis."""
    ROWS[plan.__name__.removeprefix("_")] = plan
    return plan


def about(*, subject: str = "", client_id: str = "", object_id: str = "") -> Touched:
    return Touched(subject, client_id, object_id)


@row
async def _IssueToken(s: Scene) -> Plan:
    user_id, username = await s.user()
    request = s.people.login_request(username)
    app = s.people.app

    def touched(_answer: Any) -> Touched:
        wanted = f"SELECT session_id FROM session WHERE user_id = '{user_id}'"
        with closing(sqlite3.connect(s.file)) as connection:
            [(session_id,)] = connection.execute(wanted)
        return Touched(user_id, app.client_id, session_id)

    fields: dict[str, Any] = {"password": request.password, "client_id": app.client_id}
    return Plan(fields, touched, app.who, app.client_id, spiffe("app"), secrets=(PASSWORD,))


@row
async def _RevokeToken(s: Scene) -> Plan:
    client = await s.client()
    token = await s.server.token(client, "api.read")
    fields: dict[str, Any] = {"token": token.access_token}
    peer = _spiffe(client)
    return Plan(fields, about(object_id=token.jti), client.who, client.client_id, peer)


@row
async def _RegisterClient(s: Scene) -> Plan:
    metadata = {
        "client_name": "new",
        "token_endpoint_auth_methods": [CLIENT_AUTH_METHOD_CLIENT_SECRET_POST],
    }
    return Plan({"metadata": metadata}, lambda a: about(client_id=a.client.client_id))


@row
async def _UpdateClient(s: Scene) -> Plan:
    client = await s.client()
    fields: dict[str, Any] = {
        "client": {"client_id": client.client_id, "metadata": {"client_name": "other"}},
        "update_mask": {"paths": ["metadata.client_name"]},
    }
    return Plan(fields, about(client_id=client.client_id), mask=("metadata.client_name",))


@row
async def _DeleteClient(s: Scene) -> Plan:
    client = (await s.client()).client_id
    return Plan({"client_id": client}, about(subject=client, client_id=client))


def _review(*before: str, approve: bool) -> Row:
    async def plan(s: Scene) -> Plan:
        client = (await s.client(approve=approve)).client_id
        for method in before:
            await s.call(method, client_id=client)
        fields = {"client_id": client, "comment": "as agreed"}
        return Plan(fields, about(client_id=client), comment="as agreed")

    return plan


ROWS |= {
    "ApproveClient": _review(approve=False),
    "RejectClient": _review(approve=False),
    "SuspendClient": _review(approve=True),
    "ResumeClient": _review("SuspendClient", approve=True),
}


@row
async def _RotateClientSecret(s: Scene) -> Plan:
    methods = [CLIENT_AUTH_METHOD_CLIENT_SECRET_POST]
    client = await s.client(secret=True, token_endpoint_auth_methods=methods)
    fields: dict[str, Any] = {"client_id": client.client_id}
    return Plan(fields, about(client_id=client.client_id), secrets=(client.secret,))


@row
async def _CreateApiKey(s: Scene) -> Plan:
    keyed = s.keyed

    def touched(answer: Any) -> Touched:
        return about(client_id=keyed.client_id, object_id=answer.api_key.api_key_id)

    fields: dict[str, Any] = {"api_key": {"scopes": ["api.read"]}}
    return Plan(fields, touched, keyed.who, keyed.client_id, _spiffe(keyed))


@row
async def _DeleteApiKey(s: Scene) -> Plan:
    made = await s.call("CreateApiKey", who=s.keyed.who, api_key={"scopes": ["api.read"]})
    key_id = made.api_key.api_key_id
    return Plan({"api_key_id": key_id}, about(client_id=s.keyed.client_id, object_id=key_id))


@row
async def _CreateInitialAccessToken(s: Scene) -> Plan:
    fields: dict[str, Any] = {
        "initial_access_token": {"uses_left": 3, "expire_time": {"seconds": 2**32}}
    }

    def touched(answer: Any) -> Touched:
        return about(object_id=answer.initial_access_token.initial_access_token_id)

    return Plan(fields, touched)


@row
async def _DeleteInitialAccessToken(s: Scene) -> Plan:
    fields: dict[str, Any] = {
        "initial_access_token": {"uses_left": 3, "expire_time": {"seconds": 2**32}}
    }
    made = await s.call("CreateInitialAccessToken", **fields)
    token_id = made.initial_access_token.initial_access_token_id
    return Plan({"initial_access_token_id": token_id}, about(object_id=token_id))


async def _own(s: Scene) -> tuple[Member, str]:
    """A client, and its registration access token."""
    who = identity(name())
    made = await s.server.register(who, by=who, scopes=["api.read"])
    s.secrets.add(made.registration_access_token)
    return Member(who, made.client.client_id), made.registration_access_token


@row
async def _UpdateOwnClient(s: Scene) -> Plan:
    client, token = await _own(s)
    metadata = {"client_name": "own", "tls_client_auth_san_uri": _spiffe(client)}
    fields: dict[str, Any] = {
        "registration_access_token": token,
        "client_id": client.client_id,
        "metadata": metadata,
    }
    touched = about(client_id=client.client_id)
    return Plan(fields, touched, client.who, client.client_id, _spiffe(client))


@row
async def _DeleteOwnClient(s: Scene) -> Plan:
    client, token = await _own(s)
    touched = about(subject=client.client_id, client_id=client.client_id)
    fields: dict[str, Any] = {"registration_access_token": token}
    return Plan(fields, touched, client.who, _spiffe(client), _spiffe(client))


@row
async def _CreateResource(s: Scene) -> Plan:
    resource_id = f"https://{name()}.test"
    return Plan({"resource": {"resource_id": resource_id}}, about(object_id=resource_id))


@row
async def _UpdateResource(s: Scene) -> Plan:
    resource_id = await s.resource()
    fields: dict[str, Any] = {
        "resource": {"resource_id": resource_id, "display_name": "x"},
        "update_mask": {"paths": ["display_name"]},
    }
    return Plan(fields, about(object_id=resource_id), mask=("display_name",))


@row
async def _DeleteResource(s: Scene) -> Plan:
    resource_id = await s.resource()
    return Plan({"resource_id": resource_id}, about(object_id=resource_id))


@row
async def _CreateUser(s: Scene) -> Plan:
    fields: dict[str, Any] = {"user": {"username": name()}, "password": PASSWORD}
    return Plan(fields, lambda a: about(subject=a.user.user_id), secrets=(PASSWORD,))


@row
async def _UpdateUser(s: Scene) -> Plan:
    user_id, _ = await s.user()
    fields: dict[str, Any] = {
        "user": {"user_id": user_id, "display_name": "Ada", "email": "a@b.test"},
        "update_mask": {"paths": ["display_name", "email"]},
    }
    return Plan(fields, about(subject=user_id), mask=("display_name", "email"))


def _of_user(*before: str, **fields: Any) -> Row:
    async def plan(s: Scene) -> Plan:
        user_id, _ = await s.user()
        for method in before:
            await s.call(method, user_id=user_id)
        asked = {"user_id": user_id, **fields}
        return Plan(asked, about(subject=user_id), comment=fields.get("comment", ""))

    return plan


ROWS |= {
    "DisableUser": _of_user(comment="left"),
    "EnableUser": _of_user("DisableUser", comment="is back"),
    "DeleteUser": _of_user(),
    "CreatePasswordResetCode": _of_user(),
    "SignOutEverywhere": _of_user(),
    "SetPassword": _of_user(new_password=NEW_PASSWORD),
}


@row
async def _ResetPassword(s: Scene) -> Plan:
    user_id, _ = await s.user()
    code = (await s.call("CreatePasswordResetCode", user_id=user_id)).code
    fields: dict[str, Any] = {"code": code, "new_password": NEW_PASSWORD}
    return Plan(fields, about(subject=user_id), secrets=(code, NEW_PASSWORD))


@row
async def _ImportUsers(s: Scene) -> Plan:
    fields: dict[str, Any] = {"rows": [{"username": name(), "password": PASSWORD}]}
    return Plan(fields, lambda a: about(subject=a.results[0].user.user_id), secrets=(PASSWORD,))


@row
async def _CreateRole(s: Scene) -> Plan:
    role_id = name()
    return Plan({"role": {"role_id": role_id}}, about(object_id=role_id))


@row
async def _UpdateRole(s: Scene) -> Plan:
    role_id = await s.role()
    fields: dict[str, Any] = {
        "role": {"role_id": role_id},
        "update_mask": {"paths": ["permissions"]},
    }
    return Plan(fields, about(object_id=role_id), mask=("permissions",))


@row
async def _DeleteRole(s: Scene) -> Plan:
    role_id = await s.role()
    return Plan({"role_id": role_id}, about(object_id=role_id))


@row
async def _CreatePermission(s: Scene) -> Plan:
    ref = {"resource_id": API, "name": name()}
    return Plan({"permission": {"ref": ref}}, _permission(ref))


@row
async def _DeletePermission(s: Scene) -> Plan:
    ref = {"resource_id": API, "name": name()}
    await s.people.role(name(), ref["name"])
    return Plan({"ref": ref}, _permission(ref))


def _permission(ref: dict[str, str]) -> Touched:
    return about(object_id=f"{ref['resource_id']} {ref['name']}")


@row
async def _AssignRole(s: Scene) -> Plan:
    (user_id, _), role_id = await s.user(), await s.role()
    fields: dict[str, Any] = {"role_assignment": {"role_id": role_id, "user_id": user_id}}
    return Plan(fields, about(subject=user_id, object_id=role_id))


@row
async def _UnassignRole(s: Scene) -> Plan:
    (user_id, _), role_id = await s.user(), await s.role()
    await s.people.assign(role_id, user_id)
    fields: dict[str, Any] = {"role_assignment": {"role_id": role_id, "user_id": user_id}}
    return Plan(fields, about(subject=user_id, object_id=role_id))


async def _login(s: Scene) -> tuple[str, str, str]:
    """User, session and grant."""
    user_id, username = await s.user()
    issued = await s.people.login(username)
    s.secrets |= {issued.access_token, issued.refresh_token}
    [session] = await s.people.living_sessions(user_id)
    [grant] = await s.people.living_grants(user_id)
    return user_id, session.session_id, grant.grant_id


@row
async def _EndSession(s: Scene) -> Plan:
    _, session_id, _ = await _login(s)
    return Plan({"session_id": session_id}, about(object_id=session_id))


@row
async def _EndGrant(s: Scene) -> Plan:
    _, _, grant_id = await _login(s)
    return Plan({"grant_id": grant_id}, about(object_id=grant_id))


@row
async def _RevokeSession(s: Scene) -> Plan:
    _, session_id, _ = await _login(s)
    fields: dict[str, Any] = {"session_id": session_id, "comment": "stolen"}
    return Plan(fields, about(object_id=session_id), comment="stolen")


@row
async def _RevokeGrant(s: Scene) -> Plan:
    _, _, grant_id = await _login(s)
    fields: dict[str, Any] = {"grant_id": grant_id, "comment": "stolen"}
    return Plan(fields, about(object_id=grant_id), comment="stolen")


@row
async def _RevokeSubject(s: Scene) -> Plan:
    user_id, _ = await s.user()
    return Plan({"subject": user_id, "comment": "c"}, about(subject=user_id), comment="c")


@row
async def _RevokeClient(s: Scene) -> Plan:
    client = (await s.client()).client_id
    return Plan({"client_id": client, "comment": "c"}, about(client_id=client), comment="c")


@row
async def _RevokeSubjectClient(s: Scene) -> Plan:
    (user_id, _), client = await s.user(), await s.client()
    fields: dict[str, Any] = {"subject": user_id, "client_id": client.client_id}
    return Plan(fields, about(subject=user_id, client_id=client.client_id))


@row
async def _RevokeEverything(s: Scene) -> Plan:
    return Plan({"comment": "a drill"}, about(), comment="a drill")


@row
async def _PrepareSigningKey(s: Scene) -> Plan:
    await s.call("RetireSigningKey", kid=await s.next_key())
    return Plan({}, lambda a: about(object_id=a.signing_key.kid))


@row
async def _ActivateSigningKey(s: Scene) -> Plan:
    kid = await s.next_key()
    await s.ready_keys()
    return Plan({"kid": kid}, about(object_id=kid))


@row
async def _RetireSigningKey(s: Scene) -> Plan:
    kid = await s.next_key()
    return Plan({"kid": kid}, about(object_id=kid))


@row
async def _TaintSigningKey(s: Scene) -> Plan:
    kid = await s.next_key()
    fields: dict[str, Any] = {"kid": kid, "comment": "leaked"}
    return Plan(fields, about(object_id=kid), comment="leaked")


def _spiffe(member: Member) -> str:
    return certs_spiffe(member.who)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("audit")
    async with running(folder, grants=Grants(password=True), passwords=CHEAP) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(server: Running) -> Scene:
    people = await enter(server)
    keyed = await server.member(
        name(),
        "api.read",
        token_endpoint_auth_methods=[
            CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
            CLIENT_AUTH_METHOD_API_KEY,
        ],
    )
    return Scene(people, keyed)


def test_every_method_that_changes_something_has_a_row() -> None:
    assert set(METHODS) == set(ROWS) | READ | UNAUDITED
    assert not set(ROWS) & READ
    assert sum(len(service.methods) for service in SERVICES) == len(METHODS)


@pytest.mark.parametrize("method", ROWS)
async def test_every_act_leaves_exactly_one_row(server: Running, scene: Scene, method: str) -> None:
    plan = await ROWS[method](scene)
    scene.secrets |= {*plan.secrets} - {""}
    before = {event.audit_event_id for event in await scene.events()}
    answer = await scene.call(method, who=plan.who, bearer=plan.bearer, **plan.fields)
    [event] = [e for e in await scene.events() if e.audit_event_id not in before]
    assert event.touched == (plan.touched(answer) if callable(plan.touched) else plan.touched)
    assert (event.outcome, event.reason) == (AuditOutcome.SUCCEEDED, Reason.UNSPECIFIED)
    act = event.act
    assert (act.action, act.actor, act.on_behalf_of) == (method, plan.actor, plan.behalf)
    assert (act.peer, act.address) == (plan.peer, "127.0.0.1")
    assert (act.fields, act.comment) == (plan.mask, plan.comment)
    assert act.request_id == f"call-{method}"
    if "revision" in METHODS[method].output_type.fields_by_name:
        assert event.revision == answer.revision > 0


ETAG = {"etag": "99"}
UNDONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "client updated": (
        "UpdateClient",
        {"client": ETAG | {"metadata": {"client_name": "x"}}},
        "ETAG_MISMATCH",
    ),
    "client deleted": ("DeleteClient", ETAG, "ETAG_MISMATCH"),
    "client approved twice": ("ApproveClient", {}, "CLIENT_STATE_CONFLICT"),
    "resource updated": ("UpdateResource", {"resource": ETAG}, "ETAG_MISMATCH"),
    "resource deleted": ("DeleteResource", ETAG, "ETAG_MISMATCH"),
    "resource made twice": ("CreateResource", {}, "ALREADY_EXISTS"),
    "user updated": ("UpdateUser", {"user": ETAG}, "ETAG_MISMATCH"),
    "user disabled": ("DisableUser", ETAG, "ETAG_MISMATCH"),
    "user deleted": ("DeleteUser", ETAG, "ETAG_MISMATCH"),
    "user made twice": ("CreateUser", {}, "ALREADY_EXISTS"),
    "role updated": ("UpdateRole", {"role": ETAG}, "ETAG_MISMATCH"),
    "role deleted": ("DeleteRole", ETAG, "ETAG_MISMATCH"),
    "role made twice": ("CreateRole", {}, "ALREADY_EXISTS"),
    "key retired twice": ("RetireSigningKey", {}, "SIGNING_KEY_STATE_CONFLICT"),
    "grant ended twice": ("EndGrant", {}, "GRANT_NOT_FOUND"),
    "API key deleted twice": ("DeleteApiKey", {}, "API_KEY_NOT_FOUND"),
}


@pytest.mark.parametrize("case", UNDONE)
async def test_change_that_is_not_made_leaves_none(
    server: Running, scene: Scene, case: str
) -> None:
    method, changes, refused = UNDONE[case]
    plan = await ROWS[method](scene)
    fields = dict(plan.fields)
    if changes:
        for key, value in changes.items():
            fields[key] = fields.get(key, {}) | value if isinstance(value, dict) else value
    else:
        await scene.call(method, who=plan.who, **fields)
    before = await scene.events()
    assert await reason(scene.call(method, who=plan.who, **fields)) == refused
    assert await scene.events() == before


@pytest.mark.parametrize(
    "method", [n for n in ROWS if "validate_only" in METHODS[n].input_type.fields_by_name]
)
async def test_dry_run_leaves_none(server: Running, scene: Scene, method: str) -> None:
    plan = await ROWS[method](scene)
    before = await scene.events()
    await scene.call(method, who=plan.who, validate_only=True, **plan.fields)
    assert await scene.events() == before


async def test_repeated_import_and_creation_leave_none(server: Running, scene: Scene) -> None:
    request: dict[str, Any] = {
        "user": {"username": name()},
        "password": PASSWORD,
        "request_id": f"{name()}-request",
    }
    first = await scene.call("CreateUser", **request)
    before = await scene.events()
    assert (await scene.call("CreateUser", **request)).user.user_id == first.user.user_id
    assert await scene.events() == before


async def test_who_is_known_and_no_administrator_is_recorded_as_refused(
    server: Running, scene: Scene
) -> None:
    client = await scene.client()
    user_id, _ = await scene.user()
    before = await scene.events()
    refused = scene.call("DisableUser", who=client.who, user_id=user_id, comment="please")
    assert await reason(refused) == "INSUFFICIENT_SCOPE"
    assert await reason(scene.call("ListAuditEvents", who=client.who)) == "INSUFFICIENT_SCOPE"
    listed, disabled, *rest = await scene.events()
    assert rest == before
    assert [e.act.action for e in (listed, disabled)] == ["ListAuditEvents", "DisableUser"]
    for event in (listed, disabled):
        assert (event.outcome, event.reason) == (
            AuditOutcome.REFUSED,
            Reason.INSUFFICIENT_SCOPE,
        )
        assert (event.act.actor, event.act.peer) == (client.client_id, _spiffe(client))
        assert event.revision == 0
    stranger = scene.call("DisableUser", who=identity("stranger"), user_id=user_id)
    assert await reason(stranger) == "CALLER_UNKNOWN"
    refused = scene.call("ValidateToken", who=client.who, token="x")
    assert await reason(refused) == "INSUFFICIENT_SCOPE"
    assert await scene.events() == [listed, disabled, *before]


async def test_reading_leaves_none(server: Running, scene: Scene) -> None:
    client = await scene.client()
    token = (await server.token(client, "api.read")).access_token
    before = await scene.events()
    await server.token(client, "api.read")
    await server.verdict(ADMIN, token)
    await scene.call("ExplainToken", question={"token": token})
    for method in sorted(READ):
        if method.startswith("List") and method != "ListApiKeys":
            await scene.call(method)
    await server.app.housekeeping.run_once()
    assert await scene.events() == before


async def test_what_authsvc_does_by_itself_is_recorded(server: Running, scene: Scene) -> None:
    client = await scene.client()
    await scene.sql(
        f"UPDATE client SET approval_expire_time = 1 WHERE client_id = '{client.client_id}'"
    )
    before = await scene.events()
    await server.app.housekeeping.run_once()
    event, *rest = await scene.events()
    assert rest == before
    assert (event.act.action, event.act.actor) == ("ExpireClients", "authsvc")
    assert event.touched.client_id == client.client_id
    started = [e for e in before if e.act.action == "Start"]
    assert len(started) == 2, "its first key, and its own resource"
    assert all(e.act.action for e in await scene.events()), "somebody did not say what it does"


async def test_act_of_a_client_on_behalf_of_a_person_names_both(
    server: Running, scene: Scene
) -> None:
    people = scene.people
    user_id, username = await scene.user()
    issued = await people.login(username)
    own = await people.exchange(issued.access_token, by=people.app, resources=[ISSUER])
    scene.secrets |= {issued.access_token, own.access_token}
    before = await scene.events()
    fields: dict[str, Any] = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    await scene.call(
        "SetPassword", who=people.app.who, bearer=own.access_token, user_id=user_id, **fields
    )
    event, *rest = await scene.events()
    assert rest == before
    assert (event.act.actor, event.act.on_behalf_of) == (people.app.client_id, user_id)
    assert (event.act.action, event.touched.subject) == ("SetPassword", user_id)


async def test_a_second_client_authentication_leaves_none(server: Running, scene: Scene) -> None:
    """The first use of a secret is remembered, and is no act of its own."""
    methods = [CLIENT_AUTH_METHOD_CLIENT_SECRET_POST]
    client = await scene.client(secret=True, token_endpoint_auth_methods=methods)
    scene.secrets.add(client.secret)
    before = await scene.events()
    for _ in range(2):
        await server.auth(client.who).IssueToken(
            issue_request(client.client_id, secret=client.secret)
        )
    assert await scene.events() == before


async def test_settings_say_how_long_it_is_kept(tmp_path: Path) -> None:
    await migrated(tmp_path)
    file = tmp_path / "authsvc.db"
    for days, kept in ((30.0, 1), (1.0, 0)):
        app = await open_app(settings_for(tmp_path, housekeeping=Housekeeping(audit_days=days)))
        await app._store.audit.refused(Reason.INSUFFICIENT_SCOPE)
        await by_hand(file, "UPDATE audit SET create_time = create_time - 86400 * 2")
        await app.housekeeping.run_once()
        rows = [event.outcome for event in await app._store.audit.page(ANY, None, 10)]
        await app._store.close()
        assert rows == [AuditOutcome.REFUSED] * kept


# --- listed ---


@dataclass
class Listed:
    """ListAuditEvents as it is asked."""

    server: Running

    async def page(self, **asked: Any) -> audit_pb2.ListAuditEventsResponse:
        stub = AuditServiceStub(self.server.channel(ADMIN))
        return await stub.ListAuditEvents(audit_pb2.ListAuditEventsRequest(**asked))

    async def all(self, size: int = 0, **asked: Any) -> list[audit_pb2.AuditEvent]:
        found: list[audit_pb2.AuditEvent] = []
        token = ""
        while True:
            page = await self.page(page_size=size, page_token=token, **asked)
            found += page.audit_events
            token = page.next_page_token
            if not token:
                return found
            assert len(page.audit_events) == (size or 50)


async def test_list_is_complete_on_pages_of_any_size(server: Running, scene: Scene) -> None:
    listed = Listed(server)
    for _ in range(3):
        await scene.user()
    every = await listed.all(200)
    ids = [event.audit_event_id for event in every]
    assert ids == [event.audit_event_id for event in await scene.events()]
    assert len(set(ids)) == len(ids)
    for size in (7, 0):
        assert await listed.all(size) == every
    times = [(e.create_time.seconds, e.create_time.nanos) for e in every]
    assert times == sorted(times, reverse=True)


async def test_list_is_filtered_and_says_everything(server: Running, scene: Scene) -> None:
    listed = Listed(server)
    user_id, _ = await scene.user()
    await scene.call("DisableUser", user_id=user_id, comment="left")
    fields: dict[str, Any] = {
        "user": {"user_id": user_id, "email": "x@y.test"},
        "update_mask": {"paths": ["email"]},
    }
    changed = await scene.call("UpdateUser", **fields)
    updated, disabled, created = await listed.all(subject=user_id)
    assert [e.action for e in (updated, disabled, created)] == [
        "UpdateUser",
        "DisableUser",
        "CreateUser",
    ]
    assert updated.update_mask.paths == ["email"]
    assert not disabled.HasField("update_mask")
    assert disabled.comment == "left"
    assert updated.revision == changed.revision
    assert updated.outcome == audit_pb2.AUDIT_OUTCOME_SUCCEEDED
    assert (updated.actor, updated.peer, updated.address) == (ADMIN_ID, ADMIN_ID, "127.0.0.1")
    assert updated.x_request_id == "call-UpdateUser"
    assert await listed.all(subject=user_id, action="DisableUser") == [disabled]
    assert await listed.all(subject=user_id, actor="nobody") == []
    assert await listed.all(subject=user_id, start_time=disabled.create_time) == [
        updated,
        disabled,
    ]
    assert await listed.all(subject=user_id, end_time=disabled.create_time) == [created]
    assert await listed.all(subject=user_id, outcome=audit_pb2.AUDIT_OUTCOME_REFUSED) == []
    every = await listed.all(200)
    refused = await listed.all(200, outcome=audit_pb2.AUDIT_OUTCOME_REFUSED)
    assert refused == [e for e in every if e.reason]
    client = await scene.client()
    approved, registered = await listed.all(client_id=client.client_id)
    assert (approved.action, registered.action) == ("ApproveClient", "RegisterClient")


async def test_page_token_is_good_for_its_filter_alone(server: Running, scene: Scene) -> None:
    listed = Listed(server)
    for _ in range(3):
        await scene.user()
    page = await listed.page(page_size=2, action="CreateUser")
    assert page.next_page_token
    for wrong in (
        {"action": "DeleteUser", "page_token": page.next_page_token},
        {"page_token": page.next_page_token},
        {"action": "CreateUser", "page_token": page.next_page_token[:-1]},
        {"action": "CreateUser", "page_token": "x"},
    ):
        assert await reason(listed.page(**wrong)) == "PAGE_TOKEN_INVALID"
    assert (await listed.page(action="CreateUser", page_token=page.next_page_token)).audit_events


@pytest.mark.parametrize(
    "asked",
    [
        {"page_size": 201},
        {"page_size": -1},
        {"actor": "x" * 2049},
        {"subject": "x" * 65},
        {"action": "a\0b"},
        {"outcome": 7},
        {"start_time": {"seconds": -1}},
    ],
    ids=str,
)
async def test_list_that_is_asked_wrongly(server: Running, asked: dict[str, Any]) -> None:
    assert await reason(Listed(server).page(**asked)) == "FIELD_INVALID"


# --- last of all ---


async def test_no_secret_is_in_the_table(server: Running, scene: Scene) -> None:
    """After all tests above it, or those of them that ran."""
    _, username = await scene.user()
    for method in ("RegisterClient", "CreateApiKey", "ResetPassword", "CreateInitialAccessToken"):
        plan = await ROWS[method](scene)
        scene.secrets |= {*plan.secrets}
        await scene.call(method, who=plan.who, **plan.fields)
    issued = await scene.people.login(username)
    scene.secrets |= {issued.access_token, issued.refresh_token, PASSWORD, NEW_PASSWORD}
    rows = await scene.sql("SELECT * FROM audit")
    text = "\n".join(str(row) for row in rows)
    assert len(rows) > 10
    assert len(scene.secrets) > 5
    assert not [secret for secret in scene.secrets if secret and secret in text]
    assert "asvc_" not in text
    assert "eyJ" not in text
    assert "argon2" not in text
