"""RevocationService over a real server: every marker against every credential."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest
from structlog.testing import capture_logs

from authsvc.errors import AuthError, Reason
from authsvc.store.port import Change, Impact, Store
from authsvc_client.core.markers import MARKER_LIFETIME_S, MarkerKind
from authsvc_client.v1 import auth_pb2, clients_pb2, keys_pb2, resources_pb2
from authsvc_client.v1 import revocations_pb2 as pb
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.harness import (
    ADMIN,
    Member,
    Running,
    by_hand,
    failure,
    hand_clock,
    outcome,
    reason,
    running,
    start,
)

JWT, OPAQUE = "https://jwt.test", "https://opaque.test"
ACCESS = "urn:ietf:params:oauth:token-type:access_token"
REFRESH = "urn:ietf:params:oauth:token-type:refresh_token"
GRANTS = [
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
]
METHODS = [
    clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
    clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
]
SCOPES = ("jwt.read", "opaque.read")


@dataclass
class Held:
    """What a client got."""

    jti: str
    grant_id: str
    credentials: dict[str, str]


@dataclass
class Scene:
    """Two clients alike; `owner` validates what they get."""

    server: Running
    app: Member
    other: Member
    owner: Member

    async def issue(self, member: Member, name: str) -> auth_pb2.IssuedToken:
        return await self.server.token(member, resources=[name])

    async def exchange(self, member: Member, subject: str) -> str:
        """The refresh token of a new grant."""
        grant = auth_pb2.TokenExchangeGrant(
            subject_token=subject, subject_token_type=ACCESS, requested_token_type=REFRESH
        )
        request = auth_pb2.IssueTokenRequest(token_exchange=grant, client_id=member.client_id)
        request.resources.append(JWT)
        issued = await self.server.auth(member.who).IssueToken(request)
        return issued.token.refresh_token

    async def refresh(
        self, member: Member, token: str, server: Running | None = None
    ) -> auth_pb2.IssuedToken:
        request = auth_pb2.RefreshTokenRequest(refresh_token=token, client_id=member.client_id)
        return (await (server or self.server).auth(member.who).RefreshToken(request)).token

    async def api_key(self, member: Member) -> str:
        request = clients_pb2.CreateApiKeyRequest(api_key=clients_pb2.ApiKey(scopes=SCOPES))
        return (await self.server.clients(member.who).CreateApiKey(request)).value

    async def equip(self, member: Member) -> Held:
        """One credential of each kind."""
        subject, jwt = [await self.issue(member, JWT) for _ in range(2)]
        refresh = await self.exchange(member, subject.access_token)
        used = await self.refresh(member, refresh)
        claims = await self.server.verdict(
            self.owner.who, used.access_token, of=member.who, view=auth_pb2.TOKEN_VIEW_CLAIMS
        )
        credentials = {
            "jwt": jwt.access_token,
            "opaque": (await self.issue(member, OPAQUE)).access_token,
            "jwt of the grant": used.access_token,
            "grant": used.refresh_token,
            "api key": await self.api_key(member),
        }
        return Held(jwt.jti, claims.claims.grant_id, credentials)

    async def alive(
        self, member: Member, held: Held, server: Running, names: Iterable[str]
    ) -> set[str]:
        """Which credentials are good at a server. A grant's use is a change, so it comes last."""
        found = set()
        for name in names:
            token = held.credentials[name]
            if name == "grant":
                told = await outcome(self._use(member, held, server))
                assert told in ("OK", "INVALID_GRANT")
                if told != "OK":
                    continue
            elif await server.judged(self.owner.who, token, of=member.who) != "OK":
                continue
            found.add(name)
        return found

    async def _use(self, member: Member, held: Held, server: Running) -> None:
        used = await self.refresh(member, held.credentials["grant"], server)
        held.credentials["grant"] = used.refresh_token


async def made(server: Running) -> Scene:
    owner = await server.member("owner", "validate")
    await server.resource(JWT, "jwt.read", owner=owner.client_id)
    opaque = resources_pb2.TOKEN_FORMAT_OPAQUE
    await server.resource(OPAQUE, "opaque.read", owner=owner.client_id, token_format=opaque)
    app, other = [
        await server.member(name, *SCOPES, grant_types=GRANTS, token_endpoint_auth_methods=METHODS)
        for name in ("app", "other")
    ]
    return Scene(server, app, other, owner)


def revoking(server: Running, who: Any = ADMIN) -> Any:
    return RevocationServiceStub(server.channel(who))


# --- the table ---

