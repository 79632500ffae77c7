"""Where time comes from; only how long a call took is measured elsewhere."""

import time
from functools import partial
from typing import Protocol


class Clock(Protocol):
    """A source of time; tests move one by hand."""

    def wall(self) -> float:
        """Seconds since the epoch, by this machine's clock: for logs and certificates."""

    def boot(self) -> float:
        """Seconds of elapsed time that also count while the machine sleeps: for ages."""


class SystemClock:
    """The clock of this machine."""

    wall = staticmethod(time.time)
    boot = staticmethod(
        partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    )
