"""What a watcher may believe of its stream, by a clock that moves by hand."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authsvc_client.core.markers import Marker, MarkerKind, marker_key, read_marker
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State, StateStale
from authsvc_client.core.watched import (
    DELAY_S_MAX,
    OPENING_S_MAX,
    OPENINGS_MAX,
    OutOfStep,
    Watched,
)

EPOCH = REVISIONS_PER_EPOCH
AHEAD = 1_700_000_000.0
"""Of the database's clock to the one here."""
DEAD = marker_key(MarkerKind.TOKEN_DEAD, "dead")


def dead(revision: int, token: str = "dead") -> Marker:
    key = marker_key(MarkerKind.TOKEN_DEAD, token)
    return Marker(MarkerKind.TOKEN_DEAD, key, revision, AHEAD + 1e6)


class Stream:
    """A server whose clock runs, and what of it arrives when."""

    def __init__(self, staleness_max_s: float = 10.0) -> None:
        self.state = State(staleness_max_s)
        self.watched = Watched(self.state)
        self.boot = 1000.0
        self.head = EPOCH + 1

    def opened(self, took_s: float = 0.01) -> int:
        resume = self.watched.open(self.boot)
        self.boot += took_s
        if not resume:
            self.watched.snapshot(self.head, (), (), {}, last=True)
        return resume

    def beat(self, age_s: float = 0.1, delay_s: float = 0.0) -> None:
        """Sent now, received later."""
        sent = self.boot
        self.boot += delay_s
        self.watched.heartbeat(self.head, age_s, sent + AHEAD, self.boot)

    def delta(self, *markers: Marker) -> None:
        self.head += 1
        self.watched.delta(self.head, markers, (), {})


def test_age_counts_from_the_confirmation_that_the_server_has() -> None:
    stream = Stream()
    assert not stream.opened()
    assert stream.state.age(stream.boot) == float("inf")
    stream.beat(age_s=2.5)
    assert 2.5 <= stream.state.age(stream.boot) < 2.6
    stream.boot += 3
    assert 5.5 <= stream.state.age(stream.boot) < 5.6
    stream.beat(age_s=1.0)
    assert 1.0 <= stream.state.age(stream.boot) < 1.1


def test_heartbeat_that_waited_in_a_buffer_is_as_old_as_it_is() -> None:
    stream = Stream()
    stream.opened()
    stream.beat()
    stream.boot += 1
    stream.beat(age_s=0.5, delay_s=4)
    assert 4.5 <= stream.state.age(stream.boot) < 4.6
    sent = stream.boot
    stream.boot += 100  # the process stood still, and now reads what came meanwhile
    with pytest.raises(OutOfStep):
        stream.watched.heartbeat(stream.head, 0.1, sent + AHEAD, stream.boot)
    assert stream.state.age(stream.boot) >= 100
    with pytest.raises(StateStale):
        stream.state.require_fresh(stream.boot)
    assert stream.opened() == stream.head
    stream.beat()
    stream.state.require_fresh(stream.boot)


def test_snapshot_that_took_long_is_followed_by_a_stream_that_resumes() -> None:
    stream = Stream()
    stream.opened(took_s=OPENING_S_MAX + 3)
    with pytest.raises(OutOfStep):
        stream.beat()
    assert stream.state.age(stream.boot) < 10  # older than it is, never younger
    assert stream.opened() == stream.head
    stream.beat()
    assert stream.state.age(stream.boot) < 1


def test_stream_that_took_too_long_to_open_confirms_nothing() -> None:
    """Its time could be ahead of the database's by as much, and judged time never goes back."""
    stream = Stream()
    stream.opened(took_s=DELAY_S_MAX + 1)
    with pytest.raises(OutOfStep):
        stream.beat()
    assert stream.state.confirmed is None
    assert stream.opened() == stream.head
    stream.beat()
    assert stream.state.now(stream.boot) == pytest.approx(stream.boot + AHEAD, abs=0.1)


def test_stream_that_took_long_to_open_is_opened_again_unless_all_of_them_take_long() -> None:
    """Else each confirmation by it would look as much older as it took, for as long as it lasts."""
    stream = Stream()
    for _ in range(2):
        stream.opened()
        stream.beat()
        for _ in range(OPENINGS_MAX - 1):
            assert stream.opened(took_s=OPENING_S_MAX + 3) == stream.head
            with pytest.raises(OutOfStep):
                stream.beat()
    stream.opened(took_s=OPENING_S_MAX + 1)
    stream.beat()
    assert stream.state.age(stream.boot) < OPENING_S_MAX + 1.2


def test_database_clock_that_is_set_opens_the_stream_again() -> None:
    for step in (DELAY_S_MAX + 1, -DELAY_S_MAX - 1):
        stream = Stream()
        stream.opened()
        stream.beat()
        with pytest.raises(OutOfStep):
            stream.watched.heartbeat(stream.head, 0.1, stream.boot + AHEAD + step, stream.boot)
        stream.opened()
        stream.watched.heartbeat(stream.head, 0.1, stream.boot + AHEAD + step, stream.boot)
        assert stream.state.age(stream.boot) < 0.2


def test_age_is_not_negative_whatever_is_said() -> None:
    stream = Stream()
    stream.opened()
    stream.beat(age_s=-50)
    assert stream.state.age(stream.boot) >= 0
    stream.watched.heartbeat(stream.head, 0.0, stream.boot + AHEAD + 3, stream.boot)
    assert stream.state.age(stream.boot) >= 0


