"""A world made from a seed: who acts in it, what befalls it, and what must hold whatever does.

What the model promises, and by what it is judged:

1. A token that a change killed is accepted by no validator whose applied revision is that of the
   change or above, in the same epoch or a later one; and by none at all later than `staleness_max`
   after the commit (`open_for` where a validator has it, the resource's own bound where that is
   lower; plus by how much the database's clock was set, which ages are read from).
2. A validator that has applied the head, and is not stale, accepts every token that nothing killed.
3. The applied revision of a validator never goes back.
4. A refresh token has one successor, and is worth nothing once that was used; what is dead gives no
   more tokens, nor does who is suspended get one of a worker that has applied that.
5. What a validator refused as revoked it never accepts again; and nobody does, later than
   `staleness_max` after that.

Agents are validators that answer others, so all of it holds of their answers, too: whether by their
own state or by that of a worker which they asked, and of what a validator's worker answered. Ages
of state add up on the way there. What is on its way back was true at some moment since the question
was asked, so a question that comes later is never answered by less.

Lost commits: a failover without `synchronous` may lose the last of them, those that were answered
too. The promise holds for them all the same, as the epoch that opens then cuts off everything: what
was revoked stays dead because all is. What the new primary takes before anybody has opened the
epoch counts from there on. With `synchronous` nothing is lost, and nothing cut off. Where an old
backup is restored nobody can tell: the operator fences before any worker reads it.
"""

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from types import MappingProxyType
from typing import Any

from authsvc import mint
from authsvc.authenticate import Credentials
from authsvc.errors import AuthError, Reason
from authsvc.feed import follow, publish, recent, snapshot, watch
from authsvc.grants.proof import Exchange, Password
from authsvc.grants.token_exchange import ACCESS_TOKEN_TYPE, REFRESH_TOKEN_TYPE
from authsvc.issue import TokenRequest
from authsvc.keys.jwt import generate
from authsvc.mint import TokenAnswer
from authsvc.model import (
    AuthMethod,
    Caller,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
    KeyState,
    Peer,
    Resource,
    User,
    Validity,
)
from authsvc.refresh import RefreshRequest
from authsvc.revocations import Order
from authsvc.store.port import Change, change
from authsvc_client.core import judge, state
from authsvc_client.core.claims import Claims, parse_claims
from authsvc_client.core.judge import ANY_AUDIENCE, Question
from authsvc_client.core.jws import decode, json_object
from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.state import REVISIONS_PER_EPOCH, StateStale
from authsvc_client.errors import AuthsvcError
from authsvc_client.staleness import CLOSED, REMOTE, open_for
from tests.sim.loop import HandLoop
from tests.sim.memory import Memory, Tables
from tests.sim.nodes import LIVE, SEALER, WALL_S, Agent, Stream, Unknown, Validator, Worker

LEEWAY_S, SKEW_S, TOKEN_S_MAX, SWEEP_S = 6.0, 3.0, 8, 4.0
"""The world is a small one: lives are seconds, so that many end in one run."""
SMALL = (
    (judge, "LEEWAY_S", LEEWAY_S),
    (mint, "SKEW_S", SKEW_S),
    (state, "_SWEEP_S", SWEEP_S),
    (follow, "READ_S_MAX", 2.0),
    (follow, "PIECE_MARKERS", 4),
    (snapshot, "CHUNK_MARKERS_MAX", 4),
    (recent, "CHUNK_MARKERS_MAX", 4),
    (recent, "RECENT_MARKERS_MAX", 12),
    (watch, "MISSED_MORE", 3),
)
REVOKED = frozenset(
    {
        Reason.TOKEN_REVOKED,
        Reason.SESSION_ENDED,
        Reason.GRANT_REVOKED,
        Reason.TOKEN_CUT_OFF,
        Reason.TOKEN_KEY_TAINTED,
    }
)
API, SHOP_API = "https://api.test", "https://shop.test"
CALL_S = 8.0
PAGE_ROWS = 3
OPENING_S = 6.0
"""So much a validator's idea of the database's clock may be ahead: the time to open a stream."""
CHECKED_MAX = 6
"""Tokens that all validators are asked about after a step."""
TOLERANCE_S = 0.01
"""Ages travel in whole milliseconds."""
FOREVER = Validity(0, 1e11)
_CUTOFFS_OF_PARTY = (MarkerKind.CUTOFF_CLIENT, MarkerKind.CUTOFF_SUBJECT)


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(eq=False)
class Kill:
    """A change that kills, when it was committed."""

    revision: int
    changes: frozenset[Change]
    at: float
    is_fork: bool
    """On a primary that is new, before its epoch was opened; or its number was another's before."""
    is_below: bool
    """Of an epoch below one of a history that is lost: what a fence is, in the hour in which an
    epoch was opened. Who was in that one sees a head below its own, and opens another."""
    is_lost: bool = False
    """The database does not know it any more."""

    @property
    def epoch(self) -> int:
        return self.revision // REVISIONS_PER_EPOCH


