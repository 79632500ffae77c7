"""Signatures of compact JWS (RFC 7515): one algorithm per key, nothing taken from the header."""

import binascii
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import jwt.algorithms
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    Prehashed,
    decode_dss_signature,
    encode_dss_signature,
)
from jwt.exceptions import PyJWTError

from .markers import MarkerKind, marker_key
from .reason import Reason

TOKEN_CHARS_MAX = 8192
RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192
"""A longer one, or a long exponent, makes each verification cost milliseconds."""
_RSA_EXPONENT_MAX = 2**32


class _ES256(jwt.algorithms.ECAlgorithm):
    """As PyJWT's, but what is the same for every signature is made once: a twentieth faster."""

    _ecdsa = ec.ECDSA(Prehashed(hashes.SHA256()))

    def sign(self, msg: bytes, key: Any) -> bytes:
        r, s = decode_dss_signature(key.sign(sha256(msg).digest(), self._ecdsa))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    def verify(self, msg: bytes, key: Any, sig: bytes) -> bool:
        if len(sig) != 64:
            return False
        r, s = int.from_bytes(sig[:32], "big"), int.from_bytes(sig[32:], "big")
        try:
            key.verify(encode_dss_signature(r, s), sha256(msg).digest(), self._ecdsa)
        except InvalidSignature:
            return False
        return True


ALGORITHMS: Mapping[str, Any] = {
    "ES256": _ES256(hashes.SHA256, ec.SECP256R1),
    "RS256": jwt.algorithms.RSAAlgorithm(hashes.SHA256),
    "PS256": jwt.algorithms.RSAPSSAlgorithm(hashes.SHA256),
    "EdDSA": jwt.algorithms.OKPAlgorithm(),
}
"""What can be verified at all; each key has exactly one (RFC 8725 section 3.1)."""

_KEY_TYPES = {
    "ES256": ("EC", "P-256"),
    "RS256": ("RSA", None),
    "PS256": ("RSA", None),
    "EdDSA": ("OKP", "Ed25519"),
}
_SECRET_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_STANDARD = bytes.maketrans(b"-_+/=", b"+/!!!")
_compact = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]*)\.([A-Za-z0-9_-]+)").fullmatch


class Refused(Exception):
    """The token does not hold; `visible` is False where the caller may not know why."""

    def __init__(self, reason: Reason, *, visible: bool = True) -> None:
        super().__init__(reason.name)
        self.reason = reason
        self.visible = visible


class KeyRefused(ValueError):
    """A JWK is not one that may verify (RFC 7517, RFC 8725)."""


class Verifier:
    """A public key with its one algorithm, prepared."""

    __slots__ = ("_algorithm", "_key", "alg", "jwk", "kid", "taint_key")

    def __init__(self, jwk: Mapping[str, Any]) -> None:
        """Raises KeyRefused unless it is a public signing key that names an algorithm of ours.

        `alg` may be left out of a JWK (RFC 7517 section 4.4), but not here: it would have to be
        guessed, or taken from the token (RFC 8725 section 3.1).
        """
        alg, kid = jwk.get("alg"), jwk.get("kid", "")
        if not isinstance(alg, str) or alg not in ALGORITHMS or not isinstance(kid, str):
            raise KeyRefused("alg or kid")
        if (jwk.get("kty"), jwk.get("crv")) != _KEY_TYPES[alg]:
            raise KeyRefused("kty or crv")
        if jwk.get("use", "sig") != "sig" or jwk.get("key_ops", ["verify"]) != ["verify"]:
            raise KeyRefused("use or key_ops")
        if not _SECRET_MEMBERS.isdisjoint(jwk):
            raise KeyRefused("not a public key")
        try:
            for name in ("x", "y", "n", "e"):
                decode(jwk.get(name, ""))
            key = ALGORITHMS[alg].from_jwk(dict(jwk))
            key = ALGORITHMS[alg].prepare_key(key)
            self.taint_key = marker_key(MarkerKind.KEY_TAINTED, kid)
        except (PyJWTError, Refused, ValueError, TypeError, AttributeError) as error:
            raise KeyRefused("key material") from error
        except (KeyError, UnsupportedAlgorithm) as error:
            raise KeyRefused("key material") from error
        if isinstance(key, rsa.RSAPublicKey):
            _require_strong(key)
        self.alg, self.kid, self.jwk = alg, kid, dict(jwk)
        self._algorithm, self._key = ALGORITHMS[alg], key

    def verify(self, signing_input: bytes, signature: bytes) -> None:
        """Raises Refused unless the signature is this key's over these bytes."""
        if not self._algorithm.verify(signing_input, self._key, signature):
            raise Refused(Reason.TOKEN_SIGNATURE_INVALID)


