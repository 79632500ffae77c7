"""A PostgreSQL primary that fails, its standby, a split brain, and a backup that was restored."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from pydantic import SecretStr

from authsvc import app as app_module
from authsvc.app import StartError
from authsvc.config import Database
from authsvc.errors import AuthError, Reason
from authsvc.feed.follow import Follow
from authsvc.store.port import FeedPage
from authsvc.store.sql_feed import SqlFeed
from authsvc_client.core.state import REVISIONS_PER_EPOCH
from authsvc_client.v1 import auth_pb2
from tests.harness import (
    Member,
    Running,
    failure,
    migrate,
    outcome,
    running,
    settings_for,
    until,
)
from tests.rpc.test_watch import Watcher
from tests.servers import SUPERUSER, Postgres
from tests.store.conftest import sql

STALENESS_S = 5.0
RESOURCE = "https://orders.test"
SECRETS: Final[dict[str, Any]] = {"seal_keys": "ab" * 32, "refresh_keys": "cd" * 32}


class Pair:
    """A primary and its hot standby."""

    def __init__(self, primary: Postgres, standby: Postgres, name: str) -> None:
        self.primary = primary
        self.standby = standby
        self.name = name

    @property
    def url(self) -> str:
        """Of whichever is the primary, as a deployment has it."""
        hosts = [f"host={each.folder}:5432" for each in (self.primary, self.standby)]
        query = "&".join([*hosts, f"user={SUPERUSER}", "target_session_attrs=primary"])
        return f"postgresql+asyncpg:///{self.name}?{query}"

    async def synchronise(self) -> None:
        """From here on no commit of the primary is answered before the standby has it."""
        await self.primary.admin("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await self.primary.admin("SELECT pg_reload_conf()")
        await _until(self.primary, "SELECT sync_state = 'sync' FROM pg_stat_replication")

    async def cut(self) -> None:
        """The standby receives nothing any more, after all that was committed before."""
        await self.caught_up()
        await self.standby.admin("ALTER SYSTEM SET primary_conninfo = ''")
        await self.standby.admin("SELECT pg_reload_conf()")
        await _until(self.standby, "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)")

    async def caught_up(self) -> None:
        at = await self.primary.admin("SELECT pg_current_wal_lsn()::text")
        await _until(self.standby, f"SELECT pg_last_wal_replay_lsn() >= '{at}'")

    async def fail_over(self) -> None:
        self.primary.kill()
        await self.standby.promote()


async def _until(server: Postgres, condition: str) -> None:
    async with asyncio.timeout(30):
        while not await server.admin(condition):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    with Postgres() as primary:
        url = await primary.database()
        await migrate(url)
        with primary.standby() as standby:
            yield Pair(primary, standby, url.partition(":///")[2].partition("?")[0])


@asynccontextmanager
async def _worker(folder: Path, url: str, *, synchronous: bool = False) -> AsyncIterator[Running]:
    database = Database(url=SecretStr(url), synchronous=synchronous)
    async with running(
        folder, url=url, database=database, staleness_max_s=STALENESS_S, drain_s=0.0, **SECRETS
    ) as server:
        yield server


@dataclass
class Scene:
    """Two workers, and one client that both know."""

    one: Running
    two: Running
    client: Member
    owner: Member
    watching: Member

    async def token(self) -> str:
        return (await self.one.token(self.client)).access_token

    async def revoke(self, token: str, at: Running | None = None) -> int:
        request = auth_pb2.RevokeTokenRequest(token=token)
        stub = (at or self.one).auth(self.client.who)
        return (await stub.RevokeToken(request)).revision

    async def judged(self, token: str, at: Running, **more: Any) -> str:
        """The reason of the verdict or of the refusal; OK where the token is active."""
        try:
            verdict = await at.verdict(self.owner.who, token, of=self.client.who, **more)
        except grpc.aio.AioRpcError as error:
            return (await failure(_raising(error))).reason
        return "OK" if verdict.active else Reason(verdict.reason).name


async def _raising(error: Exception) -> None:
    raise error


@asynccontextmanager
async def _scene(folder: Path, url: str, **more: Any) -> AsyncIterator[Scene]:
    async with (
        _worker(folder / "one", url, **more) as one,
        _worker(folder / "two", url, **more) as two,
    ):
        owner = await one.member("owner", "validate")
        await one.resource(RESOURCE, "orders.read", owner=owner.client_id)
        client = await one.member("client", "orders.read")
        watching = await one.member("watching", "watch")
        await two.app.follow.reach(one.app.state.revision)
        yield Scene(one, two, client, owner, watching)


async def _new_epoch(*workers: Running) -> None:
    def is_there() -> bool:
        return all(
            worker.app.state.revision >= 2 * REVISIONS_PER_EPOCH
            and worker.app.is_ready()
            and worker.app.state.age(worker.clock.boot()) < 2
            for worker in workers
        )

    await until(is_there, 60)


# Failover


async def _lose_commits(pair: Pair, folder: Path, *, synchronous: bool = False) -> None:
    """A revocation that was answered with OK, and is on no database any more."""
    async with _scene(folder, pair.url, synchronous=synchronous) as scene:
        revoked, lost, alive = [await scene.token() for _ in range(3)]
        await scene.revoke(revoked)
        await pair.cut()
        revision = await scene.revoke(lost)
        late = await scene.token()
        await scene.two.app.follow.reach(revision)
        stop = asyncio.Event()

        async def never_active() -> int:
            asked = 0
            while not stop.is_set():
                for token in (revoked, lost):
                    for worker in (scene.one, scene.two):
                        assert await scene.judged(token, worker) != "OK"
                        asked += 1
            return asked

        asking = asyncio.create_task(never_active())
        try:
            await pair.fail_over()
            await _new_epoch(scene.one, scene.two)
        finally:
            stop.set()
        assert await asking > 0
        # Of two workers that saw it at once one opened the epoch.
        raised = await sql(
            pair.standby.url(pair.name), "SELECT revision FROM audit WHERE action = 'RaiseEpoch'"
        )
        assert [revision // REVISIONS_PER_EPOCH for (revision,) in raised] == [2]
        async with _worker(folder / "later", pair.url, synchronous=synchronous) as later:
            # It was not there when the lost token was revoked.
            for worker in (scene.one, scene.two, later):
                for token in (revoked, lost, alive, late):
                    told = await scene.judged(token, worker)
                    assert told in ("TOKEN_REVOKED", "TOKEN_CUT_OFF"), told
            new = await scene.token()
            for worker in (scene.one, scene.two, later):
                await worker.app.follow.poll()
                assert await scene.judged(new, worker) == "OK"
            await later.app.follow.reach(await scene.revoke(new, scene.two))
            assert await scene.judged(new, later) == "TOKEN_REVOKED"


@pytest.mark.parametrize("vouched", [False, True])
async def test_standby_promoted_with_lost_commits_revives_nothing(
    pair: Pair, tmp_path: Path, vouched: bool
) -> None:
    """Neither where the settings vouch for a loss that there was."""
    await _lose_commits(pair, tmp_path, synchronous=vouched)


async def test_an_epoch_without_a_cutoff_would_be_noticed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SqlFeed._raise_epoch

    async def bare(self: SqlFeed, page: FeedPage, above: int, *, cut_off: bool) -> None:
        await original(self, page, above, cut_off=False)

    monkeypatch.setattr(SqlFeed, "_raise_epoch", bare)
    with pytest.raises(AssertionError):
        await _lose_commits(pair, tmp_path)


async def test_synchronous_standby_that_is_vouched_for_keeps_tokens_alive(
    pair: Pair, tmp_path: Path
) -> None:
    await pair.synchronise()
    async with _scene(tmp_path, pair.url, synchronous=True) as scene:
        revoked, alive = await scene.token(), await scene.token()
        await scene.revoke(revoked)
        await pair.fail_over()
        await _new_epoch(scene.one, scene.two)
        async with _worker(tmp_path / "later", pair.url, synchronous=True) as later:
            for worker in (scene.one, scene.two, later):
                assert await scene.judged(revoked, worker) == "TOKEN_REVOKED"
                assert await scene.judged(alive, worker) == "OK"
        raised = await sql(
            pair.standby.url(pair.name), "SELECT revision FROM audit WHERE action = 'RaiseEpoch'"
        )
        assert [revision // REVISIONS_PER_EPOCH for (revision,) in raised] == [2]


# Split brain


STRONG = auth_pb2.Consistency(strong=auth_pb2.StrongConsistency())


async def _split_brain(pair: Pair, folder: Path) -> None:
    """The old primary runs on, and two workers know of no other."""
    await pair.synchronise()
    old = pair.primary.url(pair.name)
    async with _scene(folder, old, synchronous=True) as scene:
        try:
            token = await scene.token()
            await pair.standby.promote()
            cut_off = time.monotonic()
            url = pair.standby.url(pair.name)
            async with _worker(folder / "right", url, synchronous=True) as right:
                await scene.revoke(token, right)
                assert await scene.judged(token, right) == "TOKEN_REVOKED"
            told = set()
            # Commits that wait in vain are given up after 5 s, and seen then: the beats too.
            while (passed := time.monotonic() - cut_off) < STALENESS_S + 9:
                bounded = [await scene.judged(token, each) for each in (scene.one, scene.two)]
                if passed > STALENESS_S + 1:
                    assert set(bounded) == {"STATE_STALE"}
                    told.add(await scene.judged(token, scene.one, consistency=STRONG))
                await asyncio.sleep(0.1)
            assert told <= {"STATE_STALE", "STORE_UNAVAILABLE"}
            assert told
        finally:
            pair.primary.kill()  # else each worker waits for it at its end


async def test_old_primary_without_its_standby_confirms_nothing(pair: Pair, tmp_path: Path) -> None:
    await _split_brain(pair, tmp_path)


async def test_confirming_without_a_beat_would_be_noticed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confirm(self: Follow, started: float, page: FeedPage) -> None:
        self._state.confirm(started, page.time)

    monkeypatch.setattr(Follow, "_confirm", confirm)
    with pytest.raises(AssertionError):
        await _split_brain(pair, tmp_path)


async def test_worker_that_is_led_to_a_standby_applies_and_does_not_confirm(
    pair: Pair, tmp_path: Path
) -> None:
    """By a name that points to the wrong server, until somebody mends it."""
    with pytest.raises(AuthError) as caught:
        async with _worker(tmp_path / "new", pair.standby.url(pair.name)):
            pass
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    name = tmp_path / "db"
    name.symlink_to(pair.primary.folder)
    by_name = f"postgresql+asyncpg:///{pair.name}?host={name}&user={SUPERUSER}"
    async with (
        _scene(tmp_path, pair.url) as scene,
        _worker(tmp_path / "three", by_name) as three,
    ):
        token, alive = await scene.token(), await scene.token()
        assert await scene.judged(alive, three) == "OK"
        name.unlink()
        name.symlink_to(pair.standby.folder)
        await pair.primary.admin(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'authsvc'"
        )
        revision = await eventually(lambda: scene.revoke(token))
        await until(lambda: three.app.state.revision >= revision)
        await until(lambda: not three.app.is_ready())
        assert await scene.judged(alive, three) == "STATE_STALE"
        name.unlink()
        name.symlink_to(pair.primary.folder)
        await pair.standby.admin(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'authsvc'"
        )
        await until(three.app.is_ready)
        assert await scene.judged(alive, three) == "OK"
        assert await scene.judged(token, three) == "TOKEN_REVOKED"
        assert three.app.state.revision < 2 * REVISIONS_PER_EPOCH


async def eventually(call: Callable[[], Awaitable[int]]) -> int:
    """Its connections were ended under it."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
                await asyncio.sleep(0.05)


