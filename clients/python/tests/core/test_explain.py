"""An explanation says what the judge says, whatever is wrong with a token."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authsvc_client.core.explain import CHECKS, Check, Explanation, Outcome, explain, killers
from authsvc_client.core.judge import ANY_AUDIENCE, Question, Verified
from authsvc_client.core.markers import MarkerKind, marker_key
from authsvc_client.core.reason import Reason
from authsvc_client.core.state import StateStale
from authsvc_client.core.step_up import StepUp

from .test_judge import CUTOFFS, FAULTS, MARKS, OTHERS, STRANGERS, Case, Fault, _of_every_kind
from .tokens import ASK, BOOT, KEY, NOW, ORDERS, PAYMENTS, REVISION, THUMBPRINT, Key, Rig, b64
from .tokens import claims as payload_of

ALL: list[tuple[str, Fault]] = [(name, fault) for name, _, fault in FAULTS + OTHERS]
CHECK_OF = {
    "expected": "entitled",
    "form": "format",
    "no audience": "format",
    "stranger": "entitled",
    "kid": "key",
    "expired": "expiry",
    "early": "not_before",
    "jti": "token_mark",
    "rti": "token_mark",
    "gid": "grant_mark",
    "sid": "session_mark",
    "tainted": "key_mark",
    "mismatch": "proof",
    "no proof": "proof",
    "not bound": "proof",
    "scope": "scopes",
    "acr": "authentication",
    "age": "authentication",
}
"""Name of a fault -> the check that it fails, where that is another name."""
ALSO = {"expected": ["audience"], "no audience": ["claims"]}
"""What the fault breaks beside."""


def _case() -> Case:
    return Case(question=replace(ASK, thumbprint=THUMBPRINT))


def _explained(case: Case) -> Explanation:
    """Of the very token that `case.judge` judges."""
    seen: list[Any] = []
    judge = case.rig.judge
    case.rig.judge = lambda *given: seen.append(given)  # type: ignore[assignment]
    case.judge()
    case.rig.judge = judge
    token, question, boot = seen[0]
    return explain(judge, token, question, boot)


def _checks(explanation: Explanation) -> list[Check]:
    return explanation.checks.all(CHECKS)


def _told(explanation: Explanation) -> tuple[Reason, bool]:
    """The reason, and whether the asker is told."""
    failed = {check.name: check for check in _checks(explanation) if check.reason}
    if "entitled" in failed:
        return failed["entitled"].reason, False
    return next((check.reason for check in failed.values()), Reason.UNSPECIFIED), True


def _agree(case: Case) -> None:
    explanation, verdict = _explained(case), case.judge()
    assert _told(explanation) == (verdict.reason, verdict.visible)
    for check in _checks(explanation):
        assert (check.outcome is Outcome.FAILED) == bool(check.reason)
        assert bool(check.detail) == (check.outcome is not Outcome.NOT_REACHED)
    if verdict.claims is not None:
        assert explanation.claims == verdict.claims


def test_explain_token_that_holds_passes_every_check() -> None:
    case = _case()
    assert {check.outcome for check in _checks(_explained(case))} == {Outcome.PASSED}
    _agree(case)


@pytest.mark.parametrize(("name", "fault"), ALL, ids=[name for name, _ in ALL])
def test_explain_one_fault_fails_its_own_check_alone(name: str, fault: Fault) -> None:
    case = _case()
    fault(case)
    failed = [check.name for check in _checks(_explained(case)) if check.reason]
    assert failed == [CHECK_OF.get(name, name), *ALSO.get(name, [])]
    _agree(case)


@pytest.mark.parametrize(("one", "other"), list(combinations(range(len(ALL)), 2)))
def test_explain_says_what_the_judge_says_of_any_two_faults(one: int, other: int) -> None:
    for order in ((one, other), (other, one)):
        case = _case()
        for index in order:
            ALL[index][1](case)
        _agree(case)


@given(st.lists(st.sampled_from(ALL), max_size=8), st.booleans())
@settings(max_examples=300)
def test_explain_says_what_the_judge_says_of_any_faults(
    faults: list[tuple[str, Callable[[Case], object]]], warm: bool
) -> None:
    case = _case()
    if warm:
        case.judge()
    for _, fault in faults:
        fault(case)
    _agree(case)


@pytest.mark.parametrize("question", [*STRANGERS, ASK, Question(frozenset({ANY_AUDIENCE}))])
def test_explain_says_what_the_judge_says_to_strangers(question: Question) -> None:
    rig = Rig()
    for token in [*_of_every_kind(rig).values(), "", "no token", "a.b.c", "asvc_at_x"]:
        verdict = rig.judge(token, question, BOOT)
        explanation = explain(rig.judge, token, question, BOOT)
        assert _told(explanation) == (verdict.reason, verdict.visible)


@pytest.mark.parametrize(
    ("asked", "claims", "reason"),
    [
        (StepUp(("gold",)), {"acr": "gold"}, Reason.UNSPECIFIED),
        (StepUp(("gold",)), {}, Reason.INSUFFICIENT_USER_AUTHENTICATION),
        (StepUp((), 60), {"auth_time": NOW - 60}, Reason.UNSPECIFIED),
        (StepUp((), 60), {"auth_time": NOW - 61}, Reason.INSUFFICIENT_USER_AUTHENTICATION),
        (StepUp((), 60), {}, Reason.INSUFFICIENT_USER_AUTHENTICATION),
        (StepUp(("gold",)), {"scope": "x"}, Reason.INSUFFICIENT_SCOPE),
    ],
)
def test_explain_authentication(asked: StepUp, claims: dict[str, Any], reason: Reason) -> None:
    case = Case(question=replace(ASK, step_up=asked, scopes=frozenset({"pay.read"})))
    case.payload.update(claims)
    _agree(case)
    assert _told(_explained(case))[0] is reason


def test_explain_tainted_key_that_is_gone_is_told_by_its_kid() -> None:
    rig = Rig()
    token = rig.token()
    rig.state.replace_keys([])
    rig.mark(MarkerKind.KEY_TAINTED, "key-1")
    assert rig(token).reason is Reason.TOKEN_KEY_TAINTED
    explanation = explain(rig.judge, token, ASK, BOOT)
    assert _told(explanation) == (Reason.TOKEN_KEY_TAINTED, True)
    assert explanation.kid == "key-1"
    assert marker_key(MarkerKind.KEY_TAINTED, "key-1") in killers(explanation.claims, "key-1")
    foreign = rig.token(iss="https://other.example")
    assert rig(foreign).reason is Reason.TOKEN_ISSUER_WRONG
    assert _told(explain(rig.judge, foreign, ASK, BOOT)) == (Reason.TOKEN_ISSUER_WRONG, True)


def test_explain_stale_state_has_no_answer_and_an_audience_of_its_own_bound_says_so() -> None:
    rig = Rig()
    token = rig.token()
    rig.state.staleness = {PAYMENTS: 10.0}
    with pytest.raises(StateStale):
        rig(token, BOOT + 11)
    explanation = explain(rig.judge, token, ASK, BOOT + 11)
    assert _told(explanation) == (Reason.STATE_STALE, True)
    with pytest.raises(StateStale):
        explain(rig.judge, token, ASK, BOOT + 121)


# What it claims, and what may kill it


@pytest.mark.parametrize(
    "token",
    [
        Key().sign(payload_of()),
        KEY.sign(payload_of(exp=NOW - 500, iat=NOW - 600)),
        KEY.sign(payload_of(iss="https://other.example")),
        KEY.sign(payload_of(), {"alg": "none"}),
        Key("key-7").sign(payload_of()),
    ],
    ids=["forged", "expired", "foreign", "unsigned", "unknown key"],
)
def test_explain_reads_claims_without_trust(token: str) -> None:
    rig = Rig()
    found = explain(rig.judge, token, ASK, BOOT)
    assert (found.claims.subject, found.claims.client_id) == ("alice", "shop")
    assert found.claims.scopes == {"pay.read", "pay.write"}
    assert found.claims.actors == ("agent", "robot")
    assert found.claims.grant_id == "gid-1"


def test_explain_reads_what_can_be_read_of_claims_that_are_wrong() -> None:
    rig = Rig()
    token = rig.token("client_id", scope=7, exp="soon", rev=-1, act="me", jti=["x"])
    found = explain(rig.judge, token, ASK, BOOT).claims
    assert (found.subject, found.issued, found.audiences) == ("alice", NOW, (PAYMENTS,))
    assert (found.client_id, found.scopes, found.expires, found.jti) == ("", frozenset(), 0, "")


HOSTILE = "\x1b[2Jspoofed\n\u202e" + "x" * 5000


def test_explain_details_are_short_lines_whatever_a_stranger_wrote() -> None:
    rig = Rig()
    strange = dict.fromkeys(("iss", "aud", "jti", "gid", "sid", "scope", "acr"), HOSTILE)
    header = {**KEY.header, "typ": HOSTILE, HOSTILE: HOSTILE}
    for token in (
        KEY.sign(payload_of(**strange), header),
        KEY.sign({**payload_of(**strange), "iss": payload_of()["iss"]}),
        KEY.sign(payload_of(cnf={"x5t#S256": HOSTILE})),
    ):
        question = Question(frozenset({ANY_AUDIENCE}), ORDERS, frozenset({"x"}), THUMBPRINT)
        for check in _checks(explain(rig.judge, token, question, BOOT)):
            assert len(check.detail) < 600, check
            assert check.detail.isprintable(), check


def test_explain_never_says_the_token_or_its_parts() -> None:
    for _, fault in ALL:
        case = _case()
        fault(case)
        seen: list[str] = []
        judge = case.rig.judge
        case.rig.judge = lambda token, *_: seen.append(token)  # type: ignore[assignment] # noqa: B023
        case.judge()
        case.rig.judge = judge
        said = " ".join(check.detail for check in _checks(_explained(case)))
        assert not [part for part in seen[0].split(".") if part in said]


def test_explain_killers_are_all_that_the_judge_looks_for() -> None:
    rig = Rig()
    verdict = rig(rig.token(kids=["old-key"], aud=[PAYMENTS, ORDERS]))
    verified = verdict.verified
    assert isinstance(verified, Verified)
    found = killers(verified.claims, verified.kid)
    wanted = {*verified.marks, *verified.cutoffs}
    assert found.keys() == wanted | {marker_key(MarkerKind.CUTOFF_EVERYTHING)}
    assert all(key == marker_key(kind, *ids) for key, (kind, ids) in found.items())


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        *[(kind, ids) for kind, ids, _ in CUTOFFS],
        *[(kind, (id_,)) for kind, id_, _, _ in MARKS],
        (MarkerKind.CUTOFF_EVERYTHING, ()),
        (MarkerKind.KEY_TAINTED, ("key-1",)),
    ],
)
def test_explain_killer_of_every_kind_is_named(kind: MarkerKind, ids: tuple[str, ...]) -> None:
    rig = Rig()
    token = rig.token()
    rig.mark(kind, *ids, revision=REVISION + 1)
    assert not rig(token).active
    found = explain(rig.judge, token, ASK, BOOT)
    assert killers(found.claims, found.kid)[marker_key(kind, *ids)] == (kind, ids)


def test_explain_token_of_one_empty_part_is_no_crash() -> None:
    rig = Rig()
    for token in ("..", ".x.", b64(b"{}"), f"{b64(b'[]')}.{b64(b'{}')}.x", "é.é.é"):
        assert _told(explain(rig.judge, token, ASK, BOOT)) == (rig(token).reason, True)
