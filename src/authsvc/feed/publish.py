"""What was committed is told to other workers at once, and heard from them.

A message is the fast path alone: it may kill and invalidate, and what is lost is in the table, by
which alone the applied revision advances (docs/decisions/0017).
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from hashlib import sha256
from struct import Struct

import structlog

from authsvc.cache.port import Bus
from authsvc.clock import Clock
from authsvc.feed.follow import Follow
from authsvc.keys.secrets import Mac, jitter, new_handle
from authsvc.store.port import Change
from authsvc.telemetry import Counters, Metrics
from authsvc_client.core.markers import KEY_BYTES, MARKER_LIFETIME_S, Marker, MarkerKind
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State

QUEUE_MAX = 16384
MESSAGE_CHANGES_MAX = 1024
"""About 25 KiB."""
RETRY_S = 0.5
FORGED_LOG_S = 60.0

_VERSION = 1
_HEAD = Struct(">B16s")
_CHANGE = Struct(f">QB{KEY_BYTES}s")

log = structlog.get_logger()

_Said = tuple[int, int, bytes]
"""Revision, kind and key of a change."""


class Publish:
    """One worker's word to the others, and theirs to it."""

    def __init__(
        self,
        bus: Bus,
        mac: Mac,
        issuer: str,
        follow: Follow,
        state: State,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._mac = mac
        self._name = f"authsvc:{sha256(issuer.encode()).hexdigest()[:32]}"
        self._follow = follow
        self._state = state
        self._clock = clock
        self._self = new_handle()
        self._queue: deque[_Said] = deque(maxlen=QUEUE_MAX)
        self._woken = asyncio.Event()
        self._logged = -FORGED_LOG_S
        self.messages = Counters(
            "authsvc_feed_messages",
            "Messages among workers (sent, lost; heard, forged, not_understood)",
            ("outcome",),
        )
        metrics.registry.register(self.messages)

    def channel(self, epoch: int) -> str:
        """Of a deployment, and of one history of it."""
        return f"{self._name}:{epoch}"

    def offer(self, revision: int, changes: Sequence[Change]) -> None:
        """Takes what was committed. Of too much the newest is told: it makes others read all."""
        self._queue.extend((revision, int(one.kind), one.key) for one in changes)
        self._woken.set()

    async def send(self) -> None:
        """Tells what was offered, until cancelled; what comes together goes as one message."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            gathered = list(self._queue)
            self._queue.clear()
            for channel, message in self._messages(gathered):
                is_sent = await self._bus.publish(channel, message)
                self.messages.labels("sent" if is_sent else "lost").inc()

    def _messages(self, said: Sequence[_Said]) -> Iterator[tuple[str, bytes]]:
        for epoch in sorted({revision // REVISIONS_PER_EPOCH for revision, _, _ in said}):
            channel = self.channel(epoch)
            these = [each for each in said if each[0] // REVISIONS_PER_EPOCH == epoch]
            for at in range(0, len(these), MESSAGE_CHANGES_MAX):
                piece = these[at : at + MESSAGE_CHANGES_MAX]
                yield channel, self._mac.seal(channel, self._encode(piece))

    def _encode(self, said: Iterable[_Said]) -> bytes:
        return _HEAD.pack(_VERSION, self._self) + b"".join(_CHANGE.pack(*each) for each in said)

    async def hear(self) -> None:
        """Listens until cancelled; what was missed meanwhile is read from the table."""
        while True:
            epoch = self._epoch
            channel = self.channel(epoch)
            first = True
            async with aclosing(self._bus.listen(channel)) as messages:
                async for message in messages:
                    if message is not None:
                        await self._heard(epoch, channel, message)
                    elif first:
                        self._follow.poke()
                    first = False
                    if epoch != self._epoch:
                        break
            if epoch == self._epoch:
                await asyncio.sleep(RETRY_S / 2 + jitter(RETRY_S))

    @property
    def _epoch(self) -> int:
        return self._state.revision // REVISIONS_PER_EPOCH

    async def _heard(self, epoch: int, channel: str, message: bytes) -> None:
        payload = self._mac.open(channel, message)
        if payload is None:
            self._forged()
            return
        said = self._decode(payload, epoch)
        if said is None:  # of a newer version, so that the table is all that can be believed
            self.messages.labels("not_understood").inc()
            self._follow.poke_soon()
        elif said:
            self.messages.labels("heard").inc()
            until = self._state.now(self._clock.boot()) + MARKER_LIFETIME_S
            await self._follow.hear(
                Marker(MarkerKind(kind), key, revision, until) for revision, kind, key in said
            )

    def _decode(self, payload: bytes, epoch: int) -> list[_Said] | None:
        """What another said: of oneself nothing, and None for what is not understood."""
        body = len(payload) - _HEAD.size
        if body < 0 or payload[0] != _VERSION or body % _CHANGE.size:
            return None
        if _HEAD.unpack_from(payload)[1] == self._self:
            return []
        said: list[_Said] = list(_CHANGE.iter_unpack(payload[_HEAD.size :]))
        is_known = all(
            kind in _KINDS and revision // REVISIONS_PER_EPOCH == epoch
            for revision, kind, _ in said
        )
        return said if is_known else None

    def _forged(self) -> None:
        self.messages.labels("forged").inc()
        now = self._clock.boot()
        if now - self._logged >= FORGED_LOG_S:
            self._logged = now
            log.error("feed.forged_message", advice="who else writes to this Redis?")


_KINDS = frozenset(map(int, MarkerKind))
