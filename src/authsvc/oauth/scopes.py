"""Scopes (RFC 6749 section 3.3) and what decides them."""

import re
from collections.abc import Collection

from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog

SCOPE_CHARS_MAX = 128

_token = re.compile(r"[\x21\x23-\x5B\x5D-\x7E]+").fullmatch


def is_scope(text: str) -> bool:
    """Whether it is one scope token (RFC 6749 appendix A.4) of bearable length."""
    return len(text) <= SCOPE_CHARS_MAX and _token(text) is not None


def narrow(
    requested: Collection[str], registered: frozenset[str], catalog: Catalog
) -> frozenset[str]:
    """Scopes of a token: those asked for, never more than registered.

    Raises AuthError SCOPE_UNKNOWN or SCOPE_NOT_ALLOWED (both invalid_scope): what cannot be given
    is refused, not left out. A registered scope that its resource no longer defines is gone.
    """
    if not requested:
        return frozenset(scope for scope in registered if scope in catalog.owner_of_scope)
    for scope in sorted(requested):
        if scope not in catalog.owner_of_scope:
            raise AuthError(Reason.SCOPE_UNKNOWN, metadata={"scope": scope})
        if scope not in registered:
            raise AuthError(Reason.SCOPE_NOT_ALLOWED, metadata={"scope": scope})
    return frozenset(requested)
