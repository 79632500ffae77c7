"""RevokeToken over the wire: who may, what is written, and that OK means durable."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from authsvc.errors import AuthError, Reason
from authsvc.store.port import Change, Done, FeedPage, Store
from authsvc_client.core.markers import Marker
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ADMIN,
    Member,
    Running,
    failure,
    hand_clock,
    identity,
    outcome,
    reason,
    running,
    start,
    until,
)

ORDERS = "https://orders.test"
TOKEN_DEAD = auth_pb2.MARKER_KIND_TOKEN_DEAD


async def _scene(server: Running) -> tuple[Member, Member]:
    """A client with tokens, and the owner of their audience."""
    owner = await server.member("owner", "validate")
    await server.resource(ORDERS, "orders.read", owner=owner.client_id)
    return await server.member("client", "orders.read"), owner


def _by(token: str, **more: Any) -> auth_pb2.RevokeTokenRequest:
    return auth_pb2.RevokeTokenRequest(token=token, **more)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return {}
    template = request.getfixturevalue("migrated_url")
    return {"url": template}


async def test_owner_revokes_by_certificate_and_it_bites_at_once(
    tmp_path: Path, place: dict[str, Any]
) -> None:
    async with running(tmp_path, **place) as server:
        client, owner = await _scene(server)
        issued, kept = await server.token(client), await server.token(client)
        assert await server.judged(owner.who, issued.access_token, of=client.who) == "OK"
        head = await server.head()
        answer = await server.auth(client.who).RevokeToken(_by(issued.access_token))
        assert await server.judged(owner.who, issued.access_token, of=client.who) == (
            "TOKEN_REVOKED"
        )
        assert answer.revision == head + 1 == await server.head()
        dead = auth_pb2.RevokedObject(kind=TOKEN_DEAD, id=issued.jti)
        assert list(answer.revoked) == [dead]
        # Once more is fine, and writes nothing.
        again = await server.auth(client.who).RevokeToken(_by(issued.access_token))
        assert again == auth_pb2.RevokeTokenResponse()
        assert await server.head() == answer.revision
        assert await server.judged(owner.who, kept.access_token, of=client.who) == "OK"


async def test_revoked_stays_revoked_over_a_restart_of_everything(
    tmp_path: Path, place: dict[str, Any]
) -> None:
    """faults.md I3: observed dead is never alive again."""
    async with running(tmp_path, **place) as server:
        client, owner = await _scene(server)
        lost, kept = await server.token(client), await server.token(client)
        await server.auth(client.who).RevokeToken(_by(lost.access_token))
        suspended = await server.member("suspended", "orders.read")
        cut_off = await server.token(suspended)
        await server.suspend(suspended.client_id)
        head = await server.head()
    async with running(tmp_path, **place) as server:
        assert await server.head() == head
        for who, token, told in (
            (client.who, lost, "TOKEN_REVOKED"),
            (client.who, kept, "OK"),
            (suspended.who, cut_off, "TOKEN_CUT_OFF"),
        ):
            assert await server.judged(owner.who, token.access_token, of=who) == told


async def test_owner_revokes_by_secret_over_any_connection(server: Running) -> None:
    await server.resource("https://secret.test", "secret.read")
    client = await server.member("by_secret", "secret.read", secret=True)
    other = await server.member("other_secret", "secret.read", secret=True)
    await server.token(other, secret=True)  # the first use of a secret is written
    gateway = await server.member("gateway_secret", "validate", validates=["*"])
    token = (await server.token(client, secret=True)).access_token
    auth, head = server.auth(identity("stranger")), await server.head()

    def request(member: Member, secret: str) -> auth_pb2.RevokeTokenRequest:
        credential = auth_pb2.ClientCredential(client_secret=secret)
        return _by(token, client_id=member.client_id, client_credential=credential)

    for member, secret, expected in (
        (client, other.secret, "CLIENT_AUTHENTICATION_FAILED"),
        (other, client.secret, "CLIENT_AUTHENTICATION_FAILED"),
        (other, other.secret, "TOKEN_NOT_OWNED"),
    ):
        assert await reason(auth.RevokeToken(request(member, secret))) == expected
    assert await server.head() == head
    assert await server.judged(gateway.who, token) == "OK"
    assert (await auth.RevokeToken(request(client, client.secret))).revision == head + 1
    assert await server.judged(gateway.who, token) == "TOKEN_REVOKED"


async def test_credential_without_its_client_is_a_fault_of_the_request(server: Running) -> None:
    client = await server.member("nameless", "validate", secret=True)
    credential = auth_pb2.ClientCredential(client_secret=client.secret)
    request = _by("x", client_credential=credential)
    refused = await failure(server.auth(client.who).RevokeToken(request))
    assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("client_id",))
    request.client_id = client.client_id
    assert await outcome(server.auth(client.who).RevokeToken(request)) == "OK"


async def test_another_clients_token_is_refused_and_nothing_is_written(server: Running) -> None:
    await server.resource("https://own.test", "own.read")
    client = await server.member("owning", "own.read")
    other = await server.member("other", "own.read", "validate", validates=["*"])
    token = (await server.token(client)).access_token
    head = await server.head()
    for call in (
        server.auth(other.who).RevokeToken(_by(token)),
        server.auth(other.who).RevokeToken(_by(token, client_id=other.client_id)),
        server.auth(other.who).RevokeToken(_by(token, validate_only=True)),
        server.auth(ADMIN).RevokeToken(_by(token)),
    ):
        assert await reason(call) == "TOKEN_NOT_OWNED"
    stolen = server.auth(other.who).RevokeToken(_by(token, client_id=client.client_id))
    assert await reason(stolen) == "CLIENT_AUTHENTICATION_FAILED"
    assert await server.head() == head
    assert await server.judged(other.who, token, of=client.who) == "OK"
    assert await outcome(server.auth(client.who).RevokeToken(_by(token))) == "OK"


async def test_by_jti_administrators_alone(server: Running) -> None:
    await server.resource("https://jti.test", "jti.read")
    client = await server.member("jti_client", "jti.read")
    deputy = await server.member("deputy", "admin", "validate", validates=["*"])
    tokens = [await server.token(client) for _ in range(3)]
    head = await server.head()
    for who, expected in (
        (client.who, "INSUFFICIENT_SCOPE"),
        (identity("stranger"), "CALLER_UNKNOWN"),
    ):
        request = auth_pb2.RevokeTokenRequest(jti=tokens[0].jti)
        assert await reason(server.auth(who).RevokeToken(request)) == expected
    assert await server.head() == head
    for who, token in ((ADMIN, tokens[0]), (deputy.who, tokens[1])):
        request = auth_pb2.RevokeTokenRequest(jti=token.jti, validate_only=True)
        answer = await server.auth(who).RevokeToken(request)
        dead = auth_pb2.RevokedObject(kind=TOKEN_DEAD, id=token.jti)
        assert (answer.revision, list(answer.revoked)) == (0, [dead])
        assert await server.judged(deputy.who, token.access_token, of=client.who) == "OK"
        request.validate_only = False
        answer = await server.auth(who).RevokeToken(request)
        assert answer.revision == head + 1 == await server.head()
        head += 1
        assert await server.judged(deputy.who, token.access_token, of=client.who) == (
            "TOKEN_REVOKED"
        )
    assert await server.judged(deputy.who, tokens[2].access_token, of=client.who) == "OK"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"jti": ""},
        {"jti": "x", "client_id": "y"},
        {"jti": "x", "client_credential": {"client_secret": "y"}},
    ],
    ids=str,
)
async def test_target_that_is_none_is_refused(server: Running, fields: dict[str, Any]) -> None:
    head = await server.head()
    request = auth_pb2.RevokeTokenRequest(**fields)
    refused = await failure(server.auth(ADMIN).RevokeToken(request))
    assert refused.reason == "FIELD_INVALID"
    assert refused.fields
    assert await server.head() == head
    nearest = auth_pb2.RevokeTokenRequest(jti="x", validate_only=True)
    assert await outcome(server.auth(ADMIN).RevokeToken(nearest)) == "OK"


async def test_what_is_no_live_token_of_ours_is_fine_and_writes_nothing(tmp_path: Path) -> None:
    """RFC 7009 section 2.2."""
    async with running(tmp_path, clock=hand_clock()) as server:
        client, _ = await _scene(server)
        expired = (await server.token(client)).access_token
        await server.advance(331)
        good = (await server.token(client)).access_token
        claims = jwt.decode(good, options={"verify_signature": False})
        headers = {**jwt.get_unverified_header(good)}
        forged = jwt.encode(
            claims, ec.generate_private_key(ec.SECP256R1()), "ES256", headers=headers
        )
        head = await server.head()
        for text in ("", "x", "a.b.c", good + "=", "A" * 9000, expired, forged, "é"):
            for more in ({}, {"validate_only": True}, {"token_type_hint": "refresh_token"}):
                answer = await server.auth(client.who).RevokeToken(_by(text, **more))
                assert answer == auth_pb2.RevokeTokenResponse()
        assert await server.head() == head
        for hint in ("refresh_token", "nonsense", ""):
            request = _by(good, token_type_hint=hint, validate_only=True)
            answer = await server.auth(client.who).RevokeToken(request)
            assert [found.id for found in answer.revoked] == [claims["jti"]]
            assert answer.revision == 0
        assert await server.head() == head
        answer = await server.auth(client.who).RevokeToken(_by(good, token_type_hint="nonsense"))
        assert answer.revision == head + 1


async def test_whoever_asks_is_authenticated_before_the_token_is_looked_at(
    server: Running,
) -> None:
    """RFC 7009 section 2.1: no oracle for strangers."""
    await server.resource("https://oracle.test", "oracle.read")
    client = await server.member("oracle", "oracle.read")
    token = (await server.token(client)).access_token
    for text in (token, "garbage"):
        stranger = server.auth(identity("stranger")).RevokeToken(_by(text))
        assert await reason(stranger) == "CALLER_UNKNOWN"


async def test_client_that_is_not_let_in_may_still_revoke_what_it_holds(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        await server.resource(ORDERS, "orders.read")
        gateway = await server.member("gateway", "validate", validates=["*"])
        client = await server.member("client", "orders.read", approve=False)
        end = {"seconds": int(server.clock.wall()) + 60}
        await server.approve(client.client_id, approval_expire_time=end)
        token = (await server.token(client)).access_token
        await server.advance(61)
        assert await server.judged(gateway.who, token, of=client.who) == "OK"
        request = _by(token, client_id=client.client_id)
        assert (await server.auth(client.who).RevokeToken(request)).revision
        assert await server.judged(gateway.who, token, of=client.who) == "TOKEN_REVOKED"


# --- when the store fails ---


class BrokenFeed:
    """A feed whose writes fail as they are told to."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._feed = store.feed
        self.failure: BaseException | None = None
        self.after_commit = False
        self.gate: asyncio.Event | None = None
        self.entered = 0

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        self.entered += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None and not self.after_commit:
            raise self.failure
        revision = await self._feed.append(changes, done)
        if self.failure is not None:
            raise self.failure
        return revision

    async def read(self, cursor: int) -> FeedPage:
        return await self._feed.read(cursor)

    def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        return self._feed.pieces(head, rows)

    async def begin(self, page: FeedPage) -> None:
        await self._feed.begin(page)

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        await self._feed.raise_epoch(page, above, cut_off=cut_off)

    async def beat(self, every_s: float) -> None:
        await self._feed.beat(every_s)

    async def fence(self) -> int:
        return await self._feed.fence()

    async def close(self) -> None:
        await self.store.close()


