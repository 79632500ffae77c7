"""As `coalesce`, for threads."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import clock
from .coalesce import UNDER_WAY_MAX, Request, Response, fitting
from .errors import AuthsvcError, NotImplementedByServer
from .messages import Result, waited_too_long


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    found: Response | BaseException | None = None


class SyncCoalesce:
    """As Coalesce: a thread sends its own question and those of the threads that wait with it."""

    def __init__(
        self,
        one: Callable[[Request], Response],
        many: Callable[[Sequence[Request]], Sequence[Result]],
        timeout_s: float,
    ) -> None:
        self._one, self._many, self._timeout_s = one, many, timeout_s
        self._has_batches = True
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._sending = 0

    def __call__(self, request: Request) -> Response:
        """Raises AuthsvcError."""
        own, deadline = _Waiting(request), clock.boot() + self._timeout_s
        with self._changed:
            self._waiting.append(own)
            while own.found is None:
                if self._sending < UNDER_WAY_MAX and own in self._waiting:
                    self._send(own)
                elif not self._changed.wait(max(0.0, deadline - clock.boot())):
                    if own in self._waiting:
                        self._waiting.remove(own)
                    raise waited_too_long(self._timeout_s)
        if isinstance(own.found, BaseException):
            raise own.found
        return own.found

    def _send(self, own: _Waiting) -> None:
        """Sends those who wait longest; the lock is free meanwhile."""
        count = fitting([waiting.request for waiting in self._waiting])
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        self._sending += 1
        self._changed.release()
        found: Sequence[Response | BaseException] = []
        try:
            requests = [waiting.request for waiting in batch]
            if batch == [own]:
                found = self._answers(requests)
            else:  # which have no request id in common
                found = contextvars.Context().run(self._answers, requests)
        except BaseException as error:
            found = [error] * len(batch)
            if not isinstance(error, Exception):
                raise
        finally:
            self._changed.acquire()
            self._sending -= 1
            for waiting, result in zip(batch, found, strict=True):
                waiting.found = result
            self._changed.notify_all()

    def _answers(self, requests: list[Request]) -> Sequence[Response | BaseException]:
        if len(requests) > 1 and self._has_batches:
            try:
                return self._many(requests)
            except NotImplementedByServer:
                self._has_batches = False
        return [self._alone(request) for request in requests]

    def _alone(self, request: Request) -> Response | BaseException:
        try:
            return self._one(request)
        except AuthsvcError as error:
            return error
