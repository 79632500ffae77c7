"""Garbage collection in a process that serves: seldom of everything, and never not at all."""

import gc
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from authsvc.app import COLLECT_AFTER, settle
from authsvc.feed.follow import PIECE_MARKERS, Follow
from authsvc.store.port import change
from authsvc_client.core.claims import parse_claims
from authsvc_client.core.judge import Verified
from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.state import State
from tests.harness import hand_clock, running

PIECES = 20


@pytest.fixture
def collected() -> Iterator[Counter[int]]:
    """Collections by generation, and under -1 what those of everything found, once settled."""
    before, found = gc.get_threshold(), Counter[int]()

    def count(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop":
            found[info["generation"]] += 1
            found[-1] += info["collected"] * (info["generation"] == 2)

    settle()
    gc.callbacks.append(count)
    try:
        yield found
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*before)
        gc.unfreeze()


def test_garbage_that_grew_old_is_found_in_the_end(collected: Counter[int]) -> None:
    young, older, oldest = COLLECT_AFTER
    bound = young * (older + 1) * (oldest + 1)
    living: deque[list[Any]] = deque(maxlen=4 * young * (older + 1))  # past the first two looks
    made = 0
    while not collected[2]:
        cycle: list[Any] = []
        cycle.append(cycle)
        living.append(cycle)
        made += 1
        assert made < 2 * bound
    assert collected[-1] > bound / 2


async def test_a_snapshot_is_taken_in_without_collections(
    tmp_path: Path, collected: Counter[int]
) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        for piece in range(PIECES):
            these = (f"{piece}-{number}" for number in range(PIECE_MARKERS))
            await server.store.feed.append([change(MarkerKind.TOKEN_DEAD, each) for each in these])
        await server.head()
        state = State(120.0)
        collected.clear()
        await Follow(server.store.feed, state, clock).poll()
        assert sum(map(len, state._dead)) >= PIECES * PIECE_MARKERS
        assert sum(collected[generation] for generation in range(3)) < PIECES / 4


def test_a_token_that_is_held_is_two_objects_to_a_collection() -> None:
    payload = {
        "iss": "https://auth.test",
        "sub": "ada",
        "aud": ["https://billing.test"],
        "exp": 1_700_000_300,
        "iat": 1_700_000_000,
        "client_id": "orders",
        "scope": "billing.read billing.write",
        "rev": 4294967296,
    }
    held = []
    gc.collect()
    before = len(gc.get_objects())
    for number in range(1000):
        one = {"jti": f"j{number}", "gid": f"g{number}", "sid": f"s{number}", "rti": f"r{number}"}
        held.append(Verified(None, parse_claims(payload | one), kid="key-1"))
    gc.collect()
    assert len(gc.get_objects()) - before < 2100
