"""Questions that travel together: how many calls they make, and that each gets its own answer."""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from authsvc_client import AuthsvcError, DeadlineExceeded, Unavailable
from authsvc_client.coalesce import (
    BATCH_BYTES_MAX,
    BATCH_MAX,
    UNDER_WAY_MAX,
    Coalesce,
    Request,
    Response,
    fitting,
)
from authsvc_client.errors import NotImplementedByServer
from authsvc_client.messages import Result, results_of
from authsvc_client.sync_coalesce import SyncCoalesce
from authsvc_client.v1 import auth_pb2

WAIT_S = 30.0
LOST = Unavailable("gone", code=grpc.StatusCode.UNAVAILABLE)


def asked(number: int) -> Request:
    return Request(token=str(number))


def told(request: Request) -> Response:
    """Which question it answers."""
    return Response(active=True, revision=int(request.token))


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not done():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0)


class Server:
    """Answers when it is let; `bad` tokens fail, alone or as an item."""

    def __init__(self, *, batches: bool = True) -> None:
        self.singles, self.sizes = 0, list[int]()
        self.bad: set[str] = set()
        self.fails: BaseException | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = 0
        self._batches = batches

    async def one(self, request: Request) -> Response:
        self.singles += 1
        await self._wait()
        if request.token in self.bad:
            raise LOST
        return told(request)

    async def many(self, requests: Sequence[Request]) -> Sequence[Result]:
        self.sizes.append(len(requests))
        if not self._batches:
            raise NotImplementedByServer(code=grpc.StatusCode.UNIMPLEMENTED)
        await self._wait()
        return [LOST if each.token in self.bad else told(each) for each in requests]

    async def _wait(self) -> None:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails is not None:
            raise self.fails


def coalesce(server: Server, timeout_s: float = WAIT_S) -> Coalesce:
    return Coalesce(server.one, server.many, timeout_s)


async def test_one_question_goes_alone_and_at_once() -> None:
    server = Server()
    ask = coalesce(server)
    for number in range(3):
        assert (await ask(asked(number))).revision == number
    assert (server.singles, server.sizes) == (3, [])


async def test_those_of_one_moment_go_together_in_their_order() -> None:
    server = Server()
    ask = coalesce(server)
    answers = await asyncio.gather(*(ask(asked(number)) for number in range(1000)))
    assert [answer.revision for answer in answers] == list(range(1000))
    assert sum(server.sizes) + server.singles == 1000
    assert server.sizes[0] == BATCH_MAX
    assert len(server.sizes) == 4


