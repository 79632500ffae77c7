"""The memory of the simulation keeps what the SQL keeps: the same deeds, the same answers."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import pytest

from authsvc.errors import AuthError
from authsvc.keys.jwt import generate
from authsvc.keys.secrets import Sealer
from authsvc.model import (
    AuthMethod,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    Grant,
    GrantType,
    IdentityKind,
    KeyState,
    Origin,
    Session,
    SigningKey,
    User,
)
from authsvc.store import sql_feed, sql_store
from authsvc.store.port import FeedPage, Reused, Store, Tainted, Transition, Use, change
from authsvc.store.sql import Database
from authsvc_client.core.markers import MARKER_LIFETIME_S, MarkerKind
from authsvc_client.core.state import REVISIONS_PER_EPOCH
from tests.clocks import HandClock
from tests.harness import migrated
from tests.sim.memory import Memory, Tables

LINEAGE = "ab" * 16
SEALER = Sealer((b"\x22" * 32,))
KIND = MarkerKind
CLIENTS, USERS, PAGE_ROWS = ("c0", "c1"), ("u0", "u1"), 5


class Both:
    """One deed in the memory and in the SQL."""

    def __init__(self, memory: Memory, store: Store, clock: HandClock, rng: Random) -> None:
        self.memory, self.store, self.clock, self.rng = memory, store, clock, rng
        self.cursor = 0
        self.grants: list[Grant] = []
        self.sessions: list[str] = []
        self.keys: list[SigningKey] = []
        self.spares = [generate(SEALER, KeyState.NEXT, 0.0, "EdDSA") for _ in range(8)]
        self.made = 0
        self.told: set[str] = set()

    async def do(self, part: str, name: str, *given: Any, **named: Any) -> str:
        """What both say; they say the same."""
        try:
            here = told(getattr(self.memory, name)(*given, **named))
        except AuthError as error:
            here = error.reason.name
        try:
            there = told(await getattr(getattr(self.store, part), name)(*given, **named))
        except AuthError as error:
            there = error.reason.name
        assert here == there, (part, name, given)
        self.told.add(f"{name} {here.split('(')[0][:12]}")
        return here

    def now(self) -> float:
        return self.clock.wall()

    async def step(self) -> None:
        rng = self.rng
        deeds = [
            *(self.append, self.append, self.add, self.add, self.open, self.use, self.use),
            *(self.use, self.read, self.read, self.move, self.keyring, self.compact, self.epoch),
            *(self.look, self.look),
        ]
        await rng.choice(deeds)()
        self.clock.advance(rng.choice([0.0, 0.5, 10.0, 60.0, MARKER_LIFETIME_S * rng.random()]))

    def a_mark(self) -> Any:
        ids = {
            KIND.TOKEN_DEAD: [f"jti{n}" for n in range(4)],
            KIND.GRANT_DEAD: [grant.grant_id for grant in self.grants[-4:]] or ["g"],
            KIND.SESSION_DEAD: self.sessions[-3:] or ["s"],
            KIND.CUTOFF_CLIENT: list(CLIENTS),
            KIND.CUTOFF_SUBJECT: list(USERS),
            KIND.KEY_TAINTED: ["kid0", "kid1"],
        }
        kind = self.rng.choice(list(ids))
        if self.rng.random() < 0.1:
            return change(KIND.CUTOFF_EVERYTHING)
        return change(kind, self.rng.choice(ids[kind]))

    async def append(self) -> None:
        await self.do("feed", "append", [self.a_mark() for _ in range(self.rng.choice([1, 1, 3]))])

    async def read(self) -> None:
        head = self.memory.tables.head
        self.cursor = self.rng.choice([0, head, head - 2, head - 9, self.cursor])
        await self.do("feed", "read", max(0, self.cursor))
        here: list[Any] = []
        after, rows = (-1, 0, b""), 4
        while found := self.memory.piece(after, head, rows):
            here += found
            after = (found[-1].revision, int(found[-1].kind), found[-1].key)
        there = [marker async for piece in self.store.feed.pieces(head, rows) for marker in piece]
        assert here == there

    def _grant(self, **more: Any) -> Grant:
        self.made += 1
        rng, now = self.rng, self.now()
        parent = rng.choice(self.grants[-4:]).grant_id if self.grants else ""
        origin = Origin(
            rng.choice(USERS),
            actors=rng.choice([(), ("c1",)]),
            grant_id=rng.choice(["", parent]),
            root_jti=rng.choice(["", f"jti{rng.randrange(4)}"]),
            key_ids=rng.choice([(), ("kid0",)]),
            session_id=rng.choice(["", *self.sessions[-2:]]),
        )
        made = Grant(
            grant_id=f"g{self.made}",
            client_id=rng.choice(CLIENTS),
            origin=origin,
            grant_type=GrantType.TOKEN_EXCHANGE,
            scopes=frozenset({"read"}),
            audiences=("https://a.test",),
            sender="sender",
            rev=self.memory.tables.head - rng.choice([0, 0, 1]),
            handle=self.made.to_bytes(16, "big"),
            key_id="0000000a",
            create_time=now,
            idle_expire_time=now + 200,
            expire_time=now + 3000,
        )
        return replace(made, **more)

    async def add(self) -> None:
        grant = self._grant()
        if await self.do("grants", "add", grant) == "True":
            self.grants.append(grant)

    async def open(self) -> None:
        user, session_id, now = self.rng.choice([*USERS, "nobody"]), f"s{self.made}", self.now()
        session = Session(session_id, user, self.memory.tables.head, "", now, now, now + 3000)
        grant = self._grant(origin=Origin(user, session_id=session_id))
        if await self.do("sessions", "open", session, grant, self.rng.choice([1, 1, 2])) == "True":
            self.sessions.append(session_id)
            self.grants.append(grant)

    async def use(self) -> None:
        if not self.grants:
            return
        grant, rng = self.rng.choice(self.grants[-4:]), self.rng
        held = self.memory.tables.grants[grant.grant_id].grant
        use = Use(
            grant.handle,
            max(1, held.generation - rng.choice([0, 0, 0, 1, 1, 2, -1])),
            rng.choice([held.key_id] * 5 + ["0000000a"]),
            rng.choice([grant.client_id] * 9 + ["c1"]),
            rng.choice(["sender"] * 9 + ["thief"]),
            rng.random() < 0.8,
            rng.choice(["0000000a", "0000000b"]),
            200.0,
        )
        await self.do("grants", "use", use)

    async def look(self) -> None:
        if not self.grants:
            return
        grant = self.rng.choice(self.grants[-6:])
        await self.do("grants", "by_handle", grant.handle)
        await self.do("grants", "living", grant.grant_id)
        await self.do("revocations", "is_dead", change(KIND.GRANT_DEAD, grant.grant_id))
        if self.sessions:
            dead = change(KIND.SESSION_DEAD, self.rng.choice(self.sessions[-3:]))
            await self.do("revocations", "is_dead", dead)

    async def move(self) -> None:
        approved, suspended = ClientState.APPROVED, ClientState.SUSPENDED
        start, to = self.rng.choice([(approved, suspended), (suspended, approved)])
        cut_off = to is suspended
        client_id = self.rng.choice([*CLIENTS, "nobody"])
        step = Transition(client_id, frozenset({start}), to, "admin", "", cut_off=cut_off)
        await self.do("clients", "move", step)

    async def keyring(self) -> None:
        kids = [*self.memory.tables.keys, "unknown"]
        spare = replace(self.spares[-1], state=KeyState.CURRENT)
        deeds: list[tuple[Any, ...]] = [
            ("add_first", spare),
            ("prepare", self.spares[-1], 20.0),
            ("activate", self.rng.choice(kids)),
            ("taint", self.rng.choice(kids), spare, 20.0),
            ("all",),
        ]
        name, *given = self.rng.choice(deeds)
        await self.do("keys", name, *given)
        if self.spares[-1].kid in self.memory.tables.keys:
            self.spares.pop()
            self.spares.append(generate(SEALER, KeyState.NEXT, 0.0, "EdDSA"))

    async def compact(self) -> None:
        await self.do("sweeps", "compact")
        self.memory.sweep("feed", 1000)
        await self.store.sweeps.sweep("feed", 1000)

    async def epoch(self) -> None:
        if self.rng.random() < 0.2:
            await self.do("feed", "fence")
            return
        page = self.memory.read(0)
        head = self.memory.tables.head
        above = self.rng.choice([0, head + 5, head - REVISIONS_PER_EPOCH])
        await self.do("feed", "raise_epoch", page, above, cut_off=self.rng.random() < 0.5)


def told(found: Any) -> str:
    """An answer, as far as both can say the same of it."""
    if isinstance(found, tuple) and found and isinstance(found[-1], int):
        made, revision = found
        return f"{made.state.name} {revision}"
    if isinstance(found, tuple) and found and isinstance(found[0], SigningKey):
        return f"keys({sorted((key.kid, key.state, len(key.sealed_private)) for key in found)})"
    if isinstance(found, FeedPage):
        rows = tuple(sorted(found.markers, key=lambda m: (m.revision, m.kind, m.key)))
        at_cursor = str(bool(found.cursor_nonce))
        return f"page({replace(found, markers=rows, nonce='', cursor_nonce=at_cursor)})"
    if isinstance(found, Tainted):
        return f"tainted({found.key.kid} {found.current and found.current.kid} {found.revision})"
    if isinstance(found, Reused):
        return f"reused({found})"
    return str(found)


@pytest.fixture
async def both(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Both]:
    clock, rng = HandClock(), Random(request.param)
    database = Database(await migrated(tmp_path), clock, sqlite_id=LINEAGE)
    store = sql_store(database)
    memory = Memory(clock.wall, LINEAGE, Tables(beat=None), page_rows=PAGE_ROWS)
    now = clock.wall()
    for name in CLIENTS:
        metadata = ClientMetadata(
            name,
            frozenset(GrantType),
            frozenset({AuthMethod.TLS_CLIENT_AUTH}),
            frozenset({"read"}),
            CertificateIdentity(IdentityKind.SAN_URI, f"spiffe://test/{name}", "ca"),
            texts=MappingProxyType({}),
        )
        client = Client(name, metadata, ClientState.APPROVED, now, now, "test")
        await store.clients.add(client)
        memory.tables.clients[name] = client
    for name in USERS:
        user = User(name, name, now, now)
        await store.users.add(user, "hash")
        memory.tables.users[name] = user
    page = await store.feed.read(0)
    await store.feed.begin(page)
    memory.begin(memory.read(0))
    memory.tables.head = memory.tables.compacted_to = page.head
    memory.tables.compacted_to = page.compacted_to
    yield Both(memory, store, clock, rng)
    await store.close()


@pytest.mark.parametrize("both", range(3), indirect=True)
async def test_it_answers_as_the_sql_does(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_feed, "PAGE_ROWS", PAGE_ROWS)
    for _ in range(120):
        await both.step()
    await both.do("feed", "fence")
    await both.read()
    assert {each.split()[0] for each in both.told} >= {
        *("append", "read", "add", "open", "use", "by_handle", "living", "is_dead"),
        *("move", "compact", "raise_epoch", "fence"),
    }
