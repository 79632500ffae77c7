"""Access tokens that only their resource can read: nested JWTs (RFC 7519 section 5.2, RFC 7516)."""

import re
from collections.abc import Mapping
from typing import Any

from joserfc import jwe
from joserfc.jwk import ECKey, OKPKey, RSAKey

from authsvc_client.core.jws import Refused, Verifier, decode, json_object

ENCRYPTION = "A256GCM"
JWE_CHARS_MAX = 16384

_MATERIAL = ("kty", "crv", "x", "y", "n", "e")
_MEMBERS = frozenset({*_MATERIAL, "alg", "use", "kid", "key_ops"})
_OPERATIONS = ("encrypt", "wrapKey", "deriveKey", "deriveBits")
_AGREED = ("ECDH-ES+A256KW", "ECDH-ES")
_OFFERED: Mapping[tuple[str, str], tuple[Any, tuple[str, ...]]] = {
    ("RSA", ""): (RSAKey, ("RSA-OAEP-256",)),
    ("EC", "P-256"): (ECKey, _AGREED),
    ("OKP", "X25519"): (OKPKey, _AGREED),
}
"""Type and curve of a key -> how it is imported, and its algorithms, the default first."""
_AS_STRONG_AS = {"RSA": "RS256", "EC": "ES256"}
"""Type of a key -> whose rules of form and strength it has to meet."""
_form = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*){3}\.[A-Za-z0-9_-]+").fullmatch


class Encrypter:
    """A resource's public key, prepared. RSA1_5, PBES2, `dir` and `zip` are not offered."""

    def __init__(self, jwk_text: str) -> None:
        """ValueError unless the text is one public JWK that encrypts (RFC 7517)."""
        try:
            jwk = json_object(jwk_text.encode())
        except Refused as error:
            raise ValueError("is not one JSON object") from error
        if not all(isinstance(value, str) for name, value in jwk.items() if name != "key_ops"):
            raise ValueError("has a member that is no text")
        if not jwk.keys() <= _MEMBERS or jwk.get("use", "enc") != "enc":
            raise ValueError("is not a public key for encryption")
        operations = jwk.get("key_ops", [])
        if not isinstance(operations, list) or any(o not in _OPERATIONS for o in operations):
            raise ValueError("key_ops are not those of a public key for encryption")
        kind = jwk.get("kty", ""), jwk.get("crv", "")
        if kind not in _OFFERED:
            raise ValueError("is neither RSA, EC P-256 nor OKP X25519")
        importer, algorithms = _OFFERED[kind]
        alg = jwk.get("alg", algorithms[0])
        if alg not in algorithms:
            raise ValueError(f"alg is not {' or '.join(algorithms)}")
        self._header = {"alg": alg, "enc": ENCRYPTION, "cty": "JWT"}
        if kid := jwk.get("kid"):
            self._header["kid"] = kid
        self._algorithms = [alg, ENCRYPTION]
        material = {name: jwk[name] for name in _MATERIAL if name in jwk}
        try:
            for name in ("x", "y", "n", "e"):
                decode(jwk.get(name, ""))
            if as_strong_as := _AS_STRONG_AS.get(kind[0]):
                Verifier({**material, "alg": as_strong_as})
            self._key = importer.import_key(material)
            self.encrypt("")  # a point of low order or an even modulus shows only in use
        except Exception as error:  # whatever the parser has for a hostile key
            raise ValueError("holds no usable key") from error

    def encrypt(self, signed: str) -> str:
        """A compact JWE over a signed JWT."""
        return jwe.encrypt_compact(
            dict(self._header), signed.encode(), self._key, algorithms=self._algorithms
        )


def is_jwe(token: str) -> bool:
    """Whether it has the five parts of a compact JWE (RFC 7516 section 3.1)."""
    return len(token) <= JWE_CHARS_MAX and _form(token) is not None
