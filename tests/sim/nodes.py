"""The processes of a world: workers and validators made of the real parts, and what is between."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc

from authsvc.authenticate import Authenticate
from authsvc.errors import AuthError, Reason
from authsvc.feed.append import Append
from authsvc.feed.compact import Compact
from authsvc.feed.follow import Follow
from authsvc.feed.publish import Publish
from authsvc.feed.watch import WatchChanges
from authsvc.identify import Identify
from authsvc.issue import IssueToken, TokenRequest
from authsvc.keys.refresh import RefreshKeys
from authsvc.keys.ring import KeyRing
from authsvc.keys.secrets import Mac, Sealer
from authsvc.mint import GrantLife, Mint, OpenGrant, Reissue, Reissued, TokenAnswer
from authsvc.model import NOBODY, Caller, Peer
from authsvc.permissions import Held
from authsvc.refresh import RefreshToken
from authsvc.review import ReviewClient
from authsvc.revocations import Revocations
from authsvc.revoke import RevokeToken
from authsvc.rpc import status
from authsvc.rpc.agent import AgentServicer, Beside
from authsvc.rpc.answers import Judged
from authsvc.rpc.convert import watched
from authsvc.rpc.policy import Grounds, Policy
from authsvc.store.cached import CachedCatalog, CachedClients
from authsvc.store.port import Change
from authsvc.telemetry import Metrics
from authsvc.validate import ValidateToken
from authsvc_client import AuthsvcClient, LocalValidator
from authsvc_client.core.judge import ANY_AUDIENCE, Judge, Question, Verdict
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import State, StateStale
from authsvc_client.core.watched import Watched
from authsvc_client.errors import Unavailable, error_trailers
from authsvc_client.messages import RemoteVerdict
from authsvc_client.staleness import WhenStale
from authsvc_client.v1 import auth_pb2
from authsvc_client.watcher import Watcher
from tests.sim.loop import Node
from tests.sim.memory import Memory

if TYPE_CHECKING:
    from tests.sim.world import World

ISSUER = "https://issuer.test"
SEALER = Sealer((b"\x22" * 32,))
REFRESH_KEYS = RefreshKeys((b"\x11" * 32,))
LIFE = GrantLife(most_s=60.0, idle_s=30.0)
WALL_S = 1_800_000_000.0
TIMEOUT_S = 5.0
"""As of a command to the database."""
WRITES = frozenset(
    {
        *("append", "begin", "raise_epoch", "beat", "compact", "sweep"),
        *("move", "add_first", "prepare", "activate", "taint", "add", "open", "use"),
    }
)
FLOW = 64
"""Messages that a stream holds before whoever sends has to wait."""
LIVE = frozenset({"pay"})
"""Permissions that all have; who asks for them is answered by a worker."""
METRICS = Metrics()
ANYBODY = Caller("anybody", "", frozenset(), frozenset({ANY_AUDIENCE}), NOBODY)


class Unknown(Exception):
    """A call without an answer: it may have been done or not."""


class Link:
    """One worker's way to the database that it is led to."""

    def __init__(self, world: "World", worker: "Worker") -> None:
        self._world = world
        self._worker = worker

    async def __call__(self, name: str, *given: Any, **named: Any) -> Any:
        if name not in WRITES:
            return await self._do(name, given, named)
        # As Database.to_the_end: who goes away cuts no change in half.
        return await asyncio.shield(asyncio.create_task(self._do(name, given, named)))

    async def _do(self, name: str, given: Sequence[Any], named: dict[str, Any]) -> Any:
        world, worker = self._world, self._worker
        writes = name in WRITES
        await world.transit()
        self._require(database := worker.database, writes=writes)
        if not self._reaches(database):
            await self._wait_in_vain()
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="cut off")
        database.taken.clear()
        answer = getattr(database, name)(*given, **named)
        taken = list(database.taken)
        await world.transit()
        if not self._reaches(database) or world.loses_reply():
            world.count("reply_lost")
            await self._wait_in_vain()
            reason = Reason.COMMIT_UNKNOWN if writes else Reason.STORE_UNAVAILABLE
            raise AuthError(reason, cause="no reply")
        for revision, changes in taken:
            worker.tell(revision, changes)
        return answer

    def _reaches(self, database: Memory) -> bool:
        return not (self._worker.is_cut or database.is_down)

    async def _wait_in_vain(self) -> None:
        await asyncio.sleep(self._world.rng.uniform(0.1, TIMEOUT_S))

    def _require(self, database: Memory, *, writes: bool) -> None:
        if not self._worker.alive:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="dead")
        if writes and (database.standby or not database.writable):
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="read-only")


