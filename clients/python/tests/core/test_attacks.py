"""The attack shapes on JWTs, each beside the live token that is accepted in the same test."""

import hashlib
import hmac
import inspect
import json
import socket
import sys
import tracemalloc
from typing import Any, NoReturn

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from authsvc_client.core.judge import Verdict
from authsvc_client.core.jws import TOKEN_CHARS_MAX
from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.reason import Reason

from .tokens import ISSUER, KEY, NOW, PAYMENTS, REVISION, THUMBPRINT, Key, Rig, b64, claims, dump

MALFORMED = Reason.TOKEN_MALFORMED
UNKNOWN = Reason.TOKEN_KEY_UNKNOWN


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """Its live token is accepted, and nothing that follows may open a connection."""
    rig = Rig()
    assert rig(rig.token()).active

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return rig


def _refused(verdict: Verdict, *reasons: Reason) -> None:
    assert not verdict.active
    assert verdict.claims is None
    assert not reasons or verdict.reason in reasons


# Header: algorithm


ALGS: list[Any] = [
    "none", "None", "NONE", "nOnE", "", " ES256", "es256", "ES256 ", "ES384", "ES256K", "RS256",
    "PS256", "EdDSA", "Ed25519", "HS256", "dir", "RSA-OAEP", ["ES256"], {"a": 1}, 256, None, True,
]  # fmt: skip


@pytest.mark.parametrize("alg", ALGS, ids=repr)
def test_alg_other_than_the_keys_is_refused(rig: Rig, alg: Any) -> None:
    header = {**KEY.header, "alg": alg}
    _refused(rig(KEY.sign(claims(), header)), UNKNOWN)
    body = f"{b64(dump(header))}.{b64(dump(claims()))}"
    for signature in ("", "AA", b64(bytes(64))):
        _refused(rig(f"{body}.{signature}"), UNKNOWN, MALFORMED)


def test_alg_missing_or_doubled_is_refused(rig: Rig) -> None:
    _refused(rig(KEY.sign(claims(), {"kid": "key-1", "typ": "at+jwt"})), MALFORMED)
    for pair in ('"alg":"none","alg":"ES256"', '"alg":"ES256","alg":"none"'):
        header = f'{{{pair},"kid":"key-1","typ":"at+jwt"}}'.encode()
        _refused(rig(KEY.sign(claims(), header)), MALFORMED)


def _secrets() -> dict[str, bytes]:
    public = KEY.private.public_key()
    raw = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        "pem": pem,
        "pem without newline": pem.strip(),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "jwk": dump(KEY.jwk),
        "jwk with spaces": json.dumps(KEY.jwk).encode(),
        "jwks": dump({"keys": [KEY.jwk]}),
        "point": raw,
        "x and y": raw[1:],
        "x": raw[1:33],
        "x as text": KEY.jwk["x"].encode(),
        "empty": b"",
        "kid": b"key-1",
    }


@pytest.mark.parametrize("name", list(_secrets()))
@pytest.mark.parametrize("alg", ["HS256", "HS384", "HS512", "ES256"])
def test_hmac_keyed_with_our_public_key_is_refused(rig: Rig, name: str, alg: str) -> None:
    """CVE-2022-29217 and its class: what is public used as a secret."""
    body = f"{b64(dump({**KEY.header, 'alg': alg}))}.{b64(dump(claims()))}"
    digest = {"HS384": hashlib.sha384, "HS512": hashlib.sha512}.get(alg, hashlib.sha256)
    tag = hmac.new(_secrets()[name], body.encode(), digest).digest()
    _refused(rig(f"{body}.{b64(tag)}"), UNKNOWN, Reason.TOKEN_SIGNATURE_INVALID)
    _refused(rig(f"{body}.{b64(tag * 2)}"), UNKNOWN, Reason.TOKEN_SIGNATURE_INVALID)


