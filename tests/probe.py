"""Asks a server what an event kills: at once, restarted, and when its markers are compacted."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from authsvc.config import Grants, Registration
from authsvc_client.core.markers import LEEWAY_S, MARKER_LIFETIME_S
from authsvc_client.v1 import auth_pb2, clients_pb2, keys_pb2, resources_pb2, sessions_pb2
from authsvc_client.v1 import revocations_pb2 as pb
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub
from tests.certs import HOUR
from tests.clocks import HandClock
from tests.harness import ADMIN, NOW, Member, Running, by_hand, hand_clock, outcome, running

AT_ONCE: Final = 8
"""Servers that are asked at the same time: to stop one is mostly waiting."""
REFUSALS: Final = {
    *("TOKEN_REVOKED", "GRANT_REVOKED", "SESSION_ENDED", "TOKEN_KEY_TAINTED", "TOKEN_CUT_OFF"),
    *("TOKEN_EXPIRED", "TOKEN_MALFORMED", "TOKEN_KEY_UNKNOWN"),
    *("CLIENT_AUTHENTICATION_FAILED", "PEER_CERTIFICATE_EXPIRED"),
    *("CLIENT_PENDING", "CLIENT_REJECTED", "CLIENT_EXPIRED", "CLIENT_SUSPENDED"),
    *("INVALID_GRANT", "REFRESH_TOKEN_REUSED", "REGISTRATION_TOKEN_INVALID"),
    *("GRANT_TYPE_NOT_ALLOWED", "CALLER_TOKEN_INVALID"),
}
"""How a dead credential is refused; every other answer is a failure of the probe."""
DIES, LIVES = "**dies**", "lives"
# The ends of what has one: after the lifetime of markers, before that of the other certificates.
TOKEN_S, LONG_S, GRANT_S = 3600, 7 * HOUR, 7.5 * HOUR
CERTIFICATE_S, PENDING_S, SOON_S = 8 * HOUR, 4 * HOUR, 200.0

Table: TypeAlias = dict[str, dict[str, str]]
"""Row -> column -> cell."""


class ProbeError(AssertionError):
    """An answer that no table can tell: neither yes nor a refusal that says why."""


@dataclass
class Scene:
    """A server, and what its clients hold; `app` is the client that the events are about."""

    server: Running
    members: dict[str, Member]
    held: dict[str, str]
    """By name; also ids, and what goes with a credential."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What `app` registered."""

    @property
    def app(self) -> Member:
        return self.members["app"]

    @property
    def now(self) -> float:
        return self.server.clock.wall()

    async def admin(self, method: str, **fields: Any) -> Any:
        """A call of RevocationService, by an administrator."""
        stub = RevocationServiceStub(self.server.channel(ADMIN))
        return await getattr(stub, method)(getattr(pb, f"{method}Request")(**fields))

    async def refresh(self, token: str, by: Member | None = None) -> auth_pb2.IssuedToken:
        by = by or self.app
        request = auth_pb2.RefreshTokenRequest(refresh_token=token, client_id=by.client_id)
        return (await self.server.auth(by.who).RefreshToken(request)).token

    async def revoke(self, token: str, by: Member | None = None) -> None:
        by = by or self.app
        request = auth_pb2.RevokeTokenRequest(token=token, client_id=by.client_id)
        await self.server.auth(by.who).RevokeToken(request)


def stamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds))


# --- the use of a credential ---

Use: TypeAlias = Callable[[Scene], Awaitable[str]]
"""Uses a credential: OK, or why not."""


def access_token(name: str, bearer: str = "app") -> Use:
    """What is said of it when its bearer presents it."""

    async def use(scene: Scene) -> str:
        who = scene.members[bearer].who
        return await scene.server.judged(ADMIN, scene.held[name], of=who)

    return use


def refresh_token(name: str, bearer: str = "app") -> Use:
    """Its successor is kept."""

    async def use(scene: Scene) -> str:
        async def refresh() -> None:
            used = await scene.refresh(scene.held[name], scene.members[bearer])
            scene.held[name] = used.refresh_token

        return await outcome(refresh())

    return use


# --- events ---

