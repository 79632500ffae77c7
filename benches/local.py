"""Tokens judged in the caller's own process, which watches authsvc meanwhile."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

from authsvc.config import load
from authsvc_client import (
    AuthsvcClient,
    Certificates,
    LocalValidator,
    SyncAuthsvcClient,
    SyncLocalValidator,
    sync_channel,
)
from authsvc_client.v1 import auth_pb2

from .load import Method
from .scene import AUDIENCE, SCOPE, Scene, connect, files_of
from .serve import BARE
from .stage import Line, Stage

WARM_US_MAX = 2.0
"""The budget of a token seen before."""
TOKENS = 100
"""In turn, half as many again being dead."""
TURNS = 40
"""Of all tokens, in a round."""

Validate = Callable[..., Awaitable[Any]]


def asked(made: Scene) -> dict[str, Any]:
    """What the interceptor of a server asks for each call that it serves."""
    return {
        "audience": AUDIENCE,
        "scopes": frozenset({SCOPE}),
        "thumbprint": made.thumbprint,
    }


@asynccontextmanager
async def watching(stage: Stage) -> AsyncIterator[LocalValidator]:
    """A validator that is up to date."""
    async with (
        connect(stage.scene.pki, "billing", stage.authsvc.port) as channel,
        LocalValidator(AuthsvcClient(channel), issuer=issuer(stage)) as validator,
    ):
        await validator.ready()
        yield validator


def issuer(stage: Stage) -> str:
    """Of the stage's authsvc."""
    return load(state_dir=stage.scene.pki.parent).issuer


async def local_warm(stage: Stage) -> Line:
    """LocalValidator.validate of tokens seen before, in CPU time of the thread; others are dead."""
    tokens, given = await stage.scene.tokens(TOKENS * 3 // 2), asked(stage.scene)
    live, dead = tokens[:TOKENS], tokens[TOKENS:]
    revision = await _revoke(stage, dead)
    with (
        _blocking_client(stage) as client,
        SyncLocalValidator(client, issuer=issuer(stage)) as blocking,
    ):
        async with watching(stage) as validator:
            await asyncio.to_thread(blocking.ready)
            while min(validator.revision, blocking.revision) < revision:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for token in tokens:
                judged = await validator.validate(token, **given), blocking.validate(token, **given)
                if {each.active for each in judged} != {token in live}:
                    raise RuntimeError("a verdict that is wrong")
            found = [
                (
                    await _each(validator.validate, live, given),
                    await _each(_lookup(live), live, given),
                    _each_blocking(blocking, live, given),
                )
                for _ in range(stage.size.rounds)
            ]
            if validator.counts.remote or blocking.counts.remote:
                raise RuntimeError("authsvc was asked")
    each, lookups, blocking_each = zip(*found, strict=True)
    return {
        "value": round(median(each), 3),
        "unit": "us a token",
        "floor": WARM_US_MAX,
        "ratio": median(each) / WARM_US_MAX,
        "least": round(min(each), 3),
        "sync_us": round(median(blocking_each), 3),
        "lookup_us": round(median(lookups), 3),
        "tokens": TOKENS,
    }


def _lookup(tokens: Sequence[str]) -> Validate:
    """What the same call costs that only looks into a dictionary."""
    known = dict.fromkeys(tokens, True)

    async def validate(
        token: str,
        *,
        audience: str,
        scopes: frozenset[str],
        thumbprint: str,
    ) -> bool:
        return known[token]

    return validate


def _blocking_client(stage: Stage) -> SyncAuthsvcClient:
    files = files_of(stage.scene.pki, "billing")
    target = f"localhost:{stage.authsvc.port}"
    return SyncAuthsvcClient(sync_channel(target, Certificates.from_files(*files)))


async def _each(
    validate: Validate, tokens: Sequence[str], given: dict[str, Any], turns: int = TURNS
) -> float:
    """Microseconds a token."""
    audience, scopes, thumbprint = given.values()
    gc.collect()
    started = time.thread_time()
    for _ in range(turns):
        for token in tokens:
            await validate(token, audience=audience, scopes=scopes, thumbprint=thumbprint)
    return (time.thread_time() - started) / (turns * len(tokens)) * 1e6


def _each_blocking(
    validator: SyncLocalValidator, tokens: Sequence[str], given: dict[str, Any]
) -> float:
    audience, scopes, thumbprint = given.values()
    validate = validator.validate
    gc.collect()
    started = time.thread_time()
    for _ in range(TURNS):
        for token in tokens:
            validate(token, audience=audience, scopes=scopes, thumbprint=thumbprint)
    return (time.thread_time() - started) / (TURNS * len(tokens)) * 1e6


async def _revoke(stage: Stage, tokens: Sequence[str]) -> int:
    """The revision from which they are dead."""
    async with connect(stage.scene.pki, "orders", stage.authsvc.port) as channel:
        answers = await Method(channel, "RevokeToken").burst(
            [auth_pb2.RevokeTokenRequest(token=token).SerializeToString() for token in tokens]
        )
    return max(auth_pb2.RevokeTokenResponse.FromString(answer).revision for answer in answers)


async def local_cold(stage: Stage) -> Line:
    """LocalValidator.validate of tokens never seen before, beside bare verifications: each round
    with a new validator, so that none finds anything of the one before it."""
    tokens, given = await stage.scene.tokens(stage.size.calls), asked(stage.scene)
    found = []
    for number in range(stage.size.rounds // 3 + 1):  # each waits for a heartbeat
        async with watching(stage) as validator:
            bare = _bare(len(tokens))
            cold = await _each(validator.validate, tokens, given, turns=1)
            bare = (bare + _bare(len(tokens))) / 2
            counts = validator.counts
            actives = [(await validator.validate(token, **given)).active for token in tokens]
        if not all(actives) or counts.remote:
            raise RuntimeError("a verdict that is wrong")
        if number:
            found.append((cold, bare))
    return {
        "value": round(median(cold for cold, _ in found), 1),
        "unit": "us a token",
        "floor": round(median(bare for _, bare in found), 1),
        "ratio": median(cold / bare for cold, bare in found),
    }


def _bare(times: int) -> float:
    """Microseconds of a bare verification."""
    verify = BARE["verify"]
    started = time.thread_time()
    for _ in range(times):
        verify()
    return (time.thread_time() - started) / times * 1e6
