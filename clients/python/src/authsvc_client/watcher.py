"""Keeps a state current by WatchChanges, over one stream that is opened again whenever it ends."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from random import random  # noqa: TID251 - spreads load, keeps no secret
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from . import clock
from .core.markers import Marker, read_marker
from .core.reason import Reason
from .core.watched import OutOfStep, Watched
from .errors import AuthsvcError
from .v1 import auth_pb2

SILENT_S_MAX = 5.0
"""A heartbeat is due every second: whoever is silent for longer is gone."""
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 2.0
STEP_MARKERS = 256
"""Of a chunk: taking so many in holds nobody up."""

_log = logging.getLogger("authsvc_client")


class Reconnecting:
    """What both watchers do with events and ends: pauses that grow, one line of log each way."""

    def __init__(
        self,
        watched: Watched,
        now: Callable[[], float] = clock.boot,
        draw: Callable[[], float] = random,
    ) -> None:
        self._watched, self._now, self._draw = watched, now, draw
        self._pause_s = 0.0
        self._is_down = False

    def request(self) -> auth_pb2.WatchChangesRequest:
        """For the stream that is opened now."""
        return auth_pb2.WatchChangesRequest(resume_revision=self._watched.open(self._now()))

    def take(self, response: auth_pb2.WatchChangesResponse) -> Iterator[None]:
        """Applies an event, in steps between which others have their turn; raises OutOfStep."""
        yield from apply(self._watched, response, self._now())
        if response.HasField("heartbeat"):
            self._pause_s = 0.0
            if self._is_down:
                self._is_down = False
                _log.info("changes are watched again, at revision %d", self._watched.state.revision)

    def ended(self, error: BaseException | None) -> float:
        """How long to wait before the next stream, seconds."""
        typed = AuthsvcError.from_rpc_error(error) if isinstance(error, grpc.RpcError) else None
        if typed is not None and typed.reason is Reason.REVISION_COMPACTED:
            self._watched.forget()
        if not self._is_down and self._pause_s:  # not for one stream that ended
            self._is_down = True
            _log.warning("changes are not watched: %s", typed or repr(error))
        pause_s, self._pause_s = (
            self._pause_s,
            min(max(2 * self._pause_s, PAUSE_S_MIN), PAUSE_S_MAX),
        )
        return max(pause_s, PAUSE_S_MIN) * (0.5 + self._draw())


class Watcher:
    """A task that watches until it is stopped."""

    def __init__(self, stub: Any, watched: Watched, **times: Any) -> None:
        """`stub` is an AuthServiceStub whose channel's client has the scope `watch`."""
        self._stub = stub
        self._reconnecting = Reconnecting(watched, **times)
        self._confirmed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, in the running loop."""
        self._task = asyncio.create_task(self._run(), name="authsvc-watch")

    async def confirmed(self) -> None:
        """Waits for the first confirmation."""
        await self._confirmed.wait()

    async def stop(self) -> None:
        """Ends the stream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            error: BaseException | None = None
            try:
                await self._watch()
            except (grpc.RpcError, OutOfStep, TimeoutError) as ended:
                error = ended
            except Exception as fault:
                _log.exception("a fault while changes were watched")
                error = fault
            await asyncio.sleep(self._reconnecting.ended(error))

    async def _watch(self) -> None:
        call = self._stub.WatchChanges(self._reconnecting.request())
        try:
            while True:
                async with asyncio.timeout(SILENT_S_MAX):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    return
                for _ in self._reconnecting.take(response):
                    await asyncio.sleep(0)
                if response.HasField("heartbeat"):
                    self._confirmed.set()
        finally:
            call.cancel()


def apply(watched: Watched, response: auth_pb2.WatchChangesResponse, boot: float) -> Iterator[None]:
    """Applies one event, received at boot time `boot`, in steps; raises OutOfStep."""
    kind = response.WhichOneof("event")
    if kind == "snapshot":
        chunk = response.snapshot
        keys, staleness = _keys(chunk.keys), _staleness(chunk.staleness)
        for start in range(0, max(1, len(chunk.markers)), STEP_MARKERS):
            end = start + STEP_MARKERS
            markers = _markers(chunk.markers[start:end])
            is_last = chunk.last and end >= len(chunk.markers)
            watched.snapshot(chunk.revision, markers, keys, staleness, last=is_last)
            yield
    elif kind == "delta":
        delta = response.delta
        watched.delta(
            delta.revision, _markers(delta.markers), _keys(delta.keys), _staleness(delta.staleness)
        )
    elif kind == "heartbeat":
        beat = response.heartbeat
        watched.heartbeat(beat.revision, _seconds(beat.age), _seconds(beat.database_time), boot)
    else:
        raise OutOfStep("an event of a newer contract")


def _markers(markers: Iterable[auth_pb2.Marker]) -> list[Marker]:
    return [
        read_marker(marker.kind, marker.key, marker.revision, _seconds(marker.until))
        for marker in markers
    ]


def _keys(jwks: Iterable[auth_pb2.Jwk]) -> list[dict[str, str]]:
    return [{field.name: value for field, value in jwk.ListFields()} for jwk in jwks]


def _staleness(bounds: Iterable[auth_pb2.ResourceStaleness]) -> dict[str, float]:
    return {bound.resource_id: _seconds(bound.staleness_max) for bound in bounds}


def _seconds(value: Duration | Timestamp) -> float:
    return value.seconds + value.nanos / 1e9
