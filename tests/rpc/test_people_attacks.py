"""Attacks on people: on their tokens, their passwords, the throttle before these, and the audit."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import argon2
import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from authsvc.config import Grants
from authsvc.rpc.pipeline import REFUSALS_MAX
from authsvc.rpc.policy import rule_of
from authsvc.rpc.server import SERVICES
from authsvc.telemetry import Counter
from authsvc_client.v1 import audit_pb2, auth_pb2, clients_pb2, resources_pb2, roles_pb2, users_pb2
from authsvc_client.v1.audit_pb2_grpc import AuditServiceStub
from tests.harness import (
    ADMIN,
    CA,
    ISSUER,
    SECOND_CA,
    TIMEOUT_S,
    Member,
    Running,
    build,
    hand_clock,
    identity,
    migrate,
    outcome,
    raw_unary,
    reason,
    running,
    spiffe,
    until,
)
from tests.people import (
    API,
    CHEAP,
    NEW_PASSWORD,
    PASSWORD,
    People,
    enter,
    people,
    self_service,
)
from tests.rpc.test_passwords import hashes
from tests.servers import Postgres


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as scene:
        yield scene


@pytest.fixture
async def still(tmp_path: Path) -> AsyncIterator[People]:
    """Time stands still."""
    async with people(tmp_path, clock=hand_clock()) as scene:
        yield scene


async def audited(server: Running, **wanted: Any) -> list[audit_pb2.AuditEvent]:
    stub: Any = AuditServiceStub(server.channel(ADMIN))
    request = audit_pb2.ListAuditEventsRequest(page_size=200, **wanted)
    return list((await stub.ListAuditEvents(request)).audit_events)


async def guess(at: People, username: str, password: str = "wrong") -> str:
    request = at.login_request(username, password)
    return await outcome(at.server.auth(at.app.who).IssueToken(request))


# --- a person's token as another's ---


async def test_persons_token_is_nobodys_else(at: People) -> None:
    """Over its client's connection, over an administrator's, over a stranger's."""
    await at.user("ada")
    own = await at.login("ada", resources=[ISSUER])
    metadata = self_service(own.access_token)
    stranger = identity("stranger")
    for service in SERVICES:
        for method in service.methods:
            if rule_of(method).public or method.server_streaming:
                continue
            request = GetMessageClass(method.input_type)()
            for who in (at.app.who, ADMIN, stranger):
                call = raw_unary(at.server.channel(who), f"/{service.full_name}/{method.name}")
                told = await outcome(call(request.SerializeToString(), metadata=metadata))
                assert told == "INSUFFICIENT_SCOPE", method.full_name


async def test_persons_token_authenticates_no_client(at: People) -> None:
    await at.user("ada")
    own = await at.login("ada", resources=[ISSUER])
    metadata, stranger = self_service(own.access_token), identity("stranger")
    auth = at.server.auth(stranger)
    request = at.login_request("ada")
    assert await outcome(auth.IssueToken(request, metadata=metadata)) != "OK"
    refreshing = auth_pb2.RefreshTokenRequest(
        refresh_token=own.refresh_token, client_id=at.app.client_id
    )
    assert await outcome(auth.RefreshToken(refreshing, metadata=metadata)) != "OK"
    revoking = auth_pb2.RevokeTokenRequest(token=own.refresh_token)
    assert await outcome(auth.RevokeToken(revoking, metadata=metadata)) == "TOKEN_NOT_OWNED"
    clients = at.server.clients(stranger)
    making = clients_pb2.CreateApiKeyRequest(api_key=clients_pb2.ApiKey(client_id=at.app.client_id))
    assert await outcome(clients.CreateApiKey(making, metadata=metadata)) == "CLIENT_NOT_FOUND"
    making.api_key.client_id = ""
    assert await outcome(clients.CreateApiKey(making, metadata=metadata)) == "FIELD_INVALID"
    by_secret = [clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_BASIC]
    registering = auth_pb2.RegisterClientRequest(
        metadata=clients_pb2.ClientMetadata(
            client_name="mine", scopes=["api.read"], token_endpoint_auth_methods=by_secret
        )
    )
    told = await outcome(auth.RegisterClient(registering, metadata=metadata))
    assert told == "REGISTRATION_NOT_ALLOWED"


