"""The agent, between a caller on its socket and a real server."""

import asyncio
import grp
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from authsvc.agent import Agent, AgentError, Place, Upstream
from authsvc_client import CLOSED, REMOTE, open_for
from authsvc_client.clock import boot, wall
from authsvc_client.v1 import auth_pb2, error_reason_pb2, resources_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from tests import certs
from tests.harness import (
    CA,
    ISSUER,
    SPAN,
    TIMEOUT_S,
    Member,
    Running,
    build,
    connect,
    failure,
    reason,
    running,
    spiffe,
    thumbprint,
    until,
)

API, OPAQUE = "https://api.test", "https://opaque.test"


class Shifted:
    """The agent's clock, which can be moved ahead of the server's."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def wall(self) -> float:
        return wall()

    def boot(self) -> float:
        return boot() + self.by_s


@dataclass
class Scene:
    """`client` has tokens of both resources; the agent is `beside`, which owns them."""

    server: Running
    client: Member
    beside: Member
    directory: Path

    def place(self) -> Path:
        return self.directory / "agent.sock"

    def upstream(self) -> Upstream:
        files = {"ca": CA.pem, "certificate": self.beside.who.pem, "key": self.beside.who.key_pem}
        for name, content in files.items():
            (self.directory / name).write_bytes(content)
        ca, certificate, key = (self.directory / name for name in files)
        return Upstream(f"localhost:{self.server.app.port}", ISSUER, ca, certificate, key)

    @asynccontextmanager
    async def agent(self, place: Place | None = None, **settings: Any) -> AsyncIterator[Agent]:
        given: dict[str, Any] = {
            "audiences": frozenset({"*"}),
            "staleness_max_s": 120.0,
            "when_stale": CLOSED,
            **settings,
        }
        made = Agent(place or Place(self.place()), self.upstream(), **given)
        await made.start()
        try:
            await made.ready()
            yield made
        finally:
            await made.stop()

    async def token(self, audience: str = API) -> str:
        return (await self.server.token(self.client, resources=[audience])).access_token

    async def revoke(self, token: str) -> None:
        request = auth_pb2.RevokeTokenRequest(token=token, client_id=self.client.client_id)
        await self.server.auth(self.client.who).RevokeToken(request)

    def asked(self, token: str, **more: Any) -> auth_pb2.ValidateTokenRequest:
        more.setdefault("presenter", {"certificate_thumbprint": thumbprint(self.client.who)})
        return build(auth_pb2.ValidateTokenRequest, token=token, **more)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    (tmp_path / "server").mkdir()
    async with running(tmp_path / "server") as server:
        # By TCP it is a server as well.
        usages = (*certs.CLIENT, ExtendedKeyUsageOID.SERVER_AUTH)
        who = certs.leaf(CA, uris=[spiffe("beside")], dns=["localhost"], span=SPAN, extended=usages)
        beside = await server.member("beside", "validate", "watch", who=who)
        await server.resource(API, "read", owner=beside.client_id)
        form = resources_pb2.TOKEN_FORMAT_OPAQUE
        await server.resource(OPAQUE, "open", owner=beside.client_id, token_format=form)
        client = await server.member("client", "read", "open")
        yield Scene(server, client, beside, tmp_path)


@asynccontextmanager
async def calling(path: Path) -> AsyncIterator[Any]:
    """A stub of a process beside the agent, which shows nothing of itself."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        yield AuthServiceStub(channel)


def validated(server: Running) -> int:
    """How many questions came to authsvc."""
    names = ("ValidateToken", "BatchValidateTokens")
    calls = server.app.metrics.calls
    return sum(calls.labels(f"authsvc.v1.AuthService.{name}", "OK").value for name in names)


