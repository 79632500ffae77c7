"""The feed in SQL. Revisions have no gaps: they come from one row, locked last."""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    func,
    insert,
    null,
    select,
    text,
    true,
    tuple_,
    update,
)
from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import Touched
from authsvc.store.port import (
    HOUR_S,
    NOTHING,
    Change,
    Done,
    FeedPage,
    change,
    distinct,
    nonce,
    opening,
    touched_by,
)
from authsvc.store.sql import TIME, Database, note
from authsvc.store.sql_audit import record, record_all
from authsvc.store.tables import BEAT, FEED, FEED_HEAD
from authsvc_client.core.markers import (
    CUTOFF_KINDS,
    MARKER_LIFETIME_S,
    Marker,
    MarkerKind,
    read_marker,
)
from authsvc_client.core.state import REVISIONS_PER_EPOCH

# Head and rows in one statement, so that the lock on the head is held for one round trip.
_ADVANCE_POSTGRES = text(
    "WITH head AS (UPDATE feed_head SET revision = revision + 1, nonce = :nonce WHERE id = 1"
    " RETURNING revision), cut AS (INSERT INTO cutoff (key, revision)"
    " SELECT k, head.revision FROM head, unnest(CAST(:cutoffs AS text[])) AS cutoffs(k)"
    " ON CONFLICT (key) DO UPDATE SET revision = excluded.revision)"
    " INSERT INTO feed (revision, kind, key, until, nonce)"
    " SELECT head.revision, m.kind, m.key,"
    " extract(epoch FROM clock_timestamp())::double precision + :life, :nonce"
    " FROM head, unnest(CAST(:kinds AS int[]), CAST(:keys AS bytea[])) AS m(kind, key)"
    " RETURNING revision"
)
# Others do not wait for who is at it: a commit may be held up for long.
_BEAT = text(
    f"UPDATE beat SET time = {TIME['postgresql']} WHERE id IN (SELECT id FROM beat WHERE"  # noqa: S608
    f" abs({TIME['postgresql']} - time) >= :every_s FOR UPDATE SKIP LOCKED)"
)
PAGE_ROWS = 4096
"""Of one read, and what else the last revision holds: a few milliseconds of its caller's loop."""
_NO_REVISION = 2**63 - 1
_CUT_OFF_SQLITE = text(
    "INSERT INTO cutoff (key, revision) VALUES (:key, :revision)"
    " ON CONFLICT (key) DO UPDATE SET revision = excluded.revision"
)


async def advance(
    database: Database,
    connection: AsyncConnection,
    changes: Sequence[Change],
    touched: Touched | None = None,
) -> int:
    """Takes the next revision for these changes, as the last lock of a transaction.

    What they kill is dead in the tables too, in the same transaction: a marker is compacted one
    day, and a stored credential must not outlive it. What is under way is recorded with it, as
    touching what the changes name, or `touched`.
    """
    revision = await advance_silently(database, connection, changes)
    found = touched_by(changes) if touched is None else touched
    await record(database, connection, found, revision=revision)
    return revision


async def advance_silently(
    database: Database, connection: AsyncConnection, changes: Sequence[Change]
) -> int:
    """As `advance`, of what is recorded elsewhere or not at all."""
    if any(one.kind in MARKS for one in changes):
        await lock_marks(database, connection)
    unique = distinct([*changes, *await _end_grants(database, connection, changes)])
    await _end_sessions(database, connection, changes)
    await _delete_api_keys(database, connection, changes)
    cutoffs = [one.key.hex() for one in unique if one.kind in _DURABLE]
    value = nonce()
    if database.dialect == "postgresql":
        found = await connection.execute(
            _ADVANCE_POSTGRES,
            {
                "nonce": value,
                "life": float(MARKER_LIFETIME_S),
                "kinds": [int(one.kind) for one in unique],
                "keys": [one.key for one in unique],
                "cutoffs": cutoffs,
            },
        )
        revisions = found.scalars().all()
        if not revisions:
            raise NoResultFound("feed_head has no row")
        note(connection, int(revisions[0]), unique)
        return int(revisions[0])
    moved = await connection.execute(
        update(FEED_HEAD)
        .values(revision=FEED_HEAD.c.revision + 1, nonce=value)
        .returning(FEED_HEAD.c.revision)
    )
    revision = int(moved.scalar_one())
    await connection.execute(
        insert(FEED).values(until=database.time + MARKER_LIFETIME_S),
        [
            {"revision": revision, "kind": int(one.kind), "key": one.key, "nonce": value}
            for one in unique
        ],
    )
    if cutoffs:
        rows = [{"key": key, "revision": revision} for key in cutoffs]
        await connection.execute(_CUT_OFF_SQLITE, rows)
    note(connection, revision, unique)
    return revision


