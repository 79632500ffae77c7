"""Grants against a small model: whatever is done to them, in whatever order (design section 6)."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from authsvc.authenticate import Credentials
from authsvc.errors import AuthError, Reason
from authsvc.feed.compact import Compact, sweep
from authsvc.keys.secrets import CLIENT_SECRET_PREFIX, digest, new_id, new_secret
from authsvc.mint import TokenAnswer
from authsvc.model import (
    NOBODY,
    AuthMethod,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    Origin,
    TokenFormat,
)
from authsvc.oauth.resources import Target
from authsvc.refresh import RefreshRequest
from authsvc.store import sql_grants
from authsvc.store.port import SWEPT, Change, GrantFilter, Transition, change
from authsvc.store.sql import Database
from authsvc.store.sql_clients import SqlClients
from authsvc_client.core.markers import LEEWAY_S, MARKER_LIFETIME_S, MarkerKind
from tests.clocks import HandClock
from tests.harness import hand_clock, migrate
from tests.rig import API, LIFE, SCOPES, Rig, fresh_database, open_database

KIND = MarkerKind
CLIENTS, SUBJECTS = ("app", "shop"), ("alice", "bob")
SECRET = new_secret(CLIENT_SECRET_PREFIX)
TARGET = Target((API,), frozenset({SCOPES[API]}), 300, TokenFormat.JWT, "")
T = TypeVar("T")


@dataclass(eq=False)
class Model:
    """What a grant should be."""

    client: str
    subject: str
    session: str
    root: str
    parent: "Model | None"
    tokens: list[str]
    """By generation; the last one is live."""
    used: float
    """When, or when it was opened."""
    end: float
    grant_id: str
    killed: bool = False
    over: bool = False
    """Once seen dead, whyever."""
    access: list[tuple[str, int]] = field(default_factory=list)
    """With their ends."""


class GrantMachine(RuleBasedStateMachine):
    """One worker, two clients, two people."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # every step waits for the disk
        self.directory = Path(tempfile.mkdtemp(prefix="authsvc-machine-", dir=memory))
        self.clock: HandClock = hand_clock()
        self.keys: tuple[bytes, ...] = (b"\x01" * 32,)
        self.key_number = 1
        self.suspended: set[str] = set()
        self.dead: dict[Change, float] = {}
        """Marked dead, and when."""
        self.grants: list[Model] = []
        self.database: Database
        self.rig: Rig

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    def teardown(self) -> None:
        self.run(self.database.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.directory)

    @initialize()
    def start(self) -> None:
        self.database = fresh_database(self.template, self.directory, self.clock)
        self._work()
        now = self.clock.wall()
        metadata = ClientMetadata(
            "test",
            frozenset(GrantType),
            frozenset({AuthMethod.CLIENT_SECRET_POST}),
            frozenset(SCOPES.values()),
        )
        for name in CLIENTS:
            client = Client(
                name,
                metadata,
                ClientState.APPROVED,
                now,
                now,
                "test",
                secret_digest=digest(SECRET),
                secret_used=True,
            )
            self.run(self.rig.store.clients.add(client))

    def _work(self) -> None:
        """A worker that knows nothing yet begins."""
        self.rig = Rig(self.database, self.clock, refresh_keys=self.keys)
        self.run(self.rig.start())

    # --- the model ---

    @property
    def now(self) -> float:
        return self.clock.wall()

    def lives(self, grant: Model) -> bool:
        idle = grant.used + LIFE.idle_s <= self.now
        grant.over = grant.over or grant.killed or idle or grant.end <= self.now
        return not grant.over

    def kill(self, dying: list[Model]) -> None:
        """With all that were exchanged from them."""
        while dying:
            for grant in dying:
                grant.killed = True
            dying = [g for g in self.grants if g.parent in dying and not g.killed]

    def known(self, token: str) -> bool:
        return self.rig.refresh_keys.read(token) is not None

    # --- what is done ---

    @rule(
        client=st.sampled_from(CLIENTS),
        subject=st.sampled_from(SUBJECTS),
        data=st.data(),
        how=st.sampled_from(["new", "new", "child", "same root", "same session"]),
    )
    def issue(self, client: str, subject: str, how: str, data: Any) -> None:
        if client in self.suspended:
            return
        parent, session, root = None, new_id(), new_id()
        if how != "new" and self.grants:
            other = data.draw(st.sampled_from(self.grants), label="other")
            subject = other.subject
            if how == "child":
                parent, session, root = other, other.session, other.root
            elif how == "same root":
                root = other.root
            else:
                session = other.session
        parent_id = parent.grant_id if parent else ""
        origins = (
            change(KIND.TOKEN_DEAD, root),
            change(KIND.SESSION_DEAD, session),
            change(KIND.GRANT_DEAD, parent_id),
        )
        marked = [self.dead[one] for one in origins if one in self.dead]
        # No access token is left to exchange once the markers of its origin are gone.
        is_late = any(self.now - since >= MARKER_LIFETIME_S for since in marked)
        if is_late or (parent and not marked and not self.lives(parent)):
            return
        origin = Origin(subject, (), parent_id, session, root, (self.rig.ring.signer.kid,))
        opened = self.run(self._open(client, origin))
        assert (opened is Reason.INVALID_GRANT) == bool(marked)
        if isinstance(opened, Reason):
            return
        token, end = opened
        grant = Model(client, subject, session, root, parent, [token], self.now, end, "")
        presented = self.rig.refresh_keys.read(token)
        assert presented is not None
        stored = self.run(self.rig.store.grants.by_handle(presented.handle))
        assert stored is not None
        grant.grant_id = stored.grant_id
        self.grants.append(grant)

    async def _open(self, client_id: str, origin: Origin) -> tuple[str, float] | Reason:
        moment = self.rig.mint.begin()
        client = await self.rig.store.clients.get(client_id)
        assert client is not None
        kind = GrantType.TOKEN_EXCHANGE
        try:
            return await self.rig.open_grant(moment, client, origin, TARGET, kind, "")
        except AuthError as error:
            return error.reason

    @precondition(lambda self: self.grants)
    @rule(
        data=st.data(),
        ages=st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 3]), min_size=1, max_size=4),
        thief=st.sampled_from([False, False, False, True]),
    )
    def refresh(self, data: st.DataObject, ages: list[int], thief: bool) -> None:
        """Age 0 is the live generation, 1 a lost reply, 2 a reuse."""
        living = [grant for grant in self.grants if self.lives(grant)]
        grant = data.draw(st.sampled_from([*living, *living, *self.grants]), label="grant")
        for age in ages:
            if age < len(grant.tokens):
                self._refresh_once(grant, age, thief=thief)

    def _refresh_once(self, grant: Model, age: int, *, thief: bool) -> None:
        client = CLIENTS[CLIENTS.index(grant.client) - thief]
        token = grant.tokens[-1 - age]
        found = self.run(self._refresh(client, token))
        if not self.known(token):
            assert found is Reason.INVALID_GRANT
        elif client in self.suspended:
            assert found is Reason.CLIENT_SUSPENDED
        elif thief or not self.lives(grant):
            assert found is Reason.INVALID_GRANT
        elif age > 1:
            assert found is Reason.REFRESH_TOKEN_REUSED
            self.kill([grant])
        else:
            assert isinstance(found, TokenAnswer), found
            if age == 1:
                assert found.refresh_token == grant.tokens[-1]
            else:
                assert found.refresh_token not in grant.tokens
                grant.tokens.append(found.refresh_token)
            grant.used = self.now
            assert found.expires <= grant.end
            grant.access.append((found.access_token, found.expires))

    async def _refresh(self, client: str, token: str) -> TokenAnswer | Reason:
        request = RefreshRequest(token, Credentials(client, secret=SECRET))
        try:
            return await self.rig.refresh(request, NOBODY)
        except AuthError as error:
            return error.reason

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), what=st.sampled_from(["token", "root", "grant", "session"]))
    def revoke(self, data: st.DataObject, what: str) -> None:
        grant = data.draw(st.sampled_from(self.grants), label="grant")
        if what == "token":
            token = data.draw(st.sampled_from(grant.tokens), label="token")
            if not self.known(token):
                return
            done = self.run(self.rig.revoke.by_token(token, grant.client, dry=False))
            assert bool(done.revision) is self.lives(grant)
            if not done.revision:
                return
            what = "grant"
        dies = {
            "root": change(KIND.TOKEN_DEAD, grant.root),
            "grant": change(KIND.GRANT_DEAD, grant.grant_id),
            "session": change(KIND.SESSION_DEAD, grant.session),
        }[what]
        self.run(self.rig.append([dies]))
        self.dead[dies] = self.now
        same = {"root": "root", "session": "session", "grant": "grant_id"}[what]
        self.kill([g for g in self.grants if getattr(g, same) == getattr(grant, same)])

    @rule(
        client=st.sampled_from(CLIENTS),
        subject=st.sampled_from(SUBJECTS),
        what=st.sampled_from(["everything", "client", "subject", "subject+client", "key"]),
    )
    def cut_off(self, client: str, subject: str, what: str) -> None:
        if what == "key":
            self.run(self.rig.ring.taint(self.rig.ring.signer.kid, dry=False))
        else:
            cutoffs = {
                "everything": change(KIND.CUTOFF_EVERYTHING),
                "client": change(KIND.CUTOFF_CLIENT, client),
                "subject": change(KIND.CUTOFF_SUBJECT, subject),
                "subject+client": change(KIND.CUTOFF_SUBJECT_CLIENT, subject, client),
            }
            self.run(self.rig.append([cutoffs[what]]))
        for grant in self.grants:
            is_client = grant.client == client or what not in ("client", "subject+client")
            is_subject = grant.subject == subject or what not in ("subject", "subject+client")
            # A key that was tainted is not signed with again, so none is spared.
            grant.killed = grant.killed or (is_client and is_subject)

    @rule(client=st.sampled_from(CLIENTS))
    def suspend_or_resume(self, client: str) -> None:
        states = [ClientState.APPROVED, ClientState.SUSPENDED]
        if client in self.suspended:
            states.reverse()
        start, to = states
        step = Transition(
            client,
            frozenset({start}),
            to,
            "test",
            "",
            keep_expiry=True,
            cut_off=to is ClientState.SUSPENDED,
        )
        self.run(self.rig.store.clients.move(step))
        self.suspended ^= {client}
        if client in self.suspended:
            for grant in self.grants:
                grant.killed = grant.killed or grant.client == client

    @rule(seconds=st.sampled_from([1, 1, 40, 40, 60, 99, 100, MARKER_LIFETIME_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def rotate_the_hmac_key(self) -> None:
        self.key_number += 1
        self.keys = (bytes([self.key_number]) * 32, *self.keys[:1])
        self.restart()

    @rule()
    def restart(self) -> None:
        self.run(self.database.close())
        self.database = open_database(self.directory / "authsvc.db", self.clock)
        self._work()

    @rule()
    def compact(self) -> None:
        self.run(Compact(self.rig.store.sweeps)())
        for table in SWEPT:
            self.run(sweep(self.rig.store.sweeps, table))

    # --- what holds ---

    @invariant()
    def what_lives_lives_and_what_died_is_dead(self) -> None:
        self.run(self.rig.follow.poll())
        found = self.run(self.rig.store.grants.page(GrantFilter(), None, 1000))
        living = [grant for grant in self.grants if self.lives(grant)]
        assert {g.grant_id: g.generation for g in found} == {
            g.grant_id: len(g.tokens) for g in living
        }
        for grant in self.grants:
            for token, end in grant.access:
                if self.now < end + LEEWAY_S:
                    alive = self.run(self.rig.identify.alive(token)) is not None
                    assert alive is not grant.killed


SETTINGS = settings(
    max_examples=40,
    stateful_step_count=30,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> type[GrantMachine]:
    file = tmp_path_factory.mktemp("template") / "migrated.db"
    asyncio.run(migrate(f"sqlite+aiosqlite:///{file}"))
    GrantMachine.template = file
    return GrantMachine


def test_grants_are_as_the_model_says(machine: type[GrantMachine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


def _repeats_after_the_successor(patch: pytest.MonkeyPatch) -> None:
    """A token two generations back is answered as if its reply had been lost."""
    real = sql_grants._is_good
    patch.setattr(
        sql_grants, "_is_good", lambda row, use: row.generation > use.generation or real(row, use)
    )


def _resume_lifts_the_cutoff(patch: pytest.MonkeyPatch) -> None:
    real = SqlClients.move

    async def move(self: SqlClients, step: Transition) -> Any:
        done = await real(self, step)
        if not step.cut_off:
            async with self._db.write() as connection:
                key = change(KIND.CUTOFF_CLIENT, step.client_id).key.hex()
                await connection.exec_driver_sql(f"DELETE FROM cutoff WHERE key = '{key}'")
        return done

    patch.setattr(SqlClients, "move", move)


def _uses_a_token_long_used(state: GrantMachine) -> None:
    for age in (0, 0, 2):
        state._refresh_once(state.grants[0], age, thief=False)


def _suspends_and_resumes(state: GrantMachine) -> None:
    for _ in range(2):
        state.suspend_or_resume("app")
    state.what_lives_lives_and_what_died_is_dead()


@pytest.mark.parametrize(
    ("plant", "steps"),
    [
        (_repeats_after_the_successor, _uses_a_token_long_used),
        (_resume_lifts_the_cutoff, _suspends_and_resumes),
    ],
)
def test_the_model_sees_what_is_planted(
    machine: type[GrantMachine], plant: Any, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself the machine finds either within a minute, which is too long for each run."""
    for is_planted in (False, True):
        state = machine()
        try:
            state.start()
            state.issue("app", "alice", "new", None)
            if not is_planted:
                steps(state)
                continue
            plant(monkeypatch)
            with pytest.raises(AssertionError):
                steps(state)
        finally:
            state.teardown()
