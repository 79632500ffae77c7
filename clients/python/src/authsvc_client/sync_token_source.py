"""A service's own access token, kept fresh, for threads."""

import contextvars
import threading
from collections.abc import Callable
from random import random  # noqa: TID251 - spreads load, keeps no secret
from types import TracebackType
from typing import Self

from . import clock
from .errors import TokenUnavailable
from .token_source import Pace, Step, Token, TokenPlan


class SyncTokenSource:
    """As TokenSource, for any number of threads.

    One renewal runs at a time, in a daemon thread of its own that ends with it: while the old
    token lives nobody waits for it. Make it after the last fork.
    """

    def __init__(
        self,
        fetch: Callable[[], Token],
        *,
        cancel: Callable[[], object] | None = None,
        pace: Pace | None = None,
        now: Callable[[], float] = clock.boot,
        draw: Callable[[], float] = random,
    ) -> None:
        """`fetch` asks for a token, over a channel that does not need one from this source; it
        must end by itself, as no thread can be ended. `cancel` makes `close` quick: it ends a
        fetch that runs, and every later one."""
        self._fetch, self._cancel = fetch, cancel
        self._now, self._draw = now, draw
        self._plan = TokenPlan(pace)
        self._changed = threading.Condition()
        """Guards the plan; told of each renewal's end, and of close()."""
        self._flight: threading.Thread | None = None
        self._closed = False

    def token(self, timeout_s: float | None = None) -> str:
        """A token that lives; raises TokenUnavailable where there is none to be had now, and
        TimeoutError where it did not come in `timeout_s`."""
        deadline = None if timeout_s is None else clock.boot() + timeout_s
        with self._changed:
            while True:
                if self._closed:
                    raise TokenUnavailable("the token source is closed")
                step = self._plan.decide(self._now())
                if step is Step.COOL_DOWN:
                    failure, pause_s = self._plan.failure, self._plan.cools_down_for(self._now())
                    raise TokenUnavailable.after(failure, pause_s) from failure
                if step is not Step.USE and not self._plan.in_flight:
                    self._start()
                elif step is Step.WAIT:
                    left_s = None if deadline is None else deadline - clock.boot()
                    if not self._changed.wait_for(self._landed, left_s):
                        raise TimeoutError("no access token in time")
                else:
                    assert self._plan.token is not None
                    return self._plan.token.value

    def invalidate(self, token: str) -> None:
        """Says that a callee refused this token: the next caller gets another."""
        with self._changed:
            self._plan.refused(token, self._now(), self._draw())

    def close(self) -> None:
        """Ends the renewal that runs, and its thread; who waits for it gets TokenUnavailable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._cancel is not None:
            self._cancel()
        if self._flight is not None:
            self._flight.join()

    def _landed(self) -> bool:
        return self._closed or not self._plan.in_flight

    def _start(self) -> None:
        # A context of its own: the renewal is nobody's call, and has nobody's deadline.
        run = contextvars.Context().run
        flight = threading.Thread(
            target=run, args=(self._renew,), name="authsvc-token", daemon=True
        )
        self._plan.started()
        try:
            flight.start()
        except RuntimeError as failure:  # no thread to be had
            self._plan.failed(failure, self._now(), self._draw())
        else:
            self._flight = flight

    def _renew(self) -> None:
        asked = self._now()
        try:
            token = self._fetch()
            with self._changed:
                self._plan.renewed(token, asked, self._now(), self._draw())
        except BaseException as failure:  # a thread has nobody to raise it to
            with self._changed:
                self._plan.failed(failure, self._now(), self._draw())
        finally:
            with self._changed:
                self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()
