"""What the stores promise (authsvc.store.port), in memory, with copies that fall behind.

As far as the verbs of the simulation need it. `test_memory` holds it against the SQL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    Catalog,
    Client,
    ClientState,
    Grant,
    KeyState,
    Resource,
    Session,
    SigningKey,
    User,
    UserState,
)
from authsvc.store.port import (
    HOUR_S,
    KEYS_CHANGES,
    Change,
    Done,
    FeedPage,
    Impact,
    PasswordRecord,
    Reused,
    Tainted,
    Transition,
    Use,
    change,
    client_changes,
    distinct,
    nonce,
    opening,
    require_step,
)
from authsvc.store.sql_feed import PAGE_ROWS
from authsvc_client.core.judge import cutoff_keys
from authsvc_client.core.markers import (
    CUTOFF_KINDS,
    MARKER_LIFETIME_S,
    Marker,
    MarkerKind,
    marker_key,
)
from authsvc_client.core.state import REVISIONS_PER_EPOCH

_EVERYTHING = marker_key(MarkerKind.CUTOFF_EVERYTHING)
_DURABLE = CUTOFF_KINDS | {MarkerKind.KEY_TAINTED}
_MARKS = (MarkerKind.TOKEN_DEAD, MarkerKind.GRANT_DEAD, MarkerKind.SESSION_DEAD)


@dataclass(frozen=True)
class Held:
    """A grant as a row."""

    grant: Grant
    previous_key_id: str = ""
    end_time: float | None = None

    @property
    def dies_with(self) -> list[Change]:
        """What kills it beside itself."""
        origin = self.grant.origin
        ids = zip(_MARKS, (origin.root_jti, origin.grant_id, origin.session_id), strict=True)
        return [change(kind, dies_with) for kind, dies_with in ids if dies_with]

    @property
    def cutoffs(self) -> tuple[bytes, ...]:
        grant, origin = self.grant, self.grant.origin
        return (
            _EVERYTHING,
            *cutoff_keys(grant.client_id, origin.subject, origin.actors, grant.audiences),
            *(marker_key(MarkerKind.KEY_TAINTED, kid) for kid in origin.key_ids),
        )


@dataclass
class Tables:
    """Rows. They are immutable, so a copy is cheap."""

    head: int = REVISIONS_PER_EPOCH
    compacted_to: int = REVISIONS_PER_EPOCH
    fingerprint: str = ""
    nonce: str = field(default_factory=nonce)
    feed: list[tuple[Marker, str]] = field(default_factory=list)
    """In the order of revisions, each row with the nonce of its revision."""
    cutoffs: dict[bytes, int] = field(default_factory=dict)
    clients: dict[str, Client] = field(default_factory=dict)
    resources: dict[str, Resource] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)
    keys: dict[str, SigningKey] = field(default_factory=dict)
    grants: dict[str, Held] = field(default_factory=dict)
    sessions: dict[str, tuple[Session, float | None]] = field(default_factory=dict)
    beat: float | None = 0.0

    def copy(self) -> "Tables":
        """As it is now."""
        made = replace(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict)):
                setattr(made, name, value.copy())
        return made


class Memory:
    """A database. Its parts are its own methods: no name is in two of them with two meanings."""

    def __init__(
        self,
        clock: Callable[[], float],
        fingerprint: str,
        tables: Tables | None = None,
        *,
        marker_lifetime_s: float = MARKER_LIFETIME_S,
        page_rows: int = PAGE_ROWS,
    ) -> None:
        self.clock = clock
        self.fingerprint = fingerprint
        self.tables = tables or Tables()
        self.marker_lifetime_s = marker_lifetime_s
        self.page_rows = page_rows
        self.standby = False
        self.writable = True
        self.is_down = False
        self.taken: list[tuple[int, list[Change]]] = []
        """Revisions since somebody looked."""
        self.committed: Callable[[int, list[Change]], None] = lambda _revision, _changes: None

    # --- the feed ---

    def advance(self, changes: Sequence[Change]) -> int:
        """Takes a revision, with all that dies by the changes."""
        t, now = self.tables, self.clock()
        unique = distinct([*changes, *self._end_grants(changes)])
        for one in changes:
            if one.kind is MarkerKind.SESSION_DEAD and one.ids[0] in t.sessions:
                session, end_time = t.sessions[one.ids[0]]
                t.sessions[one.ids[0]] = (session, now if end_time is None else end_time)
        t.head, t.nonce = t.head + 1, nonce()
        until = now + self.marker_lifetime_s
        for one in unique:
            t.feed.append((Marker(one.kind, one.key, t.head, until), t.nonce))
            if one.kind in _DURABLE:
                t.cutoffs[one.key] = t.head
        self.taken.append((t.head, unique))
        self.committed(t.head, unique)
        return t.head

    def _end_grants(self, changes: Sequence[Change]) -> list[Change]:
        ended: list[Change] = []
        marked = [one for one in changes if one.kind in _MARKS]
        while marked:
            dying = [
                held
                for held in self.tables.grants.values()
                if held.end_time is None
                and any(
                    one in marked
                    for one in (
                        *held.dies_with,
                        change(MarkerKind.GRANT_DEAD, held.grant.grant_id),
                    )
                )
            ]
            for held in dying:
                dead = replace(held, end_time=self.clock())
                self.tables.grants[held.grant.grant_id] = dead
            marked = [change(MarkerKind.GRANT_DEAD, held.grant.grant_id) for held in dying]
            ended += marked
        return ended

    def append(self, changes: Sequence[Change], _done: Done = ()) -> int:
        return self.advance(changes)

    def read(self, cursor: int) -> FeedPage:
        t, now = self.tables, self.clock()
        rows = [(m, its) for m, its in t.feed if m.revision >= cursor] if cursor else []
        at_cursor = {its for marker, its in rows if marker.revision == cursor}
        if t.head == cursor:
            at_cursor.add(t.nonce)
        head, its_nonce = t.head, t.nonce
        above = [marker.revision for marker, _ in rows if marker.revision > cursor]
        if len(above) > self.page_rows:
            rows = [row for row in rows if row[0].revision <= above[self.page_rows]]
            head, its_nonce = rows[-1][0].revision, rows[-1][1]
        return FeedPage(
            head=head,
            compacted_to=t.compacted_to,
            fingerprint=self.fingerprint,
            known_fingerprint=t.fingerprint,
            nonce=its_nonce,
            time=now,
            markers=tuple(marker for marker, _ in rows if marker.revision > cursor),
            cursor_nonce=at_cursor.pop() if len(at_cursor) == 1 else None,
            beat=t.beat,
            standby=self.standby,
            more=head < t.head,
        )

    def piece(self, after: tuple[int, int, bytes], head: int, rows: int) -> list[Marker]:
        """One of FeedStore.pieces."""
        now = self.clock()
        if self.tables.head < head:
            raise AuthError(Reason.STORE_UNAVAILABLE)
        found = sorted(
            ((m.revision, int(m.kind), m.key), m)
            for m, _ in self.tables.feed
            if m.revision <= head and m.until > now
        )
        return [marker for place, marker in found if place > after][:rows]

    def begin(self, page: FeedPage) -> None:
        self.tables.fingerprint = self.tables.fingerprint or page.fingerprint

    def _open(self, first: int, fingerprint: str) -> None:
        t = self.tables
        t.head = t.compacted_to = first
        t.fingerprint, t.nonce = fingerprint, nonce()

    def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        first = opening(max(page.head, above), page.time)
        if self.tables.head >= first // REVISIONS_PER_EPOCH * REVISIONS_PER_EPOCH:
            return
        self._open(first, page.fingerprint)
        if cut_off:
            self.advance([change(MarkerKind.CUTOFF_EVERYTHING)])

    def fence(self) -> int:
        first = int(self.clock() / HOUR_S * REVISIONS_PER_EPOCH)
        if first <= self.tables.head:
            first = opening(self.tables.head, self.clock())
        self._open(first, self.fingerprint)
        return self.advance([change(MarkerKind.CUTOFF_EVERYTHING)])

    def beat(self, every_s: float) -> None:
        t = self.tables
        if t.beat is not None and abs(self.clock() - t.beat) >= every_s:
            t.beat = self.clock()

    def compact(self) -> None:
        t, now = self.tables, self.clock()
        needed = [marker.revision for marker, _ in t.feed if marker.until > now]
        last = min([t.head, *needed[:1]]) - 1
        t.compacted_to = max(t.compacted_to, last)

    def sweep(self, table: str, _most: int) -> int:
        assert table == "feed"
        t, now = self.tables, self.clock()
        t.feed = [
            (marker, its)
            for marker, its in t.feed
            if marker.until > now or marker.revision > t.compacted_to
        ]
        return 0

    # --- clients, resources, users ---

    def get(self, some_id: str) -> Client | User | None:
        return self.tables.clients.get(some_id) or self.tables.users.get(some_id)

    def move(self, step: Transition) -> tuple[Client, int]:
        client = self.tables.clients.get(step.client_id)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        require_step(step, client.state, client.version)
        moved = replace(client, state=step.to, version=client.version + 1)
        self.tables.clients[step.client_id] = moved
        return moved, self.advance(client_changes(step.client_id, cut_off=step.cut_off))

    def catalog(self) -> Catalog:
        return Catalog(tuple(self.tables.resources.values()))

    def password(self, user_id: str) -> PasswordRecord | None:
        user = self.tables.users.get(user_id)
        return PasswordRecord(user, 1, "") if user is not None else None

    # --- keys ---

    def all(self) -> tuple[SigningKey, ...]:
        return tuple(self.tables.keys.values())

    def _key(self, state: KeyState) -> SigningKey | None:
        return next((key for key in self.tables.keys.values() if key.state is state), None)

    def _save(self, *keys: SigningKey) -> None:
        self.tables.keys.update({key.kid: key for key in keys})

    def _signing(self, key: SigningKey) -> SigningKey:
        return replace(key, state=KeyState.CURRENT, activate_time=self.clock())

    def add_first(self, key: SigningKey) -> None:
        if self._key(KeyState.CURRENT) is None:
            self._save(self._signing(replace(key, create_time=self.clock())))
            self.advance(KEYS_CHANGES)

    def prepare(self, key: SigningKey, wait_s: float) -> tuple[SigningKey, int]:
        if self._key(KeyState.NEXT) is not None:
            raise AuthError(Reason.SIGNING_KEY_STATE_CONFLICT)
        now = self.clock()
        made = replace(key, create_time=now, ready_time=now + wait_s)
        self._save(made)
        return made, self.advance(KEYS_CHANGES)

    def activate(self, kid: str) -> tuple[SigningKey, int]:
        key = self.tables.keys.get(kid)
        if key is None:
            raise AuthError(Reason.SIGNING_KEY_NOT_FOUND)
        if key.state is not KeyState.NEXT:
            raise AuthError(Reason.SIGNING_KEY_STATE_CONFLICT)
        if self.clock() < key.ready_time:
            raise AuthError(Reason.SIGNING_KEY_NOT_READY)
        before = self._key(KeyState.CURRENT)
        if before is not None:
            now = self.clock()
            gone = replace(before, state=KeyState.RETIRED, retire_time=now, sealed_private=b"")
            self._save(gone)
        self._save(self._signing(key))
        return self.tables.keys[kid], self.advance(KEYS_CHANGES)

    def taint(self, kid: str, spare: SigningKey, wait_s: float, *, dry: bool = False) -> Tainted:
        key, current = self.tables.keys.get(kid), self._key(KeyState.CURRENT)
        if key is None:
            raise AuthError(Reason.SIGNING_KEY_NOT_FOUND)
        if key.state is KeyState.TAINTED or dry:
            return Tainted(key, current, 0)
        now = self.clock()
        self._save(replace(key, state=KeyState.TAINTED, taint_time=now, sealed_private=b""))
        if current is key:
            heir = self._key(KeyState.NEXT)
            spare = replace(spare, create_time=now, ready_time=now + wait_s)
            current = self._signing(heir or spare)
            self._save(current)
        revision = self.advance([change(MarkerKind.KEY_TAINTED, kid), *KEYS_CHANGES])
        return Tainted(self.tables.keys[kid], current, revision)

    # --- grants and sessions ---

    def _lives(self, held: Held) -> bool:
        now, grant = self.clock(), held.grant
        is_over = grant.expire_time <= now or grant.idle_expire_time <= now
        return held.end_time is None and not is_over and not self._is_cut_off(held)

    def _is_cut_off(self, held: Held) -> bool:
        return any(self.tables.cutoffs.get(key, 0) > held.grant.rev for key in held.cutoffs)

    def add(self, grant: Grant) -> bool:
        held = Held(grant)
        dead = {one.key for one in held.dies_with}
        if any(marker.key in dead for marker, _ in self.tables.feed):
            return False
        self.tables.grants[grant.grant_id] = held
        return True

    def open(self, session: Session, grant: Grant, password_version: int) -> bool:
        user = self.tables.users.get(session.user_id)
        if user is None or user.state is not UserState.ACTIVE or password_version != 1:
            return False
        self.tables.sessions[session.session_id] = (session, None)
        self.tables.grants[grant.grant_id] = Held(grant)
        return True

    def _of(self, handle: bytes) -> Held | None:
        return next((h for h in self.tables.grants.values() if h.grant.handle == handle), None)

    def use(self, use: Use) -> Grant | Reused | None:
        held = self._of(use.handle)
        if held is None or not self._lives(held):
            return None
        grant = held.grant
        if (grant.client_id, grant.sender) != (use.client_id, use.sender):
            return None
        if not self.is_good(held, use):
            dead = [change(MarkerKind.GRANT_DEAD, grant.grant_id)]
            return Reused(grant.grant_id, self.advance(dead))
        now = self.clock()
        used = replace(grant, use_time=now, idle_expire_time=now + use.idle_s)
        previous = held.previous_key_id
        if grant.generation == use.generation:
            used = replace(used, generation=grant.generation + 1, key_id=use.next_key_id)
            previous = grant.key_id
        self.tables.grants[grant.grant_id] = Held(used, previous)
        return used

    def is_good(self, held: Held, use: Use) -> bool:
        """Whether the generation is the live one, or the one before it, which may be repeated."""
        grant = held.grant
        if (grant.generation, grant.key_id) == (use.generation, use.key_id):
            return True
        repeated = (grant.generation - 1, held.previous_key_id) == (use.generation, use.key_id)
        return use.may_repeat and repeated

    def by_handle(self, handle: bytes) -> Grant | None:
        held = self._of(handle)
        return held.grant if held is not None and self._lives(held) else None

    def living(self, grant_id: str) -> Grant | None:
        held = self.tables.grants.get(grant_id)
        return held.grant if held is not None and self._lives(held) else None

    # --- revocations ---

    def impact(self, _marker: Change) -> Impact:
        return Impact()

    def is_dead(self, mark: Change) -> bool:
        if any(marker.key == mark.key for marker, _ in self.tables.feed):
            return True
        if mark.kind is MarkerKind.GRANT_DEAD:
            held = self.tables.grants.get(mark.ids[0])
            return held is not None and held.end_time is not None
        session = self.tables.sessions.get(mark.ids[0])
        return session is not None and session[1] is not None

    # --- what the world is made with ---

    def let_in(self, client: Client) -> None:
        """Puts an approved client there, without a revision."""
        self.tables.clients[client.client_id] = replace(client, state=ClientState.APPROVED)
