"""Replicas restarted one after the other under load, for a client that repeats once."""

import asyncio
import json
import re
import signal
from collections import Counter
from functools import partial
from typing import Any

from authsvc_client import Certificates, channel
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from tests.cluster.replicas import (
    START_S_MAX,
    Cast,
    Cluster,
    Process,
    Replica,
    eventually,
    known,
    rounds,
)
from tests.cluster.test_redis import planted
from tests.harness import CA, TIMEOUT_S, issue_request, outcome, thumbprint, until

CALLERS = 16
ONCE_MORE = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "authsvc.v1.AuthService"}],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.05s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


class Load:
    """Callers that issue and judge tokens until told to stop, over every replica in turn."""

    def __init__(self, ports: list[int], players: Cast) -> None:
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        self._channels = {
            who: channel(
                target,
                Certificates(CA.pem, who.pem, who.key_pem),
                server_name="localhost",
                options=[("grpc.service_config", json.dumps(ONCE_MORE))],
            )
            for who in (players.app.who, players.owner.who)
        }
        self._players = players
        self._over = False
        self.ended = Counter[str]()

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._call()) for _ in range(CALLERS)]
        await until(lambda: self.ended["OK"] > CALLERS)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)
        for each in self._channels.values():
            await each.close()

    async def _call(self) -> None:
        app, owner = self._players.app, self._players.owner
        stubs: dict[str, Any] = {
            "app": AuthServiceStub(self._channels[app.who]),
            "owner": AuthServiceStub(self._channels[owner.who]),
        }
        presenter = auth_pb2.Presenter(certificate_thumbprint=thumbprint(app.who))
        while not self._over:
            issued = stubs["app"].IssueToken(issue_request(app.client_id), timeout=TIMEOUT_S)
            self.ended[code := await outcome(issued)] += 1
            if code == "OK":
                request = auth_pb2.ValidateTokenRequest(
                    token=(await issued).token.access_token, presenter=presenter
                )
                for _ in range(8):
                    judging = stubs["owner"].ValidateToken(request, timeout=TIMEOUT_S)
                    self.ended[await outcome(judging)] += 1


async def served(process: Process) -> bool:
    """Whether calls of the load arrive there, over both of its channels."""
    await asyncio.sleep(0.1)  # a scrape is work for whoever has to serve
    replica = Replica(process)
    _, text = await replica.http("/metrics")
    answered = re.findall(r'rpc_calls_total{code="OK",method="[^"]*\.(\w+)"} [1-9]', text)
    return {"IssueToken", "ValidateToken"} <= set(answered)


async def restart(process: Process) -> None:
    """As an operator does it: the end is waited for, and then that it serves again."""
    process.signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.ended) == 0
    process.launch()
    await until(process.ready.exists)
    await eventually(partial(served, process), START_S_MAX)


async def test_a_rolling_restart_fails_no_call_of_a_client_that_repeats_once(
    cluster: Cluster, players: Cast
) -> None:
    async with Load([process.port for process in cluster.processes], players) as load:
        for _ in range(rounds(1)):
            for process in cluster.processes:
                await restart(process)
    assert load.ended.keys() == {"OK"}, load.ended


BREAKS_OFF = """
import asyncio
from authsvc.rpc.server import RpcServer
async def stop(self, grace_s):
    await asyncio.gather(*(server.stop(None) for server in self._servers))
RpcServer.stop = stop
"""
"""The bug: calls under way are cancelled."""


async def test_it_would_notice_calls_that_are_broken_off(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    async with planted(cluster, BREAKS_OFF, BREAKS_OFF) as replicas:
        for at in replicas:
            await known([pair[0], at], players)
        processes = [cluster.processes[0], *(at.process for at in replicas)]
        async with Load([process.port for process in processes], players) as load:
            for process in processes[1:]:
                process.signal(signal.SIGTERM)
                await asyncio.to_thread(process.ended)
    assert load.ended.keys() > {"OK"}
