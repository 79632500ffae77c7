"""Who is calling, for a handler behind a RequireInterceptor."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Self

from .core.claims import Claims


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom the token of this call speaks for; everything in it was validated."""

    subject: str
    """On whose behalf: a person, or the client itself."""
    client_id: str
    """The client that calls."""
    scopes: frozenset[str]
    audiences: tuple[str, ...]
    jti: str
    """The token's identity, by which an administrator revokes it."""
    expires: int
    """Seconds since the epoch."""
    claims: Claims
    """All the claims."""
    token: str = field(repr=False)
    """To exchange it, when the next service is called for the same subject."""

    @classmethod
    def of(cls, claims: Claims, token: str) -> Self:
        """From an active token and its claims."""
        return cls(
            subject=claims.subject,
            client_id=claims.client_id,
            scopes=claims.scopes,
            audiences=claims.audiences,
            jti=claims.jti,
            expires=claims.expires,
            claims=claims,
            token=token,
        )


# grpc.aio runs each call in a context of its own, so nothing has to be put back.
current: ContextVar[Caller | None] = ContextVar("authsvc_caller", default=None)


def caller() -> Caller:
    """The caller of the call that is being served; LookupError outside of one, and in a method
    that is public."""
    found = current.get()
    if found is None:
        raise LookupError("no authenticated call is being served here")
    return found
