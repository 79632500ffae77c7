"""The agent: ValidateToken beside any process of any language, answered on the machine itself.

It has neither database nor Redis: one stream from authsvc tells it of keys and revocations.
"""

import asyncio
import os
import shutil
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import structlog

from authsvc.clock import Clock, SystemClock
from authsvc.model import NOBODY
from authsvc.rpc.agent import AgentServicer, Beside, Everybody, nothing
from authsvc.rpc.peer import Peers
from authsvc.rpc.pipeline import Pipeline
from authsvc.rpc.server import Listener, RpcServer
from authsvc.rpc.tls import ServerTls
from authsvc.tasks import Tasks
from authsvc.telemetry import Metrics
from authsvc_client import AuthsvcClient, Certificates, ReloadingChannel, WhenStale
from authsvc_client.core.watched import Watched
from authsvc_client.validator import Local
from authsvc_client.watcher import Watcher

RELOAD_S = 5.0

log = structlog.get_logger()


class AgentError(Exception):
    """The agent cannot start; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the agent listens. Whoever can call it there may ask about any token."""

    path: Path | None
    """Of a Unix socket."""
    group: str = ""
    """Whose members may open that too."""
    address: str = ""
    """Host and port, for callers with a certificate by the agent's own CA."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where authsvc is, and the PEM files by which the agent is a client of it."""

    address: str
    issuer: str
    ca: Path
    certificate: Path
    key: Path
    server_name: str | None = None

    def certificates(self) -> Certificates:
        """As they are now. Raises OSError, ValueError."""
        return Certificates.from_files(self.ca, self.certificate, self.key)


class Agent:
    """One agent, put together."""

    def __init__(
        self,
        place: Place,
        upstream: Upstream,
        *,
        audiences: frozenset[str],
        staleness_max_s: float,
        when_stale: WhenStale,
        clock: Clock | None = None,
    ) -> None:
        """`audiences` are those that may be asked about. ValueError, OSError for unusable files."""
        clock = clock or SystemClock()
        self._place, self._upstream = place, upstream
        self._certificates = upstream.certificates()
        self._channel = ReloadingChannel(
            upstream.address,
            self._certificates,
            server_name=upstream.server_name,
            options=(("grpc.enable_http_proxy", 0),),
        )
        client = AuthsvcClient(self._channel)
        self.local = Local(
            upstream.issuer,
            staleness_max_s=staleness_max_s,
            when_stale=when_stale,
            now=clock.boot,
        )
        self._watcher = Watcher(client.stub, Watched(self.local.state), now=clock.boot)
        self._tasks = Tasks()
        self._tls: ServerTls | None = None
        metrics, everybody = Metrics(), Everybody(audiences)
        listeners = []
        if place.path is not None:
            pipeline = Pipeline(lambda _context, _now: NOBODY, everybody, nothing, metrics, clock)
            listeners.append(Listener(f"unix:{place.path}", None, pipeline))
        if place.address:
            tls = self._tls = ServerTls(upstream.certificate, upstream.key, upstream.ca)
            peers = Peers(lambda: tls.trust)
            pipeline = Pipeline(peers, everybody, nothing, metrics, clock)
            listeners.append(Listener(place.address, tls.credentials(), pipeline))
        servicers = {"AuthService": AgentServicer(Beside(self.local, client))}
        self._rpc = RpcServer(listeners, servicers, self.local.state, clock, reflect=False)
        self.port = 0
        """Where it listens by TCP; 0 where it does not."""

    async def start(self) -> None:
        """Listens when it returns; answers once authsvc confirmed the state. Raises AgentError."""
        path = self._place.path
        if path is not None:
            _make_room(path)
        before = os.umask(0o177)  # nobody else is let in for a moment either
        try:
            ports, _ = await self._rpc.start()
        except RuntimeError as error:
            raise AgentError(f"cannot listen: {error}") from error
        finally:
            os.umask(before)
        self.port = ports[-1] if self._place.address else 0
        if path is not None and self._place.group:
            try:
                shutil.chown(path, group=self._place.group)
                path.chmod(0o660)
            except (LookupError, OSError) as error:
                await self._rpc.stop(0)
                raise AgentError(f"{path}: cannot be given to {self._place.group}") from error
        self._watcher.start()
        self._tasks.start("health", self._rpc.watch_health)
        self._tasks.start("upstream-certificates", self._reload)
        if self._tls is not None:
            tls = self._tls
            self._tasks.start("tls-reload", lambda: tls.watch(RELOAD_S))

    async def ready(self) -> None:
        """Waits until tokens can be judged."""
        await self._watcher.confirmed()

    async def stop(self) -> None:
        """Calls under way end, and everything is given back."""
        await self._rpc.stop(1.0)
        await self._tasks.stop()
        await self._watcher.stop()
        await self._channel.close()

    async def _reload(self) -> None:
        """Connects again with new certificates; ones that cannot be used are logged, and left."""
        while True:
            await asyncio.sleep(RELOAD_S)
            try:
                found = await asyncio.to_thread(self._upstream.certificates)
            except (OSError, ValueError) as error:
                log.warning("agent.certificates_unusable", cause=str(error))
                continue
            if found != self._certificates:
                self._certificates = found
                log.info("agent.certificates_reloaded")
                await self._channel.reload(found)


def _make_room(path: Path) -> None:
    """Removes the socket of an agent that was killed; raises AgentError for anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AgentError(f"{path} is there, and no socket: give another --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink()
    except OSError as error:
        raise AgentError(f"{path}: {error.strerror}") from error
    else:
        raise AgentError(f"{path}: another agent serves there")