Step: TypeAlias = Callable[[Scene], Awaitable[Any]]
Stages: TypeAlias = tuple[tuple[str, Step], ...]
"""When what dies of it does, and what happens then."""


def once(*steps: Step) -> Stages:
    return (("", in_turn(*steps)),)


def in_turn(*steps: Step) -> Step:
    async def step(scene: Scene) -> None:
        for one in steps:
            await one(scene)

    return step


def later(seconds: float) -> Step:
    async def step(scene: Scene) -> None:
        await scene.server.advance(seconds)

    return step


OWN_END: Final[Stages] = (
    ("before it", later(TOKEN_S - 10)),
    ("", later(GRANT_S - TOKEN_S + 10 + LEEWAY_S + 1)),
    ("", later(CERTIFICATE_S - GRANT_S)),
)


async def chores(scene: Scene) -> None:
    await scene.server.app.housekeeping.run_once()
    await scene.server.app.follow.poll()


def revocation(method: str, **fields: str) -> Step:
    """A call of RevocationService; fields name a member, or what is held."""

    async def step(scene: Scene) -> Any:
        ids = {name: member.client_id for name, member in scene.members.items()} | scene.held
        return await scene.admin(method, **{name: ids[of] for name, of in fields.items()})

    return step


def reuse(name: str) -> Step:
    """A refresh token of `app` comes again."""

    async def step(scene: Scene) -> None:
        first = scene.held[name]
        second = (await scene.refresh(first)).refresh_token
        scene.held[name] = (await scene.refresh(second)).refresh_token
        assert await outcome(scene.refresh(first)) == "REFRESH_TOKEN_REUSED"

    return step


def end_grant(name: str) -> Step:
    async def step(scene: Scene) -> None:
        request = sessions_pb2.EndGrantRequest(grant_id=scene.held[name])
        await SessionServiceStub(scene.server.channel(ADMIN)).EndGrant(request)

    return step


def review(verb: str, name: str = "app") -> Step:
    """A step of the review of a client."""

    async def step(scene: Scene) -> Any:
        client_id = scene.members[name].client_id
        request = getattr(clients_pb2, f"{verb}ClientRequest")(client_id=client_id)
        return await getattr(scene.server.clients(), f"{verb}Client")(request)

    return step


def update(*paths: str, **changed: Any) -> Step:
    async def step(scene: Scene) -> None:
        client = clients_pb2.Client(client_id=scene.app.client_id, **changed)
        request = clients_pb2.UpdateClientRequest(client=client, update_mask=FieldMask(paths=paths))
        await scene.server.clients().UpdateClient(request)

    return step


approval_ends = update("approval_expire_time", approval_expire_time=stamp(NOW + SOON_S))
expired = in_turn(approval_ends, later(SOON_S + 1))


async def take_scope(scene: Scene) -> None:
    """The first of those that `app` registered."""
    _, *left = scene.metadata["scopes"]
    await update("metadata.scopes", metadata={"client_name": "app", "scopes": left})(scene)


async def ask_for_more(scene: Scene) -> None:
    metadata = scene.metadata | {"scopes": [*scene.metadata["scopes"], "validate"]}
    request = clients_pb2.UpdateOwnClientRequest(
        registration_access_token=scene.held["registration token"],
        client_id=scene.app.client_id,
        metadata=clients_pb2.ClientMetadata(**metadata),
    )
    await scene.server.clients(scene.app.who).UpdateOwnClient(request)


async def delete_own(scene: Scene) -> None:
    token = scene.held["registration token"]
    request = clients_pb2.DeleteOwnClientRequest(registration_access_token=token)
    await scene.server.clients(scene.app.who).DeleteOwnClient(request)


def delete_resources(*resources: str) -> Step:
    async def step(scene: Scene) -> None:
        for resource in resources:
            request = resources_pb2.DeleteResourceRequest(resource_id=resource)
            await scene.server.resources().DeleteResource(request)

    return step


async def rotate_key(scene: Scene) -> None:
    keys = scene.server.keys()
    prepared = (await keys.PrepareSigningKey(keys_pb2.PrepareSigningKeyRequest())).signing_key
    await scene.server.advance(prepared.ready_time.seconds + 1 - scene.now)
    await keys.ActivateSigningKey(keys_pb2.ActivateSigningKeyRequest(kid=prepared.kid))


