"""Rows that are kept are given up before they could be wrong."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import TypeVar

import pytest

from authsvc.model import Catalog, Client, ClientState, IdentityKind, Peer, Validity
from authsvc.store.cached import CachedCatalog, CachedClients
from authsvc.store.port import ANY_KEY, Store
from authsvc.store.reads import Reads
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from tests.store.conftest import Place
from tests.store.test_contract import CA, a_client, a_resource, identity, step

NOW = 10.0
T = TypeVar("T")


class Watched:
    """Clients, and the catalog: counts reads, and may hold one up after it has its answer."""

    def __init__(self, store: Store) -> None:
        self.clients, self.resources = store.clients, store.resources
        self.reads = 0
        self.answered = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def get(self, client_id: str) -> Client | None:
        return await self._watch(self.clients.get(client_id))

    async def catalog(self) -> Catalog:
        return await self._watch(self.resources.catalog())

    async def _watch(self, read: Awaitable[T]) -> T:
        self.reads += 1
        found = await read
        self.answered.set()
        if self.hold is not None:
            await self.hold.wait()
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self.clients, name)


def changed(client_id: str | None) -> tuple[Marker, ...]:
    kind = MarkerKind.CLIENT_CHANGED
    key = ANY_KEY if client_id is None else marker_key(kind, client_id)
    return (Marker(kind, key, 1, 0.0),)


def a_peer(*dns: str) -> Peer:
    validity = Validity(0, 20)
    return Peer("thumb", "", frozenset(dns), "", validity, {CA: validity})


@pytest.fixture
def watched(place_sqlite: Place) -> Watched:
    return Watched(place_sqlite.open())


async def test_a_row_is_read_once_until_it_changes(watched: Watched) -> None:
    cached = CachedClients(watched)  # type: ignore[arg-type]
    for name in ("one", "two"):
        await watched.clients.add(a_client(name))
        for _ in range(3):
            assert await cached.get(name) == a_client(name)
    assert watched.reads == 2
    suspended, _ = await watched.clients.move(
        step("one", ClientState.PENDING, ClientState.SUSPENDED)
    )
    await cached.changed(changed("one"))
    assert await cached.get("one") == suspended
    await cached.get("two")
    assert watched.reads == 3
    await cached.changed(changed(None))  # after a snapshot
    await cached.get("one")
    await cached.get("two")
    assert watched.reads == 5


async def test_a_row_that_changes_while_it_is_read_is_not_kept(watched: Watched) -> None:
    cached = CachedClients(watched)  # type: ignore[arg-type]
    await watched.clients.add(a_client("one"))
    for marker in (changed("one"), changed(None)):
        watched.hold = asyncio.Event()
        watched.answered.clear()
        reading = asyncio.create_task(cached.get("one"))
        await watched.answered.wait()
        await cached.changed(marker)
        watched.hold.set()
        await reading
        watched.hold = None
        before = watched.reads
        await cached.get("one")
        assert watched.reads == before + 1
        await cached.changed(changed("one"))


async def test_who_is_not_there_is_not_remembered(watched: Watched) -> None:
    cached = CachedClients(watched)  # type: ignore[arg-type]
    assert await cached.get("one") is None
    await watched.clients.add(a_client("one"))
    assert await cached.get("one") == a_client("one")


def named(client_id: str, dns: str) -> Client:
    client = a_client(client_id)
    metadata = replace(client.metadata, identity=identity(dns, IdentityKind.SAN_DNS))
    return replace(client, metadata=metadata)


async def test_a_certificate_that_names_two_clients_names_none(watched: Watched) -> None:
    cached = CachedClients(watched)  # type: ignore[arg-type]
    await watched.clients.add(named("one", "a.test"))
    assert await cached.by_peer(a_peer("b.test"), NOW) is None
    assert await cached.by_peer(a_peer("a.test"), NOW + 100) is None
    await watched.clients.add(named("two", "b.test"))
    assert await cached.by_peer(a_peer("a.test", "b.test"), NOW) is None
    found = await cached.by_peer(a_peer("a.test"), NOW)
    assert found == named("one", "a.test")
    for name in ("one", "two"):
        await watched.clients.move(step(name, ClientState.PENDING, ClientState.APPROVED))
    assert await cached.by_peer(a_peer("a.test", "b.test"), NOW) is None


async def test_a_pending_registration_takes_no_certificate_from_an_approved_client(
    watched: Watched,
) -> None:
    cached = CachedClients(watched)  # type: ignore[arg-type]
    both = a_peer("a.test", "b.test")
    await watched.clients.add(named("waits", "b.test"))
    assert await cached.by_peer(both, NOW) == named("waits", "b.test")
    await watched.clients.add(named("one", "a.test"))
    approved, _ = await watched.clients.move(step("one", ClientState.PENDING, ClientState.APPROVED))
    await cached.changed(changed("one"))
    for _ in range(2):
        assert await cached.by_peer(both, NOW) == approved


async def test_a_rejected_client_leaves_its_name_to_the_next(watched: Watched) -> None:
    cached = CachedClients(watched)  # type: ignore[arg-type]
    await watched.clients.add(named("one", "a.test"))
    assert await cached.by_peer(a_peer("a.test"), NOW) == named("one", "a.test")
    await watched.clients.move(step("one", ClientState.PENDING, ClientState.REJECTED))
    await cached.changed(changed("one"))
    assert await cached.by_peer(a_peer("a.test"), NOW) is None
    await watched.clients.add(named("two", "a.test"))
    assert await cached.by_peer(a_peer("a.test"), NOW) == named("two", "a.test")


async def test_the_catalog_is_read_again_after_a_change(place_sqlite: Place) -> None:
    store = place_sqlite.open()
    cached = CachedCatalog(store.resources)
    first = await cached()
    assert await cached() is first
    await store.resources.add(a_resource("r", "s"))
    assert await cached() is first
    for key in (marker_key(MarkerKind.RESOURCE_CHANGED), ANY_KEY):
        await cached.changed((Marker(MarkerKind.RESOURCE_CHANGED, key, 1, 0.0),))
        again = await cached()
        assert again is not first
        assert again.owner_of_scope == {"s": "r"}
        first = again


async def _read_across_a_change(watched: Watched) -> list[set[str]]:
    """Scopes that those find who ask before a resource is added, after it, and later."""
    cached = CachedCatalog(watched)  # type: ignore[arg-type]
    watched.hold = asyncio.Event()
    before = [asyncio.create_task(cached()) for _ in range(8)]
    await watched.answered.wait()
    assert watched.reads == 1
    await watched.resources.add(a_resource("r", "s"))
    key = marker_key(MarkerKind.RESOURCE_CHANGED)
    await cached.changed((Marker(MarkerKind.RESOURCE_CHANGED, key, 1, 0.0),))
    after = [asyncio.create_task(cached()) for _ in range(8)]
    await asyncio.sleep(0)  # each of them asks
    watched.hold.set()
    found = [*await asyncio.gather(*before, *after), await cached()]
    assert watched.reads <= 2
    return [set(catalog.owner_of_scope) for catalog in found]


async def test_who_asks_for_the_catalog_after_a_change_gets_no_read_from_before_it(
    watched: Watched,
) -> None:
    assert await _read_across_a_change(watched) == [set()] * 8 + [{"s"}] * 9


async def test_a_change_that_overtakes_no_read_is_noticed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reads, "overtake_all", lambda _self: None)
    assert await _read_across_a_change(watched) == [set()] * 17
