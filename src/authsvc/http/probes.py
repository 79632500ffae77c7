"""The metrics port: Prometheus metrics, and the probes of an orchestrator."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def probes(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> Starlette:
    """The probes of one process, which is ready when it can judge tokens."""

    async def scraped() -> bytes:
        return generate_latest(registry)

    async def asked() -> bool:
        return is_ready()

    return probes_by(scraped, asked)


def probes_by(
    scrape: Callable[[], Awaitable[bytes]], is_ready: Callable[[], Awaitable[bool]]
) -> Starlette:
    """`/metrics`, `/livez` (the process answers) and `/readyz`."""

    async def metrics(_request: Request) -> Response:
        return Response(await scrape(), media_type=CONTENT_TYPE_LATEST)

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        ready = await is_ready()
        return PlainTextResponse("ok\n" if ready else "not ready\n", 200 if ready else 503)

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/livez", livez), Route("/readyz", readyz)]
    )


class _Server(uvicorn.Server):
    """Leaves the signals to the process that it is a part of, and ends as soon as it is told to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not self.ending.is_set():
            await self.on_tick(0)  # brings the Date header up to date
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.server_state.connections:
            await super().shutdown(sockets)
        for server in self.servers:
            server.close()


def listen_tcp(host: str, port: int) -> socket.socket:
    """OSError where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def listen_unix(path: Path) -> socket.socket:
    """OSError where the path is taken."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening


class HttpServer:
    """An ASGI application on a socket of its own."""

    def __init__(self, application: Starlette, listening: socket.socket) -> None:
        self._socket = listening
        self.port: int = 0 if listening.family == socket.AF_UNIX else listening.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(application, log_config=None, access_log=False, lifespan="off")
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Serves in a task of its own."""
        self._task = asyncio.create_task(
            self._server.serve(sockets=[self._socket]), name="http-server"
        )

    async def stop(self) -> None:
        """Ends it."""
        self._server.ending.set()
        if self._task is not None:
            await self._task
        self._socket.close()
