"""The longest time that a call may take, kept by one timer for all calls."""

import asyncio
import time
from typing import Any

SWEEPS = 16
"""Looks for calls that took too long, in the time that one may take."""

Task = asyncio.Task[Any]


class TimeLimit:
    """Cancels calls that take too long, a sixteenth late at most.

    `asyncio.timeout` makes and drops a timer for each call, which took as long as a verdict.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began: dict[Task, float] = {}
        self._exceeded: set[Task] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event | None = None

    def begin(self, now: float) -> Task:
        """The call of the task that runs begins; `now` by the performance counter."""
        task = asyncio.current_task()
        assert task is not None
        self._began[task] = now
        if self._timer is None:
            self._look_later(task.get_loop())
        return task

    def end(self, task: Task) -> None:
        """The call is over, or nearly."""
        if self._began.pop(task, None) is None:
            self._exceeded.discard(task)
        elif self._idle is not None and not self._began:
            self._idle.set()

    async def idle(self, within_s: float) -> bool:
        """Waits until no call is under way; whether it came to that in time."""
        if not self._began:
            return True
        self._idle = asyncio.Event()
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def exceeded(self, task: Task) -> bool:
        """Whether a CancelledError in it means that it took too long, and nothing else."""
        return task in self._exceeded and task.uncancel() == 0

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._limit_s / SWEEPS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        latest = time.perf_counter() - self._limit_s
        for task in [task for task, began in self._began.items() if began <= latest]:
            del self._began[task]
            self._exceeded.add(task)
            task.cancel()
        self._timer = None
        if self._began:
            self._look_later(loop)
