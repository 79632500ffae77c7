"""Background work of a process: what fails is logged and begun again, never lost."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from authsvc.keys.secrets import jitter

RESTART_S = 1.0

log = structlog.get_logger()


class Tasks:
    """Runs named loops until stopped."""

    def __init__(self) -> None:
        self._running: list[asyncio.Task[None]] = []

    def start(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Runs a loop that should never end."""
        self._running.append(asyncio.create_task(_again(name, loop), name=name))

    async def stop(self) -> None:
        """Cancels all and waits for their end."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


async def _again(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await loop()
            log.error("task.ended", task=name)
        except Exception as error:
            log.error("task.failed", task=name, exc_info=error)
        await asyncio.sleep(RESTART_S + jitter(RESTART_S))