async def test_it_answers_as_authsvc_does_and_asks_only_what_it_cannot_know(scene: Scene) -> None:
    live, dead, opaque = await scene.token(), await scene.token(), await scene.token(OPAQUE)
    await scene.revoke(dead)
    head = await scene.server.head()
    known = [
        scene.asked(live),
        scene.asked(live, view=auth_pb2.TOKEN_VIEW_CLAIMS, audience=API),
        scene.asked(live, required_scopes=["write"]),
        scene.asked(live, presenter={"certificate_thumbprint": "x"}),
        scene.asked(live, audience=OPAQUE),
        scene.asked(dead),
        scene.asked("garbage"),
    ]
    passed_on = [
        scene.asked(opaque),
        scene.asked(live, view=auth_pb2.TOKEN_VIEW_FULL, audience=API),
        scene.asked(live, required_permissions=["sell"], audience=API),
        scene.asked(live, consistency={"strong": {}}),
        scene.asked(live, consistency={"at_least": head + 2**40}),
        scene.asked("a.b.c.d.e"),
    ]
    there = scene.server.auth(scene.beside.who)
    async with scene.agent() as agent, calling(scene.place()) as here:
        await until(lambda: agent.local.state.revision >= head)
        for request in (*known, *passed_on):
            before = validated(scene.server)
            told = [await _told(stub, request) for stub in (here, there)]
            assert told[0] == told[1], request
            asked = validated(scene.server) - before - (told[1][0] == "verdict")
            assert (asked > 0) == (request in passed_on and told[0][0] == "verdict"), request
        batch = auth_pb2.BatchValidateTokensRequest(requests=[*known, *passed_on])
        results = [(await stub.BatchValidateTokens(batch)).results for stub in (here, there)]
        assert list(map(_bare, results[0])) == list(map(_bare, results[1]))


def _bare(result: auth_pb2.BatchValidateTokensResult) -> tuple[str, ...]:
    if result.HasField("error"):
        return (error_reason_pb2.ErrorReason.Name(result.error.reason),)
    verdict = result.verdict
    name = error_reason_pb2.ErrorReason.Name(verdict.reason)
    return (str(verdict.active), name, *verdict.missing_scopes, verdict.claims.jti)


