"""Signing keys in SQL. They are few: a change locks and reads all, so changes take turns."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from authsvc.errors import AuthError, Reason
from authsvc.model import KeyState, SigningKey, Touched
from authsvc.store.port import KEYS_CHANGES, Change, Tainted, change
from authsvc.store.sql import Database, readable
from authsvc.store.sql_feed import advance
from authsvc.store.tables import SIGNING_KEY
from authsvc_client.core.markers import MarkerKind

KEPT_S = 400 * 86400.0
"""As long as a grant may live: a taint still ends what was exchanged from tokens of the key."""

_LOCK_POSTGRES = text("LOCK TABLE signing_key IN SHARE ROW EXCLUSIVE MODE")


@dataclass(frozen=True, slots=True)
class _Ring:
    """All keys in a transaction that no other one changes; `now` is the database's clock."""

    connection: AsyncConnection
    keys: tuple[SigningKey, ...]
    now: float

    def find(self, kid: str) -> SigningKey:
        """Raises AuthError SIGNING_KEY_NOT_FOUND."""
        for key in self.keys:
            if key.kid == kid:
                return key
        raise AuthError(Reason.SIGNING_KEY_NOT_FOUND)

    def find_next(self, kid: str) -> SigningKey:
        """As `find`; raises AuthError SIGNING_KEY_STATE_CONFLICT where it is not NEXT."""
        key = self.find(kid)
        if key.state is not KeyState.NEXT:
            raise _conflict(key.state)
        return key

    def in_state(self, state: KeyState) -> SigningKey | None:
        """The one that is NEXT or CURRENT."""
        return next((key for key in self.keys if key.state is state), None)

    def signing(self, key: SigningKey) -> SigningKey:
        """It signs from now on."""
        return replace(key, state=KeyState.CURRENT, activate_time=self.now)

    def retired(self, key: SigningKey) -> SigningKey:
        """It signs no more, so its private part is erased."""
        return replace(key, state=KeyState.RETIRED, retire_time=self.now, sealed_private=b"")

    def tainted(self, key: SigningKey) -> SigningKey:
        """As `retired`, for good."""
        return replace(key, state=KeyState.TAINTED, taint_time=self.now, sealed_private=b"")

    def published(self, key: SigningKey, wait_s: float) -> SigningKey:
        """Known to every validator after the wait."""
        return replace(key, create_time=self.now, ready_time=self.now + wait_s)


