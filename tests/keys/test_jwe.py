"""Nested JWTs to a resource's key: who can read them, and which keys are refused."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from authsvc.keys.jwe import JWE_CHARS_MAX, Encrypter, is_jwe
from authsvc.keys.jwt import Signer, generate
from authsvc.keys.secrets import Sealer
from authsvc.model import KeyState
from authsvc_client.core.jws import TOKEN_CHARS_MAX, Verifier, verify_compact
from tests.harness import named

RSA = RSAKey.generate_key(2048)
EC, X25519 = ECKey.generate_key("P-256"), OKPKey.generate_key("X25519")
SEALER = Sealer((b"k" * 32,))
KEY = generate(SEALER, KeyState.CURRENT, 0.0)


def public(key: Any, **more: Any) -> dict[str, Any]:
    return {**key.as_dict(private=False), **more}


def text(jwk: dict[str, Any]) -> str:
    return json.dumps(jwk)


def raw(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def agreed(epk: dict[str, str], key: Any, algorithm: str) -> bytes:
    """RFC 7518 section 4.6.2: 256 bits, nothing known of the parties."""
    x = raw(epk["x"])
    if epk["crv"] == "X25519":
        shared = key.exchange(x25519.X25519PublicKey.from_public_bytes(x))
    else:
        point = ec.EllipticCurvePublicKey.from_encoded_point(
            ec.SECP256R1(), b"\4" + x + raw(epk["y"])
        )
        shared = key.exchange(ec.ECDH(), point)
    name = len(algorithm).to_bytes(4, "big") + algorithm.encode()
    bits = (256).to_bytes(4, "big")
    return hashlib.sha256((1).to_bytes(4, "big") + shared + name + bytes(8) + bits).digest()


def read(sealed: str, key: Any) -> tuple[dict[str, Any], bytes]:
    """RFC 7516 section 5.2, by primitives."""
    protected, wrapped, nonce, body, tag = sealed.split(".")
    header = json.loads(raw(protected))
    match header["alg"]:
        case "RSA-OAEP-256":
            oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
            content_key = key.decrypt(raw(wrapped), oaep)
        case "ECDH-ES":
            assert wrapped == ""
            content_key = agreed(header["epk"], key, header["enc"])
        case "ECDH-ES+A256KW":
            content_key = aes_key_unwrap(agreed(header["epk"], key, header["alg"]), raw(wrapped))
    plain = AESGCM(content_key).decrypt(raw(nonce), raw(body) + raw(tag), protected.encode())
    return header, plain


@pytest.mark.parametrize(
    ("key", "more", "alg"),
    [
        (RSA, {}, "RSA-OAEP-256"),
        (RSA, {"alg": "RSA-OAEP-256", "use": "enc", "kid": "r1"}, "RSA-OAEP-256"),
        (EC, {}, "ECDH-ES+A256KW"),
        (EC, {"alg": "ECDH-ES"}, "ECDH-ES"),
        (X25519, {}, "ECDH-ES+A256KW"),
        (X25519, {"alg": "ECDH-ES", "kid": "x1"}, "ECDH-ES"),
    ],
)
def test_the_resource_reads_a_signed_jwt(key: Any, more: dict[str, str], alg: str) -> None:
    """RFC 7519 section 5.2: nested, `cty` says so."""
    signed = Signer(KEY, SEALER).sign({"sub": "orders"})
    sealed = Encrypter(text(public(key, **more))).encrypt(signed)
    assert is_jwe(sealed)
    opened = jwe.decrypt_compact(sealed, key, algorithms=[alg, "A256GCM"])
    header = {"alg": alg, "enc": "A256GCM", "cty": "JWT"}
    header |= {"kid": more["kid"]} if "kid" in more else {}
    assert opened.plaintext == signed.encode()
    own, plain = read(sealed, key.private_key)
    assert plain == signed.encode()
    assert {name: own[name] for name in own if name != "epk"} == header
    assert ("epk" in own) == (alg != "RSA-OAEP-256")
    payload = verify_compact(opened.plaintext.decode(), Verifier(KEY.public_jwk))
    assert json.loads(payload) == {"sub": "orders"}


def test_nothing_is_sealed_twice_alike() -> None:
    encrypter = Encrypter(text(public(EC)))
    sealed = [encrypter.encrypt("signed").split(".") for _ in range(50)]
    for part in range(5):
        assert len({parts[part] for parts in sealed}) == 50


def test_nobody_else_reads_it_and_each_part_is_bound() -> None:
    """RFC 7516 section 5.2: the header is authenticated too."""
    sealed = Encrypter(text(public(X25519))).encrypt("signed")
    assert read(sealed, X25519.private_key)[1] == b"signed"
    parts = sealed.split(".")
    for at, part in enumerate(parts):
        other = ("A" if part[4] != "A" else "B").join((part[:4], part[5:]))
        changed = ".".join([*parts[:at], other, *parts[at + 1 :]])
        with pytest.raises((ValueError, JoseError)):
            jwe.decrypt_compact(changed, X25519, algorithms=["ECDH-ES+A256KW", "A256GCM"])
    with pytest.raises(JoseError):
        jwe.decrypt_compact(
            sealed, OKPKey.generate_key("X25519"), algorithms=["ECDH-ES+A256KW", "A256GCM"]
        )


def test_the_longest_token_that_is_signed_can_be_told_when_sealed() -> None:
    for key in (RSAKey.generate_key(4096), EC, X25519):
        assert is_jwe(Encrypter(text(public(key, kid="k" * 64))).encrypt("x" * TOKEN_CHARS_MAX))


@pytest.mark.parametrize(
    "operations", [["wrapKey"], ["encrypt", "wrapKey"], ["deriveKey", "deriveBits"], []]
)
def test_operations_of_a_public_key_are_taken(operations: list[str]) -> None:
    """RFC 7517 section 4.3; a public key that is agreed on has none in WebCrypto."""
    assert is_jwe(Encrypter(text(public(EC, key_ops=operations))).encrypt("x"))


def number(value: int) -> str:
    octets = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def octets(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "jwk",
    [
        "",
        "[]",
        "{}",
        text({"keys": [public(RSA)]}),
        '{"kty":"RSA","kty":"EC"}',
        text(RSA.as_dict(private=True)),
        text(EC.as_dict(private=True)),
        text(public(RSA, n=public(RSA)["n"][:170])),
        text(public(RSA, alg="RSA1_5")),
        text(public(RSA, alg="RSA-OAEP")),
        text(public(EC, alg="dir")),
        text(public(EC, alg="PBES2-HS256+A128KW")),
        text(public(RSA, use="sig")),
        text(public(RSA, x5u="https://evil.test")),
        text(public(RSA, jku="https://evil.test")),
        text(public(ECKey.generate_key("P-384"))),
        text(public(OKPKey.generate_key("Ed25519"))),
        text({"kty": "oct", "k": "c2VjcmV0"}),
        text(public(EC, x="AA")),
        text(public(RSA, kid=1)),
        text(public(RSA, x5c=["MIIB"])),
        text(public(RSA, key_ops=["decrypt"])),
        text(public(RSA, key_ops=["wrapKey", "verify"])),
        text(public(RSA, key_ops="wrapKey")),
        text(public(RSA, key_ops="")),
        text(public(RSA, key_ops=None)),
        text(public(RSA, key_ops=[["wrapKey"]])),
        text(public(RSA, e=number(2))),
        text(public(RSA, e=number(2**64 + 1))),
        text(public(RSA, e="AQAB=")),
        text(public(RSA, n=number(2**2048 - 2))),
        text(public(RSA, n=number(2**20000 + 1))),
        text(public(RSA, alg="ECDH-ES")),
        text(public(EC, alg="RSA-OAEP-256")),
        text(public(EC, crv="P-384")),
        text(public(EC, x=public(EC)["y"])),
        text(public(EC, x=octets(b"\0" + raw(public(EC)["x"])))),
        text(public(X25519, x=octets(bytes(32)))),  # RFC 7748 section 6.1
        text(public(X25519, x=octets(b"\1" + bytes(31)))),
        text(public(X25519, x=octets(bytes(31)))),
        text(public(X25519, x=public(X25519)["x"] + "=")),
        text(public(X25519, x=public(X25519)["x"][:-1] + chr(ord(public(X25519)["x"][-1]) + 1))),
        text({"kty": "RSA"}),
        text({"kty": "OKP", "crv": "X25519"}),
        text(public(EC)) + " ",
        "\ud800",
        "[" * 100_000,
    ],
    ids=lambda jwk: named(jwk)[:200],
)
def test_a_key_that_is_none_for_this_is_refused(jwk: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Encrypter(jwk)


def test_five_parts_are_told_apart_cheaply() -> None:
    good = Encrypter(text(public(EC, alg="ECDH-ES"))).encrypt("x")
    assert good.split(".")[1] == ""  # RFC 7516 section 3.1: empty where the key is agreed on
    assert is_jwe(good)
    for wrong in (
        "",
        "a.b.c",
        "a.b.c.d",
        "a.b.c.d.e.f",
        good + ".",
        good + "=",
        good + "\n",
        good.replace(good[5], "+", 1),
        good[:9] + "\u00e9" + good[10:],
        "." + good.partition(".")[2],
        good.rpartition(".")[0] + ".",
        good + "A" * JWE_CHARS_MAX,
        "." * 4,
        "." * 10**6,
        "a." * 10**6,
        "a" * 10**7,
    ):
        assert not is_jwe(wrong)