@pytest.mark.parametrize("alg", ["RS256", "PS256"])
def test_rsa_key_is_held_to_its_own_algorithm(alg: str) -> None:
    key = Key(alg=alg)
    rig = Rig(key)
    assert rig(rig.token()).active
    key.alg = {"RS256": "PS256", "PS256": "RS256"}[alg]
    _refused(rig(rig.token()), UNKNOWN)
    _refused(rig(key.sign(claims(), {**key.header, "alg": alg})), Reason.TOKEN_SIGNATURE_INVALID)
    modulus = key.private.public_key().public_numbers().n.to_bytes(256, "big")
    body = f"{b64(dump({**key.header, 'alg': 'HS256'}))}.{b64(dump(claims()))}"
    tag = hmac.new(modulus, body.encode(), hashlib.sha256).digest()
    _refused(rig(f"{body}.{b64(tag)}"), UNKNOWN)


# Header: key


KIDS: list[Any] = [
    "../../../../dev/null", "/proc/sys/kernel/randomize_va_space", "' UNION SELECT 'x", "key-1\0",
    "key-1 ", "KEY-1", "", "\0", "*", "k" * 5000, "\ud800", "retired", "encryption", "tenant-2",
    1, 0, None, True, ["key-1"], {"kid": "key-1"}, "key-1/../key-1", "\uff4bey-1",
]  # fmt: skip


@pytest.mark.parametrize("kid", KIDS, ids=ascii)
def test_kid_that_is_no_key_of_ours_is_refused(rig: Rig, kid: Any) -> None:
    rig.state.replace_keys([KEY.jwk, Key("retired").jwk])
    rig.state.replace_keys([KEY.jwk])
    header = {**KEY.header, "kid": kid}
    _refused(rig(KEY.sign(claims(), header)), UNKNOWN, MALFORMED)
    body = f"{b64(dump({**header, 'alg': 'HS256'}))}.{b64(dump(claims()))}"
    tag = hmac.new(b"", body.encode(), hashlib.sha256).digest()
    _refused(rig(f"{body}.{b64(tag)}"), UNKNOWN, MALFORMED)


def test_kid_missing_or_of_a_megabyte_is_refused(rig: Rig) -> None:
    _refused(rig(KEY.sign(claims(), {"alg": "ES256", "typ": "at+jwt"})), MALFORMED)
    _refused(rig(KEY.sign(claims(), {**KEY.header, "kid": "k" * 2**20})), MALFORMED)


@pytest.mark.parametrize("kid", ["key-1", "attacker", None])
@pytest.mark.parametrize("signed_by", ["attacker", "us"])
def test_key_brought_along_is_refused(rig: Rig, kid: str | None, signed_by: str) -> None:
    """CVE-2026-27962 and its class; refused even when we signed it ourselves."""
    attacker = Key("attacker")
    signer = attacker if signed_by == "attacker" else KEY
    for extra in (
        {"jwk": attacker.jwk},
        {"jwk": KEY.jwk},
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/cert.pem"},
        {"x5c": ["MIIB"]},
        {"x5t": "AAAA", "x5t#S256": THUMBPRINT},
        {"jwk": None},
    ):
        header = {**KEY.header, "kid": kid, **extra}
        _refused(rig(signer.sign(claims(), header)), MALFORMED)
    stolen = {**attacker.header, "kid": "key-1"}
    _refused(rig(attacker.sign(claims(), stolen)), Reason.TOKEN_SIGNATURE_INVALID)


EXTRAS: list[dict[str, Any]] = [
    {"crit": ["x"], "x": 1}, {"crit": []}, {"crit": ["b64"], "b64": False}, {"crit": ["exp"]},
    {"crit": ["alg"]}, {"crit": None}, {"crit": "alg"}, {"b64": False}, {"b64": True},
    {"zip": "DEF"}, {"cty": "JWT"}, {"cty": None}, {"enc": "A256GCM"}, {"p2c": 2**31 - 1},
    {"epk": {}}, {"exp": NOW + 300}, {"iss": ISSUER}, {"": ""}, {"Alg": "ES256"}, {"nonce": "x"},
]  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS, ids=repr)
def test_header_member_that_is_not_ours_is_refused_not_ignored(
    rig: Rig, extra: dict[str, Any]
) -> None:
    """CVE-2026-32597, CVE-2025-59420: an unknown `crit` was accepted."""
    _refused(rig(KEY.sign(claims(), {**KEY.header, **extra})), MALFORMED)
    _refused(rig(KEY.sign(claims(), {**extra, **KEY.header})), MALFORMED)