async def test_third_party_never_speaks_to_authsvc_for_a_person(at: People) -> None:
    await at.user("ada")
    login = await at.login("ada")
    own = await at.exchange(login.access_token, by=at.app, resources=[ISSUER])
    lent = await at.exchange(login.access_token)
    for token in (login.access_token, lent.access_token, own.access_token):
        for refreshable in (False, True):
            for by in (at.partner, at.other):
                call = at.exchange(token, by=by, refreshable=refreshable, resources=[ISSUER])
                assert await outcome(call) in ("INVALID_TARGET", "INVALID_GRANT")
    granted = await at.exchange(login.access_token, refreshable=True)
    refreshing = auth_pb2.RefreshTokenRequest(
        refresh_token=granted.refresh_token, client_id=at.partner.client_id, resources=[ISSUER]
    )
    auth = at.server.auth(at.partner.who)
    assert await outcome(auth.RefreshToken(refreshing)) == "INVALID_TARGET"


# --- the throttle ---


@pytest.mark.parametrize(
    "variants",
    [
        ["ada", "ADA", "Ada", "\uff41\uff44\uff41", "\u1d43da", "a\u2146a", "AD\uff21", "\u24d0da"],
        ["stra\u00dfe", "STRASSE", "strasse", "stra\u1e9ee", "\uff53trasse", "\u017ftrasse"],
        ["\u00e5sa", "a\u030asa", "\u212bsa", "A\u030aSA"],
    ],
)
async def test_another_spelling_is_the_same_account(still: People, variants: list[str]) -> None:
    await still.user(variants[0])
    told = [await guess(still, variants[n % len(variants)]) for n in range(8)]
    assert told == ["INVALID_GRANT"] * 5 + ["RATE_LIMITED"] * 3
    assert await guess(still, variants[-1], PASSWORD) == "RATE_LIMITED"


