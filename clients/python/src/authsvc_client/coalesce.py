"""Questions about tokens that are asked at the same time travel in one call."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from .errors import NotImplementedByServer
from .messages import Result, waited_too_long
from .v1 import auth_pb2

BATCH_MAX = 256
BATCH_BYTES_MAX = 2**21
UNDER_WAY_MAX = 2
"""While as many calls are under way, questions gather for the next one."""

Request: TypeAlias = auth_pb2.ValidateTokenRequest
Response: TypeAlias = auth_pb2.ValidateTokenResponse
_Waiting = tuple[Request, "asyncio.Future[Response]", contextvars.Context]


class Coalesce:
    """Answers each question as ValidateToken does. Nobody waits where nothing is under way: what is
    asked in one turn of the event loop goes together, and what is asked meanwhile goes next.
    """

    def __init__(
        self,
        one: Callable[[Request], Awaitable[Response]],
        many: Callable[[Sequence[Request]], Awaitable[Sequence[Result]]],
        timeout_s: float,
    ) -> None:
        """Both raise AuthsvcError; `timeout_s` bounds the wait of each question."""
        self._one, self._many, self._timeout_s = one, many, timeout_s
        self._has_batches = True
        self._waiting: list[_Waiting] = []
        self._sending: dict[asyncio.Task[None], list[_Waiting]] = {}
        self._is_due = False

    async def __call__(self, request: Request) -> Response:
        """Raises AuthsvcError."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Response] = loop.create_future()
        self._waiting.append((request, answer, contextvars.copy_context()))
        if not self._is_due and len(self._sending) < UNDER_WAY_MAX:
            self._is_due = True
            loop.call_soon(self._begin)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError:
            raise waited_too_long(self._timeout_s) from None
        except asyncio.CancelledError:
            self._cut()
            raise

    def _cut(self) -> None:
        """Cancels the calls whose answers nobody waits for any more."""
        for task, batch in self._sending.items():
            if all(answer.done() for _, answer, _ in batch):
                task.cancel()

    def _begin(self) -> None:
        self._is_due = False
        self._waiting = [waiting for waiting in self._waiting if not waiting[1].done()]
        while self._waiting and len(self._sending) < UNDER_WAY_MAX:
            count = fitting([request for request, _, _ in self._waiting])
            batch, self._waiting = self._waiting[:count], self._waiting[count:]
            # One that goes alone goes by its caller's request id; many have none in common.
            context = batch[0][2] if count == 1 else contextvars.Context()
            task = asyncio.create_task(self._send(batch), name="authsvc-validate", context=context)
            self._sending[task] = batch
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._sending[task]
        self._begin()

    async def _send(self, batch: list[_Waiting]) -> None:
        found: Sequence[Response | BaseException]
        try:
            found = await self._answers([request for request, _, _ in batch])
        except BaseException as error:  # a cancellation too: somebody waits for each answer
            found = [error] * len(batch)
        for (_, answer, _), result in zip(batch, found, strict=True):
            if answer.done():
                continue
            if isinstance(result, BaseException):
                answer.set_exception(result)
            else:
                answer.set_result(result)

    async def _answers(self, requests: list[Request]) -> Sequence[Response | BaseException]:
        if len(requests) > 1 and self._has_batches:
            try:
                return await self._many(requests)
            except NotImplementedByServer:  # older than this package
                self._has_batches = False
        return await asyncio.gather(*map(self._one, requests), return_exceptions=True)


def fitting(requests: Sequence[Request]) -> int:
    """How many of these, from the first, fit into one call."""
    size = 0
    for count, request in enumerate(requests[:BATCH_MAX]):
        size += request.ByteSize()
        if count and size > BATCH_BYTES_MAX:
            return count
    return min(len(requests), BATCH_MAX)
