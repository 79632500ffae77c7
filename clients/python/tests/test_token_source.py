"""TokenSource: one flight for all, nobody's cancellation touches it, no task left behind."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar

import pytest

from authsvc_client import (
    Pace,
    PermissionDenied,
    Reason,
    Token,
    TokenSource,
    TokenUnavailable,
)

from .support import Gate, ManualClock

PACE = Pace(renew_from=0.5, renew_until=0.7, spare_s=5, cool_down_s=1, cool_down_s_max=8)


class Fetch:
    """Issues t1, t2, ...; each may wait at a gate or fail."""

    def __init__(self) -> None:
        self.count = 0
        self.gate: Gate | None = None
        self.failure: BaseException | None = None
        self.life = 100.0

    async def __call__(self) -> Token:
        self.count += 1
        value = f"t{self.count}"
        if self.gate is not None:
            await self.gate()
        if self.failure is not None:
            raise self.failure
        return Token(value, self.life)


@asynccontextmanager
async def opened(
    fetch: Callable[[], Awaitable[Token]], clock: ManualClock, timeout_s: float = 30
) -> AsyncIterator[TokenSource]:
    """A source; when it is closed no task of it is left."""
    before = asyncio.all_tasks()
    async with TokenSource(
        fetch, pace=PACE, timeout_s=timeout_s, now=clock, draw=lambda: 0.5
    ) as source:
        yield source
    assert asyncio.all_tasks() <= before


async def turns() -> None:
    """Lets everything run that can run now."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_hundred_callers_share_one_flight() -> None:
    fetch, clock = Fetch(), ManualClock()
    fetch.gate = Gate()
    async with opened(fetch, clock) as source:
        callers = [asyncio.create_task(source.token()) for _ in range(100)]
        await fetch.gate.entered.wait()
        await turns()
        fetch.gate.opened.set()
        assert set(await asyncio.gather(*callers)) == {"t1"}
    assert fetch.count == 1


async def test_old_token_is_served_while_it_is_renewed() -> None:
    fetch, clock = Fetch(), ManualClock()
    async with opened(fetch, clock) as source:
        assert await source.token() == "t1"
        clock.now += 60
        fetch.gate = Gate()
        assert await source.token() == "t1"
        await fetch.gate.entered.wait()
        assert [await source.token() for _ in range(5)] == ["t1"] * 5
        fetch.gate.opened.set()
        await turns()
        assert await source.token() == "t2"
    assert fetch.count == 2


async def test_cancelled_first_caller_does_not_end_the_renewal_of_the_others() -> None:
    fetch, clock = Fetch(), ManualClock()
    fetch.gate = Gate()
    async with opened(fetch, clock) as source:
        first, *others = [asyncio.create_task(source.token()) for _ in range(3)]
        await fetch.gate.entered.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        fetch.gate.opened.set()
        assert await asyncio.gather(*others) == ["t1", "t1"]
    assert fetch.count == 1


async def test_failed_renewal_is_not_tried_again_before_it_cooled_down() -> None:
    fetch, clock = Fetch(), ManualClock()
    fetch.failure = PermissionDenied("wait", reason=Reason.CLIENT_PENDING)
    async with opened(fetch, clock) as source:
        with pytest.raises(TokenUnavailable) as first:
            await source.token()
        assert first.value.reason is Reason.CLIENT_PENDING
        assert first.value.__cause__ is fetch.failure
        assert first.value.retry_after_s == 0.75
        for _ in range(10):
            with pytest.raises(TokenUnavailable):
                await source.token()
        assert fetch.count == 1
        clock.now += 0.76
        fetch.failure = None
        assert await source.token() == "t2"


async def test_failed_renewal_leaves_the_old_token_until_its_end() -> None:
    fetch, clock = Fetch(), ManualClock()
    async with opened(fetch, clock) as source:
        assert await source.token() == "t1"
        fetch.failure = OSError("down")
        clock.now += 60
        assert await source.token() == "t1"
        await turns()
        assert await source.token() == "t1"
        assert fetch.count == 2
        clock.now += 35.1
        with pytest.raises(TokenUnavailable):
            await source.token()
        assert fetch.count == 3


async def test_expired_token_is_never_served_even_while_its_renewal_runs() -> None:
    fetch, clock = Fetch(), ManualClock()
    async with opened(fetch, clock) as source:
        assert await source.token() == "t1"
        fetch.gate = Gate()
        clock.now += 94
        assert await source.token() == "t1"
        clock.now += 1
        waiting = asyncio.create_task(source.token())
        await turns()
        assert not waiting.done()
        fetch.gate.opened.set()
        assert await waiting == "t2"


async def test_token_that_is_over_when_it_comes_is_not_served() -> None:
    clock = ManualClock()

    async def slow() -> Token:
        clock.now += 100
        return Token("late", 100)

    async with opened(slow, clock) as source:
        with pytest.raises(TokenUnavailable):
            await source.token()


async def test_refused_token_is_replaced_and_a_late_refusal_of_it_is_not_heeded() -> None:
    fetch, clock = Fetch(), ManualClock()
    async with opened(fetch, clock) as source:
        assert await source.token() == "t1"
        source.invalidate("t1")
        assert await source.token() == "t2"
        source.invalidate("t1")
        assert await source.token() == "t2"


async def test_attempt_that_hangs_is_given_up() -> None:
    fetch, clock = Fetch(), ManualClock()
    fetch.gate = Gate()
    async with opened(fetch, clock, timeout_s=0.01) as source:
        with pytest.raises(TokenUnavailable) as caught:
            await source.token()
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_attempt_whose_channel_is_closed_counts_as_a_failure() -> None:
    """grpc.aio cancels who awaits a call when its channel is closed."""
    fetch, clock = Fetch(), ManualClock()
    fetch.failure = asyncio.CancelledError()
    async with opened(fetch, clock) as source:
        with pytest.raises(TokenUnavailable):
            await source.token()
        fetch.failure = None
        clock.now += 1
        assert await source.token() == "t2"


async def test_attempt_cancelled_before_it_ran_counts_as_a_failure() -> None:
    fetch, clock = Fetch(), ManualClock()
    async with opened(fetch, clock) as source:
        before = asyncio.all_tasks()
        waiting = asyncio.create_task(source.token())
        await asyncio.sleep(0)
        (flight,) = asyncio.all_tasks() - before - {waiting}
        flight.cancel()
        with pytest.raises(TokenUnavailable):
            await waiting
    assert fetch.count == 0


async def test_close_ends_the_flight_and_who_waits_for_it() -> None:
    fetch, clock = Fetch(), ManualClock()
    fetch.gate = Gate()
    async with opened(fetch, clock) as source:
        waiting = asyncio.create_task(source.token())
        await fetch.gate.entered.wait()
        await source.aclose()
        with pytest.raises(TokenUnavailable, match="closed"):
            await waiting
        with pytest.raises(TokenUnavailable, match="closed"):
            await source.token()


async def test_renewal_runs_in_no_callers_context() -> None:
    """What belongs to the call that happened to come first is not the renewal's."""
    variable: ContextVar[str] = ContextVar("variable", default="nobody's")
    seen: list[str] = []

    async def fetch() -> Token:
        seen.append(variable.get())
        return Token("t", 100)

    variable.set("the first caller's")
    async with opened(fetch, ManualClock()) as source:
        await source.token()
    assert seen == ["nobody's"]


def test_token_shows_no_value() -> None:
    assert "secret" not in repr(Token("secret", 1.0))
