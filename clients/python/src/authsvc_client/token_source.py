"""A service's own access token, kept fresh: a plan without I/O, and a thin asyncio shell."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from random import random  # noqa: TID251 - spreads load, keeps no secret
from types import TracebackType
from typing import Self

from . import clock
from .errors import AuthsvcError, TokenUnavailable


@dataclass(frozen=True, slots=True)
class Token:
    """An access token as it was issued; its value never shows in a repr."""

    value: str = field(repr=False)
    lifetime_s: float
    """From the moment it was made: no clock of this machine is compared with the server's."""
    scopes: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()
    jti: str = ""
    refresh_token: str = field(default="", repr=False)
    """To use next, where one came with it."""


class Step(Enum):
    """What to do when a token is asked for."""

    USE = auto()
    """Take the one at hand."""
    USE_AND_RENEW = auto()
    """Take it, and begin a renewal."""
    WAIT = auto()
    """Wait for the renewal, which begins now unless it is under way."""
    COOL_DOWN = auto()
    """There is no live token, and the last renewal failed too recently to try again."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When a token is renewed. Times in seconds."""

    renew_from: float = 0.5
    """Share of its life after which a token is renewed, at the earliest..."""
    renew_until: float = 0.7
    """... and at the latest: in between by chance, so that replicas do not come at once."""
    spare_s: float = 5.0
    """A token with less life left than this, or than a tenth of it, is not handed out."""
    cool_down_s: float = 0.5
    """Pause after a failed renewal; it doubles with each..."""
    cool_down_s_max: float = 30.0
    """... up to this."""

    def __post_init__(self) -> None:
        """Raises ValueError for a pace that would renew never, or without end."""
        if not 0 < self.renew_from <= self.renew_until < 1:
            raise ValueError("0 < renew_from <= renew_until < 1 does not hold")
        if not 0 < self.cool_down_s <= self.cool_down_s_max or self.spare_s < 0:
            raise ValueError("0 < cool_down_s <= cool_down_s_max and spare_s >= 0 do not hold")


class TokenPlan:
    """Decides; knows no clock, no loop and no server. `now` in seconds of one clock that only
    goes forward, `draw` a random number of [0, 1)."""

    __slots__ = (
        "_failures",
        "_obtained",
        "_pace",
        "_refusals",
        "_renew_time",
        "_retry_time",
        "_usable_until",
        "failure",
        "in_flight",
        "token",
    )

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self.token: Token | None = None
        self.in_flight = False
        self.failure: BaseException | None = None
        """Why the last renewal failed; None once one succeeded."""
        self._obtained = self._usable_until = self._renew_time = float("-inf")
        self._retry_time = float("-inf")
        self._failures = 0
        self._refusals = 0

    def decide(self, now: float) -> Step:
        """What to do at `now`. USE and USE_AND_RENEW only while `token` lives."""
        usable = self.token is not None and now < self._usable_until
        if self.in_flight:
            return Step.USE if usable else Step.WAIT
        if now < self._retry_time:
            return Step.USE if usable else Step.COOL_DOWN
        if not usable:
            return Step.WAIT
        return Step.USE_AND_RENEW if now >= self._renew_time else Step.USE

    def cools_down_for(self, now: float) -> float:
        """Seconds until a renewal may be tried."""
        return max(0.0, self._retry_time - now)

    def started(self) -> None:
        """A renewal began."""
        self.in_flight = True

    def renewed(self, token: Token, asked: float, now: float, draw: float) -> None:
        """A renewal that asked at `asked` brought a token at `now`. Its life counts from `asked`,
        which is before it was made."""
        pace, life = self._pace, token.lifetime_s
        usable_until = asked + life - min(pace.spare_s, life / 10)
        if not now < usable_until:
            self.failed(TimeoutError("the token was over when it came"), now, draw)
            return
        self.in_flight = False
        self.failure, self._failures, self._retry_time = None, 0, float("-inf")
        self.token, self._obtained, self._usable_until = token, now, usable_until
        self._renew_time = asked + life * (
            pace.renew_from + draw * (pace.renew_until - pace.renew_from)
        )

    def failed(self, failure: BaseException, now: float, draw: float) -> None:
        """A renewal failed; a token that still lives stays in use."""
        self.in_flight = False
        self.failure = failure
        self._failures += 1
        asked_for = failure.retry_after_s if isinstance(failure, AuthsvcError) else None
        self._retry_time = now + max(
            self._pause(self._failures, draw), min(asked_for or 0.0, self._pace.cool_down_s_max)
        )

    def refused(self, value: str, now: float, draw: float) -> None:
        """A callee refused a token. Drops it if it is the one at hand.

        The first refusal costs nothing; where young tokens are refused one after the other,
        renewals pause ever longer, or each call would cost authsvc a token.
        """
        if self.token is None or self.token.value != value:
            return
        self.token = None
        young = now - self._obtained < self._pace.cool_down_s_max
        self._refusals = self._refusals + 1 if young else 1
        if self._refusals > 1:
            self._retry_time = now + self._pause(self._refusals - 1, draw)

    def _pause(self, times: int, draw: float) -> float:
        """Doubles each time, by chance between half and whole."""
        pace = self._pace
        doubled = pace.cool_down_s * 2.0 ** min(times - 1, 62)
        return float(min(doubled, pace.cool_down_s_max)) * (0.5 + draw / 2)


