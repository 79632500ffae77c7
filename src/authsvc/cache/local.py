"""What one process does by itself, where there is no Redis or it is away."""

from authsvc.cache.port import Rate
from authsvc.clock import Clock
from authsvc_client.core.cache import BytesCache

LIMITS_BYTES_MAX = 4 * 2**20
_ENTRY_BYTES = 256


class LocalRateLimits:
    """GCRA: one time for each caller, at which all that it was let do would be paid for.

    Those who were away longest are forgotten first, and may begin anew.
    """

    def __init__(self, clock: Clock, *, bytes_max: int = LIMITS_BYTES_MAX) -> None:
        self._clock = clock
        self._paid: BytesCache[tuple[str, str], float] = BytesCache(bytes_max)

    async def __call__(self, name: str, who: str, rate: Rate) -> float:
        """See `RateLimits`."""
        now, key = self._clock.boot(), (name, who)
        paid = max(now, self._paid.get(key) or now) + rate.interval_s
        wait = paid - now - rate.interval_s * rate.burst
        # What is added up a thousand times is off by some of its last digits.
        if wait > rate.interval_s * 1e-6:
            return wait
        self._paid.put(key, paid, _ENTRY_BYTES + len(who))
        return 0.0