# Watchers


async def _resumed(scene: Scene, at: Running, resume: int) -> Watcher | str:
    """A watcher that has read its first event, or the code that it is refused with."""
    watcher = Watcher(at, scene.watching.who, resume=resume)
    refused = await outcome(watcher.read())
    return watcher if refused == "OK" else refused


async def test_watchers_resume_on_the_other_replica_and_over_an_epoch(
    tmp_path: Path, migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _scene(tmp_path, migrated_url) as scene:
        one, two = scene.one, scene.two
        dead, alive = await scene.token(), await scene.token()
        watcher = Watcher(one, scene.watching.who)
        # The other replica reads nothing for a while, and what the first one says is news to it.
        async with two.app.follow._lock:
            revision = await scene.revoke(dead)
            await watcher.until_at(revision)
            watcher.call.cancel()
            refused = await _resumed(scene, two, revision)
            assert refused == "STATE_STALE"
        await two.app.follow.poll()
        again = await _resumed(scene, two, revision)
        assert isinstance(again, Watcher)
        again.state, again.judge = watcher.state, watcher.judge
        assert again.judged(dead, scene.client.who) == "TOKEN_REVOKED"

        await sql(migrated_url, "UPDATE feed_head SET fingerprint = 'another database'")
        await _new_epoch(one, two)
        ended = await outcome(_drained(again))
        assert ended == "REVISION_COMPACTED"
        for worker in (one, two):
            assert await _resumed(scene, worker, revision) == "REVISION_COMPACTED"
            anew = Watcher(worker, scene.watching.who)
            # The database forgets the marker; who knows it does not.
            anew.state, anew.judge = watcher.state, watcher.judge
            await sql(migrated_url, f"DELETE FROM feed WHERE revision = {revision}")
            await anew.read()
            await anew.until_at(2 * REVISIONS_PER_EPOCH)
            assert anew.events[0].WhichOneof("event") == "snapshot"
            assert anew.judged(dead, scene.client.who) == "TOKEN_REVOKED"
            assert anew.judged(alive, scene.client.who) == "TOKEN_CUT_OFF"
            new = await scene.token()
            assert anew.judged(new, scene.client.who) == "OK"
            anew.call.cancel()


async def _drained(watcher: Watcher) -> None:
    while True:
        await watcher.read()


# Backups


async def _restore(
    primary: Postgres, folder: Path, fence: Callable[[str, Path], Awaitable[None]]
) -> None:
    """Twice: the second time the backup knows nothing of the first fence either."""
    url = await primary.database()
    await migrate(url)
    name = url.partition(":///")[2].partition("?")[0]
    async with _scene(folder, url) as before:
        killed = [await before.token()]
    await primary.admin(f"CREATE DATABASE {name}_backup TEMPLATE {name}")
    async with _worker(folder / "one", url) as server:
        await replace(before, one=server).revoke(killed[0])
    for _ in range(2):
        await primary.admin(f"DROP DATABASE {name}")
        await primary.admin(f"CREATE DATABASE {name} TEMPLATE {name}_backup")
        await fence(url, folder / "one")
        async with _worker(folder / "one", url) as server:
            scene = replace(before, one=server)
            for token in killed:
                assert await scene.judged(token, server) != "OK"
            new = await scene.token()
            assert await scene.judged(new, server) == "OK"
            killed.append(new)
            await scene.revoke(new)  # which the next restore forgets


async def _fenced(url: str, folder: Path) -> None:
    settings = settings_for(folder, database=Database(url=SecretStr(url)), **SECRETS)
    dry = await app_module.fence(settings, comment="", dry=True)
    assert dry.revision == 0
    done = await app_module.fence(settings, comment="restored", dry=False)
    assert done.head == dry.head < 2 * REVISIONS_PER_EPOCH < done.revision
    assert done.impact == dry.impact


async def test_restored_backup_is_fenced_and_revives_nothing(
    postgres: Postgres, tmp_path: Path
) -> None:
    await _restore(postgres, tmp_path, _fenced)


async def test_restored_backup_without_a_fence_would_be_noticed(
    postgres: Postgres, tmp_path: Path
) -> None:
    async def nothing(url: str, folder: Path) -> None:
        del url, folder

    with pytest.raises(AssertionError):
        await _restore(postgres, tmp_path, nothing)


async def test_fence_reaches_the_servers_that_run(tmp_path: Path, migrated_url: str) -> None:
    async with _scene(tmp_path, migrated_url) as scene:
        token = await scene.token()
        settings = settings_for(
            tmp_path / "three", database=Database(url=SecretStr(migrated_url)), **SECRETS
        )
        done = await app_module.fence(settings, comment="drill", dry=False)
        for worker in (scene.one, scene.two):
            await until(lambda at=worker: at.app.state.revision >= done.revision)  # type: ignore[misc]
            assert await scene.judged(token, worker) == "TOKEN_CUT_OFF"
        assert await scene.judged(await scene.token(), scene.one) == "OK"
        epochs = "SELECT count(*) FROM audit WHERE action IN ('Fence', 'RaiseEpoch')"
        assert await sql(migrated_url, epochs) == [(1,)]


async def test_fence_needs_a_schema_that_is_current(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with pytest.raises(StartError, match="authsvc migrate"):
        await app_module.fence(settings, comment="", dry=True)
    assert not (tmp_path / "authsvc.db").exists()