async def taint(scene: Scene) -> None:
    keys = scene.server.keys()
    listed = await keys.ListSigningKeys(keys_pb2.ListSigningKeysRequest())
    request = keys_pb2.TaintSigningKeyRequest(kid=listed.signing_keys[0].kid)
    await keys.TaintSigningKey(request)


# --- the probe ---


@asynccontextmanager
async def serving(directory: Path, clock: HandClock, **more: Any) -> AsyncIterator[Running]:
    """A server whose chores are done when the probe says so."""
    lives = Grants(lifetime_days=GRANT_S / 86400, idle_days=6 / 24, password=True)
    registration = Registration(pending_days=PENDING_S / 86400)
    async with running(
        directory, clock=clock, grants=lives, registration=registration, **more
    ) as server:
        for task in server.app._tasks._running:
            if task.get_name() == "housekeeping":
                task.cancel()
        yield server


async def sql(directory: Path, *statements: str) -> list[Any]:
    """What nobody may, by hand: the rows that it answers."""
    file = directory / "authsvc.db"
    return [row for statement in statements for row in await by_hand(file, statement)]


@dataclass(frozen=True)
class Probe:
    """A scene, the credentials in it, and the events that are tried on it."""

    equip: Callable[[Running], Awaitable[Scene]]
    credentials: Mapping[str, Use]
    brief: frozenset[str]
    """Credentials that are over before a marker is forgotten."""
    events: Mapping[str, Stages]

    async def __call__(self, events: Iterable[str] = ()) -> Table:
        """Event -> credential -> whether it dies of it; without names all. Raises ProbeError."""
        events = [*events] or [*self.events]
        with tempfile.TemporaryDirectory() as temporary:
            template = Path(temporary) / "state"
            template.mkdir()
            async with serving(template, hand_clock()) as server:
                scene = await self.equip(server)
            free = asyncio.Semaphore(AT_ONCE)

            async def row(event: str) -> dict[str, str]:
                async with free:
                    try:
                        return await self._row(template, scene, self.events[event])
                    except Exception as error:
                        error.add_note(event)
                        raise

            return dict(zip(events, await asyncio.gather(*map(row, events)), strict=True))

    async def _row(self, template: Path, scene: Scene, stages: Stages) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(shutil.copytree(template, Path(temporary) / "state"))
            clock, held = hand_clock(), dict(scene.held)
            cells: dict[str, str] = {}
            async with serving(directory, clock) as server:
                at = replace(scene, server=server, held=held)
                living = await self.living(at)
                same(living, set(self.credentials), "before")
                for when, step in stages:
                    await step(at)
                    await server.app.follow.poll()  # a slow machine may answer before it applied
                    left = await self.living(at)
                    same(left - living, set(), "revived")
                    cells |= dict.fromkeys(living - left, f"{DIES} {when}".strip())
                    living = left
            async with serving(directory, clock) as server:
                at = replace(scene, server=server, held=held)
                same(await self.living(at), living, "restarted")
            clock.advance(MARKER_LIFETIME_S + 1)
            await sql(directory, "DELETE FROM feed", "UPDATE feed_head SET compacted_to = revision")
            async with serving(directory, clock) as server:
                at = replace(scene, server=server, held=held)
                same(await self.living(at), living - self.brief, "compacted")
        return {name: cells.get(name, LIVES) for name in self.credentials}

    async def living(self, scene: Scene) -> set[str]:
        """What still is. Raises ProbeError."""
        return {name for name, use in self.credentials.items() if await is_alive(scene, name, use)}


async def is_alive(scene: Scene, name: str, use: Use) -> bool:
    """Raises ProbeError where the answer is neither yes nor a refusal."""
    told = await use(scene)
    if told != "OK" and told not in REFUSALS:
        raise ProbeError(f"{name}: {told}")
    return told == "OK"


def same(found: set[str], expected: set[str], when: str) -> None:
    if found != expected:
        raise ProbeError(f"{when}: {sorted(found ^ expected)}")
