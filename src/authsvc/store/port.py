"""What the verbs ask of storage. Each call is one transaction and says its own invariant.

Every call may raise AuthError STORE_UNAVAILABLE (nothing was done); a change may also raise
COMMIT_UNKNOWN (it is not known whether it was done).
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog, Client, ClientState, IdentityKind, Resource, SigningKey
from authsvc_client.core.markers import Marker, MarkerKind, marker_key

Change = tuple[MarkerKind, bytes]
"""A kind and the key of what changed (markers.marker_key)."""

ANY_KEY = b""
"""What a listener gets for a key after a snapshot: any row of the kind may have changed."""


def distinct(changes: Sequence[Change]) -> list[Change]:
    """Without repeats. A revision without a row would break the chain of nonces: ValueError."""
    if not changes:
        raise ValueError("a revision needs a change")
    return list(dict.fromkeys(changes))


def nonce() -> str:
    """64 random bits, hexadecimal: tells histories apart that share a revision."""
    return os.urandom(8).hex()


@dataclass(frozen=True, slots=True)
class Transition:
    """A step of a client's review."""

    client_id: str
    allowed_from: frozenset[ClientState]
    to: ClientState
    reviewer: str
    comment: str
    version: int | None = None
    """The version that the reviewer read; None takes any."""
    approval_expire_time: float | None = None
    keep_expiry: bool = False
    """Leave the end of the approval as it is."""
    cut_off: bool = False
    """Kill every token of the client that was made before."""


@dataclass(frozen=True, slots=True)
class FeedPage:
    """What one read of the feed found. `time` is the database's clock, in seconds."""

    head: int
    compacted_to: int
    fingerprint: str
    """Of the database that answered."""
    known_fingerprint: str
    """Of the database that the head belongs to; empty before the first start."""
    nonce: str
    time: float
    markers: tuple[Marker, ...]
    """Those above the cursor; from cursor 0 all that are not over."""
    cursor_nonce: str | None
    """Nonce of the revision at the cursor, where it is still there."""


def review_changes(step: Transition) -> list[Change]:
    """What a review step tells everybody."""
    kinds = [MarkerKind.CLIENT_CHANGED] + [MarkerKind.CUTOFF_CLIENT] * step.cut_off
    return [(kind, marker_key(kind, step.client_id)) for kind in kinds]


def require_step(step: Transition, state: ClientState, version: int) -> None:
    """Raises unless the step may be taken from here."""
    if state not in step.allowed_from:
        raise AuthError(Reason.CLIENT_STATE_CONFLICT, state.name, metadata={"state": state.name})
    if step.version is not None and step.version != version:
        raise AuthError(Reason.ETAG_MISMATCH)


def name_taken(cause: str = "") -> AuthError:
    """The refusal of a second client with one certificate name."""
    return AuthError(
        Reason.ALREADY_EXISTS,
        "certificate name",
        metadata={"field": "metadata.tls_client_auth"},
        cause=cause,
    )


RESOURCE_CHANGES: list[Change] = [
    (MarkerKind.RESOURCE_CHANGED, marker_key(MarkerKind.RESOURCE_CHANGED))
]
KEYS_CHANGES: list[Change] = [(MarkerKind.KEYS_CHANGED, marker_key(MarkerKind.KEYS_CHANGED))]


class ClientStore(Protocol):
    """Clients."""

    async def get(self, client_id: str) -> Client | None:
        """One client."""

    async def by_identity(self, names: Collection[tuple[IdentityKind, str]]) -> tuple[Client, ...]:
        """Clients, not rejected, that registered one of these certificate names."""

    async def page(self, state: ClientState | None, after: str, limit: int) -> tuple[Client, ...]:
        """Clients in the order of their ids, from the one after `after`."""

    async def add(self, client: Client) -> None:
        """Adds a client; AuthError ALREADY_EXISTS where its id or certificate name is taken."""

    async def move(self, step: Transition) -> tuple[Client, int]:
        """Takes a review step and answers the client and the revision of the change.

        AuthError CLIENT_NOT_FOUND, CLIENT_STATE_CONFLICT, ETAG_MISMATCH, or ALREADY_EXISTS where
        the certificate name of a rejected client was given away; then nothing changed.
        """


class ResourceStore(Protocol):
    """Resources, their scopes."""

    async def catalog(self) -> Catalog:
        """All of them."""

    async def add(self, resource: Resource) -> int:
        """Adds a resource and answers the revision.

        AuthError ALREADY_EXISTS where the id or a scope is taken, CLIENT_NOT_FOUND for the owner.
        """


class KeyStore(Protocol):
    """Signing keys."""

    async def all(self) -> tuple[SigningKey, ...]:
        """All that may still have live tokens."""

    async def add_first(self, key: SigningKey) -> None:
        """Adds the first current key; does nothing where there is one."""


class FeedStore(Protocol):
    """The feed of revisions."""

    async def append(self, changes: Sequence[Change]) -> int:
        """Writes changes, one at least, under one new revision and answers it."""

    async def read(self, cursor: int) -> FeedPage:
        """Head and changes after `cursor` in one statement, from the primary."""

    async def begin(self, page: FeedPage) -> None:
        """Ties a fresh feed to the database that answered with `page`."""

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        """Opens a new epoch above `above`, once, however many workers ask after the same page."""


@dataclass(frozen=True, slots=True)
class Store:
    """The whole of storage."""

    clients: ClientStore
    resources: ResourceStore
    keys: KeyStore
    feed: FeedStore

    async def close(self) -> None:
        """Gives connections back."""
        close = getattr(self.feed, "close", None)
        if close is not None:
            await close()