class Linked:
    """A store, behind a link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return partial(self._link, name)

    async def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        after = (-1, 0, b"")
        while True:
            found = await self._link("piece", after, head, rows)
            if found:
                yield found
                after = (found[-1].revision, int(found[-1].kind), found[-1].key)
            if len(found) < rows:
                return


class Bus:
    """One worker's connection to Redis (authsvc.cache.port.Bus)."""

    def __init__(self, world: "World", worker: "Worker") -> None:
        self._world = world
        self._worker = worker
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.channel = ""
        """Listened to; empty: not connected."""

    async def publish(self, channel: str, message: bytes) -> bool:
        await self._world.transit()
        return self._worker.alive and self._world.published(self._worker, channel, message)

    def receive(self, channel: str, message: bytes) -> None:
        if channel == self.channel:
            self._queue.put_nowait(message)

    async def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        if not self._world.has_redis(self._worker):
            return
        self.channel, self._queue = channel, asyncio.Queue()
        try:
            yield None
            while self._world.has_redis(self._worker):
                try:
                    async with asyncio.timeout(1.0):
                        message = await self._queue.get()
                except TimeoutError:
                    yield None
                else:
                    yield message
        finally:
            self.channel = ""


class Worker(Node):
    """One server process, put together as app.py does, without its edges."""

    def __init__(self, world: "World", name: str) -> None:
        super().__init__(name, world.loop, booted=world.rng.uniform(10, 1000))
        self.world = world
        self.database = world.database
        self.is_cut = False
        """From the database."""
        self.has_redis = True
        self.is_ready = False
        self.wall_shift = 0.0
        self.staleness_s = world.staleness_s
        store: Any = Linked(Link(world, self))
        self.state = state = State(world.staleness_s)
        self.ring = KeyRing(store, SEALER, state, max_age_s=0)
        clients, catalog = CachedClients(store), CachedCatalog(store)
        self._catalog = catalog
        self.follow = Follow(
            store,
            state,
            self,
            listeners=(clients.changed, catalog.changed),
            loaders=(self._reload,),
            synchronous=world.synchronous,
        )
        self.bus = Bus(world, self)
        nowhere: Any = SimpleNamespace(registry=SimpleNamespace(register=lambda _counters: None))
        mac = Mac(SEALER, ISSUER)
        self._publish = Publish(self.bus, mac, ISSUER, self.follow, state, self, nowhere)
        judge = Judge(ISSUER, state)
        identify = Identify(ISSUER, judge, store, store, clients.get, catalog, self)
        authenticate = Authenticate(
            ISSUER, clients, store.secret_used, store, identify.api_key, state, self
        )
        mint = Mint(ISSUER, self.ring, store, _no_permissions, state, self)
        append, reach = Append(store), self.follow.reach
        self._policy = Policy(ISSUER, frozenset(), _nobody, clients, catalog, identify, state, self)
        self._kept: dict[TokenRequest, tuple[Grounds, Reissue]] = {}
        self.issue = IssueToken(
            ISSUER,
            authenticate,
            catalog,
            identify.alive,
            mint,
            OpenGrant(store, store, REFRESH_KEYS, LIFE),
            self._check_password(store),
            self.follow.fresh,
        )
        self.refresh = RefreshToken(
            ISSUER, authenticate, store, REFRESH_KEYS, LIFE, catalog, reach, mint
        )
        held: Any = SimpleNamespace(at_hand=lambda *_: Held(LIVE, state.revision))
        self.validate = ValidateToken(identify, held, self.follow, state)
        judged: Any = Judged(self.validate, state, METRICS)
        self._answers = Answers(AgentServicer(judged))  # to those who have been let in
        self.revoke = RevokeToken(identify.alive, REFRESH_KEYS, store, append, reach)
        self.revocations = Revocations(store, store.get, store.get, append, reach)
        self.review = ReviewClient(store, catalog, reach, 1e9)
        self.watch = WatchChanges(store, self.follow, state, self, watched)
        self.compact = Compact(store)

    def wall(self) -> float:
        """Its own clock, which somebody may set."""
        return WALL_S + self.loop.time() + self.wall_shift

    def serves(self) -> bool:
        """Whether it takes calls."""
        return self.alive and self.is_ready

    def tell(self, revision: int, changes: Sequence[Change]) -> None:
        """What it committed is published."""
        self._publish.offer(revision, changes)

    def serve(self) -> None:
        """As App.start."""
        self.start(self._start())

    async def _start(self) -> None:
        while not self.is_ready:
            try:
                await self.ring.ensure()
                await self.follow.poll()
            except AuthError:
                pass
            self.is_ready = self.state.confirmed is not None
            if not self.is_ready:
                await asyncio.sleep(0.3)
        self.start(self.follow.run())
        self.start(self._publish.send())
        self.start(self._publish.hear())

    async def _reload(self, markers: tuple[Marker, ...]) -> None:
        """As App does."""
        self.state.apply(markers, self.state.revision)
        kinds = {marker.kind for marker in markers}
        if MarkerKind.KEYS_CHANGED in kinds or not self.state.keys.by_kid:
            await self.ring.load()
        if MarkerKind.RESOURCE_CHANGED in kinds or self.state.revision == 0:
            found = (await self._catalog()).by_id.values()
            self.state.staleness = {
                resource.resource_id: float(resource.staleness_max_s)
                for resource in found
                if resource.staleness_max_s is not None
            }

    async def issue_again(self, request: TokenRequest, peer: Peer) -> TokenAnswer | Reissued:
        """As the edge does: by what was found for the same request before, while that stands."""
        grounds, reissue = self._kept.get(request, (None, None))
        if grounds is not None and reissue is not None and self._policy.stand(grounds, self.wall()):
            self.world.count("reissued")
            return reissue()
        answer = await self.issue(request, peer)
        if (again := answer.again) is not None:
            self._kept[request] = (Grounds.of(again.client, peer, again.catalog), again.issue)
        return answer

    async def answer(self, name: str, raw: bytes) -> bytes:
        """Of a question."""
        self.world.count("worker_asked")
        if not self.is_ready:
            raise StateStale(math.inf)
        return await self._answers(name, raw)

    @staticmethod
    def _check_password(store: Any) -> Any:
        async def check(username: str, _password: str, _peer: Any, _address: str) -> Any:
            found = await store.password(username)
            if found is None:
                raise AuthError(Reason.INVALID_GRANT)
            return found

        return check

    def judge(self, token: str, question: Question) -> Verdict | None:
        """Raises StateStale."""
        answer = self.validate.at_hand(token, question)
        return answer.verdict if answer is not None else None


