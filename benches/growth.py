"""What a grown system costs: a million clients, a million live revocations, and many grants."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Self

import asyncpg

from authsvc.app import migrate
from authsvc.config import load
from authsvc_client.core.markers import KEY_BYTES, MARKER_LIFETIME_S, Marker, MarkerKind
from authsvc_client.core.state import State
from authsvc_client.v1 import auth_pb2
from tests.servers import Postgres

from .load import Compared, Contender, Method, Round, turn
from .processes import Server, authsvc
from .scene import Scene, connect, scene
from .stage import FULL, Line, Stage, require_active

SLOWER_MAX = 1.05
MARK_BYTES_MAX = 120
GRANTS_MAX = 10_000_000
GRANTS_S_MAX = float(os.environ.get("GROWTH_GRANTS_S", "120"))
"""As many as this leaves time for are made."""
PIECE = 20_000

_MARKS = f"""
WITH head AS (
  UPDATE feed_head SET revision = revision + $1, nonce = 'grown' RETURNING revision - $1 AS below)
INSERT INTO feed (revision, kind, key, until, nonce)
SELECT below + i, {int(MarkerKind.TOKEN_DEAD)}, decode(md5((below + i)::text), 'hex'),
  extract(epoch FROM clock_timestamp()) + {MARKER_LIFETIME_S}, 'grown'
FROM head, generate_series(1, $1) AS i"""
_CLIENTS = """
INSERT INTO client SELECT more.* FROM client AS one, generate_series($2::int, $3::int) AS i,
  jsonb_populate_record(one, jsonb_build_object('client_id', one.client_id || i,
    'identity_value', one.identity_value || i,
    'registration_digest', '\\x' || md5(i::text))) AS more