KINDS = ("jwt", "opaque", "jwt of the grant", "api key", "grant")
LASTING = ("api key", "grant")
"""Those that outlive a marker."""
EVERY, NOTHING = set(KINDS), set[str]()


class Setting(Protocol):
    """Sets a marker, of a scene and what its app holds."""

    def __call__(self, scene: Scene, held: Held, **more: Any) -> Awaitable[Any]: ...


@dataclass(frozen=True)
class Marker:
    """A way to set it, and what it kills of the app and of the other client."""

    made_by: Setting
    kills: set[str]
    of_other: set[str]
    kind: MarkerKind | None = None
    grants: int = 0
    api_keys: int = 0
    """What `validate_only` counts."""


def _call(method: str, **fields: str) -> Setting:
    """A call of RevocationService; fields name what is the scene's."""

    async def call(scene: Scene, held: Held, **more: Any) -> Any:
        values = {
            "app": scene.app.client_id,
            "other": scene.other.client_id,
            "grant": held.grant_id,
        }
        request = getattr(pb, f"{method}Request")(
            **{name: values.get(value, value) for name, value in fields.items()}, **more
        )
        return await getattr(revoking(scene.server), method)(request)

    return call


async def _revoke_jti(scene: Scene, held: Held, **_more: Any) -> Any:
    request = auth_pb2.RevokeTokenRequest(jti=held.jti)
    return await scene.server.auth(ADMIN).RevokeToken(request)


async def _taint(scene: Scene, held: Held, **_more: Any) -> Any:
    keys = await scene.server.keys().ListSigningKeys(keys_pb2.ListSigningKeysRequest())
    request = keys_pb2.TaintSigningKeyRequest(kid=keys.signing_keys[0].kid)
    return await scene.server.keys().TaintSigningKey(request)


async def _delete_resource(scene: Scene, held: Held, **_more: Any) -> Any:
    request = resources_pb2.DeleteResourceRequest(resource_id=JWT)
    return await scene.server.resources().DeleteResource(request)


_OF_JWT = {"jwt", "jwt of the grant", "grant"}
_KIND = MarkerKind
MARKERS = {
    "everything": Marker(_call("RevokeEverything"), EVERY, EVERY, _KIND.CUTOFF_EVERYTHING, 2, 2),
    "client": Marker(
        _call("RevokeClient", client_id="app"), EVERY, NOTHING, _KIND.CUTOFF_CLIENT, 1, 1
    ),
    "subject": Marker(
        _call("RevokeSubject", subject="app"), EVERY, NOTHING, _KIND.CUTOFF_SUBJECT, 1, 1
    ),
    "subject+client": Marker(
        _call("RevokeSubjectClient", subject="app", client_id="app"),
        EVERY,
        NOTHING,
        _KIND.CUTOFF_SUBJECT_CLIENT,
        1,
        1,
    ),
    "subject+another client": Marker(
        _call("RevokeSubjectClient", subject="app", client_id="other"),
        NOTHING,
        NOTHING,
        _KIND.CUTOFF_SUBJECT_CLIENT,
    ),
    "grant": Marker(
        _call("RevokeGrant", grant_id="grant"),
        {"grant", "jwt of the grant"},
        NOTHING,
        _KIND.GRANT_DEAD,
        1,
    ),
    "unknown grant": Marker(
        _call("RevokeGrant", grant_id="lost"), NOTHING, NOTHING, _KIND.GRANT_DEAD
    ),
    "unknown session": Marker(
        _call("RevokeSession", session_id="lost"), NOTHING, NOTHING, _KIND.SESSION_DEAD
    ),
    "token": Marker(_revoke_jti, {"jwt"}, NOTHING),
    "tainted key": Marker(_taint, _OF_JWT, _OF_JWT),
    "deleted resource": Marker(_delete_resource, _OF_JWT, _OF_JWT),
}
SERVICE = [name for name, marker in MARKERS.items() if marker.kind is not None]


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "sqlite":
        return {}
    return {"url": request.getfixturevalue("migrated_url")}


async def sql(directory: Path, place: dict[str, Any], statement: str) -> list[Any]:
    if not place:
        return await by_hand(directory / "authsvc.db", statement)
    connection = await asyncpg.connect(place["url"].replace("+asyncpg", ""))
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


