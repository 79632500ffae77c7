"""The benches, and the one table of their budgets."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg

from authsvc.app import migrate
from authsvc.config import load
from authsvc_client.v1 import auth_pb2
from tests.servers import Postgres

from .load import Compared, Contender, Method, Round, take_turns, turn
from .processes import Answer, Cores, Server, authsvc, floor
from .scene import Scene, connect, scene

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Budget:
    """The bounds of a ratio."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        bounds = ((">=", self.least), ("<=", self.most))
        return " ".join(f"{sign}{bound:.2f}" for sign, bound in bounds if bound is not None)

    def holds(self, ratio: float) -> bool:
        """Whether the ratio keeps it, unrounded."""
        above = self.least is None or ratio >= self.least
        return above and (self.most is None or ratio <= self.most)


BUDGETS: Mapping[str, Budget] = {
    # Two equal servers: what this method of measuring finds between them is its error.
    "floor_echo": Budget(least=0.97, most=1.03),
    "validate_warm": Budget(least=0.90),
    # Server CPU above the floor's, in bare signature verifications.
    "validate_cold": Budget(most=1.5),
    # The floor signs once.
    "issue": Budget(least=0.75),
    # Transactions that write, a call: one statement that commits itself.
    "refresh": Budget(most=1.0),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int
    calls: int
    """Of a burst."""


FULL, QUICK = Size(rounds=60, calls=400), Size(rounds=3, calls=60)


@dataclass(frozen=True, slots=True)
class Stage:
    """authsvc, its scene, and where to put the floor."""

    scene: Scene
    authsvc: Server
    cores: Cores
    size: Size

    def same(self, request: bytes) -> list[list[bytes]]:
        """Batches of one request; one more than are counted."""
        return [[request] * self.size.calls] * (self.size.rounds + 1)

    @asynccontextmanager
    async def contenders(
        self, peer: str, method: str, request: bytes, *, signs: bool = False
    ) -> AsyncIterator[tuple[Contender, Contender]]:
        """The floor, which answers what authsvc answers to the request, and authsvc."""
        async with connect(self.scene.pki, peer, self.authsvc.port) as channel:
            real = Method(channel, method)
            [response] = await real.burst([request])
            answers = {method: Answer.of(f"{method}Request", response, signs=signs)}
            with floor(self.scene.pki, answers, self.cores.servers) as server:
                async with connect(self.scene.pki, peer, server.port) as floor_channel:
                    yield (
                        Contender(server, Method(floor_channel, method)),
                        Contender(self.authsvc, real),
                    )


async def floor_echo(stage: Stage) -> Line:
    """The floor against itself in another process."""
    [token] = await stage.scene.tokens(1)
    request = stage.scene.validation(token, auth_pb2.TOKEN_VIEW_VERDICT)
    async with (
        stage.contenders("billing", "ValidateToken", request) as (one, _),
        stage.contenders("billing", "ValidateToken", request) as (other, _),
    ):
        return _rates(Compared.of(await take_turns(one, other, stage.same(request))))


async def validate_warm(stage: Stage) -> Line:
    """ValidateToken of a token seen before; also with its claims in the answer."""
    verdict = await _warm(stage, auth_pb2.TOKEN_VIEW_VERDICT)
    claims = await _warm(stage, auth_pb2.TOKEN_VIEW_CLAIMS)
    return {
        **_rates(verdict),
        "claims_ratio": round(claims.rate_ratio, 4),
        "claims_cpu_us": round(claims.cpu_us, 1),
        "claims_floor_cpu_us": round(claims.floor_cpu_us, 1),
    }


async def _warm(stage: Stage, view: auth_pb2.TokenView.ValueType) -> Compared:
    [token] = await stage.scene.tokens(1)
    request = stage.scene.validation(token, view)
    async with stage.contenders("billing", "ValidateToken", request) as (echo, real):
        rounds = await take_turns(echo, real, stage.same(request))
    _require_active(rounds)
    return Compared.of(rounds)


async def validate_cold(stage: Stage) -> Line:
    """ValidateToken of tokens never seen before, each signature checked."""
    size, view = stage.size, auth_pb2.TOKEN_VIEW_VERDICT
    tokens = await stage.scene.tokens((size.rounds + 1) * size.calls + 1)
    requests = [stage.scene.validation(token, view) for token in tokens]
    batches = [requests[at : at + size.calls] for at in range(1, len(requests), size.calls)]
    async with stage.contenders("billing", "ValidateToken", requests[0]) as (echo, real):
        rounds = await take_turns(echo, real, batches, bare="verify")
    _require_active(rounds)
    compared = Compared.of(rounds)
    return {
        "value": round(median(r.real.cpu_s - r.floor.cpu_s for r in rounds) * 1e6, 1),
        "unit": "us of CPU above the floor",
        "floor": round(median(r.bare_s for r in rounds) * 1e6, 1),
        "ratio": median((r.real.cpu_s - r.floor.cpu_s) / r.bare_s for r in rounds),
        "cpu_us": round(compared.cpu_us, 1),
        "floor_cpu_us": round(compared.floor_cpu_us, 1),
        "rate": round(compared.rate),
        "busy": round(compared.busy, 2),
    }


async def issue(stage: Stage) -> Line:
    """IssueToken: client_credentials, the client authenticated by its certificate."""
    request = stage.scene.issue_request
    async with stage.contenders("orders", "IssueToken", request, signs=True) as (echo, real):
        rounds = await take_turns(echo, real, stage.same(request), bare="sign")
    answers = (auth_pb2.IssueTokenResponse.FromString(a) for r in rounds for a in r.real.answers)
    if not all(answer.token.access_token for answer in answers):
        raise RuntimeError("an answer without a token")
    sign_us = round(median(r.bare_s for r in rounds) * 1e6, 1)
    return {**_rates(Compared.of(rounds)), "sign_us": sign_us}


async def refresh(stage: Stage) -> Line:
    """RefreshToken on a PostgreSQL of its own: transactions a call, and rates beside a floor that
    signs and asks no database."""
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres())
        state_dir = Path(stack.enter_context(TemporaryDirectory(prefix="authsvc-bench-")))
        url = await postgres.database()
        await migrate(load(state_dir=state_dir, database={"url": url}), check=False)
        server = stack.enter_context(authsvc(state_dir, stage.cores.servers, url))
        async with scene(state_dir, server.port) as made:
            own = Stage(made, server, stage.cores, stage.size)
            tokens = await made.refresh_tokens(stage.size.calls + 1)
            request = made.refresh(tokens.pop())
            database = await asyncpg.connect(url.replace("+asyncpg", ""))
            try:
                async with own.contenders("orders", "RefreshToken", request, signs=True) as pair:
                    return await _refreshed(own, tokens, *pair, database)
            finally:
                await database.close()


