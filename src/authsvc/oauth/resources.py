"""Which resources a token is for (RFC 8707)."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog, Resource, TokenFormat

RESOURCE_CHARS_MAX = 512

_absolute = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*:[\x21\x24-\x3B\x3D\x3F-\x5B\x5D\x5F\x61-\x7A\x7E]+"
).fullmatch


def is_resource_id(text: str) -> bool:
    """Whether it is an absolute URI without fragment (RFC 8707 section 2)."""
    return len(text) <= RESOURCE_CHARS_MAX and _absolute(text) is not None


@dataclass(frozen=True, slots=True)
class Target:
    """What a token is made for."""

    audiences: tuple[str, ...]
    scopes: frozenset[str]
    lifetime_s: int
    token_format: TokenFormat
    encryption_jwk: str
    freeze_permissions: bool = False
    """The token says what its subject may do on its one audience."""


def pick(
    resources: Collection[str],
    scopes: frozenset[str],
    explicit: bool,
    catalog: Catalog,
    issuer: str,
    bare: frozenset[str] = frozenset(),
) -> Target:
    """The audiences of a token: those asked for, or else the one owner of its scopes.

    `explicit` says that the scopes were asked for; then each must belong to one of the resources.
    The `bare` audiences may be named without a scope there.
    Raises AuthError INVALID_TARGET (RFC 8707 section 2).
    """
    owners = {catalog.owner_of_scope[scope] for scope in scopes}
    audiences = tuple(sorted(set(resources) or owners))
    if not resources and len(audiences) != 1:
        what = "name the resources" if audiences else "the client has no scope"
        raise AuthError(Reason.INVALID_TARGET, what)
    if issuer in audiences and len(audiences) > 1:
        raise AuthError(
            Reason.INVALID_TARGET, "authsvc itself stands alone", metadata={"resource": issuer}
        )
    kept = frozenset(scope for scope in scopes if catalog.owner_of_scope[scope] in audiences)
    if explicit and kept != scopes:
        raise AuthError(Reason.INVALID_TARGET, "a scope belongs to another resource")
    found = [_known(audience, owners | bare, catalog) for audience in audiences]
    first = found[0]
    # The audience decides the form: it is who must read it, and only one can decrypt it.
    forms = {resource.token_format for resource in found}
    if len(forms) > 1 or (len(found) > 1 and TokenFormat.JWE in forms):
        raise AuthError(Reason.INVALID_TARGET, "no one token can be read by all the resources")
    freeze_permissions = any(resource.freeze_permissions for resource in found)
    if freeze_permissions and len(found) > 1:
        raise AuthError(Reason.INVALID_TARGET, "a resource that freezes permissions stands alone")
    lifetime_s = min(resource.token_lifetime_s for resource in found)
    return Target(
        audiences,
        kept,
        lifetime_s,
        first.token_format,
        first.encryption_jwk,
        freeze_permissions,
    )


def _known(audience: str, open_to: set[str], catalog: Catalog) -> Resource:
    """The resource, if the client has a scope there: others' existence is not told."""
    resource = catalog.by_id.get(audience)
    if resource is None or audience not in open_to:
        raise AuthError(Reason.INVALID_TARGET, metadata={"resource": audience})
    return resource
