"""A store in memory, for tests: held to the same contract suite as the databases."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog, Client, ClientState, IdentityKind, KeyState, Resource, SigningKey
from authsvc.store.port import (
    KEYS_CHANGES,
    RESOURCE_CHANGES,
    Change,
    FeedPage,
    Store,
    Transition,
    distinct,
    name_taken,
    nonce,
    require_step,
    review_changes,
)
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH


@dataclass
class MemoryFeed:
    """The feed; `fingerprint` may be changed by a test to play another database."""

    clock: Clock
    fingerprint: str = "memory"
    known_fingerprint: str = ""
    head: int = REVISIONS_PER_EPOCH
    compacted_to: int = REVISIONS_PER_EPOCH
    nonces: dict[int, str] = field(default_factory=lambda: {REVISIONS_PER_EPOCH: nonce()})
    markers: list[Marker] = field(default_factory=list)

    async def append(self, changes: Sequence[Change]) -> int:
        unique = distinct(changes)
        self.head += 1
        self.nonces[self.head] = nonce()
        until = self.clock.wall() + MARKER_LIFETIME_S
        for kind, key in unique:
            self.markers.append(Marker(kind, key, self.head, until))
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
        )

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
            kind = MarkerKind.CUTOFF_EVERYTHING
            await self.append([(kind, marker_key(kind))])


@dataclass
class MemoryClients:
    """Clients."""

    feed: MemoryFeed
    rows: dict[str, Client] = field(default_factory=dict)

    async def get(self, client_id: str) -> Client | None:
        return self.rows.get(client_id)

    async def by_identity(self, names: Collection[tuple[IdentityKind, str]]) -> tuple[Client, ...]:
        return tuple(
            client
            for client in self.rows.values()
            if client.state is not ClientState.REJECTED and _name(client) in names
        )

    async def page(self, state: ClientState | None, after: str, limit: int) -> tuple[Client, ...]:
        wanted = (
            self.rows[key]
            for key in sorted(self.rows)
            if key > after and state in (None, self.rows[key].state)
        )
        return tuple(wanted)[:limit]

    async def add(self, client: Client) -> None:
        if client.client_id in self.rows or self._is_taken(client):
            raise name_taken()
        self.rows[client.client_id] = client

    def _is_taken(self, client: Client) -> bool:
        name = _name(client)
        return name is not None and any(
            _name(row) == name and row.state is not ClientState.REJECTED
            for row in self.rows.values()
            if row.client_id != client.client_id
        )

    async def move(self, step: Transition) -> tuple[Client, int]:
        client = self.rows.get(step.client_id)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        require_step(step, client.state, client.version)
        if step.to is not ClientState.REJECTED and self._is_taken(client):
            raise name_taken()
        revision = await self.feed.append(review_changes(step))
        now = self.feed.clock.wall()
        expiry = client.approval_expire_time
        self.rows[step.client_id] = replace(
            client,
            state=step.to,
            version=client.version + 1,
            reviewer=step.reviewer,
            review_comment=step.comment,
            review_time=now,
            update_time=now,
            cutoff=revision if step.cut_off else client.cutoff,
            approval_expire_time=(
                step.approval_expire_time
                if step.to is ClientState.APPROVED and not step.keep_expiry
                else expiry
            ),
        )
        return self.rows[step.client_id], revision


@dataclass
class MemoryResources:
    """Resources."""

    feed: MemoryFeed
    clients: MemoryClients
    rows: dict[str, Resource] = field(default_factory=dict)

    async def catalog(self) -> Catalog:
        return Catalog(tuple(self.rows[key] for key in sorted(self.rows)))

    async def add(self, resource: Resource) -> int:
        if resource.owner_client_id and resource.owner_client_id not in self.clients.rows:
            raise AuthError(Reason.CLIENT_NOT_FOUND, "owner_client_id")
        taken = {scope for row in self.rows.values() for scope in row.scopes}
        if resource.resource_id in self.rows or taken & resource.scopes.keys():
            raise AuthError(
                Reason.ALREADY_EXISTS, "resource id or scope", metadata={"field": "resource"}
            )
        self.rows[resource.resource_id] = resource
        return await self.feed.append(RESOURCE_CHANGES)


@dataclass
class MemoryKeys:
    """Signing keys."""

    feed: MemoryFeed
    rows: list[SigningKey] = field(default_factory=list)

    async def all(self) -> tuple[SigningKey, ...]:
        return tuple(self.rows)

    async def add_first(self, key: SigningKey) -> None:
        if not any(row.state is KeyState.CURRENT for row in self.rows):
            self.rows.append(key)
            await self.feed.append(KEYS_CHANGES)


def _name(client: Client) -> tuple[IdentityKind, str] | None:
    identity = client.metadata.identity
    return (identity.kind, identity.value) if identity else None


def memory_store(clock: Clock) -> Store:
    """An empty store, ready to use."""
    feed = MemoryFeed(clock)
    clients = MemoryClients(feed)
    return Store(clients, MemoryResources(feed, clients), MemoryKeys(feed), feed)
