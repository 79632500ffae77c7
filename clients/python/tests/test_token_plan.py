"""TokenPlan: when a token is used, renewed, waited for, or not to be had."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from authsvc_client import Pace, Step, Token, TokenPlan, Unavailable

PACE = Pace(renew_from=0.5, renew_until=0.7, spare_s=5, cool_down_s=1, cool_down_s_max=8)


def planned(life: float = 100.0, *, asked: float = 0.0, now: float = 0.0) -> TokenPlan:
    plan = TokenPlan(PACE)
    plan.started()
    plan.renewed(Token("t", life), asked, now, draw=0.5)
    return plan


@pytest.mark.parametrize(
    ("now", "in_flight", "failed_at", "step"),
    [
        (0.0, False, None, Step.USE),
        (59.9, False, None, Step.USE),
        (60.0, False, None, Step.USE_AND_RENEW),
        (94.9, False, None, Step.USE_AND_RENEW),
        (95.0, False, None, Step.WAIT),
        (1e9, False, None, Step.WAIT),
        (60.0, True, None, Step.USE),
        (94.9, True, None, Step.USE),
        (95.0, True, None, Step.WAIT),
        (60.0, False, 59.9, Step.USE),
        (60.7, False, 59.9, Step.USE_AND_RENEW),
        (95.0, False, 94.9, Step.COOL_DOWN),
        (95.7, False, 94.9, Step.WAIT),
    ],
)
def test_decide_with_a_token_of_100_s(
    now: float, in_flight: bool, failed_at: float | None, step: Step
) -> None:
    plan = planned()
    if failed_at is not None:
        plan.started()
        plan.failed(OSError(), failed_at, draw=0.5)  # a pause of 0.75 s
    if in_flight:
        plan.started()
    assert plan.decide(now) is step


@pytest.mark.parametrize(
    ("now", "in_flight", "failed_at", "step"),
    [
        (0.0, False, None, Step.WAIT),
        (0.0, True, None, Step.WAIT),
        (0.0, False, 0.0, Step.COOL_DOWN),
        (0.7, False, 0.0, Step.COOL_DOWN),
        (0.8, False, 0.0, Step.WAIT),
    ],
)
def test_decide_without_a_token(
    now: float, in_flight: bool, failed_at: float | None, step: Step
) -> None:
    plan = TokenPlan(PACE)
    if failed_at is not None:
        plan.failed(OSError(), failed_at, draw=0.5)
    if in_flight:
        plan.started()
    assert plan.decide(now) is step


@pytest.mark.parametrize(("draw", "at"), [(0.0, 50.0), (0.5, 60.0), (0.999, 69.98)])
def test_renewal_is_jittered_over_a_share_of_the_life(draw: float, at: float) -> None:
    plan = TokenPlan(PACE)
    plan.renewed(Token("t", 100), 0, 0, draw)
    assert plan.decide(at - 0.01) is Step.USE
    assert plan.decide(at + 0.01) is Step.USE_AND_RENEW


def test_life_counts_from_the_question_not_from_the_answer() -> None:
    plan = planned(100, asked=0.0, now=20.0)
    assert plan.decide(94.9) is Step.USE_AND_RENEW
    assert plan.decide(95.0) is Step.WAIT


def test_short_token_spares_a_tenth_only() -> None:
    plan = planned(2.0)
    assert plan.decide(1.79) is Step.USE_AND_RENEW
    assert plan.decide(1.8) is Step.WAIT


@pytest.mark.parametrize("life", [0.0, -5.0, 3.0, math.nan])
def test_token_that_is_over_when_it_comes_counts_as_a_failure(life: float) -> None:
    plan = planned(life, asked=0.0, now=3.0)
    assert plan.token is None
    assert isinstance(plan.failure, TimeoutError)
    assert plan.decide(3.0) is Step.COOL_DOWN


def test_cool_down_doubles_up_to_its_cap_and_ends_with_a_success() -> None:
    plan, pauses = TokenPlan(PACE), []
    for _ in range(6):
        plan.failed(OSError(), 0.0, draw=1.0)
        pauses.append(plan.cools_down_for(0.0))
    assert pauses == [1, 2, 4, 8, 8, 8]
    plan.renewed(Token("t", 100), 0, 0, 0.5)
    assert (plan.failure, plan.cools_down_for(0.0)) == (None, 0.0)
    plan.failed(OSError(), 0.0, draw=0.0)
    assert plan.cools_down_for(0.0) == 0.5


@pytest.mark.parametrize(("asked_for", "pause"), [(None, 1.0), (3.0, 3.0), (1e9, 8.0)])
def test_cool_down_heeds_retry_info_up_to_the_cap(asked_for: float | None, pause: float) -> None:
    plan = TokenPlan(PACE)
    plan.failed(Unavailable(retry_after_s=asked_for), 0.0, draw=1.0)
    assert plan.cools_down_for(0.0) == pause


def test_refused_token_is_dropped_and_another_is_not() -> None:
    plan = planned()
    plan.refused("older", 1.0, 0.5)
    assert plan.decide(1.0) is Step.USE
    plan.refused("t", 1.0, 0.5)
    assert plan.token is None
    assert plan.decide(1.0) is Step.WAIT


def test_young_tokens_refused_one_after_the_other_pause_renewals() -> None:
    plan, pauses, now = TokenPlan(PACE), [], 0.0
    for number in range(6):
        plan.renewed(Token(f"t{number}", 100), now, now, 0.5)
        plan.refused(f"t{number}", now, draw=1.0)
        pauses.append(plan.cools_down_for(now))
        now += pauses[-1]
    assert pauses == [0, 1, 2, 4, 8, 8]
    plan.renewed(Token("old", 100), now, now, 0.5)
    plan.refused("old", now + 10, draw=1.0)
    assert plan.decide(now + 10) is Step.WAIT


@pytest.mark.parametrize(
    "wrong",
    [
        {"renew_from": 0.0},
        {"renew_from": 0.8},
        {"renew_until": 1.0},
        {"cool_down_s": 0.0},
        {"cool_down_s": 60.0},
        {"spare_s": -1.0},
    ],
    ids=str,
)
def test_pace_without_end_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"do(es)? not hold"):
        Pace(**wrong)


times = st.floats(0, 500)
draws = st.floats(0, 1, exclude_max=True)


@given(life=st.floats(-10, 1000), travel=times, now=times, draw=draws)
def test_whatever_it_is_given_it_never_hands_out_an_expired_token(
    life: float, travel: float, now: float, draw: float
) -> None:
    plan = TokenPlan(PACE)
    plan.renewed(Token("t", life), 0.0, travel, draw)
    if plan.decide(now + travel) in {Step.USE, Step.USE_AND_RENEW}:
        assert now + travel < life


class Machine(RuleBasedStateMachine):
    """Any order of events, on a clock that goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.now, self.count = TokenPlan(PACE), 0.0, 0
        self.expires = -math.inf
        self.asked: float | None = None
        self.tried: list[float] = []

    @rule(step=st.floats(0, 200))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule()
    def somebody_asks(self) -> None:
        step = self.plan.decide(self.now)
        if step in {Step.WAIT, Step.USE_AND_RENEW} and not self.plan.in_flight:
            assert self.plan.cools_down_for(self.now) == 0
            self.plan.started()
            self.asked = self.now

    @precondition(lambda self: self.asked is not None)
    @rule(life=st.floats(-5, 300), draw=draws)
    def the_renewal_comes(self, life: float, draw: float) -> None:
        assert self.asked is not None
        before, self.count = self.plan.token, self.count + 1
        self.plan.renewed(Token(str(self.count), life), self.asked, self.now, draw)
        if self.plan.token is not before:
            self.expires = self.asked + life
        self.asked = None

    @precondition(lambda self: self.asked is not None)
    @rule(draw=draws)
    def the_renewal_fails(self, draw: float) -> None:
        self.plan.failed(OSError(), self.now, draw)
        self.asked = None
        assert 0 < self.plan.cools_down_for(self.now) <= PACE.cool_down_s_max

    @rule(draw=draws)
    def a_callee_refuses(self, draw: float) -> None:
        self.plan.refused(str(self.count), self.now, draw)

    @invariant()
    def it_holds_together(self) -> None:
        step = self.plan.decide(self.now)
        assert self.plan.in_flight == (self.asked is not None)
        if step in {Step.USE, Step.USE_AND_RENEW}:
            assert self.plan.token is not None
            assert self.now < self.expires
        if self.plan.in_flight:
            assert step in {Step.USE, Step.WAIT}
        if step is Step.COOL_DOWN:
            later = self.now + self.plan.cools_down_for(self.now)
            assert self.plan.decide(math.nextafter(later, math.inf)) is Step.WAIT


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestMachine = Machine.TestCase
