"""How a token is judged: every reason, what is decided first, and who is told."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from authsvc_client import core
from authsvc_client.core.judge import ANY_AUDIENCE, REUSABLE_S, Question, Verdict
from authsvc_client.core.markers import LEEWAY_S, MarkerKind
from authsvc_client.core.reason import Reason
from authsvc_client.core.state import REVISIONS_PER_EPOCH, StateStale
from authsvc_client.core.step_up import StepUp

from .tokens import (
    ASK,
    BOOT,
    ISSUER,
    KEY,
    NOW,
    ORDERS,
    PAYMENTS,
    REVISION,
    THUMBPRINT,
    Key,
    Rig,
    claims,
    marker,
)

STRANGER = "https://stranger.example"


@dataclass
class Case:
    """A call that is active as it stands, until faults are put into it."""

    rig: Rig = field(default_factory=Rig)
    payload: dict[str, Any] = field(default_factory=claims)
    header: dict[str, Any] = field(default_factory=lambda: dict(KEY.header))
    question: Question = ASK
    forged: bool = False
    suffix: str = ""

    def judge(self) -> Verdict:
        token = KEY.sign(self.payload, self.header)
        if self.forged:
            body, _, _ = token.rpartition(".")
            token = f"{body}.{KEY.sign({}).rpartition('.')[2]}"
        return self.rig.judge(token + self.suffix, self.question, BOOT)


Fault = Callable[[Case], object]


def _ask(**changes: Any) -> Fault:
    return lambda case: setattr(case, "question", replace(case.question, **changes))


def _claim(**changes: Any) -> Fault:
    return lambda case: case.payload.update(changes)


def _header(**changes: Any) -> Fault:
    return lambda case: case.header.update(changes)


def _mark(kind: MarkerKind, *ids: str) -> Fault:
    return lambda case: case.rig.mark(kind, *ids)


# In the order in which they are decided. The first ones cost no signature check.
UNSIGNED: list[tuple[str, Reason, Fault]] = [
    ("expected", Reason.TOKEN_INACTIVE, _ask(audience="https://nobody.example")),
    ("form", Reason.TOKEN_MALFORMED, lambda case: setattr(case, "suffix", "=")),
    ("no audience", Reason.TOKEN_MALFORMED, _claim(aud=[])),
    ("stranger", Reason.TOKEN_INACTIVE, _ask(audiences=frozenset({STRANGER}), audience="")),
    ("type", Reason.TOKEN_TYPE_WRONG, _header(typ="JWT")),
    ("header", Reason.TOKEN_MALFORMED, _header(jku="https://evil.example")),
    ("issuer", Reason.TOKEN_ISSUER_WRONG, _claim(iss=ISSUER + "/")),
    ("kid", Reason.TOKEN_KEY_UNKNOWN, _header(kid="key-2")),
]
SIGNED: list[tuple[str, Reason, Fault]] = [
    ("signature", Reason.TOKEN_SIGNATURE_INVALID, lambda case: setattr(case, "forged", True)),
    ("claims", Reason.TOKEN_MALFORMED, _claim(amr="pwd")),
    ("expired", Reason.TOKEN_EXPIRED, _claim(exp=NOW - LEEWAY_S)),
    ("early", Reason.TOKEN_NOT_YET_VALID, _claim(iat=NOW + LEEWAY_S + 1)),
    ("jti", Reason.TOKEN_REVOKED, _mark(MarkerKind.TOKEN_DEAD, "jti-1")),
    ("rti", Reason.TOKEN_REVOKED, _mark(MarkerKind.TOKEN_DEAD, "rti-1")),
    ("sid", Reason.SESSION_ENDED, _mark(MarkerKind.SESSION_DEAD, "sid-1")),
    ("gid", Reason.GRANT_REVOKED, _mark(MarkerKind.GRANT_DEAD, "gid-1")),
    ("tainted", Reason.TOKEN_KEY_TAINTED, _mark(MarkerKind.KEY_TAINTED, "key-1")),
    ("cutoff", Reason.TOKEN_CUT_OFF, _mark(MarkerKind.CUTOFF_EVERYTHING)),
    ("audience", Reason.TOKEN_AUDIENCE_WRONG, _ask(audience=ORDERS)),
    ("mismatch", Reason.PROOF_MISMATCH, _claim(cnf={"x5t#S256": THUMBPRINT[::-1]})),
    ("scope", Reason.INSUFFICIENT_SCOPE, _ask(scopes=frozenset({"pay.admin"}))),
    ("acr", Reason.INSUFFICIENT_USER_AUTHENTICATION, _ask(step_up=StepUp(("gold",)))),
]
OTHERS: list[tuple[str, Reason, Fault]] = [
    ("age", Reason.INSUFFICIENT_USER_AUTHENTICATION, _ask(step_up=StepUp(max_age_s=60))),
    ("no proof", Reason.PROOF_MISSING, _claim(cnf={"jkt": THUMBPRINT})),
    ("not bound", Reason.TOKEN_NOT_BOUND, _ask(require_bound=True)),
]
FAULTS = UNSIGNED + SIGNED


def _case() -> Case:
    return Case(question=replace(ASK, thumbprint=THUMBPRINT))


@pytest.mark.parametrize(
    ("reason", "fault"),
    [pytest.param(reason, fault, id=name) for name, reason, fault in FAULTS + OTHERS],
)
def test_judge_one_fault_is_the_reason_and_without_it_the_token_is_active(
    reason: Reason, fault: Fault
) -> None:
    case = _case()
    assert case.judge().active
    fault(case)
    verdict = case.judge()
    assert (verdict.reason, verdict.active) == (reason, False)
    assert verdict.visible == (reason is not Reason.TOKEN_INACTIVE)
    assert verdict.reusable_until >= verdict.check_time == NOW
    knows = {Reason.INSUFFICIENT_SCOPE, Reason.INSUFFICIENT_USER_AUTHENTICATION}
    assert (verdict.verified is None) == (reason not in knows)


def test_judge_every_reason_in_the_code_has_a_case() -> None:
    folder = Path(core.__file__).parent
    texts = [(folder / f"{name}.py").read_text() for name in ("judge", "jws", "claims")]
    named = set(re.findall(r"Reason\.([A-Z_]+)", "".join(texts))) - {"UNSPECIFIED"}
    assert named == {reason.name for _, reason, _ in FAULTS + OTHERS}


@pytest.mark.parametrize("first", range(len(FAULTS)), ids=[name for name, _, _ in FAULTS])
def test_judge_with_every_later_fault_too_the_earlier_one_is_told(first: int) -> None:
    case = _case()
    for _, _, fault in reversed(FAULTS[first:]):
        fault(case)
    assert case.judge().reason is FAULTS[first][1]
    assert case.rig.verifier.checked == (1 if first >= len(UNSIGNED) else 0)


def test_judge_a_known_header_or_token_does_not_change_what_is_told_first() -> None:
    case = _case()
    assert case.judge().active
    checked = case.rig.verifier.checked
    _claim(iss="https://other.example")(case)
    assert case.judge().reason is Reason.TOKEN_ISSUER_WRONG
    assert case.rig.verifier.checked == checked


# How, and how long ago, a person authenticated (RFC 9470)


@pytest.mark.parametrize(
    ("step_up", "claims", "met"),
    [
        (StepUp(), {}, True),
        (StepUp(("gold", "silver")), {"acr": "silver"}, True),
        (StepUp(("gold", "silver")), {"acr": "bronze"}, False),
        (StepUp(("gold",)), {}, False),
        (StepUp(max_age_s=60), {"auth_time": NOW - 60}, True),
        (StepUp(max_age_s=60), {"auth_time": NOW - 61}, False),
        (StepUp(max_age_s=60), {}, False),
        (StepUp(max_age_s=0), {"auth_time": NOW}, True),
        (StepUp(max_age_s=0), {"auth_time": NOW - 1}, False),
        (StepUp(("gold",), 60), {"acr": "gold", "auth_time": NOW - 61}, False),
        (StepUp(("gold",), 60), {"acr": "silver", "auth_time": NOW}, False),
        (StepUp(("gold",), 60), {"acr": "gold", "auth_time": NOW}, True),
    ],
    ids=str,
)
def test_judge_step_up(step_up: StepUp, claims: dict[str, Any], met: bool) -> None:
    rig = Rig()
    verdict = rig.judge(rig.token(**claims), replace(ASK, step_up=step_up), BOOT)
    assert verdict.active is met
    assert verdict.step_up == (StepUp() if met else step_up)
    if met and step_up.max_age_s is not None:
        assert verdict.reusable_until <= claims["auth_time"] + step_up.max_age_s


# Who may know


def _of_every_kind(rig: Rig) -> dict[Reason, str]:
    other = Key("key-9")
    valid = rig.token()
    rig.mark(MarkerKind.TOKEN_DEAD, "dead")
    rig.mark(MarkerKind.CUTOFF_CLIENT, "cut", revision=REVISION + 5)
    return {
        Reason.UNSPECIFIED: valid,
        Reason.TOKEN_EXPIRED: rig.token(exp=NOW - 100, iat=NOW - 200),
        Reason.TOKEN_NOT_YET_VALID: rig.token(iat=NOW + 100),
        Reason.TOKEN_REVOKED: rig.token(jti="dead"),
        Reason.TOKEN_CUT_OFF: rig.token(client_id="cut"),
        Reason.TOKEN_SIGNATURE_INVALID: Key().sign(claims()),
        Reason.TOKEN_KEY_UNKNOWN: other.sign(claims()),
        Reason.TOKEN_ISSUER_WRONG: rig.token(iss="https://other.example"),
        Reason.TOKEN_TYPE_WRONG: rig.key.sign(claims(), {**KEY.header, "typ": "JWT"}),
        Reason.TOKEN_MALFORMED: rig.token("sub"),
        Reason.PROOF_MISSING: rig.token(cnf={"x5t#S256": THUMBPRINT}),
    }


STRANGERS = [
    Question(frozenset({ORDERS})),
    Question(frozenset({ORDERS}), ORDERS),
    Question(frozenset({ORDERS}), PAYMENTS),
    Question(frozenset()),
    Question(frozenset(), PAYMENTS),
    Question(frozenset({PAYMENTS + "/", PAYMENTS[:-1], PAYMENTS.upper(), "https://*"})),
    Question(frozenset({ORDERS}), ANY_AUDIENCE),
]


@pytest.mark.parametrize("question", STRANGERS, ids=range(len(STRANGERS)))
@pytest.mark.parametrize("warm", [False, True])
def test_judge_who_may_not_validate_the_audience_cannot_tell_tokens_apart(
    question: Question, warm: bool
) -> None:
    rig = Rig()
    tokens = _of_every_kind(rig)
    if warm:
        assert [rig(token).reason for token in tokens.values()] == list(tokens)
    checked = rig.verifier.checked
    verdicts = [rig.judge(token, question, BOOT) for token in tokens.values()]
    shown = {tuple(getattr(v, f.name) for f in fields(Verdict)) for v in verdicts}
    assert len(shown) == 1
    assert verdicts[0] == Verdict(
        Reason.TOKEN_INACTIVE, rig.state.revision, NOW, NOW, visible=False
    )
    assert rig.verifier.checked == checked, "no work is done for a stranger"
    assert [rig(token).reason for token in tokens.values()] == list(tokens)


def test_judge_an_expected_audience_out_of_the_entitlement_hides_even_the_form() -> None:
    rig = Rig()
    hidden = Question(frozenset({ORDERS}), PAYMENTS)
    assert rig.judge("no token", hidden, BOOT) == rig.judge(rig.token(), hidden, BOOT)
    assert rig("no token").reason is Reason.TOKEN_MALFORMED


@pytest.mark.parametrize(
    ("audiences", "expected", "aud", "reason"),
    [
        ({PAYMENTS}, "", PAYMENTS, Reason.UNSPECIFIED),
        ({PAYMENTS}, PAYMENTS, PAYMENTS, Reason.UNSPECIFIED),
        ({PAYMENTS, ORDERS}, ORDERS, PAYMENTS, Reason.TOKEN_AUDIENCE_WRONG),
        ({PAYMENTS, ORDERS}, ORDERS, [ORDERS, STRANGER], Reason.UNSPECIFIED),
        ({PAYMENTS}, PAYMENTS, [STRANGER, PAYMENTS], Reason.UNSPECIFIED),
        ({PAYMENTS}, PAYMENTS, [STRANGER], Reason.TOKEN_INACTIVE),
        ({PAYMENTS}, STRANGER, [STRANGER, PAYMENTS], Reason.TOKEN_INACTIVE),
        ({ANY_AUDIENCE}, "", STRANGER, Reason.UNSPECIFIED),
        ({ANY_AUDIENCE}, PAYMENTS, PAYMENTS, Reason.UNSPECIFIED),
        ({ANY_AUDIENCE}, PAYMENTS, STRANGER, Reason.TOKEN_AUDIENCE_WRONG),
        ({PAYMENTS}, "", ANY_AUDIENCE, Reason.TOKEN_INACTIVE),
        ({PAYMENTS}, PAYMENTS, [ANY_AUDIENCE], Reason.TOKEN_INACTIVE),
        ({PAYMENTS}, PAYMENTS, PAYMENTS + ".evil", Reason.TOKEN_INACTIVE),
    ],
)
def test_judge_audience(
    audiences: set[str], expected: str, aud: str | list[str], reason: Reason
) -> None:
    rig = Rig()
    token = rig.token(aud=aud)
    question = Question(frozenset(audiences), expected)
    for _ in range(2):
        assert rig.judge(token, question, BOOT).reason is reason


# Times


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": NOW - LEEWAY_S + 1}, Reason.UNSPECIFIED),
        ({"exp": NOW - LEEWAY_S}, Reason.TOKEN_EXPIRED),
        ({"exp": NOW}, Reason.UNSPECIFIED),
        ({"exp": 0}, Reason.TOKEN_EXPIRED),
        ({"iat": NOW + LEEWAY_S}, Reason.UNSPECIFIED),
        ({"iat": NOW + LEEWAY_S + 1}, Reason.TOKEN_NOT_YET_VALID),
        ({"nbf": NOW + LEEWAY_S}, Reason.UNSPECIFIED),
        ({"nbf": NOW + LEEWAY_S + 1}, Reason.TOKEN_NOT_YET_VALID),
        ({"nbf": 2**63 - 1}, Reason.TOKEN_NOT_YET_VALID),
        ({"exp": NOW + 3600}, Reason.UNSPECIFIED),
        ({"exp": NOW + 3601}, Reason.TOKEN_MALFORMED),
        ({"exp": NOW + 3600 + LEEWAY_S, "iat": NOW + LEEWAY_S}, Reason.UNSPECIFIED),
    ],
)
def test_judge_times(changes: dict[str, int], reason: Reason) -> None:
    rig = Rig()
    assert rig(rig.token(**changes)).reason is reason


def test_judge_cached_token_expires_at_the_leeway_to_the_moment() -> None:
    rig = Rig()
    token = rig.token()
    end = BOOT + 300 + LEEWAY_S
    for boot, reason in [
        (BOOT, Reason.UNSPECIFIED),
        (end - 0.001, Reason.UNSPECIFIED),
        (end, Reason.TOKEN_EXPIRED),
    ]:
        rig.state.confirm(boot, NOW + boot - BOOT)
        assert rig(token, boot).reason is reason
    assert rig.verifier.checked == 1


def test_judge_an_expired_token_stays_expired_when_the_database_clock_goes_back() -> None:
    rig = Rig()
    token = rig.token()
    boot = BOOT + 300 + LEEWAY_S
    rig.state.confirm(boot - 5, NOW + 300 + LEEWAY_S - 5)
    assert rig(token, boot - 1).active
    assert rig(token, boot).reason is Reason.TOKEN_EXPIRED
    rig.state.confirm(boot - 4, NOW + 200)  # a read that began before that call
    assert rig(token, boot + 1).reason is Reason.TOKEN_EXPIRED


@pytest.mark.parametrize(
    ("exp", "until"),
    [(NOW + 300, NOW + REUSABLE_S), (NOW + 1, NOW + 1), (NOW, NOW), (NOW - 10, NOW - 10)],
)
def test_judge_reusable_until_is_at_most_a_second_and_never_past_the_end(
    exp: int, until: float
) -> None:
    rig = Rig()
    token = rig.token(exp=exp)
    for scopes in (frozenset[str](), frozenset({"pay.admin"})):
        assert rig(token, scopes=scopes).reusable_until == until
    dead = rig(token, audience=ORDERS)
    assert dead.reusable_until == dead.check_time


# What died


CUTOFFS: list[tuple[MarkerKind, tuple[str, ...], tuple[str, ...]]] = [
    (MarkerKind.CUTOFF_CLIENT, ("shop",), ("shop2",)),
    (MarkerKind.CUTOFF_CLIENT, ("alice",), ("alic",)),
    (MarkerKind.CUTOFF_CLIENT, ("agent",), ("jti-1",)),
    (MarkerKind.CUTOFF_CLIENT, ("robot",), ("agent2",)),
    (MarkerKind.CUTOFF_SUBJECT, ("alice",), ("gid-1",)),
    (MarkerKind.CUTOFF_SUBJECT, ("shop",), ("shop2",)),
    (MarkerKind.CUTOFF_SUBJECT, ("agent",), ("agen",)),
    (MarkerKind.CUTOFF_SUBJECT, ("robot",), ("jti-1",)),
    (MarkerKind.CUTOFF_SUBJECT_CLIENT, ("alice", "shop"), ("shop", "alice")),
    (MarkerKind.CUTOFF_SUBJECT_CLIENT, ("alice", "agent"), ("agent", "alice")),
    (MarkerKind.CUTOFF_SUBJECT_CLIENT, ("alice", "robot"), ("agent", "robot")),
    (MarkerKind.CUTOFF_SUBJECT_CLIENT, ("agent", "shop"), ("alice", "other")),
    (MarkerKind.CUTOFF_SUBJECT_CLIENT, ("robot", "shop"), ("robo", "tshop")),
    (MarkerKind.CUTOFF_SUBJECT_CLIENT, ("alice", "alice"), ("shop", "shop")),
    (MarkerKind.CUTOFF_RESOURCE, (PAYMENTS,), (ORDERS,)),
]


@pytest.mark.parametrize(("kind", "ids", "near"), CUTOFFS)
@pytest.mark.parametrize("warm", [False, True])
def test_judge_cutoff_kills_what_has_a_lower_rev(
    kind: MarkerKind, ids: tuple[str, ...], near: tuple[str, ...], warm: bool
) -> None:
    rig = Rig()
    token = rig.token()
    if warm:
        assert rig(token).active
    rig.mark(kind, *near, revision=REVISION + 1)
    rig.mark(kind, *ids, revision=REVISION)
    assert rig(token).active, "neither another's cutoff nor one at its own revision"
    rig.mark(kind, *ids, revision=REVISION + 1)
    assert rig(token).reason is Reason.TOKEN_CUT_OFF
    assert rig(rig.token(rev=REVISION + 1)).active


ALL_CUTOFFS: list[tuple[MarkerKind, tuple[str, ...]]] = [
    (MarkerKind.CUTOFF_EVERYTHING, ()),
    *[(kind, ids) for kind, ids, _ in CUTOFFS],
]


@pytest.mark.parametrize(("one", "other"), list(permutations(range(len(ALL_CUTOFFS)), 2)))
def test_judge_of_two_cutoffs_the_maximum_wins_in_both_orders(one: int, other: int) -> None:
    """CVE-2026-18218: an older, nonzero cutoff of everything hid the newer one of a client."""
    rig = Rig()
    token = rig.token()
    older = marker(ALL_CUTOFFS[one][0], *ALL_CUTOFFS[one][1], revision=REVISION - 7)
    newer = marker(ALL_CUTOFFS[other][0], *ALL_CUTOFFS[other][1], revision=REVISION + 7)
    rig.state.apply([older], REVISION + 9)
    assert rig(token).active
    rig.state.apply([newer], REVISION + 9)
    assert rig(token).reason is Reason.TOKEN_CUT_OFF
    rig.state.apply([older], REVISION + 9)
    assert rig(token).reason is Reason.TOKEN_CUT_OFF, "a repeated older one lifts nothing"
    assert rig(rig.token(rev=REVISION + 7)).active


@pytest.mark.parametrize(("kind", "ids"), ALL_CUTOFFS)
def test_judge_an_older_cutoff_of_the_same_kind_lifts_nothing(
    kind: MarkerKind, ids: tuple[str, ...]
) -> None:
    rig = Rig()
    token = rig.token()
    assert rig(token).active
    for revision in (REVISION + 7, REVISION - 7, REVISION + 3):
        rig.mark(kind, *ids, revision=revision)
        assert rig(token).reason is Reason.TOKEN_CUT_OFF
        assert rig(rig.token(rev=REVISION + 6)).reason is Reason.TOKEN_CUT_OFF
    assert rig(rig.token(rev=REVISION + 7)).active


MARKS: list[tuple[MarkerKind, str, Reason, str]] = [
    (MarkerKind.TOKEN_DEAD, "jti-1", Reason.TOKEN_REVOKED, "jti"),
    (MarkerKind.TOKEN_DEAD, "rti-1", Reason.TOKEN_REVOKED, "rti"),
    (MarkerKind.GRANT_DEAD, "gid-1", Reason.GRANT_REVOKED, "gid"),
    (MarkerKind.SESSION_DEAD, "sid-1", Reason.SESSION_ENDED, "sid"),
]


@pytest.mark.parametrize(("kind", "id_", "reason", "claim"), MARKS)
def test_judge_dead_mark_kills_by_its_own_claim_only(
    kind: MarkerKind, id_: str, reason: Reason, claim: str
) -> None:
    rig = Rig()
    token, other = rig.token(), rig.token(**{claim: "another"})
    for wrong in {MarkerKind.TOKEN_DEAD, MarkerKind.GRANT_DEAD, MarkerKind.SESSION_DEAD} - {kind}:
        rig.mark(wrong, id_)
    assert rig(token).active
    rig.mark(kind, id_)
    assert rig(token).reason is reason
    assert rig(other).active
    if claim != "jti":
        assert rig(rig.token(claim)).active


def test_judge_tainted_key_kills_all_its_tokens_and_no_others() -> None:
    rig, second = Rig(), Key("key-2")
    rig.state.replace_keys([KEY.jwk, second.jwk])
    rig.mark(MarkerKind.KEY_TAINTED, "key-1")
    assert rig(rig.token(jti="j", rev=2**62)).reason is Reason.TOKEN_KEY_TAINTED
    assert rig(second.sign(claims())).active
    assert rig(second.sign(claims(kids=["key-3"]))).active
    exchanged = rig(second.sign(claims(kids=["key-3", "key-1"])))
    assert exchanged.reason is Reason.TOKEN_KEY_TAINTED


def test_judge_marks_survive_snapshots_and_epochs_until_they_run_out() -> None:
    rig = Rig()
    token, cut = rig.token(exp=NOW + 3600), rig.token(exp=NOW + 3600, jti="jti-2", sub="bob")
    assert rig(token).active
    assert rig(cut).active
    rig.state.apply([marker(MarkerKind.TOKEN_DEAD, "jti-1")], REVISION + 1)
    rig.state.apply([marker(MarkerKind.CUTOFF_SUBJECT, "bob")], REVISION + 1)
    rig.state.apply([], REVISION + 50)  # a snapshot without them
    rig.state.apply([], 2 * REVISIONS_PER_EPOCH)  # another epoch
    rig.state.replace_keys([])
    rig.state.replace_keys([KEY.jwk])
    for elapsed in range(0, 3631, 30):
        rig.state.confirm(BOOT + elapsed, NOW + elapsed)
        ended = elapsed == 3600 + LEEWAY_S
        reasons = [rig(text, BOOT + elapsed).reason for text in (token, cut)]
        dead = [Reason.TOKEN_REVOKED, Reason.TOKEN_CUT_OFF]
        assert reasons == ([Reason.TOKEN_EXPIRED] * 2 if ended else dead)


# Keys


def test_judge_lost_key_refuses_cached_tokens_and_comes_back() -> None:
    rig, second = Rig(), Key("key-2")
    rig.state.replace_keys([KEY.jwk])
    token = rig.token()
    assert rig(token).active
    rig.state.replace_keys([second.jwk])
    assert rig(token).reason is Reason.TOKEN_KEY_UNKNOWN
    assert rig(second.sign(claims())).active
    rig.state.replace_keys([second.jwk, KEY.jwk])
    assert rig(token).active, "known again, so its tokens are good again"


def test_judge_key_replaced_under_its_kid_refuses_cached_tokens() -> None:
    rig, impostor = Rig(), Key("key-1")
    token = rig.token()
    assert rig(token).active
    rig.state.replace_keys([impostor.jwk])
    assert rig(token).reason is Reason.TOKEN_SIGNATURE_INVALID
    assert rig(impostor.sign(claims())).active


def test_judge_key_with_another_alg_is_unknown() -> None:
    rig = Rig()
    header = {**KEY.header, "alg": "RS256"}
    assert rig(rig.token()).active
    assert rig(KEY.sign(claims(), header)).reason is Reason.TOKEN_KEY_UNKNOWN


def test_judge_an_unchanged_key_keeps_what_it_verified() -> None:
    rig = Rig()
    token = rig.token()
    assert rig(token).active
    rig.state.replace_keys([Key("key-2").jwk, dict(KEY.jwk)])
    assert rig(token).active
    assert rig.verifier.checked == 1


# The cache says whose signature it is, and nothing else


def test_judge_cached_token_is_judged_anew_in_everything_but_its_signature() -> None:
    rig = Rig()
    token = rig.token(cnf={"x5t#S256": THUMBPRINT}, aud=[PAYMENTS, ORDERS])
    good: dict[str, Any] = {"thumbprint": THUMBPRINT, "scopes": frozenset({"pay.read"})}
    assert rig(token, **good).active
    cases: list[tuple[dict[str, Any], Reason]] = [
        ({"audiences": frozenset({STRANGER})}, Reason.TOKEN_INACTIVE),
        ({"audience": STRANGER}, Reason.TOKEN_INACTIVE),
        ({"audiences": frozenset({ANY_AUDIENCE}), "audience": "x"}, Reason.TOKEN_AUDIENCE_WRONG),
        ({"thumbprint": ""}, Reason.PROOF_MISSING),
        ({"thumbprint": THUMBPRINT.lower()}, Reason.PROOF_MISMATCH),
        ({"scopes": frozenset({"pay.admin"})}, Reason.INSUFFICIENT_SCOPE),
        ({"boot": BOOT + 100}, Reason.UNSPECIFIED),
    ]
    for changes, reason in cases:
        assert rig(token, **{**good, **changes}).reason is reason
        assert rig(token, **good).active
    rig.mark(MarkerKind.GRANT_DEAD, "gid-1")
    assert rig(token, **good).reason is Reason.GRANT_REVOKED
    assert rig.verifier.checked == 1


def test_judge_a_refused_signature_is_not_remembered_as_good() -> None:
    rig = Rig()
    forged = Key().sign(claims())
    for _ in range(3):
        assert rig(forged).reason is Reason.TOKEN_SIGNATURE_INVALID
    assert rig.verifier.checked == 3
    assert rig(rig.token()).active


def test_judge_a_full_cache_forgets_and_verifies_again() -> None:
    rig = Rig(cache_bytes=20_000)
    tokens = [rig.token(jti=f"jti-{index}") for index in range(30)]
    for token in tokens * 2:
        assert rig(token).active
    assert rig.verifier.checked > len(tokens)


# Staleness


def test_judge_never_confirmed_answers_nothing() -> None:
    rig = Rig()
    rig.state.confirmed = None
    for token in (rig.token(), "no token"):
        with pytest.raises(StateStale):
            rig(token)
    rig.state.confirm(BOOT, NOW)
    assert rig(rig.token()).active


def test_judge_past_the_bound_answers_nothing_cached_or_not() -> None:
    rig = Rig()
    token = rig.token()
    assert rig(token, BOOT + 120).active
    for stale in (token, rig.token(jti="new"), "no token"):
        with pytest.raises(StateStale) as caught:
            rig(stale, BOOT + 120.001)
        assert caught.value.age_s == pytest.approx(120.001)
    rig.state.confirm(BOOT + 121, NOW + 121)
    assert rig(token, BOOT + 121).active


@pytest.mark.parametrize("aud", [PAYMENTS, [ORDERS, PAYMENTS], [PAYMENTS, ORDERS]], ids=str)
def test_judge_an_audience_has_its_own_lower_bound(aud: str | list[str]) -> None:
    rig = Rig()
    rig.state.staleness = {PAYMENTS: 5.0, STRANGER: 1.0, ORDERS: 50.0}
    token, other = rig.token(aud=aud), rig.token(aud=ORDERS)
    assert rig(token, BOOT + 5).active
    with pytest.raises(StateStale):
        rig(token, BOOT + 5.001)
    assert rig(other, BOOT + 5.001, audience=ORDERS).active
    assert rig(token, BOOT + 5.001, audiences=frozenset({STRANGER}), audience="").visible is False


def test_judge_an_asker_can_raise_every_bound_and_only_so_far() -> None:
    rig = Rig()
    rig.state.staleness = {PAYMENTS: 5.0}
    token = rig.token()
    assert rig(token, BOOT + 200, open_s=200.0).active
    with pytest.raises(StateStale):
        rig(token, BOOT + 200.001, open_s=200.0)


def test_judge_an_audience_cannot_raise_the_bound() -> None:
    rig = Rig()
    rig.state.staleness = {PAYMENTS: 1000.0}
    assert rig(rig.token(), BOOT + 120).active
    with pytest.raises(StateStale):
        rig(rig.token(), BOOT + 121)


# Proof


@pytest.mark.parametrize(
    ("cnf", "changes", "reason"),
    [
        (None, {}, Reason.UNSPECIFIED),
        (None, {"thumbprint": THUMBPRINT}, Reason.UNSPECIFIED),
        (None, {"require_bound": True}, Reason.TOKEN_NOT_BOUND),
        (None, {"require_bound": True, "thumbprint": THUMBPRINT}, Reason.TOKEN_NOT_BOUND),
        ({"x5t#S256": THUMBPRINT}, {"thumbprint": THUMBPRINT}, Reason.UNSPECIFIED),
        (
            {"x5t#S256": THUMBPRINT},
            {"thumbprint": THUMBPRINT, "require_bound": True},
            Reason.UNSPECIFIED,
        ),
        ({"x5t#S256": THUMBPRINT}, {}, Reason.PROOF_MISSING),
        ({"x5t#S256": THUMBPRINT}, {"thumbprint": THUMBPRINT + "="}, Reason.PROOF_MISMATCH),
        ({"x5t#S256": THUMBPRINT + "="}, {"thumbprint": THUMBPRINT}, Reason.PROOF_MISMATCH),
        ({"x5t#S256": THUMBPRINT[:-1]}, {"thumbprint": THUMBPRINT}, Reason.PROOF_MISMATCH),
        ({"jkt": THUMBPRINT}, {}, Reason.PROOF_MISSING),
        ({"jkt": THUMBPRINT}, {"thumbprint": THUMBPRINT}, Reason.PROOF_MISSING),
        (
            {"jkt": THUMBPRINT, "x5t#S256": THUMBPRINT},
            {"thumbprint": THUMBPRINT},
            Reason.PROOF_MISSING,
        ),
        ({"x5t#S256": ""}, {}, Reason.TOKEN_MALFORMED),
        ({"x5t#S256": None}, {}, Reason.TOKEN_MALFORMED),
        ({"x5t": THUMBPRINT}, {"thumbprint": THUMBPRINT}, Reason.TOKEN_MALFORMED),
        ({"kid": "key-1"}, {}, Reason.TOKEN_MALFORMED),
        (
            {"x5t#S256": THUMBPRINT, "jwk": {}},
            {"thumbprint": THUMBPRINT},
            Reason.TOKEN_MALFORMED,
        ),
        ({}, {}, Reason.TOKEN_MALFORMED),
        ([], {}, Reason.TOKEN_MALFORMED),
        (THUMBPRINT, {"thumbprint": THUMBPRINT}, Reason.TOKEN_MALFORMED),
    ],
)
def test_judge_proof(cnf: Any, changes: dict[str, Any], reason: Reason) -> None:
    rig = Rig()
    token = rig.token() if cnf is None else rig.token(cnf=cnf)
    for _ in range(2):
        assert rig(token, **changes).reason is reason


def test_judge_a_null_cnf_is_not_an_absent_one() -> None:
    rig = Rig()
    assert rig(rig.token(cnf=None)).reason is Reason.TOKEN_MALFORMED


# For whoever revokes


def test_identify_gives_what_is_alive_whoever_asks() -> None:
    rig = Rig()
    token = rig.token(cnf={"x5t#S256": THUMBPRINT}, aud=STRANGER)
    found = rig.judge.identify(token, BOOT)
    assert found is not None
    assert found.claims.jti == "jti-1"
    for reason, other in _of_every_kind(rig).items():
        alive = reason in {Reason.UNSPECIFIED, Reason.PROOF_MISSING}
        assert (rig.judge.identify(other, BOOT) is not None) == alive
    rig.mark(MarkerKind.TOKEN_DEAD, "jti-1")
    assert rig.judge.identify(token, BOOT) is None
    with pytest.raises(StateStale):
        rig.judge.identify(token, BOOT + 121)