@dataclass(eq=False)
class Token:
    """An access token, and what killed it."""

    name: str
    value: str
    claims: Claims
    marks: frozenset[Change]
    cutoffs: frozenset[Change]
    bound_s: float
    began: float
    """When it was asked for."""
    kills: list[Kill] = field(default_factory=list)
    refused_at: float | None = None
    """When a validator first refused it as revoked."""

    def must_die_by(self, kill: Kill) -> bool:
        """Not where the database forgot that a key was tainted, and goes on to sign by it, or an
        epoch, and goes on below it. Who saw that refuses these tokens, who did not takes them.
        """
        rev = self.claims.revision
        is_later = kill.at < self.began and rev // REVISIONS_PER_EPOCH < kill.epoch
        return not kill.is_lost or (rev <= kill.revision and not is_later)

    def dies_by(self, kill: Kill) -> bool:
        """By what the token says of itself."""
        if not self.marks.isdisjoint(kill.changes):
            return True
        return self.claims.revision < kill.revision and not self.cutoffs.isdisjoint(kill.changes)


@dataclass(eq=False)
class Family:
    """Refresh tokens of one grant, by generation, as its client and a thief know them."""

    client_id: str
    tokens: list[str]
    successors: dict[str, str] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    """When the first use of each was answered."""
    grant_id: str = ""


def peer_of(client_id: str) -> Peer:
    name = f"spiffe://test/{client_id}"
    return Peer(client_id, name, frozenset(), "", FOREVER, MappingProxyType({"ca": FOREVER}))


ADMIN = Caller("admin", "", frozenset({"admin"}), frozenset({ANY_AUDIENCE}), peer_of("admin"))


