"""The feed in SQL. Revisions have no gaps: they come from one row, locked last."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, and_, bindparam, insert, or_, select, text, update
from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.store.port import Change, FeedPage, distinct, nonce
from authsvc.store.sql import Database
from authsvc.store.tables import FEED, FEED_HEAD
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH

# Head and rows in one statement, so that the lock on the head is held for one round trip.
_ADVANCE_POSTGRES = text(
    "WITH head AS (UPDATE feed_head SET revision = revision + 1, nonce = :nonce WHERE id = 1"
    " RETURNING revision)"
    " INSERT INTO feed (revision, kind, key, until, nonce)"
    " SELECT head.revision, m.kind, m.key,"
    " extract(epoch FROM clock_timestamp())::double precision + :life, :nonce"
    " FROM head, unnest(CAST(:kinds AS int[]), CAST(:keys AS bytea[])) AS m(kind, key)"
    " RETURNING revision"
)


async def advance(
    database: Database, connection: AsyncConnection, changes: Sequence[Change]
) -> int:
    """Takes the next revision for these changes, as the last lock of a transaction."""
    unique = distinct(changes)
    value = nonce()
    if database.dialect == "postgresql":
        found = await connection.execute(
            _ADVANCE_POSTGRES,
            {
                "nonce": value,
                "life": float(MARKER_LIFETIME_S),
                "kinds": [int(kind) for kind, _ in unique],
                "keys": [key for _, key in unique],
            },
        )
        revisions = found.scalars().all()
        if not revisions:
            raise NoResultFound("feed_head has no row")
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
            {"revision": revision, "kind": int(kind), "key": key, "nonce": value}
            for kind, key in unique
        ],
    )
    return revision


class SqlFeed:
    """The feed."""

    def __init__(self, database: Database) -> None:
        self._db = database
        cursor = bindparam("cursor", type_=FEED.c.revision.type)
        wanted = or_(
            and_(cursor > 0, FEED.c.revision >= cursor),
            and_(cursor == 0, FEED.c.until > database.time),
        )
        head = FEED_HEAD.c
        self._read = select(
            head.revision.label("head"),
            head.compacted_to,
            head.fingerprint,
            head.nonce.label("head_nonce"),
            database.time.label("time"),
            database.fingerprint.label("live_fingerprint"),
            *(FEED.c[name] for name in ("revision", "kind", "key", "until", "nonce")),
        ).select_from(FEED_HEAD.outerjoin(FEED, wanted))

    async def close(self) -> None:
        """Gives connections back."""
        await self._db.close()

    async def append(self, changes: Sequence[Change]) -> int:
        """See FeedStore."""
        return await self._db.to_the_end(self._append(changes))

    async def _append(self, changes: Sequence[Change]) -> int:
        async with self._db.write() as connection:
            return await advance(self._db, connection, changes)

    async def read(self, cursor: int) -> FeedPage:
        """See FeedStore."""
        async with self._db.read(follower=True) as connection:
            rows = (await connection.execute(self._read, {"cursor": cursor})).all()
            if not rows:
                raise NoResultFound("feed_head has no row")
        first = rows[0]
        at_cursor = {row.nonce for row in rows if row.revision == cursor}
        if first.head == cursor:
            at_cursor.add(first.head_nonce)
        return FeedPage(
            head=first.head,
            compacted_to=first.compacted_to,
            fingerprint=first.live_fingerprint,
            known_fingerprint=first.fingerprint,
            nonce=first.head_nonce,
            time=float(first.time),
            markers=tuple(
                _marker(row)
                for row in sorted(
                    (r for r in rows if r.revision is not None and r.revision > cursor),
                    key=lambda r: int(r.revision),
                )
            ),
            cursor_nonce=at_cursor.pop() if len(at_cursor) == 1 else None,
        )

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
        epoch = max(page.head, above) // REVISIONS_PER_EPOCH + 1
        opening = epoch * REVISIONS_PER_EPOCH
        async with self._db.write() as connection:
            moved = await connection.execute(
                update(FEED_HEAD)
                .where(FEED_HEAD.c.revision < opening)
                .values(
                    revision=opening,
                    compacted_to=opening,
                    fingerprint=page.fingerprint,
                    nonce=nonce(),
                )
            )
            if moved.rowcount and cut_off:
                key = marker_key(MarkerKind.CUTOFF_EVERYTHING)
                revision = await advance(
                    self._db, connection, [(MarkerKind.CUTOFF_EVERYTHING, key)]
                )
                await connection.execute(update(FEED_HEAD).values(cutoff=revision))


def _marker(row: Row[Any]) -> Marker:
    try:
        return Marker(MarkerKind(row.kind), bytes(row.key), row.revision, row.until)
    except ValueError:
        # Only a newer version writes it, and it may kill any token: so it kills them all.
        kind = MarkerKind.CUTOFF_EVERYTHING
        return Marker(kind, marker_key(kind), row.revision, row.until)
