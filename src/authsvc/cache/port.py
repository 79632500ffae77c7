"""What a cache offers to the rest: publishing, limits, shared rows. Each may lose everything."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Rate:
    """So many calls a minute, and so many at once."""

    per_minute: int
    burst: int

    @property
    def interval_s(self) -> float:
        """Between two calls of one who calls evenly."""
        return 60.0 / self.per_minute


class RateLimits(Protocol):
    """Counts calls: in any time t never more than the burst and what the rate lets through in t.

    Never raises. What is counted may be lost at any moment, and counting then begins anew.
    """

    async def __call__(self, name: str, who: str, rate: Rate) -> float:
        """Seconds to wait; 0: go on, this call is counted. `name` is that of the limit."""


class Bus(Protocol):
    """Messages among workers. Any may be lost, and anybody may have sent them."""

    async def publish(self, channel: str, message: bytes) -> bool:
        """Whether it was sent. Never raises, and never takes long."""

    def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        """Messages from now on; None once it began, and about every second without any.

        Ends where the connection does. What was sent meanwhile is lost.
        """
