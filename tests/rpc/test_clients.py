"""Clients after their registration: changed, deleted, rotated; by themselves; who may register."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import select

from authsvc.config import Registration
from authsvc.model import ClientState
from authsvc.store.sql import Database
from authsvc.store.tables import CUTOFF
from authsvc_client.core.markers import MarkerKind, marker_key
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from tests.certs import Issued
from tests.harness import (
    ADMIN,
    CA,
    Member,
    Running,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    spiffe,
)
from tests.rpc.conftest import API

if TYPE_CHECKING:
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceAsyncStub

POST = clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST
BASIC = clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_BASIC
DAY = 24 * 3600.0
PENDING, APPROVED, REJECTED, EXPIRED, SUSPENDED = (
    clients_pb2.CLIENT_STATE_PENDING,
    clients_pb2.CLIENT_STATE_APPROVED,
    clients_pb2.CLIENT_STATE_REJECTED,
    clients_pb2.CLIENT_STATE_EXPIRED,
    clients_pb2.CLIENT_STATE_SUSPENDED,
)


def stamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds))


async def client(server: Running, client_id: str) -> clients_pb2.Client:
    request = clients_pb2.GetClientRequest(client_id=client_id)
    return (await server.clients().GetClient(request)).client


async def update(
    server: Running, client_id: str, *paths: str, etag: str = "", by: Issued = ADMIN, **fields: Any
) -> clients_pb2.Client:
    """UpdateClient with a mask; metadata by name, the end of the approval by its own."""
    expires = fields.pop("approval_expire_time", None)
    paths = paths or tuple(f"metadata.{name}" for name in fields)
    request = clients_pb2.UpdateClientRequest(
        client=clients_pb2.Client(
            client_id=client_id,
            etag=etag,
            metadata=clients_pb2.ClientMetadata(**{"client_name": "n"} | fields),
            approval_expire_time=expires,
        ),
        update_mask=FieldMask(paths=paths),
    )
    return (await server.clients(by).UpdateClient(request)).client


def by_secret(server: Running, member: Member, secret: str) -> Any:
    request = issue_request(member.client_id, secret=secret)
    return server.auth(member.who).IssueToken(request)


async def alive(server: Running, token: auth_pb2.IssuedToken, of: Member) -> str:
    return await server.judged(ADMIN, token.access_token, of=of.who)


class Own:
    """A client and its registration access token."""

    def __init__(self, server: Running, who: Issued, made: auth_pb2.RegisterClientResponse) -> None:
        self.server, self.who = server, who
        self.client_id = made.client.client_id
        self.token = made.registration_access_token

    @property
    def stub(self) -> "ClientServiceAsyncStub":
        return self.server.clients(self.who)

    async def get(self) -> clients_pb2.Client:
        request = clients_pb2.GetOwnClientRequest(registration_access_token=self.token)
        return (await self.stub.GetOwnClient(request)).client

    async def update(self, client_id: str = "", **metadata: Any) -> clients_pb2.Client:
        metadata.setdefault("client_name", "own")
        request = clients_pb2.UpdateOwnClientRequest(
            registration_access_token=self.token,
            client_id=client_id or self.client_id,
            metadata=clients_pb2.ClientMetadata(**metadata),
        )
        return (await self.stub.UpdateOwnClient(request)).client

    async def delete(self) -> None:
        request = clients_pb2.DeleteOwnClientRequest(registration_access_token=self.token)
        await self.stub.DeleteOwnClient(request)


# --- changed by administrators ---


async def test_update_changes_what_the_mask_names_alone(at: Running) -> None:
    member = await at.member("app", "read", contacts=["a@b.test"], client_uri="https://old.test")
    before = await client(at, member.client_id)
    after = await update(at, member.client_id, client_uri="https://new.test", scopes=["write"])
    assert after.metadata.scopes == ["write"]
    assert after.metadata.client_uri == "https://new.test"
    assert after.metadata.contacts == before.metadata.contacts
    assert after.metadata.client_name == before.metadata.client_name == "test"
    assert after.metadata.tls_client_auth_san_uri == spiffe("app")
    assert (after.state, after.etag) == (before.state, str(int(before.etag) + 1))
    assert await client(at, member.client_id) == after


@pytest.mark.parametrize(
    "paths",
    [[], ["state"], ["client_id"], ["metadata"], ["scopes"], ["metadata.nothing"], ["metadata."]],
    ids=str,
)
async def test_a_mask_that_names_something_else_is_refused(at: Running, paths: list[str]) -> None:
    """AIP-161: unknown and output-only fields."""
    member = await at.member("app", "read")
    request = clients_pb2.UpdateClientRequest(
        client=clients_pb2.Client(
            client_id=member.client_id,
            metadata=clients_pb2.ClientMetadata(client_name="x"),
            state=REJECTED,
        ),
        update_mask=FieldMask(paths=paths),
    )
    assert await reason(at.clients().UpdateClient(request)) == "FIELD_INVALID"
    assert (await client(at, member.client_id)).etag == "2"


async def test_what_is_taken_away_cuts_off_and_what_is_added_does_not(at: Running) -> None:
    member = await at.member("app", "read")
    token = await at.token(member)
    await update(at, member.client_id, scopes=["read", "write"])
    assert await alive(at, token, member) == "OK"
    await update(at, member.client_id, client_uri="https://x.test")
    assert await alive(at, token, member) == "OK"
    await update(at, member.client_id, scopes=["write"])
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"
    token = await at.token(member)
    moved = identity("moved")
    await update(at, member.client_id, tls_client_auth_san_uri=spiffe("moved"))
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"
    request = issue_request(member.client_id)
    assert await reason(at.auth(member.who).IssueToken(request)) == "CLIENT_AUTHENTICATION_FAILED"
    await at.auth(moved).IssueToken(request)


async def test_what_is_gone_meanwhile_does_not_hold_up_other_changes(at: Running) -> None:
    await at.resource("https://gone.test", "gone.read", "gone.write")
    other = await at.member("other", "read")
    gone: dict[str, Any] = {"scopes": ["read", "gone.read"], "validates": ["https://gone.test"]}
    member = await at.register(identity("app"), may_act=other.client_id, **gone)
    client_id = member.client.client_id
    await at.approve(client_id)
    delete = clients_pb2.DeleteClientRequest(client_id=other.client_id)
    await at.clients().DeleteClient(delete)
    resource = resources_pb2.DeleteResourceRequest(resource_id="https://gone.test")
    await at.resources().DeleteResource(resource)
    end = stamp(at.clock.wall() + DAY)
    path = "approval_expire_time"
    await update(at, client_id, path, "metadata.client_uri", approval_expire_time=end)
    own = Own(at, identity("app"), member)
    same: dict[str, Any] = {
        "tls_client_auth_san_uri": spiffe("app"),
        "may_act": other.client_id,
        **gone,
    }
    assert (await own.update(**same)).state == APPROVED
    more = ["read", "gone.read", "gone.write"]
    assert await reason(update(at, client_id, scopes=more)) == "INVALID_CLIENT_METADATA"
    assert await reason(own.update(**{**same, "scopes": more})) == "INVALID_CLIENT_METADATA"
    less = await update(at, client_id, scopes=["read"], validates=[], may_act="")
    assert not less.metadata.may_act
    for again in ({"scopes": gone["scopes"]}, {"validates": gone["validates"]}):
        assert await reason(update(at, client_id, **again)) == "INVALID_CLIENT_METADATA"


async def test_from_a_certificate_to_a_secret_and_back(at: Running) -> None:
    member = await at.member("app", "read")
    changed = await update(
        at,
        member.client_id,
        *("metadata.tls_client_auth_san_uri", "metadata.token_endpoint_auth_methods"),
        "metadata.tls_client_certificate_bound_access_tokens",
        "metadata.tls_client_auth_ca",
        token_endpoint_auth_methods=[POST],
        tls_client_certificate_bound_access_tokens=False,
    )
    assert changed.metadata.WhichOneof("tls_client_auth") is None
    secret = await rotate(at, member.client_id)
    await by_secret(at, member, secret)
    back = await update(
        at,
        member.client_id,
        tls_client_auth_san_uri=spiffe("app"),
        token_endpoint_auth_methods=[clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH],
    )
    assert back.metadata.tls_client_auth_ca == CA.pin
    await at.token(member)
    assert await reason(by_secret(at, member, secret)) == "CLIENT_AUTHENTICATION_FAILED"


async def test_an_update_is_held_to_what_a_registration_is_held_to(at: Running) -> None:
    member = await at.member("app", "read")
    await at.member("other", "read")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scopes": ["nothing"]}, "INVALID_CLIENT_METADATA"),
        ({"validates": ["https://nobody.test"]}, "INVALID_CLIENT_METADATA"),
        ({"may_act": "nobody"}, "INVALID_CLIENT_METADATA"),
        ({"jwks": "{}"}, "INVALID_CLIENT_METADATA"),
        ({"tls_client_auth_san_uri": spiffe("other")}, "ALREADY_EXISTS"),
        ({"tls_client_auth_ca": "00" * 32}, "INVALID_CLIENT_METADATA"),
        ({"redirect_uris": ["https://a.test"]}, "NOT_IMPLEMENTED"),
    ]
    for fields, told in wrong:
        assert await reason(update(at, member.client_id, **fields)) == told, fields
    assert await reason(update(at, "nobody", scopes=["read"])) == "CLIENT_NOT_FOUND"
    assert await reason(update(at, member.client_id, etag="1", scopes=[])) == "ETAG_MISMATCH"
    own = update(at, member.client_id, by=member.who, scopes=["read", "admin"])
    assert await reason(own) == "INSUFFICIENT_SCOPE"
    assert (await client(at, member.client_id)).etag == "2"


async def test_of_updates_at_once_one_wins(at: Running) -> None:
    member = await at.member("app", "read")
    etag = (await client(at, member.client_id)).etag
    found = await asyncio.gather(
        *(
            outcome(update(at, member.client_id, etag=etag, software_version=str(n)))
            for n in range(32)
        )
    )
    assert sorted(found) == ["ETAG_MISMATCH"] * 31 + ["OK"]


async def test_deleted_a_client_leaves_nothing_alive(at: Running) -> None:
    member = await at.member("app", "read")
    made = await at.resource("https://own.test", "own.read", owner=member.client_id)
    token = await at.token(member)
    stale = clients_pb2.DeleteClientRequest(client_id=member.client_id, etag="1")
    assert await reason(at.clients().DeleteClient(stale)) == "ETAG_MISMATCH"
    request = clients_pb2.DeleteClientRequest(client_id=member.client_id, etag="2")
    revision = (await at.clients().DeleteClient(request)).revision
    assert revision > 0
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"
    for call in (
        at.auth(member.who).IssueToken(issue_request(member.client_id)),
        at.auth(member.who).RefreshToken(
            auth_pb2.RefreshTokenRequest(refresh_token="x", client_id=member.client_id)
        ),
    ):
        assert await reason(call) in ("CLIENT_AUTHENTICATION_FAILED", "INVALID_GRANT")
    assert await reason(client(at, member.client_id)) == "CLIENT_NOT_FOUND"
    assert await reason(at.clients().DeleteClient(request)) == "CLIENT_NOT_FOUND"
    resources = (await at.resources().ListResources(resources_pb2.ListResourcesRequest())).resources
    (own,) = (r for r in resources if r.resource_id == made.resource_id)
    assert own.owner_client_id == ""
    again = await at.member("app", "read")  # its name is free, its id is not used again
    assert again.client_id != member.client_id


# --- secrets rotated ---


async def rotate(server: Running, client_id: str, end: float | None = None) -> str:
    request = clients_pb2.RotateClientSecretRequest(
        client_id=client_id, overlap_end_time=None if end is None else stamp(end)
    )
    return (await server.clients().RotateClientSecret(request)).client_secret


async def test_a_rotated_secret_overlaps_as_long_as_was_said(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        await server.resource(API, "read")
        member = await server.member("s", "read", secret=True)
        first = member.secret
        await by_secret(server, member, first)
        second = await rotate(server, member.client_id, clock.wall() + 100)
        for secret in (first, second):
            await by_secret(server, member, secret)
        await server.advance(99)
        await by_secret(server, member, first)
        await server.advance(2)
        refused = "CLIENT_AUTHENTICATION_FAILED"
        assert await reason(by_secret(server, member, first)) == refused
        third = await rotate(server, member.client_id)
        assert await reason(by_secret(server, member, second)) == refused
        await by_secret(server, member, third)
        assert len({first, second, third}) == 3
        kept = await server.store.clients.get(member.client_id)
        assert kept is not None
        assert kept.previous_secret_digest is None
        for end in (clock.wall() - 1, clock.wall() + 31 * DAY):
            assert await reason(rotate(server, member.client_id, end)) == "FIELD_INVALID"
        no_secret = await server.member("c", "read")
        call = rotate(server, no_secret.client_id)
        assert await reason(call) == "AUTH_METHOD_NOT_REGISTERED"
        assert await reason(rotate(server, "nobody")) == "CLIENT_NOT_FOUND"


async def test_of_rotations_at_once_the_one_that_wins_is_the_secret(at: Running) -> None:
    member = await at.member("s", "read", secret=True)
    answers = await asyncio.gather(
        *(rotate(at, member.client_id) for _ in range(8)), return_exceptions=True
    )
    secrets = [answer for answer in answers if isinstance(answer, str)]
    assert secrets
    found = [await outcome(by_secret(at, member, secret)) for secret in secrets]
    assert found.count("OK") == 1


# --- states ---


async def test_what_waits_too_long_and_what_is_past_its_approval_expires(tmp_path: Path) -> None:
    clock = hand_clock()
    given = Registration(pending_days=0.1)  # certificates of tests do not live for days
    async with running(tmp_path, clock=clock, registration=given) as server:
        await server.resource(API, "read")
        waits = await server.member("waits", "read", approve=False)
        ends = await server.member("ends", "read", approve=False)
        stays = await server.member("stays", "read")
        await server.approve(ends.client_id, approval_expire_time=stamp(clock.wall() + 100))
        token = await server.token(ends)
        assert token.expires_in.seconds <= 100
        await server.advance(101)
        assert await reason(server.token(ends)) == "CLIENT_EXPIRED"
        await server.app.housekeeping.run_once()
        await server.app.follow.poll()
        assert await alive(server, token, ends) == "TOKEN_CUT_OFF"
        assert (await client(server, ends.client_id)).state == EXPIRED
        assert (await client(server, waits.client_id)).state == PENDING
        await server.advance(0.1 * DAY)
        await server.app.housekeeping.run_once()
        states = [(await client(server, member.client_id)).state for member in (waits, ends, stays)]
        assert states == [EXPIRED, EXPIRED, APPROVED]
        listed = await server.clients().ListClients(clients_pb2.ListClientsRequest(state=EXPIRED))
        assert {c.client_id for c in listed.clients} == {waits.client_id, ends.client_id}
        await server.app.follow.poll()
        assert await reason(server.token(ends)) == "CLIENT_EXPIRED"
        await server.approve(ends.client_id)
        await server.token(ends)
        assert await alive(server, token, ends) != "OK"


@pytest.mark.parametrize("moved", [False, True], ids=["before the chore", "after it"])
async def test_an_expired_client_is_so_everywhere_at_once(tmp_path: Path, moved: bool) -> None:
    clock = hand_clock()
    given = Registration(pending_days=0.1)
    async with running(tmp_path, clock=clock, registration=given) as server:
        await server.resource(API, "read")
        waits = await server.member("waits", "read", approve=False)
        both = [POST, clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH]
        who = identity("ends")
        made = await server.register(who, scopes=["read"], token_endpoint_auth_methods=both)
        ends = Member(who, made.client.client_id)
        end = stamp(clock.wall() + 0.1 * DAY)
        await server.approve(ends.client_id, approval_expire_time=end)
        token = await server.token(ends)
        await server.advance(0.1 * DAY)
        if moved:
            await server.app.housekeeping.run_once()
            await server.app.follow.poll()
        stub, now = server.clients(), clock.wall()
        for member in (waits, ends):
            assert (await client(server, member.client_id)).state == EXPIRED
            name, path = member.client_id, "approval_expire_time"
            for call in (
                stub.SuspendClient(clients_pb2.SuspendClientRequest(client_id=name)),
                stub.ResumeClient(clients_pb2.ResumeClientRequest(client_id=name)),
                update(server, name, path, approval_expire_time=stamp(now + 50)),
                rotate(server, name),
            ):
                refused = await failure(call)
                assert refused.reason == "CLIENT_STATE_CONFLICT"
                assert refused.metadata == {"state": "EXPIRED"}
        for state, expected in ((PENDING, set()), (APPROVED, set()), (EXPIRED, {waits, ends})):
            listed = await stub.ListClients(clients_pb2.ListClientsRequest(state=state))
            ids = {found.client_id for found in listed.clients}
            assert ids == {member.client_id for member in expected}
        assert await alive(server, token, ends) != "OK"
        assert await reason(server.token(ends)) == "CLIENT_EXPIRED"
        own = Own(server, ends.who, made)
        for by_itself in (own.get(), own.update(), own.delete()):
            assert await reason(by_itself) == "REGISTRATION_TOKEN_INVALID"
        for member in (waits, ends):  # what was read is approved, by its etag
            shown = await client(server, member.client_id)
            await server.approve(member.client_id, etag=shown.etag)
            await server.token(member)
        assert await alive(server, token, ends) != "OK"
        assert await reason(own.get()) == "REGISTRATION_TOKEN_INVALID"


async def test_changed_after_its_approval_ended_a_client_is_cut_off(tmp_path: Path) -> None:
    """A change that goes before the chore must not stand in for it."""
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        await server.resource(API, "read")
        member = await server.member("app", "read", approve=False)
        await server.approve(member.client_id, approval_expire_time=stamp(clock.wall() + 100))
        assert (await server.token(member)).expires_in.seconds <= 100
        await server.advance(101)
        before = await server.store.clients.get(member.client_id)
        changed = await update(server, member.client_id, client_uri="https://x.test")
        assert changed.state == EXPIRED
        after = await server.store.clients.get(member.client_id)
        assert before is not None
        assert after is not None
        assert (before.state.name, after.state.name) == ("APPROVED", "EXPIRED")
        database = Database(f"sqlite+aiosqlite:///{tmp_path / 'authsvc.db'}", clock)
        async with database.read() as connection:
            keys = (await connection.execute(select(CUTOFF.c.key))).scalars().all()
        await database.close()
        assert marker_key(MarkerKind.CUTOFF_CLIENT, member.client_id).hex() in keys


@pytest.mark.parametrize("reviewed", [False, True])
async def test_the_name_of_one_that_was_never_let_in_is_free(at: Running, reviewed: bool) -> None:
    first = await at.register(identity("name"), scopes=["read"])
    if reviewed:
        await at.approve(first.client.client_id)
        # Asks for more, by itself: it waits again, and it was let in before.
        await Own(at, identity("name"), first).update(
            scopes=["read", "write"], tls_client_auth_san_uri=spiffe("name")
        )
    assert await at.store.clients.expire(-DAY) >= 1
    again = at.register(identity("name"), scopes=["read"])
    if reviewed:
        assert await reason(again) == "ALREADY_EXISTS"
        await at.approve(first.client.client_id)
        return
    second = await again
    assert await reason(at.approve(first.client.client_id)) == "ALREADY_EXISTS"
    await at.approve(second.client.client_id)
    await at.token(Member(identity("name"), second.client.client_id))
    reject = clients_pb2.RejectClientRequest(client_id=first.client.client_id)
    await at.clients().RejectClient(reject)


# PENDING, APPROVED, REJECTED, EXPIRED, SUSPENDED
CONFLICT, DEAD = "CLIENT_STATE_CONFLICT", "REGISTRATION_TOKEN_INVALID"
BY_STATE: dict[str, tuple[str, ...]] = {
    "token": ("CLIENT_PENDING", "OK", "CLIENT_REJECTED", "CLIENT_EXPIRED", "CLIENT_SUSPENDED"),
    "show": ("OK",) * 5,
    "update": ("OK",) * 5,
    "end of approval": (CONFLICT, "OK", CONFLICT, CONFLICT, "OK"),
    "rotate": ("OK", "OK", CONFLICT, CONFLICT, "OK"),
    "own show": ("OK", "OK", DEAD, "OK", DEAD),
    "own update": ("OK", "OK", DEAD, "OK", DEAD),
    "own delete": ("OK", "OK", DEAD, "OK", DEAD),
    "delete": ("OK",) * 5,
}


@pytest.mark.parametrize("state", ClientState)
@pytest.mark.parametrize("verb", BY_STATE)
async def test_what_is_possible_in_each_state(
    server: Running, verb: str, state: ClientState
) -> None:
    made = await server.register(ADMIN, secret=True, scopes=["validate"])
    client_id, own = made.client.client_id, Own(server, ADMIN, made)
    if state in (ClientState.APPROVED, ClientState.SUSPENDED):
        await server.approve(client_id)
    if state is ClientState.SUSPENDED:
        await server.suspend(client_id)
    if state is ClientState.REJECTED:
        reject = clients_pb2.RejectClientRequest(client_id=client_id)
        await server.clients().RejectClient(reject)
    if state is ClientState.EXPIRED:
        await server.store.clients.expire(-DAY)
        await server.head()
    end = stamp(server.clock.wall() + DAY)
    delete = clients_pb2.DeleteClientRequest(client_id=client_id)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "token": lambda: by_secret(server, Member(ADMIN, client_id), made.client_secret),
        "show": lambda: client(server, client_id),
        "update": lambda: update(server, client_id, client_uri="https://x.test"),
        "end of approval": lambda: update(
            server, client_id, "approval_expire_time", approval_expire_time=end
        ),
        "rotate": lambda: rotate(server, client_id),
        "own show": own.get,
        "own update": lambda: own.update(token_endpoint_auth_methods=[POST]),
        "own delete": own.delete,
        "delete": lambda: server.clients().DeleteClient(delete),
    }
    assert await outcome(calls[verb]()) == BY_STATE[verb][state - 1]
    if "delete" not in verb:  # none of these moves it
        assert int((await client(server, client_id)).state) == state


async def test_an_approval_ends_when_an_administrator_says(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        member = await server.member("app", "validate")
        path, end = "approval_expire_time", clock.wall() + 50
        changed = await update(server, member.client_id, path, approval_expire_time=stamp(end))
        assert changed.approval_expire_time.seconds == int(end)
        past = update(server, member.client_id, path, approval_expire_time=stamp(end - 60))
        assert await reason(past) == "FIELD_INVALID"
        cleared = await update(server, member.client_id, path)
        assert not cleared.HasField("approval_expire_time")
        waits = await server.member("waits", "validate", approve=False)
        early = update(server, waits.client_id, path, approval_expire_time=stamp(end))
        assert await reason(early) == "CLIENT_STATE_CONFLICT"


async def test_may_act_is_honoured_at_an_exchange(at: Running) -> None:
    """RFC 8693 section 4.4: the one that is named may act, nobody else."""
    exchange = [1, clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE]
    good, bad = [
        await at.member(name, "read", grant_types=exchange, validates=[API])
        for name in ("good", "bad")
    ]
    shop = await at.member("shop", "read", may_act=good.client_id)
    token = await at.token(shop)
    for member, told in ((good, "OK"), (bad, "INVALID_GRANT")):
        request = auth_pb2.IssueTokenRequest(
            token_exchange=auth_pb2.TokenExchangeGrant(
                subject_token=token.access_token,
                subject_token_type="urn:ietf:params:oauth:token-type:access_token",
            ),
            client_id=member.client_id,
        )
        assert await outcome(at.auth(member.who).IssueToken(request)) == told
    assert json.loads(_payload(token.access_token))["may_act"] == {"sub": good.client_id}


def _payload(token: str) -> bytes:
    import base64

    part = token.split(".")[1]
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
