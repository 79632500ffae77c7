"""The benches, and the one table of their budgets."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import asyncpg

from authsvc.app import migrate
from authsvc.config import load
from authsvc_client.v1 import auth_pb2
from tests.servers import Postgres

from .growth import growth
from .load import Compared, Contender, Method, take_turns, turn
from .local import local_cold, local_warm
from .people import password_beside_validate, permissions_reach, validate_full_warm
from .processes import authsvc
from .reach import revocation_reach
from .scene import connect, scene
from .stage import Budget, Line, Stage, rates, require_active, warm
from .ways import agent, ways
from .workers import workers

BUDGETS: Mapping[str, Budget] = {
    # Two equal servers: what this method of measuring finds between them is its error.
    "floor_echo": Budget(least=0.97, most=1.03),
    "validate_warm": Budget(least=0.90),
    # Server CPU above the floor's, in bare signature verifications.
    "validate_cold": Budget(most=1.5),
    # Tokens a CPU second, those of one call each being 1.
    "batch": Budget(least=10.0),
    # The floor signs once.
    "issue": Budget(least=0.75),
    # A token seen before, in 2 us.
    "local_warm": Budget(most=1.0),
    # In bare signature verifications.
    "local_cold": Budget(most=1.3),
    # Transactions that write, a call: one statement that commits itself.
    "refresh": Budget(most=1.0),
    # None is set: `verdict_ratio` is what the same token reaches without its permissions.
    "validate_full_warm": Budget(),
    # The slowest of a hundred, in intervals of the poll that finds changes without Redis.
    "permissions_reach": Budget(most=1.1),
    # The worse of two: p99 in 50 ms with Redis, in 1.1 s without.
    "revocation_reach": Budget(most=1.0),
    # The median while passwords are hashed, of that while none are.
    "password_beside_validate": Budget(most=1.1),
    # The worst of three: warm and cold in 1.05, and a live revocation in 120 bytes of memory.
    "growth": Budget(most=1.0),
    # None is set: CPU of a request, agent and caller, in that of the floor.
    "agent": Budget(),
    # None is set: CPU of a token judged locally, in that of a remote one.
    "ways": Budget(),
    # Two workers, in what one answers.
    "workers": Budget(least=1.7),
}


async def floor_echo(stage: Stage) -> Line:
    """The floor against itself in another process."""
    [token] = await stage.scene.tokens(1)
    request = stage.scene.validation(token, auth_pb2.TOKEN_VIEW_VERDICT)
    async with (
        stage.contenders("billing", "ValidateToken", request) as (one, _),
        stage.contenders("billing", "ValidateToken", request) as (other, _),
    ):
        return rates(Compared.of(await take_turns(one, other, stage.same(request))))


async def validate_warm(stage: Stage) -> Line:
    """ValidateToken of a token seen before; also with its claims in the answer."""
    verdict = await _warm(stage, auth_pb2.TOKEN_VIEW_VERDICT)
    claims = await _warm(stage, auth_pb2.TOKEN_VIEW_CLAIMS)
    return {
        **rates(verdict),
        "claims_ratio": round(claims.rate_ratio, 4),
        "claims_cpu_us": round(claims.cpu_us, 1),
        "claims_floor_cpu_us": round(claims.floor_cpu_us, 1),
    }


async def _warm(stage: Stage, view: auth_pb2.TokenView.ValueType) -> Compared:
    [token] = await stage.scene.tokens(1)
    return await warm(stage, stage.scene.validation(token, view))


async def validate_cold(stage: Stage) -> Line:
    """ValidateToken of tokens never seen before, each signature checked."""
    size, view = stage.size, auth_pb2.TOKEN_VIEW_VERDICT
    tokens = await stage.scene.tokens((size.rounds + 1) * size.calls + 1)
    requests = [stage.scene.validation(token, view) for token in tokens]
    batches = [requests[at : at + size.calls] for at in range(1, len(requests), size.calls)]
    async with stage.contenders("billing", "ValidateToken", requests[0]) as (echo, real):
        rounds = await take_turns(echo, real, batches, bare="verify")
    require_active(rounds)
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


BATCH_TOKENS = 100


async def batch(stage: Stage) -> Line:
    """BatchValidateTokens of warm tokens, beside ValidateToken of each."""
    tokens = await stage.scene.tokens(BATCH_TOKENS)
    each = [stage.scene.validation(token, auth_pb2.TOKEN_VIEW_VERDICT) for token in tokens]
    together = auth_pb2.BatchValidateTokensRequest(
        requests=map(auth_pb2.ValidateTokenRequest.FromString, each)
    ).SerializeToString()
    alone_s, batched_s, answers = [], [], list[bytes]()
    async with connect(stage.scene.pki, "billing", stage.authsvc.port) as channel:
        alone, batched = (
            Contender(stage.authsvc, Method(channel, method))
            for method in ("ValidateToken", "BatchValidateTokens")
        )
        for number in range(stage.size.rounds + 1):
            unary = await alone.run(each)
            many = await batched.run([together] * 20)
            if number:
                alone_s.append(unary.cpu_s)
                batched_s.append(many.cpu_s / BATCH_TOKENS)
                answers += many.answers
    found = map(auth_pb2.BatchValidateTokensResponse.FromString, answers)
    if not all(result.verdict.active for response in found for result in response.results):
        raise RuntimeError("an answer that is not active")
    return {
        "value": round(1 / median(batched_s)),
        "unit": "tokens/CPU s",
        "floor": round(1 / median(alone_s)),
        "ratio": median(one / many for one, many in zip(alone_s, batched_s, strict=True)),
        "cpu_us": round(median(batched_s) * 1e6, 2),
        "floor_cpu_us": round(median(alone_s) * 1e6, 1),
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
    return {**rates(Compared.of(rounds)), "sign_us": sign_us}


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
    line = rates(Compared.of(rounds[1:]))
    rate_ratio = round(line["ratio"], 4)
    return {**line, "ratio": (after - before - 1) / counted, "rate_ratio": rate_ratio}


async def _transactions(database: "asyncpg.Connection[Any]") -> int:
    """How many transactions wrote something until now; this one is the last of them."""
    return int(await database.fetchval("SELECT pg_current_xact_id()::text"))


BENCHES: Mapping[str, Callable[[Stage], Awaitable[Line]]] = {
    bench.__name__: bench
    for bench in (
        floor_echo,
        validate_warm,
        validate_cold,
        batch,
        local_warm,
        local_cold,
        issue,
        refresh,
        validate_full_warm,
        permissions_reach,
        revocation_reach,
        password_beside_validate,
        agent,
        ways,
        growth,
        workers,
    )
}


async def measure(name: str, stage: Stage) -> Line:
    """One line of the report."""
    line = await BENCHES[name](stage)
    budget = BUDGETS[name]
    judged = {"budget": str(budget), "ok": budget.holds(line["ratio"])}
    line = {"bench": name, **line, **judged, "pinned": stage.cores.pinned}
    return line | {"ratio": round(line["ratio"], 4)}
