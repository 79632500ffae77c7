"""Claims of an access token to mint (RFC 9068 section 2.2)."""

from typing import Any

from authsvc.model import Client
from authsvc.oauth.resources import Target


def access_token_claims(
    *,
    issuer: str,
    client: Client,
    subject: str,
    target: Target,
    jti: str,
    now: int,
    revision: int,
    thumbprint: str,
) -> dict[str, Any]:
    """`thumbprint` (`x5t#S256`, RFC 8705 section 3.1) binds the token; empty leaves it unbound."""
    claims: dict[str, Any] = {
        "iss": issuer,
        "sub": subject,
        "aud": target.audiences[0] if len(target.audiences) == 1 else list(target.audiences),
        "exp": now + target.lifetime_s,
        "iat": now,
        "jti": jti,
        "client_id": client.client_id,
        "rev": revision,
    }
    if target.scopes:
        claims["scope"] = " ".join(sorted(target.scopes))
    if thumbprint:
        claims["cnf"] = {"x5t#S256": thumbprint}
    return claims
