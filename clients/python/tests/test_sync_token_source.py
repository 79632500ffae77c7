"""SyncTokenSource: one flight for all threads, none waits for it in vain, no thread stays."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from authsvc_client import (
    Pace,
    PermissionDenied,
    Reason,
    SyncTokenSource,
    Token,
    TokenUnavailable,
)

from .support import ManualClock
from .sync_support import THREADS, WAIT_S, Gate, at_once, own_threads, until

PACE = Pace(renew_from=0.5, renew_until=0.7, spare_s=5, cool_down_s=1, cool_down_s_max=8)


class Fetch:
    """Issues t1, t2, ...; each may wait at a gate or fail. Counts how many run at once."""

    def __init__(self) -> None:
        self.count = self.running = self.most = 0
        self.gate: Gate | None = None
        self.failure: BaseException | None = None

    def __call__(self) -> Token:
        self.count += 1
        self.running += 1
        self.most = max(self.most, self.running)
        value = f"t{self.count}"
        try:
            if self.gate is not None:
                self.gate()
            if self.failure is not None:
                raise self.failure
        finally:
            self.running -= 1
        return Token(value, 100)


class World:
    """A source, its clock, and what it fetches by."""

    def __init__(self) -> None:
        self.fetch, self.clock = Fetch(), ManualClock()
        self.source = SyncTokenSource(self.fetch, pace=PACE, now=self.clock, draw=lambda: 0.5)

    def landed(self) -> None:
        """Waits for the renewal that runs."""
        flight = self.source._flight
        assert flight is not None
        flight.join(WAIT_S)

    def waiters(self) -> int:
        return len(self.source._changed._waiters)  # type: ignore[attr-defined]


@pytest.fixture
def world() -> Iterator[World]:
    """When the source is closed no thread of it is left."""
    made = World()
    with made.source:
        yield made
        if made.fetch.gate is not None:
            made.fetch.gate.opened.set()
    assert own_threads() == []
    assert made.fetch.most <= 1


def test_threads_at_once_share_one_flight(world: World) -> None:
    gate = world.fetch.gate = Gate()

    def opens() -> None:
        until(lambda: world.waiters() == THREADS)
        gate.opened.set()

    with ThreadPoolExecutor(1) as opener:
        opener.submit(opens)
        assert at_once(lambda _: world.source.token()) == ["t1"] * THREADS
    assert world.fetch.count == 1


def test_token_that_lives_is_handed_to_threads_at_once_without_another_flight(
    world: World,
) -> None:
    assert at_once(lambda _: {world.source.token() for _ in range(50)}) == [{"t1"}] * THREADS
    assert world.fetch.count == 1


def test_old_token_is_served_while_it_is_renewed(world: World) -> None:
    assert world.source.token() == "t1"
    world.clock.now += 60
    gate = world.fetch.gate = Gate()
    assert world.source.token() == "t1"
    assert gate.entered.wait(WAIT_S)
    assert at_once(lambda _: world.source.token()) == ["t1"] * THREADS
    assert len(own_threads()) == 1
    gate.opened.set()
    world.landed()
    assert world.source.token() == "t2"
    assert world.fetch.count == 2


def test_thread_of_a_renewal_ends_with_it(world: World) -> None:
    world.source.token()
    world.landed()
    assert own_threads() == []


def test_failed_renewal_is_not_tried_again_before_it_cooled_down(world: World) -> None:
    failure = world.fetch.failure = PermissionDenied("wait", reason=Reason.CLIENT_PENDING)

    def ask(_: int) -> TokenUnavailable:
        with pytest.raises(TokenUnavailable) as caught:
            world.source.token()
        return caught.value

    for error in at_once(ask):
        assert (error.reason, error.retry_after_s) == (Reason.CLIENT_PENDING, 0.75)
        assert error.__cause__ is failure
    assert world.fetch.count == 1
    world.clock.now += 0.76
    world.fetch.failure = None
    assert world.source.token() == "t2"


def test_failed_renewal_leaves_the_old_token_until_its_end(world: World) -> None:
    assert world.source.token() == "t1"
    world.fetch.failure = OSError("down")
    world.clock.now += 60
    assert world.source.token() == "t1"
    world.landed()
    assert world.source.token() == "t1"
    assert world.fetch.count == 2
    world.clock.now += 35.1
    with pytest.raises(TokenUnavailable):
        world.source.token()
    assert world.fetch.count == 3


def test_expired_token_is_never_served_even_while_its_renewal_runs(world: World) -> None:
    assert world.source.token() == "t1"
    gate = world.fetch.gate = Gate()
    world.clock.now += 94
    assert world.source.token() == "t1"
    world.clock.now += 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(world.source.token)
        until(lambda: world.waiters() == 1)
        gate.opened.set()
        assert waiting.result(WAIT_S) == "t2"


def test_token_that_is_over_when_it_comes_is_not_served(world: World) -> None:
    def slow() -> Token:
        world.clock.now += 100
        return Token("late", 100)

    with (
        SyncTokenSource(slow, pace=PACE, now=world.clock) as source,
        pytest.raises(TokenUnavailable),
    ):
        source.token()


def test_refused_token_is_replaced_and_a_late_refusal_of_it_is_not_heeded(world: World) -> None:
    assert world.source.token() == "t1"
    world.source.invalidate("t1")
    assert world.source.token() == "t2"
    world.source.invalidate("t1")
    assert world.source.token() == "t2"


def test_wait_ends_in_its_time_and_the_renewal_goes_on(world: World) -> None:
    gate = world.fetch.gate = Gate()
    for timeout_s in (0.02, 0.0, -1.0):
        with pytest.raises(TimeoutError):
            world.source.token(timeout_s)
    gate.opened.set()
    assert world.source.token(WAIT_S) == "t1"
    assert world.source.token(0.0) == "t1"
    assert world.fetch.count == 1


@pytest.mark.parametrize("failure", [SystemExit(1), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_whatever_ends_a_renewal_counts_as_a_failure(world: World, failure: Any) -> None:
    """Or all would wait for it for ever."""
    world.fetch.failure = failure
    with pytest.raises(TokenUnavailable) as caught:
        world.source.token(WAIT_S)
    assert caught.value.__cause__ is failure


def test_fetch_that_answers_no_token_counts_as_a_failure(world: World) -> None:
    nothing: Any = lambda: None  # noqa: E731
    with (
        SyncTokenSource(nothing, pace=PACE, now=world.clock) as source,
        pytest.raises(TokenUnavailable),
    ):
        source.token(WAIT_S)


def test_no_thread_to_be_had_counts_as_a_failure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(TokenUnavailable):
            world.source.token(WAIT_S)
    world.clock.now += 1
    assert world.source.token() == "t1"


def test_close_ends_who_waits_and_the_flight(world: World) -> None:
    gate = world.fetch.gate = Gate()
    source = SyncTokenSource(world.fetch, cancel=gate.opened.set, pace=PACE, now=world.clock)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(source.token) for _ in range(3)]
        assert gate.entered.wait(WAIT_S)
        source.close()
        assert own_threads() == []
        for it in waiting:
            with pytest.raises(TokenUnavailable, match="closed"):
                it.result(WAIT_S)
    with pytest.raises(TokenUnavailable, match="closed"):
        source.token()
    source.close()


def test_close_of_a_source_that_was_never_asked(world: World) -> None:
    world.source.close()
    with pytest.raises(TokenUnavailable, match="closed"):
        world.source.token()
    assert world.fetch.count == 0


def test_renewal_runs_in_no_callers_context(world: World) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nobody's")
    seen: list[str] = []

    def fetch() -> Token:
        seen.append(variable.get())
        return Token("t", 100)

    variable.set("the first caller's")
    with SyncTokenSource(fetch, now=world.clock) as source:
        source.token()
    assert seen == ["nobody's"]