def _broken() -> tuple[list[BrokenFeed], Any]:
    made: list[BrokenFeed] = []

    def wrap(store: Store) -> Store:
        made.append(BrokenFeed(store))
        return replace(store, feed=made[0])

    return made, wrap


@pytest.mark.parametrize(
    ("failing", "committed", "told"),
    [
        (AuthError(Reason.STORE_UNAVAILABLE, cause="password=hunter2"), False, "STORE_UNAVAILABLE"),
        (AuthError(Reason.COMMIT_UNKNOWN, cause="password=hunter2"), False, "COMMIT_UNKNOWN"),
        (AuthError(Reason.COMMIT_UNKNOWN, cause="password=hunter2"), True, "COMMIT_UNKNOWN"),
        (RuntimeError("password=hunter2"), False, "INTERNAL"),
    ],
    ids=["before", "at_commit", "after_commit", "a_fault"],
)
async def test_revocation_that_is_not_known_to_be_durable_is_not_ok(
    tmp_path: Path, failing: BaseException, committed: bool, told: str
) -> None:
    """CVE-2020-15223."""
    feeds, wrap = _broken()
    async with running(tmp_path, clock=hand_clock(), wrap=wrap) as server:
        client, owner = await _scene(server)
        token = (await server.token(client)).access_token
        feeds[0].failure, feeds[0].after_commit = failing, committed
        refused = await failure(server.auth(client.who).RevokeToken(_by(token)))
        assert refused.reason == told
        assert "hunter2" not in f"{refused}"
        await server.app.follow.poll()
        state = await server.judged(owner.who, token, of=client.who)
        assert state == ("TOKEN_REVOKED" if committed else "OK")
        feeds[0].failure = None
        assert await outcome(server.auth(client.who).RevokeToken(_by(token))) == "OK"
        assert await server.judged(owner.who, token, of=client.who) == "TOKEN_REVOKED"


