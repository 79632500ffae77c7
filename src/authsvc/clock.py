"""Where time comes from; only how long a call took is measured elsewhere."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time; tests move one by hand."""

    def wall(self) -> float:
        """Seconds since the epoch, by this machine's clock: for logs and certificates."""

    def boot(self) -> float:
        """Seconds of elapsed time that also count while the machine sleeps: for ages."""


class SystemClock:
    """The clock of this machine."""

    _boot_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def wall(self) -> float:
        return time.time()

    def boot(self) -> float:
        return time.clock_gettime(self._boot_id)