def test_nested_token_is_refused(rig: Rig) -> None:
    inner = rig.token().encode()
    _refused(rig(KEY.sign(inner)), MALFORMED)
    _refused(rig(KEY.sign(inner, {**KEY.header, "cty": "JWT"})), MALFORMED)


def test_jwe_forms_are_refused_before_any_work(rig: Rig) -> None:
    header = {"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": 2**31 - 1, "p2s": "AAAA"}
    for alg in (header, {"alg": "dir", "enc": "A256GCM", "zip": "DEF"}):
        protected = b64(dump(alg))
        for key in ("", "AAAA"):
            _refused(rig(f"{protected}.{key}.AAAA.AAAA.AAAA"), MALFORMED)
    _refused(rig(json.dumps({"payload": b64(dump(claims())), "signatures": []})), MALFORMED)


TYPES: list[Any] = [
    "JWT", "jwt", "id_token", "dpop+jwt", "logout+jwt", "rt+jwt", "client-authentication+jwt",
    "token-introspection+jwt", "at+jwt ", "at +jwt", "at+jwtx", "", None, 1, ["at+jwt"],
    "application/jwt", "application/application/at+jwt", "text/at+jwt", "at+jwt; x=1",
    "\u0430t+jwt",
]  # fmt: skip


@pytest.mark.parametrize("typ", TYPES, ids=ascii)
def test_another_kind_of_token_is_refused(rig: Rig, typ: Any) -> None:
    _refused(rig(KEY.sign(claims(), {**KEY.header, "typ": typ})), Reason.TOKEN_TYPE_WRONG)


def test_type_missing_is_refused(rig: Rig) -> None:
    _refused(rig(KEY.sign(claims(), {"alg": "ES256", "kid": "key-1"})), Reason.TOKEN_TYPE_WRONG)


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt", "Application/At+JWT"])
def test_media_types_are_compared_without_case(rig: Rig, typ: str) -> None:
    """RFC 7515 section 4.1.9, RFC 9068 section 4."""
    assert rig(KEY.sign(claims(), {**KEY.header, "typ": typ})).active


# Payload, properly signed


@pytest.mark.parametrize("name", ["sub", "exp", "aud", "iss", "jti", "rev", "x", "cnf"])
def test_duplicate_claim_is_refused_in_both_orders(rig: Rig, name: str) -> None:
    payload = claims(x=1, cnf={"x5t#S256": THUMBPRINT})
    text = dump(payload).decode()
    member = f"{json.dumps(name)}:{dump(payload[name]).decode()}"
    assert rig(KEY.sign(text.encode()), thumbprint=THUMBPRINT).active
    escaped = member.replace('"' + name[0], f'"\\u{ord(name[0]):04x}', 1)
    for twice in (
        f"{{{member},{text[1:]}",
        f"{text[:-1]},{member}}}",
        f"{{{escaped},{text[1:]}",
    ):
        _refused(rig(KEY.sign(twice.encode()), thumbprint=THUMBPRINT), MALFORMED)


def test_duplicate_name_deep_inside_is_refused(rig: Rig) -> None:
    text = dump(claims(cnf={"x5t#S256": THUMBPRINT})).decode()
    doubled = text.replace('"cnf":{', '"cnf":{"x5t#S256":"A",')
    _refused(rig(KEY.sign(doubled.encode()), thumbprint=THUMBPRINT), MALFORMED)
    _refused(rig(KEY.sign(text.replace('"act":{', '"act":{"sub":"x",').encode())), MALFORMED)


AUDIENCES: list[Any] = [
    [], "", [""], [PAYMENTS, ""], [[PAYMENTS]], [PAYMENTS, 1], [PAYMENTS, None], None, 1, True,
    {PAYMENTS: 1}, [{"aud": PAYMENTS}],
]  # fmt: skip


