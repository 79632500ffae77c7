"""Clients in SQL."""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    and_,
    case,
    delete,
    func,
    insert,
    not_,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    AuthMethod,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
    Touched,
)
from authsvc.store.port import (
    NO_ADMISSION,
    RESOURCE_CHANGES,
    Admission,
    Transition,
    change,
    client_changes,
    name_taken,
    require_step,
)
from authsvc.store.sql import Database, readable
from authsvc.store.sql_audit import record
from authsvc.store.sql_feed import advance, advance_silently
from authsvc.store.sql_initial_access import take_use
from authsvc.store.tables import (
    API_KEY,
    CLIENT,
    CREATION,
    CUTOFF,
    FEED_HEAD,
    HOLDS_NAME,
    RESOURCE,
    ROLE_ASSIGNMENT,
)
from authsvc_client.core.judge import cutoff_keys
from authsvc_client.core.markers import MarkerKind, marker_key

REQUEST_S = 600.0
"""How long a registration may be asked for again."""
PIECE = 200
_LOCK_REGISTRANT = text("SELECT pg_advisory_xact_lock(1635087465, hashtext(:registrant))")


class SqlClients:
    """Clients."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def get(self, client_id: str) -> Client | None:
        """See ClientStore."""
        async with self._db.read() as connection:
            found = await connection.execute(select(CLIENT).where(CLIENT.c.client_id == client_id))
            return next(_clients(found), None)

    async def by_identity(self, names: Collection[tuple[IdentityKind, str]]) -> tuple[Client, ...]:
        """See ClientStore."""
        if not names:
            return ()
        wanted = or_(
            *(
                and_(CLIENT.c.identity_kind == kind.value, CLIENT.c.identity_value == value)
                for kind, value in sorted(names)
            )
        )
        async with self._db.read() as connection:
            found = await connection.execute(select(CLIENT).where(wanted, HOLDS_NAME))
            return tuple(_clients(found))

    async def page(
        self, state: ClientState | None, after: str, limit: int, pending_s: float = math.inf
    ) -> tuple[Client, ...]:
        """See ClientStore."""
        query, over = select(CLIENT).order_by(CLIENT.c.client_id), self._over(pending_s)
        if state is ClientState.EXPIRED:
            query = query.where(or_(CLIENT.c.state == state, over))
        elif state is not None:
            query = query.where(CLIENT.c.state == state, not_(over))
        page: list[Client] = []
        async with self._db.read() as connection:
            while wanted := limit - len(page):  # a row that cannot be read does not end the list
                more = query.where(CLIENT.c.client_id > after).limit(wanted)
                rows = (await connection.execute(more)).all()
                page += _clients(rows)
                if len(rows) < wanted:
                    break
                after = rows[-1].client_id
        return tuple(page)

    async def add(self, client: Client, admission: Admission = NO_ADMISSION) -> Client:
        """See ClientStore."""
        return await self._db.to_the_end(self._add(client, admission))

    async def _add(self, client: Client, admission: Admission) -> Client:
        try:
            return await self._added(client, admission)
        except IntegrityError as error:
            if admission.request is None:
                raise name_taken(repr(error)) from error
        try:
            return await self._added(client, admission)  # the same request was faster elsewhere
        except IntegrityError as error:
            raise name_taken(repr(error)) from error

    async def _added(self, client: Client, admission: Admission) -> Client:
        async with self._db.write() as connection:
            if admission.request is not None:
                found = await self._repeated(connection, client, *admission.request)
                if found is not None:
                    return found
            if admission.initial_access_token is not None:
                await take_use(self._db, connection, admission.initial_access_token)
            if admission.pending_max is not None and client.state is ClientState.PENDING:
                await self._require_room(connection, client.registrant, admission.pending_max)
            await connection.execute(insert(CLIENT).values(**_row(client)))
            if admission.request is not None:
                digest, request_digest = admission.request
                await connection.execute(
                    insert(CREATION).values(
                        digest=digest,
                        request_digest=request_digest,
                        object_id=client.client_id,
                        expire_time=self._db.time + REQUEST_S,
                    )
                )
            await record(self._db, connection, Touched(client_id=client.client_id))
            return client

    async def _repeated(
        self, connection: AsyncConnection, client: Client, digest: bytes, request_digest: bytes
    ) -> Client | None:
        """The client of the same request; a secret that was not used is this one's now.

        What was cut off since stays so: the new registration token is as old as the first.
        """
        mine = CREATION.c.digest == digest
        over = CREATION.c.expire_time <= self._db.time
        await connection.execute(delete(CREATION).where(mine, over))
        known = (await connection.execute(select(CREATION).where(mine))).first()
        if known is None:
            return None
        if bytes(known.request_digest) != request_digest:
            raise AuthError(Reason.REQUEST_ID_REUSED)
        unused = CLIENT.c.secret_used.is_(False)
        updated = await connection.execute(
            update(CLIENT)
            .where(CLIENT.c.client_id == known.object_id)
            .values(
                registration_digest=client.registration_digest,
                secret_digest=case((unused, client.secret_digest), else_=CLIENT.c.secret_digest),
                version=CLIENT.c.version + 1,
            )
            .returning(CLIENT)
        )
        found = next(_clients(updated), None)
        if found is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND, "it was deleted since")
        changes = [change(MarkerKind.CLIENT_CHANGED, found.client_id)]
        await advance(self._db, connection, changes)
        return found

    async def replace(
        self, client: Client, *, cut_off: bool, keep_registration: bool = False
    ) -> tuple[Client, int]:
        """See ClientStore."""
        written = self._replace(client, cut_off=cut_off, keep_registration=keep_registration)
        return await self._db.to_the_end(written)

    async def _replace(
        self, client: Client, *, cut_off: bool, keep_registration: bool
    ) -> tuple[Client, int]:
        fixed = {"client_id", "create_time", "registrant", "update_time"}
        if not client.secret_used:  # it may have been meanwhile
            fixed.add("secret_used")
        row = {name: value for name, value in _row(client).items() if name not in fixed}
        mine = CLIENT.c.client_id == client.client_id
        try:
            async with self._db.write() as connection:
                was = await self._lock(connection, client.client_id, client.version)
                if keep_registration:
                    # With the head locked no cutoff can come between this look and the revision.
                    await connection.execute(select(FEED_HEAD.c.id).with_for_update())
                    if await _is_cut_off(connection, client):
                        raise AuthError(Reason.REGISTRATION_TOKEN_INVALID)
                ends = was is ClientState.APPROVED is not client.state
                changes = client_changes(client.client_id, cut_off=cut_off or ends)
                revision = await advance(self._db, connection, changes)
                if keep_registration:
                    row["registration_rev"] = revision
                row |= {"version": client.version + 1, "update_time": self._db.time}
                updated = await connection.execute(
                    update(CLIENT).where(mine).values(**row).returning(CLIENT)
                )
                return _client(updated.one()), revision
        except IntegrityError as error:
            raise name_taken(repr(error)) from error

    async def _lock(
        self, connection: AsyncConnection, client_id: str, version: int | None
    ) -> ClientState:
        """Of the row, as it was read: AuthError CLIENT_NOT_FOUND or ETAG_MISMATCH."""
        query = select(CLIENT.c.version, CLIENT.c.state).where(CLIENT.c.client_id == client_id)
        found = (await connection.execute(query.with_for_update())).first()
        if found is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        if version is not None and found.version != version:
            raise AuthError(Reason.ETAG_MISMATCH)
        return ClientState(found.state)

    async def delete(self, client_id: str, version: int | None) -> int:
        """See ClientStore."""
        return await self._db.to_the_end(self._delete(client_id, version))

    async def _delete(self, client_id: str, version: int | None) -> int:
        kinds = (
            MarkerKind.CLIENT_CHANGED,
            MarkerKind.CUTOFF_CLIENT,
            MarkerKind.CUTOFF_SUBJECT,
        )
        async with self._db.write() as connection:
            await self._lock(connection, client_id, version)
            for owner in (API_KEY.c.client_id, CREATION.c.object_id):
                await connection.execute(delete(owner.table).where(owner == client_id))
            orphaned = await connection.execute(
                update(RESOURCE)
                .where(RESOURCE.c.owner_client_id == client_id)
                .values(owner_client_id=None, version=RESOURCE.c.version + 1)
                .returning(RESOURCE.c.resource_id)
            )
            changes = [change(kind, client_id) for kind in kinds]
            if orphaned.first() is not None:
                changes += RESOURCE_CHANGES
            mine = ROLE_ASSIGNMENT.c.holder_id == client_id
            if (await connection.execute(delete(ROLE_ASSIGNMENT).where(mine))).rowcount:
                changes.append(change(MarkerKind.PERMISSIONS_CHANGED, client_id))
            await connection.execute(delete(CLIENT).where(CLIENT.c.client_id == client_id))
            return await advance(self._db, connection, changes)

    def _over(self, pending_s: float) -> ColumnElement[bool]:
        """Whether a client is EXPIRED by time alone: oauth.registration.as_of, in SQL."""
        return or_(
            and_(
                CLIENT.c.state == ClientState.PENDING,
                CLIENT.c.update_time <= self._db.time - pending_s,
            ),
            and_(
                CLIENT.c.state == ClientState.APPROVED,
                CLIENT.c.approval_expire_time.is_not(None),
                CLIENT.c.approval_expire_time <= self._db.time,
            ),
        )

    async def expire(self, pending_s: float) -> int:
        """See ClientStore."""
        waited, ended = CLIENT.c.update_time, CLIENT.c.approval_expire_time
        waiting = await self._late(ClientState.PENDING, waited, pending_s)
        approved = await self._late(ClientState.APPROVED, ended, 0)
        over = self._over(pending_s)
        for client_id in waiting:
            await self._db.to_the_end(self._expire(client_id, ClientState.PENDING, over))
        for client_id in approved:
            await self._db.to_the_end(self._expire(client_id, ClientState.APPROVED, over))
        return len(waiting) + len(approved)

    async def _late(
        self, state: ClientState, time: ColumnElement[Any], seconds: float
    ) -> Sequence[str]:
        """Those that are over the longest: their order makes it go by an index."""
        late = select(self._db.time - seconds).scalar_subquery()
        query = (
            select(CLIENT.c.client_id)
            .where(CLIENT.c.state == state, time <= late)
            .order_by(time)
            .limit(PIECE)
        )
        async with self._db.read() as connection:
            return (await connection.execute(query)).scalars().all()

    async def _expire(self, client_id: str, state: ClientState, over: ColumnElement[bool]) -> None:
        async with self._db.write() as connection:
            moved = await connection.execute(
                update(CLIENT)
                .where(CLIENT.c.client_id == client_id, CLIENT.c.state == state, over)
                .values(
                    state=int(ClientState.EXPIRED),
                    version=CLIENT.c.version + 1,
                    update_time=self._db.time,
                )
                .returning(CLIENT.c.client_id)
            )
            if moved.first() is not None:  # else another worker was first, or it was approved
                changes = client_changes(client_id, cut_off=state is ClientState.APPROVED)
                await advance(self._db, connection, changes)

    async def by_registration_token(self, digest: bytes) -> Client | None:
        """See ClientStore."""
        async with self._db.read() as connection:
            found = await connection.execute(
                select(CLIENT).where(CLIENT.c.registration_digest == digest)
            )
            client = next(_clients(found), None)
        if client is None:
            return None
        async with self._db.read() as connection:  # after the row: none is missed
            return None if await _is_cut_off(connection, client) else client

    async def secret_used(self, client_id: str) -> None:
        """See ClientStore."""
        await self._db.to_the_end(self._secret_used(client_id))

    async def _secret_used(self, client_id: str) -> None:
        async with self._db.write() as connection:
            first = await connection.execute(
                update(CLIENT)
                .where(CLIENT.c.client_id == client_id, CLIENT.c.secret_used.is_(False))
                .values(secret_used=True)
                .returning(CLIENT.c.client_id)
            )
            if first.first() is not None:
                changes = [change(MarkerKind.CLIENT_CHANGED, client_id)]
                await advance_silently(self._db, connection, changes)

    async def _require_room(self, connection: AsyncConnection, registrant: str, most: int) -> None:
        if self._db.dialect == "postgresql":  # else those at once would not see each other
            await connection.execute(_LOCK_REGISTRANT, {"registrant": registrant})
        waiting = await connection.execute(
            select(func.count())
            .select_from(CLIENT)
            .where(CLIENT.c.state == ClientState.PENDING, CLIENT.c.registrant == registrant)
        )
        if waiting.scalar_one() >= most:
            raise AuthError(
                Reason.RATE_LIMITED,
                "too many registrations wait for review",
                metadata={"limit": str(most)},
            )

    async def move(self, step: Transition) -> tuple[Client, int]:
        """See ClientStore."""
        return await self._db.to_the_end(self._move(step))

    async def _move(self, step: Transition) -> tuple[Client, int]:
        mine = CLIENT.c.client_id == step.client_id
        try:
            async with self._db.write() as connection:
                return await self._moved(connection, step, mine)
        except IntegrityError as error:  # an expired client's certificate name was given away
            raise name_taken(repr(error)) from error

    async def _moved(
        self, connection: AsyncConnection, step: Transition, mine: ColumnElement[bool]
    ) -> tuple[Client, int]:
        over = self._over(step.pending_s).label("is_over")
        found = await connection.execute(select(CLIENT, over).where(mine).with_for_update())
        rows = found.all()
        client = next(_clients(rows), None)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        is_over: bool = rows[0].is_over
        require_step(step, ClientState.EXPIRED if is_over else client.state, client.version)
        ends = is_over and client.state is ClientState.APPROVED
        changes = client_changes(step.client_id, cut_off=step.cut_off or ends)
        revision = await advance(self._db, connection, changes)
        changed: dict[str, Any] = {}
        if step.to is ClientState.APPROVED and not step.keep_expiry:
            changed["approval_expire_time"] = step.approval_expire_time
        moved = await connection.execute(
            update(CLIENT)
            .where(mine)
            .values(
                state=int(step.to),
                version=CLIENT.c.version + 1,
                reviewer=step.reviewer,
                review_comment=step.comment,
                review_time=self._db.time,
                update_time=self._db.time,
                **changed,
            )
            .returning(CLIENT)
        )
        return _client(moved.one()), revision


async def _is_cut_off(connection: AsyncConnection, client: Client) -> bool:
    """Whether a cutoff is above its registration access token."""
    everything = marker_key(MarkerKind.CUTOFF_EVERYTHING)
    keys = (everything, *cutoff_keys(client.client_id, client.client_id))
    above = select(CUTOFF.c.key).where(
        CUTOFF.c.key.in_([key.hex() for key in keys]),
        CUTOFF.c.revision > client.registration_rev,
    )
    return (await connection.execute(above.limit(1))).first() is not None


def _row(client: Client) -> dict[str, Any]:
    identity = client.metadata.identity
    return {
        "client_id": client.client_id,
        "state": int(client.state),
        "details": json.dumps(_details(client.metadata)),
        "identity_kind": identity.kind.value if identity else None,
        "identity_value": identity.value if identity else None,
        "identity_ca": identity.ca if identity else None,
        "secret_digest": client.secret_digest,
        "secret_used": client.secret_used,
        "previous_secret_digest": client.previous_secret_digest,
        "previous_secret_until": client.previous_secret_until,
        "registration_digest": client.registration_digest,
        "registration_rev": client.registration_rev,
        "version": client.version,
        "registrant": client.registrant,
        "reviewer": client.reviewer,
        "review_comment": client.review_comment,
        "review_time": client.review_time,
        "approval_expire_time": client.approval_expire_time,
        "create_time": client.create_time,
        "update_time": client.update_time,
    }


def _details(metadata: ClientMetadata) -> dict[str, Any]:
    return {
        "client_name": metadata.client_name,
        "grant_types": sorted(metadata.grant_types),
        "auth_methods": sorted(metadata.auth_methods),
        "scopes": sorted(metadata.scopes),
        "bound_access_tokens": metadata.bound_access_tokens,
        "validates": sorted(metadata.validates),
        "texts": dict(metadata.texts),
        "contacts": list(metadata.contacts),
        "jwks": metadata.jwks,
        "may_act": metadata.may_act,
        "first_party": metadata.first_party,
    }


def _clients(rows: Iterable[Row[Any]]) -> Iterator[Client]:
    return readable(rows, _client, "client")


def _client(row: Row[Any]) -> Client:
    details: Mapping[str, Any] = json.loads(row.details)
    identity = None
    if row.identity_value is not None:
        identity = CertificateIdentity(
            IdentityKind(row.identity_kind), row.identity_value, row.identity_ca
        )
    return Client(
        client_id=row.client_id,
        metadata=ClientMetadata(
            client_name=details["client_name"],
            grant_types=frozenset(map(GrantType, details["grant_types"])),
            auth_methods=frozenset(map(AuthMethod, details["auth_methods"])),
            scopes=frozenset(details["scopes"]),
            identity=identity,
            bound_access_tokens=bool(details["bound_access_tokens"]),
            validates=frozenset(details["validates"]),
            texts=details["texts"],
            contacts=tuple(details["contacts"]),
            jwks=details.get("jwks", ""),
            may_act=details.get("may_act", ""),
            first_party=details.get("first_party", False),
        ),
        state=ClientState(row.state),
        create_time=row.create_time,
        update_time=row.update_time,
        registrant=row.registrant,
        version=row.version,
        reviewer=row.reviewer,
        review_comment=row.review_comment,
        review_time=row.review_time,
        approval_expire_time=row.approval_expire_time,
        secret_digest=_blob(row.secret_digest),
        secret_used=row.secret_used,
        previous_secret_digest=_blob(row.previous_secret_digest),
        previous_secret_until=row.previous_secret_until,
        registration_digest=_blob(row.registration_digest),
        registration_rev=row.registration_rev,
    )


def _blob(value: Any) -> bytes | None:
    return bytes(value) if value is not None else None
