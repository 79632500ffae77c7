"""A feed that tests can bend: it plays lost commits and other databases."""

from collections.abc import AsyncIterator, Sequence
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
    page_revisions: int = 2**32
    """More than these are no part of one page."""

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        unique = distinct(changes)
        self.head += 1
        self.nonces[self.head] = nonce()
        until = self.clock.wall() + MARKER_LIFETIME_S
        self.markers += [Marker(one.kind, one.key, self.head, until) for one in unique]
        return self.head

    async def read(self, cursor: int) -> FeedPage:
        head = self.head
        if cursor and cursor <= head:
            head = min(head, cursor + self.page_revisions)
        return FeedPage(
            head=head,
            compacted_to=self.compacted_to,
            fingerprint=self.fingerprint,
            known_fingerprint=self.known_fingerprint,
            nonce=self.nonces[head],
            time=self.clock.wall(),
            markers=tuple(m for m in self.markers if 0 < cursor < m.revision <= head),
            cursor_nonce=self.nonces.get(cursor),
            beat=self.beaten,
            standby=self.standby,
            more=head < self.head,
        )

    async def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        now = self.clock.wall()
        found = [m for m in self.markers if m.revision <= head and m.until > now]
        for start in range(0, len(found), rows):
            yield found[start : start + rows]

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