WHERE one.client_id = $1"""
_GRANTS = """
INSERT INTO "grant" ({columns}) SELECT {values} FROM "grant" AS one,
  generate_series($2::int, $3::int) AS i WHERE one.grant_id = $1"""
_OTHER = {"grant_id": "one.grant_id || i", "handle": "decode(md5(i::text), 'hex')"}
_INDEXES = """
SELECT indexname, indexdef, conname IS NOT NULL AS is_constraint FROM pg_indexes
LEFT JOIN pg_constraint ON conname = indexname
WHERE tablename = 'grant' AND indexname <> 'grant_pkey'"""


async def growth(stage: Stage) -> Line:
    """ValidateToken of a server on a grown system beside one on an empty one, by the CPU time of a
    call. `ratio` is the worst of three: warm and cold in what they may be slower, and the memory of
    a live revocation in what it may take."""
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres())
        async with _System.fresh(stage, postgres) as empty, _System.fresh(stage, postgres) as grown:
            found: Line = dict(await _grow(stage, grown))
            async with empty.another() as small, grown.another() as large:
                bytes_a_mark = (large.server.rss() - small.server.rss()) / found["marks"]
                pair = (empty, small), (grown, large)
                warm = await _compare(stage, *pair, cold=False)
                cold = await _compare(stage, *pair, cold=True)
                found |= {
                    "mark_bytes": round(bytes_a_mark, 1),
                    "start_s": round(large.start_s, 2),
                    "empty_start_s": round(small.start_s, 2),
                    "peak_mb": round(large.server.rss(peak=True) / 1e6),
                    "empty_peak_mb": round(small.server.rss(peak=True) / 1e6),
                    **await _reload(grown, large),
                    "sweep_pause_ms": round(_sweep(stage.size.grown) * 1e3, 2),
                }
    slower = [median(r.real.cpu_s / r.floor.cpu_s for r in rounds) for rounds in (warm, cold)]
    compared = Compared.of(warm)
    return {
        "value": round(compared.rate),
        "unit": "requests/s",
        "floor": round(compared.floor_rate),
        "ratio": max(max(slower) / SLOWER_MAX, bytes_a_mark / MARK_BYTES_MAX),
        "cpu_us": round(compared.cpu_us, 1),
        "floor_cpu_us": round(compared.floor_cpu_us, 1),
        "busy": round(compared.busy, 2),
        "warm_slower": round(slower[0], 4),
        "cold_slower": round(slower[1], 4),
        **found,
    }


@dataclass(frozen=True, slots=True)
class _Replica:
    """A server of a system, started late, that answers ValidateToken to billing."""

    server: Server
    method: Method
    start_s: float


@dataclass(frozen=True, slots=True)
class _System:
    """A database of its own, and the server that its scene was made with."""

    stage: Stage
    state_dir: Path
    url: str
    scene: Scene

    @classmethod
    @asynccontextmanager
    async def fresh(cls, stage: Stage, postgres: Postgres) -> AsyncIterator[Self]:
        """With nothing in it but a scene."""
        with TemporaryDirectory(prefix="authsvc-bench-") as directory:
            state_dir = Path(directory)
            url = await postgres.database()
            await migrate(load(state_dir=state_dir, database={"url": url}), check=False)
            with authsvc(state_dir, stage.cores.servers, url) as server:
                async with scene(state_dir, server.port) as made:
                    yield cls(stage, state_dir, url, made)

    @asynccontextmanager
    async def another(self) -> AsyncIterator[_Replica]:
        """One more server, as after a restart."""
        started = time.perf_counter()
        with authsvc(self.state_dir, self.stage.cores.servers, self.url) as server:
            start_s = time.perf_counter() - started
            async with connect(self.scene.pki, "billing", server.port) as channel:
                yield _Replica(server, Method(channel, "ValidateToken"), start_s)

    async def validations(self, count: int) -> list[bytes]:
        """Requests that ask for tokens never seen before."""
        view = auth_pb2.TOKEN_VIEW_VERDICT
        return [self.scene.validation(token, view) for token in await self.scene.tokens(count)]


async def _grow(stage: Stage, system: _System) -> dict[str, int]:
    """Fills the tables, in pieces that leave the server its turn; how many rows."""
    await system.scene.refresh_tokens(1)
    database = await asyncpg.connect(system.url.replace("+asyncpg", ""))
    size = stage.size.grown
    marks = 0
    try:
        piece = min(PIECE, size)
        for low in range(1, size + 1, piece):
            high = min(low + piece - 1, size)
            await database.execute(_CLIENTS, system.scene.client_id, low, high)
        grants = await _grant(database, GRANTS_MAX * size // FULL.grown, piece)
        while marks < size:
            await database.execute(_MARKS, piece)
            marks += piece
        await database.execute("ANALYZE")
    finally:
        await database.close()
    return {"marks": marks, "clients": size, "grants": grants}


async def _grant(database: "asyncpg.Connection[asyncpg.Record]", most: int, piece: int) -> int:
    """Copies the one grant there is; to make the indexes afterwards is faster."""
    one = await database.fetchrow('SELECT * FROM "grant"')
    assert one is not None
    columns = {f'"{name}"': _OTHER.get(name, f'one."{name}"') for name in one.keys()}  # noqa: SIM118
    copy = _GRANTS.format(columns=", ".join(columns), values=", ".join(columns.values()))
    indexes = await database.fetch(_INDEXES)
    for name, _, is_constraint in indexes:
        drop = 'ALTER TABLE "grant" DROP CONSTRAINT' if is_constraint else "DROP INDEX"
        await database.execute(f"{drop} {name}")
    grants, until = 0, time.monotonic() + GRANTS_S_MAX
    while grants < most and time.monotonic() < until:
        await database.execute(copy, one["grant_id"], grants + 1, grants + piece)
        grants += piece
    await database.execute("SET maintenance_work_mem = '1GB'")
    for _, definition, _ in indexes:
        await database.execute(definition)
    return grants


async def _compare(
    stage: Stage, small: tuple[_System, _Replica], large: tuple[_System, _Replica], *, cold: bool
) -> list[Round]:
    """Rounds of ValidateToken at both, of one token each or of tokens never seen before."""
    count = (stage.size.rounds + 1) * stage.size.calls if cold else 1
    systems = small, large
    asked = [await system.validations(count) for system, _ in systems]
    floor, real = (Contender(replica.server, replica.method) for _, replica in systems)
    rounds = []
    for number in range(stage.size.rounds + 1):
        at = number * stage.size.calls * cold
        ours, theirs = (
            requests[at : at + stage.size.calls] if cold else requests * stage.size.calls
            for requests in asked
        )
        rounds.append(await turn(number, floor, real, ours, theirs=theirs))
    require_active(rounds)
    return rounds[1:]


async def _reload(system: _System, replica: _Replica) -> dict[str, float]:
    """Another history: the server takes a new snapshot while it answers."""
    [request] = await system.validations(1)
    replica.server.pause_s()
    database = await asyncpg.connect(system.url.replace("+asyncpg", ""))
    try:
        await database.execute("UPDATE feed_head SET fingerprint = 'another'")
    finally:
        await database.close()
    started = time.perf_counter()
    while True:  # until the cutoff that opens the epoch, the last of the snapshot
        [answer] = await replica.method.burst([request])
        if not auth_pb2.ValidateTokenResponse.FromString(answer).active:
            break
        await asyncio.sleep(0.005)
    return {
        "reload_s": round(time.perf_counter() - started, 2),
        "reload_pause_ms": round(replica.server.pause_s() * 1e3, 2),
    }


def _sweep(size: int) -> float:
    """CPU seconds of the longest confirmation while as many marks run out as in one second."""
    state, now = State(120.0), 1_700_000_000.0
    keys = (os.urandom(KEY_BYTES) for _ in range(size))
    state.apply((Marker(MarkerKind.TOKEN_DEAD, key, 1, now + 1) for key in keys), 1)
    longest_s = 0.0
    for second in range(100, 100 + size // 1000):
        started = time.thread_time()
        state.confirm(second, now + second)
        longest_s = max(longest_s, time.thread_time() - started)
    return longest_s
