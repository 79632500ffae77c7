"""Claims of an access token to mint (RFC 9068 section 2.2)."""

from typing import Any, Protocol

from authsvc.model import Client, Origin
from authsvc.oauth.resources import Target


class Frozen(Protocol):
    """Permissions as they stood at a revision."""

    @property
    def names(self) -> frozenset[str]: ...
    @property
    def revision(self) -> int: ...


def access_token_claims(
    *,
    issuer: str,
    client: Client,
    origin: Origin,
    target: Target,
    jti: str,
    now: int,
    expires: int,
    revision: int,
    thumbprint: str,
    permissions: Frozen | None = None,
) -> dict[str, Any]:
    """`thumbprint` (`x5t#S256`, RFC 8705 section 3.1) binds the token; empty leaves it unbound."""
    claims: dict[str, Any] = {
        "iss": issuer,
        "sub": origin.subject,
        "aud": target.audiences[0] if len(target.audiences) == 1 else list(target.audiences),
        "exp": expires,
        "iat": now,
        "jti": jti,
        "client_id": client.client_id,
        "rev": revision,
    }
    if target.scopes:
        claims["scope"] = " ".join(sorted(target.scopes))
    if thumbprint:
        claims["cnf"] = {"x5t#S256": thumbprint}
    if client.metadata.may_act:
        claims["may_act"] = {"sub": client.metadata.may_act}
    if permissions is not None:
        claims |= {"permissions": sorted(permissions.names), "prv": permissions.revision}
    return claims | _origin_claims(origin)


def _origin_claims(origin: Origin) -> dict[str, Any]:
    claims: dict[str, Any] = {
        "gid": origin.grant_id,
        "sid": origin.session_id,
        "rti": origin.root_jti,
        "kids": list(origin.key_ids),
        "acr": origin.acr,
        "amr": list(origin.amr),
        "act": _act(origin.actors),
    }
    found = {name: value for name, value in claims.items() if value}
    return found if origin.auth_time is None else found | {"auth_time": origin.auth_time}


def _act(actors: tuple[str, ...]) -> dict[str, Any]:
    """The chain as it is nested, outermost first (RFC 8693 section 4.1)."""
    act: dict[str, Any] = {}
    for subject in reversed(actors):
        act = {"sub": subject, "act": act} if act else {"sub": subject}
    return act
