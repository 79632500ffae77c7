"""The metrics port: Prometheus metrics, and the probes of an orchestrator."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def probes(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> Starlette:
    """`/metrics`, `/livez` (the process answers) and `/readyz` (it can judge tokens)."""

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        ready = is_ready()
        return PlainTextResponse("ok\n" if ready else "not ready\n", 200 if ready else 503)

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/livez", livez), Route("/readyz", readyz)]
    )


class _Server(uvicorn.Server):
    """Leaves the signals to the process that it is a part of."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An ASGI application on a socket of its own."""

    def __init__(self, application: Starlette, host: str, port: int) -> None:
        """OSError where the address is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        self.port: int = self._socket.getsockname()[1]
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
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()