@pytest.mark.parametrize("name", MARKERS)
async def test_marker_kills_what_it_must_and_nothing_else(
    tmp_path: Path, place: dict[str, Any], name: str
) -> None:
    """At the worker that set it, at another one, after a restart, and after compaction."""
    marker = MARKERS[name]
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running(tmp_path, **place))
        second = await stack.enter_async_context(running(tmp_path, **place))
        scene = await made(first)
        held = {m.client_id: await scene.equip(m) for m in (scene.app, scene.other)}
        left = {
            scene.app.client_id: EVERY - marker.kills,
            scene.other.client_id: EVERY - marker.of_other,
        }

        async def check(server: Running, names: Iterable[str]) -> None:
            for member in (scene.app, scene.other):
                found = await scene.alive(member, held[member.client_id], server, names)
                assert found == left[member.client_id] & set(names), member

        answer = await marker.made_by(scene, held[scene.app.client_id])
        await check(first, KINDS)
        await second.app.follow.poll()
        await check(second, KINDS)
        assert answer.revision == await first.head() == await second.head()
    async with running(tmp_path, **place) as restarted:
        await check(restarted, KINDS)
        await sql(tmp_path, place, f"UPDATE feed SET until = until - {MARKER_LIFETIME_S + 1}")
        await restarted.app.housekeeping.run_once()
        [[rows]] = await sql(tmp_path, place, "SELECT count(DISTINCT revision) FROM feed")
        assert rows == 1  # that of the head
        await sql(tmp_path, place, "DELETE FROM feed")
    async with running(tmp_path, **place) as compacted:
        await check(compacted, LASTING)


# --- validate_only ---

TABLES = ("feed", "feed_head", "cutoff", "client", "api_key", '"grant"', "access_token", "resource")


async def _contents(directory: Path) -> dict[str, list[Any]]:
    return {table: await sql(directory, {}, f"SELECT * FROM {table}") for table in TABLES}


async def test_validate_only_tells_what_would_die_and_writes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        scene = await made(server)
        held = await scene.equip(scene.app)
        await scene.equip(scene.other)
        before = await _contents(tmp_path)
        assert all(before[table] for table in TABLES if table != "cutoff")
        for name in SERVICE:
            marker = MARKERS[name]
            answer = await marker.made_by(scene, held, validate_only=True, comment="what if")
            assert answer.revision == 0
            impact = pb.RevocationImpact(
                kind=auth_pb2.MarkerKind.ValueType(marker.kind or 0),
                grants=marker.grants,
                api_keys=marker.api_keys,
            )
            assert answer.impact == impact, name
        assert await _contents(tmp_path) == before
        assert await scene.alive(scene.app, held, server, KINDS) == EVERY
        for name in SERVICE:  # and the same is counted where it is done
            fresh = await scene.equip(scene.app)
            await scene.equip(scene.other)
            would = await MARKERS[name].made_by(scene, fresh, validate_only=True)
            done = await MARKERS[name].made_by(scene, fresh)
            assert done.revision
            assert done.impact == would.impact


# --- what is dead, unknown, or not to be revoked by the caller ---


async def test_what_is_dead_already_is_fine_and_writes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        scene = await made(server)
        held = await scene.equip(scene.app)
        for name in ("grant", "unknown grant", "unknown session"):
            first = await MARKERS[name].made_by(scene, held)
            head = await server.head()
            assert first.revision == head
            again = await MARKERS[name].made_by(scene, held)
            assert again.revision == again.impact.grants == 0
            assert await server.head() == head


@pytest.mark.parametrize(
    ("method", "fields", "refused"),
    [
        ("RevokeClient", {"client_id": "nobody"}, "CLIENT_NOT_FOUND"),
        ("RevokeSubject", {"subject": "nobody"}, "SUBJECT_NOT_FOUND"),
        ("RevokeSubjectClient", {"subject": "nobody", "client_id": "app"}, "SUBJECT_NOT_FOUND"),
        ("RevokeSubjectClient", {"subject": "app", "client_id": "nobody"}, "CLIENT_NOT_FOUND"),
        ("RevokeClient", {}, "FIELD_INVALID"),
        ("RevokeSubject", {}, "FIELD_INVALID"),
        ("RevokeSubjectClient", {"subject": "app"}, "FIELD_INVALID"),
        ("RevokeSession", {}, "FIELD_INVALID"),
        ("RevokeGrant", {}, "FIELD_INVALID"),
        ("RevokeGrant", {"grant_id": "x" * 65}, "FIELD_INVALID"),
        ("RevokeGrant", {"grant_id": "a\0b"}, "FIELD_INVALID"),
        ("RevokeEverything", {"comment": "x" * 1025}, "FIELD_INVALID"),
    ],
    ids=str,
)
async def test_what_cannot_be_revoked_is_refused_and_nothing_is_written(
    scene: Scene, method: str, fields: dict[str, str], refused: str
) -> None:
    head = await scene.server.head()
    held = Held("", "", {})
    for dry in (True, False):
        call = _call(method, **fields)(scene, held, validate_only=dry)
        assert await reason(call) == refused
    assert await scene.server.head() == head


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running(tmp_path) as server:
        yield await made(server)