class TokenSource:
    """Hands out one token to many callers, and renews it ahead of its end.

    One renewal runs at a time, in a task of its own: no caller's cancellation touches it, and
    while the old token lives nobody waits for it. Belongs to one event loop.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[Token]],
        *,
        pace: Pace | None = None,
        timeout_s: float = 10.0,
        now: Callable[[], float] = clock.boot,
        draw: Callable[[], float] = random,
    ) -> None:
        """`fetch` asks for a token, over a channel that does not need one from this source; it is
        given up after `timeout_s`."""
        self._fetch, self._timeout_s = fetch, timeout_s
        self._now, self._draw = now, draw
        self._plan = TokenPlan(pace)
        self._flight: asyncio.Task[None] | None = None
        self._closed = False

    async def token(self) -> str:
        """A token that lives; raises TokenUnavailable where there is none to be had now."""
        while True:
            if self._closed:
                raise TokenUnavailable("the token source is closed")
            step = self._plan.decide(self._now())
            if step is Step.COOL_DOWN:
                failure, pause_s = self._plan.failure, self._plan.cools_down_for(self._now())
                raise TokenUnavailable.after(failure, pause_s) from failure
            if step is not Step.USE and not self._plan.in_flight:
                self._start()
            if step is Step.WAIT:
                assert self._flight is not None
                await asyncio.wait((self._flight,))  # cancels nothing when it is cancelled
                continue
            assert self._plan.token is not None
            return self._plan.token.value

    def invalidate(self, token: str) -> None:
        """Says that a callee refused this token: the next caller gets another."""
        self._plan.refused(token, self._now(), self._draw())

    async def aclose(self) -> None:
        """Ends the renewal that runs; who waits for it gets TokenUnavailable."""
        self._closed = True
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait((self._flight,))

    def _start(self) -> None:
        self._plan.started()
        # A context of its own: the renewal is nobody's call.
        context = contextvars.Context()
        self._flight = asyncio.get_running_loop().create_task(self._renew(), context=context)
        self._flight.add_done_callback(self._landed)

    async def _renew(self) -> None:
        asked = self._now()
        try:
            async with asyncio.timeout(self._timeout_s):
                token = await self._fetch()
        except Exception as failure:
            self._plan.failed(failure, self._now(), self._draw())
        else:
            self._plan.renewed(token, asked, self._now(), self._draw())

    def _landed(self, flight: asyncio.Task[None]) -> None:
        if self._plan.in_flight and flight.cancelled():
            # By aclose(), or because the channel was closed under the call.
            self._plan.failed(asyncio.CancelledError(), self._now(), self._draw())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.aclose()
