"""The gRPC listeners: those with TLS, and a plain one that answers health alone."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
import structlog
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from authsvc.clock import Clock
from authsvc.rpc.limits import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from authsvc.rpc.pipeline import KEYS_READ, Handler, Handlers, Pipeline
from authsvc.rpc.sockets import hang_up, stop_listening
from authsvc_client.core.state import State
from authsvc_client.v1 import (
    audit_pb2,
    auth_pb2,
    clients_pb2,
    explain_pb2,
    keys_pb2,
    resources_pb2,
    revocations_pb2,
    roles_pb2,
    sessions_pb2,
    users_pb2,
)

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR
    for module in (
        auth_pb2,
        clients_pb2,
        resources_pb2,
        users_pb2,
        roles_pb2,
        sessions_pb2,
        revocations_pb2,
        keys_pb2,
        audit_pb2,
        explain_pb2,
    )
)
SERVICES = tuple(service for file in FILES for service in file.services_by_name.values())
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
CONNECTION_AGE_MS = 30 * 60 * 1000
CONNECTION_AGE_GRACE_MS = 60 * 1000
HEALTH_INTERVAL_S = 0.5
SETTLE_S = 0.5
"""What connections that were just accepted have to become whole: who finds one broken before its
first call waits longer than it takes to try again."""
HOLD_S_MAX = 2.0
"""How long new calls wait for those under way, so that all can be told together."""
SENT_S = 0.02
"""What the last answers have to get out."""

log = structlog.get_logger()

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
    ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_MS),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


class _Handlers(grpc.GenericRpcHandler):
    """All methods in one table: one look-up a call, however many services there are."""

    def __init__(self, handlers: Mapping[str, Handlers]) -> None:
        self._silent = {name: each.silent for name, each in handlers.items()}
        self._all = {name: each.all for name, each in handlers.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "Handler | None":
        # Read here, since gRPC makes the metadata anew for each who asks for them.
        for key, _ in handler_call_details.invocation_metadata or ():
            if key in KEYS_READ:
                return self._all.get(handler_call_details.method)
        return self._silent.get(handler_call_details.method)


@dataclass(frozen=True, slots=True)
class Listener:
    """Where calls come in, and what they pass through."""

    address: str
    credentials: grpc.ServerCredentials | None
    """None for a Unix socket."""
    pipeline: Pipeline


class RpcServer:
    """All listeners, their health, and their end."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        servicers: Mapping[str, object],
        state: State,
        clock: Clock,
        *,
        reflect: bool,
        shared: bool = False,
    ) -> None:
        """`servicers` by the name of their service; ValueError where a method has no rule.

        `shared`: other processes listen on the same ports.
        """
        options = (*OPTIONS, ("grpc.so_reuseport", int(shared)))
        self._listeners = listeners
        self._state = state
        self._clock = clock
        self._shared = shared
        self._ports: list[int] = []
        self._health_port = 0
        self._health = health.aio.HealthServicer()
        self._plain = grpc.aio.server(options=options)
        self._servers = [grpc.aio.server(options=options) for _ in listeners]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._plain)
        names = (*(service.full_name for service in SERVICES), health.SERVICE_NAME)
        for server, listener in zip(self._servers, listeners, strict=True):
            handlers = {
                f"/{service.full_name}/{method.name}": listener.pipeline.handlers(
                    method, servicers.get(service.name)
                )
                for service in SERVICES
                for method in service.methods
            }
            server.add_generic_rpc_handlers((_Handlers(handlers),))  # asked first at every call
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            if reflect:
                reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)

    async def start(self, health_address: str = "") -> tuple[list[int], int]:
        """Listens, and answers the ports of the listeners and of health.

        Raises RuntimeError where an address is taken.
        """
        ports = [
            server.add_secure_port(listener.address, listener.credentials)
            if listener.credentials is not None
            else server.add_insecure_port(listener.address)
            for server, listener in zip(self._servers, self._listeners, strict=True)
        ]
        health_port = self._plain.add_insecure_port(health_address) if health_address else 0
        self._ports, self._health_port = ports, health_port
        await self._set_health(self._is_fresh())
        for server in (self._plain, *self._servers):
            await server.start()
        return ports, health_port

    async def watch_health(self) -> None:
        """Tells the truth about the state until cancelled: stale means NOT_SERVING."""
        told: bool | None = None
        while True:
            fresh = self._is_fresh()
            if fresh is not told:
                await self._set_health(fresh)
                log.info("health.changed", serving=fresh)
                told = fresh
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _is_fresh(self) -> bool:
        return self._state.age(self._clock.boot()) <= self._state.staleness_max_s

    async def _set_health(self, fresh: bool) -> None:
        for name in ("", *(service.full_name for service in SERVICES)):
            await self._health.set(name, SERVING if fresh else NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING first; then no new calls, and those under way have `grace_s` to end.

        New calls are UNAVAILABLE: they wait, unbegun, until those under way have ended, and then
        their connections end. Where that takes long, the others are told by GOAWAY.
        """
        await self._health.enter_graceful_shutdown()
        pipelines = [listener.pipeline for listener in self._listeners]
        # Who is hung up on comes back at once, and would be turned away a second time.
        stop_listening((*self._ports, self._health_port) if self._shared else self._ports)
        if self._shared:
            await asyncio.sleep(SETTLE_S)
        for pipeline in pipelines:
            pipeline.drain()
        hold_s = min(grace_s, HOLD_S_MAX)
        if all(await asyncio.gather(*(pipeline.idle(hold_s) for pipeline in pipelines))):
            await asyncio.sleep(SENT_S)
            hang_up(self._ports)
            grace_s = 0
        else:
            log.info("server.waits_for_calls", seconds=grace_s)
        stopping = [asyncio.create_task(server.stop(grace_s)) for server in self._servers]
        await asyncio.sleep(0)
        for pipeline in pipelines:
            pipeline.release()
        await asyncio.gather(*stopping)
        await self._plain.stop(0)
