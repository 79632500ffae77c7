"""An answer that is given again is the one that judging in full would give: whatever it was made
from ends it at the very next call."""

import inspect
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from authsvc.rpc import answers, pipeline, repeats, server
from authsvc.rpc.policy import Policy
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from authsvc_client.core.reason import Reason
from authsvc_client.core.standing import Standing
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
    Running,
    build,
    identity,
    outcome,
    reason,
    running,
    thumbprint,
)

API, SCOPE = "https://api.test", "api.read"
CERTIFICATE_S = 240
BEGINS = NOW + 6 * HOUR
"""By the clock moved by hand; gRPC judges certificates by the machine's, however long tests run."""
HIDDEN = "UNSPECIFIED"
"""Not active, and nothing else is told."""
QUESTIONS: list[dict[str, Any]] = [{}, {"view": auth_pb2.TOKEN_VIEW_CLAIMS, "audience": API}]


@dataclass
class Place:
    """A server by a clock moved by hand, and where its files are."""

    server: Running
    directory: Path


@dataclass
class Scene(Place):
    """`asker` asks about the token of `holder` again and again."""

    asker: Member
    holder: Member
    token: str
    jti: str
    given: list[bool]
    """Of each answer that was kept: whether it stood."""

    def request(self, **more: Any) -> auth_pb2.ValidateTokenRequest:
        more.setdefault("presenter", {"certificate_thumbprint": thumbprint(self.holder.who)})
        return build(auth_pb2.ValidateTokenRequest, token=self.token, **more)

    async def ask(self, asker: Member | None = None, **more: Any) -> str:
        """What the asker is told, in one word."""
        call = self.server.auth((asker or self.asker).who).ValidateToken(self.request(**more))
        told = await outcome(call)
        if told != "OK":
            return told
        answer = await call
        return "OK" if answer.active else Reason(answer.reason).name

    async def warm(self, **more: Any) -> None:
        """Asks until the answer is given again."""
        for _ in range(4):
            assert await self.ask(**more) == "OK"
        assert self.given[-1:] == [True]

    async def warm_all(self) -> None:
        for more in QUESTIONS:
            await self.warm(**more)

    async def pass_time(self, seconds: float) -> None:
        await self.server.advance(seconds)