async def _told(stub: Any, request: auth_pb2.ValidateTokenRequest) -> tuple[str, ...]:
    try:
        verdict = await stub.ValidateToken(request, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return ("error", await reason(stub.ValidateToken(request, timeout=TIMEOUT_S)))
    result = auth_pb2.BatchValidateTokensResult(verdict=verdict)
    return ("verdict", *_bare(result))


async def test_revocation_reaches_it_and_an_outage_does_not_hurt(scene: Scene) -> None:
    clock = Shifted()
    live, dead = await scene.token(), await scene.token()
    async with scene.agent(clock=clock) as agent, calling(scene.place()) as stub:
        for token in (live, dead):
            assert (await stub.ValidateToken(scene.asked(token))).active
        await scene.revoke(dead)
        head = await scene.server.head()
        await until(lambda: agent.local.state.revision >= head)
        await scene.server.app._rpc.stop(0)
        clock.by_s = 100.0
        assert (await stub.ValidateToken(scene.asked(live))).active
        assert not (await stub.ValidateToken(scene.asked(dead))).active
        clock.by_s = 130.0
        for token in (live, dead):
            assert await reason(stub.ValidateToken(scene.asked(token))) == "STATE_STALE"
        batch = auth_pb2.BatchValidateTokensRequest(requests=[scene.asked(live)])
        [result] = (await stub.BatchValidateTokens(batch)).results
        assert result.error.reason == error_reason_pb2.ERROR_REASON_STATE_STALE


async def test_policy_says_what_comes_after_the_bound(scene: Scene) -> None:
    live, clock = await scene.token(), Shifted()
    async with scene.agent(when_stale=open_for(600), clock=clock) as agent:
        await agent._watcher.stop()
        clock.by_s = 130.0
        async with calling(scene.place()) as stub:
            assert (await stub.ValidateToken(scene.asked(live))).active
    async with scene.agent(when_stale=REMOTE, clock=clock) as agent:
        await agent._watcher.stop()
        clock.by_s = 260.0
        before = validated(scene.server)
        async with calling(scene.place()) as stub:
            assert (await stub.ValidateToken(scene.asked(live))).active
        assert validated(scene.server) == before + 1


async def test_nothing_else_is_answered(scene: Scene) -> None:
    async with scene.agent(), calling(scene.place()) as stub:
        for call in (
            stub.IssueToken(auth_pb2.IssueTokenRequest(client_id="x")),
            stub.GetKeys(auth_pb2.GetKeysRequest()),
        ):
            assert (await failure(call)).reason == "NOT_IMPLEMENTED"
        assert await reason(stub.ValidateToken(auth_pb2.ValidateTokenRequest())) == "FIELD_INVALID"


async def test_it_tells_of_its_audiences_alone(scene: Scene) -> None:
    token = await scene.token()
    async with (
        scene.agent(audiences=frozenset({OPAQUE})),
        calling(scene.place()) as stub,
    ):
        verdict = await stub.ValidateToken(scene.asked(token))
        assert verdict == auth_pb2.ValidateTokenResponse()
    # What authsvc has to tell, it may tell to the agent, and the agent to nobody.
    opaque = await scene.token(OPAQUE)
    async with (
        scene.agent(audiences=frozenset({API})),
        calling(scene.place()) as stub,
    ):
        for more in ({}, {"audience": OPAQUE}):
            verdict = await stub.ValidateToken(scene.asked(opaque, **more))
            assert verdict == auth_pb2.ValidateTokenResponse()


async def test_socket_is_for_its_user_or_a_group(scene: Scene) -> None:
    path = scene.place()
    async with scene.agent():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with scene.agent(Place(path, grp.getgrgid(os.getgid()).gr_name)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with pytest.raises(AgentError, match="cannot be given"):
        async with scene.agent(Place(path, "no-such-group")):
            pass


async def test_place_that_is_taken_is_told_and_one_left_behind_is_not(scene: Scene) -> None:
    path = scene.place()
    async with scene.agent():
        with pytest.raises(AgentError, match="another agent"):
            async with scene.agent():
                pass
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with scene.agent(), calling(path) as stub:
        assert (await stub.ValidateToken(scene.asked(await scene.token()))).active
    path.unlink(missing_ok=True)
    path.write_text("a file")
    with pytest.raises(AgentError, match="no socket"):
        async with scene.agent():
            pass
    assert path.read_text() == "a file"


async def test_by_tcp_it_asks_for_a_certificate(scene: Scene) -> None:
    token = await scene.token()
    async with scene.agent(Place(None, "", "localhost:0")) as agent:
        for who, good in ((scene.client.who, True), (None, False)):
            async with connect(agent.port, who) as channel:
                call = AuthServiceStub(channel).ValidateToken(scene.asked(token), timeout=TIMEOUT_S)
                if good:
                    assert (await call).active
                else:
                    assert (await failure(call)).code == "UNAVAILABLE"


async def test_command_serves_until_it_is_told_to_end(scene: Scene) -> None:
    upstream, ready = scene.upstream(), scene.directory / "ready.json"
    arguments = ["--issuer", ISSUER, "--socket", str(scene.place()), "--ready-file", str(ready)]
    arguments += ["--address", upstream.address, "--ca", str(upstream.ca)]
    arguments += ["--cert", str(upstream.certificate), "--key", str(upstream.key)]
    process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
        [sys.executable, "-m", "authsvc", "agent", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        await until(lambda: ready.exists() or process.poll() is not None)
        assert json.loads(ready.read_text()) == {"socket": str(scene.place()), "port": 0}
        async with calling(scene.place()) as stub:
            assert (await stub.ValidateToken(scene.asked(await scene.token()))).active
        process.send_signal(signal.SIGTERM)
        told, _ = await asyncio.to_thread(process.communicate, timeout=TIMEOUT_S)
        assert process.returncode == 0, told
        assert "agent answers on unix:" in told
        assert not ready.exists()
        assert not scene.place().exists()
    finally:
        process.kill()
        process.wait()
