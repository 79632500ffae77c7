"""Users, their passwords and the failures to prove one, in SQL."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from sqlalchemy import ColumnElement, Row, Update, and_, delete, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.acting import by_itself
from authsvc.errors import AuthError, Reason
from authsvc.model import Touched, User, UserState
from authsvc.oauth.usernames import username_key
from authsvc.store.port import Change, Counter, PasswordRecord, UserFilter, change
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record
from authsvc.store.sql_feed import advance, lock_marks
from authsvc.store.tables import (
    CLIENT,
    CREATION,
    CUTOFF,
    FAILURE,
    FEED_HEAD,
    GRANT,
    ROLE_ASSIGNMENT,
    SESSION,
    USER,
)
from authsvc_client.core.markers import MarkerKind, marker_key

REQUEST_S = 600.0
"""How long a creation may be asked for again."""
FAILURE_S = 15 * 60.0
"""After so long without one no failure counts any more."""
WAIT_S_MAX = 60.0


class SqlUsers:
    """Users."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def get(self, user_id: str) -> User | None:
        """See UserStore."""
        async with self._db.read() as connection:
            rows = await connection.execute(select(USER).where(USER.c.user_id == user_id))
            return next(_users(rows), None)

    async def page(self, wanted: UserFilter, after: str, limit: int) -> tuple[User, ...]:
        """See UserStore."""
        query = select(USER).order_by(USER.c.user_id)
        if wanted.username:
            query = query.where(USER.c.username_key == username_key(wanted.username))
        if wanted.email:
            query = query.where(USER.c.email_key == username_key(wanted.email))
        if wanted.state is not None:
            query = query.where(USER.c.state == int(wanted.state))
        page: list[User] = []
        async with self._db.read() as connection:
            while missing := limit - len(page):  # a row that cannot be read does not end the list
                more = query.where(USER.c.user_id > after).limit(missing)
                rows = (await connection.execute(more)).all()
                page += _users(rows)
                if len(rows) < missing:
                    break
                after = rows[-1].user_id
        return tuple(page)

    async def add(
        self, user: User, password_hash: str, request: tuple[bytes, bytes] | None = None
    ) -> User:
        """See UserStore."""
        return await self._db.to_the_end(self._add(user, password_hash, request))

    async def _add(
        self, user: User, password_hash: str, request: tuple[bytes, bytes] | None
    ) -> User:
        try:
            return await self._added(user, password_hash, request)
        except IntegrityError as error:
            if request is None:
                _name_taken(error)
        try:
            return await self._added(user, password_hash, request)  # the same was faster elsewhere
        except IntegrityError as error:
            _name_taken(error)

    async def _added(
        self, user: User, password_hash: str, request: tuple[bytes, bytes] | None
    ) -> User:
        async with self._db.write() as connection:
            if request is not None:
                found = await self._repeated(connection, *request)
                if found is not None:
                    return found
            inserted = await connection.execute(
                insert(USER)
                .values(
                    user_id=user.user_id,
                    **_named(user),
                    state=int(user.state),
                    password_hash=password_hash,
                    password_version=1 if password_hash else 0,
                    password_set_time=self._db.time if password_hash else None,
                    reset_rev=0,
                    version=1,
                    create_time=self._db.time,
                    update_time=self._db.time,
                )
                .returning(USER)
            )
            added = _user(inserted.one())
            if request is not None:
                digest, request_digest = request
                await connection.execute(
                    insert(CREATION).values(
                        digest=digest,
                        request_digest=request_digest,
                        object_id=user.user_id,
                        expire_time=self._db.time + REQUEST_S,
                    )
                )
            await record(self._db, connection, Touched(subject=user.user_id))
            return added

    async def _repeated(
        self, connection: AsyncConnection, digest: bytes, request_digest: bytes
    ) -> User | None:
        """The user of the same request."""
        mine = CREATION.c.digest == digest
        over = CREATION.c.expire_time <= self._db.time
        await connection.execute(delete(CREATION).where(mine, over))
        known = (await connection.execute(select(CREATION).where(mine))).first()
        if known is None:
            return None
        if bytes(known.request_digest) != request_digest:
            raise AuthError(Reason.REQUEST_ID_REUSED)
        rows = await connection.execute(select(USER).where(USER.c.user_id == known.object_id))
        return _user(rows.one())  # who deletes a user deletes this row too

    async def update(
        self, user_id: str, version: int | None, edit: Callable[[User], User]
    ) -> tuple[User, int]:
        """See UserStore."""
        return await self._db.to_the_end(self._update(user_id, version, edit))

    async def _update(
        self, user_id: str, version: int | None, edit: Callable[[User], User]
    ) -> tuple[User, int]:
        try:
            async with self._db.write() as connection:
                known = _user(await _locked(connection, user_id, version))
                changed = await self._change(connection, user_id, **_named(edit(known)))
                return changed, await advance(self._db, connection, _changed(user_id))
        except IntegrityError as error:
            _name_taken(error)

    async def move(self, user_id: str, version: int | None, to: UserState) -> tuple[User, int]:
        """See UserStore."""
        return await self._db.to_the_end(self._move(user_id, version, to))

    async def _move(self, user_id: str, version: int | None, to: UserState) -> tuple[User, int]:
        async with self._db.write() as connection:
            row = await _locked(connection, user_id, version)
            if row.state == to:
                raise _state_conflict(UserState(row.state))
            moved = await self._change(connection, user_id, state=int(to))
            changes = _changed(user_id, cut_off=to is UserState.DISABLED)
            return moved, await advance(self._db, connection, changes)

    async def delete(self, user_id: str, version: int | None) -> int:
        """See UserStore."""
        return await self._db.to_the_end(self._delete(user_id, version))

    async def _delete(self, user_id: str, version: int | None) -> int:
        async with self._db.write() as connection:
            await _locked(connection, user_id, version)
            owners = (ROLE_ASSIGNMENT.c.holder_id, CREATION.c.object_id, USER.c.user_id)
            gone = [
                (await connection.execute(delete(owner.table).where(owner == user_id))).rowcount
                for owner in owners
            ]
            changes = _changed(user_id, cut_off=True)
            if gone[0]:
                changes.append(change(MarkerKind.PERMISSIONS_CHANGED, user_id))
            return await advance(self._db, connection, changes)

    async def password(self, user_id: str) -> PasswordRecord | None:
        """See UserStore."""
        return await self._password(USER.c.user_id == user_id)

    async def password_of(self, username: str) -> PasswordRecord | None:
        """See UserStore."""
        return await self._password(USER.c.username_key == username_key(username))

    async def _password(self, wanted: ColumnElement[bool]) -> PasswordRecord | None:
        async with self._db.read() as connection:
            rows = await connection.execute(select(USER).where(wanted))
            return next(readable(rows, _password, "user"), None)

    async def set_password(
        self,
        user_id: str,
        password_hash: str,
        *,
        version: int | None = None,
        keep_session: str = "",
    ) -> int:
        """See UserStore."""
        written = self._set_password(user_id, password_hash, version, keep_session)
        return await self._db.to_the_end(written)

    async def _set_password(
        self, user_id: str, password_hash: str, version: int | None, keep_session: str
    ) -> int:
        async with self._db.write() as connection:
            row = await _locked(connection, user_id, None)
            _require_active(row)
            if version not in (None, row.password_version):
                raise AuthError(Reason.INVALID_GRANT, cause="another password was set meanwhile")
            await self._write_password(connection, user_id, password_hash)
            changes = _changed(user_id, cut_off=not keep_session)
            if keep_session:
                await lock_marks(self._db, connection)
                changes += await self._end_sessions(connection, user_id, keep_session)
                changes += await self._third_party_grants(connection, user_id, keep_session)
            return await advance(self._db, connection, changes)

    async def _write_password(
        self, connection: AsyncConnection, user_id: str, password_hash: str
    ) -> None:
        await self._change(
            connection,
            user_id,
            password_hash=password_hash,
            password_version=USER.c.password_version + 1,
            password_set_time=self._db.time,
            reset_digest=None,
            reset_rev=0,
            reset_expire_time=None,
        )

    async def _end_sessions(
        self, connection: AsyncConnection, user_id: str, kept: str
    ) -> list[Change]:
        ended = await connection.execute(
            update(SESSION)
            .where(
                SESSION.c.user_id == user_id,
                SESSION.c.session_id != kept,
                SESSION.c.end_time.is_(None),
                SESSION.c.expire_time > self._db.time,
            )
            .values(end_time=self._db.time)
            .returning(SESSION.c.session_id)
        )
        return [change(MarkerKind.SESSION_DEAD, each) for each in sorted(ended.scalars())]

    async def _third_party_grants(
        self, connection: AsyncConnection, user_id: str, kept: str
    ) -> list[Change]:
        """All but those of first parties in the session that is kept."""
        found = await connection.execute(
            select(GRANT.c.grant_id, GRANT.c.session_id, CLIENT.c.details)
            .select_from(GRANT.outerjoin(CLIENT, CLIENT.c.client_id == GRANT.c.client_id))
            .where(
                GRANT.c.subject == user_id,
                GRANT.c.end_time.is_(None),
                GRANT.c.expire_time > self._db.time,
            )
            .order_by(GRANT.c.grant_id)
        )
        return [
            change(MarkerKind.GRANT_DEAD, row.grant_id)
            for row in found
            if row.session_id != kept or not _is_first_party(row.details)
        ]

    async def add_reset_code(
        self, user_id: str, digest: bytes, rev: int, lifetime_s: float
    ) -> float:
        """See UserStore."""
        return await self._db.to_the_end(self._add_reset_code(user_id, digest, rev, lifetime_s))

    async def _add_reset_code(
        self, user_id: str, digest: bytes, rev: int, lifetime_s: float
    ) -> float:
        async with self._db.write() as connection:
            _require_active(await _locked(connection, user_id, None))
            added = await connection.execute(
                update(USER)
                .where(USER.c.user_id == user_id)
                .values(
                    reset_digest=digest,
                    reset_rev=rev,
                    reset_expire_time=self._db.time + lifetime_s,
                )
                .returning(USER.c.reset_expire_time)
            )
            await record(self._db, connection, Touched(subject=user_id))
            return float(added.scalar_one())

    def _is_good(self, digest: bytes) -> ColumnElement[bool]:
        return and_(
            USER.c.reset_digest == digest,
            USER.c.reset_expire_time > self._db.time,
            USER.c.state == int(UserState.ACTIVE),
        )

    async def by_reset_code(self, digest: bytes) -> User | None:
        """See UserStore."""
        async with self._db.read() as connection:
            row = (await connection.execute(select(USER).where(self._is_good(digest)))).first()
        if row is None:
            return None
        async with self._db.read() as connection:  # after the row: none is missed
            return None if await _is_cut_off(connection, row) else _user(row)

    async def reset_password(self, digest: bytes, password_hash: str) -> int | None:
        """See UserStore."""
        return await self._db.to_the_end(self._reset_password(digest, password_hash))

    async def _reset_password(self, digest: bytes, password_hash: str) -> int | None:
        mine = select(USER).where(self._is_good(digest)).with_for_update()
        async with self._db.write() as connection:
            row = (await connection.execute(mine)).first()
            if row is None:
                return None
            # With the head locked no cutoff can come between this look and the revision.
            await connection.execute(select(FEED_HEAD.c.id).with_for_update())
            if await _is_cut_off(connection, row):
                return None
            await self._write_password(connection, row.user_id, password_hash)
            return await advance(self._db, connection, _changed(row.user_id, cut_off=True))

    async def rehash(self, user_id: str, known: str, password_hash: str) -> None:
        """See UserStore."""
        await self._db.to_the_end(self._rehash(user_id, known, password_hash))

    async def _rehash(self, user_id: str, known: str, password_hash: str) -> None:
        async with self._db.write() as connection:
            written = await connection.execute(
                update(USER)
                .where(USER.c.user_id == user_id, USER.c.password_hash == known)
                .values(password_hash=password_hash)
            )
            if written.rowcount:
                with by_itself("RehashPassword"):
                    await record(self._db, connection, Touched(subject=user_id))

    async def _change(self, connection: AsyncConnection, user_id: str, **values: Any) -> User:
        """Writes what everybody may see changed."""
        statement: Update = (
            update(USER)
            .where(USER.c.user_id == user_id)
            .values(version=USER.c.version + 1, update_time=self._db.time, **values)
        )
        return _user((await connection.execute(statement.returning(USER))).one())


