"""What the verbs ask of storage. Each call is one transaction and says its own invariant.

Every call may raise AuthError STORE_UNAVAILABLE (nothing was done); a change may also raise
COMMIT_UNKNOWN (it is not known whether it was done).
"""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    ApiKey,
    Catalog,
    Client,
    ClientState,
    Grant,
    IdentityKind,
    InitialAccessToken,
    Resource,
    SigningKey,
)
from authsvc_client.core.markers import Marker, MarkerKind, marker_key


class Change(NamedTuple):
    """What a revision says: a kind of marker, and the ids of what changed."""

    kind: MarkerKind
    ids: tuple[str, ...]

    @property
    def key(self) -> bytes:
        """Of its marker."""
        return marker_key(self.kind, *self.ids)


def change(kind: MarkerKind, *ids: str) -> Change:
    """A change, by its ids."""
    return Change(kind, ids)


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
    pending_s: float = math.inf
    """After which time a PENDING client counts as EXPIRED."""


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


def client_changes(client_id: str, *, cut_off: bool) -> list[Change]:
    """What a change of a client tells everybody."""
    kinds = [MarkerKind.CLIENT_CHANGED] + [MarkerKind.CUTOFF_CLIENT] * cut_off
    return [change(kind, client_id) for kind in kinds]


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


RESOURCE_CHANGES = [change(MarkerKind.RESOURCE_CHANGED)]
KEYS_CHANGES = [change(MarkerKind.KEYS_CHANGED)]


@dataclass(frozen=True, slots=True)
class Admission:
    """What a registration depends on beside the client."""

    initial_access_token: bytes | None = field(default=None, repr=False)
    """Digest of the one that pays for it with a use."""
    request: tuple[bytes, bytes] | None = None
    """Digests of who asks under which id, and of what is asked."""
    pending_max: int | None = None
    """Registrations of the registrant that may wait for review."""


NO_ADMISSION = Admission()


class ClientStore(Protocol):
    """Clients."""

    async def get(self, client_id: str) -> Client | None:
        """One client."""

    async def by_identity(self, names: Collection[tuple[IdentityKind, str]]) -> tuple[Client, ...]:
        """Clients that hold one of these certificate names: neither rejected, nor expired before
        anybody let them in.
        """

    async def page(
        self, state: ClientState | None, after: str, limit: int, pending_s: float = math.inf
    ) -> tuple[Client, ...]:
        """Clients in the order of their ids, from the one after `after`; those that are in the
        state by time, where a PENDING one counts as EXPIRED after `pending_s`.
        """

    async def add(self, client: Client, admission: Admission = NO_ADMISSION) -> Client:
        """Adds a client, or answers the one of the same request, its registration token and unused
        secret replaced; whatever is refused, nothing is taken and nothing changed.

        AuthError ALREADY_EXISTS where its certificate name is taken, REGISTRATION_TOKEN_INVALID,
        REQUEST_ID_REUSED, RATE_LIMITED.
        """

    async def replace(
        self, client: Client, *, cut_off: bool, keep_registration: bool = False
    ) -> tuple[Client, int]:
        """Writes a client over the version that it was made from, and answers the revision.

        `cut_off` kills what was issued to it, as does the end of its approval; `keep_registration`
        spares its registration token, which then has to be alive.
        AuthError CLIENT_NOT_FOUND, ETAG_MISMATCH, ALREADY_EXISTS, REGISTRATION_TOKEN_INVALID.
        """

    async def delete(self, client_id: str, version: int | None) -> int:
        """Deletes a client with its credentials, cuts off what it had, and answers the revision.

        AuthError CLIENT_NOT_FOUND, ETAG_MISMATCH.
        """

    async def expire(self, pending_s: float) -> int:
        """Moves to EXPIRED what waited too long, and what is past its approval, which cuts it off;
        answers how many.
        """

    async def by_registration_token(self, digest: bytes) -> Client | None:
        """The client of a living registration access token."""

    async def secret_used(self, client_id: str) -> None:
        """Remembers that the client has its secret: a retried registration keeps it then."""

    async def move(self, step: Transition) -> tuple[Client, int]:
        """Takes a review step and answers the client and the revision of the change.

        AuthError CLIENT_NOT_FOUND, CLIENT_STATE_CONFLICT, ETAG_MISMATCH, or ALREADY_EXISTS where
        the certificate name of an expired client was given away; then nothing changed.
        """