_DURABLE = CUTOFF_KINDS | {MarkerKind.KEY_TAINTED}
"""What stays in `cutoff` for ever; a tainted key cuts off what was exchanged from its tokens."""
MARKS = frozenset({MarkerKind.TOKEN_DEAD, MarkerKind.GRANT_DEAD, MarkerKind.SESSION_DEAD})
"""What ends stored grants."""


async def lock_marks(
    database: Database, connection: AsyncConnection, *, shared: bool = False
) -> None:
    """Whoever marks dead is alone with the grants; those who add one, `shared`, are not.

    Else each could miss the other's uncommitted row, and two that mark dead could deadlock: it
    goes before the lock of any grant. SQLite writes one transaction at a time.
    """
    if database.dialect == "postgresql":
        await connection.execute(_LOCK_MARKS_SHARED if shared else _LOCK_MARKS)


_LOCK_MARKS = text("SELECT pg_advisory_xact_lock(1635087464)")
_LOCK_MARKS_SHARED = text("SELECT pg_advisory_xact_lock_shared(1635087464)")
_AMONG = {
    "sqlite": "IN (SELECT value FROM json_each(:{}))",
    "postgresql": "= ANY(CAST(:{} AS text[]))",
}
"""In a list of any length, by an index."""


def _among(database: Database, ids: Iterable[str]) -> Any:
    """The value for a parameter of `_AMONG`; without the empty id, which is that of many rows."""
    kept = [each for each in ids if each]
    return json.dumps(kept) if database.dialect == "sqlite" else kept


async def _end_grants(
    database: Database, connection: AsyncConnection, changes: Sequence[Change]
) -> list[Change]:
    """Ends the grants that die with what is marked dead, and those exchanged from them."""
    ended: list[Change] = []
    marked = [one for one in changes if one.kind in MARKS]
    while marked:
        found = await connection.execute(
            _END_GRANTS[database.dialect], marked_ids(database, marked)
        )
        marked = [change(MarkerKind.GRANT_DEAD, grant_id) for grant_id in found.scalars()]
        ended += marked
    return ended


async def _end_sessions(
    database: Database, connection: AsyncConnection, changes: Sequence[Change]
) -> None:
    dead = [one.ids[0] for one in changes if one.kind is MarkerKind.SESSION_DEAD]
    if dead:
        statement = _END_SESSIONS[database.dialect]
        await connection.execute(statement, {"SESSION_DEAD": _among(database, dead)})


async def _delete_api_keys(
    database: Database, connection: AsyncConnection, changes: Sequence[Change]
) -> None:
    """An API key has a `jti` like any token, and lives longer than the marker."""
    dead = [one.ids[0] for one in changes if one.kind is MarkerKind.TOKEN_DEAD]
    if dead:
        statement = _DELETE_API_KEYS[database.dialect]
        await connection.execute(statement, {"TOKEN_DEAD": _among(database, dead)})


def marked_ids(database: Database, marks: Sequence[Change]) -> dict[str, Any]:
    """The parameters of DIE_WITH."""
    return {
        kind.name: _among(database, (one.ids[0] for one in marks if one.kind is kind))
        for kind in MARKS
    }


def _die_with(among: Callable[[str], str]) -> str:
    return (
        f"end_time IS NULL AND (root_jti {among('TOKEN_DEAD')} OR session_id"
        f" {among('SESSION_DEAD')} OR grant_id {among('GRANT_DEAD')}"
        f" OR parent_id {among('GRANT_DEAD')})"
    )