def _nobody() -> str | None:
    return None


async def _no_permissions(_subject: str, _audience: str) -> Any:
    raise AssertionError("nobody asks for permissions here")


class Ended(grpc.RpcError):
    """How a call ends at the client."""

    def __init__(self, code: grpc.StatusCode, reason: Reason = Reason.UNSPECIFIED) -> None:
        self._code = code
        self._trailers = error_trailers(code, "ended", reason)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "ended"

    def trailing_metadata(self) -> Any:
        return self._trailers


class Stream:
    """A WatchChanges call: what is sent comes in order, late, in a rush after a stall, or never."""

    def __init__(self, world: "World", worker: Worker, watcher: Any, request: Any) -> None:
        self._world = world
        self.worker = worker
        self.watcher = watcher
        self._queue: deque[tuple[float, Any]] = deque()
        self._moved = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_over = False
        world.streams[self] = None
        self._sender = worker.start(self._send(request.resume_revision))

    async def _send(self, resume: int) -> None:
        try:
            await self._world.transit()
            if not self.worker.is_ready:
                raise AuthError(Reason.STATE_STALE)
            async with aclosing(self.worker.watch(resume)) as messages:
                async for message in messages:
                    await self._has_room.wait()
                    self._put(auth_pb2.WatchChangesResponse.FromString(message))
        except AuthError as error:
            self._put(Ended(grpc.StatusCode.UNAVAILABLE, error.reason))
        except StateStale:
            self._put(Ended(grpc.StatusCode.UNAVAILABLE, Reason.STATE_STALE))

    def _put(self, message: Any) -> None:
        arrival = self._world.loop.time() + self._world.latency()
        if self._queue:
            arrival = max(arrival, self._queue[-1][0])
        self._queue.append((arrival, message))
        if len(self._queue) >= FLOW:
            self._has_room.clear()
        self._moved.set()

    def moved(self) -> None:
        """The way is free again."""
        self._moved.set()

    async def read(self) -> Any:
        """As of a grpc.aio call."""
        while True:
            self._moved.clear()
            since = self._world.stalled_since(self.watcher, self.worker)
            if self._queue and self._queue[0][0] < since:
                wait = self._queue[0][0] - self._world.loop.time()
                if wait <= 0:
                    message = self._queue.popleft()[1]
                    self._has_room.set()
                    if isinstance(message, Ended):
                        raise message
                    return message
                await asyncio.sleep(wait)
            else:
                await self._moved.wait()

    def reset(self, *, loses: bool) -> None:
        """The connection breaks: what was under way may be lost."""
        if loses:
            self._queue.clear()
        self._sender.cancel()
        self._put(Ended(grpc.StatusCode.UNAVAILABLE))

    def cancel(self) -> None:
        """By the client; the server hears of it now."""
        self._world.streams.pop(self, None)
        self._sender.cancel()