class SqlFailures:
    """Failures to prove an identity."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._insert = sqlite_insert if database.dialect == "sqlite" else postgres_insert
        self._columns = (
            FAILURE.c.count.label("failures"),
            FAILURE.c.wait_until,
            FAILURE.c.expire_time,
            database.time.label("time"),
        )

    async def charge(self, counters: Sequence[Counter]) -> float:
        """See FailureStore."""
        return await self._db.to_the_end(self._charge(counters))

    async def _charge(self, counters: Sequence[Counter]) -> float:
        waiting = select(FAILURE.c.wait_until - self._db.time).where(
            FAILURE.c.digest.in_([counter.digest for counter in counters]),
            FAILURE.c.wait_until > self._db.time,
            FAILURE.c.wait_until <= self._db.time + WAIT_S_MAX,  # else the clock went back
        )
        async with self._db.read() as connection:  # who comes too early writes nothing
            waits = (await connection.execute(waiting)).scalars().all()
        if waits:
            return float(max(waits))
        async with self._db.write() as connection:
            charged = []
            for counter in _in_order(counters):
                row = await self._lock(connection, counter)
                if row.time < row.wait_until <= row.time + WAIT_S_MAX:
                    return float(row.wait_until - row.time)
                charged.append((counter, row))
            for counter, row in charged:
                count, expires = _left(row, counter.free)
                await connection.execute(
                    update(FAILURE)
                    .where(FAILURE.c.digest == counter.digest)
                    .values(
                        count=count + 1,
                        wait_until=row.time + wait_s(count + 1, counter.free),
                        expire_time=expires,
                    )
                )
        return 0.0

    async def _lock(self, connection: AsyncConnection, counter: Counter) -> Row[Any]:
        """The row of a counter, made where it is missing: so those at once wait for one another."""
        statement = self._insert(FAILURE).values(
            digest=counter.digest, count=0, wait_until=0.0, expire_time=0.0
        )
        locked = await connection.execute(
            statement.on_conflict_do_update(
                index_elements=[FAILURE.c.digest], set_={"count": FAILURE.c.count}
            ).returning(*self._columns)
        )
        return locked.one()

    async def take_back(
        self, counters: Sequence[Counter], *, forget: Sequence[Counter] = ()
    ) -> None:
        """See FailureStore."""
        await self._db.to_the_end(self._take_back(counters, forget))

    async def _take_back(self, counters: Sequence[Counter], forget: Sequence[Counter]) -> None:
        async with self._db.write() as connection:
            for counter in _in_order([*counters, *forget]):
                mine = FAILURE.c.digest == counter.digest
                if counter in forget:
                    await connection.execute(delete(FAILURE).where(mine))
                    continue
                found = select(*self._columns).where(mine).with_for_update()
                row = (await connection.execute(found)).first()
                if row is None:
                    continue
                count = max(row.failures - 1, 0)
                until = min(row.wait_until, row.time + wait_s(count, counter.free))
                await connection.execute(
                    update(FAILURE).where(mine).values(count=count, wait_until=until)
                )

    async def refused(self, subject: str, reason: Reason) -> None:
        """See FailureStore."""
        await self._db.to_the_end(self._refused(subject, reason))

    async def _refused(self, subject: str, reason: Reason) -> None:
        async with self._db.write() as connection:
            await record(self._db, connection, Touched(subject=subject), reason=reason)


def wait_s(count: int, free: int) -> float:
    """How long to wait after so many failures: nothing, then 1, 2, 4 … 60 s."""
    return min(2.0 ** min(count - free, 10), WAIT_S_MAX) if count >= free else 0.0


def _left(row: Row[Any], free: int) -> tuple[int, float]:
    """How many failures still count, and when they would not: as many as are free are forgotten
    in FAILURE_S, one by one, or a peer that never rests would be held to all it ever did.
    """
    each_s = FAILURE_S / free
    since = min(row.expire_time - FAILURE_S, row.time)
    forgotten = int((row.time - since) / each_s)
    if row.expire_time <= row.time or forgotten >= row.failures:
        return 0, row.time + FAILURE_S
    return row.failures - forgotten, since + forgotten * each_s + FAILURE_S


def _in_order(counters: Iterable[Counter]) -> list[Counter]:
    """Of their keys, in which all lock them."""
    return sorted(counters, key=lambda counter: counter.digest)


def _changed(user_id: str, *, cut_off: bool = False) -> list[Change]:
    kinds = [MarkerKind.USER_CHANGED] + [MarkerKind.CUTOFF_SUBJECT] * cut_off
    return [change(kind, user_id) for kind in kinds]


async def _locked(connection: AsyncConnection, user_id: str, version: int | None) -> Row[Any]:
    """The row as it is now and stays until the transaction ends."""
    mine = select(USER).where(USER.c.user_id == user_id).with_for_update()
    row = (await connection.execute(mine)).first()
    if row is None:
        raise AuthError(Reason.USER_NOT_FOUND)
    if version not in (None, row.version):
        raise AuthError(Reason.ETAG_MISMATCH)
    return row


async def _is_cut_off(connection: AsyncConnection, row: Row[Any]) -> bool:
    """Whether a cutoff is above the user's reset code."""
    everything = marker_key(MarkerKind.CUTOFF_EVERYTHING)
    subject = marker_key(MarkerKind.CUTOFF_SUBJECT, row.user_id)
    above = select(CUTOFF.c.key).where(
        or_(CUTOFF.c.key == everything.hex(), CUTOFF.c.key == subject.hex()),
        CUTOFF.c.revision > row.reset_rev,
    )
    return (await connection.execute(above.limit(1))).first() is not None


