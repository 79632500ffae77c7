"""Where time comes from; everything that judges or plans takes it as a parameter."""

import time
from functools import partial

_BOOT_ID = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def wall() -> float:
    """Seconds since the epoch: for certificates."""
    return time.clock_gettime(time.CLOCK_REALTIME)


boot = partial(time.clock_gettime, _BOOT_ID)
"""Seconds that also count while the machine sleeps and never go back: for ages."""
