"""Background work of a process: what fails is logged and begun again, never lost."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from authsvc.errors import AuthError
from authsvc.keys.secrets import jitter, new_id
from authsvc.store.port import LeaseStore
from authsvc.telemetry import log_about

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
    log_about(lambda: {"task": name})
    while True:
        try:
            await loop()
            log.error("task.ended")
        except Exception as error:
            log.error("task.failed", exc_info=error)
        await asyncio.sleep(RESTART_S + jitter(RESTART_S))


class Elected:
    """Chooses one of the processes on a database for each of its tasks.

    Two may take themselves for it for a moment: what they do must bear that.
    """

    def __init__(self, leases: LeaseStore) -> None:
        self._leases = leases
        self._holder = new_id()

    async def does(self, task: str, seconds: float) -> bool:
        """Whether a task is this process's, from now on for so long; who cannot tell has none."""
        try:
            return await self._leases.take(task, self._holder, seconds)
        except AuthError as error:
            log.warning("lease.failed", task=task, reason=error.reason.name, cause=error.cause)
            return False

    async def resign(self) -> None:
        """Leaves all tasks to others; where that fails, they wait for the end of the leases."""
        try:
            await self._leases.give_back(self._holder)
        except AuthError as error:
            log.warning("lease.kept", reason=error.reason.name, cause=error.cause)