async def test_what_is_asked_meanwhile_goes_next() -> None:
    server = Server()
    server.gate.clear()
    ask = coalesce(server)
    tasks = []
    for number in range(50):  # each in a turn of its own
        tasks.append(asyncio.create_task(ask(asked(number))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert server.singles == UNDER_WAY_MAX
    server.gate.set()
    assert [(await task).revision for task in tasks] == list(range(50))
    assert server.sizes == [50 - UNDER_WAY_MAX]


async def test_failure_of_one_is_its_own() -> None:
    server = Server()
    server.bad = {"3"}
    ask = coalesce(server)
    answers = await asyncio.gather(*(ask(asked(n)) for n in range(9)), return_exceptions=True)
    assert isinstance(answers.pop(3), Unavailable)
    assert all(isinstance(answer, Response) for answer in answers)
    server.fails = LOST
    answers = await asyncio.gather(*(ask(asked(n)) for n in range(9)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable] * 9
    server.fails = None
    assert (await ask(asked(1))).revision == 1


async def test_server_without_batches_is_asked_one_by_one() -> None:
    server = Server(batches=False)
    server.bad = {"2"}
    ask = coalesce(server)
    for _ in range(2):
        answers = await asyncio.gather(*(ask(asked(n)) for n in range(5)), return_exceptions=True)
        assert isinstance(answers.pop(2), Unavailable)
        assert all(isinstance(answer, Response) for answer in answers)
    assert server.sizes == [5]  # asked once, and never again
    assert server.singles == 10


async def test_caller_that_goes_away_takes_nobody_along() -> None:
    server = Server()
    server.gate.clear()
    ask = coalesce(server)
    tasks = [asyncio.create_task(ask(asked(number))) for number in range(4)]
    await until(lambda: server.sizes)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    assert not server.cancelled
    server.gate.set()
    assert [(await task).revision for task in (tasks[0], *tasks[2:])] == [0, 2, 3]


async def test_call_that_nobody_waits_for_is_cancelled() -> None:
    server = Server()
    server.gate.clear()
    ask = coalesce(server)
    tasks = [asyncio.create_task(ask(asked(number))) for number in range(4)]
    await until(lambda: server.sizes)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: server.cancelled)
    server.gate.set()
    assert (await ask(asked(7))).revision == 7


async def test_question_that_found_no_place_in_time_ends() -> None:
    server = Server()
    server.gate.clear()
    ask = coalesce(server, timeout_s=0.05)
    tasks = [asyncio.create_task(ask(asked(number))) for number in range(BATCH_MAX * 4)]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in found} == {DeadlineExceeded}
    server.gate.set()
    assert (await coalesce(server)(asked(1))).revision == 1


async def test_answers_belong_to_their_questions_whoever_goes_away() -> None:
    server = Server()
    ask = coalesce(server)
    order = random.Random(11)

    async def caller(number: int) -> None:
        async with asyncio.timeout(order.random() * 0.002):
            assert (await ask(asked(number))).revision == number

    for start in range(0, 4000, 200):
        found = await asyncio.gather(
            *(caller(number) for number in range(start, start + 200)), return_exceptions=True
        )
        assert {type(each) for each in found} <= {type(None), TimeoutError}
    assert (await ask(asked(1))).revision == 1


def test_call_holds_no_more_than_the_server_takes() -> None:
    small = [asked(1)] * (BATCH_MAX + 1)
    assert fitting(small) == BATCH_MAX
    large = [Request(token="x" * 2**20)] * 5
    assert sum(each.ByteSize() for each in large[: fitting(large)]) <= BATCH_BYTES_MAX
    assert fitting([Request(token="x" * 2 * BATCH_BYTES_MAX)]) == 1


def test_answers_that_are_not_as_many_are_none() -> None:
    with pytest.raises(AuthsvcError):
        results_of(auth_pb2.BatchValidateTokensResponse(), 1)


class Blocking:
    """As Server, for threads."""

    def __init__(self, delay: Callable[[], None] = lambda: None, *, batches: bool = True) -> None:
        self._lock, self._delay, self._batches = threading.Lock(), delay, batches
        self.singles, self.sizes = 0, list[int]()

    def one(self, request: Request) -> Response:
        with self._lock:
            self.singles += 1
        self._delay()
        if request.token == "bad":
            raise LOST
        return told(request)

    def many(self, requests: Sequence[Request]) -> Sequence[Result]:
        with self._lock:
            self.sizes.append(len(requests))
        if not self._batches:
            raise NotImplementedByServer(code=grpc.StatusCode.UNIMPLEMENTED)
        self._delay()
        return [LOST if each.token == "bad" else told(each) for each in requests]


@pytest.mark.parametrize("batches", [True, False])
def test_threads_get_the_answers_to_their_questions(batches: bool) -> None:
    server = Blocking(batches=batches)
    ask = SyncCoalesce(server.one, server.many, WAIT_S)

    def work(start: int) -> None:
        for number in range(start, start + 200):
            assert ask(asked(number)).revision == number
        with pytest.raises(Unavailable):
            ask(Request(token="bad"))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(0, 16_000, 1000)))
    if batches:
        assert server.singles + sum(server.sizes) == 16 * 201


def test_threads_that_wait_go_together() -> None:
    gate = threading.Event()
    server = Blocking(gate.wait)  # type: ignore[arg-type]
    ask = SyncCoalesce(server.one, server.many, WAIT_S)
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(ask, asked(number)) for number in range(40)]
        while len(ask._waiting) < 40 - UNDER_WAY_MAX:
            assert not any(answer.done() for answer in answers)
        gate.set()
        assert [answer.result(WAIT_S).revision for answer in answers] == list(range(40))
    assert server.sizes == [40 - UNDER_WAY_MAX]


def test_thread_does_not_wait_for_ever() -> None:
    gate = threading.Event()
    server = Blocking(gate.wait)  # type: ignore[arg-type]
    ask = SyncCoalesce(server.one, server.many, 0.05)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, asked(number)) for number in range(8)]
        while sum(answer.done() for answer in answers) < 8 - UNDER_WAY_MAX:
            pass
        gate.set()
        found = [answer.exception(WAIT_S) for answer in answers]
    assert sum(isinstance(each, DeadlineExceeded) for each in found) == 8 - UNDER_WAY_MAX
    assert found.count(None) == UNDER_WAY_MAX
    assert not ask._waiting
