"""Writing to the feed: revocations that come together share one transaction."""

import asyncio
from collections.abc import Callable, Sequence

from authsvc.acting import Act, act
from authsvc.errors import AuthError, Reason
from authsvc.store.port import Change, FeedStore, distinct, touched_by

BATCH_CHANGES_MAX = 512


class Append:
    """Commits changes and answers their revision; one transaction is under way at a time.

    The transaction belongs to a task of its own, so a caller that goes away cuts nobody short.
    """

    def __init__(self, store: FeedStore) -> None:
        self._store = store
        self._waiting: list[_Member] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, changes: Sequence[Change]) -> int:
        """Raises AuthError STORE_UNAVAILABLE or COMMIT_UNKNOWN; else the changes are durable."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((act(), distinct(changes), done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name="feed-append")
        return await done

    async def _drain(self) -> None:
        try:
            while self._waiting:
                batch: list[_Member] = []
                size = 0
                while self._waiting and size < BATCH_CHANGES_MAX:
                    batch.append(self._waiting.pop(0))
                    size += len(batch[-1][1])
                await self._commit(batch)
        finally:  # with members only where this task is cancelled
            _refuse(self._waiting, Reason.STORE_UNAVAILABLE, "stopped")
            self._waiting.clear()

    async def _commit(self, batch: list["_Member"]) -> Reason | None:
        """Answers why the batch failed."""
        try:
            revision = await self._store.append(
                [one for _, changes, _ in batch for one in changes],
                [(acting, touched_by(changes)) for acting, changes, _ in batch],
            )
        except AuthError as error:
            if len(batch) > 1 and error.reason is Reason.STORE_UNAVAILABLE:
                await self._commit_singly(batch)
                return None
            _refuse(batch, error.reason, error.cause)
            return error.reason
        except asyncio.CancelledError:
            _refuse(batch, Reason.COMMIT_UNKNOWN, "stopped")
            raise
        except Exception as error:
            _refuse(batch, Reason.INTERNAL, repr(error))
            return Reason.INTERNAL
        _settle(batch, lambda done: done.set_result(revision))
        return None

    async def _commit_singly(self, batch: list["_Member"]) -> None:
        """One bad member fails alone; where two in a row fail the database is gone for all."""
        failed = 0
        for at, member in enumerate(batch):
            reason = await self._commit([member])
            failed = failed + 1 if reason is Reason.STORE_UNAVAILABLE else 0
            if failed == 2:
                _refuse(batch[at + 1 :], Reason.STORE_UNAVAILABLE, "not tried")
                return


_Member = tuple[Act, Sequence[Change], asyncio.Future[int]]


def _refuse(batch: list[_Member], reason: Reason, cause: str) -> None:
    _settle(batch, lambda done: done.set_exception(AuthError(reason, cause=cause)))


def _settle(batch: list[_Member], how: Callable[[asyncio.Future[int]], None]) -> None:
    """Answers those who still wait."""
    for _, _, done in batch:
        if not done.done():
            how(done)