async def _refreshed(
    stage: Stage,
    tokens: list[str],
    floor: Contender,
    real: Contender,
    database: "asyncpg.Connection[Any]",
) -> Line:
    """Each round uses what the round before answered, each grant once."""
    rounds, before, counted = [], 0, 0
    for number in range(stage.size.rounds + 1):
        requests = [stage.scene.refresh(token) for token in tokens]
        if number == 1:
            before = await _transactions(database)
        found = await turn(number, floor, real, requests)
        rounds.append(found)
        answers = map(auth_pb2.RefreshTokenResponse.FromString, found.real.answers)
        tokens = [answer.token.refresh_token for answer in answers]
        counted += len(tokens) * bool(number)
    after = await _transactions(database)
    rates = _rates(Compared.of(rounds[1:]))
    rate_ratio = round(rates["ratio"], 4)
    return {**rates, "ratio": (after - before - 1) / counted, "rate_ratio": rate_ratio}


async def _transactions(database: "asyncpg.Connection[Any]") -> int:
    """How many transactions wrote something until now; this one is the last of them."""
    return int(await database.fetchval("SELECT pg_current_xact_id()::text"))


BENCHES: Mapping[str, Callable[[Stage], Awaitable[Line]]] = {
    bench.__name__: bench for bench in (floor_echo, validate_warm, validate_cold, issue, refresh)
}


async def measure(name: str, stage: Stage) -> Line:
    """One line of the report."""
    line = await BENCHES[name](stage)
    budget = BUDGETS[name]
    judged = {"budget": str(budget), "ok": budget.holds(line["ratio"])}
    line = {"bench": name, **line, **judged, "pinned": stage.cores.pinned}
    return line | {"ratio": round(line["ratio"], 4)}


def _rates(compared: Compared) -> Line:
    return {
        "value": round(compared.rate),
        "unit": "requests/s",
        "floor": round(compared.floor_rate),
        "ratio": compared.rate_ratio,
        "cpu_us": round(compared.cpu_us, 1),
        "floor_cpu_us": round(compared.floor_cpu_us, 1),
        "busy": round(compared.busy, 2),
    }


def _require_active(rounds: Sequence[Round]) -> None:
    answers = (a for r in rounds for a in r.real.answers)
    if not all(auth_pb2.ValidateTokenResponse.FromString(answer).active for answer in answers):
        raise RuntimeError("an answer that is not active")