@asynccontextmanager
async def scene(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    """By a clock moved by hand; the asker's certificate ends before the token."""
    given: list[bool] = []
    real = answers._Repeat.__call__

    def seen(self: answers._Repeat, *of: Any) -> bytes | None:
        answer = real(self, *of)
        given.append(answer is not None)
        return answer

    monkeypatch.setattr(answers._Repeat, "__call__", seen)
    options: dict[str, Any] = {"client_cas": (CA, SECOND_CA), "admin_ca": CA.pin}
    async with running(directory, clock=HandClock(wall=BEGINS), **options) as server:
        who = identity("asker", span=(NOW - HOUR, BEGINS + CERTIFICATE_S))
        pinned: dict[str, Any] = {"tls_client_auth_ca": CA.pin}
        asker = await server.member("asker", "validate", who=who, **pinned)
        await server.resource(API, SCOPE, owner=asker.client_id)
        holder = await server.member("holder", SCOPE, "validate", **pinned)
        issued = await server.token(holder, SCOPE, resources=[API])
        yield Scene(server, directory, asker, holder, issued.access_token, issued.jti, given)


# --- what ends it ---


async def _revoke(at: Scene) -> None:
    await at.server.auth(ADMIN).RevokeToken(auth_pb2.RevokeTokenRequest(jti=at.jti))


async def _revoke_everything(at: Scene) -> None:
    service = RevocationServiceStub(at.server.channel(ADMIN))
    await service.RevokeEverything(revocations_pb2.RevokeEverythingRequest())


async def _hear(at: Scene) -> None:
    _kill(at, MarkerKind.TOKEN_DEAD, at.jti)


def _kill(at: Scene, kind: MarkerKind, name: str) -> None:
    """As a message of another worker: before the revision advances."""
    state, until = at.server.app.state, at.server.clock.wall() + HOUR
    state.apply((Marker(kind, marker_key(kind, name), state.revision, until),), state.revision)


async def _suspend_holder(at: Scene) -> None:
    await at.server.suspend(at.holder.client_id)


async def _suspend_asker(at: Scene) -> None:
    await at.server.suspend(at.asker.client_id)


async def _hear_of_the_key(at: Scene) -> None:
    _kill(at, MarkerKind.KEY_TAINTED, at.server.app._ring.signer.kid)


async def _lose_the_key(at: Scene) -> None:
    state = at.server.app.state
    [verifier] = state.keys.by_kid.values()
    state.replace_keys([{**verifier.jwk, "kid": "another"}])


async def _take_the_scope(at: Scene) -> None:
    await take_scopes(at, at.asker)


async def take_scopes(at: Place, of: Member) -> None:
    client = clients_pb2.Client(client_id=of.client_id)
    request = clients_pb2.UpdateClientRequest(client=client)
    request.update_mask.paths.append("metadata.scopes")
    await at.server.clients().UpdateClient(request)


async def _give_the_resource_away(at: Scene) -> None:
    await _update_resource(at, "owner_client_id", owner_client_id=at.holder.client_id)


async def _lower_the_bound(at: Scene) -> None:
    await _update_resource(at, "staleness_max", staleness_max={"seconds": 5})
    await at.warm_all()  # by the resource as it is now
    assert isinstance(at.server.clock, HandClock)
    at.server.clock.advance(6)


async def _update_resource(at: Scene, field: str, **fields: Any) -> None:
    resource = build(resources_pb2.Resource, resource_id=API, **fields)
    request = resources_pb2.UpdateResourceRequest(resource=resource)
    request.update_mask.paths.append(field)
    await at.server.resources().UpdateResource(request)


async def hear_nothing(at: Place) -> None:
    assert isinstance(at.server.clock, HandClock)
    at.server.clock.advance(121)


async def distrust_the_ca(at: Place) -> None:
    (at.directory / "clients.pem").write_bytes(SECOND_CA.pem)
    at.server.app._prepared.tls.reload()


async def outlive_the_certificate(at: Place) -> None:
    await at.server.advance(CERTIFICATE_S + 1)


async def _set_the_clock_before_the_certificate(at: Scene) -> None:
    assert isinstance(at.server.clock, HandClock)
    at.server.clock.set_wall(NOW - HOUR - 1)


async def _outlive_the_token(at: Scene) -> None:
    await at.pass_time(301 + 30)
    assert isinstance(at.server.clock, HandClock)
    at.server.clock.set_wall(BEGINS)  # where the certificate is good


Bug = tuple[Any, str, str, str]
"""Whose function, its name, a piece of it, and what stands there by mistake."""
MARKS: Bug = (Standing, "at", "if kills != self._kills", "if self._kills < 0")
KEYS: Bug = (Standing, "at", " or state.keys is not self._keys", "")
END: Bug = (Standing, "at", "now > self._until or ", "")
AGE: Bug = (Standing, "at", "state.require_fresh(boot,", "str(boot) or (")
BOUND: Bug = (Standing, "at", "verified.claims.audiences if state.staleness else ()", "()")
ROW: Bug = (Policy, "stand", "self._clients.row(grounds.key) is not grounds.client", "False")
CATALOG: Bug = (Policy, "stand", "self._catalog.held is not grounds.catalog", "False")
LOOKED: Bug = (Policy, "stand", "changes != grounds.changes", "grounds.changes < 0")
PATH: Bug = (Policy, "stand", "grounds.since <= now < grounds.until", "True")
TRUST: Bug = (repeats.Repeats, "__call__", "self._peers.trust() is not kept.trust", "False")

CHANGES: dict[str, tuple[Callable[[Scene], Awaitable[None]], str, Bug]] = {
    "token revoked": (_revoke, "TOKEN_REVOKED", MARKS),
    "everything cut off": (_revoke_everything, "TOKEN_CUT_OFF", MARKS),
    "a message of another worker": (_hear, "TOKEN_REVOKED", MARKS),
    "its client suspended": (_suspend_holder, "TOKEN_CUT_OFF", MARKS),
    "its key tainted": (_hear_of_the_key, "TOKEN_KEY_TAINTED", MARKS),
    "its key gone": (_lose_the_key, "TOKEN_KEY_UNKNOWN", KEYS),
    "its end": (_outlive_the_token, "TOKEN_EXPIRED", END),
    "the asker suspended": (_suspend_asker, "CLIENT_SUSPENDED", ROW),
    "the asker suspended, after a look": (_suspend_asker, "CLIENT_SUSPENDED", LOOKED),
    "the asker's scope gone": (_take_the_scope, "INSUFFICIENT_SCOPE", ROW),
    "another owner": (_give_the_resource_away, HIDDEN, CATALOG),
    "nothing heard for too long": (hear_nothing, "STATE_STALE", AGE),
    "nothing heard for too long there": (_lower_the_bound, "STATE_STALE", BOUND),
    "the asker's CA gone": (distrust_the_ca, "PEER_CERTIFICATE_INVALID", TRUST),
    "the asker's certificate over": (outlive_the_certificate, "PEER_CERTIFICATE_EXPIRED", PATH),
    "a clock set back": (_set_the_clock_before_the_certificate, "PEER_CERTIFICATE_EXPIRED", PATH),
}


def plant(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> None:
    owner, name, right, wrong = bug
    real = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(real))
    assert source.count(right) == 1
    made: dict[str, Any] = {}
    exec(source.replace(right, wrong), real.__globals__, made)
    monkeypatch.setattr(owner, name, made[name])


both_ways = pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted bug"])


@pytest.mark.parametrize("change", CHANGES)
@both_ways
async def test_whatever_it_was_made_from_ends_it_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, *, planted: bool
) -> None:
    happens, told, bug = CHANGES[change]
    if planted:
        plant(monkeypatch, bug)
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm_all()
        await happens(at)
        expected = "OK" if planted else told
        assert [await at.ask(**more) for more in QUESTIONS] == [expected] * len(QUESTIONS)