@pytest.mark.parametrize("aud", AUDIENCES, ids=repr)
def test_audience_of_another_form_is_refused(rig: Rig, aud: Any) -> None:
    _refused(rig(rig.token(aud=aud)), MALFORMED)
    _refused(rig(rig.token(aud=aud), audiences=frozenset({"*"}), audience=""), MALFORMED)


@pytest.mark.parametrize(
    "aud",
    [PAYMENTS[:-1], PAYMENTS + "/", PAYMENTS + "x", PAYMENTS.upper(), " " + PAYMENTS,
     PAYMENTS + "\0", f"{PAYMENTS} https://orders", "https://pay", "*", "payments.example",
     f"{PAYMENTS},{PAYMENTS}"],
)  # fmt: skip
def test_audience_is_compared_whole(rig: Rig, aud: str) -> None:
    """CVE-2024-53861: a part of the text was enough."""
    for form in (aud, [aud]):
        _refused(rig(rig.token(aud=form)), Reason.TOKEN_INACTIVE)
        _refused(rig(rig.token(aud=form), audiences=frozenset({"*"})), Reason.TOKEN_AUDIENCE_WRONG)


@pytest.mark.parametrize(
    "iss",
    [ISSUER[:-1], ISSUER + "/", "https://auth", ISSUER.upper(), "", None, 1, [ISSUER],
     {ISSUER: 1}, ISSUER + "\0", " " + ISSUER, True],
)  # fmt: skip
def test_issuer_is_compared_whole(rig: Rig, iss: Any) -> None:
    _refused(rig(rig.token(iss=iss)), Reason.TOKEN_ISSUER_WRONG)


NUMBERS = [
    "1800000300.0", "1800000300.5", "1.8e9", '"1800000300"', "1e400", "-1e400", "1E400", "-1",
    "-0.0", str(2**63), str(2**64), "9" * 300, "9" * 5000, "true", "false", "null", "[]", "{}",
    '""', "[1800000300]", "NaN", "Infinity", "-Infinity", "0x6b49d32c", "+1800000300",
    "01800000300",
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda text: text[:20])
@pytest.mark.parametrize("name", ["exp", "iat", "nbf", "rev", "auth_time"])
def test_number_of_another_form_is_refused(rig: Rig, name: str, number: str) -> None:
    payload = claims(nbf=NOW, auth_time=NOW)
    assert rig(KEY.sign(payload)).active
    hostile = dump({**payload, name: "HERE"}).decode().replace('"HERE"', number)
    _refused(rig(KEY.sign(hostile.encode())), MALFORMED)


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "exp", "iat", "jti", "client_id", "rev"])
def test_claim_missing_is_refused(rig: Rig, name: str) -> None:
    _refused(rig(rig.token(name)), MALFORMED, Reason.TOKEN_ISSUER_WRONG)


@pytest.mark.parametrize("name", ["sub", "jti", "client_id", "scope", "gid", "sid", "rti", "acr"])
@pytest.mark.parametrize("value", ["", None, 1, True, [], {}, ["x"]], ids=repr)
def test_text_of_another_form_is_refused(rig: Rig, name: str, value: Any) -> None:
    _refused(rig(rig.token(**{name: value})), MALFORMED)


def _nested(depth: int) -> dict[str, Any]:
    act: dict[str, Any] = {"sub": "actor"}
    for _ in range(depth - 1):
        act = {"sub": "actor", "act": act}
    return act


ACTORS: list[Any] = [
    {}, {"sub": ""}, {"sub": 1}, {"act": {"sub": "x"}}, {"sub": "x", "act": {}}, [], "x", None, 1,
    {"sub": "x", "act": None}, {"sub": "x", "act": [{"sub": "y"}]}, _nested(9), _nested(100),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTORS, ids=range(len(ACTORS)))
def test_chain_of_actors_of_another_form_is_refused(rig: Rig, act: Any) -> None:
    assert rig(rig.token(act=_nested(8))).active
    _refused(rig(rig.token(act=act)), MALFORMED)


@pytest.mark.parametrize(
    "scope",
    [" ", "a  b", " a", "a ", "a\u00a0pay.admin ", "  "],
)
def test_scope_with_empty_parts_is_refused(rig: Rig, scope: str) -> None:
    _refused(rig(rig.token(scope=scope)), MALFORMED)