class InitialAccessTokenStore(Protocol):
    """Initial access tokens."""

    async def add(self, token: InitialAccessToken) -> None:
        """Adds one."""

    async def find(self, digest: bytes) -> InitialAccessToken | None:
        """One that is good, be it used up."""

    async def page(self, after: str, limit: int) -> tuple[InitialAccessToken, ...]:
        """In the order of their ids, from the one after `after`."""

    async def delete(self, initial_access_token_id: str) -> bool:
        """Whether there was one."""


class ResourceStore(Protocol):
    """Resources, their scopes."""

    async def catalog(self) -> Catalog:
        """All of them."""

    async def add(self, resource: Resource) -> int:
        """Adds a resource and answers the revision.

        AuthError ALREADY_EXISTS where the id or a scope is taken, CLIENT_NOT_FOUND for the owner.
        """

    async def update(
        self, resource_id: str, version: int | None, edit: Callable[[Resource], Resource]
    ) -> tuple[Resource, int]:
        """Writes what `edit` makes of the resource as it is now; version None takes any.

        Answers it and the revision. AuthError RESOURCE_NOT_FOUND, ETAG_MISMATCH, as `add`, and what
        `edit` raises; then nothing changed.
        """

    async def delete(self, resource_id: str, version: int | None) -> int:
        """Deletes a resource and cuts its tokens off; answers the revision.

        AuthError RESOURCE_NOT_FOUND, ETAG_MISMATCH.
        """


@dataclass(frozen=True, slots=True)
class Tainted:
    """What came of a taint."""

    key: SigningKey
    current: SigningKey | None
    """The key that signs now; None where a dry run would have to make one."""
    revision: int
    """0 where nothing was written."""


class KeyStore(Protocol):
    """Signing keys. All times are the database's, whatever those of a key handed in."""

    async def all(self) -> tuple[SigningKey, ...]:
        """All that there are, in any order."""

    async def add_first(self, key: SigningKey) -> None:
        """Adds the first current key; does nothing where there is one."""

    async def prepare(self, key: SigningKey, wait_s: float) -> tuple[SigningKey, int]:
        """Adds the NEXT key, ready after a wait; answers it and the revision.

        AuthError SIGNING_KEY_STATE_CONFLICT where there is a NEXT one.
        """

    async def activate(self, kid: str) -> tuple[SigningKey, int]:
        """Makes the NEXT key CURRENT, and what was CURRENT RETIRED; answers it and the revision.

        AuthError SIGNING_KEY_NOT_FOUND, SIGNING_KEY_STATE_CONFLICT where it is not NEXT,
        SIGNING_KEY_NOT_READY.
        """

    async def retire(self, kid: str) -> tuple[SigningKey, int]:
        """Takes the NEXT key back; answers it and the revision.

        AuthError SIGNING_KEY_NOT_FOUND, SIGNING_KEY_STATE_CONFLICT where it is not NEXT.
        """

    async def taint(
        self, kid: str, spare: SigningKey, wait_s: float, *, dry: bool = False
    ) -> Tainted:
        """Kills a key and its tokens, whatever its state; `dry` only tells what would be.

        Where it was CURRENT the NEXT one is, ready or not; where there is none, `spare`.
        AuthError SIGNING_KEY_NOT_FOUND.
        """

    async def purge(self, retired_s: float) -> None:
        """Forgets the public part of keys that retired so long ago, and rows of very old keys."""


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
class Use:
    """A refresh token as it was presented, its HMAC verified, and by whom."""

    handle: bytes = field(repr=False)
    generation: int
    key_id: str
    client_id: str
    sender: str
    may_repeat: bool
    """Authenticated, or bound to a key: may have lost the reply. For others it is reuse."""
    next_key_id: str
    idle_s: float


@dataclass(frozen=True, slots=True)
class Reused:
    """The refresh token was used before its time, or again: its grant is dead now."""

    grant_id: str
    revision: int


@dataclass(frozen=True, slots=True)
class GrantFilter:
    """Which grants are asked for; an empty text takes any."""

    subject: str = ""
    client_id: str = ""
    session_id: str = ""


