"""A verdict that stands is the one that judging in full would give."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from authsvc_client.core.judge import REUSABLE_S, Question
from authsvc_client.core.markers import CUTOFF_KINDS, DEAD_KINDS, MarkerKind
from authsvc_client.core.standing import Standing
from authsvc_client.core.state import StateStale
from authsvc_client.core.step_up import StepUp

from .tokens import ASK, BOOT, KEY, NOW, PAYMENTS, Key, Rig, claims

OF_THE_TOKEN: dict[MarkerKind, tuple[str, ...]] = {
    MarkerKind.TOKEN_DEAD: ("jti-1",),
    MarkerKind.GRANT_DEAD: ("gid-1",),
    MarkerKind.SESSION_DEAD: ("sid-1",),
    MarkerKind.KEY_TAINTED: ("key-1",),
    MarkerKind.CUTOFF_EVERYTHING: (),
    MarkerKind.CUTOFF_CLIENT: ("shop",),
    MarkerKind.CUTOFF_SUBJECT: ("alice",),
    MarkerKind.CUTOFF_SUBJECT_CLIENT: ("alice", "shop"),
    MarkerKind.CUTOFF_RESOURCE: (PAYMENTS,),
}


def _standing(rig: Rig, question: Question = ASK, **changes: object) -> Standing:
    verdict = rig.judge(KEY.sign(claims(**changes)), question, BOOT)
    return Standing(rig.judge, verdict, question)


def test_it_holds_as_long_as_nothing_changes() -> None:
    rig = Rig()
    standing = _standing(rig)
    rig.state.confirm(BOOT + 200, NOW + 200)
    assert standing.at(BOOT + 200) == NOW + 200
    assert standing.at(BOOT + 300 - REUSABLE_S) == NOW + 300 - REUSABLE_S
    assert standing.at(BOOT + 300) is None
    assert rig.verifier.checked == 1


@pytest.mark.parametrize("kind", sorted(DEAD_KINDS | CUTOFF_KINDS))
def test_whatever_kills_ends_it_and_nothing_else_does(kind: MarkerKind) -> None:
    rig = Rig()
    standing = _standing(rig)
    if kind is not MarkerKind.CUTOFF_EVERYTHING:
        rig.mark(kind, "somebody", "else")
        assert standing.at(BOOT) == NOW
    rig.mark(kind, *OF_THE_TOKEN[kind])
    assert standing.at(BOOT) is None
    assert standing.at(BOOT) is None


def test_what_is_dead_before_it_is_kept_never_stands() -> None:
    rig = Rig()
    verdict = rig.judge(KEY.sign(claims()), ASK, BOOT)
    rig.mark(MarkerKind.TOKEN_DEAD, "jti-1")
    assert Standing(rig.judge, verdict, ASK).at(BOOT) is None


def test_other_keys_end_it() -> None:
    rig = Rig()
    standing = _standing(rig)
    rig.state.replace_keys([KEY.jwk, Key("key-2").jwk])
    assert standing.at(BOOT) is None


def test_age_ends_it_by_the_bound_of_its_audience() -> None:
    rig = Rig()
    standing = _standing(rig)
    rig.state.staleness = {PAYMENTS: 10.0}
    assert standing.at(BOOT + 10) == NOW + 10
    with pytest.raises(StateStale):
        standing.at(BOOT + 11)
    rig.state.staleness = {}
    with pytest.raises(StateStale):
        standing.at(BOOT + 121)


Spoil = Callable[[Question], Question]
NOT_KEPT: dict[str, Spoil] = {
    "step-up": lambda asked: replace(asked, step_up=StepUp(("silver",))),
    "permissions": lambda asked: replace(asked, permissions=frozenset({"pay"})),
    "an older state": lambda asked: replace(asked, open_s=300.0),
    "refused": lambda asked: replace(asked, scopes=frozenset({"pay.admin"})),
}


@pytest.mark.parametrize("what", NOT_KEPT)
def test_what_time_or_others_decide_is_not_kept(what: str) -> None:
    with pytest.raises(ValueError, match=r"not active|more than stands"):
        _standing(Rig(), NOT_KEPT[what](ASK), acr="silver")


def test_what_no_signature_told_is_not_kept() -> None:
    rig = Rig()
    verdict = rig.judge(KEY.sign(claims()), ASK, BOOT)
    assert verdict.verified is not None
    verdict.verified.verifier = None
    with pytest.raises(ValueError, match="not signed"):
        Standing(rig.judge, verdict, ASK)
