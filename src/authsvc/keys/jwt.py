"""Access tokens as bytes: signed JWTs (RFC 9068)."""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from authsvc.keys.secrets import Sealer, new_id
from authsvc.model import KeyState, SigningKey
from authsvc_client.core.jws import ALGORITHMS

DEFAULT_ALGORITHM = "ES256"
RSA_BITS = 2048


def _rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)


_GENERATE: Mapping[str, Callable[[], Any]] = {
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RS256": _rsa,
    "PS256": _rsa,
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}
ALGORITHMS_OFFERED = tuple(_GENERATE)
_SEALED_FOR = "signing-key:"
encode = json.JSONEncoder(separators=(",", ":")).encode
"""Claims as a text."""


def _segment(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


class Signer:
    """The current key, prepared: its header is encoded once."""

    __slots__ = ("_algorithm", "_header", "_key", "kid")

    def __init__(self, key: SigningKey, sealer: Sealer) -> None:
        """Raises ValueError where the private part cannot be opened."""
        private = sealer.open(key.sealed_private, _SEALED_FOR + key.kid)
        self.kid = key.kid
        self._algorithm = ALGORITHMS[key.alg]
        self._key = self._algorithm.prepare_key(load_der_private_key(private, password=None))
        header = {"alg": key.alg, "kid": key.kid, "typ": "at+jwt"}
        self._header = _segment(encode(header).encode()) + b"."

    def sign(self, claims: Mapping[str, Any]) -> str:
        """A compact JWS over the claims."""
        return self.sign_text(encode(claims))

    def sign_text(self, claims: str) -> str:
        """A compact JWS over claims that are encoded already."""
        body = self._header + _segment(claims.encode())
        signature: bytes = self._algorithm.sign(body, self._key)
        return (body + b"." + _segment(signature)).decode()


def generate(
    sealer: Sealer, state: KeyState, now: float, alg: str = DEFAULT_ALGORITHM
) -> SigningKey:
    """A new signing key, its private part sealed; LookupError for an algorithm not offered."""
    private = _GENERATE[alg]()
    kid = new_id()
    plain = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    jwk = ALGORITHMS[alg].to_jwk(private.public_key(), as_dict=True)
    members = {name: value for name, value in jwk.items() if name != "key_ops"}
    return SigningKey(
        kid=kid,
        alg=alg,
        state=state,
        public_jwk={**members, "kid": kid, "alg": alg, "use": "sig"},
        sealed_private=sealer.seal(plain, _SEALED_FOR + kid),
        create_time=now,
    )