def split(token: str) -> tuple[str, str, str]:
    """Header, payload and signature of a compact JWS, still encoded; raises Refused."""
    parts = _compact(token) if len(token) <= TOKEN_CHARS_MAX else None
    if parts is None:
        raise Refused(Reason.TOKEN_MALFORMED)
    header, payload, signature = parts.groups()
    return header, payload, signature


def decode(segment: str) -> bytes:
    """Base64url without padding, canonical (RFC 7515 section 2); raises Refused.

    Trailing bits that a lenient decoder drops would give one token several spellings.
    """
    try:
        standard = segment.encode().translate(_STANDARD) + b"=="[: -len(segment) % 4]
        raw = binascii.a2b_base64(standard, strict_mode=True)
    except ValueError as error:
        raise Refused(Reason.TOKEN_MALFORMED) from error
    rest = len(raw) % 3
    if rest and binascii.b2a_base64(raw[-rest:], newline=False) != standard[-4:]:
        raise Refused(Reason.TOKEN_MALFORMED)
    return raw


def json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 and nothing around it; raises Refused.

    Neither duplicate names nor lone surrogates: others would read them in another way, or not.
    """
    try:
        text = raw.decode()
        value, end = _loads(text)
        if end != len(text):
            raise Refused(Reason.TOKEN_MALFORMED)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(Reason.TOKEN_MALFORMED) from error
    if not isinstance(value, dict):
        raise Refused(Reason.TOKEN_MALFORMED)
    return value


def verify_compact(token: str, verifier: Verifier) -> bytes:
    """Payload of a compact JWS by this key, whatever its `typ`; raises Refused.

    A header may hold `alg`, `kid`, `typ` and `cty` only: `crit`, `jwk`, `jku`, `x5u`, `x5c` and
    what is not known is refused, not ignored (RFC 8725 section 3.10).
    """
    header_b64, payload_b64, signature_b64 = split(token)
    header = json_object(decode(header_b64))
    if not header.keys() <= {"alg", "kid", "typ", "cty"} or header.get("alg") != verifier.alg:
        raise Refused(Reason.TOKEN_MALFORMED)
    if "kid" in header and verifier.kid and header["kid"] != verifier.kid:
        raise Refused(Reason.TOKEN_KEY_UNKNOWN)
    payload = decode(payload_b64)
    verifier.verify(f"{header_b64}.{payload_b64}".encode(), decode(signature_b64))
    return payload


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("duplicate name")
    return names


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


_loads = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse).raw_decode


def _require_strong(key: rsa.RSAPublicKey) -> None:
    numbers = key.public_numbers()
    if not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX or numbers.e >= _RSA_EXPONENT_MAX:
        raise KeyRefused("RSA key too short or too long")
    if all(numbers.n % prime in powers for prime, powers in _ROCA.items()):
        raise KeyRefused("RSA key of a broken generator")


# CVE-2017-15361: the chips' moduli are powers of 65537 modulo every small prime.
_ROCA = {
    prime: {pow(65537, power, prime) for power in range(prime)}
    for prime in (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
}
