"""Chores that one worker of a database does about once a minute; two at once do no harm."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from authsvc.acting import by_itself
from authsvc.errors import AuthError
from authsvc.keys.secrets import jitter

FIRST_S = 5.0
"""A worker that starts does them soon: it may never live for a minute."""

log = structlog.get_logger()

Chore = Callable[[], Awaitable[object]]


async def _always() -> bool:
    return True


class Housekeeping:
    """Does chores, one after the other; one that fails does not stop the others."""

    def __init__(
        self,
        chores: Mapping[str, Chore],
        interval_s: float,
        is_elected: Callable[[], Awaitable[bool]] = _always,
    ) -> None:
        """`is_elected` is asked before each run."""
        self._chores = chores
        self._interval_s = interval_s
        self._is_elected = is_elected

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.sleep(jitter(FIRST_S))
        while True:
            if await self._is_elected():
                await self.run_once()
            await asyncio.sleep(self._interval_s * (0.75 + jitter(0.5)))

    async def run_once(self) -> None:
        """Each chore once."""
        for name, chore in self._chores.items():
            try:
                with by_itself(_action(name)):
                    await chore()
            except AuthError as error:
                log.warning("chore.failed", chore=name, reason=error.reason.name, cause=error.cause)
            except Exception as error:
                log.error("chore.failed", chore=name, exc_info=error)


def _action(chore: str) -> str:
    """What the audit calls it: `expire-clients` is ExpireClients."""
    return "".join(part.capitalize() for part in chore.split("-"))
