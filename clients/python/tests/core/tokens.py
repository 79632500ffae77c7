"""Tokens for tests, signed by cryptography alone: never by the code that is under test."""

import json
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from authsvc_client.core.judge import Judge, Question, Verdict
from authsvc_client.core.jws import Verifier
from authsvc_client.core.markers import MARKER_LIFETIME_S, Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH, Keys, State

NOW = 1_800_000_000
BOOT = 1000.0
"""Boot-time clock at which the database's clock says NOW."""
ISSUER = "https://authsvc.example"
PAYMENTS = "https://payments.example"
ORDERS = "https://orders.example"
REVISION = REVISIONS_PER_EPOCH + 100
THUMBPRINT = "A4DtL2JmUMhAsvJj5tKyn64SqzmuXbMrJa0n761y5v0"
ASK = Question(frozenset({PAYMENTS, ORDERS}), PAYMENTS)


def b64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def number(value: int) -> str:
    """An unsigned integer as JWKs hold it (RFC 7518 section 2)."""
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def named(value: object) -> str:
    """For `ids` of what holds generated keys: workers of xdist must find the same tests."""
    return re.sub(r"[A-Za-z0-9_-]{40,}| at 0x[0-9a-f]+", "...", str(value))


class Key:
    """A signing key and its public JWK."""

    def __init__(self, kid: str = "key-1", alg: str = "ES256") -> None:
        self.kid, self.alg = kid, alg
        self.private: Any
        if alg == "ES256":
            self.private = ec.generate_private_key(ec.SECP256R1())
            point = self.private.public_key().public_numbers()
            members = {
                "kty": "EC",
                "crv": "P-256",
                "x": b64(point.x.to_bytes(32, "big")),
                "y": b64(point.y.to_bytes(32, "big")),
            }
        elif alg == "EdDSA":
            self.private = ed25519.Ed25519PrivateKey.generate()
            raw = self.private.public_key().public_bytes_raw()
            members = {"kty": "OKP", "crv": "Ed25519", "x": b64(raw)}
        else:
            self.private = rsa.generate_private_key(65537, 2048)
            numbers = self.private.public_key().public_numbers()
            members = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
        self.jwk: dict[str, Any] = {**members, "kid": kid, "alg": alg, "use": "sig"}

    @property
    def header(self) -> dict[str, Any]:
        return {"alg": self.alg, "kid": self.kid, "typ": "at+jwt"}

    def raw(self, signing_input: bytes) -> bytes:
        if self.alg == "ES256":
            r, s = decode_dss_signature(self.private.sign(signing_input, ec.ECDSA(hashes.SHA256())))
            return r.to_bytes(32, "big") + s.to_bytes(32, "big")
        if self.alg == "EdDSA":
            return bytes(self.private.sign(signing_input))
        pad: Any = padding.PKCS1v15()
        if self.alg == "PS256":
            pad = padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32)
        return bytes(self.private.sign(signing_input, pad, hashes.SHA256()))

    def sign(self, payload: Any, header: Any = None) -> str:
        """Values are written as JSON, bytes are taken as they are."""
        header = self.header if header is None else header
        segments = [
            b64(part if isinstance(part, bytes) else dump(part)) for part in (header, payload)
        ]
        body = ".".join(segments)
        return f"{body}.{b64(self.raw(body.encode()))}"


def claims(*without: str, **changes: Any) -> dict[str, Any]:
    """A full payload; names of absent claims first, other values by keyword."""
    payload: dict[str, Any] = {
        "iss": ISSUER,
        "sub": "alice",
        "aud": PAYMENTS,
        "exp": NOW + 300,
        "iat": NOW,
        "jti": "jti-1",
        "client_id": "shop",
        "scope": "pay.read pay.write",
        "rev": REVISION,
        "gid": "gid-1",
        "sid": "sid-1",
        "rti": "rti-1",
        "act": {"sub": "agent", "act": {"sub": "robot"}},
        **changes,
    }
    return {name: value for name, value in payload.items() if name not in without}


class Counting(Verifier):
    """Counts the signatures that were checked."""

    checked = 0

    def verify(self, signing_input: bytes, signature: bytes) -> None:
        self.checked += 1
        super().verify(signing_input, signature)


class Rig:
    """A judge that takes the signatures of one key, and counts them."""

    def __init__(self, key: Key | None = None, **limits: Any) -> None:
        self.key = key or KEY
        self.verifier = Counting(self.key.jwk)
        self.state = State(120.0)
        self.state.keys = Keys({self.key.kid: self.verifier})
        self.state.apply([], REVISION)
        self.state.confirm(BOOT, NOW)
        self.judge = Judge(ISSUER, self.state, **limits)

    def token(self, *without: str, **changes: Any) -> str:
        return self.key.sign(claims(*without, **changes))

    def __call__(self, token: str, boot: float = BOOT, **changes: Any) -> Verdict:
        return self.judge(token, replace(ASK, **changes), boot)

    def mark(self, kind: MarkerKind, *ids: str, revision: int = REVISION + 1) -> None:
        self.state.apply([marker(kind, *ids, revision=revision)], revision)


def marker(
    kind: MarkerKind, *ids: str, revision: int = REVISION + 1, until: float | None = None
) -> Marker:
    return Marker(kind, marker_key(kind, *ids), revision, until or NOW + MARKER_LIFETIME_S)


def active(verdicts: Iterable[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.active]


def edited(base: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **changes}


KEY = Key()
