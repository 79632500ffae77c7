"""What is dead at which revision, which keys verify, and how old that knowledge is."""

import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authsvc_client.core import state as module
from authsvc_client.core.jws import KeyRefused
from authsvc_client.core.markers import (
    LEEWAY_S,
    MARKER_LIFETIME_S,
    Marker,
    MarkerKind,
    marker_key,
    read_marker,
)
from authsvc_client.core.reason import Reason
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State

from .tokens import BOOT, KEY, NOW, REVISION, Key, Rig, marker

DEAD = marker_key(MarkerKind.TOKEN_DEAD, "jti-1")


def _state() -> State:
    state = State(120.0)
    state.confirm(BOOT, NOW)
    return state


def test_revision_never_goes_back() -> None:
    state = State(120.0)
    for given_, seen in [(5, 5), (4, 5), (REVISIONS_PER_EPOCH, REVISIONS_PER_EPOCH), (6, 2**32)]:
        state.apply([], given_)
        assert state.revision == seen


def test_a_mark_is_swept_after_its_end_and_not_before() -> None:
    state = _state()
    state.apply([marker(MarkerKind.TOKEN_DEAD, "jti-1", until=NOW + 100.5)], REVISION)
    state.apply([marker(MarkerKind.CUTOFF_CLIENT, "shop", until=NOW + 100.5)], REVISION)
    cutoff = (marker_key(MarkerKind.CUTOFF_CLIENT, "shop"),)
    for elapsed in range(0, 101):
        state.confirm(BOOT + elapsed, NOW + elapsed)
        assert state.is_dead(DEAD)
        assert state.cutoff(cutoff) == REVISION + 1
    for elapsed in range(101, 240):
        state.confirm(BOOT + elapsed, NOW + elapsed)
    assert not state.is_dead(DEAD)
    assert state.cutoff(cutoff) == 0


@pytest.mark.parametrize("ends", [(100, 500), (500, 100)])
def test_of_two_equal_marks_the_later_end_counts(ends: tuple[int, int]) -> None:
    state = _state()
    for end in ends:
        state.apply([marker(MarkerKind.TOKEN_DEAD, "jti-1", until=NOW + end)], REVISION)
        state.apply([marker(MarkerKind.CUTOFF_CLIENT, "shop", until=NOW + end)], REVISION)
    state.confirm(BOOT + 499, NOW + 499)
    assert state.is_dead(DEAD)
    assert state.cutoff((marker_key(MarkerKind.CUTOFF_CLIENT, "shop"),)) == REVISION + 1
    state.confirm(BOOT + 9000, NOW + 9000)  # both ends at once
    assert not state.is_dead(DEAD)
    assert not any(state._dead)
    assert not state._seconds


# Many


def _marks(count: int, until: float, start: int = 0) -> Iterable[Marker]:
    kind = MarkerKind.TOKEN_DEAD
    for number in range(start, start + count):
        yield Marker(kind, marker_key(kind, str(number)), REVISION, until)


def _dead(state: State) -> int:
    return sum(map(len, state._dead))


def test_a_live_mark_takes_a_hundred_bytes() -> None:
    count = 30_000
    tracemalloc.start()
    try:
        state = _state()
        before, _ = tracemalloc.get_traced_memory()
        for start in range(0, count, 20):  # one after another, as they come
            state.apply(_marks(20, NOW + start / 10 + 4000, start), REVISION)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The allocator rounds each key of 49 bytes up to 64.
    assert (after - before) / count + 15 < 120


def test_no_part_of_the_marks_is_large() -> None:
    state = _state()
    state.apply(_marks(50_000, NOW + 4000), REVISION)
    assert max(map(len, state._dead)) < 500
    assert _dead(state) == 50_000


def test_what_runs_out_in_one_second_goes_in_pieces_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SWEEP_MAX", 1000)
    state = _state()
    state.apply(_marks(20_000, NOW + 50), REVISION)
    state.apply(_marks(5000, NOW + 5000, 20_000), REVISION)
    state.apply(
        (marker(MarkerKind.CUTOFF_SUBJECT, str(n), until=NOW + 50) for n in range(3000)), REVISION
    )
    left, elapsed = _dead(state) + len(state._cutoffs), 49
    assert left == 28_000
    while left > 5000:
        elapsed += 1
        state.confirm(BOOT + elapsed, NOW + elapsed)
        assert left - 1000 <= _dead(state) + len(state._cutoffs)
        left = _dead(state) + len(state._cutoffs)
        assert elapsed < 50 + 30
    assert all(state.is_dead(one.key) for one in _marks(5000, 0, 20_000))
    assert not state._cutoffs


