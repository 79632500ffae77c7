"""Rate limits over all workers that share a Redis."""

from hashlib import sha256

from authsvc.cache.port import Rate, RateLimits
from authsvc.cache.redis import RedisLink

_SCRIPT = """
local read = redis.call('TIME')
local now = read[1] * 1000000 + read[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local function keep(paid)
  redis.call('SET', KEYS[1], string.format('%.0f', paid), 'PX', math.ceil((paid - now) / 1000))
end
local most = now + interval * burst
local paid = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
if paid > most then
  paid = most
  keep(paid)
end
if not (paid > now) then paid = now end
paid = paid + interval
if paid > most then return math.ceil(paid - most) end
keep(paid)
return 0
"""
"""GCRA, in microseconds by Redis' own clock, which may go back: no debt exceeds the burst."""


class RedisRateLimits:
    """One count for all; while Redis does not answer, each worker's own."""

    def __init__(self, link: RedisLink, issuer: str, local: RateLimits) -> None:
        self._link = link
        self._local = local
        self._prefix = f"authsvc:{sha256(issuer.encode()).hexdigest()[:16]}:limit"

    async def __call__(self, name: str, who: str, rate: Rate) -> float:
        """See `RateLimits`. Redis gets digests of callers, not their names."""
        key = f"{self._prefix}:{name}:{{{sha256(who.encode()).hexdigest()[:32]}}}"
        interval_us = max(1, round(rate.interval_s * 1e6))
        found = await self._link.run(
            lambda redis: redis.execute_command("EVAL", _SCRIPT, 1, key, interval_us, rate.burst),
            None,
        )
        if isinstance(found, int):
            return found / 1e6
        return await self._local(name, who, rate)