class GrantStore(Protocol):
    """Grants and their refresh tokens."""

    async def add(self, grant: Grant) -> bool:
        """Adds a grant; False where the token, grant or session that it comes from is dead.

        AuthError RATE_LIMITED where too many come from one token.
        """

    async def use(self, use: Use) -> Grant | Reused | None:
        """Takes the next generation, or answers it again until it is used itself: one statement.

        None where nothing is to be had and nothing changed: unknown, another client's or sender's,
        ended, expired, or below a cutoff.
        """

    async def by_handle(self, handle: bytes) -> Grant | None:
        """The living grant of a refresh token, whatever its generation."""

    async def living(self, grant_id: str) -> Grant | None:
        """One that is alive."""

    async def page(
        self, wanted: GrantFilter, after: tuple[float, str] | None, limit: int
    ) -> tuple[Grant, ...]:
        """Living grants, the newest first, from the one after this creation time and id."""


@dataclass(frozen=True, slots=True)
class StoredToken:
    """An access token that is not read but found: opaque or encrypted."""

    digest: bytes = field(repr=False)
    """SHA-256 of the token."""
    kid: str
    """Signing key of an encrypted one; else empty."""
    claims: Mapping[str, Any]
    """As in the payload of a JWT."""
    expire_time: float
    cut_off: bool = False
    """Of one that was found: a durable cutoff is above its `rev`."""


class TokenStore(Protocol):
    """Access tokens that are found."""

    async def add(self, token: StoredToken) -> None:
        """Adds one."""

    async def find(self, digest: bytes) -> StoredToken | None:
        """One, whatever its time, by one statement."""


class ApiKeyStore(Protocol):
    """API keys."""

    async def add(self, key: ApiKey, most: int) -> None:
        """Adds a key to those of its client. AuthError CLIENT_NOT_FOUND, or FIELD_INVALID where
        the client has `most` already.
        """

    async def page(self, client_id: str, after: str, limit: int) -> tuple[ApiKey, ...]:
        """Keys of a client in the order of their ids, from the one after `after`."""

    async def get(self, api_key_id: str) -> ApiKey | None:
        """One key."""

    async def find(self, digest: bytes) -> ApiKey | None:
        """The key of a value, whatever its time and the cutoffs."""

    async def cutoff(self, keys: Collection[bytes]) -> int:
        """The highest durable cutoff of these keys, and of everything; 0 without one."""

    async def delete(self, api_key_id: str) -> int:
        """Deletes a key and answers the revision of its death. AuthError API_KEY_NOT_FOUND."""


class AssertionStore(Protocol):
    """Assertions that authenticated a client."""

    async def use(self, client_id: str, jti: str, expires: float) -> bool:
        """Remembers one until it expires; False where it was used before (RFC 7523 section 3)."""


IMPACT_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Impact:
    """How many living rows a marker kills; a count stops at IMPACT_MAX."""

    sessions: int = 0
    grants: int = 0
    api_keys: int = 0


class RevocationStore(Protocol):
    """What markers kill."""

    async def impact(self, marker: Change) -> Impact:
        """What this dead mark or cutoff kills now."""

    async def is_dead(self, mark: Change) -> bool:
        """Whether the grant or session is marked dead already; False where nobody knows it."""


class SweepStore(Protocol):
    """What is over and goes. Each call is one short transaction; two at once do no harm."""

    async def compact(self) -> None:
        """Moves `compacted_to` up to where no change at or below it is needed any more."""

    async def sweep(self, table: str, most: int) -> int:
        """Deletes at most so many rows that are over, for each way to be over; answers how many."""


SWEPT = ("access_token", "assertion", "registration", "initial_access_token", "grant")
"""Tables whose rows are over one day; `feed` too, where it is compacted."""


@dataclass(frozen=True, slots=True)
class Store:
    """The whole of storage."""

    clients: ClientStore
    initial_access_tokens: InitialAccessTokenStore
    resources: ResourceStore
    keys: KeyStore
    feed: FeedStore
    grants: GrantStore
    assertions: AssertionStore
    tokens: TokenStore
    api_keys: ApiKeyStore
    revocations: RevocationStore
    sweeps: SweepStore

    async def close(self) -> None:
        """Gives connections back."""
        close = getattr(self.feed, "close", None)
        if close is not None:
            await close()