async def test_administrators_alone_revoke(scene: Scene) -> None:
    server, head = scene.server, await scene.server.head()
    grant = (await scene.equip(scene.app)).grant_id
    requests = {
        "RevokeEverything": {},
        "RevokeClient": {"client_id": scene.app.client_id},
        "RevokeSubject": {"subject": scene.app.client_id},
        "RevokeSubjectClient": {
            "subject": scene.app.client_id,
            "client_id": scene.app.client_id,
        },
        "RevokeGrant": {"grant_id": grant},
        "RevokeSession": {"session_id": "x"},
    }
    head = await server.head()
    for method, fields in requests.items():
        for dry in (True, False):
            request = getattr(pb, f"{method}Request")(**fields, validate_only=dry)
            for who in (scene.app.who, scene.owner.who):
                assert await reason(getattr(revoking(server, who), method)(request)) == (
                    "INSUFFICIENT_SCOPE"
                )
    assert await server.head() == head


async def test_new_tokens_are_good_at_once_and_the_comment_is_logged(scene: Scene) -> None:
    with capture_logs() as logs:
        request = pb.RevokeClientRequest(client_id=scene.app.client_id, comment="stolen laptop")
        answer = await revoking(scene.server).RevokeClient(request)
    [entry] = [entry for entry in logs if entry["event"] == "revocation.made"]
    assert entry["kind"] == "CUTOFF_CLIENT"
    assert entry["ids"] == [scene.app.client_id]
    assert (entry["revision"], entry["comment"]) == (answer.revision, "stolen laptop")
    assert entry["by"].endswith("/admin")
    held = await scene.equip(scene.app)
    assert await scene.alive(scene.app, held, scene.server, KINDS) == EVERY


@pytest.mark.parametrize(
    "order", list(permutations(("everything", "client", "subject"), 2)), ids="-".join
)
async def test_older_cutoff_hides_no_newer_one(tmp_path: Path, order: tuple[str, str]) -> None:
    """CVE-2026-18218: in both orders the maximum wins, for tokens and for what is stored."""
    async with running(tmp_path) as server:
        scene = await made(server)
        old = await scene.equip(scene.app)
        await MARKERS[order[0]].made_by(scene, old)
        between = await scene.equip(scene.app)
        assert await scene.alive(scene.app, between, server, KINDS) == EVERY
        await MARKERS[order[1]].made_by(scene, old)
        new = await scene.equip(scene.app)
        found = [await scene.alive(scene.app, each, server, KINDS) for each in (old, between, new)]
        assert found == [NOTHING, NOTHING, EVERY]


# --- when the store fails ---


