"""Permissions that change while a token is judged: what is answered is never older than it says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from authsvc.authenticate import Credentials
from authsvc.config import Grants
from authsvc.issue import TokenRequest
from authsvc.keys.secrets import CLIENT_SECRET_PREFIX, digest, new_id, new_secret
from authsvc.model import (
    NOBODY,
    AuthMethod,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    HolderKind,
    Permission,
    PermissionRef,
    Role,
    RoleAssignment,
)
from authsvc.permissions import Permissions
from authsvc.store.port import change
from authsvc_client.core.judge import Question
from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import auth_pb2
from tests.harness import build, hand_clock, migrate, running
from tests.people import API as PEOPLES_API
from tests.people import CHEAP, enter
from tests.rig import API, SCOPES, Rig, fresh_database
from tests.rpc.test_mint_races import Sweep
from tests.servers import Postgres

NAME = "doc.read"
REF = PermissionRef(API, NAME)
ANYBODY = Question(frozenset({"*"}), API, permissions=frozenset({NAME}))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "migrated.db"
    asyncio.run(migrate(f"sqlite+aiosqlite:///{file}"))
    return file


class Cast:
    """A client that holds a role, and a token of its own."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.client_id, self.role_id = new_id(), new_id()
        self.token = self.jti = ""

    @property
    def held(self) -> RoleAssignment:
        return RoleAssignment(self.role_id, HolderKind.CLIENT, self.client_id, "")

    async def enter(self) -> None:
        rig, now = self.rig, self.rig.clock.wall()
        secret = new_secret(CLIENT_SECRET_PREFIX)
        metadata = ClientMetadata(
            "test", frozenset(GrantType), frozenset(AuthMethod), frozenset(SCOPES.values())
        )
        await rig.store.clients.add(
            Client(
                self.client_id,
                metadata,
                ClientState.APPROVED,
                now,
                now,
                "test",
                secret_digest=digest(secret),
            )
        )
        await rig.store.roles.add(Role(self.role_id, frozenset({REF}), now, now))
        await rig.store.roles.assign(self.held)
        await rig.follow.poll()
        mine = Credentials(self.client_id, secret=secret)
        request = TokenRequest(GrantType.CLIENT_CREDENTIALS, mine, resources=(API,))
        issued = await rig.issue(request, NOBODY)
        self.token, self.jti = issued.access_token, issued.jti

    async def allowed(self) -> tuple[bool, int]:
        """Whether the token passes, and the revision by which it was judged."""
        answer = await self.rig.validate(self.token, ANYBODY, full=True)
        reason = answer.verdict.reason
        assert reason in (
            Reason.UNSPECIFIED,
            Reason.INSUFFICIENT_PERMISSIONS,
            Reason.TOKEN_REVOKED,
        )
        if answer.verdict.active:
            assert answer.permissions is not None
            assert NAME in answer.permissions.names
        return answer.verdict.active, answer.verdict.revision


Happens = Callable[[Cast], Awaitable[int]]


async def unassign(cast: Cast) -> int:
    return await cast.rig.store.roles.unassign(cast.held)


async def empty_role(cast: Cast) -> int:
    _, revision = await cast.rig.store.roles.update(cast.role_id, None, permissions=frozenset())
    return revision


async def delete_role(cast: Cast) -> int:
    return await cast.rig.store.roles.delete(cast.role_id, None)


async def revoke(cast: Cast) -> int:
    return await cast.rig.store.feed.append([change(MarkerKind.TOKEN_DEAD, cast.jti)])


@asynccontextmanager
async def rigged(template: Path, directory: Path) -> AsyncIterator[tuple[Rig, Sweep]]:
    clock, sweep = hand_clock(), Sweep()
    database = fresh_database(template, directory, clock)
    try:
        rig = Rig(database, clock, step=sweep)
        await rig.start()
        await rig.store.roles.add_permission(Permission(REF, "", clock.wall()))
        yield rig, sweep
    finally:
        await database.close()


