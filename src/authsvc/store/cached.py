"""Rows kept in this process; the feed drops what changed before the applied revision advances.

Concurrent reads of a row are one. What a read found that a change of the row overtook is given to
those who asked before the change, and not kept. So a row is as of the revision that was applied
when it was asked for, or later, and a token minted by it carries a `rev` that is right
(docs/decisions/0003).
"""

from functools import lru_cache, partial

from authsvc.model import Catalog, Client, ClientState, IdentityKind, Peer, peer_names
from authsvc.store.port import ANY_KEY, ClientStore, ResourceStore, RowKind, Share, unshared
from authsvc.store.reads import Reads
from authsvc_client.core.cache import BytesCache
from authsvc_client.core.markers import Marker, MarkerKind, marker_key

CLIENTS_BYTES_MAX = 32 * 2**20
_CLIENT_BYTES = 8192  # a row with all its lists, measured generously


@lru_cache(maxsize=4096)
def _key(client_id: str) -> bytes:
    return marker_key(MarkerKind.CLIENT_CHANGED, client_id)


class CachedClients:
    """Clients by id and by peer. What is not there is not remembered."""

    def __init__(self, store: ClientStore, share: Share = unshared) -> None:
        self._store = store
        self._share = share
        self._rows: BytesCache[bytes, Client] = BytesCache(CLIENTS_BYTES_MAX)
        self.row = self._rows.get
        """The row of a key of the feed, where it is at hand."""
        self._reads: Reads[bytes, tuple[int, Client | None]] = Reads()
        self._by_thumbprint: BytesCache[str, tuple[str, bytes]] = BytesCache(2**22)
        self.changes = 0
        """How often any of them changed: as long as this is the same, each is."""

    async def changed(self, markers: tuple[Marker, ...]) -> None:
        """Drops what changed; called before the applied revision advances."""
        for marker in markers:
            if marker.kind is MarkerKind.CLIENT_CHANGED:
                self.changes += 1
                if marker.key == ANY_KEY:
                    self._reads.overtake_all()
                    self._rows.clear()
                else:
                    self._reads.overtake(marker.key)
                    self._rows.drop(marker.key)

    async def get(self, client_id: str) -> Client | None:
        """One client, as of the applied revision or later."""
        key = _key(client_id)
        client = self._rows.get(key)
        return client if client is not None else await self._load(client_id, key)

    async def _load(self, client_id: str, key: bytes) -> Client | None:
        read = partial(self._share, RowKind.CLIENT, key, client_id, partial(self._read, client_id))
        _, client = await self._reads(key, read, partial(self._keep, key))
        return client

    def _keep(self, key: bytes, found: tuple[int, Client | None]) -> None:
        if found[1] is not None:
            self._rows.put(key, found[1], _CLIENT_BYTES)

    async def _read(self, client_id: str) -> tuple[int, Client | None]:
        return 0, await self._store.get(client_id)

    def held(self, peer: Peer, now: float) -> Client | None:
        """As `by_peer`, where its row is at hand."""
        known = self._by_thumbprint.get(peer.thumbprint)
        client = self._rows.get(known[1]) if known is not None else None
        return client if client is not None and _is(client, peer, now) else None

    async def by_peer(self, peer: Peer, now: float) -> Client | None:
        """The client that this certificate names; None where there is none or more than one."""
        known = self._by_thumbprint.get(peer.thumbprint)
        if known is not None:
            client_id, key = known
            client = self._rows.get(key) or await self._load(client_id, key)
            if client is not None and _is(client, peer, now):
                return client
        names = {(kind, name) for kind in IdentityKind for name in peer_names(peer, kind)}
        found = [c for c in await self._store.by_identity(names) if _is(c, peer, now)]
        # A registration that waits for review takes nothing from a client that had one.
        found = [c for c in found if c.state is not ClientState.PENDING] or found
        if len(found) != 1:
            return None
        client_id = found[0].client_id
        if found[0].state is ClientState.PENDING:
            return found[0]
        key = _key(client_id)
        self._by_thumbprint.put(peer.thumbprint, (client_id, key), 512)
        return self._rows.get(key) or await self._load(client_id, key)


def _is(client: Client, peer: Peer, now: float) -> bool:
    identity = client.metadata.identity
    if identity is None or client.state is ClientState.REJECTED:  # then its name is free
        return False
    return identity.matches(peer, now)


class CachedCatalog:
    """All resources as one value."""

    def __init__(self, store: ResourceStore) -> None:
        self._store = store
        self.held: Catalog | None = None
        """The catalog, where it is at hand."""
        self._reads: Reads[None, Catalog] = Reads()
        self.changes = 0
        """How often it changed."""

    async def changed(self, markers: tuple[Marker, ...]) -> None:
        """Drops it where a resource changed."""
        if any(marker.kind is MarkerKind.RESOURCE_CHANGED for marker in markers):
            self.changes += 1
            self._reads.overtake_all()
            self.held = None

    async def __call__(self) -> Catalog:
        """The catalog, as of the applied revision or later."""
        if self.held is not None:
            return self.held
        return await self._reads(None, self._store.catalog, self._keep)

    def _keep(self, catalog: Catalog) -> None:
        self.held = catalog
