"""Compaction: changes that nobody needs any more are forgotten."""

import asyncio

from authsvc.store.port import SweepStore

PIECE_ROWS = 500
"""A piece is a transaction of some milliseconds."""


async def sweep(store: SweepStore, table: str) -> None:
    """Deletes what is over in a table. Cut short anywhere it has done no harm.

    It rests as long as it worked: who writes in another process tries again and again, and would
    hardly ever come between two pieces that follow at once.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    while await store.sweep(table, PIECE_ROWS) >= PIECE_ROWS:
        await asyncio.sleep(loop.time() - started)
        started = loop.time()


class Compact:
    """Forgets what no follower needs: first it says so, so that nobody reads on from below."""

    def __init__(self, store: SweepStore) -> None:
        self._store = store

    async def __call__(self) -> None:
        """Raises AuthError STORE_UNAVAILABLE, COMMIT_UNKNOWN; the next run goes on."""
        await self._store.compact()
        await sweep(self._store, "feed")