async def test_caller_that_goes_away_does_not_undo_the_revocation(tmp_path: Path) -> None:
    feeds, wrap = _broken()
    async with running(tmp_path, clock=hand_clock(), wrap=wrap) as server:
        client, owner = await _scene(server)
        tokens = [(await server.token(client)).access_token for _ in range(3)]
        feeds[0].gate = asyncio.Event()
        calls = [server.auth(client.who).RevokeToken(_by(token)) for token in tokens]
        running_calls = [asyncio.ensure_future(_wait(call)) for call in calls]
        await until(lambda: feeds[0].entered)
        for call in calls[:2]:
            call.cancel()
        late = server.auth(client.who).RevokeToken(_by(tokens[2]), timeout=0.2)
        assert await reason(late) == "DEADLINE_EXCEEDED"
        feeds[0].gate.set()
        for task in running_calls[:2]:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await running_calls[2]
        head = (await feeds[0].read(0)).head
        await until(lambda: server.app.state.revision == head)
        told = [await server.judged(owner.who, token, of=client.who) for token in tokens]
        assert told[0] == "TOKEN_REVOKED"  # its transaction had begun
        assert told[2] == "TOKEN_REVOKED"


async def _wait(call: Any) -> Any:
    return await call


async def test_concurrent_revocations_all_bite(server: Running) -> None:
    await server.resource("https://many.test", "many.read")
    client = await server.member("many", "many.read")
    gateway = await server.member("many_gateway", "validate", validates=["*"])
    tokens = [(await server.token(client)).access_token for _ in range(50)]
    before = await server.head()
    await asyncio.gather(
        *(_wait(server.auth(client.who).RevokeToken(_by(token))) for token in tokens)
    )
    told = [await server.judged(gateway.who, token, of=client.who) for token in tokens]
    assert set(told) == {"TOKEN_REVOKED"}
    assert before < await server.head() <= before + 50