DIE_WITH = {dialect: _die_with(among.format) for dialect, among in _AMONG.items()}
"""The grants that end with what is marked dead, but for those exchanged from them."""
_END_GRANTS = {
    dialect: text(
        f'UPDATE "grant" SET end_time = {TIME[dialect]} WHERE {dying} RETURNING grant_id'  # noqa: S608
    )
    for dialect, dying in DIE_WITH.items()
}
_END_SESSIONS = {
    dialect: text(
        f"UPDATE session SET end_time = {TIME[dialect]}"  # noqa: S608
        f" WHERE end_time IS NULL AND session_id {among.format('SESSION_DEAD')}"
    )
    for dialect, among in _AMONG.items()
}
_DELETE_API_KEYS = {
    dialect: text(f"DELETE FROM api_key WHERE api_key_id {among.format('TOKEN_DEAD')}")  # noqa: S608
    for dialect, among in _AMONG.items()
}


class SqlFeed:
    """The feed."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._read_from = self._reading()
        self._piece = self._a_piece()
        self._lock_head = select(
            FEED_HEAD.c.revision, database.time.label("time")
        ).with_for_update()

    def _reading(self) -> Select[Any]:
        """Head and rows, with the last revision that has a place where there are too many."""
        last = (
            select(FEED.c.revision)
            .where(FEED.c.revision > bindparam("cursor"))
            .order_by(FEED.c.revision)
            .limit(1)
            .offset(bindparam("most"))
            .scalar_subquery()
        )
        wanted = and_(
            FEED.c.revision >= bindparam("cursor"),
            FEED.c.revision <= func.coalesce(last, _NO_REVISION),
        )
        head = FEED_HEAD.c
        # A SQLite file has no second copy that it could be taken for. A missing row is no beat.
        beat: ColumnElement[Any] = null()
        if self._db.dialect == "postgresql":
            beat = func.coalesce(select(BEAT.c.time).scalar_subquery(), 0.0)
        return select(
            head.revision.label("head"),
            head.compacted_to,
            head.fingerprint,
            head.nonce.label("head_nonce"),
            self._db.time.label("time"),
            self._db.fingerprint.label("live_fingerprint"),
            self._db.standby.label("standby"),
            beat.label("beat"),
            last.label("last"),
            *(FEED.c[name] for name in ("revision", "kind", "key", "until", "nonce")),
        ).select_from(FEED_HEAD.outerjoin(FEED, wanted))

    def _a_piece(self) -> Select[Any]:
        """By the primary key, from the row after the last one; with the head of who answers."""
        feed = FEED.c
        after = tuple_(bindparam("revision"), bindparam("kind"), bindparam("key"))
        piece = (
            select(feed.revision, feed.kind, feed.key, feed.until)
            .where(
                tuple_(feed.revision, feed.kind, feed.key) > after,
                feed.revision <= bindparam("head"),
                feed.until > select(self._db.time).scalar_subquery(),
            )
            .order_by(feed.revision, feed.kind, feed.key)
            .limit(bindparam("rows"))
            .subquery()
        )
        return (
            select(piece, FEED_HEAD.c.revision.label("head"))
            .select_from(FEED_HEAD.outerjoin(piece, true()))
            .where(FEED_HEAD.c.id == 1)
            .order_by(piece.c.revision, piece.c.kind, piece.c.key)
        )

    async def close(self) -> None:
        """Gives connections back."""
        await self._db.close()

    def on_commit(self, tell: Callable[[int, Sequence[Change]], None]) -> None:
        """Has it told of what is committed; it must neither wait nor fail."""
        self._db.on_commit = tell

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        """See FeedStore."""
        return await self._db.to_the_end(self._append(changes, done))

    async def _append(self, changes: Sequence[Change], done: Done) -> int:
        async with self._db.write() as connection:
            if not done:
                return await advance(self._db, connection, changes)
            revision = await advance_silently(self._db, connection, changes)
            await record_all(self._db, connection, done, revision=revision)
            return revision

    async def read(self, cursor: int) -> FeedPage:
        """See FeedStore."""
        wanted = {"cursor": cursor or _NO_REVISION, "most": PAGE_ROWS}
        async with self._db.read(follower=True) as connection:
            rows = (await connection.execute(self._read_from, wanted)).all()
            if not rows:
                raise NoResultFound("feed_head has no row")
        first = rows[0]
        at_cursor = {row.nonce for row in rows if row.revision == cursor}
        if first.head == cursor:
            at_cursor.add(first.head_nonce)
        head, head_nonce = first.head, first.head_nonce
        if first.last is not None:
            head, head_nonce = max((row.revision, row.nonce) for row in rows)
        return FeedPage(
            head=head,
            compacted_to=first.compacted_to,
            fingerprint=first.live_fingerprint,
            known_fingerprint=first.fingerprint,
            nonce=head_nonce,
            time=float(first.time),
            markers=tuple(
                read_marker(row.kind, row.key, row.revision, row.until)
                for row in sorted(
                    (r for r in rows if r.revision is not None and r.revision > cursor),
                    key=lambda r: int(r.revision),
                )
            ),
            cursor_nonce=at_cursor.pop() if len(at_cursor) == 1 else None,
            beat=first.beat,
            standby=bool(first.standby),
            more=head < first.head,
        )

    async def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        """See FeedStore."""
        after: dict[str, Any] = {"revision": -1, "kind": 0, "key": b""}
        while True:
            wanted = {**after, "head": head, "rows": rows}
            async with self._db.read(follower=True) as connection:
                found = (await connection.execute(self._piece, wanted)).all()
            if not found or found[0].head < head:  # of a standby that is not so far
                raise AuthError(Reason.STORE_UNAVAILABLE, cause="below the head that was read")
            if found[0].revision is not None:
                yield [
                    read_marker(kind, key, revision, until)
                    for revision, kind, key, until, _ in found
                ]
            if len(found) < rows or found[0].revision is None:
                return
            after = dict(zip(after, found[-1], strict=False))

    async def beat(self, every_s: float) -> None:
        """See FeedStore."""
        if self._db.dialect == "postgresql":
            await self._db.to_the_end(self._beat(every_s))

    async def _beat(self, every_s: float) -> None:
        async with self._db.read(follower=True) as connection:
            await connection.execute(_BEAT, {"every_s": every_s})

    async def begin(self, page: FeedPage) -> None:
        """See FeedStore."""
        async with self._db.write() as connection:
            await connection.execute(
                update(FEED_HEAD)
                .where(FEED_HEAD.c.fingerprint == "")
                .values(fingerprint=page.fingerprint)
            )

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        """See FeedStore."""
        await self._db.to_the_end(self._raise_epoch(page, above, cut_off=cut_off))

    async def _raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        first = opening(max(page.head, above), page.time)
        async with self._db.write() as connection:
            moved = await connection.execute(
                update(FEED_HEAD)
                .where(FEED_HEAD.c.revision < first // REVISIONS_PER_EPOCH * REVISIONS_PER_EPOCH)
                .values(
                    revision=first,
                    compacted_to=first,
                    fingerprint=page.fingerprint,
                    nonce=nonce(),
                )
            )
            if moved.rowcount and cut_off:
                await advance(self._db, connection, [change(MarkerKind.CUTOFF_EVERYTHING)])
            elif moved.rowcount:
                await record(self._db, connection, NOTHING, revision=first)

    async def fence(self) -> int:
        """See FeedStore."""
        return await self._db.to_the_end(self._fence())

    async def _fence(self) -> int:
        async with self._db.write() as connection:
            found = await connection.execute(self._lock_head)
            head = found.one()
            # An epoch for each hour since 1970, below 2**53 until 2209, and a million revisions for
            # each second of it: above a lost history, had it been fenced a moment ago.
            first = int(head.time / HOUR_S * REVISIONS_PER_EPOCH)
            if first <= head.revision:
                first = opening(head.revision, head.time)
            await connection.execute(
                update(FEED_HEAD).values(
                    revision=first,
                    compacted_to=first,
                    fingerprint=self._db.fingerprint,
                    nonce=nonce(),
                )
            )
            return await advance(self._db, connection, [change(MarkerKind.CUTOFF_EVERYTHING)])
