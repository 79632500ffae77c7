"""What a grant is given, and what it proves."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from authsvc.model import Client, Origin
from authsvc.store.port import PasswordRecord
from authsvc_client.core.judge import Verified


@dataclass(frozen=True, slots=True)
class Exchange:
    """Parameters of a token exchange (RFC 8693 section 2.1); an empty text is not given."""

    subject_token: str = field(repr=False)
    subject_token_type: str
    actor_token: str = field(default="", repr=False)
    actor_token_type: str = ""
    requested_token_type: str = ""


@dataclass(frozen=True, slots=True)
class Password:
    """What a person told the client."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Presented:
    """What came with a request, from an authenticated client."""

    client: Client
    thumbprint: str
    """`x5t#S256` of the connection's certificate; empty without one."""
    audiences: frozenset[str]
    """Whose tokens the client may validate."""
    alive: Callable[[str], Awaitable[Verified | None]]
    """An access token of ours that is alive now, whoever presents it."""
    now: float
    """When the request came, by the database's clock."""
    exchange: Exchange | None = None
    check_password: Callable[[], Awaitable[PasswordRecord]] | None = None
    """Of what a person told the client. AuthError INVALID_GRANT or RATE_LIMITED."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Whom a token speaks for, and what bounds it."""

    origin: Origin
    scopes: frozenset[str] | None = None
    """It has no others; None: bounded by the client's alone."""
    expires: float = math.inf
    """It ends by then, in seconds since the epoch."""
    password_version: int | None = None
    """A person logged in, by the password of this version."""