async def test_store_that_is_gone_is_told_and_heals(tmp_path: Path) -> None:
    """A real database whose file cannot be written: nothing says OK meanwhile."""
    server = await start(tmp_path)
    try:
        client, owner = await _scene(server)
        token = (await server.token(client)).access_token
        with contextlib.closing(sqlite3.connect(tmp_path / "authsvc.db")) as holder:
            holder.isolation_level = None
            holder.execute("BEGIN IMMEDIATE")
            refused = await failure(server.auth(client.who).RevokeToken(_by(token)))
            assert refused.code == "UNAVAILABLE"
            assert refused.reason in ("STORE_UNAVAILABLE", "COMMIT_UNKNOWN")
            assert "sqlite" not in f"{refused}".lower()
            assert await server.judged(owner.who, token, of=client.who) == "OK"
            holder.execute("ROLLBACK")
        assert await outcome(server.auth(client.who).RevokeToken(_by(token))) == "OK"
        assert await server.judged(owner.who, token, of=client.who) == "TOKEN_REVOKED"
    finally:
        await server.close()


async def test_suspension_cuts_off_at_once_and_resuming_revives_nothing(server: Running) -> None:
    await server.resource("https://cut.test", "cut.read")
    client = await server.member("cut", "cut.read")
    gateway = await server.member("cut_gateway", "validate", validates=["*"])
    old = (await server.token(client)).access_token
    await server.suspend(client.client_id)
    assert await server.judged(gateway.who, old, of=client.who) == "TOKEN_CUT_OFF"
    await server.clients().ResumeClient(clients_pb2.ResumeClientRequest(client_id=client.client_id))
    assert await server.judged(gateway.who, old, of=client.who) == "TOKEN_CUT_OFF"
    new = (await server.token(client)).access_token
    assert await server.judged(gateway.who, new, of=client.who) == "OK"
