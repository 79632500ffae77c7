"""The audit in SQL: written in the transaction of what it records."""

import os
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Row, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.acting import Act, act
from authsvc.errors import Reason
from authsvc.model import AuditOutcome, Touched
from authsvc.store.port import (
    NOTHING,
    AuditEvent,
    AuditFilter,
    Change,
    Done,
    Told,
    touched_by,
)
from authsvc.store.sql import Database, readable
from authsvc.store.tables import AUDIT, CUTOFF, FEED
from authsvc_client.core.markers import MARKER_LIFETIME_S


async def record(
    database: Database,
    connection: AsyncConnection,
    touched: Touched,
    *,
    revision: int = 0,
    reason: Reason = Reason.UNSPECIFIED,
) -> None:
    """Writes what is under way, which touched this; refused where there is a reason."""
    await record_all(database, connection, [(act(), touched)], revision=revision, reason=reason)


async def record_all(
    database: Database,
    connection: AsyncConnection,
    done: Done,
    *,
    revision: int = 0,
    reason: Reason = Reason.UNSPECIFIED,
) -> None:
    """Writes what several did by one transaction."""
    outcome = AuditOutcome.REFUSED if reason else AuditOutcome.SUCCEEDED
    await connection.execute(
        insert(AUDIT).values(create_time=database.time),
        [
            {
                "audit_event_id": os.urandom(16).hex(),
                "action": one.action,
                "outcome": int(outcome),
                "reason": int(reason),
                "actor": one.actor,
                "on_behalf_of": one.on_behalf_of,
                "peer": one.peer,
                "address": one.address,
                "subject": touched.subject,
                "client_id": touched.client_id,
                "object_id": touched.object_id,
                "fields": ",".join(one.fields),
                "comment": one.comment,
                "revision": revision,
                "request_id": one.request_id,
            }
            for one, touched in done
        ],
    )


class SqlAudit:
    """The audit."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def page(
        self, wanted: AuditFilter, after: tuple[float, str] | None, limit: int
    ) -> tuple[AuditEvent, ...]:
        """See AuditStore."""
        place = (AUDIT.c.create_time, AUDIT.c.audit_event_id)
        query = select(AUDIT).where(
            *(
                AUDIT.c[name] == value
                for name in ("actor", "subject", "client_id", "action", "outcome")
                if (value := getattr(wanted, name))
            )
        )
        if wanted.start_time is not None:
            query = query.where(AUDIT.c.create_time >= wanted.start_time)
        if wanted.end_time is not None:
            query = query.where(AUDIT.c.create_time < wanted.end_time)
        query = query.order_by(*(column.desc() for column in place))
        page: list[AuditEvent] = []
        async with self._db.read() as connection:
            while missing := limit - len(page):  # a row that cannot be read does not end the list
                more = query if after is None else query.where(tuple_(*place) < after)
                rows = (await connection.execute(more.limit(missing))).all()
                page += _events(rows)
                if len(rows) < missing:
                    break
                after = (rows[-1].create_time, rows[-1].audit_event_id)
        return tuple(page)

    async def refused(self, reason: Reason, touched: Touched = NOTHING) -> None:
        """See AuditStore."""
        await self._db.to_the_end(self._refused(reason, touched))

    async def _refused(self, reason: Reason, touched: Touched) -> None:
        async with self._db.write() as connection:
            await record(self._db, connection, touched, reason=reason)

    async def told(self, changes: Collection[Change]) -> tuple[Told, ...]:
        """See AuditStore."""
        by_key = {one.key: one for one in changes}
        marked = select(FEED.c.key, FEED.c.revision, FEED.c.until).where(FEED.c.key.in_(by_key))
        cut = select(CUTOFF).where(CUTOFF.c.key.in_([key.hex() for key in by_key]))
        found: dict[tuple[int, bytes], float | None] = {}
        async with self._db.read() as connection:
            for row in await connection.execute(cut):
                found[row.revision, bytes.fromhex(row.key)] = None
            for row in await connection.execute(marked):
                found[row.revision, bytes(row.key)] = row.until - MARKER_LIFETIME_S
            revisions = {revision for revision, _ in found}
            recorded = select(AUDIT).where(AUDIT.c.revision.in_(revisions))
            events = list(_events((await connection.execute(recorded)).all()))
        told = []
        for (revision, key), made in sorted(found.items()):
            event = _cause([e for e in events if e.revision == revision], by_key[key])
            time = event.create_time if event is not None else made
            told.append(Told(by_key[key], revision, time, event))
        return tuple(told)


def _cause(events: list[AuditEvent], one: Change) -> AuditEvent | None:
    """The event of a change, of those that share its revision; none where it cannot be told."""
    exact, naming = touched_by([one]), set(one.ids)
    for is_it in (
        [e for e in events if e.touched == exact],
        [e for e in events if naming and naming <= set(e.touched)],
        events,
    ):
        if len(is_it) == 1 or (is_it and is_it is not events):
            return is_it[0]
    return None


def _events(rows: Iterable[Row[Any]]) -> Iterable[AuditEvent]:
    return readable(rows, _event, "audit")


def _event(row: Row[Any]) -> AuditEvent:
    return AuditEvent(
        audit_event_id=row.audit_event_id,
        create_time=row.create_time,
        act=Act(
            action=row.action,
            actor=row.actor,
            on_behalf_of=row.on_behalf_of,
            peer=row.peer,
            address=row.address,
            comment=row.comment,
            fields=tuple(filter(None, row.fields.split(","))),
            request_id=row.request_id,
        ),
        outcome=AuditOutcome(row.outcome),
        reason=Reason(row.reason),
        touched=Touched(row.subject, row.client_id, row.object_id),
        revision=row.revision,
    )