class Answers:
    """What is behind the edge of a worker and of an agent, for questions about tokens."""

    def __init__(self, servicer: AgentServicer) -> None:
        self._servicer = servicer
        self._call: Any = SimpleNamespace(caller=ANYBODY, require_caller=_let_in)

    async def __call__(self, name: str, raw: bytes) -> bytes:
        """Raises AuthError and StateStale."""
        asked: Any = self._servicer.readers[name](raw)
        return bytes(await getattr(self._servicer, name)(asked, self._call))


async def _let_in(_scope: str) -> None:
    pass


class Wire:
    """A channel of grpc.aio, to one or another."""

    def __init__(
        self, world: "World", pick: Callable[[], Any], watcher: "Validator | None" = None
    ) -> None:
        self._world = world
        self._pick = pick
        self._watcher = watcher

    def unary_unary(self, path: str, **coding: Any) -> Any:
        """See grpc.aio.Channel."""

        async def call(request: Any, **_named: Any) -> Any:
            raw = coding["request_serializer"](request)
            return coding["response_deserializer"](await self._call(path.rpartition("/")[2], raw))

        return call

    def unary_stream(self, _path: str, **_coding: Any) -> Any:
        """See grpc.aio.Channel."""
        return lambda request: Stream(self._world, self._pick(), self._watcher, request)

    async def _call(self, name: str, raw: bytes) -> bytes:
        """What was done without an answer may be done again."""
        world = self._world
        for may_repeat in (world.rng.random() < 0.5, False):
            server = self._pick()
            try:
                return bytes(await world.call(server, partial(server.answer, name, raw), TIMEOUT_S))
            except (AuthError, StateStale) as error:
                told, _ = status.public(error)
                raise Ended(status.grpc_code(told.rule.code), told.reason) from error
            except Unknown:
                if not may_repeat:
                    break
                world.count("asked_again")
        raise Ended(grpc.StatusCode.UNAVAILABLE)


class Validator(Node):
    """A process that judges by itself: the state of the client, fed by streams."""

    def __init__(self, world: "World", name: str, then: WhenStale) -> None:
        super().__init__(name, world.loop, booted=world.rng.uniform(10, 1000))
        self.world = world
        self.then = then
        self.client = AuthsvcClient(Wire(world, self._a_worker, self))  # type: ignore[arg-type]
        self.validator = LocalValidator(
            self.client,
            issuer=ISSUER,
            staleness_max_s=world.staleness_s,
            when_stale=then,
            now=self.boot,
        )
        self.local = self.validator._local
        self._watcher = Watcher(
            self.client.stub, Watched(self.state), now=self.boot, draw=world.rng.random
        )

    @property
    def state(self) -> State:
        return self.local.state

    def _a_worker(self) -> Worker:
        return self.world.rng.choice([worker for worker in self.world.workers if worker.alive])

    def serve(self) -> None:
        """Begins to watch."""
        self.start(self._watcher._run())

    def serves(self) -> bool:
        """Whether it takes calls."""
        return self.alive

    def judge(self, token: str, question: Question) -> Verdict | None:
        """Raises StateStale where it refuses to judge."""
        try:
            return self.local.judge(token, question)
        except Unavailable as error:
            raise StateStale(self.local.age_s()) from error

    async def ask(self, token: str, **asked: Any) -> Verdict | RemoteVerdict:
        """As the service whose process it is. Raises Unknown and AuthsvcError."""
        answer = await self.world.call(self, lambda: self.validator.validate(token, **asked))
        return cast("Verdict | RemoteVerdict", answer)


class Agent(Validator):
    """One that others ask, put together as in authsvc.agent, without its edges."""

    def __init__(self, world: "World", name: str, then: WhenStale) -> None:
        super().__init__(world, name, then)
        self._answers = Answers(AgentServicer(Beside(self.local, self.client)))
        self._beside = AuthsvcClient(Wire(world, lambda: self))  # type: ignore[arg-type]

    async def answer(self, name: str, raw: bytes) -> bytes:
        """Of a question."""
        self.world.count("agent_asked")
        return await self._answers(name, raw)

    async def ask(self, token: str, **asked: Any) -> Verdict | RemoteVerdict:
        """As a process beside it."""
        return await self._beside.validate(token, **asked)