async def overlooked(rig: Rig, sweep: Sweep, happens: Happens, *, warm: bool) -> list[int]:
    """The steps at which an answer says a revision that it does not know."""
    found: list[int] = []
    step = 0
    while True:
        step += 1
        cast = Cast(rig)
        await cast.enter()
        if warm:
            assert (await cast.allowed())[0]
        changed_at = 0

        async def event(cast: Cast = cast) -> None:
            nonlocal changed_at
            changed_at = await happens(cast)
            await rig.follow.poll()

        sweep.at, sweep.count, sweep.event = step, 0, event
        active, revision = await cast.allowed()
        if sweep.event is not None:
            sweep.event = None
            assert active
            assert warm or step > 3
            return found
        if active and revision >= changed_at:
            found.append(step)
        assert not (await cast.allowed())[0]


@pytest.mark.parametrize("happens", [unassign, empty_role, delete_role, revoke])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
async def test_what_changes_at_any_await_of_a_validation_is_seen(
    template: Path, tmp_path: Path, happens: Happens, warm: bool
) -> None:
    async with rigged(template, tmp_path) as (rig, sweep):
        assert await overlooked(rig, sweep, happens, warm=warm) == []


class Careless(Permissions):
    """Keeps what it read, whatever was dropped meanwhile."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        reads: Any = self._reads
        reads.overtake = lambda _key: None


@pytest.mark.parametrize("happens", [unassign, empty_role])
async def test_the_sweep_finds_a_cache_that_keeps_what_it_read_too_early(
    template: Path, tmp_path: Path, happens: Happens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.rig.Permissions", Careless)
    async with rigged(template, tmp_path) as (rig, sweep):
        with pytest.raises(AssertionError):
            assert await overlooked(rig, sweep, happens, warm=False) == []


# --- two replicas ---


async def test_role_changes_race_validations_over_two_replicas(
    tmp_path: Path, postgres: Postgres
) -> None:
    """What a replica answers at a revision is what the roles said at that revision."""
    url = await postgres.database()
    await migrate(url)
    settings: dict[str, Any] = {
        "url": url,
        "grants": Grants(password=True),
        "passwords": CHEAP,
        "seal_keys": "11" * 32,
        "refresh_keys": "22" * 32,
    }
    async with running(tmp_path / "a", **settings) as a, running(tmp_path / "b", **settings) as b:
        at = await enter(a)
        await at.role("reader", NAME)
        ada = await at.user("ada")
        token = (await at.login("ada")).access_token
        await b.app.follow.poll()  # who may validate is judged before
        history: list[tuple[int, bool]] = [(0, False)]
        """Revision -> whether the permission is held from there on."""
        done = asyncio.Event()

        async def administrate() -> None:
            try:
                for _ in range(25):
                    history.append((await at.assign("reader", ada), True))
                    history.append((await at.unassign("reader", ada), False))
            finally:
                done.set()

        seen: list[tuple[int, bool]] = []

        async def validate(server: Any) -> None:
            request = build(
                auth_pb2.ValidateTokenRequest,
                token=token,
                audience=PEOPLES_API,
                view=auth_pb2.TOKEN_VIEW_FULL,
            )
            while not done.is_set():
                answer = await server.auth(at.owner.who).ValidateToken(request)
                assert answer.active, answer
                seen.append((answer.revision, NAME in answer.permissions))

        await asyncio.gather(administrate(), validate(a), validate(b), validate(b))
        last = auth_pb2.Consistency(at_least=history[-1][0])
        at.server = b
        verdict = await at.verdict(token, view=auth_pb2.TOKEN_VIEW_FULL, consistency=last)
        assert list(verdict.permissions) == []
    assert any(held for _, held in seen)
    for revision, held in seen:
        # Newer than it says it may be; older never.
        before = [state for at_revision, state in history if at_revision <= revision]
        after = [state for at_revision, state in history if at_revision > revision]
        assert held == before[-1] or held in after, (revision, held)