class SqlKeys:
    """Signing keys."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def all(self) -> tuple[SigningKey, ...]:
        """See KeyStore."""
        async with self._db.read() as connection:
            rows = (await connection.execute(select(SIGNING_KEY))).all()
        return tuple(readable(rows, _key, "signing_key"))

    async def add_first(self, key: SigningKey) -> None:
        """See KeyStore."""
        await self._db.to_the_end(self._add_first(key))

    async def _add_first(self, key: SigningKey) -> None:
        try:
            async with self._change() as ring:
                if ring.in_state(KeyState.CURRENT) is None:
                    await self._save(ring, ring.signing(ring.published(key, 0.0)))
        except AuthError as error:
            if error.reason is not Reason.SIGNING_KEY_STATE_CONFLICT:
                raise

    async def prepare(self, key: SigningKey, wait_s: float) -> tuple[SigningKey, int]:
        """See KeyStore."""
        return await self._db.to_the_end(self._prepare(key, wait_s))

    async def _prepare(self, key: SigningKey, wait_s: float) -> tuple[SigningKey, int]:
        async with self._change() as ring:
            if ring.in_state(KeyState.NEXT) is not None:
                raise _conflict(KeyState.NEXT)
            made = ring.published(key, wait_s)
            return made, await self._save(ring, made)

    async def activate(self, kid: str) -> tuple[SigningKey, int]:
        """See KeyStore."""
        return await self._db.to_the_end(self._activate(kid))

    async def _activate(self, kid: str) -> tuple[SigningKey, int]:
        async with self._change() as ring:
            key = ring.find_next(kid)
            if ring.now < key.ready_time:
                wait_s = key.ready_time - ring.now
                raise AuthError(Reason.SIGNING_KEY_NOT_READY, retry_after_s=wait_s)
            heir, before = ring.signing(key), ring.in_state(KeyState.CURRENT)
            leaving = [ring.retired(before)] if before is not None else []
            return heir, await self._save(ring, *leaving, heir, about=kid)

    async def retire(self, kid: str) -> tuple[SigningKey, int]:
        """See KeyStore."""
        return await self._db.to_the_end(self._retire(kid))

    async def _retire(self, kid: str) -> tuple[SigningKey, int]:
        async with self._change() as ring:
            retired = ring.retired(ring.find_next(kid))
            return retired, await self._save(ring, retired)

    async def taint(
        self, kid: str, spare: SigningKey, wait_s: float, *, dry: bool = False
    ) -> Tainted:
        """See KeyStore."""
        return await self._db.to_the_end(self._taint(kid, spare, wait_s, dry=dry))

    async def _taint(self, kid: str, spare: SigningKey, wait_s: float, *, dry: bool) -> Tainted:
        async with self._change() as ring:
            key, current = ring.find(kid), ring.in_state(KeyState.CURRENT)
            if key.state is KeyState.TAINTED:
                return Tainted(key, current, 0)
            changed = [ring.tainted(key)]
            if current is key:
                heir = ring.in_state(KeyState.NEXT)
                if heir is None and dry:
                    return Tainted(changed[0], None, 0)
                current = ring.signing(heir or ring.published(spare, wait_s))
                changed.append(current)
            revision = 0
            if not dry:
                tainted = change(MarkerKind.KEY_TAINTED, kid)
                revision = await self._save(ring, *changed, changes=[tainted, *KEYS_CHANGES])
            return Tainted(changed[0], current, revision)

    async def purge(self, retired_s: float) -> None:
        """See KeyStore."""
        await self._db.to_the_end(self._purge(retired_s))

    async def _purge(self, retired_s: float) -> None:
        async with self._change() as ring:
            over = [
                replace(key, public_jwk={})
                for key in ring.keys
                if key.is_over(ring.now - retired_s)
            ]
            ended = func.coalesce(SIGNING_KEY.c.taint_time, SIGNING_KEY.c.retire_time)
            await ring.connection.execute(delete(SIGNING_KEY).where(ended < ring.now - KEPT_S))
            if over:
                await self._save(ring, *over)

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[_Ring]:
        try:
            async with self._db.write() as connection:
                if self._db.dialect == "postgresql":
                    await connection.execute(_LOCK_POSTGRES)
                rows = (await connection.execute(select(SIGNING_KEY))).all()
                now = (await connection.execute(select(self._db.time))).scalar_one()
                keys = tuple(readable(rows, _key, "signing_key"))
                yield _Ring(connection, keys, float(now))
        except IntegrityError as error:  # a key in the way that this version cannot read
            raise AuthError(Reason.SIGNING_KEY_STATE_CONFLICT, cause=repr(error)) from error

    async def _save(
        self,
        ring: _Ring,
        *changed: SigningKey,
        changes: Sequence[Change] = KEYS_CHANGES,
        about: str = "",
    ) -> int:
        """Writes them in this order, at most one being CURRENT at each step; the revision.

        The audit says that it is about the first one, unless it is about another.
        """
        known = {key.kid for key in ring.keys}
        for key in changed:
            write = (
                update(SIGNING_KEY).where(SIGNING_KEY.c.kid == key.kid)
                if key.kid in known
                else insert(SIGNING_KEY)
            )
            await ring.connection.execute(write.values(**_row(key)))
        touched = Touched(object_id=about or changed[0].kid)
        return await advance(self._db, ring.connection, changes, touched)


def _conflict(state: KeyState) -> AuthError:
    return AuthError(Reason.SIGNING_KEY_STATE_CONFLICT, state.name, metadata={"state": state.name})


def _row(key: SigningKey) -> dict[str, Any]:
    return {
        "kid": key.kid,
        "alg": key.alg,
        "state": key.state.value,
        "public_jwk": json.dumps(dict(key.public_jwk)),
        "sealed_private": key.sealed_private,
        "create_time": key.create_time,
        "ready_time": key.ready_time,
        "activate_time": key.activate_time,
        "retire_time": key.retire_time,
        "taint_time": key.taint_time,
    }


def _key(row: Row[Any]) -> SigningKey:
    public_jwk = json.loads(row.public_jwk)
    if not isinstance(public_jwk, dict):
        raise TypeError("public_jwk")
    return SigningKey(
        kid=row.kid,
        alg=row.alg,
        state=KeyState(row.state),
        public_jwk=public_jwk,
        sealed_private=bytes(row.sealed_private),
        create_time=row.create_time,
        ready_time=row.ready_time,
        activate_time=row.activate_time,
        retire_time=row.retire_time,
        taint_time=row.taint_time,
    )