class Faulty:
    """A feed, and counts, that fail as they are told to."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failure: Exception | None = None
        self.after = False
        self.uncounted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store.feed, name)

    async def append(self, changes: Any, done: Any = ()) -> int:
        if self.failure is not None and not self.after:
            raise self.failure
        revision = await self._store.feed.append(changes, done)
        if self.failure is not None:
            raise self.failure
        return revision

    async def impact(self, marker: Change) -> Impact:
        if self.uncounted:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="too slow")
        return await self._store.revocations.impact(marker)

    async def is_dead(self, mark: Change) -> bool:
        return await self._store.revocations.is_dead(mark)


def _faulty() -> tuple[list[Faulty], Callable[[Store], Store]]:
    found: list[Faulty] = []

    def wrap(store: Store) -> Store:
        found.append(Faulty(store))
        faulty: Any = found[0]
        return replace(store, feed=faulty, revocations=faulty)

    return found, wrap


@pytest.mark.parametrize(
    ("failing", "committed", "told"),
    [
        (AuthError(Reason.STORE_UNAVAILABLE, cause="hunter2"), False, "STORE_UNAVAILABLE"),
        (AuthError(Reason.COMMIT_UNKNOWN, cause="hunter2"), False, "COMMIT_UNKNOWN"),
        (AuthError(Reason.COMMIT_UNKNOWN, cause="hunter2"), True, "COMMIT_UNKNOWN"),
        (RuntimeError("hunter2"), False, "INTERNAL"),
    ],
    ids=["before", "at_commit", "after_commit", "a_fault"],
)
async def test_revocation_that_is_not_known_to_be_durable_is_not_ok(
    tmp_path: Path, failing: Exception, committed: bool, told: str
) -> None:
    """CVE-2020-15223."""
    found, wrap = _faulty()
    async with running(tmp_path, wrap=wrap) as server:
        scene = await made(server)
        held = await scene.equip(scene.app)
        found[0].failure, found[0].after = failing, committed
        refused = await failure(MARKERS["client"].made_by(scene, held))
        assert refused.reason == told
        assert "hunter2" not in f"{refused}"
        found[0].failure = None
        await server.app.follow.poll()
        left = NOTHING if committed else EVERY
        assert await scene.alive(scene.app, held, server, KINDS) == left
        assert (await MARKERS["client"].made_by(scene, held)).revision
        assert await scene.alive(scene.app, held, server, KINDS) == NOTHING


async def test_revocation_does_not_wait_for_a_count_that_fails(tmp_path: Path) -> None:
    found, wrap = _faulty()
    async with running(tmp_path, wrap=wrap) as server:
        scene = await made(server)
        held = await scene.equip(scene.app)
        found[0].uncounted = True
        would = MARKERS["client"].made_by(scene, held, validate_only=True)
        assert await reason(would) == "STORE_UNAVAILABLE"
        answer = await MARKERS["client"].made_by(scene, held)
        assert answer.revision
        assert not answer.HasField("impact")
        assert await scene.alive(scene.app, held, server, KINDS) == NOTHING


async def test_database_that_is_gone_is_told_and_heals(tmp_path: Path) -> None:
    server = await start(tmp_path)
    try:
        scene = await made(server)
        held = await scene.equip(scene.app)
        with closing(sqlite3.connect(tmp_path / "authsvc.db")) as holder:
            holder.isolation_level = None
            holder.execute("BEGIN IMMEDIATE")
            refused = await failure(MARKERS["everything"].made_by(scene, held))
            assert refused.reason in ("STORE_UNAVAILABLE", "COMMIT_UNKNOWN")
            assert await scene.alive(scene.app, held, server, ("jwt", "opaque")) == {
                "jwt",
                "opaque",
            }
            holder.execute("ROLLBACK")
        assert (await MARKERS["everything"].made_by(scene, held)).revision
        assert await scene.alive(scene.app, held, server, KINDS) == NOTHING
    finally:
        await server.close()


# --- at once ---


async def test_two_at_once_are_both_done(tmp_path: Path, place: dict[str, Any]) -> None:
    async with running(tmp_path, **place) as first, running(tmp_path, **place) as second:
        scene = await made(first)
        held = await scene.equip(scene.app)
        await second.app.follow.poll()
        head = await first.head()
        scenes = [scene, replace(scene, server=second)]
        names = [name for name in SERVICE if name != "subject+another client"]
        answers = await asyncio.gather(
            *(MARKERS[name].made_by(scenes[at % 2], held) for at, name in enumerate(names * 2))
        )
        written = {answer.revision for answer in answers} - {0}
        assert written == set(range(head + 1, head + 1 + len(written)))
        for server in (first, second):
            await server.app.follow.poll()
            assert await scene.alive(scene.app, held, server, KINDS) == NOTHING


async def test_token_in_the_making_when_everything_is_cut_off_is_dead(tmp_path: Path) -> None:
    """`rev` is that of before the first authority was read."""
    async with running(tmp_path) as server:
        scene = await made(server)
        moment_before = server.app.state.revision
        issuing = [asyncio.ensure_future(_await(scene.issue(scene.app, JWT))) for _ in range(8)]
        answer = await revoking(server).RevokeEverything(pb.RevokeEverythingRequest())
        assert answer.revision > moment_before
        for issued in await asyncio.gather(*issuing):
            verdict = await server.verdict(
                ADMIN, issued.access_token, of=scene.app.who, view=auth_pb2.TOKEN_VIEW_CLAIMS
            )
            assert verdict.active is (verdict.claims.revision >= answer.revision)


async def _await(call: Awaitable[Any]) -> Any:
    return await call


async def test_revoked_grant_is_dead_by_a_clock_moved_by_hand(tmp_path: Path) -> None:
    """A stored credential that outlives the compaction of its marker is refused still."""
    async with running(tmp_path, clock=hand_clock()) as server:
        scene = await made(server)
        held, kept = [await scene.equip(member) for member in (scene.app, scene.other)]
        await MARKERS["client"].made_by(scene, held)
        await server.advance(MARKER_LIFETIME_S + 60)
        await server.app.housekeeping.run_once()
        await server.app.follow.poll()
        assert await scene.alive(scene.app, held, server, KINDS) == NOTHING
        assert await scene.alive(scene.other, kept, server, LASTING) == set(LASTING)