async def test_guess_that_is_given_up_is_a_guess(
    still: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hangs up while it is looked at learns nothing, and not for free."""
    await still.user("ada")
    begun, go_on = threading.Event(), threading.Event()
    verify = argon2.PasswordHasher.verify

    def slow(self: argon2.PasswordHasher, stored: Any, password: Any) -> bool:
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        return verify(self, stored, password)

    given_up = still.server.app.metrics.calls.labels(
        "authsvc.v1.AuthService.IssueToken", "CANCELLED"
    )
    with monkeypatch.context() as patched:
        patched.setattr(argon2.PasswordHasher, "verify", slow)
        for number in range(5):
            begun.clear()
            go_on.clear()
            auth = still.server.auth(still.app.who)
            call: Any = auth.IssueToken(still.login_request("ada", "wrong"))
            await until(begun.is_set)
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call
            await until(partial(_is_above, given_up, number))
            go_on.set()
    assert await guess(still, "ada", PASSWORD) == "RATE_LIMITED"


def _is_above(counter: Counter, number: int) -> bool:
    return counter.value > number


async def test_call_that_is_given_up_anywhere_costs_a_guess_at_most(still: People) -> None:
    await still.user("ada")
    auth = still.server.auth(still.app.who)
    with hashes() as calls:
        for number in range(40):
            call: Any = auth.IssueToken(still.login_request("ada", "wrong"))
            await asyncio.sleep(number * 0.0005)
            call.cancel()
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await call
    assert len(calls) <= 5
    assert await guess(still, "ada", PASSWORD) == "RATE_LIMITED"


async def test_failures_of_a_busy_client_are_forgotten(still: People) -> None:
    """One of its people in ten seconds mistypes: that is no attack on all of them."""
    await still.user("ada")
    for number in range(120):
        assert await guess(still, f"user {number}") == "INVALID_GRANT"
        await still.server.advance(10)
        assert await guess(still, "ada", PASSWORD) == "OK"


async def test_failures_that_are_forgotten_one_by_one_make_no_guess_cheaper(still: People) -> None:
    """Whoever guesses as often as the waits allow comes to one guess a minute, as ever."""
    guesses = 0
    for _ in range(3600 // 5):
        guesses += await guess(still, "ada") == "INVALID_GRANT"
        await still.server.advance(5)
    assert guesses <= 5 + 6 + 60


# --- what is made again ---


async def test_user_and_resource_made_again_bring_no_permission_back(at: People) -> None:
    """By a role that was limited to the resource, and kept in this process."""
    again: Any = {"owner": at.owner.client_id}
    await at.role("reader", "orders:read")
    ada = await at.user("ada")
    await at.assign("reader", ada, API)
    token = (await at.login("ada")).access_token
    full = auth_pb2.TOKEN_VIEW_FULL
    assert list((await at.verdict(token, view=full)).permissions) == ["orders:read"]
    deleting = resources_pb2.DeleteResourceRequest(resource_id=API)
    await at.server.resources().DeleteResource(deleting)
    await at.server.resource(API, "api.read", "api.write", **again)
    ref = roles_pb2.PermissionRef(resource_id=API, name="orders:read")
    permission = roles_pb2.Permission(ref=ref)
    await at.roles().CreatePermission(roles_pb2.CreatePermissionRequest(permission=permission))
    role = roles_pb2.Role(role_id="reader", permissions=[ref])
    update = build(roles_pb2.UpdateRoleRequest, role=role, update_mask={"paths": ["permissions"]})
    await at.roles().UpdateRole(update)
    assert await at.judged(token) != "OK"
    token = (await at.login("ada", scopes=["api.read"])).access_token
    assert list((await at.verdict(token, view=full)).permissions) == []
    await at.assign("reader", ada)
    assert list((await at.verdict(token, view=full)).permissions) == ["orders:read"]
    await at.user_service().DeleteUser(users_pb2.DeleteUserRequest(user_id=ada))
    assert await at.user("ada") != ada
    token = (await at.login("ada")).access_token
    assert list((await at.verdict(token, view=full)).permissions) == []


# --- the audit ---


async def test_refusals_do_not_fill_the_audit(at: People) -> None:
    await at.user("ada")
    own = await at.login("ada", resources=[ISSUER])
    listing = at.user_service(at.app.who).ListUsers
    for _ in range(100):
        request = users_pb2.ListUsersRequest()
        assert (
            await outcome(listing(request, metadata=self_service(own.access_token)))
            == "INSUFFICIENT_SCOPE"
        )
    refused = await audited(at.server, outcome=audit_pb2.AUDIT_OUTCOME_REFUSED)
    assert 0 < len(refused) <= 2 * REFUSALS_MAX  # a minute may end meanwhile


async def test_nobody_acts_under_the_name_of_another(tmp_path: Path) -> None:
    """Nor an administrator's, by a CA that makes none, nor what authsvc calls itself."""
    cas = (CA, SECOND_CA)
    async with running(tmp_path, client_cas=cas, admin_ca=CA.pin) as server:
        request = users_pb2.ResetPasswordRequest(code="x", new_password=NEW_PASSWORD)
        forged = (identity("admin", ca=SECOND_CA), identity(uris=(), dns=("authsvc",)))
        for who in (*forged, identity("stranger"), ADMIN):
            assert await reason(server.users(who).ResetPassword(request)) == "INVALID_GRANT"
        events = await audited(server, action="ResetPassword")
    told = [(event.actor, event.peer) for event in reversed(events)]
    assert told == [
        ("", spiffe("admin")),
        ("", "authsvc"),
        (spiffe("stranger"), spiffe("stranger")),
        (spiffe("admin"), spiffe("admin")),
    ]


# --- two workers ---


@asynccontextmanager
async def two_workers(directory: Path, postgres: Postgres) -> AsyncIterator[tuple[People, People]]:
    """The scene, as each of them shows it."""
    url = await postgres.database()
    await migrate(url)
    settings: dict[str, Any] = {
        "url": url,
        "grants": Grants(password=True),
        "passwords": CHEAP,
        "seal_keys": "11" * 32,
        "refresh_keys": "22" * 32,
    }
    async with running(directory / "a", **settings) as a, running(directory / "b", **settings) as b:
        at = await enter(a)
        await b.app.follow.poll()
        yield at, replace(at, server=b)


async def test_login_is_good_wherever_the_password_was_set(
    tmp_path: Path, postgres: Postgres
) -> None:
    async with two_workers(tmp_path, postgres) as (one, two):
        ada = await one.user("ada")
        for _ in range(3):
            request = users_pb2.SetPasswordRequest(user_id=ada, new_password=PASSWORD)
            await one.user_service().SetPassword(request)
            login = await two.login("ada")
            assert await two.judged(login.access_token) == "OK"
            assert await outcome(two.refresh(login.refresh_token)) == "OK"


@dataclass
class Thief:
    """Knows the password and holds tokens; what it gets while the password is changed."""

    at: People
    name: str
    login: auth_pb2.IssuedToken
    own: auth_pb2.IssuedToken
    stolen: list[tuple[Member, auth_pb2.IssuedToken]] = field(default_factory=list)

    async def steal(self) -> None:
        """Everything at once, by tokens of a session that is not kept."""
        login = self.login
        tries: list[tuple[Member, Awaitable[auth_pb2.IssuedToken]]] = [
            *((self.at.app, self.at.login(self.name)) for _ in range(3)),
            (self.at.app, self.at.refresh(login.refresh_token)),
            *((self.at.partner, self.at.exchange(login.access_token)) for _ in range(2)),
            *(
                (self.at.partner, self.at.exchange(login.access_token, refreshable=True))
                for _ in range(2)
            ),
        ]
        found = await asyncio.gather(*(each for _, each in tries), return_exceptions=True)
        for (member, _), token in zip(tries, found, strict=True):
            if isinstance(token, auth_pb2.IssuedToken):
                self.stolen.append((member, token))
            else:
                assert isinstance(token, grpc.aio.AioRpcError), repr(token)
                assert token.code() is grpc.StatusCode.UNAUTHENTICATED, repr(token)

    async def keeps(self) -> list[str]:
        """What of it is of any use."""
        kept = []
        for member, token in self.stolen:
            if token.access_token and await self.at.judged(token.access_token) == "OK":
                kept.append(f"access token of {member.client_id}")
            if token.refresh_token:
                told = await outcome(self.at.refresh(token.refresh_token, by=member))
                kept += [f"refresh token of {member.client_id}"] * (told == "OK")
        return kept


async def _by_administrator(at: People, _thief: Thief) -> None:
    request = users_pb2.SetPasswordRequest(user_id=at.users[_thief.name], new_password=NEW_PASSWORD)
    await at.user_service().SetPassword(request)


async def _by_itself(at: People, thief: Thief, *, keep: bool = False) -> None:
    request = users_pb2.SetPasswordRequest(
        current_password=PASSWORD, new_password=NEW_PASSWORD, keep_session=keep
    )
    metadata = self_service(thief.own.access_token)
    await at.user_service(at.app.who).SetPassword(request, metadata=metadata)


async def _and_stay(at: People, thief: Thief) -> None:
    await _by_itself(at, thief, keep=True)


async def _disable(at: People, thief: Thief) -> None:
    request = users_pb2.DisableUserRequest(user_id=at.users[thief.name])
    await at.user_service().DisableUser(request)


async def _by_code(at: People, thief: Thief) -> None:
    asked = users_pb2.CreatePasswordResetCodeRequest(user_id=at.users[thief.name])
    code = (await at.user_service().CreatePasswordResetCode(asked)).code
    request = users_pb2.ResetPasswordRequest(code=code, new_password=NEW_PASSWORD)
    await at.user_service(at.other.who).ResetPassword(request)


@pytest.mark.parametrize("change", [_by_administrator, _by_itself, _and_stay, _by_code, _disable])
async def test_nothing_is_stolen_while_the_password_changes(
    tmp_path: Path, postgres: Postgres, change: Callable[[People, Thief], Awaitable[None]]
) -> None:
    async with two_workers(tmp_path, postgres) as (one, two):
        got = 0
        for number in range(8):
            name = f"user {number}"
            await one.user(name)
            own = await one.login(name, resources=[ISSUER])
            thief = Thief(two, name, await one.login(name), own)
            await two.server.app.follow.poll()
            stealing = asyncio.create_task(thief.steal())
            await asyncio.sleep(number * 0.004)
            await change(one, thief)
            await stealing
            got += len(thief.stolen)
            await two.server.app.follow.poll()
            assert await thief.keeps() == [], (number, len(thief.stolen))
        assert got
