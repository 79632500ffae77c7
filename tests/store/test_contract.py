"""Every verb of the store port, over each kind of storage."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from types import MappingProxyType

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    AuthMethod,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
    KeyState,
    Resource,
    SigningKey,
    TokenFormat,
)
from authsvc.store.port import Change, FeedPage, Store, Transition, change, opening
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH
from tests.store.conftest import Place

CA = "c0" * 32
ODD = "Zoë \N{SNOWMAN} \U0001f512 '\";--\n\t% _ \\ \u202e"


def identity(value: str, kind: IdentityKind = IdentityKind.SAN_URI) -> CertificateIdentity:
    return CertificateIdentity(kind, value, CA)


def a_client(client_id: str, name: str | None = None, **fields: object) -> Client:
    made = Client(
        client_id=client_id,
        metadata=ClientMetadata(
            client_name="orders",
            grant_types=frozenset({GrantType.CLIENT_CREDENTIALS}),
            auth_methods=frozenset({AuthMethod.TLS_CLIENT_AUTH}),
            scopes=frozenset({"orders.read"}),
            identity=identity(name) if name else None,
        ),
        state=ClientState.PENDING,
        create_time=1000.5,
        update_time=1000.5,
        registrant="admin",
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def step(client_id: str, start: ClientState, to: ClientState, **fields: object) -> Transition:
    made = Transition(client_id, frozenset({start}), to, "reviewer", "why")
    return replace(made, **fields)  # type: ignore[arg-type]


def a_resource(resource_id: str, *scopes: str, owner: str = "") -> Resource:
    return Resource(
        resource_id, dict.fromkeys(scopes, ODD), 5.0, 6.0, display_name=ODD, owner_client_id=owner
    )


def a_key(kid: str, state: KeyState = KeyState.CURRENT) -> SigningKey:
    return SigningKey(kid, "ES256", state, {"kid": kid, "kty": "EC"}, b"\x00sealed\xff", 7.25)


def dead(*tokens: str) -> list[Change]:
    return [change(MarkerKind.TOKEN_DEAD, token) for token in tokens]


async def refused(call: Awaitable[object]) -> AuthError:
    with pytest.raises(AuthError) as caught:
        await call
    return caught.value


async def outcome(call: Awaitable[object]) -> Reason | None:
    """Why it was refused; None where it was done."""
    try:
        await call
    except AuthError as error:
        return error.reason
    return None


async def cutoff(place: Place, kind: MarkerKind, *ids: str) -> int:
    """The revision of the stored cutoff; 0 where there is none."""
    key = marker_key(kind, *ids).hex()
    found = await place.sql(f"SELECT revision FROM cutoff WHERE key = '{key}'")
    return int(found[0][0]) if found else 0


async def head(store: Store) -> int:
    return (await store.feed.read(0)).head


async def live(store: Store, rows: int = 99) -> list[Marker]:
    """What a follower begins with."""
    pieces = store.feed.pieces(await head(store), rows)
    return [marker async for piece in pieces for marker in piece]


# Clients


async def test_a_client_comes_back_with_all_its_fields(store: Store) -> None:
    full = Client(
        client_id="full",
        metadata=ClientMetadata(
            client_name=ODD,
            grant_types=frozenset(GrantType),
            auth_methods=frozenset(AuthMethod),
            scopes=frozenset({"a", "b:c", ODD}),
            identity=CertificateIdentity(IdentityKind.SUBJECT_DN, f"CN={ODD}", CA),
            bound_access_tokens=True,
            validates=frozenset({"*", ODD}),
            texts=MappingProxyType({"client_uri": "https://x.test/", "software_id": ODD}),
            contacts=("b@x.test", "a@x.test", ODD),
        ),
        state=ClientState.SUSPENDED,
        create_time=1_800_000_000.123456,
        update_time=1_800_000_001.654321,
        registrant=ODD,
        version=7,
        reviewer=ODD,
        review_comment=ODD,
        review_time=1_800_000_002.5,
        approval_expire_time=1_900_000_000.25,
        secret_digest=bytes(range(256)),
    )
    bare = Client(
        client_id="bare",
        metadata=ClientMetadata("", frozenset(), frozenset(), frozenset()),
        state=ClientState.PENDING,
        create_time=0.0,
        update_time=0.0,
        registrant="",
    )
    for client in (full, bare, replace(bare, client_id="empty digest", secret_digest=b"")):
        await store.clients.add(client)
        assert await store.clients.get(client.client_id) == client
    assert await store.clients.page(None, "", 9) == (
        bare,
        replace(bare, client_id="empty digest", secret_digest=b""),
        full,
    )


async def test_what_is_not_there_is_not_found(store: Store) -> None:
    await store.clients.add(a_client("one", "spiffe://x/one"))
    assert await store.clients.get("two") is None
    assert await store.clients.get("ONE") is None
    assert await store.clients.get("") is None
    assert await store.clients.by_identity([]) == ()
    assert await store.clients.by_identity([(IdentityKind.SAN_URI, "spiffe://x/two")]) == ()
    gone = await refused(store.clients.move(step("two", ClientState.PENDING, ClientState.APPROVED)))
    assert gone.reason is Reason.CLIENT_NOT_FOUND


async def test_clients_are_found_by_any_of_a_certificates_names(store: Store) -> None:
    uri = a_client("uri", "name")
    dns = replace(
        a_client("dns"),
        metadata=replace(uri.metadata, identity=identity("name", IdentityKind.SAN_DNS)),
    )
    for client in (uri, dns, a_client("none")):
        await store.clients.add(client)
    names = {(kind, "name") for kind in IdentityKind}
    found = await store.clients.by_identity(names)
    assert sorted(client.client_id for client in found) == ["dns", "uri"]
    assert await store.clients.by_identity([(IdentityKind.SAN_DNS, "name")]) == (dns,)


async def test_an_id_and_a_certificate_name_belong_to_one_client(store: Store) -> None:
    await store.clients.add(a_client("one", "name"))
    for other in (a_client("one", "other"), a_client("two", "name")):
        error = await refused(store.clients.add(other))
        assert error.reason is Reason.ALREADY_EXISTS
    assert await store.clients.page(None, "", 9) == (a_client("one", "name"),)
    await store.clients.add(a_client("two"))
    await store.clients.add(a_client("three"))  # no name collides with no name


async def test_sixteen_at_once_register_one_certificate_name(place: Place) -> None:
    workers = [place.open(), place.open()]
    results = await asyncio.gather(
        *(outcome(workers[n % 2].clients.add(a_client(f"c{n}", "name"))) for n in range(16))
    )
    assert Counter(results) == {None: 1, Reason.ALREADY_EXISTS: 15}
    [winner] = await workers[0].clients.by_identity([(IdentityKind.SAN_URI, "name")])
    assert results[int(winner.client_id[1:])] is None


async def test_a_rejected_clients_name_is_free_and_may_be_lost(store: Store) -> None:
    pending, rejected = ClientState.PENDING, ClientState.REJECTED
    await store.clients.add(a_client("first", "name"))
    await store.clients.move(step("first", pending, rejected))
    assert await store.clients.by_identity([(IdentityKind.SAN_URI, "name")]) == ()
    await store.clients.add(a_client("second", "name"))
    [found] = await store.clients.by_identity([(IdentityKind.SAN_URI, "name")])
    assert found.client_id == "second"
    before = await head(store)
    error = await refused(store.clients.move(step("first", rejected, pending)))
    assert error.reason is Reason.ALREADY_EXISTS
    client = await store.clients.get("first")
    assert client is not None
    assert client.state is rejected
    assert await head(store) == before


async def test_pages_follow_each_other_in_the_order_of_ids(store: Store) -> None:
    ids = [f"c{n:02}" for n in range(7)]
    for client_id in reversed(ids):
        await store.clients.add(a_client(client_id))
    for client_id in ids[::2]:
        await store.clients.move(step(client_id, ClientState.PENDING, ClientState.APPROVED))
    for state, expected in (
        (None, ids),
        (ClientState.APPROVED, ids[::2]),
        (ClientState.PENDING, ids[1::2]),
        (ClientState.SUSPENDED, []),
    ):
        seen: list[str] = []
        while page := await store.clients.page(state, seen[-1] if seen else "", 2):
            assert len(page) <= 2
            seen += [client.client_id for client in page]
        assert seen == expected
    assert [c.client_id for c in await store.clients.page(None, "c02x", 1)] == ["c03"]


# The review


@pytest.mark.parametrize("start", ClientState)
async def test_a_step_is_taken_from_allowed_states_only(store: Store, start: ClientState) -> None:
    for to in ClientState:
        for allowed in (True, False):
            client_id = f"{start.name}-{to.name}-{allowed}"
            client = a_client(client_id, state=start, approval_expire_time=9e9)
            await store.clients.add(client)
            before = await head(store)
            sources = {start} if allowed else set(ClientState) - {start}
            move = replace(step(client_id, start, to), allowed_from=frozenset(sources))
            if allowed:
                moved, revision = await store.clients.move(move)
                assert revision == before + 1
                assert moved == await store.clients.get(client_id)
                assert moved.review_time is not None
                assert moved.update_time == pytest.approx(moved.review_time, abs=1)
                assert moved == replace(
                    client,
                    state=to,
                    version=2,
                    reviewer="reviewer",
                    review_comment="why",
                    review_time=moved.review_time,
                    update_time=moved.update_time,
                    approval_expire_time=None if to is ClientState.APPROVED else 9e9,
                )
            else:
                error = await refused(store.clients.move(move))
                assert error.reason is Reason.CLIENT_STATE_CONFLICT
                assert error.metadata == {"state": start.name}
                assert await store.clients.get(client_id) == client
                assert await head(store) == before


async def test_an_approval_has_the_end_that_it_was_given(store: Store) -> None:
    pending, approved = ClientState.PENDING, ClientState.APPROVED
    await store.clients.add(a_client("one"))
    client, _ = await store.clients.move(step("one", pending, approved, approval_expire_time=9e9))
    assert client.approval_expire_time == 9e9
    client, _ = await store.clients.move(step("one", approved, approved, keep_expiry=True))
    assert client.approval_expire_time == 9e9
    client, _ = await store.clients.move(step("one", approved, approved))
    assert client.approval_expire_time is None


async def test_another_version_changes_nothing(store: Store) -> None:
    client = a_client("one")
    await store.clients.add(client)
    before = await head(store)
    for version in (0, 2):
        move = step(
            "one", ClientState.PENDING, ClientState.SUSPENDED, version=version, cut_off=True
        )
        assert (await refused(store.clients.move(move))).reason is Reason.ETAG_MISMATCH
    assert await store.clients.get("one") == client
    page = await store.feed.read(0)
    assert (page.head, page.markers) == (before, ())
    await store.clients.move(step("one", ClientState.PENDING, ClientState.APPROVED, version=1))


async def test_suspending_cuts_off_at_its_revision_and_nothing_lowers_it(
    place: Place, store: Store
) -> None:
    approved, suspended = ClientState.APPROVED, ClientState.SUSPENDED
    await store.clients.add(a_client("one", state=approved))
    _, first = await store.clients.move(step("one", approved, suspended, cut_off=True))
    assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, "one") == first
    _, second = await store.clients.move(step("one", suspended, approved))
    assert second > first
    assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, "one") == first
    _, third = await store.clients.move(step("one", approved, suspended, cut_off=True))
    assert await cutoff(place, MarkerKind.CUTOFF_CLIENT, "one") == third > second
    assert len(await place.sql("SELECT key FROM cutoff")) == 1
    kinds = MarkerKind.CLIENT_CHANGED, MarkerKind.CUTOFF_CLIENT
    markers = (await store.feed.read(1)).markers
    assert {(m.kind, m.key, m.revision) for m in markers} == {
        (kind, marker_key(kind, "one"), revision)
        for revision in (first, second, third)
        for kind in kinds
        if (kind, revision) != (MarkerKind.CUTOFF_CLIENT, second)
    }


@pytest.mark.parametrize("version", [None, 1])
async def test_of_moves_at_once_exactly_one_wins(place: Place, version: int | None) -> None:
    workers = [place.open(), place.open()]
    await workers[0].clients.add(a_client("one"))
    before = await head(workers[0])
    targets = [ClientState.APPROVED, ClientState.REJECTED] * 8
    results = await asyncio.gather(
        *(
            outcome(
                workers[n % 2].clients.move(step("one", ClientState.PENDING, to, version=version))
            )
            for n, to in enumerate(targets)
        )
    )
    assert Counter(results) == {None: 1, Reason.CLIENT_STATE_CONFLICT: 15}
    client = await workers[1].clients.get("one")
    assert client is not None
    assert (client.state, client.version) == (targets[results.index(None)], 2)
    assert await head(workers[0]) == before + 1


# Resources


async def test_the_catalog_holds_resources_with_their_scopes(store: Store) -> None:
    assert (await store.resources.catalog()).by_id == {}
    await store.clients.add(a_client("owner"))
    full = Resource(
        "https://orders.test/",
        {"orders.read": ODD, "orders.write": ""},
        5.5,
        6.5,
        display_name=ODD,
        owner_client_id="owner",
        token_format=TokenFormat.OPAQUE,
        token_lifetime_s=60,
        staleness_max_s=5,
        version=3,
    )
    bare = Resource(ODD, {}, 0.0, 0.0)
    before = await head(store)
    assert [await store.resources.add(full), await store.resources.add(bare)] == [
        before + 1,
        before + 2,
    ]
    catalog = await store.resources.catalog()
    assert catalog.by_id == {full.resource_id: full, ODD: bare}
    assert catalog.owned_by("owner") == {full.resource_id}
    assert catalog.owner_of_scope == dict.fromkeys(full.scopes, full.resource_id)
    key = marker_key(MarkerKind.RESOURCE_CHANGED)
    assert [(m.kind, m.key) for m in (await store.feed.read(1)).markers] == [
        (MarkerKind.RESOURCE_CHANGED, key)
    ] * 2


async def test_a_resource_that_is_refused_leaves_nothing(store: Store) -> None:
    first = a_resource("first", "read", "write")
    revision = await store.resources.add(first)
    for other, reason in (
        (a_resource("second", "fresh", "read"), Reason.ALREADY_EXISTS),
        (a_resource("first", "fresh"), Reason.ALREADY_EXISTS),
        (a_resource("second", "fresh", owner="nobody"), Reason.CLIENT_NOT_FOUND),
    ):
        assert (await refused(store.resources.add(other))).reason is reason
    assert (await store.resources.catalog()).by_id == {"first": first}
    page = await store.feed.read(1)
    assert page.head == revision
    assert {m.revision for m in page.markers} == {revision}
    await store.resources.add(a_resource("second", "fresh"))  # the scope was not kept either


async def test_of_resources_at_once_one_gets_the_scope(place: Place) -> None:
    workers = [place.open(), place.open()]
    results = await asyncio.gather(
        *(
            outcome(workers[n % 2].resources.add(a_resource(f"r{n}", f"own{n}", "shared")))
            for n in range(8)
        )
    )
    assert Counter(results) == {None: 1, Reason.ALREADY_EXISTS: 7}
    catalog = await workers[0].resources.catalog()
    assert len(catalog.by_id) == 1
    assert catalog.owner_of_scope["shared"] == f"r{results.index(None)}"


# The feed


async def test_changes_of_one_revision_are_written_once_and_kept_a_tokens_life(
    store: Store,
) -> None:
    start = await store.feed.read(0)
    changes = [*dead("a", "b", "a"), change(MarkerKind.GRANT_DEAD, "a"), *dead("b")]
    revision = await store.feed.append(changes)
    page = await store.feed.read(start.head)
    assert revision == page.head == start.head + 1
    assert Counter((m.kind, m.key) for m in page.markers) == Counter(
        {(one.kind, one.key) for one in changes}
    )
    for marker in page.markers:
        assert marker.revision == revision
        assert start.time <= marker.until - MARKER_LIFETIME_S + 0.001  # SQLite counts milliseconds
        assert marker.until - MARKER_LIFETIME_S <= page.time + 0.001


async def test_the_same_change_again_is_a_new_revision(store: Store) -> None:
    first = await store.feed.append(dead("a"))
    second = await store.feed.append(dead("a"))
    assert [m.revision for m in (await store.feed.read(1)).markers] == [first, second]
    assert second == first + 1


async def test_a_revision_without_a_change_is_refused(store: Store) -> None:
    before = await head(store)
    with pytest.raises(ValueError, match="needs a change"):
        await store.feed.append([])
    assert await head(store) == before


async def test_many_changes_share_a_revision(store: Store) -> None:
    before = await head(store)
    changes = dead(*(str(n) for n in range(3000)))
    revision = await store.feed.append(changes)
    page = await store.feed.read(before)
    assert {m.revision for m in page.markers} == {revision}
    assert len(page.markers) == 3000
    assert not page.more


async def test_too_much_for_one_page_comes_in_pages_of_whole_revisions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("authsvc.store.sql_feed.PAGE_ROWS", 10)
    start = await head(store)
    nonces = []
    for number in range(9):
        await store.feed.append(dead(*(f"{number} {n}" for n in range(4))))
        nonces.append((await store.feed.read(0)).nonce)
    newest = await head(store)
    seen: list[int] = []
    cursor, more = start, True
    while more:
        page = await store.feed.read(cursor)
        assert {m.revision for m in page.markers} == set(range(cursor + 1, page.head + 1))
        assert len(page.markers) == 4 * (page.head - cursor)
        assert page.nonce == nonces[page.head - start - 1]
        assert cursor == start or page.cursor_nonce == nonces[cursor - start - 1]
        cursor, more = page.head, page.more
        seen.append(page.head)
    assert seen == [start + 3, start + 6, newest]


async def test_what_is_over_does_not_live_but_comes_after_a_cursor(place: Place) -> None:
    store = place.open()
    start = await head(store)
    old = await store.feed.append(dead("old"))
    await place.outlive_markers()
    new = await store.feed.append(dead("new"))
    assert [m.revision for m in await live(store)] == [new]
    assert (await store.feed.read(0)).markers == ()
    assert [m.revision for m in (await store.feed.read(start)).markers] == [old, new]
    assert [m.revision for m in (await store.feed.read(old)).markers] == [new]
    assert (await store.feed.read(new)).markers == ()


async def test_what_lives_comes_in_pieces_in_the_order_of_revisions(place: Place) -> None:
    store = place.open()
    first = await store.feed.append(dead("old"))
    await place.outlive_markers()
    for number in range(3):
        await store.feed.append(dead(*(f"{number} {n}" for n in range(5))))
    page = await store.feed.read(first)
    await store.feed.append(dead("later"))
    for rows in (1, 4, 5, 15, 99):
        pieces = [piece async for piece in store.feed.pieces(page.head, rows)]
        assert max(map(len, pieces)) == min(rows, 15)
        found = [marker for piece in pieces for marker in piece]
        assert found == sorted(page.markers, key=lambda m: (m.revision, m.kind, m.key))
        assert len(await live(store, rows)) == 16
    assert [piece async for piece in store.feed.pieces(0, 99)] == []


async def test_pieces_of_a_database_that_is_behind_are_refused(store: Store) -> None:
    """A standby that took over: what it lacks would be missed for good."""
    revision = await store.feed.append(dead("a"))
    with pytest.raises(AuthError) as refused:
        await anext(store.feed.pieces(revision + 1, 99))
    assert refused.value.reason is Reason.STORE_UNAVAILABLE


async def test_between_two_pieces_nobody_is_held_up_and_none_is_lost(place: Place) -> None:
    store = place.open()
    await store.feed.append(dead(*(str(n) for n in range(10))))
    head_ = await head(store)
    pieces = store.feed.pieces(head_, 4)
    found = list(await anext(pieces))
    writer = place.open()
    await writer.feed.append(dead("meanwhile"))
    await writer.sweeps.compact()
    found += [marker async for piece in pieces for marker in piece]
    assert len({marker.key for marker in found}) == len(found) == 10


async def test_each_revision_keeps_its_nonce(store: Store) -> None:
    pages: list[FeedPage] = []
    for number in range(4):
        await store.feed.append(dead(str(number), f"{number}b"))
        pages.append(await store.feed.read(0))
    assert len({page.nonce for page in pages}) == 4
    for page in pages:
        later = await store.feed.read(page.head)
        assert later.cursor_nonce == page.nonce
        assert later.nonce == pages[-1].nonce
    assert (await store.feed.read(pages[-1].head + 9)).cursor_nonce is None


async def test_a_cursor_that_is_compacted_has_no_nonce(sql_place: Place) -> None:
    store = sql_place.open()
    revisions = [await store.feed.append(dead(str(n))) for n in range(3)]
    await sql_place.sql(f"DELETE FROM feed WHERE revision <= {revisions[1]}")
    await sql_place.sql(f"UPDATE feed_head SET compacted_to = {revisions[1]}")
    page = await store.feed.read(revisions[0])
    assert (page.compacted_to, page.cursor_nonce) == (revisions[1], None)
    assert [m.revision for m in page.markers] == [revisions[2]]


async def follow(
    store: Store, page: FeedPage, collected: list[Marker], done: asyncio.Event
) -> FeedPage:
    """Reads by cursor until nothing more comes; each revision must be there, whole, at once."""
    while True:
        last = done.is_set()
        previous, page = page, await store.feed.read(page.head)
        if previous.head > page.compacted_to:
            assert page.cursor_nonce == previous.nonce
        expected = list(range(previous.head + 1, page.head + 1))
        assert sorted({m.revision for m in page.markers}) == expected
        assert [m.revision for m in page.markers] == sorted(m.revision for m in page.markers)
        collected += page.markers
        if last:
            return page


async def test_revisions_have_no_gaps_under_writers_and_readers(place: Place) -> None:
    workers = [place.open(timeout_s=60), place.open(timeout_s=60)]
    start = await workers[0].feed.read(0)
    done = asyncio.Event()
    collected: list[list[Marker]] = [[], []]
    readers = [
        asyncio.create_task(follow(worker, start, collected[n], done))
        for n, worker in enumerate(workers)
    ]
    revisions = await asyncio.gather(
        *(workers[n % 2].feed.append(dead(f"{n}a", f"{n}b")) for n in range(64))
    )
    done.set()
    pages = await asyncio.gather(*readers)
    assert sorted(revisions) == list(range(start.head + 1, start.head + 65))
    expected = {(r, c.kind, c.key) for n, r in enumerate(revisions) for c in dead(f"{n}a", f"{n}b")}
    for page, markers in zip(pages, collected, strict=True):
        assert page.head == max(revisions)
        assert len(markers) == 128
        assert {(m.revision, m.kind, m.key) for m in markers} == expected


async def test_changes_of_all_kinds_share_one_line_of_revisions(place: Place) -> None:
    workers = [place.open(), place.open()]
    for n in range(16):
        await workers[0].clients.add(a_client(f"c{n}"))
    start = await workers[0].feed.read(0)
    approve = ClientState.PENDING, ClientState.APPROVED
    moves = [workers[n % 2].clients.move(step(f"c{n}", *approve)) for n in range(16)]
    adds = [workers[n % 2].resources.add(a_resource(f"r{n}", f"s{n}")) for n in range(16)]
    appends = [workers[n % 2].feed.append(dead(str(n))) for n in range(16)]
    moved, *others = await asyncio.gather(
        asyncio.gather(*moves), asyncio.gather(*adds), asyncio.gather(*appends)
    )
    revisions = [revision for _, revision in moved] + [r for batch in others for r in batch]
    assert sorted(revisions) == list(range(start.head + 1, start.head + 49))


async def test_a_feed_is_tied_to_its_database_once(store: Store) -> None:
    page = await store.feed.read(0)
    assert page.known_fingerprint == ""
    assert page.fingerprint
    await store.feed.begin(page)
    await store.feed.begin(replace(page, fingerprint="another"))
    again = await store.feed.read(0)
    assert again.known_fingerprint == again.fingerprint == page.fingerprint
    assert again.head == page.head


@pytest.mark.parametrize("cut_off", [True, False])
async def test_of_workers_with_one_page_one_raises_the_epoch(place: Place, cut_off: bool) -> None:
    workers = [place.open(), place.open()]
    old = await workers[0].feed.append(dead("old"))
    page = replace(await workers[0].feed.read(0), fingerprint="another")
    await asyncio.gather(
        *(workers[n % 2].feed.raise_epoch(page, old + n, cut_off=cut_off) for n in range(8))
    )
    first = opening(old, page.time)
    assert 2 * REVISIONS_PER_EPOCH <= first < 2.5 * REVISIONS_PER_EPOCH
    raised = await workers[1].feed.read(1)
    assert raised.head == first + cut_off
    assert raised.compacted_to == first
    assert raised.known_fingerprint == "another"
    assert raised.nonce != page.nonce
    kind = MarkerKind.CUTOFF_EVERYTHING
    found = [(m.kind, m.key, m.revision) for m in raised.markers]
    expected = [(MarkerKind.TOKEN_DEAD, dead("old")[0].key, old)]
    assert found == expected + [(kind, marker_key(kind), first + 1)] * cut_off
    later = await workers[0].feed.append(dead("new"))
    await workers[0].feed.raise_epoch(page, old, cut_off=cut_off)  # who comes late finds it done
    assert await head(workers[0]) == later == raised.head + 1
    assert await cutoff(place, kind) == (first + 1) * cut_off


async def test_an_epoch_opens_above_what_a_worker_has_applied(store: Store) -> None:
    page = await store.feed.read(0)
    await store.feed.raise_epoch(page, 5 * REVISIONS_PER_EPOCH + 7, cut_off=True)
    assert await head(store) == opening(5 * REVISIONS_PER_EPOCH, page.time) + 1
    assert await head(store) // REVISIONS_PER_EPOCH == 6


# Callers that go away


async def test_a_change_whose_caller_goes_away_is_whole(place: Place) -> None:
    """Cancelled after each number of turns of the loop; what is found later is all or nothing."""
    worker, witness = place.open(), place.open()
    rounds = 24
    for n in range(rounds):
        await worker.clients.add(a_client(f"c{n}"))
    start = await witness.feed.read(0)
    for n in range(rounds):
        calls: Sequence[Awaitable[object]] = (
            worker.clients.move(
                step(f"c{n}", ClientState.PENDING, ClientState.SUSPENDED, cut_off=True)
            ),
            worker.feed.append(dead(f"{n}a", f"{n}b")),
            worker.resources.add(a_resource(f"r{n}", f"s{n}")),
        )
        tasks = [asyncio.ensure_future(call) for call in calls]
        for _ in range(n):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await worker.close()  # waits for what still runs

    page = await witness.feed.read(start.head)
    found = Counter((m.kind, m.key) for m in page.markers)
    revisions = {m.revision for m in page.markers}
    assert revisions == set(range(start.head + 1, page.head + 1))
    for n in range(rounds):
        client = await witness.clients.get(f"c{n}")
        assert client is not None
        moved = client.state is ClientState.SUSPENDED
        assert client.version == (2 if moved else 1)
        stored = await cutoff(place, MarkerKind.CUTOFF_CLIENT, client.client_id)
        assert (stored > 0) == moved
        for kind in (MarkerKind.CLIENT_CHANGED, MarkerKind.CUTOFF_CLIENT):
            assert found[kind, marker_key(kind, f"c{n}")] == moved
        assert len({found[one.kind, one.key] for one in dead(f"{n}a", f"{n}b")}) == 1
    catalog = await witness.resources.catalog()
    kind = MarkerKind.RESOURCE_CHANGED
    assert found[kind, marker_key(kind)] == len(catalog.by_id) == len(catalog.owner_of_scope)


async def test_readers_that_go_away_take_no_connection_with_them(place: Place) -> None:
    store = place.open()
    await store.clients.add(a_client("one"))
    for n in range(24):
        reads: list[asyncio.Future[object]] = [
            asyncio.ensure_future(call)
            for call in (
                *(store.clients.get("one") for _ in range(3)),
                store.feed.read(0),
                store.resources.catalog(),
                store.keys.all(),
            )
        ]
        for _ in range(n):
            await asyncio.sleep(0)
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
    async with asyncio.timeout(20):
        found = await asyncio.gather(*(store.clients.get("one") for _ in range(32)))
        await asyncio.gather(*(store.feed.read(0) for _ in range(8)))
    assert found == [a_client("one")] * 32


async def test_refusals_use_up_no_connection(store: Store) -> None:
    await store.clients.add(a_client("one", "name"))
    await store.resources.add(a_resource("first", "scope"))
    refusals: list[Awaitable[object]] = []
    for n in range(12):
        refusals += [
            store.clients.add(a_client(f"other{n}", "name")),
            store.resources.add(a_resource(f"other{n}", "scope")),
            store.resources.add(a_resource(f"other{n}", owner="nobody")),
            store.clients.move(step("one", ClientState.SUSPENDED, ClientState.APPROVED)),
            store.clients.move(step("two", ClientState.SUSPENDED, ClientState.APPROVED)),
        ]
    before = await head(store)
    results = await asyncio.gather(*map(outcome, refusals))
    assert Counter(results) == {
        Reason.ALREADY_EXISTS: 24,
        Reason.CLIENT_NOT_FOUND: 24,
        Reason.CLIENT_STATE_CONFLICT: 12,
    }
    assert await store.feed.append(dead("x")) == before + 1