@pytest.mark.parametrize("space", ["\u00a0", "\t", "\n", "\r", "\u2003", "\x1f", "\x85", "\u3000"])
def test_only_a_space_parts_scopes(rig: Rig, space: str) -> None:
    token = rig.token(scope=f"pay.read{space}pay.admin")
    verdict = rig(token, scopes=frozenset({"pay.admin"}))
    assert verdict.reason is Reason.INSUFFICIENT_SCOPE
    assert rig(rig.token(scope="pay.read pay.admin"), scopes=frozenset({"pay.admin"})).active


# Bytes that others read in another way


TEXT = dump(claims())
ENCODINGS = {
    "utf-16": TEXT.decode().encode("utf-16"),
    "utf-16-le": TEXT.decode().encode("utf-16-le"),
    "utf-32-be": TEXT.decode().encode("utf-32-be"),
    "bom": b"\xef\xbb\xbf" + TEXT,
    "not utf-8": TEXT.replace(b"alice", b"al\xffce"),
    "overlong": TEXT.replace(b"alice", b"al\xc0\xafce"),
    "surrogate in utf-8": TEXT.replace(b"alice", b"al\xed\xa0\x80ce"),
    "cut in a character": TEXT.replace(b"alice", b"al\xe2\x82"),
    "nul in text": TEXT.replace(b"alice", b"al\0ice"),
    "nul after": TEXT + b"\0",
    "newline in text": TEXT.replace(b"alice", b"al\nice"),
    "space before": b" " + TEXT,
    "newline after": TEXT + b"\n",
    "second object": TEXT + TEXT,
    "comment": TEXT[:-1] + b"/**/}",
    "trailing comma": TEXT[:-1] + b",}",
    "array": b"[" + TEXT + b"]",
    "string": dump(TEXT.decode()),
    "null": b"null",
    "number": b"1",
    "nothing": b"",
    "empty": b"{}",
    "single quotes": TEXT.replace(b'"', b"'"),
    "bad escape": TEXT.replace(b"alice", b"al\\xice"),
    "nan": TEXT[:-1] + b',"x":NaN}',
    "infinity": TEXT[:-1] + b',"x":[-Infinity]}',
    "many digits": TEXT[:-1] + b',"x":' + b"9" * 4400 + b"}",
}


@pytest.mark.parametrize("name", list(ENCODINGS))
def test_payload_that_is_not_one_plain_json_object_is_refused(rig: Rig, name: str) -> None:
    assert rig(KEY.sign(TEXT)).active
    _refused(rig(KEY.sign(ENCODINGS[name])), MALFORMED)


@pytest.mark.parametrize("name", list(ENCODINGS))
def test_header_that_is_not_one_plain_json_object_is_refused(rig: Rig, name: str) -> None:
    header = dump(KEY.header)
    assert rig(KEY.sign(claims(), header)).active
    hostile = ENCODINGS[name].replace(TEXT, header).replace(TEXT[:-1], header[:-1])
    _refused(rig(KEY.sign(claims(), hostile)), MALFORMED, Reason.TOKEN_TYPE_WRONG)


@pytest.mark.parametrize(
    "name", ["sub", "jti", "client_id", "gid", "sid", "rti", "aud", "iss", "scope", "acr", "other"]
)
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ude00\ud83d"], ids=ascii)
def test_lone_surrogate_is_refused_and_raises_nothing(rig: Rig, name: str, text: str) -> None:
    """No UTF-8 holds it, so neither a marker's key nor an answer could."""
    for changes in ({name: text}, {"act": {"sub": text}}, {"amr": [text]}, {text: 1}):
        _refused(rig(rig.token(**changes)), MALFORMED)
    assert rig(rig.token(other="\U0001f600")).active, "a pair is one character"