def _require_active(row: Row[Any]) -> None:
    if row.state != UserState.ACTIVE:
        raise _state_conflict(UserState(row.state))


def _state_conflict(state: UserState) -> AuthError:
    return AuthError(Reason.USER_STATE_CONFLICT, state.name, metadata={"state": state.name})


def _name_taken(error: IntegrityError) -> NoReturn:
    raise AuthError(
        Reason.ALREADY_EXISTS, "username", metadata={"field": "username"}, cause=repr(error)
    ) from error


def _is_first_party(details: str | None) -> bool:
    """Of a client's row; one that is gone was none."""
    return details is not None and json.loads(details).get("first_party") is True


def _named(user: User) -> dict[str, Any]:
    return {
        "username": user.username,
        "username_key": username_key(user.username),
        "display_name": user.display_name,
        "email": user.email,
        "email_key": username_key(user.email),
    }


def _users(rows: Iterable[Row[Any]]) -> Iterator[User]:
    return readable(rows, _user, "user")


def _user(row: Row[Any]) -> User:
    return User(
        user_id=row.user_id,
        username=row.username,
        create_time=row.create_time,
        update_time=row.update_time,
        display_name=row.display_name,
        email=row.email,
        state=UserState(row.state),
        password_set_time=row.password_set_time,
        version=row.version,
    )


def _password(row: Row[Any]) -> PasswordRecord:
    return PasswordRecord(_user(row), row.password_version, row.password_hash)