def test_what_is_marked_and_cut_off_again_and_again_holds_nothing_else_up() -> None:
    state = _state()
    again = marker(MarkerKind.TOKEN_DEAD, "again"), marker(MarkerKind.CUTOFF_CLIENT, "again")
    for elapsed in range(0, 5000, 10):
        for kind in (MarkerKind.TOKEN_DEAD, MarkerKind.CUTOFF_CLIENT):
            state.apply([marker(kind, str(elapsed), until=NOW + elapsed + 50)], REVISION)
        state.apply([one._replace(until=NOW + elapsed + 60) for one in again], REVISION)
        state.confirm(BOOT + elapsed, NOW + elapsed)
        assert state.is_dead(again[0].key)
        assert state.cutoff((again[1].key,))
    assert _dead(state) < 10
    assert len(state._cutoffs) < 10
    assert len(state._seconds) < 20


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 30), st.integers(1, 200)),  # a mark, and how long it lives
            st.integers(1, 60),  # seconds pass
        ),
        max_size=80,
    )
)
def test_no_mark_goes_before_its_end_and_all_go_after(
    events: list[tuple[int, int] | int],
) -> None:
    state, elapsed = _state(), 0
    ends: dict[int, int] = {}
    for event in events:
        if isinstance(event, int):
            elapsed += event
            state.confirm(BOOT + elapsed, NOW + elapsed)
        else:
            number, lives = event
            ends[number] = max(ends.get(number, 0), elapsed + lives)
            for kind in (MarkerKind.TOKEN_DEAD, MarkerKind.CUTOFF_CLIENT):
                one = marker(kind, str(number), until=NOW + elapsed + lives)
                state.apply([one], REVISION)
        for number, end in ends.items():
            if end > elapsed:
                assert state.is_dead(marker_key(MarkerKind.TOKEN_DEAD, str(number)))
                assert state.cutoff((marker_key(MarkerKind.CUTOFF_CLIENT, str(number)),))
    elapsed += 300
    state.confirm(BOOT + elapsed, NOW + elapsed)
    assert not any(state._dead)
    assert not state._cutoffs


@pytest.mark.parametrize("until", [-1e9, 1.0, 1e11])
def test_an_end_of_any_size_is_an_end(until: float) -> None:
    state = _state()
    state.apply([marker(MarkerKind.TOKEN_DEAD, "jti-1", until=until)], REVISION)
    state.apply([marker(MarkerKind.CUTOFF_CLIENT, "shop", until=until)], REVISION)
    state.confirm(BOOT + 100, NOW + 100)
    assert state.is_dead(DEAD) is (until > NOW)
    cutoff = state.cutoff((marker_key(MarkerKind.CUTOFF_CLIENT, "shop"),))
    assert cutoff == (REVISION + 1 if until > NOW else 0)


@pytest.mark.parametrize("key", [b"", b"short", bytes(17)])
def test_a_key_that_no_version_makes_kills_everything(key: bytes) -> None:
    state = _state()
    state.apply([read_marker(MarkerKind.TOKEN_DEAD, key, REVISION, NOW + 100)], REVISION)
    assert state.everything == REVISION


def test_a_cutoff_of_everything_is_kept_for_good_whatever_its_key() -> None:
    state = _state()
    state.apply([marker(MarkerKind.CUTOFF_EVERYTHING, "odd", until=NOW + 1)], REVISION)
    state.confirm(BOOT + 9000, NOW + 9000)
    assert state.cutoff(()) == REVISION + 1


@pytest.mark.parametrize(
    "kind",
    [
        MarkerKind.CLIENT_CHANGED,
        MarkerKind.PERMISSIONS_CHANGED,
        MarkerKind.ROLE_CHANGED,
        MarkerKind.RESOURCE_CHANGED,
        MarkerKind.KEYS_CHANGED,
    ],
)
def test_a_change_kills_nothing(kind: MarkerKind) -> None:
    rig = Rig()
    for id_ in ("jti-1", "shop", "alice", "key-1"):
        rig.mark(kind, id_)
    assert rig(rig.token()).active


