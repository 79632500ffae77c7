"""One read for all who ask for the same at once."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

from authsvc.errors import AuthError, Reason

READS_MAX = 256
"""For what anybody may ask for; who comes then is refused rather than kept waiting."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Reads(Generic[K, V]):
    """Reads under way. Who comes after a change is not served by a read that began before it, and
    what such a read found is not kept.
    """

    def __init__(self, most: float = math.inf) -> None:
        """`most` bounds how many there are at once, overtaken ones too."""
        self._most = most
        self._running = 0
        self._under_way: dict[K, dict[str, asyncio.Task[V]]] = {}
        """By key of the changes, then by name; without those that were overtaken."""

    def overtake(self, key: K) -> None:
        """A change of this key came."""
        self._under_way.pop(key, None)

    def overtake_all(self) -> None:
        """Whatever is read may have changed."""
        self._under_way.clear()

    async def __call__(
        self, key: K, read: Callable[[], Awaitable[V]], keep: Callable[[V], None], name: str = ""
    ) -> V:
        """What was read, once it is kept; `name` tells reads of one key.

        Raises what `read` raises, to all who waited, and AuthError STORE_UNAVAILABLE for too many.
        """
        task = self._under_way.get(key, {}).get(name)
        if task is None:
            if self._running >= self._most:
                raise AuthError(
                    Reason.STORE_UNAVAILABLE, retry_after_s=1.0, cause="reads under way"
                )
            self._running += 1
            task = asyncio.create_task(self._run(key, name, read, keep))
            task.add_done_callback(_retrieve)
            self._under_way.setdefault(key, {})[name] = task
        return await asyncio.shield(task)

    async def _run(
        self, key: K, name: str, read: Callable[[], Awaitable[V]], keep: Callable[[V], None]
    ) -> V:
        try:
            found = await read()
        finally:
            self._running -= 1
            tasks = self._under_way.get(key, {})
            is_current = tasks.get(name) is asyncio.current_task()
            if is_current:
                del tasks[name]
            if is_current and not tasks:
                del self._under_way[key]
        if is_current:
            keep(found)
        return found


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Those who waited may all have gone away."""
    if not task.cancelled():
        task.exception()
