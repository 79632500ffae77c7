"""The verbs of one worker over real storage, put together as app.py does, without its edges."""

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from authsvc.authenticate import Authenticate
from authsvc.feed.append import Append
from authsvc.feed.follow import Follow
from authsvc.identify import Identify
from authsvc.issue import IssueToken
from authsvc.keys.passwords import Passwords
from authsvc.keys.refresh import RefreshKeys
from authsvc.keys.ring import KeyRing
from authsvc.keys.secrets import Sealer
from authsvc.mint import GrantLife, Mint, OpenGrant
from authsvc.model import Resource, TokenFormat
from authsvc.passwords import CheckPassword
from authsvc.permissions import Permissions
from authsvc.refresh import RefreshToken
from authsvc.revoke import RevokeToken
from authsvc.store import sql_store
from authsvc.store.cached import CachedCatalog, CachedClients
from authsvc.store.port import Store
from authsvc.store.sql import Database
from authsvc.validate import ValidateToken
from authsvc_client.core.judge import Judge
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import State
from tests.clocks import HandClock
from tests.harness import ISSUER

API, OPAQUE = "https://api.test", "https://opaque.test"
SCOPES = {API: "read", OPAQUE: "open"}
LIFE = GrantLife(most_s=1000.0, idle_s=100.0)
REFRESH_KEY = b"\x11" * 32
PASSWORDS = Passwords(memory_kib=64, passes=1, threads=1, queue=32, min_chars=8)
"""Of all rigs: as cheap as argon2 can be."""

Step = Callable[[], Awaitable[None]]


class Stepped:
    """What it wraps, with a step taken before and after each of its calls that are awaited."""

    def __init__(self, inner: Any, step: Step, *, after: bool = True) -> None:
        self._inner = inner
        self._step = step
        self._after = after

    async def __call__(self, *given: Any, **named: Any) -> Any:
        await self._step()
        found = await self._inner(*given, **named)
        if self._after:
            await self._step()
        return found

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return Stepped(found, self._step) if iscoroutinefunction(found) else found


async def no_step() -> None:
    """Nothing happens."""


class Rig:
    """One worker: its state, its caches, its verbs."""

    def __init__(
        self,
        database: Database,
        clock: HandClock,
        *,
        refresh_keys: tuple[bytes, ...] = (REFRESH_KEY,),
        step: Step = no_step,
        mint: type[Mint] = Mint,
        open_grant: type[OpenGrant] = OpenGrant,
    ) -> None:
        """`step` is taken around everything that a verb awaits."""
        self.clock = clock
        self.store = store = sql_store(database)
        self.state = state = State(120)
        self.ring = KeyRing(store.keys, Sealer((b"\x22" * 32,)), state)
        self._clients, self._catalog = CachedClients(store.clients), CachedCatalog(store.resources)
        self.permissions = Permissions(store.roles, state, self.reach)
        self.follow = Follow(
            store.feed,
            state,
            clock,
            listeners=(
                self._clients.changed,
                self._catalog.changed,
                self.permissions.changed,
                self._reload,
            ),
        )
        self.refresh_keys = RefreshKeys(refresh_keys)

        def stepped(inner: Any) -> Any:
            return Stepped(inner, step)

        seen = replace(
            store, **{name: stepped(getattr(store, name)) for name in Store.__dataclass_fields__}
        )
        # The caches read through steps, and are themselves awaited.
        self._clients._store, self._catalog._store = seen.clients, seen.resources
        self.permissions._store = seen.roles
        catalog, clients = stepped(self._catalog), stepped(self._clients)
        judge = Judge(ISSUER, state)
        self.identify = Identify(
            ISSUER, judge, seen.tokens, seen.api_keys, clients.get, catalog, clock
        )
        authenticate = stepped(
            Authenticate(
                ISSUER,
                clients,
                seen.clients.secret_used,
                seen.assertions,
                self.identify.api_key,
                state,
                clock,
            )
        )
        permissions = stepped(self.permissions)
        self.mint = mint(ISSUER, self.ring, seen.tokens, permissions, state, clock)
        self.open_grant = open_grant(seen.grants, seen.sessions, self.refresh_keys, LIFE)
        self.check_password = CheckPassword(seen.users, seen.failures, PASSWORDS)
        self.validate = ValidateToken(self.identify, permissions, self.follow, state)
        # Nothing is awaited after it: it looks at the clock last.
        last: Any = Stepped(self.mint, step, after=False)
        self.issue = IssueToken(
            ISSUER,
            authenticate,
            catalog,
            stepped(self.identify.alive),
            last,
            stepped(self.open_grant),
            stepped(self.check_password),
            self.follow.poll,
        )
        self.refresh = RefreshToken(
            ISSUER,
            authenticate,
            seen.grants,
            self.refresh_keys,
            LIFE,
            catalog,
            self.reach,
            last,
        )
        self.append = Append(store.feed)
        self.revoke = RevokeToken(
            self.identify.alive, self.refresh_keys, store.grants, self.append, self.reach
        )

    async def reach(self, _revision: int) -> None:
        """Applies what was changed."""
        await self.follow.poll()

    async def forget_rows(self) -> None:
        """Empties the caches, so that the next call reads all that it needs."""
        kinds = (MarkerKind.CLIENT_CHANGED, MarkerKind.RESOURCE_CHANGED)
        markers = tuple(Marker(kind, b"", 0, 0) for kind in kinds)
        await self._clients.changed(markers)
        await self._catalog.changed(markers)

    async def start(self) -> None:
        """As App.start, with the two resources."""
        await self.ring.ensure()
        now = self.clock.wall()
        known = (await self.store.resources.catalog()).by_id
        for resource_id, scope in SCOPES.items():
            if resource_id not in known:
                form = TokenFormat.OPAQUE if resource_id == OPAQUE else TokenFormat.JWT
                resource = Resource(resource_id, {scope: ""}, now, now, token_format=form)
                await self.store.resources.add(resource)
        await self.follow.poll()

    async def _reload(self, markers: tuple[Marker, ...]) -> None:
        """As App does."""
        self.state.apply(markers, self.state.revision)
        kinds = {marker.kind for marker in markers}
        if MarkerKind.KEYS_CHANGED in kinds or not self.state.keys.by_kid:
            await self.ring.load()


def fresh_database(template: Path, directory: Path, clock: HandClock) -> Database:
    """A copy of a migrated database."""
    file = directory / "authsvc.db"
    shutil.copyfile(template, file)
    return open_database(file, clock)


def open_database(file: Path, clock: HandClock) -> Database:
    """The view of one more worker."""
    return Database(f"sqlite+aiosqlite:///{file}", clock, sqlite_id="ab" * 16)