def test_every_kind_is_a_mark_a_cutoff_or_a_change() -> None:
    kills = set()
    for kind in MarkerKind:
        state = _state()
        state.apply([marker(kind, "x")], REVISION)
        key = marker_key(kind, "x")
        if state.is_dead(key) or state.cutoff((key,)):
            kills.add(kind)
    assert set(MarkerKind) - kills == {kind for kind in MarkerKind if "CHANGED" in kind.name}


@given(
    st.lists(
        st.one_of(
            st.floats(0, 10),  # time passes
            st.tuples(st.floats(0, 20), st.floats(-3700, 3700)),  # a read: how long, clock's jump
        )
    )
)
def test_time_never_goes_back(events: list[float | tuple[float, float]]) -> None:
    state = State(120.0)
    boot, last, database = BOOT, 0.0, float(NOW)
    for event in events:
        if isinstance(event, tuple):
            took, jump = event
            boot, database = boot + took, database + took + jump
            state.confirm(boot - took, database)
        else:
            boot, database = boot + event, database + event
        assert state.now(boot) >= last
        last = state.now(boot)


def test_time_follows_the_database_not_this_machine() -> None:
    state = State(120.0)
    assert state.now(BOOT) == 0
    state.confirm(5e9, 2e9)
    assert state.now(5e9 + 7) == 2e9 + 7


def test_a_mark_outlives_its_token_though_the_database_clock_went_back() -> None:
    """Time stood still for 1000 s, so a marker written then runs out 1000 s too early by ours."""
    rig = Rig()
    back = 1000
    rig.state.confirm(BOOT, NOW - back)
    token = rig.token(exp=NOW + 3600)
    assert rig(token).active
    until = NOW - back + MARKER_LIFETIME_S
    rig.state.apply([marker(MarkerKind.TOKEN_DEAD, "jti-1", until=until)], REVISION + 1)
    for elapsed in range(0, back + 3600 + LEEWAY_S + 1, 10):
        rig.state.confirm(BOOT + elapsed, NOW - back + elapsed)
        assert rig(token, BOOT + elapsed).reason in {Reason.TOKEN_REVOKED, Reason.TOKEN_EXPIRED}
    for elapsed in range(back + 3600, 3 * 3600, 10):
        rig.state.confirm(BOOT + elapsed, NOW - back + elapsed)
    assert not rig.state.is_dead(DEAD)


def test_age_counts_from_the_start_of_the_read() -> None:
    state = State(120.0)
    assert state.age(BOOT) == float("inf")
    state.confirm(BOOT, NOW)
    assert state.age(BOOT + 3) == 3


# Keys


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"kid": ""},
        {"kid": None},
        {"kid": 1},
        {"kid": "key-1"},
        {"kid": "\ud800"},
        {"kid": "key-2", "alg": "HS256"},
        {"kid": "key-2", "alg": "ES384"},
        {"kid": "key-2", "use": "enc"},
        {"kid": "key-2", "x": "AAAA"},
    ],
)
def test_replace_keys_takes_all_or_nothing(wrong: dict[str, object]) -> None:
    rig = Rig()
    token = rig.token()
    assert rig(token).active
    before = rig.state.keys
    base = {name: value for name, value in Key("key-2").jwk.items() if name != "kid"}
    for jwks in ([KEY.jwk, {**base, **wrong}], [{**base, **wrong}, KEY.jwk]):
        with pytest.raises(KeyRefused):
            rig.state.replace_keys(jwks)
        assert rig.state.keys is before
    assert rig(token).active
    rig.state.replace_keys([KEY.jwk, {**base, "kid": "key-2"}])
    assert set(rig.state.keys.by_kid) == {"key-1", "key-2"}


def test_replace_keys_drops_the_known_headers_with_the_key() -> None:
    rig = Rig()
    assert rig(rig.token()).active
    assert rig.state.keys.by_header
    rig.state.replace_keys([])
    assert rig(rig.token(jti="new")).reason is Reason.TOKEN_KEY_UNKNOWN
    assert not rig.state.keys.by_header
