"""Claims of an access token (RFC 9068 section 2.2), typed strictly."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .jws import Refused
from .markers import ACCESS_TOKEN_LIFETIME_S_MAX
from .reason import Reason

ACTORS_MAX = 8
_NUMBER_MAX = 2**63
_CONFIRMATIONS = frozenset({"x5t#S256", "jkt"})
_NO_SCOPES: frozenset[str] = frozenset()


class Claims(NamedTuple):
    """Times in whole seconds since the epoch; an absent claim is empty or None.

    Not a frozen dataclass: one of so many fields takes four times as long to make.
    """

    issuer: str
    subject: str
    audiences: tuple[str, ...]
    expires: int
    issued: int
    jti: str
    client_id: str
    scopes: frozenset[str]
    revision: int
    not_before: int = 0
    grant_id: str = ""
    session_id: str = ""
    root_jti: str = ""
    certificate_thumbprint: str = ""
    jwk_thumbprint: str = ""
    auth_time: int | None = None
    acr: str = ""
    amr: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()
    """`act.sub`, outermost first (RFC 8693 section 4.1)."""
    may_act: str = ""
    """`may_act.sub`: the only one that may act for its subject (RFC 8693 section 4.4)."""
    key_ids: tuple[str, ...] = ()
    """`kids`: signing keys of the tokens that it was exchanged from."""
    permissions: tuple[str, ...] = ()
    """`permissions`: of its subject on its audience when it was made, not the live ones."""
    permissions_revision: int = 0
    """`prv`: revision by which these were read."""


def parse_claims(payload: Mapping[str, Any]) -> Claims:
    """Claims of a payload; raises Refused where one is missing or of another type."""
    expires, issued = _number(payload, "exp"), _number(payload, "iat")
    if expires - issued > ACCESS_TOKEN_LIFETIME_S_MAX:
        # It would outlive the markers that kill it.
        raise Refused(Reason.TOKEN_MALFORMED)
    confirmation = _confirmation(payload)
    return Claims(  # in their order: by name it takes half as long again
        _text(payload, "iss"),
        _text(payload, "sub"),
        audiences_of(payload),
        expires,
        issued,
        _text(payload, "jti"),
        _text(payload, "client_id"),
        _scopes(payload),
        _number(payload, "rev"),
        # What is absent is empty; what is there may not be.
        _number(payload, "nbf") if "nbf" in payload else 0,
        _text(payload, "gid") if "gid" in payload else "",
        _text(payload, "sid") if "sid" in payload else "",
        _text(payload, "rti") if "rti" in payload else "",
        _text(confirmation, "x5t#S256") if "x5t#S256" in confirmation else "",
        _text(confirmation, "jkt") if "jkt" in confirmation else "",
        _number(payload, "auth_time") if "auth_time" in payload else None,
        _text(payload, "acr") if "acr" in payload else "",
        _texts(payload["amr"]) if "amr" in payload else (),
        _actors(payload),
        _may_act(payload),
        _texts(payload["kids"]) if "kids" in payload else (),
        _texts(payload["permissions"]) if "permissions" in payload else (),
        _number(payload, "prv") if "prv" in payload else 0,
    )


def audiences_of(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """`aud`: one string or a list of at least one (RFC 7519 section 4.1.3); raises Refused."""
    aud = payload.get("aud")
    audiences = (aud,) if isinstance(aud, str) else _texts(aud)
    if not audiences or not all(audiences):
        raise Refused(Reason.TOKEN_MALFORMED)
    return audiences


def _text(names: Mapping[str, Any], name: str) -> str:
    value = names.get(name)
    if not value or not isinstance(value, str):
        raise Refused(Reason.TOKEN_MALFORMED)
    return value


def _number(names: Mapping[str, Any], name: str) -> int:
    value = names.get(name)
    if type(value) is not int or not 0 <= value < _NUMBER_MAX:
        raise Refused(Reason.TOKEN_MALFORMED)
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refused(Reason.TOKEN_MALFORMED)
    return tuple(value)


def _scopes(payload: Mapping[str, Any]) -> frozenset[str]:
    """Split at single spaces alone (RFC 6749 section 3.3): no other space parts them."""
    return _scopes_of(_text(payload, "scope")) if "scope" in payload else _NO_SCOPES


@lru_cache(maxsize=1024)  # many tokens have the same, and then share them
def _scopes_of(text: str) -> frozenset[str]:
    scopes = frozenset(text.split(" "))
    if "" in scopes:
        raise Refused(Reason.TOKEN_MALFORMED)
    return scopes


def _confirmation(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """`cnf` (RFC 7800): another method, or none, would go unchecked."""
    if "cnf" not in payload:
        return {}
    confirmation = payload["cnf"]
    if not isinstance(confirmation, dict) or not confirmation:
        raise Refused(Reason.TOKEN_MALFORMED)
    if not confirmation.keys() <= _CONFIRMATIONS:
        raise Refused(Reason.TOKEN_MALFORMED)
    return confirmation


def _actors(payload: Mapping[str, Any]) -> tuple[str, ...]:
    actors: list[str] = []
    while "act" in payload:
        payload = payload["act"]
        if not isinstance(payload, dict) or len(actors) == ACTORS_MAX:
            raise Refused(Reason.TOKEN_MALFORMED)
        actors.append(_text(payload, "sub"))
    return tuple(actors)


def _may_act(payload: Mapping[str, Any]) -> str:
    """A party that is named by more than its `sub` would be taken for another."""
    if "may_act" not in payload:
        return ""
    party = payload["may_act"]
    if not isinstance(party, dict) or party.keys() != {"sub"}:
        raise Refused(Reason.TOKEN_MALFORMED)
    return _text(party, "sub")
