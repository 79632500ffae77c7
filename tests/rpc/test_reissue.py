"""A token that is asked for again, in the same bytes by the same certificate, is issued by what was
found before: whatever that was ends it at the very next call."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from structlog.testing import LogCapture

from authsvc.mint import Mint
from authsvc.rpc import auth, pipeline
from authsvc.telemetry import Subject
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2, revocations_pb2
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.certs import HOUR
from tests.clocks import HandClock
from tests.harness import (
    ADMIN,
    CA,
    NOW,
    SECOND_CA,
    Member,
    identity,
    issue_request,
    outcome,
    reason,
    running,
)
from tests.rpc.test_api_keys import KEY, create
from tests.rpc.test_keys import activate, prepare
from tests.rpc.test_rate_limits import SECRET, limits
from tests.rpc.test_repeats import (
    API,
    BEGINS,
    CATALOG,
    CERTIFICATE_S,
    LOOKED,
    PATH,
    ROW,
    SCOPE,
    TRUST,
    Bug,
    Place,
    both_ways,
    distrust_the_ca,
    hear_nothing,
    outlive_the_certificate,
    plant,
    take_scopes,
)

PINNED: dict[str, Any] = {"tls_client_auth_ca": CA.pin}


@dataclass
class Scene(Place):
    """`orders` asks for the same token again and again."""

    orders: Member
    billing: Member
    """Who owns what it is for."""
    again: list[bool]
    """Of each that was issued by what was found before: whether it came to that."""

    def issue(self, who: Member | None = None, **more: Any) -> Any:
        """The call."""
        request = issue_request(self.orders.client_id, scopes=[SCOPE], resources=[API], **more)
        return self.server.auth((who or self.orders).who).IssueToken(request)

    async def ask(self, who: Member | None = None) -> str:
        """How it ends, in one word."""
        return await outcome(self.issue(who))

    async def warm(self) -> auth_pb2.IssuedToken:
        """Asks until it is issued by what was found; that token."""
        await self.issue()
        del self.again[:]
        token: auth_pb2.IssuedToken = (await self.issue()).token
        assert self.again == [True]
        return token

    async def is_alive(self, token: auth_pb2.IssuedToken) -> bool:
        """Whether authsvc finds it alive."""
        verdict = await self.server.verdict(
            self.billing.who, token.access_token, of=self.orders.who
        )
        return bool(verdict.active)


@asynccontextmanager
async def scene(
    directory: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> AsyncIterator[Scene]:
    again: list[bool] = []
    real = auth._Reissue.__call__

    def seen(self: auth._Reissue, *of: Any) -> bytes:
        again.append(False)
        answer = real(self, *of)
        again[-1] = True
        return answer

    monkeypatch.setattr(auth._Reissue, "__call__", seen)
    options: dict[str, Any] = {"client_cas": (CA, SECOND_CA), "admin_ca": CA.pin, **more}
    async with running(directory, clock=HandClock(wall=BEGINS), **options) as server:
        who = identity("orders", span=(NOW - HOUR, BEGINS + CERTIFICATE_S))
        billing = await server.member("billing", "validate", **PINNED)
        await server.resource(API, SCOPE, "api.write", owner=billing.client_id)
        orders = await server.member("orders", SCOPE, who=who, **PINNED)
        yield Scene(server, directory, orders, billing, again)


# --- what ends it ---


async def _suspend(at: Scene) -> None:
    await at.server.suspend(at.orders.client_id)


async def _delete(at: Scene) -> None:
    request = clients_pb2.DeleteClientRequest(client_id=at.orders.client_id)
    await at.server.clients().DeleteClient(request)


async def _take_the_scope(at: Scene) -> None:
    await take_scopes(at, at.orders)


async def _delete_the_resource(at: Scene) -> None:
    request = resources_pb2.DeleteResourceRequest(resource_id=API)
    await at.server.resources().DeleteResource(request)


AGE: Bug = (Mint, "begin", "state.require_fresh(started)", "started")
CHANGES: dict[str, tuple[Callable[[Scene], Awaitable[None]], str, Bug]] = {
    "the client suspended": (_suspend, "CLIENT_SUSPENDED", ROW),
    "the client suspended, after a look": (_suspend, "CLIENT_SUSPENDED", LOOKED),
    "the client deleted": (_delete, "CLIENT_AUTHENTICATION_FAILED", ROW),
    "its scope gone": (_take_the_scope, "SCOPE_NOT_ALLOWED", ROW),
    "the resource deleted": (_delete_the_resource, "SCOPE_UNKNOWN", CATALOG),
    "its CA gone": (distrust_the_ca, "PEER_CERTIFICATE_INVALID", TRUST),
    "its certificate over": (outlive_the_certificate, "PEER_CERTIFICATE_EXPIRED", PATH),
    "nothing heard for too long": (hear_nothing, "STATE_STALE", AGE),
}


@pytest.mark.parametrize("change", CHANGES)
@both_ways
async def test_whatever_it_was_made_from_ends_it_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, *, planted: bool
) -> None:
    happens, told, bug = CHANGES[change]
    if planted:
        plant(monkeypatch, bug)
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        await happens(at)
        assert await at.ask() == ("OK" if planted else told)


async def test_end_of_the_approval_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        expire_time = Timestamp(seconds=int(BEGINS) + 100)
        client = clients_pb2.Client(client_id=at.orders.client_id, approval_expire_time=expire_time)
        request = clients_pb2.UpdateClientRequest(client=client)
        request.update_mask.paths.append("approval_expire_time")
        await at.server.clients().UpdateClient(request)
        await at.warm()
        await at.server.advance(70)
        token = (await at.issue()).token
        assert at.again[-1]
        assert token.expires_in.seconds == 30
        await at.server.advance(30)
        assert await at.ask() == "CLIENT_EXPIRED"


# --- whose it is ---


async def test_another_certificate_proves_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        elsewhere = Member(identity("orders", ca=SECOND_CA), at.orders.client_id)
        renewed = Member(identity("orders"), at.orders.client_id)
        for _ in range(3):
            assert await at.ask(at.billing) == "CLIENT_AUTHENTICATION_FAILED"
            assert await at.ask(elsewhere) == "CLIENT_AUTHENTICATION_FAILED"
            assert await at.ask(renewed) == "OK"


async def test_what_is_offered_beside_the_certificate_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        for given in ("Bearer x", "Basic eDp4"):
            call = at.server.auth(at.orders.who).IssueToken(
                issue_request(at.orders.client_id, scopes=[SCOPE], resources=[API]),
                metadata=(("authorization", given),),
            )
            assert await reason(call) == "CLIENT_AUTHENTICATION_FAILED"
        assert await outcome(at.issue(secret="wrong")) == "CLIENT_AUTHENTICATION_FAILED"


async def test_other_credentials_prove_themselves_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        gateway = at.orders.who
        secret = await at.server.member(
            "", SCOPE, who=gateway, secret=True, token_endpoint_auth_methods=[SECRET]
        )
        keyed = await at.server.member("keyed", SCOPE, token_endpoint_auth_methods=KEY, **PINNED)
        value = (await create(at.server, keyed, SCOPE)).value
        for _ in range(3):
            await at.server.token(secret, SCOPE, resources=[API], secret=True)
            await at.server.auth(keyed.who).IssueToken(
                issue_request(keyed.client_id, scopes=[SCOPE], resources=[API]),
                metadata=(("authorization", f"Bearer {value}"),),
            )
        assert not at.again


# --- what it is ---


async def test_each_is_a_token_of_its_own_and_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        first = (await at.issue()).token
        warm = await at.warm()
        service = RevocationServiceStub(at.server.channel(ADMIN))
        await service.RevokeEverything(revocations_pb2.RevokeEverythingRequest())
        await at.server.advance(60)
        last = (await at.issue()).token
        assert at.again[-1]
        assert [await at.is_alive(token) for token in (first, warm, last)] == [False, False, True]
        claims = [
            jwt.decode(token.access_token, options={"verify_signature": False})
            for token in (first, warm, last)
        ]
        assert len({each.pop("jti") for each in claims}) == 3
        assert [each.pop("iat") - int(BEGINS) for each in claims] == [0, 0, 60]
        assert [each.pop("exp") - int(BEGINS) for each in claims] == [300, 300, 360]
        revisions = [each.pop("rev") for each in claims]
        assert revisions[0] == revisions[1] < revisions[2] == at.server.app.state.revision
        assert claims[0] == claims[1] == claims[2]
        assert last.jti != first.jti
        assert last.expire_time.seconds - first.expire_time.seconds == 60
        for token in (first, last):
            for field in ("access_token", "jti", "expire_time"):
                token.ClearField(field)
        assert first == last


async def test_key_that_was_activated_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        key = await prepare(at.server, "EdDSA")
        await at.server.advance(key.ready_time.seconds - BEGINS + 1)
        orders = Member(identity("orders"), at.orders.client_id)
        for _ in range(2):
            await at.issue(orders)
        await activate(at.server, key.kid)
        token = (await at.issue(orders)).token
        assert at.again[-1]
        header = jwt.get_unverified_header(token.access_token)
        assert (header["kid"], header["alg"]) == (key.kid, "EdDSA")


@pytest.mark.parametrize("field", ["token_format", "freeze_permissions"])
async def test_what_is_written_down_or_looked_up_is_issued_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        resource = resources_pb2.Resource(
            resource_id=API,
            token_format=resources_pb2.TOKEN_FORMAT_OPAQUE,
            freeze_permissions=True,
        )
        request = resources_pb2.UpdateResourceRequest(resource=resource)
        request.update_mask.paths.append(field)
        await at.server.resources().UpdateResource(request)
        for _ in range(3):
            assert await at.ask() == "OK"
        assert not at.again


# --- what is counted and told ---


async def test_rate_that_has_a_limit_counts_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch, limits=limits(tokens=3)) as at:
        told = [await at.ask() for _ in range(5)]
        assert told == ["OK"] * 3 + ["RATE_LIMITED"] * 2
        assert not at.again


async def test_who_failed_too_often_is_turned_away_from_this_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch, limits=limits(refused=3)) as at:
        await at.warm()
        wrong = [await outcome(at.issue(secret="wrong")) for _ in range(5)]
        assert wrong == ["CLIENT_AUTHENTICATION_FAILED"] * 4 + ["RATE_LIMITED"]
        assert await at.ask() == "RATE_LIMITED"
        await at.server.advance(60)
        assert await at.ask() == "OK"
        assert at.again[-1]


async def test_each_is_logged_and_counted_and_has_a_request_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = LogCapture()
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        before = structlog.get_config()
        structlog.configure(processors=[Subject("here"), lines])
        try:
            calls = [at.issue() for _ in range(2)]
            request = issue_request(at.orders.client_id, scopes=[SCOPE], resources=[API])
            mine = ((pipeline.REQUEST_ID_KEY, "a-1"),)
            calls.append(at.server.auth(at.orders.who).IssueToken(request, metadata=mine))
            answers = [(await call).token for call in calls]
            ids = [dict(await call.trailing_metadata())[pipeline.REQUEST_ID_KEY] for call in calls]
        finally:
            structlog.configure(**before)
        assert at.again[-3:] == [True] * 3
        told = [entry for entry in lines.entries if entry["event"] == "token.issued"]
        assert [entry["jti"] for entry in told] == [token.jti for token in answers]
        assert [entry["request_id"] for entry in told] == ids
        assert ids[2] == "a-1"
        assert len(set(ids)) == 3
        for entry in told:
            assert entry["client"] == at.orders.client_id
            assert entry["grant"] == "client_credentials"
            assert entry["peer"] == "spiffe://test.local/orders"
            assert entry["audiences"] == (API,)
            assert entry["method"] == "authsvc.v1.AuthService.IssueToken"
        assert not any(token.access_token in json.dumps(told) for token in answers)
        counted = at.server.app.metrics.calls.labels("authsvc.v1.AuthService.IssueToken", "OK")
        assert counted.value == 5
