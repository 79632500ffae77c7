"""A way to a server that tests can make slow, cut, lead elsewhere, or encrypt."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress


class Proxy:
    """Passes on what comes, each piece late by `delay()` seconds."""

    def __init__(self, target: int, tls: ssl.SSLContext | None) -> None:
        self.target = target
        """Port on this machine; of connections from now on."""
        self.delay: Callable[[], float] = lambda: 0.0
        self.port = 0
        self.accepted = 0
        self.tls = tls
        self._ways: set[asyncio.Task[None]] = set()

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def cut(self) -> None:
        """Ends all connections."""
        ways = list(self._ways)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        way = asyncio.create_task(self._way(reader, writer))
        self._ways.add(way)
        way.add_done_callback(self._ways.discard)

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with suppress(OSError):
            try:
                back, forth = await asyncio.open_connection("127.0.0.1", self.target)
                ends.append(forth)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on(reader, forth))
                    both.create_task(self._pass_on(back, writer))
            except* OSError:
                pass
            finally:
                for end in ends:
                    end.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            if late := self.delay():
                await asyncio.sleep(late)
            writer.write(piece)
            await writer.drain()
        raise ConnectionResetError  # ends the other way too


@asynccontextmanager
async def proxied(target: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    """A proxy to a port on this machine."""
    proxy = Proxy(target, tls)
    server = await proxy.start()
    try:
        yield proxy
    finally:
        server.close()
        await proxy.cut()
        await server.wait_closed()