def test_what_kills_counts_before_the_snapshot_is_whole() -> None:
    stream = Stream()
    stream.watched.open(stream.boot)
    stream.watched.snapshot(stream.head, [dead(EPOCH + 1)], (), {"a": 5.0}, last=False)
    assert stream.state.is_dead(DEAD)
    assert not stream.state.revision
    assert not stream.state.staleness
    with pytest.raises(OutOfStep):
        stream.beat()
    assert stream.state.age(stream.boot) == float("inf")
    assert not stream.watched.open(stream.boot)  # from the beginning
    stream.watched.snapshot(stream.head, (), (), {"a": 5.0}, last=False)
    stream.watched.snapshot(stream.head, [dead(EPOCH + 1, "other")], (), {}, last=True)
    assert stream.state.revision == stream.head
    assert stream.state.staleness == {"a": 5.0}
    stream.beat()


def test_chunks_of_two_snapshots_make_none() -> None:
    stream = Stream()
    stream.watched.open(stream.boot)
    stream.watched.snapshot(stream.head, (), (), {}, last=False)
    with pytest.raises(OutOfStep):
        stream.watched.snapshot(stream.head + 1, (), (), {}, last=True)
    assert not stream.state.revision


def test_snapshot_of_before_is_not_taken() -> None:
    stream = Stream()
    stream.opened()
    stream.delta(dead(EPOCH + 2))
    stream.watched.forget()
    assert not stream.watched.open(stream.boot)
    with pytest.raises(OutOfStep):
        stream.watched.snapshot(stream.head - 1, (), (), {}, last=True)
    assert stream.state.revision == stream.head


@pytest.mark.parametrize("revision", [EPOCH, 2 * EPOCH + 5], ids=["before", "other epoch"])
def test_changes_that_do_not_follow_are_not_taken(revision: int) -> None:
    stream = Stream()
    stream.opened()
    stream.beat()
    with pytest.raises(OutOfStep):
        stream.watched.delta(revision, (), (), {})
    assert stream.state.revision == stream.head
    assert not stream.watched.open(stream.boot)


def test_new_epoch_takes_no_mark_away() -> None:
    stream = Stream()
    stream.opened()
    stream.delta(dead(EPOCH + 2))
    stream.watched.forget()
    stream.head = 2 * EPOCH
    assert not stream.opened()
    stream.beat()
    assert stream.state.revision == 2 * EPOCH
    assert stream.state.is_dead(DEAD)


@pytest.mark.parametrize("by", [1, -1])
def test_heartbeat_of_another_revision_confirms_nothing(by: int) -> None:
    stream = Stream()
    stream.opened()
    with pytest.raises(OutOfStep):
        stream.watched.heartbeat(stream.head + by, 0.0, stream.boot + AHEAD, stream.boot)
    assert stream.state.confirmed is None
    assert not stream.watched.open(stream.boot)


def test_kind_of_a_newer_version_kills_everything() -> None:
    stream = Stream()
    stream.opened()
    stream.delta(read_marker(99, b"x" * 16, stream.head + 1, AHEAD + 1e6))
    assert stream.state.everything == stream.head


def test_keys_that_cannot_be_used_are_not_taken() -> None:
    stream = Stream()
    stream.opened()
    with pytest.raises(OutOfStep):
        stream.watched.delta(stream.head + 1, [dead(EPOCH + 2)], [{"kid": ""}], {})
    assert stream.state.is_dead(DEAD)
    assert stream.state.revision == stream.head
    assert not stream.watched.open(stream.boot)


def test_bounds_of_resources_are_replaced_whole() -> None:
    stream = Stream()
    stream.opened()
    changed = Marker(MarkerKind.RESOURCE_CHANGED, b"r" * 16, EPOCH + 2, AHEAD + 1e6)
    stream.watched.delta(EPOCH + 2, [changed], (), {"a": 5.0})
    assert stream.state.staleness == {"a": 5.0}
    stream.watched.delta(EPOCH + 3, (), (), {})
    assert stream.state.staleness == {"a": 5.0}
    stream.watched.delta(EPOCH + 4, [changed], (), {})
    assert stream.state.staleness == {}


Steps = list[tuple[str, float]]


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["wait", "beat", "late", "open", "step"]),
            st.floats(0, 30, allow_nan=False),
        ),
        max_size=60,
    ),
    drift=st.floats(-1e-4, 1e-4),
)
@settings(max_examples=300)
def test_state_is_never_younger_than_what_the_server_knew(steps: Steps, drift: float) -> None:
    """Whatever waits where, and however the clocks run, an age is at least what it truly is."""
    stream = Stream()
    buffered: list[tuple[float, float, float]] = []
    truth = float("-inf")  # boot time of the confirmation that the state goes by
    ahead = AHEAD

    def sent(age_s: float) -> tuple[float, float, float]:
        return (stream.boot - age_s, age_s, stream.boot * (1 + drift) + ahead)

    def receive(events: Iterable[tuple[float, float, float]]) -> None:
        nonlocal truth
        for started, age_s, time in events:
            try:
                stream.watched.heartbeat(stream.head, age_s, time, stream.boot)
            except OutOfStep:
                opened()
                return
            finally:
                truth = max(truth, started)

    def opened() -> None:
        buffered.clear()
        stream.opened(took_s=0.0)

    opened()
    for what, amount in steps:
        if what == "wait":
            stream.boot += amount
        elif what == "beat":
            receive([*buffered, sent(amount / 30)])
            buffered.clear()
        elif what == "late":
            buffered.append(sent(amount / 30))
            stream.boot += amount
        elif what == "open":
            opened()
        else:  # the database's clock is set, by less than is noticed
            ahead -= min(amount / 30, DELAY_S_MAX / 2)
        slack = 0.1 + 1e-4 * (stream.boot - 1000)
        assert stream.state.age(stream.boot) >= stream.boot - truth - slack