@pytest.mark.parametrize("name", ["sub", "jti", "client_id", "gid", "sid", "rti"])
def test_ids_may_hold_any_character_and_are_killed_by_exactly_it(rig: Rig, name: str) -> None:
    kinds = {
        "sub": MarkerKind.CUTOFF_SUBJECT,
        "jti": MarkerKind.TOKEN_DEAD,
        "client_id": MarkerKind.CUTOFF_CLIENT,
        "gid": MarkerKind.GRANT_DEAD,
        "sid": MarkerKind.SESSION_DEAD,
        "rti": MarkerKind.TOKEN_DEAD,
    }
    for text in ("a\0b", "\u00e9", "e\u0301", "\U0001f600", "A" * 1000, " ", "%00"):
        token = rig.token(**{name: text})
        rig.mark(kinds[name], text + " ", revision=REVISION + 1)
        rig.mark(kinds[name], text.replace("\0", ""), revision=REVISION)
        if "\0" in text or kinds[name] in {MarkerKind.CUTOFF_SUBJECT, MarkerKind.CUTOFF_CLIENT}:
            assert rig(token).active
        rig.mark(kinds[name], text, revision=REVISION + 1)
        _refused(rig(token))


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'], ids=ascii)
@pytest.mark.parametrize("where", ["claim", "header", "payload"])
def test_deep_nesting_raises_nothing(rig: Rig, opening: bytes, where: str) -> None:
    room = 5500 // len(opening)
    for depth in (10, 500, 990, 1000, room):
        closing = b"".join({91: b"]", 123: b"}"}.get(char, b"") for char in reversed(opening))
        deep = opening * depth + b"1" + closing * depth
        if where == "header":
            _refused(rig(KEY.sign(claims(), deep)), MALFORMED, Reason.TOKEN_TYPE_WRONG)
        elif where == "payload":
            _refused(rig(KEY.sign(deep)), MALFORMED)
            _refused(rig(KEY.sign(opening * depth)), MALFORMED)
        else:
            token = KEY.sign(TEXT[:-1] + b',"x":' + deep + b',"u":"\\u0041"}')
            assert rig(token).reason in {Reason.UNSPECIFIED, MALFORMED}
            assert rig(token).active or depth > 300


def test_nesting_near_the_end_of_the_stack_raises_nothing(rig: Rig) -> None:
    """The judge may be called from deep inside somebody's code."""
    tokens = [
        KEY.sign(TEXT[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}")
        for depth in (10, 100, 300)
    ]

    def descend(left: int) -> list[Reason]:
        return descend(left - 1) if left else [rig(token).reason for token in tokens]

    first, *rest = descend(sys.getrecursionlimit() - len(inspect.stack(0)) - 80)
    assert first is Reason.UNSPECIFIED
    assert set(rest) <= {Reason.UNSPECIFIED, MALFORMED}


# Size


def test_longest_token_is_still_accepted_and_one_more_character_is_not(rig: Rig) -> None:
    text = TEXT[:-1] + b',"x":"'
    length = len(KEY.sign(text + b'"}'))
    fill = (TOKEN_CHARS_MAX - length) * 3 // 4
    tokens = [KEY.sign(text + b"x" * (fill + more) + b'"}') for more in range(-3, 6)]
    assert {len(token) <= TOKEN_CHARS_MAX for token in tokens} == {True, False}
    for token in tokens:
        assert rig(token).active == (len(token) <= TOKEN_CHARS_MAX)


BIG = 10 * 2**20
SIZES = {
    "dots": lambda: "." * 10**6,
    "dots in a token": lambda: ".".join(["AAAA"] * 10**6),
    "header": lambda: KEY.sign(claims(), {**KEY.header, "x": "x" * BIG}),
    "payload": lambda: KEY.sign(claims(x="x" * BIG)),
    "signature": lambda: KEY.sign(claims()) + "A" * BIG,
    "no dot": lambda: "A" * BIG,
    "brackets": lambda: KEY.sign(b"[" * BIG),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_huge_token_is_refused_before_it_is_parsed(rig: Rig, name: str) -> None:
    """CVE-2025-30204, CVE-2025-27144, CVE-2025-61920: memory for each byte or dot of it."""
    token = SIZES[name]()
    checked = rig.verifier.checked
    tracemalloc.start()
    verdict = rig(token)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _refused(verdict, MALFORMED)
    assert peak < 64 * 1024
    assert rig.verifier.checked == checked
