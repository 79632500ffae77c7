"""Markers: what the feed says of dead tokens, cutoffs and changes, and how their keys are made."""

import hashlib
from enum import IntEnum
from typing import NamedTuple

KEY_BYTES = 16

ACCESS_TOKEN_LIFETIME_S_MAX = 3600
LEEWAY_S = 30
"""Tolerated on `exp`, `nbf` and `iat`."""
SKEW_S = 30
STALENESS_S_MIN = 5
STALENESS_S_MAX = 600
"""What no deployment's `staleness_max` is outside of."""
MARKER_LIFETIME_S = ACCESS_TOKEN_LIFETIME_S_MAX + LEEWAY_S + SKEW_S + STALENESS_S_MAX
"""A marker is kept as long as any token that it kills could be taken for live: also one that a
worker made, cut off from the database, until it was stale."""


class MarkerKind(IntEnum):
    """Kinds of change; numbers are the contract's."""

    TOKEN_DEAD = 1
    GRANT_DEAD = 2
    SESSION_DEAD = 3
    CUTOFF_EVERYTHING = 4
    CUTOFF_CLIENT = 5
    CUTOFF_SUBJECT = 6
    CUTOFF_SUBJECT_CLIENT = 7
    KEY_TAINTED = 8
    CLIENT_CHANGED = 9
    PERMISSIONS_CHANGED = 10
    ROLE_CHANGED = 11
    RESOURCE_CHANGED = 12
    KEYS_CHANGED = 13
    CUTOFF_RESOURCE = 14
    USER_CHANGED = 15


DEAD_KINDS = frozenset(
    {
        MarkerKind.TOKEN_DEAD,
        MarkerKind.GRANT_DEAD,
        MarkerKind.SESSION_DEAD,
        MarkerKind.KEY_TAINTED,
    }
)
CUTOFF_KINDS = frozenset(
    {
        MarkerKind.CUTOFF_EVERYTHING,
        MarkerKind.CUTOFF_CLIENT,
        MarkerKind.CUTOFF_SUBJECT,
        MarkerKind.CUTOFF_SUBJECT_CLIENT,
        MarkerKind.CUTOFF_RESOURCE,
    }
)


def marker_key(kind: MarkerKind, *ids: str) -> bytes:
    """16-byte key of a marker: small, and a watcher cannot read who it is about."""
    preimage = _BYTES[kind]
    for text in ids:
        raw = text.encode()
        preimage += len(raw).to_bytes(4, "big") + raw
    return hashlib.sha256(preimage).digest()[:KEY_BYTES]


class Marker(NamedTuple):
    """One change of the feed."""

    kind: MarkerKind
    key: bytes
    revision: int
    until: float
    """Seconds since the epoch, by the database's clock; then no live token is touched by it."""


def read_marker(kind: int, key: bytes, revision: int, until: float) -> Marker:
    """A marker as it was stored or sent. One that only a newer version understands may kill any
    token, so it kills them all.
    """
    known = _KINDS.get(kind)
    if known is None or len(key) != KEY_BYTES:
        known = MarkerKind.CUTOFF_EVERYTHING
        key = marker_key(known)
    return Marker(known, key, revision, until)


_KINDS = {int(kind): kind for kind in MarkerKind}
_BYTES = {kind: bytes((kind,)) for kind in MarkerKind}
