"""Compaction: changes that nobody needs any more are forgotten."""

from authsvc.store.port import SweepStore

PIECE_ROWS = 2000
"""A piece is a transaction of some milliseconds, between which others have their turn."""


async def sweep(store: SweepStore, table: str) -> None:
    """Deletes what is over in a table. Cut short anywhere it has done no harm."""
    while await store.sweep(table, PIECE_ROWS) >= PIECE_ROWS:
        pass


class Compact:
    """Forgets what no follower needs: first it says so, so that nobody reads on from below."""

    def __init__(self, store: SweepStore) -> None:
        self._store = store

    async def __call__(self) -> None:
        """Raises AuthError STORE_UNAVAILABLE, COMMIT_UNKNOWN; the next run goes on."""
        await self._store.compact()
        await sweep(self._store, "feed")
