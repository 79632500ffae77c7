"""A feed that tests can bend: it plays lost commits and other databases."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.store.port import Change, Done, FeedPage, change, distinct, nonce
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind
from authsvc_client.core.state import REVISIONS_PER_EPOCH


@dataclass
class BentFeed:
    """A feed of lists (authsvc.store.port.FeedStore)."""

    clock: Clock
    fingerprint: str = "one"
    known_fingerprint: str = ""
    head: int = REVISIONS_PER_EPOCH
    compacted_to: int = REVISIONS_PER_EPOCH
    nonces: dict[int, str] = field(default_factory=lambda: {REVISIONS_PER_EPOCH: nonce()})
    markers: list[Marker] = field(default_factory=list)
    beaten: float | None = None
    """None: as of SQLite, which has no beat."""
    standby: bool = False
    writable: bool = True
    beats: int = 0

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        unique = distinct(changes)
        self.head += 1
        self.nonces[self.head] = nonce()
        until = self.clock.wall() + MARKER_LIFETIME_S
        self.markers += [Marker(one.kind, one.key, self.head, until) for one in unique]
        return self.head

    async def read(self, cursor: int) -> FeedPage:
        now = self.clock.wall()
        found = (m for m in self.markers if m.revision > cursor and (cursor or m.until > now))
        return FeedPage(
            head=self.head,
            compacted_to=self.compacted_to,
            fingerprint=self.fingerprint,
            known_fingerprint=self.known_fingerprint,
            nonce=self.nonces[self.head],
            time=now,
            markers=tuple(found),
            cursor_nonce=self.nonces.get(cursor),
            beat=self.beaten,
            standby=self.standby,
        )

    async def beat(self, every_s: float) -> None:
        if not self.writable:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="read-only")
        if self.beaten is not None and abs(self.clock.wall() - self.beaten) >= every_s:
            self.beaten = self.clock.wall()
            self.beats += 1

    async def fence(self) -> int:
        await self.raise_epoch(await self.read(0), self.head, cut_off=True)
        return self.head

    async def begin(self, page: FeedPage) -> None:
        self.known_fingerprint = self.known_fingerprint or page.fingerprint

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        opening = (max(page.head, above) // REVISIONS_PER_EPOCH + 1) * REVISIONS_PER_EPOCH
        if self.head >= opening:
            return
        self.head = self.compacted_to = opening
        self.nonces[opening] = nonce()
        self.known_fingerprint = page.fingerprint
        if cut_off:
            await self.append([change(MarkerKind.CUTOFF_EVERYTHING)])
