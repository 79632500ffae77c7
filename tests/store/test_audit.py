"""The audit over each kind of database: written with what it records, found again by filters."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from authsvc.acting import Act, begin, by_itself
from authsvc.errors import AuthError, Reason
from authsvc.feed.append import Append
from authsvc.keys.jwt import generate
from authsvc.keys.secrets import Sealer
from authsvc.model import (
    ApiKey,
    AuditOutcome,
    AuthMethod,
    Client,
    ClientMetadata,
    ClientState,
    Grant,
    GrantType,
    InitialAccessToken,
    KeyState,
    Origin,
    Resource,
    SigningKey,
    Touched,
)
from authsvc.store import sql_store
from authsvc.store.port import (
    Admission,
    AuditEvent,
    AuditFilter,
    Change,
    Reused,
    Store,
    StoredToken,
    Told,
    Transition,
    Use,
    change,
    touched_by,
)
from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.state import REVISIONS_PER_EPOCH
from tests.store.conftest import Place

KIND = MarkerKind
ANY = AuditFilter()
LIFE_S = 1000.0


def acting(action: str, **more: Any) -> Act:
    """Says what is under way from here on."""
    made = Act(action, **more)
    begin(lambda: made)
    return made


async def events(store: Store) -> list[AuditEvent]:
    """All, in no order: a clock that stands still makes none."""
    return list(await store.audit.page(ANY, None, 1000))


async def walked(store: Store, wanted: AuditFilter, size: int) -> list[str]:
    found: list[AuditEvent] = []
    after = None
    while page := await store.audit.page(wanted, after, size):
        found += page
        after = (page[-1].create_time, page[-1].audit_event_id)
    return [event.audit_event_id for event in found]


# --- written and read ---


async def test_event_is_read_as_it_was_written(store: Store) -> None:
    act = acting(
        "DisableUser",
        actor="admin-app",
        on_behalf_of="dora",
        peer="spiffe://test.local/admin",
        address="192.0.2.7",
        comment="left, 'quoted'; ä",
        fields=("display_name", "email"),
        request_id="call-1",
    )
    changes = [change(KIND.USER_CHANGED, "alice"), change(KIND.CUTOFF_SUBJECT, "alice")]
    revision = await store.feed.append(changes)
    await store.audit.refused(Reason.INSUFFICIENT_SCOPE, Touched("alice", "shop", "thing"))
    done, refused = sorted(await events(store), key=lambda event: event.outcome)
    assert (done.act, done.touched, done.revision) == (act, Touched("alice"), revision)
    assert (done.outcome, done.reason) == (AuditOutcome.SUCCEEDED, Reason.UNSPECIFIED)
    assert (refused.act, refused.touched) == (act, Touched("alice", "shop", "thing"))
    assert (refused.outcome, refused.reason) == (AuditOutcome.REFUSED, Reason.INSUFFICIENT_SCOPE)
    assert refused.revision == 0
    now = (await store.feed.read(0)).time
    assert 0 <= now - done.create_time < 60
    assert done.audit_event_id != refused.audit_event_id


PEOPLE = ("ann", "bob")
ACTIONS = ("RevokeSubject", "DisableUser")


async def _fill(place: Place) -> list[dict[str, Any]]:
    """Events of all kinds, three of each time; what is in them, the newest first."""
    made = []
    for n in range(48):
        row = {
            "id": f"e{n:02d}",
            "time": float(100 + n // 3),
            "actor": PEOPLE[n % 2],
            "action": ACTIONS[n // 2 % 2],
            "subject": ("", "alice")[n // 4 % 2],
            "client_id": ("", "shop")[n // 8 % 2],
            "outcome": 1 + n // 16 % 2,
        }
        made.append(row)
        await place.sql(
            "INSERT INTO audit (audit_event_id, create_time, action, outcome, reason, actor,"
            " on_behalf_of, peer, address, subject, client_id, object_id, fields, comment,"
            f" revision, request_id) VALUES ('{row['id']}', {row['time']}, '{row['action']}',"
            f" {row['outcome']}, 0, '{row['actor']}', '', '', '', '{row['subject']}',"
            f" '{row['client_id']}', '', '', '', 0, '')"
        )
    return made[::-1]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"actor": "ann"},
        {"subject": "alice"},
        {"client_id": "shop"},
        {"action": "DisableUser"},
        {"outcome": AuditOutcome.REFUSED},
        {"start_time": 104.0},
        {"end_time": 104.0},
        {"start_time": 103.0, "end_time": 110.0, "actor": "bob"},
        {"actor": "ann", "subject": "alice", "client_id": "shop", "action": "RevokeSubject"},
        {"outcome": AuditOutcome.SUCCEEDED, "subject": "alice", "end_time": 107.5},
        {"actor": "nobody"},
        {"start_time": 104.0, "end_time": 104.0},
    ],
    ids=str,
)
async def test_filters_hold_all_at_once_on_pages_of_any_size(
    place: Place, store: Store, wanted: dict[str, Any]
) -> None:
    made = await _fill(place)
    expected = [
        row["id"]
        for row in made
        if wanted.get("start_time", 0) <= row["time"] < wanted.get("end_time", 1e9)
        and all(row[name] == value for name, value in wanted.items() if "time" not in name)
    ]
    for size in (1, 2, 3, 7, 100):
        assert await walked(store, AuditFilter(**wanted), size) == expected


async def test_row_that_cannot_be_read_does_not_end_the_list(place: Place, store: Store) -> None:
    made = await _fill(place)
    await place.sql("UPDATE audit SET outcome = 99 WHERE create_time BETWEEN 103 AND 111")
    expected = [row["id"] for row in made if not 103 <= row["time"] <= 111]
    for size in (1, 4, 100):
        assert await walked(store, ANY, size) == expected


@pytest.mark.parametrize(
    ("where", "index"),
    [
        ("", "ix_audit_create_time"),
        ("actor = 'ann'", "audit_actor"),
        ("subject = 'alice'", "audit_subject"),
        ("client_id = 'shop'", "audit_client_id"),
    ],
)
async def test_every_list_goes_by_an_index(place_sqlite: Place, where: str, index: str) -> None:
    clause = f"{where} AND" if where else ""
    plan = await place_sqlite.sql(
        f"EXPLAIN QUERY PLAN SELECT * FROM audit WHERE {clause} (create_time, audit_event_id)"
        " < (1, 'x') ORDER BY create_time DESC, audit_event_id DESC LIMIT 50"
    )
    assert any(f"USING INDEX {index}" in str(row) for row in plan), plan


async def test_rows_are_kept_as_long_as_the_settings_say(place: Place) -> None:
    kept, brief = place.open(), sql_store(place.database(), audit_s=450.0)
    await _fill(place)
    now = (await kept.feed.read(0)).time
    # Three of 100 s ago, of 200 s ago, up to 1600 s ago.
    await place.sql(f"UPDATE audit SET create_time = {now} - (116 - create_time) * 100")
    assert await kept.sweeps.sweep("audit", 100) == 0
    assert await brief.sweeps.sweep("audit", 100) == 36
    assert len(await events(kept)) == 12


# --- who did what killed it ---


async def test_markers_are_told_with_who_set_them(place: Place, store: Store) -> None:
    dead, cut = change(KIND.TOKEN_DEAD, "jti"), change(KIND.CUTOFF_SUBJECT_CLIENT, "alice", "shop")
    acting("RevokeToken", actor="shop")
    first = await store.feed.append([dead])
    acting("RevokeSubjectClient", actor="admin", comment="stolen")
    second = await store.feed.append([cut])
    third = await store.feed.append([cut])
    wanted = [cut, dead, change(KIND.GRANT_DEAD, "jti"), change(KIND.CUTOFF_EVERYTHING)]
    told = await store.audit.told(wanted)
    assert [(t.change, t.revision) for t in told] == [(dead, first), (cut, second), (cut, third)]
    assert [t.event and t.event.act.actor for t in told] == ["shop", "admin", "admin"]
    assert [t.event and t.create_time == t.event.create_time for t in told] == [True] * 3
    await place.sql("DELETE FROM feed")  # compacted: the latest cutoff stays
    assert await store.audit.told(wanted) == told[2:]
    assert await store.audit.told([]) == ()


async def test_time_of_a_marker_outlives_its_event(place: Place, store: Store) -> None:
    cut = change(KIND.CUTOFF_EVERYTHING)
    revision = await store.feed.append([cut])
    [told] = await store.audit.told([cut])
    await place.sql("DELETE FROM audit")
    [alone] = await store.audit.told([cut])
    assert (alone.event, alone.revision) == (None, revision)
    assert alone.create_time is not None
    assert told.create_time is not None
    assert abs(alone.create_time - told.create_time) < 5
    await place.sql("DELETE FROM feed")
    assert await store.audit.told([cut]) == (Told(cut, revision, None, None),)


async def test_of_acts_that_share_a_revision_the_one_that_names_the_id_is_told(
    store: Store,
) -> None:
    append = Append(store.feed)
    asked: dict[str, Change] = {
        "a": change(KIND.TOKEN_DEAD, "one"),
        "b": change(KIND.TOKEN_DEAD, "two"),
        "c": change(KIND.CUTOFF_SUBJECT, "two"),
        "d": change(KIND.CUTOFF_EVERYTHING),
        "e": change(KIND.CUTOFF_SUBJECT_CLIENT, "two", "one"),
    }

    async def ask(actor: str) -> int:
        acting("Revoke", actor=actor)
        return await append([asked[actor]])

    revisions = await asyncio.gather(*(asyncio.create_task(ask(actor)) for actor in asked))
    assert len(set(revisions)) < len(asked), "they shared no transaction"
    told = await store.audit.told(asked.values())
    assert {t.change: t.event and t.event.act.actor for t in told} == {
        one: actor for actor, one in asked.items()
    }


async def test_what_died_with_another_has_its_event_or_none(place: Place, store: Store) -> None:
    """A grant exchanged from one that ends dies in its transaction, and no act names it."""
    await store.grants.add(_grant(place, "parent", 1))
    origin = Origin("alice", grant_id="parent")
    await store.grants.add(replace(_grant(place, "child", 2), origin=origin))
    acting("EndGrant", actor="admin")
    await store.feed.append([change(KIND.GRANT_DEAD, "parent")])
    child = change(KIND.GRANT_DEAD, "child")
    [told] = await store.audit.told([child])
    assert told.event is not None
    assert told.event.touched.object_id == "parent"
    await place.sql(
        "INSERT INTO audit SELECT 'x' || audit_event_id, create_time, action, outcome,"
        " reason, actor, on_behalf_of, peer, address, subject, client_id, 'other',"
        " fields, comment, revision, request_id FROM audit"
    )
    [told] = await store.audit.told([child])
    assert told.event is None
    assert told.create_time is not None


# --- one row for each act ---

SEALER = Sealer((b"\x22" * 32,))


def _client(client_id: str = "shop", **more: Any) -> Client:
    metadata = ClientMetadata(
        client_id,
        frozenset({GrantType.CLIENT_CREDENTIALS}),
        frozenset({AuthMethod.API_KEY}),
        frozenset({"read"}),
    )
    made = Client(client_id, metadata, ClientState.APPROVED, 1.0, 1.0, "admin")
    return replace(made, **more)


def _grant(place: Place, grant_id: str, number: int = 1) -> Grant:
    start = place.clock.wall() if place.backend == "sqlite" else 1e9
    return Grant(
        grant_id=grant_id,
        client_id="shop",
        origin=Origin("alice"),
        grant_type=GrantType.TOKEN_EXCHANGE,
        scopes=frozenset({"read"}),
        audiences=("https://a.test",),
        sender="shop",
        rev=REVISIONS_PER_EPOCH,
        handle=bytes([number]) * 16,
        key_id="0000000a",
        create_time=start,
        idle_expire_time=start + 1e9,
        expire_time=start + 1e9,
    )


def _use(grant: Grant, generation: int) -> Use:
    return Use(grant.handle, generation, "0000000a", "shop", "shop", True, "0000000a", 1e9)


def _signing(state: KeyState) -> SigningKey:
    return generate(SEALER, state, 0.0, "ES256")


def _initial(token_id: str = "it") -> InitialAccessToken:
    return InitialAccessToken(token_id, "", 5, REVISIONS_PER_EPOCH, 1.0, 4e9, digest=b"\1" * 32)


def _api_key() -> ApiKey:
    return ApiKey("key", "shop", "", frozenset({"read"}), 7, 1.0, digest=b"\2" * 32)


def _move(to: ClientState, allowed: ClientState) -> Transition:
    return Transition("shop", frozenset({allowed}), to, "admin", "")


class Scene:
    """A store with one of everything, on which one act is done."""

    def __init__(self, place: Place, store: Store) -> None:
        self.place = place
        self.store = store
        self.grant = _grant(place, "g1")
        self.kids: list[str] = []

    async def fill(self) -> None:
        store = self.store
        await store.clients.add(_client())
        await store.resources.add(Resource("https://a.test", {"read": ""}, 1.0, 1.0))
        await store.api_keys.add(_api_key(), 100)
        await store.initial_access_tokens.add(_initial())
        await store.grants.add(self.grant)
        for state in (KeyState.CURRENT, KeyState.NEXT):
            key = _signing(state)
            self.kids.append(key.kid)
            if state is KeyState.CURRENT:
                await store.keys.add_first(key)
            else:
                await store.keys.prepare(key, -1.0)

    async def reuse(self) -> None:
        for generation, key_id in ((1, "0000000a"), (2, "0000000a"), (1, "0000000a")):
            await self.store.grants.use(replace(_use(self.grant, generation), key_id=key_id))

    async def raise_epoch(self, *, cut_off: bool) -> None:
        await self.store.feed.raise_epoch(await self.store.feed.read(0), 0, cut_off=cut_off)

    async def expire(self) -> None:
        await self.place.sql("UPDATE client SET approval_expire_time = 1")
        await self.store.clients.expire(1e9)

    async def purge(self) -> None:
        await self.store.keys.activate(self.kids[1])
        await self.place.sql("UPDATE signing_key SET retire_time = 1 WHERE state = 'retired'")
        await self.place.sql("DELETE FROM audit")
        await self.store.keys.purge(1.0)


Done = Callable[[Scene], Awaitable[object]]
ACTS: dict[str, tuple[Done, Touched | Callable[[Scene], Touched]]] = {
    "client added": (lambda s: s.store.clients.add(_client("new")), Touched(client_id="new")),
    "client replaced": (
        lambda s: s.store.clients.replace(_client(), cut_off=True),
        Touched(client_id="shop"),
    ),
    "client deleted": (lambda s: s.store.clients.delete("shop", None), Touched("shop", "shop")),
    "client moved": (
        lambda s: s.store.clients.move(_move(ClientState.SUSPENDED, ClientState.APPROVED)),
        Touched(client_id="shop"),
    ),
    "client expired": (Scene.expire, Touched(client_id="shop")),
    "registered by a token": (
        lambda s: s.store.clients.add(_client("new"), Admission(b"\1" * 32)),
        Touched(client_id="new"),
    ),
    "initial access token added": (
        lambda s: s.store.initial_access_tokens.add(replace(_initial("it2"), digest=b"\3" * 32)),
        Touched(object_id="it2"),
    ),
    "initial access token deleted": (
        lambda s: s.store.initial_access_tokens.delete("it"),
        Touched(object_id="it"),
    ),
    "resource added": (
        lambda s: s.store.resources.add(Resource("https://b.test", {}, 1.0, 1.0)),
        Touched(object_id="https://b.test"),
    ),
    "resource updated": (
        lambda s: s.store.resources.update("https://a.test", None, lambda found: found),
        Touched(object_id="https://a.test"),
    ),
    "resource deleted": (
        lambda s: s.store.resources.delete("https://a.test", None),
        Touched(object_id="https://a.test"),
    ),
    "API key added": (
        lambda s: s.store.api_keys.add(
            replace(_api_key(), api_key_id="key2", digest=b"\4" * 32), 100
        ),
        Touched(client_id="shop", object_id="key2"),
    ),
    "API key deleted": (
        lambda s: s.store.api_keys.delete("key"),
        Touched(client_id="shop", object_id="key"),
    ),
    "grant added": (
        lambda s: s.store.grants.add(_grant(s.place, "g2", 2)),
        Touched("alice", "shop", "g2"),
    ),
    "refresh token reused": (Scene.reuse, Touched("alice", "shop", "g1")),
    "key retired": (
        lambda s: s.store.keys.retire(s.kids[1]),
        lambda s: Touched(object_id=s.kids[1]),
    ),
    "key activated": (
        lambda s: s.store.keys.activate(s.kids[1]),
        lambda s: Touched(object_id=s.kids[1]),
    ),
    "key tainted": (
        lambda s: s.store.keys.taint(s.kids[0], _signing(KeyState.CURRENT), 0.0),
        lambda s: Touched(object_id=s.kids[0]),
    ),
    "key purged": (Scene.purge, lambda s: Touched(object_id=s.kids[0])),
    "epoch raised": (lambda s: s.raise_epoch(cut_off=False), Touched()),
    "epoch raised, all cut off": (lambda s: s.raise_epoch(cut_off=True), Touched()),
    "revoked": (
        lambda s: s.store.feed.append([change(KIND.CUTOFF_SUBJECT_CLIENT, "alice", "shop")]),
        Touched("alice", "shop"),
    ),
}


@pytest.fixture
async def scene(place: Place, store: Store) -> Scene:
    made = Scene(place, store)
    await made.fill()
    await place.sql("DELETE FROM audit")
    return made


@pytest.mark.parametrize("name", ACTS)
async def test_every_act_leaves_one_row_with_its_ids_and_revision(scene: Scene, name: str) -> None:
    done, touched = ACTS[name]
    head = (await scene.store.feed.read(0)).head
    acting("Act", actor="somebody")
    await done(scene)
    [event] = await events(scene.store)
    assert event.touched == (touched(scene) if callable(touched) else touched)
    assert event.act.action == ("EndReusedGrant" if "reused" in name else "Act")
    assert (event.act.actor, event.outcome) == ("somebody", AuditOutcome.SUCCEEDED)
    after = (await scene.store.feed.read(0)).head
    assert event.revision == (after if after > head else 0)


SILENT: dict[str, Done] = {
    "refresh token used": lambda s: s.store.grants.use(_use(s.grant, 1)),
    "access token stored": lambda s: s.store.tokens.add(
        StoredToken(
            b"\5" * 32,
            "",
            {
                "iss": "https://issuer.test",
                "sub": "alice",
                "aud": "https://a.test",
                "exp": 300,
                "iat": 0,
                "jti": "jti",
                "client_id": "shop",
                "rev": 1,
            },
            300.0,
        )
    ),
    "assertion used": lambda s: s.store.assertions.use("shop", "jti", 4e9),
    "secret used": lambda s: s.store.clients.secret_used("shop"),
    "compacted": lambda s: s.store.sweeps.compact(),
    "swept": lambda s: s.store.sweeps.sweep("grant", 10),
    "first key again": lambda s: s.store.keys.add_first(_signing(KeyState.CURRENT)),
    "nothing to delete": lambda s: s.store.initial_access_tokens.delete("other"),
    "nothing to expire": lambda s: s.store.clients.expire(1e9),
    "nothing to purge": lambda s: s.store.keys.purge(1.0),
    "dry taint": lambda s: s.store.keys.taint(s.kids[0], _signing(KeyState.CURRENT), 0.0, dry=True),
}
REFUSED: dict[str, Done] = {
    "etag of a client": lambda s: s.store.clients.replace(_client(version=9), cut_off=False),
    "etag of a resource": lambda s: s.store.resources.update("https://a.test", 9, lambda r: r),
    "scope that is taken": lambda s: s.store.resources.add(
        Resource("https://b.test", {"read": ""}, 1.0, 1.0)
    ),
    "client that is not there": lambda s: s.store.clients.delete("nobody", None),
    "client in another state": lambda s: s.store.clients.move(
        _move(ClientState.APPROVED, ClientState.PENDING)
    ),
    "token used up": lambda s: s.store.clients.add(_client("new"), Admission(b"\7" * 32)),
    "API key one too many": lambda s: s.store.api_keys.add(
        replace(_api_key(), api_key_id="key2", digest=b"\4" * 32), 1
    ),
    "key not next": lambda s: s.store.keys.activate(s.kids[0]),
    "edit that raises": lambda s: s.store.resources.update("https://a.test", None, _raises),
}


def _raises(_resource: Resource) -> Resource:
    raise AuthError(Reason.FIELD_INVALID)


@pytest.mark.parametrize("name", SILENT)
async def test_what_is_not_audited_leaves_none(scene: Scene, name: str) -> None:
    await SILENT[name](scene)
    assert await events(scene.store) == []


@pytest.mark.parametrize("name", REFUSED)
async def test_change_that_was_rolled_back_leaves_none(scene: Scene, name: str) -> None:
    with pytest.raises(AuthError):
        await REFUSED[name](scene)
    assert await events(scene.store) == []


async def test_reused_refresh_token_answers_the_recorded_revision(scene: Scene) -> None:
    grants = scene.store.grants
    await grants.use(_use(scene.grant, 1))
    await grants.use(_use(scene.grant, 2))
    reused = await grants.use(_use(scene.grant, 1))
    assert isinstance(reused, Reused)
    [event] = await events(scene.store)
    assert event.revision == reused.revision
    [told] = await scene.store.audit.told([change(KIND.GRANT_DEAD, "g1")])
    assert told.event == event


async def test_what_authsvc_does_by_itself_says_so_and_no_more(store: Store) -> None:
    with by_itself("ExpireClients"):
        await store.feed.append([change(KIND.CLIENT_CHANGED, "shop")])
    await store.feed.append([change(KIND.CLIENT_CHANGED, "shop")])
    inside, outside = sorted(await events(store), key=lambda event: event.revision)
    assert (inside.act.action, inside.act.actor) == ("ExpireClients", "authsvc")
    assert outside.act.action == ""


def test_what_changes_touch_is_what_they_name() -> None:
    assert touched_by([change(KIND.CUTOFF_SUBJECT_CLIENT, "a", "c")]) == Touched("a", "c")
    several = [change(KIND.GRANT_DEAD, "g"), change(KIND.USER_CHANGED, "a")]
    assert touched_by(several) == Touched("a", "", "g")
