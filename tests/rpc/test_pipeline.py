"""What every call passes through: request ids, deadlines, cancellation, metrics, health."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from authsvc.keys.secrets import new_id
from authsvc.rpc import pipeline
from authsvc.rpc.server import SERVICES
from authsvc.store.port import Store
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ADMIN,
    TIMEOUT_S,
    Running,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    raw_unary,
    read_failure,
    reason,
    running,
    until,
)

KEYS = auth_pb2.GetKeysRequest()


# --- metadata ---


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("abc-DEF_0.9", "abc-DEF_0.9"),
        ("x" * 64, "x" * 64),
        ("x" * 65, None),
        ("", None),
        ("two words", None),
        ("a/b", None),
        ("a=b;c", None),
    ],
)
async def test_request_id_is_echoed_where_it_is_one(
    server: Running, sent: str, echoed: str | None
) -> None:
    given = (("x-request-id", sent),)
    good = server.auth(ADMIN).GetKeys(KEYS, metadata=given)
    await good
    trailers = {key: value for key, value in await good.trailing_metadata()}  # noqa: C416
    assert _is_id(echoed, trailers["x-request-id"])
    bad = server.clients(identity("stranger")).ListClients(
        clients_pb2.ListClientsRequest(), metadata=given
    )
    assert _is_id(echoed, (await failure(bad)).trailers["x-request-id"])
    stream = server.auth(identity("stranger")).WatchChanges(
        auth_pb2.WatchChangesRequest(), metadata=given
    )
    assert _is_id(echoed, (await failure(stream.read())).trailers["x-request-id"])


def _is_id(echoed: str | None, found: str | bytes) -> bool:
    return found == echoed if echoed else len(found) == len(new_id())


async def test_request_id_of_one_call_is_not_the_next_ones(server: Running) -> None:
    first = server.auth(ADMIN).GetKeys(KEYS, metadata=(("x-request-id", "one"),))
    await first
    second = server.auth(ADMIN).GetKeys(KEYS)
    await second
    assert _is_id(None, dict(await second.trailing_metadata())["x-request-id"])


@pytest.mark.parametrize(
    "given",
    [
        ("Bearer a", "Bearer b"),
        ("Bearer a", "Bearer a"),
        ("", "Bearer a"),
        ("Bearer a", ""),
        ("", ""),
    ],
)
async def test_authorization_twice_is_refused(server: Running, given: tuple[str, ...]) -> None:
    metadata = tuple(("authorization", value) for value in given)
    call = server.auth(ADMIN).GetKeys(KEYS, metadata=metadata)
    assert await reason(call) == "AUTH_METHOD_AMBIGUOUS"
    once = server.auth(ADMIN).GetKeys(KEYS, metadata=metadata[:1])
    assert await outcome(once) == "OK"


# --- time ---


class Slow:
    """A store of clients whose answers wait for a gate."""

    def __init__(self, clients: Any) -> None:
        self._clients = clients
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = self.cancelled = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clients, name)

    async def get(self, client_id: str) -> Any:
        self.entered += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await self._clients.get(client_id)


def _slow() -> tuple[list[Slow], Any]:
    made: list[Slow] = []

    def wrap(store: Store) -> Store:
        made.append(Slow(store.clients))
        clients: Any = made[0]
        return replace(store, clients=clients)

    return made, wrap


async def test_deadline_of_the_server_holds_where_the_caller_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "DEADLINE_S_MAX", 0.2)
    slow, wrap = _slow()
    async with running(tmp_path, clock=hand_clock(), wrap=wrap) as server:
        await server.auth(ADMIN).GetKeys(KEYS)
        slow[0].gate.clear()
        get = clients_pb2.GetClientRequest(client_id="x")
        refused = await failure(server.clients().GetClient(get))
        assert (refused.code, refused.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert refused.metadata == {"limit_seconds": "0.2"}
        assert slow[0].cancelled == 1
        slow[0].gate.set()
        assert await reason(server.clients().GetClient(get)) == "CLIENT_NOT_FOUND"


async def test_call_that_is_cancelled_ends_in_the_server(tmp_path: Path) -> None:
    slow, wrap = _slow()
    async with running(tmp_path, clock=hand_clock(), wrap=wrap) as server:
        slow[0].gate.clear()
        for ending in ("cancel", "deadline"):
            entered = slow[0].entered
            call = server.clients().GetClient(
                clients_pb2.GetClientRequest(client_id="x"),
                timeout=0.3 if ending == "deadline" else TIMEOUT_S,
            )
            waiting = asyncio.ensure_future(_wait(call))
            await until(lambda: slow[0].entered > entered)  # noqa: B023
            cancelled = slow[0].cancelled
            if ending == "cancel":
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            else:
                assert await reason(waiting) == "DEADLINE_EXCEEDED"
            await until(lambda: slow[0].cancelled > cancelled)  # noqa: B023
        assert await outcome(server.auth(ADMIN).GetKeys(KEYS)) == "OK"


async def _wait(call: Any) -> Any:
    return await call


# --- metrics and probes ---


async def _metric(server: Running, line: str) -> float:
    status, body = await server.http("/metrics")
    assert status == 200
    found = re.search(rf"^{re.escape(line)} (\S+)$", body, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def test_metrics_count_calls_by_method_and_code(server: Running) -> None:
    name = "authsvc.v1.ClientService.GetClient"
    lines = {
        code: f'authsvc_rpc_calls_total{{code="{code}",method="{name}"}}'
        for code in ("OK", "NOT_FOUND", "UNAUTHENTICATED", "INVALID_ARGUMENT")
    }
    member = await server.member("metrics", "validate")
    before = {code: await _metric(server, line) for code, line in lines.items()}
    timed = f'authsvc_rpc_seconds_count{{method="{name}"}}'
    count = await _metric(server, timed)
    for who, client_id in (
        (ADMIN, member.client_id),
        (ADMIN, member.client_id),
        (ADMIN, "nobody"),
        (identity("stranger"), "nobody"),
        (ADMIN, ""),
    ):
        request = clients_pb2.GetClientRequest(client_id=client_id)
        await outcome(server.clients(who).GetClient(request))
    after = {code: await _metric(server, line) for code, line in lines.items()}
    assert {code: after[code] - before[code] for code in lines} == {
        "OK": 2,
        "NOT_FOUND": 1,
        "UNAUTHENTICATED": 1,
        "INVALID_ARGUMENT": 1,
    }
    assert await _metric(server, timed) == count + 5


async def test_metrics_count_verdicts_and_show_the_feed(server: Running) -> None:
    member = await server.member("verdicts", "validate", validates=["*"])
    line = 'authsvc_verdicts_total{reason="TOKEN_MALFORMED"}'
    before = await _metric(server, line)
    assert await server.judged(member.who, "x") == "TOKEN_MALFORMED"
    assert await _metric(server, line) == before + 1
    assert await _metric(server, "authsvc_feed_revision") == await server.head()
    assert 0 <= await _metric(server, "authsvc_feed_age_seconds") < 5


async def test_metrics_name_no_caller(server: Running) -> None:
    member = await server.member("unnamed", "validate")
    token = await server.token(member)
    await server.judged(member.who, token.access_token, of=member.who)
    _, body = await server.http("/metrics")
    for text in (member.client_id, token.jti, "spiffe://"):
        assert text not in body


async def test_probes(server: Running) -> None:
    assert await server.http("/livez") == (200, "ok\n")
    assert await server.http("/readyz") == (200, "ok\n")
    assert (await server.http("/nothing"))[0] == 404


async def test_health_is_told_per_service_on_both_ports(server: Running) -> None:
    names = ["", *(service.full_name for service in SERVICES)]
    for name in names:
        assert await server.health(name) == health_pb2.HealthCheckResponse.SERVING
    stub = health_pb2_grpc.HealthStub(server.channel(identity("stranger")))
    for name in names:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.health("nobody.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_plain_port_answers_health_alone(server: Running) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.app.health_port}") as channel:
        for path in ("/authsvc.v1.AuthService/GetKeys", "/authsvc.v1.ClientService/ListClients"):
            refused = await failure(raw_unary(channel, path)(b"", timeout=TIMEOUT_S))
            assert refused.code == "UNIMPLEMENTED"


async def test_method_that_no_contract_has_is_unimplemented(server: Running) -> None:
    for path in ("/authsvc.v1.AuthService/Nothing", "/nobody.Service/Method", "/x"):
        call = raw_unary(server.channel(ADMIN), path)(b"", timeout=TIMEOUT_S)
        assert (await failure(call)).code == "UNIMPLEMENTED"


@pytest.mark.parametrize("reflects", [False, True])
async def test_reflection_is_answered_by_setting_alone(tmp_path: Path, reflects: bool) -> None:
    async with running(tmp_path, reflection=reflects) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel(ADMIN))
        call = stub.ServerReflectionInfo(timeout=TIMEOUT_S)
        found = []
        try:
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await call.read()
            found = [service.name for service in answer.list_services_response.service]
            call.cancel()
        except grpc.aio.AioRpcError as error:
            assert read_failure(error).code == "UNIMPLEMENTED"  # noqa: PT017
        assert ("authsvc.v1.AuthService" in found) is reflects
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.app.health_port}") as plain:
            path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            assert (await failure(raw_unary(plain, path)(b""))).code == "UNIMPLEMENTED"
        assert await outcome(server.auth(ADMIN).IssueToken(issue_request("x"))) == (
            "CLIENT_AUTHENTICATION_FAILED"
        )