# --- whose it is ---


async def test_another_certificate_has_answers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        stranger = Member(identity("stranger"), "")
        renewed = Member(identity("asker"), at.asker.client_id)
        elsewhere = Member(identity("asker", ca=SECOND_CA), at.asker.client_id)
        for _ in range(4):
            assert await at.ask(at.holder) == HIDDEN
            assert await at.ask(stranger) == "CALLER_UNKNOWN"
            assert await at.ask(elsewhere) == "CALLER_UNKNOWN"
            assert await at.ask(renewed) == "OK"
        await at.warm()


async def test_the_same_question_of_another_certificate_finds_nothing_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    bug: Bug = (repeats.Repeats, "__call__", "kept.presented == shown", "True")
    plant(monkeypatch, bug)
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        assert await at.ask(at.holder) == "OK"


async def test_metadata_that_nobody_reads_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEYS_READ", frozenset())
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        auth = at.server.auth(at.asker.who)
        call = auth.ValidateToken(at.request(), metadata=(("authorization", "Bearer x"),))
        assert (await call).active


async def test_bearer_on_the_same_connection_is_judged_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        auth = at.server.auth(at.asker.who)
        for given in ("Bearer x", "Basic eDp4"):
            call = auth.ValidateToken(at.request(), metadata=(("authorization", given),))
            assert await reason(call) == "CALLER_TOKEN_INVALID"
        twice = (("authorization", "Bearer x"),) * 2
        assert await reason(auth.ValidateToken(at.request(), metadata=twice)) == (
            "AUTH_METHOD_AMBIGUOUS"
        )


async def test_same_token_in_another_question_is_another_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        for _ in range(4):
            assert await at.ask(required_scopes=["more"]) == "INSUFFICIENT_SCOPE"
            assert await at.ask(presenter=None) == "PROOF_MISSING"
            assert await at.ask(audience="https://other.test") == HIDDEN


async def test_only_what_stands_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strong answer asks the database each time, and FULL has permissions that change."""
    questions: list[dict[str, Any]] = [
        {"consistency": {"strong": {}}},
        {"view": auth_pb2.TOKEN_VIEW_FULL, "audience": API},
    ]
    async with scene(tmp_path, monkeypatch) as at:
        for more in questions:
            for _ in range(4):
                assert await at.ask(**more) == "OK"
        assert await at.ask(max_age={"seconds": 60}) != "OK"
        assert not at.given


# --- what it says ---


async def test_it_says_what_judging_in_full_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the time, which is that of the call in whole milliseconds."""
    async with scene(tmp_path, monkeypatch) as at:
        view = auth_pb2.TOKEN_VIEW_CLAIMS
        auth, request = at.server.auth(at.asker.who), at.request(view=view)
        first = await auth.ValidateToken(request)
        await at.warm(view=view)
        await _revoke_another(at)
        await at.pass_time(7)
        again = await auth.ValidateToken(request)
        assert at.given[-1]
        assert again.revision > first.revision
        took = again.check_time.ToMilliseconds() - first.check_time.ToMilliseconds()
        assert 6999 <= took <= 7001
        span = again.reusable_until.ToMilliseconds() - again.check_time.ToMilliseconds()
        assert span == 1000
        for answer in (first, again):
            for field in ("revision", "check_time", "reusable_until"):
                answer.ClearField(field)
        assert again == first


async def _revoke_another(at: Scene) -> None:
    other = await at.server.token(at.holder, SCOPE, resources=[API])
    await at.server.auth(ADMIN).RevokeToken(auth_pb2.RevokeTokenRequest(jti=other.jti))
    await at.server.head()


async def test_request_id_and_metrics_are_those_of_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, monkeypatch) as at:
        await at.warm()
        call = at.server.auth(at.asker.who).ValidateToken(
            at.request(), metadata=((pipeline.REQUEST_ID_KEY, "a-1"),)
        )
        await call
        assert dict(await call.trailing_metadata())[pipeline.REQUEST_ID_KEY] == "a-1"
        metrics = at.server.app.metrics
        method = "authsvc.v1.AuthService.ValidateToken"
        assert metrics.calls.labels(method, "OK").value == 5
        assert metrics.verdicts.labels(HIDDEN).value == 5
        assert sum(metrics.seconds.labels(method).counts) == 5


# --- how much is kept ---


async def test_replicas_share_a_question_and_the_oldest_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "ASKERS_MAX", 2)
    async with scene(tmp_path, monkeypatch) as at:
        replicas = [Member(identity("asker"), at.asker.client_id) for _ in range(3)]
        for replica in replicas[:2]:
            for _ in range(3):
                assert await at.ask(replica) == "OK"
        del at.given[:]
        assert [await at.ask(replica) for replica in replicas[:2]] == ["OK"] * 2
        assert at.given == [True] * 2
        assert [await at.ask(replicas[2]) for _ in range(2)] == ["OK"] * 2
        del at.given[:]
        assert await at.ask(replicas[0]) == "OK"
        assert not at.given
