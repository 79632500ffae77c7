"""Which keys may verify, and what a JWS of another kind may say in its header."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448

from authsvc_client.core.jws import KeyRefused, Refused, Verifier, verify_compact
from authsvc_client.core.reason import Reason

from .tokens import KEY, Key, b64, named, number

RSA = Key("rsa", "RS256")
ED = Key("ed", "EdDSA")
P384 = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
ODD = 2**16384 + 1


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (KEY, {"alg": None}),
        (KEY, {"alg": "RS256"}),
        (KEY, {"alg": "ES384"}),
        (KEY, {"alg": "HS256"}),
        (KEY, {"alg": ["ES256"]}),
        (KEY, {"kid": None}),
        (KEY, {"kid": 1}),
        (KEY, {"kty": "RSA"}),
        (KEY, {"kty": "ec"}),
        (KEY, {"crv": "P-384"}),
        (KEY, {"crv": "secp256k1"}),
        (
            KEY,
            {
                "crv": "P-384",
                "x": b64(P384.x.to_bytes(48, "big")),
                "y": b64(P384.y.to_bytes(48, "big")),
            },
        ),
        (KEY, {"use": "enc"}),
        (KEY, {"use": None}),
        (KEY, {"key_ops": ["sign"]}),
        (KEY, {"key_ops": ["verify", "sign"]}),
        (KEY, {"key_ops": ["verify", "encrypt"]}),
        (KEY, {"key_ops": ["verify", "verify"]}),
        (KEY, {"key_ops": []}),
        (KEY, {"key_ops": "verify"}),
        (KEY, {"key_ops": {"verify": 1}}),
        (KEY, {"key_ops": None}),
        (KEY, {"d": "AA"}),
        (KEY, {"k": "AA"}),
        (KEY, {"d": None}),
        (KEY, {"x": KEY.jwk["x"] + "="}),
        (KEY, {"x": KEY.jwk["x"][:-1]}),
        (KEY, {"x": "A" + KEY.jwk["x"]}),
        (KEY, {"x": " " + KEY.jwk["x"]}),
        (KEY, {"x": KEY.jwk["y"], "y": KEY.jwk["x"]}),
        (KEY, {"x": b64(bytes(32)), "y": b64(bytes(32))}),
        (KEY, {"x": b64(b"\xff" * 32)}),
        (KEY, {"x": 1}),
        (KEY, {"x": None}),
        (RSA, {"alg": "ES256"}),
        (RSA, {"crv": "P-256"}),
        (RSA, {"p": "AA"}),
        (RSA, {"dp": "AA"}),
        (RSA, {"oth": []}),
        (RSA, {"e": "AQ"}),
        (RSA, {"e": "AA"}),
        (RSA, {"e": "Ag"}),
        (RSA, {"e": number(2**32 + 1)}),
        (RSA, {"e": "AQAB="}),
        (RSA, {"n": number(2**2046 + 1)}),
        (RSA, {"n": number(ODD)}),
        (RSA, {"n": number(2**8192 + 1)}),
        (RSA, {"n": number(65537**127)}),
        (ED, {"crv": "Ed448"}),
        (ED, {"crv": "X25519"}),
        (ED, {"x": ED.jwk["x"][:-2]}),
        (
            ED,
            {
                "crv": "Ed448",
                "x": b64(ed448.Ed448PrivateKey.generate().public_key().public_bytes_raw()),
            },
        ),
    ],
    ids=lambda value: named(value)[:40] if isinstance(value, dict) else "",
)
def test_key_that_may_not_verify_is_refused(key: Key, changes: dict[str, Any]) -> None:
    assert Verifier(key.jwk).alg == key.alg
    with pytest.raises(KeyRefused):
        Verifier({**key.jwk, **changes})


@pytest.mark.parametrize("name", ["alg", "kty", "crv", "x", "y"])
def test_key_with_a_member_missing_is_refused(name: str) -> None:
    with pytest.raises(KeyRefused):
        Verifier({key: value for key, value in KEY.jwk.items() if key != name})


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (KEY, {"use": "sig", "key_ops": ["verify"]}),
        (KEY, {"x5c": ["AA"], "ext": True, "note": 1}),
        (RSA, {"alg": "PS256"}),
        (RSA, {"e": "Aw"}),
        (RSA, {"e": number(2**32 - 1)}),
        (RSA, {"n": number(2**2047 + 1)}),
        (RSA, {"n": number(2**8191 + 1)}),
    ],
    ids=named,
)
def test_key_just_inside_the_rules_is_taken(key: Key, changes: dict[str, Any]) -> None:
    assert Verifier({**key.jwk, **changes}).kid == key.kid


def test_key_without_kid_or_use_may_verify_what_is_not_an_access_token() -> None:
    bare = {name: value for name, value in KEY.jwk.items() if name not in {"kid", "use"}}
    assert verify_compact(KEY.sign(b"x"), Verifier(bare)) == b"x"


MALFORMED = Reason.TOKEN_MALFORMED


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"alg": "ES256"}, None),
        ({"alg": "ES256", "kid": "key-1"}, None),
        ({"alg": "ES256", "typ": "anything+jwt", "cty": "JWT"}, None),
        ({"alg": "ES256", "kid": "key-2"}, Reason.TOKEN_KEY_UNKNOWN),
        ({"alg": "ES256", "kid": 1}, Reason.TOKEN_KEY_UNKNOWN),
        ({"alg": "RS256"}, MALFORMED),
        ({"alg": "none"}, MALFORMED),
        ({"alg": None}, MALFORMED),
        ({}, MALFORMED),
        ([], MALFORMED),
        ({"alg": "ES256", "crit": []}, MALFORMED),
        ({"alg": "ES256", "b64": True}, MALFORMED),
        ({"alg": "ES256", "jwk": KEY.jwk}, MALFORMED),
        ({"alg": "ES256", "x5u": "https://evil.example"}, MALFORMED),
    ],
    ids=named,
)
def test_verify_compact_header(header: Any, reason: Reason | None) -> None:
    verifier, token = Verifier(KEY.jwk), KEY.sign(b"payload", header)
    if reason is None:
        assert verify_compact(token, verifier) == b"payload"
        return
    with pytest.raises(Refused) as caught:
        verify_compact(token, verifier)
    assert caught.value.reason is reason


def test_verify_compact_signs_the_payload_and_the_header() -> None:
    verifier, token = Verifier(KEY.jwk), KEY.sign(b"payload")
    assert verify_compact(KEY.sign(b""), verifier) == b""
    for other in (
        KEY.sign(b"payloae"),
        KEY.sign(b"payload", {"alg": "ES256"}),
        Key().sign(b"payload"),
    ):
        body = other.rpartition(".")[0]
        with pytest.raises(Refused) as caught:
            verify_compact(f"{body}.{token.rpartition('.')[2][::-1]}", verifier)
        assert caught.value.reason in {Reason.TOKEN_SIGNATURE_INVALID, MALFORMED}
