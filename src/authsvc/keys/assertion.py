"""private_key_jwt: assertions that authenticate a client (RFC 7523 section 3, RFC 8725)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from authsvc_client.core.jws import (
    KeyRefused,
    Refused,
    Verifier,
    decode,
    json_object,
    split,
    verify_compact,
)
from authsvc_client.core.markers import LEEWAY_S

KEYS_MAX = 16
LIFETIME_S_MAX = 600
JTI_CHARS_MAX = 256
_TYPES = frozenset({"jwt", "client-authentication+jwt"})


@dataclass(frozen=True, slots=True)
class Assertion:
    """What is left to do once it holds: its `jti` is good once."""

    client_id: str
    jti: str
    expires: int
    """Seconds since the epoch; it is taken until LEEWAY_S later, so its `jti` is kept as long."""


class ClientKeys:
    """The public keys that a client registered (RFC 7517 section 5)."""

    def __init__(self, jwks_text: str) -> None:
        """ValueError unless it is a set of 1 to 16 public signing keys that can be told apart."""
        try:
            jwks = json_object(jwks_text.encode()).get("keys")
        except Refused as error:
            raise ValueError("is not one JSON object") from error
        if not isinstance(jwks, list) or not 1 <= len(jwks) <= KEYS_MAX:
            raise ValueError(f"has not 1 to {KEYS_MAX} keys")
        self._by_kid: dict[str, Verifier] = {}
        self._by_alg: dict[str, list[Verifier]] = {}
        for jwk in jwks:
            if not isinstance(jwk, dict):
                raise ValueError("has a key that is no JSON object")
            self._add(jwk)
        for alg, verifiers in self._by_alg.items():
            if len(verifiers) > 1 and not all(verifier.kid for verifier in verifiers):
                raise ValueError(f"has keys for {alg} that need a kid to be told apart")

    def _add(self, jwk: Mapping[str, Any]) -> None:
        try:
            verifier = Verifier(jwk)
        except KeyRefused as error:
            raise ValueError(f"has a key that cannot be used: {error}") from error
        if verifier.kid in self._by_kid:
            raise ValueError("has a kid twice")
        if verifier.kid:
            self._by_kid[verifier.kid] = verifier
        self._by_alg.setdefault(verifier.alg, []).append(verifier)

    def verify(self, assertion: str, client_id: str, issuer: str, now: float) -> Assertion:
        """An assertion of this client for this issuer that holds at `now`; ValueError for the log.

        The issuer is its only audience: one that another server accepts as well could be sent
        here by that one.
        """
        try:
            header = json_object(decode(split(assertion)[0]))
            payload = json_object(verify_compact(assertion, self._key(header)))
        except Refused as error:
            raise ValueError(error.reason.name) from error
        if payload.get("iss") != client_id or payload.get("sub") != client_id:
            raise ValueError("iss or sub is not the client")
        if payload.get("aud") not in (issuer, [issuer]):
            raise ValueError("aud is not the issuer alone")
        expires = _time(payload, "exp")
        if expires is None or not now - LEEWAY_S < expires <= now + LIFETIME_S_MAX:
            # The leeway of every other token: `exp` is by the client's clock, and short by advice.
            raise ValueError("exp is missing, past or too far")
        for name in ("iat", "nbf"):
            if (_time(payload, name) or 0) > now + LEEWAY_S:
                raise ValueError(f"{name} is in the future")
        jti = payload.get("jti")
        if not isinstance(jti, str) or not 1 <= len(jti) <= JTI_CHARS_MAX:
            raise ValueError("jti is missing or too long")
        return Assertion(client_id, jti, expires)

    def _key(self, header: Mapping[str, Any]) -> Verifier:
        """By its `kid`, or the only one for its `alg`: a header may choose among our keys alone."""
        typ, kid, alg = header.get("typ", "JWT"), header.get("kid"), header.get("alg")
        if not isinstance(typ, str) or typ.lower().removeprefix("application/") not in _TYPES:
            raise ValueError("typ is another kind of token's")
        if kid is not None:
            found = self._by_kid.get(kid) if isinstance(kid, str) else None
        else:
            keys = self._by_alg.get(alg, []) if isinstance(alg, str) else []
            found = keys[0] if len(keys) == 1 else None
        if found is None:
            raise ValueError("no such key")
        return found


def _time(payload: Mapping[str, Any], name: str) -> int | None:
    """NumericDate in whole seconds; ValueError for what is none."""
    value = payload.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{name} is no whole number")
    return value