class World:
    """One run."""

    def __init__(self, seed: int, steps: int = 100) -> None:
        self.seed = seed
        self.rng = rng = Random(seed)
        self._sampling = Random(seed)
        self.loop = HandLoop()
        self.steps = steps
        self.trace: list[str] = []
        self.counts: Counter[str] = Counter()
        # What kind of a world it is.
        self.is_postgres = rng.random() < 0.7
        self.synchronous = self.is_postgres and rng.random() < 0.4
        self.staleness_s = rng.choice([5.0, 6.0, 9.0])
        self.has_redis_at_all = rng.random() < 0.7
        self.slow = rng.choice([0.0, 0.0, 0.05, 0.3])
        self.lossy = rng.choice([0.0, 0.02, 0.1])
        self.sets_clocks = rng.random() < 0.25
        self.cut_off_all = rng.random() < 0.5
        self.faults = rng.choice([0.1, 0.3])
        # The database.
        self.clock_shift = 0.0
        self.clock_set_s = 0.0
        """By how much in all."""
        self.clock_went_back = False
        self.clock_shift_max = 0.0
        self.copies: list[tuple[float, Tables]] = []
        self.hosts = 1
        self.database = self._database(Tables(beat=0.0 if self.is_postgres else None))
        self.database.tables.fingerprint = self.database.fingerprint
        self.kills: list[Kill] = []
        self.highest = 0
        """Revision that any history of the database had."""
        self.tokens: list[Token] = []
        self.families: list[Family] = []
        self.sessions: list[str] = []
        self.streams: dict[Stream, None] = {}
        self.stalled: dict[tuple[str, str], float] = {}
        """Ways on which nothing arrives, since when."""
        self.busy: dict[asyncio.Task[None], None] = {}
        self.seen: dict[Any, int] = {}
        self.refused: dict[Any, set[str]] = {}
        self.names = 0
        self._populate()
        self.workers = [Worker(self, f"w{n}") for n in range(rng.choice([1, 2, 2, 3]))]
        self.validators = [self._validator(Validator, "v0")]
        self.validators += [self._validator(Agent, f"a{n}") for n in range(rng.choice([1, 1, 2]))]

    # --- what it is made of ---

    def _database(self, tables: Tables) -> Memory:
        fingerprint = f"system:{self.hosts}" if self.is_postgres else "file"
        life = TOKEN_S_MAX + LEEWAY_S + SKEW_S + self.staleness_s
        made = Memory(
            self.database_time, fingerprint, tables, marker_lifetime_s=life, page_rows=PAGE_ROWS
        )
        made.committed = lambda revision, changes: self._committed(made, revision, changes)
        return made

    def _populate(self) -> None:
        t, now = self.database.tables, self.database_time()
        resources = {
            API: Resource(API, {"read": ""}, now, now, token_lifetime_s=8),
            SHOP_API: Resource(
                SHOP_API, {"buy": ""}, now, now, token_lifetime_s=6, staleness_max_s=5
            ),
        }
        t.resources.update(resources)
        for name in ("c0", "c1", "c2"):
            metadata = ClientMetadata(
                name,
                frozenset(GrantType),
                frozenset({AuthMethod.TLS_CLIENT_AUTH}),
                frozenset({"read", "buy"}),
                CertificateIdentity(IdentityKind.SAN_URI, f"spiffe://test/{name}", "ca"),
                validates=frozenset({ANY_AUDIENCE}),
                first_party=True,
            )
            t.clients[name] = Client(name, metadata, ClientState.APPROVED, now, now, "test")
        for name in ("u0", "u1"):
            t.users[name] = User(name, name, now, now)
        key = generate(SEALER, KeyState.CURRENT, now)
        t.keys[key.kid] = replace(key, activate_time=now)
        self._keep_copy()

    def _validator(self, kind: type[Validator], name: str) -> Validator:
        then = self.rng.choice([CLOSED, REMOTE, open_for(10), open_for(20)])
        return kind(self, name, then)

    def _anew(self, at: int) -> Validator:
        old = self.validators[at]
        old.kill()
        self.validators[at] = self._validator(type(old), old.name)
        return self.validators[at]

    # --- time, and the network ---

    def database_time(self) -> float:
        return WALL_S + self.loop.time() + self.clock_shift

    def latency(self) -> float:
        rng = self.rng
        if self.slow and rng.random() < 0.1:
            return rng.uniform(0, self.slow * 10)
        return rng.uniform(0.0005, 0.002 + self.slow)

    async def transit(self) -> None:
        await asyncio.sleep(self.latency())

    def loses_reply(self) -> bool:
        return self.rng.random() < self.lossy / 4

    def has_redis(self, worker: Worker) -> bool:
        return self.has_redis_at_all and worker.alive and worker.has_redis

    def published(self, sender: Worker, channel: str, message: bytes) -> bool:
        """Sends it to all who listen: late, in another order, twice, or not."""
        if not self.has_redis(sender):
            return False
        for worker in self.workers:
            if not self.has_redis(worker):
                continue
            times = self.rng.choices([1, 0, 2], [1 - 2 * self.lossy, self.lossy, self.lossy])[0]
            if times != 1:
                self.count("message_lost" if not times else "message_twice")
            for _ in range(times):
                late = self.latency() * self.rng.choice([1, 1, 10])
                self.loop.call_later(late, worker.bus.receive, channel, message)
        return True

    def stalled_since(self, validator: Validator, worker: Worker) -> float:
        return self.stalled.get((validator.name, worker.name), math.inf)

    # --- what is written down ---

    def say(self, *what: object) -> None:
        self.trace.append(f"{self.loop.time():9.3f} " + " ".join(map(str, what)))

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def _committed(self, database: Memory, revision: int, changes: list[Change]) -> None:
        is_fork = database.tables.fingerprint not in ("", database.fingerprint)
        is_fork |= revision <= self.highest
        is_below = revision // REVISIONS_PER_EPOCH < self.highest // REVISIONS_PER_EPOCH
        self.highest = max(self.highest, revision)
        kill = Kill(revision, frozenset(changes), self.loop.time(), is_fork, is_below)
        self.kills.append(kill)
        kinds = "+".join(one.kind.name for one in changes)
        self.say("commit", _short(revision), kinds, "(fork)" * is_fork)
        for token in self.tokens:
            if token.dies_by(kill):
                token.kills.append(kill)
        self._keep_copy(database)

    def _keep_copy(self, database: Memory | None = None) -> None:
        self.copies.append((self.loop.time(), (database or self.database).tables.copy()))

    def _add_token(
        self, client_id: str, answer: Any, via: str, began: float, applied: int = 0
    ) -> Token:
        """`applied` had whoever issued it when it was asked for, at least."""
        claims = parse_claims(json_object(decode(answer.access_token.split(".")[1])))
        kid = json_object(decode(answer.access_token.split(".")[0]))["kid"]
        marks = {
            *((MarkerKind.TOKEN_DEAD, jti) for jti in (claims.jti, claims.root_jti)),
            (MarkerKind.GRANT_DEAD, claims.grant_id),
            (MarkerKind.SESSION_DEAD, claims.session_id),
            *((MarkerKind.KEY_TAINTED, each) for each in (kid, *claims.key_ids)),
        }
        client, subject, actors = claims.client_id, claims.subject, claims.actors
        parties = (client, subject, *actors)
        pairs = {
            *((subject, party) for party in (client, *actors, *(actors and (subject,)))),
            *((actor, client) for actor in actors),
        }
        bounds = [5.0 for audience in claims.audiences if audience == SHOP_API]
        token = Token(
            f"t{len(self.tokens)}",
            answer.access_token,
            claims,
            frozenset(change(kind, its) for kind, its in marks if its),
            frozenset(
                {
                    change(MarkerKind.CUTOFF_EVERYTHING),
                    *(change(kind, party) for kind in _CUTOFFS_OF_PARTY for party in parties),
                    *(change(MarkerKind.CUTOFF_SUBJECT_CLIENT, *pair) for pair in pairs),
                }
            ),
            min([self.staleness_s, *bounds]),
            began,
        )
        token.kills += [kill for kill in self.kills if token.dies_by(kill)]
        if self.database.tables.clients[client_id].state is ClientState.SUSPENDED:
            # It was let in when it was read, so the suspension since kills it, whatever it says.
            kinds = (MarkerKind.CLIENT_CHANGED, MarkerKind.CUTOFF_CLIENT)
            suspended = {change(kind, client_id) for kind in kinds}
            since = [kill for kill in self.kills if kill.at >= began and not kill.is_lost]
            token.kills += [kill for kill in since if suspended <= kill.changes]
            touched = change(MarkerKind.CLIENT_CHANGED, client_id)
            for kill in [kill for kill in self.kills if touched in kill.changes][-1:]:
                is_sure = suspended <= kill.changes and not kill.is_lost and not kill.is_fork
                if is_sure and kill.revision <= applied < (kill.epoch + 1) * REVISIONS_PER_EPOCH:
                    raise Violation(f"4: {client_id} was given a token: {_say(kill)}")
        self.tokens.append(token)
        self.count(f"issued_{via}")
        self.say(token.name, "issued by", via, "to", client_id, "rev", _short(claims.revision))
        return token

    # --- the invariants ---

    def nodes(self) -> list[Any]:
        alive = [worker for worker in self.workers if worker.is_ready]
        return [node for node in (*alive, *self.validators) if node.alive and not node.paused]

    def check(self) -> None:
        """All invariants that can be seen from outside, now."""
        now = self.loop.time()
        over = self.database_time() - LEEWAY_S - 1
        recent = [token for token in self.tokens[-40:] if token.claims.expires > over]
        if len(recent) > CHECKED_MAX:
            recent = self._sampling.sample(recent, CHECKED_MAX)
        for node in self.nodes():
            if node.fault is not None:
                raise node.fault
            revision = node.state.revision
            if revision < self.seen.get(node, 0):
                raise Violation(f"3: {node.name} went back to {_short(revision)}")
            self.seen[node] = revision
            for token in recent:
                self._check(node, token, now)

    def _check(self, node: Any, token: Token, now: float) -> None:
        try:
            verdict = node.judge(token.value, question(token))
        except StateStale:
            self.count("stale")
            return
        if verdict is None and node.state.age(node.boot()) > token.bound_s:
            self.count("asked")  # a worker is
        elif verdict is not None and verdict.active:
            self.count("accepted")
            was_refused = token.name in self.refused.setdefault(node, set())
            self._require_alive(node, token, now, node.state.revision, was_refused)
        else:
            reason = verdict.reason if verdict is not None else Reason.TOKEN_KEY_UNKNOWN
            self._require_reason(node, token, reason, is_current=self._is_current(node))

    def _require_alive(
        self, node: Any, token: Token, asked_at: float, applied: int, was_refused: bool
    ) -> None:
        """Of one that was accepted: nothing had killed it when that was asked."""
        bound = max(token.bound_s, node.then.open_s if isinstance(node, Validator) else 0.0)
        bound += self.clock_set_s + TOLERANCE_S
        for kill in filter(token.must_die_by, token.kills):
            if asked_at > kill.at + bound:
                self._fail(1, node, token, f"killed at {kill.at:.3f} by {_say(kill)}")
            is_later = applied // REVISIONS_PER_EPOCH > kill.epoch
            if kill.is_below:
                continue
            if is_later or (applied >= kill.revision and not kill.is_fork):
                self._fail(1, node, token, f"although it applied {_say(kill)}")
        if not all(map(token.must_die_by, token.kills)):
            return
        if was_refused:
            self._fail(5, node, token, "which it refused before")
        if token.refused_at is not None and asked_at > token.refused_at + bound:
            self._fail(5, node, token, f"refused by somebody at {token.refused_at:.3f}")

    def _require_reason(self, node: Any, token: Token, reason: Reason, *, is_current: bool) -> None:
        """Of one that was refused, by who may have applied all that there is."""
        now = self.loop.time()
        if reason in REVOKED:
            self.count("refused")
            self.refused.setdefault(node, set()).add(token.name)
            if token.refused_at is None:
                token.refused_at = now
        if token.kills or not is_current:
            return
        latest = WALL_S + now + self.clock_shift_max + OPENING_S
        if reason is Reason.TOKEN_EXPIRED and latest >= token.claims.expires + LEEWAY_S:
            return
        if reason is Reason.TOKEN_NOT_YET_VALID and self.clock_set_s:
            return
        self._fail(2, node, token, f"refused: {reason.name}")

    def _is_current(self, node: Any) -> bool:
        t = self.database.tables
        is_one = t.fingerprint == self.database.fingerprint
        return is_one and bool(node.state.revision == t.head)

    def _fail(self, number: int, node: Any, token: Token, what: str) -> None:
        claims = token.claims
        raise Violation(
            f"{number}: {node.name} at {_short(node.state.revision)}, "
            f"{node.state.age(node.boot()):.3f} s old, {token.name} (rev {_short(claims.revision)},"
            f" client {claims.client_id}, subject {claims.subject}): {what}"
        )

    # --- calls ---

    async def call(
        self, worker: Any, what: Callable[[], Awaitable[Any]], timeout_s: float = CALL_S
    ) -> Any:
        """Of a client over the network. Raises AuthError, StateStale and Unknown."""
        await self.transit()
        if not worker.serves():
            raise Unknown
        task = worker.start(_finish(what))
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asyncio.shield(task)
        except (TimeoutError, asyncio.CancelledError) as error:
            if self.rng.random() < 0.5:
                task.cancel()
            raise Unknown from error
        await self.transit()
        if not worker.serves() or self.loses_reply():
            self.count("answer_lost")
            raise Unknown
        if isinstance(answer, Exception):
            raise answer
        return answer

    def a_worker(self) -> Worker:
        return self.rng.choice(self.workers)

    def a_client(self) -> str:
        return self.rng.choice(["c0", "c1", "c2"])

    def a_resource(self) -> tuple[str, ...]:
        return (self.rng.choice([API, API, SHOP_API]),)

    async def issue(self) -> None:
        client_id, worker = self.a_client(), self.a_worker()
        request = TokenRequest(
            GrantType.CLIENT_CREDENTIALS, Credentials(client_id), resources=self.a_resource()
        )
        began, applied = self.loop.time(), worker.state.revision
        answer = await self.call(worker, lambda: worker.issue_again(request, peer_of(client_id)))
        self._add_token(client_id, answer, "client_credentials", began, applied)

    async def login(self) -> None:
        client_id, worker = self.a_client(), self.a_worker()
        request = TokenRequest(
            GrantType.PASSWORD,
            Credentials(client_id),
            resources=self.a_resource(),
            password=Password(self.rng.choice(["u0", "u1"]), ""),
        )
        began = self.loop.time()
        answer = await self.call(worker, lambda: worker.issue(request, peer_of(client_id)))
        token = self._add_token(client_id, answer, "login", began)
        self.sessions.append(token.claims.session_id)
        self._add_family(client_id, answer, token.claims.grant_id)

    async def exchange(self) -> None:
        """For an access token, or for a refresh token."""
        if not self.tokens:
            return
        subject, worker = self.rng.choice(self.tokens[-8:]), self.a_worker()
        client_id = self.rng.choice(["c0", "c1", "c2"])
        refreshes = self.rng.random() < 0.4
        wanted = REFRESH_TOKEN_TYPE if refreshes else ACCESS_TOKEN_TYPE
        request = TokenRequest(
            GrantType.TOKEN_EXCHANGE,
            Credentials(client_id),
            resources=subject.claims.audiences,
            exchange=Exchange(subject.value, ACCESS_TOKEN_TYPE, requested_token_type=wanted),
        )
        began = self.loop.time()
        answer = await self.call(worker, lambda: worker.issue(request, peer_of(client_id)))
        if refreshes:
            self.count("granted")
            self._add_family(client_id, answer, "")
        else:
            self._add_token(client_id, answer, "exchange", began)

    def _add_family(self, client_id: str, answer: TokenAnswer, grant_id: str) -> None:
        self.families.append(Family(client_id, [answer.refresh_token], grant_id=grant_id))

    async def refresh(self) -> None:
        """With the newest token that is known, or by who has an old one."""
        if not self.families:
            return
        family, worker = self.rng.choice(self.families[-6:]), self.a_worker()
        steals = self.rng.random() < 0.4
        used = self.rng.choice(family.tokens) if steals else family.tokens[-1]
        request = RefreshRequest(used, Credentials(family.client_id))
        began = self.loop.time()
        try:
            answer = await self.call(
                worker, lambda: worker.refresh(request, peer_of(family.client_id))
            )
        except AuthError as error:
            if error.reason is Reason.REFRESH_TOKEN_REUSED:
                self.count("reused")
            raise
        before = family.successors.setdefault(used, answer.refresh_token)
        if before != answer.refresh_token:
            raise Violation("4: two successors of one refresh token")
        since = family.used.get(before)
        if since is not None and since < began:
            raise Violation("4: a refresh token was good after its successor was used")
        family.used.setdefault(used, self.loop.time())
        if before not in family.tokens:
            family.tokens.append(before)
        token = self._add_token(family.client_id, answer, "refresh", began)
        family.grant_id = token.claims.grant_id
        for kill in token.kills:
            # The grant itself died, before the call: nobody may have had a token of it.
            is_grant = change(MarkerKind.GRANT_DEAD, family.grant_id) in kill.changes
            is_known = not kill.is_lost and not kill.is_fork
            if is_grant and is_known and kill.at < began:
                raise Violation(f"4: a dead grant gave a token: {_say(kill)}")

    async def revoke(self) -> None:
        if not self.tokens:
            return
        token, worker = self.rng.choice(self.tokens[-8:]), self.a_worker()
        if self.rng.random() < 0.5:
            owner = token.claims.client_id
            await self.call(worker, lambda: worker.revoke.by_token(token.value, owner, dry=False))
        else:
            await self.call(worker, lambda: worker.revoke.by_jti(token.claims.jti, dry=False))
        self.count("revoked_token")

    async def revoke_refresh(self) -> None:
        if not self.families:
            return
        family, worker = self.rng.choice(self.families[-6:]), self.a_worker()
        used, owner = self.rng.choice(family.tokens), family.client_id
        await self.call(worker, lambda: worker.revoke.by_token(used, owner, dry=False))
        self.count("revoked_family")

    async def revoke_many(self) -> None:
        rng, worker = self.rng, self.a_worker()
        do, order = worker.revocations, Order("admin", "", dry=False)
        client_id, subject = self.a_client(), rng.choice(["u0", "u1", "c0", "c1"])
        grants = [family.grant_id for family in self.families if family.grant_id][-5:]
        kinds: dict[str, Callable[[], Awaitable[Any]]] = {
            "client": lambda: do.client(client_id, order),
            "subject": lambda: do.subject(subject, order),
            "subject_client": lambda: do.subject_client(subject, client_id, order),
        }
        if self.sessions:
            session_id = rng.choice(self.sessions[-5:])
            kinds["session"] = lambda: do.session(session_id, order)
        if grants:
            grant_id = rng.choice(grants)
            kinds["grant"] = lambda: do.grant(grant_id, order)
        if self.cut_off_all:
            kinds["everything"] = lambda: do.everything(order)
        kind = rng.choice(list(kinds))
        await self.call(worker, kinds[kind])
        self.count(f"revoked_{kind}")

    async def taint(self) -> None:
        worker = self.a_worker()

        async def do() -> Any:
            return await worker.ring.taint(worker.ring.signer.kid, dry=False)

        await self.call(worker, do)
        self.count("tainted")

    async def prepare(self) -> None:
        worker = self.a_worker()
        await self.call(worker, worker.ring.prepare)
        self.count("prepared")

    async def suspend(self) -> None:
        """And resumes, after a while."""
        client_id, worker = self.a_client(), self.a_worker()
        named: Any = {"comment": "", "version": None}
        await self.call(worker, lambda: worker.review.suspend(client_id, ADMIN, **named))
        self.count("suspended")
        while True:
            await asyncio.sleep(self.rng.uniform(0.1, 4))
            again = self.a_worker()
            try:
                await self.call(again, lambda: again.review.resume(client_id, ADMIN, **named))  # noqa: B023
            except (StateStale, Unknown):
                continue
            except AuthError as error:
                if error.reason is Reason.CLIENT_STATE_CONFLICT:
                    return
                continue
            return

    async def ask_strongly(self) -> None:
        """Whoever asks for it is answered by all that was committed before."""
        if not self.tokens:
            return
        token, worker = self.rng.choice(self.tokens[-6:]), self.a_worker()
        began = self.loop.time()

        async def do() -> Any:
            await worker.validate.catch_up(0)
            return await worker.validate(token.value, question(token))

        verdict = (await self.call(worker, do)).verdict
        self.count("strong")
        for kill in filter(token.must_die_by, token.kills):
            if verdict.active and kill.at < began and worker.database is self.database:
                self._fail(1, worker, token, f"strongly, although killed by {_say(kill)}")

    async def ask(self) -> None:
        """A validator or an agent, as its callers do: several at once."""
        recent = self.tokens[-8:]
        node, count = self.rng.choice(self.validators), min(len(recent), self.rng.choice([1, 3]))
        live = LIVE if self.rng.random() < 0.3 else frozenset()
        tokens = self.rng.sample(recent, count)
        await asyncio.gather(*(self._ask(node, token, live) for token in tokens))

    async def _ask(self, node: Validator, token: Token, live: frozenset[str]) -> bool:
        """Whether it was told."""
        began, applied, head = self.loop.time(), node.state.revision, self.database.tables.head
        was_refused = token.name in self.refused.setdefault(node, set())
        is_current = self._is_current(node)
        try:
            verdict = await node.ask(
                token.value, audience=token.claims.audiences[0], permissions=live
            )
        except (AuthsvcError, Unknown) as error:
            self.count("not_told")
            self.say(node.name, "cannot tell of", token.name, repr(error))
            return False
        is_current &= self._is_current(node) and self.database.tables.head == head
        self.count("told_active" if verdict.active else "told_refused")
        self.say(node.name, "tells of", token.name, verdict.reason.name)
        if verdict.active:
            applied = max(applied, verdict.revision)
            self._require_alive(node, token, began, applied, was_refused)
        else:
            self._require_reason(node, token, verdict.reason, is_current=is_current)
        return True

    # --- what befalls it ---

    async def compact(self) -> None:
        worker = self.a_worker()
        await self.call(worker, worker.compact)
        self.count("compacted")

    async def pause(self) -> None:
        """A process gets no turn: a validator, or a worker in the middle of whatever it does."""
        node = self.rng.choice([*self.workers, *self.validators])
        if node.paused or not node.alive:
            return
        node.paused = True
        self.count("paused")
        self.say("pause", node.name)
        await asyncio.sleep(self.rng.choice([0.05, 1.0, 4.0, 15.0]) * self.rng.random())
        if self.rng.random() < 0.4:  # what came before is there to be read, and then no more
            self.busy[self.loop.create_task(self._attempt(self.stall))] = None
            await asyncio.sleep(self.rng.choice([1.0, 8.0]) * self.rng.random())
        self.say("resume", node.name)
        node.resume()

    async def restart(self) -> None:
        """Its state is lost."""
        rng = self.rng
        if rng.random() < 0.6:
            at = rng.randrange(len(self.workers))
            old: Any = self.workers[at]
            old.kill()
            self.workers[at] = Worker(self, old.name)
            if rng.random() < 0.7:  # else the machine is gone, and nobody is told
                for stream in [each for each in self.streams if each.worker is old]:
                    stream.reset(loses=rng.random() < 0.5)
            new: Any = self.workers[at]
        else:
            at = rng.randrange(len(self.validators))
            old = self.validators[at]
            new = self._anew(at)
        self.count("restarted")
        self.say("restart", old.name)
        await asyncio.sleep(rng.choice([0.0, 0.5, 3.0]))
        new.serve()

    async def cut(self) -> None:
        """A worker from the database, or from Redis."""
        worker = self.a_worker()
        which = self.rng.choice(["is_cut", "has_redis"])
        self.say("cut", worker.name, which)
        self.count(f"cut_{which}")
        setattr(worker, which, which == "is_cut")
        await asyncio.sleep(self.rng.choice([0.5, 3.0, 12.0]) * self.rng.random())
        setattr(worker, which, which != "is_cut")
        self.say("mended", worker.name, which)

    async def stall(self) -> None:
        """Nothing arrives at a validator for a while, and then all of it; or it is lost."""
        validator = self.rng.choice(self.validators)
        ways = [(validator.name, worker.name) for worker in self.workers]
        self.stalled.update(dict.fromkeys(ways, self.loop.time()))
        self.count("stalled")
        self.say("stall", validator.name)
        await asyncio.sleep(self.rng.choice([0.3, 3.0, 12.0]) * self.rng.random())
        for way in ways:
            self.stalled.pop(way, None)
        self.say("flows", validator.name)
        resets = self.rng.random() < 0.4
        for stream in list(self.streams):
            if stream.watcher.name == validator.name:
                if resets:
                    stream.reset(loses=self.rng.random() < 0.5)
                stream.moved()

    async def reset(self) -> None:
        """Streams break."""
        self.count("reset")
        for stream in list(self.streams):
            if self.rng.random() < 0.5:
                stream.reset(loses=self.rng.random() < 0.5)

    async def outage(self) -> None:
        """The database is away."""
        database = self.database
        database.is_down = True
        self.count("outage")
        self.say("outage")
        await asyncio.sleep(self.rng.choice([0.5, 3.0, 12.0]) * self.rng.random())
        database.is_down = False
        self.say("outage over")

    async def failover(self) -> None:
        """To a standby, which lost the last commits unless they wait for it."""
        if not self.is_postgres or self.database.standby:
            return
        rng, old = self.rng, self.database
        lag_s = 0.0 if self.synchronous else rng.choice([0.0, 0.5, 3.0])
        since = self.loop.time() - lag_s * rng.random()
        tables = old.tables
        if lag_s:
            older = [copy for at, copy in self.copies if at <= since]
            tables = older[-1] if older else self.copies[0][1]
            self._lose(since)
        self.hosts += 1
        new = self._database(tables.copy())
        promoted, new.fingerprint, new.standby = new.fingerprint, "", True
        old.writable = False
        old.is_down = rng.random() < 0.6
        self.database = new
        self.copies = [(since, tables.copy())]
        self.count("failover")
        self.say("failover, head", _short(tables.head), "of", _short(old.tables.head))
        late = [worker for worker in self.workers if rng.random() < 0.3]
        for worker in self.workers:
            if worker not in late:
                worker.database = new
        await asyncio.sleep(rng.choice([0.0, 0.5, 3.0]))
        new.standby, new.fingerprint = False, promoted
        self.say("promoted", promoted)
        await asyncio.sleep(rng.choice([0.0, 2.0, 10.0]) * rng.random())
        for worker in self.workers:
            if worker.database is old:
                self.count("deposed")
                worker.database = self.database

    def _lose(self, since: float) -> None:
        self.highest = max(self.highest, self.database.tables.head)
        for kill in self.kills:
            if kill.at > since and not kill.is_lost:
                kill.is_lost = True
                self.count("commits_lost")

    async def restore(self) -> None:
        """An old backup takes the place of the database; it is fenced before anybody reads it."""
        if self.database.standby:
            return
        at, tables = self.rng.choice(self.copies)
        self._lose(at)
        if self.is_postgres:
            self.hosts += 1
        self.database.is_down = True
        self.database = new = self._database(tables.copy())
        self.say("restore as of", f"{at:.3f}")
        new.fence()
        self.copies = [(self.loop.time(), new.tables.copy())]
        self.count("restored")
        for worker in self.workers:
            worker.database = new

    async def set_clock(self) -> None:
        """The database's clock, or that of a worker."""
        by = self.rng.choice([-1, 1]) * self.rng.choice([0.3, 1.0, 4.0, 20.0]) * self.rng.random()
        if self.sets_clocks and self.rng.random() < 0.5:
            self.clock_shift += by
            self.clock_shift_max = max(self.clock_shift_max, self.clock_shift)
            self.clock_set_s += abs(by)
            self.clock_went_back |= by < 0
            self.count("database_clock_set")
            self.say("database clock set by", f"{by:.3f}")
        else:
            self.a_worker().wall_shift += by * 1000
            self.count("clock_set")

    # --- a run ---

    async def live(self) -> None:
        """Acts until its steps are over; then all is mended, and has to be well again."""
        for worker in self.workers:
            worker.serve()
        for validator in self.validators:
            validator.serve()
        actions: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self.issue, 8),
            (self.login, 3),
            (self.exchange, 3),
            (self.refresh, 5),
            (self.revoke, 4),
            (self.revoke_refresh, 1),
            (self.revoke_many, 3),
            (self.taint, 0.4),
            (self.prepare, 0.3),
            (self.suspend, 1),
            (self.ask_strongly, 2),
            (self.ask, 8),
            (self.compact, 1),
        ]
        faults: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self.pause, 3),
            (self.restart, 2),
            (self.cut, 3),
            (self.stall, 3),
            (self.reset, 1),
            (self.outage, 1),
            (self.failover, 1.5),
            (self.restore, 0.3),
            (self.set_clock, 1),
        ]
        await asyncio.sleep(1.0)
        for _ in range(self.steps):
            chosen = faults if self.rng.random() < self.faults else actions
            [do] = self.rng.choices([each for each, _ in chosen], [weight for _, weight in chosen])
            self._begin(do)
            await asyncio.sleep(self.rng.choice([0.0, 0.01, 0.1, 0.5, 1.5]) * self.rng.random())
            self._collect()
            self.check()
        while self.busy:
            await asyncio.sleep(0.5)
            self._collect()
            self.check()
        await self._heal()

    def _begin(self, do: Callable[[], Awaitable[None]]) -> None:
        if len(self.busy) < 12:
            self.busy[self.loop.create_task(self._attempt(do))] = None

    async def _attempt(self, do: Callable[[], Awaitable[None]]) -> None:
        try:
            await do()
        except AuthError as error:
            self.count("error")
            self.say(do.__name__, error.reason.name)
        except (StateStale, Unknown) as error:
            self.count("no_answer")
            self.say(do.__name__, type(error).__name__)

    def _collect(self) -> None:
        for task in [task for task in self.busy if task.done()]:
            del self.busy[task]
            task.result()

    async def _heal(self) -> None:
        """Without faults all validators are current within seconds, and good tokens are taken."""
        self.say("healing")
        self.lossy = self.slow = 0.0
        for stream in list(self.streams):  # some took long to open, and are worth less for it
            stream.reset(loses=True)
        for node in self.nodes():
            node.resume()
        for turn in range(40):
            await asyncio.sleep(0.5)
            self.check()
            for at, validator in enumerate(self.validators):
                # It saw an epoch that was lost, and that nobody who lives can know of.
                if turn == 20 and validator.state.revision > self.database.tables.head:
                    self.count("stranded")
                    self._anew(at).serve()
            if all(self._is_current(node) and self._is_fresh(node) for node in self.nodes()):
                break
        else:
            told = [
                f"{node.name} at {_short(node.state.revision)}, {node.state.age(node.boot()):.1f} s"
                for node in self.nodes()
            ]
            head = _short(self.database.tables.head)
            raise Violation(f"6: not well again, the head is {head}: {'; '.join(told)}")
        made = []
        for worker in self.workers:
            request = TokenRequest(GrantType.PASSWORD, Credentials("c0"), resources=(API,))
            request = replace(request, password=Password("u0", ""))
            if self.database.tables.clients["c0"].state is ClientState.APPROVED:
                try:
                    answer = await worker.issue(request, peer_of("c0"))
                except AuthError as error:
                    if error.reason is Reason.STATE_STALE and self.clock_went_back:
                        continue
                    raise Violation(f"6: not well again: {error.reason.name}") from error
                made.append(self._add_token("c0", answer, "login", self.loop.time()))
        await asyncio.sleep(1.0)
        self.check()
        for node in self.validators:
            for token in made:
                if not await self._ask(node, token, LIVE):
                    raise Violation(f"6: {node.name} is not well again")
        self.count("healed")

    def _is_fresh(self, node: Any) -> bool:
        return bool(node.state.age(node.boot()) <= 5.0)

    async def _end(self) -> None:
        for task in self.busy:
            task.cancel()
        for node in (*self.workers, *self.validators):
            node.kill()
        for _ in range(20):
            await asyncio.sleep(0)


