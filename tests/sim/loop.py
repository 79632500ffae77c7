"""An event loop whose time is made by hand, and the nodes of a world that run in it.

Nothing waits: where no callback is ready, time goes on to the next timer. So the same seed gives
the same order of everything, and an hour takes a moment.
"""

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any


class Stuck(Exception):
    """Nothing will ever happen again."""


class HandLoop(asyncio.BaseEventLoop):
    """Has neither sockets nor threads. A node that is paused gets no turn."""

    _ready: "deque[Any]"
    _scheduled: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self.set_task_factory(_task)

    def time(self) -> float:
        """True time, in seconds since the world began."""
        return self._now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """At once: a thread would come back whenever it likes."""
        done = self.create_future()
        done.set_result(func(*args))
        return done

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise Stuck
            self._now = max(self._now, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            node = handle._context.get(_node)
            if node is not None and node.paused:
                node.parked.append(handle)
            else:
                handle._run()

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class Node:
    """A process. What is started by it belongs to it, and stops with it."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, booted: float = 0.0) -> None:
        self.name = name
        self.loop = loop
        self.alive = True
        self.paused = False
        self.parked: deque[asyncio.Handle] = deque()
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.fault: BaseException | None = None
        """Of a task in it that nobody expected to end so."""
        self._booted = booted
        self._context = contextvars.copy_context()
        self._context.run(_node.set, self)

    def boot(self) -> float:
        """Its boot-time clock: also while it is paused, as elapsed time goes on."""
        return self.loop.time() + self._booted

    def start(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """Runs something in it."""
        task = self.loop.create_task(work, context=self._context.copy())
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        if self.alive and not task.cancelled():
            self.fault = self.fault or task.exception()

    def resume(self) -> None:
        """What would have come meanwhile comes now, in its order."""
        self.paused = False
        self.loop._ready.extend(self.parked)  # type: ignore[attr-defined]
        self.parked.clear()

    def kill(self) -> None:
        """It does nothing more that anybody sees: all that leaves it asks whether it is alive."""
        self.alive = False
        for task in list(self.tasks):
            task.cancel()
        self.resume()


_node: "contextvars.ContextVar[Node | None]" = contextvars.ContextVar("node", default=None)


def _task(loop: asyncio.AbstractEventLoop, work: Any, **named: Any) -> "asyncio.Task[Any]":
    context = named.get("context")
    if context is not None and _node not in context:
        context.run(_node.set, _node.get())  # whatever else it leaves behind, not its process
    node = context[_node] if context is not None else _node.get()
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **named)
    if node is not None:
        node.tasks[task] = None
        task.add_done_callback(lambda done: node.tasks.pop(done, None))
    return task
