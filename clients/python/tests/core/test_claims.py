"""Claims, scopes and marker keys under generated input."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from authsvc_client.core.cache import BytesCache
from authsvc_client.core.claims import Claims, parse_claims
from authsvc_client.core.jws import KeyRefused, Refused, Verifier, decode, json_object
from authsvc_client.core.markers import KEY_BYTES, MarkerKind, marker_key
from authsvc_client.core.reason import Reason
from authsvc_client.v1.error_reason_pb2 import ErrorReason

from .tokens import KEY, NOW, REVISION, Rig, b64, claims

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = [*claims(), "nbf", "cnf", "acr", "amr", "auth_time", "may_act", "kids"]


def test_reasons_are_those_of_the_contract() -> None:
    contract = {name.removeprefix("ERROR_REASON_"): n for name, n in ErrorReason.items()}
    assert {reason.name: reason.value for reason in Reason} == contract


def test_claims_of_a_full_payload() -> None:
    payload = claims(
        aud=["a", "b"],
        nbf=NOW,
        auth_time=NOW - 5,
        acr="gold",
        amr=["pwd", "otp"],
        cnf={"x5t#S256": "t", "jkt": "k"},
        may_act={"sub": "agent"},
        kids=["key-0", "key-2"],
    )
    assert parse_claims(payload) == Claims(
        issuer=payload["iss"],
        subject="alice",
        audiences=("a", "b"),
        expires=NOW + 300,
        issued=NOW,
        jti="jti-1",
        client_id="shop",
        scopes=frozenset({"pay.read", "pay.write"}),
        revision=REVISION,
        not_before=NOW,
        grant_id="gid-1",
        session_id="sid-1",
        root_jti="rti-1",
        certificate_thumbprint="t",
        jwk_thumbprint="k",
        auth_time=NOW - 5,
        acr="gold",
        amr=("pwd", "otp"),
        actors=("agent", "robot"),
        may_act="agent",
        key_ids=("key-0", "key-2"),
    )


@pytest.mark.parametrize(
    "may_act", ["agent", ["agent"], {}, {"sub": ""}, {"sub": 1}, {"sub": "a", "iss": "b"}]
)
def test_claims_a_party_that_is_not_named_by_its_sub_alone_is_refused(may_act: Any) -> None:
    """RFC 8693 section 4.4: `iss` and others would make it another party."""
    with pytest.raises(Refused):
        parse_claims(claims(may_act=may_act))


def test_claims_of_the_least_payload() -> None:
    least = parse_claims(claims("scope", "gid", "sid", "rti", "act"))
    assert least[8:] == (REVISION, 0, "", "", "", "", "", None, "", (), (), "", (), (), 0)
    assert least.scopes == frozenset()


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=6))
@settings(max_examples=150)
def test_parser_raises_nothing_but_refused(changes: dict[str, Any]) -> None:
    for payload in (changes, {**claims(), **changes}):
        try:
            parsed = parse_claims(payload)
        except Refused:
            continue
        assert hash(parsed) is not None, "all of it immutable"


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=4))
@settings(max_examples=150)
def test_signed_token_with_any_claims_gets_a_verdict(changes: dict[str, Any]) -> None:
    rig = Rig()
    payload = {**claims(), **changes}
    token = KEY.sign(json.dumps(payload).encode())
    for _ in range(2):
        verdict = rig(token)
        if verdict.active:
            assert parse_claims(payload) == verdict.claims


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_any_signed_bytes_get_a_verdict(raw: bytes) -> None:
    rig = Rig()
    assert not rig(KEY.sign(raw)).active
    assert not rig(KEY.sign(claims(), raw)).active


@given(st.binary(max_size=200))
def test_decode_takes_what_was_encoded_and_only_that(raw: bytes) -> None:
    assert decode(b64(raw)) == raw


@given(st.text(max_size=12) | st.text("AQgw-_=+/ \n", max_size=12))
@example("QUJD====")
@example("QQ==")
@example("QR")
@example("Q")
@example("====")
@example("QUJD=")
@example("QQ\n")
@settings(max_examples=1000)
def test_decode_refuses_every_other_spelling(text: str) -> None:
    try:
        raw = decode(text)
    except Refused:
        return
    assert b64(raw) == text


@given(JSON)
@settings(max_examples=150)
def test_json_object_reads_back_what_is_plain(value: Any) -> None:
    raw = json.dumps({"v": value}).encode()
    text = raw.decode()
    odd = "NaN" in text or "Infinity" in text or re.search(r"\\ud[89a-f]", text)
    try:
        assert json_object(raw) == json.loads(text)
    except Refused:
        assert odd


# Scopes

SCOPES = st.frozensets(st.text(st.characters(codec="ascii", exclude_characters=' "\\'), min_size=1))


@given(granted=SCOPES, required=SCOPES, both=SCOPES)
def test_scopes_suffice_exactly_when_all_are_granted(
    granted: frozenset[str], required: frozenset[str], both: frozenset[str]
) -> None:
    rig = Rig()
    granted, required = granted | both, required | both
    changes = {"scope": " ".join(sorted(granted))} if granted else {}
    token = rig.token(*(() if granted else ("scope",)), **changes)
    verdict = rig(token, scopes=required)
    assert verdict.active == (required <= granted)
    assert verdict.missing_scopes == required - granted
    assert verdict.claims is not None


@pytest.mark.parametrize("required", ["pay", "pay.rea", "pay.read ", "PAY.READ", "*", "pay.*", ""])
def test_a_scope_is_compared_whole(required: str) -> None:
    rig = Rig()
    token = rig.token(scope="pay.read pay.write * x")
    assert rig(token, scopes=frozenset({"pay.read", "*"})).active
    if required != "*":
        assert rig(token, scopes=frozenset({required})).reason is Reason.INSUFFICIENT_SCOPE


# Marker keys

IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3).map(tuple)


@given(st.sampled_from(MarkerKind), st.sampled_from(MarkerKind), IDS, IDS)
def test_marker_keys_differ_where_kind_or_ids_do(
    one: MarkerKind, two: MarkerKind, these: tuple[str, ...], those: tuple[str, ...]
) -> None:
    same = (one, these) == (two, those)
    assert (marker_key(one, *these) == marker_key(two, *those)) == same


def test_marker_keys_do_not_collide_by_how_ids_are_cut() -> None:
    kind = MarkerKind.CUTOFF_SUBJECT_CLIENT
    cut: list[tuple[str, ...]] = [
        (), ("",), ("", ""), ("a", "bc"), ("ab", "c"), ("abc",), ("abc", ""), ("", "abc"),
        ("a\0bc",),
        ("a", "\0bc"), ("a\0\0\0\2bc",), ("a", "b", "c"), ("\0\0\0\1a\0\0\0\2bc",), ("\u00e9",),
        ("e\u0301",),
    ]  # fmt: skip
    keys = {marker_key(kind, *ids) for ids in cut}
    assert len(keys) == len(cut)
    assert {len(key) for key in keys} == {KEY_BYTES}


def test_marker_key_is_the_one_that_others_compute() -> None:
    """Pinned: every client and every stored row must agree."""
    assert marker_key(MarkerKind.TOKEN_DEAD, "jti-1").hex() == "28db25df20898fbf06e5317479d5fd33"
    pair = marker_key(MarkerKind.CUTOFF_SUBJECT_CLIENT, "alice", "shop")
    assert pair.hex() == "da7767d7ae31cfa97f1ddb3f3a3f5b5a"


# Keys


@given(
    st.dictionaries(st.sampled_from([*KEY.jwk, "key_ops", "d", "k", "n", "e"]), JSON, max_size=4)
)
@settings(max_examples=150)
def test_jwk_of_any_form_is_refused_or_loaded(changes: dict[str, Any]) -> None:
    for jwk in (changes, {**KEY.jwk, **changes}):
        try:
            verifier = Verifier(jwk)
        except KeyRefused:
            continue
        assert verifier.alg == KEY.alg


# The cache


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60), st.booleans()), max_size=50))
def test_cache_never_holds_more_than_its_bytes_nor_answers_wrongly(
    steps: list[tuple[int, int, bool]],
) -> None:
    cache: BytesCache[int, int] = BytesCache(100)
    last: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for step, (key, size, drop) in enumerate(steps):
        if drop:
            cache.drop(key)
            last.pop(key, None)
            sizes.pop(key, None)
            assert cache.get(key) is None
        else:
            cache.put(key, step, size)
            last[key], sizes[key] = step, size
            assert cache.get(key) == (step if size <= 50 else None)
        assert all(cache.get(name) in {None, value} for name, value in last.items())
        assert len(cache) <= 10
        assert sum(size for name, size in sizes.items() if cache.get(name) is not None) <= 100