@contextmanager
def small(rng: Random) -> Iterator[None]:
    """In a small world, where what keeps processes apart comes from the seed too."""
    draw: Any = lambda span: rng.random() * span  # noqa: E731
    patches = [*SMALL, (publish, "jitter", draw), (watch, "jitter", draw)]
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def run(seed: int, steps: int = 100) -> World:
    """The world of a seed, after its end. Raises Failed, with the seed and its last events."""
    world = World(seed, steps)
    play(world, world.live())
    return world


def play(world: World, history: Coroutine[Any, Any, None]) -> None:
    """What happens in a world, and its end. Raises Failed."""
    loop = world.loop
    loop.set_exception_handler(lambda _loop, _context: None)
    with small(world.rng):
        try:
            loop.run_until_complete(history)
        except Exception as error:
            raise Failed(world, error) from error
        finally:
            loop.run_until_complete(world._end())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


class Failed(AssertionError):
    """A run that ended badly."""

    def __init__(self, world: World, error: Exception) -> None:
        self.world = world
        self.error = error
        last = "\n".join(world.trace[-60:])
        super().__init__(
            f"seed {world.seed}: {type(error).__name__}: {error}\n{last}\n"
            f"replay: AUTHSVC_SIM_SEED={world.seed} pytest tests/sim/test_sim.py"
        )


async def _finish(what: Callable[[], Awaitable[Any]]) -> Any:
    """Its answer, or the error that it answers with."""
    try:
        return await what()
    except (AuthError, StateStale, AuthsvcError) as error:
        return error


def question(token: Token) -> Question:
    return _QUESTIONS[token.claims.audiences[0]]


_QUESTIONS = {
    audience: Question(frozenset({ANY_AUDIENCE}), audience) for audience in (API, SHOP_API)
}


def _short(revision: int) -> str:
    return f"{revision // REVISIONS_PER_EPOCH}:{revision % REVISIONS_PER_EPOCH}"


def _say(kill: Kill) -> str:
    kinds = "+".join(one.kind.name for one in kill.changes)
    return f"{kinds} at {_short(kill.revision)}"
