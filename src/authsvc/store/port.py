"""What the verbs ask of storage. Each call is one transaction and says its own invariant.

Every call may raise AuthError STORE_UNAVAILABLE (nothing was done); a change may also raise
COMMIT_UNKNOWN (it is not known whether it was done).
"""

import math
import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeVar

from authsvc.acting import Act
from authsvc.errors import AuthError, Reason
from authsvc.model import (
    ApiKey,
    AuditOutcome,
    Catalog,
    Client,
    ClientState,
    Grant,
    HolderKind,
    IdentityKind,
    InitialAccessToken,
    Permission,
    PermissionRef,
    Resource,
    Role,
    RoleAssignment,
    Session,
    SigningKey,
    Touched,
    User,
    UserState,
)
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from authsvc_client.core.state import REVISIONS_PER_EPOCH


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


_TOUCH_SUBJECT = (
    MarkerKind.CUTOFF_SUBJECT,
    MarkerKind.PERMISSIONS_CHANGED,
    MarkerKind.USER_CHANGED,
)
_TOUCH_CLIENT = (MarkerKind.CLIENT_CHANGED, MarkerKind.CUTOFF_CLIENT)
_TOUCH_OBJECT = (
    MarkerKind.TOKEN_DEAD,
    MarkerKind.GRANT_DEAD,
    MarkerKind.SESSION_DEAD,
    MarkerKind.KEY_TAINTED,
    MarkerKind.ROLE_CHANGED,
    MarkerKind.CUTOFF_RESOURCE,
)


def touched_by(changes: Iterable[Change]) -> Touched:
    """What changes say themselves of what they touch: the first of each kind."""
    subject = client_id = object_id = ""
    for kind, ids in changes:
        if kind is MarkerKind.CUTOFF_SUBJECT_CLIENT:
            subject, client_id = subject or ids[0], client_id or ids[1]
        elif kind in _TOUCH_SUBJECT:
            subject = subject or ids[0]
        elif kind in _TOUCH_CLIENT:
            client_id = client_id or ids[0]
        elif kind in _TOUCH_OBJECT:
            object_id = object_id or ids[0]
    return Touched(subject, client_id, object_id)


Done = Sequence[tuple[Act, Touched]]
"""Who did what, for the audit."""
NOTHING = Touched()

HOUR_S = 3600
ANY_KEY = b""
"""What a listener gets for a key after a snapshot: any row of the kind may have changed."""

Row = TypeVar("Row")


class RowKind(StrEnum):
    """Rows that workers may read for each other."""

    CLIENT = "client"
    HOLDER = "holder"
    ROLE = "role"


class Share(Protocol):
    """Answers a row that another worker read, if it is as of the applied revision, or reads it."""

    async def __call__(
        self,
        kind: RowKind,
        key: bytes,
        name: str,
        read: Callable[[], Awaitable[tuple[int, Row]]],
        /,
    ) -> tuple[int, Row]:
        """A row, and the revision that it is as of; `read` answers 0 for one that is applied, or
        later. `key` is that of the markers that say of its changes, `name` tells rows of one key.
        """


async def unshared(
    _kind: RowKind, _key: bytes, _name: str, read: Callable[[], Awaitable[tuple[int, Row]]]
) -> tuple[int, Row]:
    """Each worker for itself."""
    return await read()


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
    """Those above the cursor; from cursor 0 none."""
    cursor_nonce: str | None
    """Nonce of the revision at the cursor, where it is still there."""
    beat: float | None = None
    """When the database last took a beat; None where there are no two of it."""
    standby: bool = False
    """It only repeats another database, so far."""
    more: bool = False
    """The feed goes on after `head`, which is only as far as this page goes."""


def opening(above: int, time: float) -> int:
    """The first revision of the next epoch, told by the time in the lower half of its numbers.

    The epoch of a history that was lost may have the same number: whoever has seen that must not
    take what follows for what it knows, so it finds itself below this one.
    """
    epoch = above // REVISIONS_PER_EPOCH + 1
    share = time % HOUR_S / HOUR_S
    return epoch * REVISIONS_PER_EPOCH + int(share * (REVISIONS_PER_EPOCH // 2))


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


@dataclass(frozen=True, slots=True)
class AssignmentFilter:
    """Which assignments are asked for; an empty text takes any."""

    holder_kind: HolderKind | None = None
    holder_id: str = ""
    role_id: str = ""
    resource_id: str = ""


class Holding(NamedTuple):
    """What a holder holds."""

    role_uid: str
    """Tells a role from those made before and after it under its id."""
    role_id: str
    resource_id: str
    """Only the role's permissions there; empty means all of them."""


class RoleStore(Protocol):
    """Permissions, roles and who holds them. All times are the database's."""

    async def get(self, role_id: str) -> Role | None:
        """One role."""

    async def page(self, resource_id: str, after: str, limit: int) -> tuple[Role, ...]:
        """Roles in the order of their ids, from the one after `after`; with a permission on this
        resource, where one is given.
        """

    async def add(self, role: Role) -> Role:
        """Adds a role. AuthError ALREADY_EXISTS, PERMISSION_NOT_FOUND."""

    async def update(
        self,
        role_id: str,
        version: int | None,
        *,
        display_name: str | None = None,
        description: str | None = None,
        permissions: frozenset[PermissionRef] | None = None,
    ) -> tuple[Role, int]:
        """Changes what is given, and answers the role and the revision.

        AuthError ROLE_NOT_FOUND, ETAG_MISMATCH, PERMISSION_NOT_FOUND.
        """

    async def delete(self, role_id: str, version: int | None) -> int:
        """Deletes a role and its assignments; answers the revision.

        AuthError ROLE_NOT_FOUND, ETAG_MISMATCH.
        """

    async def add_permission(self, permission: Permission) -> Permission:
        """Adds a permission. AuthError RESOURCE_NOT_FOUND, ALREADY_EXISTS."""

    async def page_of_permissions(
        self, resource_id: str, after: PermissionRef | None, limit: int
    ) -> tuple[Permission, ...]:
        """Permissions, of one resource where one is given, in the order of what names them."""

    async def delete_permission(self, ref: PermissionRef) -> int:
        """Deletes a permission and takes it out of every role; answers the revision, 0 where no
        role had it. AuthError PERMISSION_NOT_FOUND.
        """

    async def assign(self, asked: RoleAssignment) -> tuple[RoleAssignment, int]:
        """Gives a role; answers what is held, and the revision, 0 where it was held already.

        AuthError ROLE_NOT_FOUND, USER_NOT_FOUND, CLIENT_NOT_FOUND, RESOURCE_NOT_FOUND.
        """

    async def unassign(self, asked: RoleAssignment) -> int:
        """Takes a role away; answers the revision, 0 where it was not held. Raises as `assign`."""

    async def page_of_assignments(
        self, wanted: AssignmentFilter, after: tuple[str, str, str] | None, limit: int
    ) -> tuple[RoleAssignment, ...]:
        """Assignments in the order of holders, roles and resources, from the one after these."""

    async def assignments_of(self, holder_id: str) -> tuple[int, tuple[Holding, ...]]:
        """The head of the feed, and what a holder holds as of it."""

    async def role_by_uid(self, role_uid: str) -> tuple[int, Role | None]:
        """The head of the feed, and a role as of it; none that was made later under its id."""


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

    async def append(self, changes: Sequence[Change], done: Done = ()) -> int:
        """Writes changes, one at least, under one new revision and answers it.

        Records what was `done`, of several that share it; else what is under way.
        """

    async def read(self, cursor: int) -> FeedPage:
        """Head and changes after `cursor` in one statement, from the primary; of cursor 0 the head
        alone: what lives comes in `pieces`. Of too many changes the first revisions.
        """

    def pieces(self, head: int, rows: int) -> AsyncIterator[Sequence[Marker]]:
        """The markers up to `head` that are not over, in the order of revisions; so many at once,
        each piece by a statement of its own, between which no transaction is open.

        AuthError STORE_UNAVAILABLE where it was not yet at `head` who answered.
        """

    async def begin(self, page: FeedPage) -> None:
        """Ties a fresh feed to the database that answered with `page`."""

    async def raise_epoch(self, page: FeedPage, above: int, *, cut_off: bool) -> None:
        """Opens a new epoch above `above`, once, however many workers ask after the same page."""

    async def beat(self, every_s: float) -> None:
        """Writes the time, where nobody did for so long; waits for nobody who is at it."""

    async def fence(self) -> int:
        """Opens an epoch with a cutoff for everything, above all that a restored database may have
        forgotten; answers the revision of the cutoff.
        """


class LeaseStore(Protocol):
    """Who does which task of the database, by its clock."""

    async def take(self, name: str, holder: str, seconds: float) -> bool:
        """Takes or renews a lease; False where another holds it."""

    async def give_back(self, holder: str) -> None:
        """Ends all leases of a holder."""


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


@dataclass(frozen=True, slots=True)
class Standing:
    """What would come of a refresh token, of a grant in any state."""

    grant: Grant
    end_time: float | None
    is_ended: bool
    is_expired: bool
    is_cut_off: bool
    is_idle: bool
    """Its refresh token was not used for too long."""
    is_good: bool
    """Of a living grant, this token is taken, by its client."""


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

    async def standing(self, handle: bytes, generation: int, key_id: str) -> Standing | None:
        """How `use` would find it; nothing is changed."""

    async def living(self, grant_id: str) -> Grant | None:
        """One that is alive."""

    async def page(
        self, wanted: GrantFilter, after: tuple[float, str] | None, limit: int
    ) -> tuple[Grant, ...]:
        """Living grants, the newest first, from the one after this creation time and id."""


class SessionStore(Protocol):
    """Sessions of people."""

    async def open(self, session: Session, grant: Grant, password_version: int) -> bool:
        """Adds a session with its first grant; False where the user is not let in any more, or its
        password is not the one of this version.
        """

    async def living(self, session_id: str) -> Session | None:
        """One that is alive."""

    async def page(
        self, user_id: str, after: tuple[float, str] | None, limit: int
    ) -> tuple[Session, ...]:
        """Living sessions, of all users where none is named, the newest first, from the one after
        this creation time and id.
        """


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


@dataclass(frozen=True, slots=True)
class UserFilter:
    """Which users are asked for; what is empty or None takes any."""

    username: str = ""
    email: str = ""
    state: UserState | None = None


@dataclass(frozen=True, slots=True)
class PasswordRecord:
    """A user and its password."""

    user: User
    password_version: int
    """Counts passwords: a login that began with the one before opens nothing."""
    hash: str = field(repr=False)
    """Empty: it has none."""


class UserStore(Protocol):
    """Users and their passwords. Their sessions and grants end by the cutoff of a change."""

    async def get(self, user_id: str) -> User | None:
        """One user."""

    async def page(self, wanted: UserFilter, after: str, limit: int) -> tuple[User, ...]:
        """Users in the order of their ids, from the one after `after`."""

    async def add(
        self, user: User, password_hash: str, request: tuple[bytes, bytes] | None = None
    ) -> User:
        """Adds a user, or answers the one of the same request, as it is now.

        `request` is digests of who asks under which id, and of what is asked. AuthError
        ALREADY_EXISTS where the username is taken, REQUEST_ID_REUSED.
        """

    async def update(
        self, user_id: str, version: int | None, edit: Callable[[User], User]
    ) -> tuple[User, int]:
        """Writes what `edit` makes of the user as it is now; version None takes any.

        Answers it and the revision. AuthError USER_NOT_FOUND, ETAG_MISMATCH, ALREADY_EXISTS, and
        what `edit` raises; then nothing changed.
        """

    async def move(self, user_id: str, version: int | None, to: UserState) -> tuple[User, int]:
        """Moves a user from the other state; DISABLED cuts off its tokens.

        AuthError USER_NOT_FOUND, ETAG_MISMATCH, USER_STATE_CONFLICT.
        """

    async def delete(self, user_id: str, version: int | None) -> int:
        """Deletes a user with what it holds, cuts off its tokens, and answers the revision.

        AuthError USER_NOT_FOUND, ETAG_MISMATCH.
        """

    async def password(self, user_id: str) -> PasswordRecord | None:
        """The password of a user."""

    async def password_of(self, username: str) -> PasswordRecord | None:
        """The password of the user of a name, without regard to case."""

    async def set_password(
        self,
        user_id: str,
        password_hash: str,
        *,
        version: int | None = None,
        keep_session: str = "",
    ) -> int:
        """Sets a password in place of the one of this version, None takes any; answers the
        revision.

        The tokens of the user are cut off; or, with a session to keep, its other sessions end, and
        all its grants but those of first parties in that session.
        AuthError USER_NOT_FOUND, USER_STATE_CONFLICT where it is disabled, INVALID_GRANT where
        another password was set meanwhile.
        """

    async def add_reset_code(
        self, user_id: str, digest: bytes, rev: int, lifetime_s: float
    ) -> float:
        """Gives the user a code to set a password by, the only one; answers its end.

        AuthError USER_NOT_FOUND, USER_STATE_CONFLICT where it is disabled.
        """

    async def by_reset_code(self, digest: bytes) -> User | None:
        """The user of a code that is good."""

    async def reset_password(self, digest: bytes, password_hash: str) -> int | None:
        """Uses a good code up, as `set_password` without a session; None where it is not good."""

    async def rehash(self, user_id: str, known: str, password_hash: str) -> None:
        """Writes the same password's other hash over the known one, unless that is gone."""


class Counter(NamedTuple):
    """What failures are counted for."""

    digest: bytes
    free: int
    """So many cost no wait."""


class FailureStore(Protocol):
    """Failures to prove an identity, and how long to wait after them, by the database's clock."""

    async def charge(self, counters: Sequence[Counter]) -> float:
        """Counts a failure in each, or says how long to wait yet, in seconds, and counts none."""

    async def take_back(
        self, counters: Sequence[Counter], *, forget: Sequence[Counter] = ()
    ) -> None:
        """Takes one failure back from each, never below none, and forgets the others whole."""

    async def refused(self, subject: str, reason: Reason) -> None:
        """Records a failure that stays, of this user if there is one."""


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


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One action, as it was recorded."""

    audit_event_id: str
    create_time: float
    act: Act
    outcome: AuditOutcome
    reason: Reason
    """Why it was refused."""
    touched: Touched
    revision: int
    """0 where nothing took one."""


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which events are asked for; an empty text and None take any."""

    start_time: float | None = None
    end_time: float | None = None
    """The first moment that is too late."""
    actor: str = ""
    subject: str = ""
    client_id: str = ""
    action: str = ""
    outcome: AuditOutcome | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a change that was made once: a marker, or a durable cutoff."""

    change: Change
    revision: int
    create_time: float | None
    """None where nothing remembers it."""
    event: AuditEvent | None
    """None where the audit does not reach back so far."""


class AuditStore(Protocol):
    """Who did what. Rows are written by the other stores, with what they record."""

    async def page(
        self, wanted: AuditFilter, after: tuple[float, str] | None, limit: int
    ) -> tuple[AuditEvent, ...]:
        """Events, the newest first, from the one after this time and id."""

    async def refused(self, reason: Reason, touched: Touched = NOTHING) -> None:
        """Records that what is under way was refused; nothing else is done."""

    async def told(self, changes: Collection[Change]) -> tuple[Told, ...]:
        """Which of these changes were made and are remembered, in the order of their revisions."""


class SweepStore(Protocol):
    """What is over and goes. Each call is one short transaction; two at once do no harm."""

    async def compact(self) -> None:
        """Moves `compacted_to` up to where no change at or below it is needed any more."""

    async def sweep(self, table: str, most: int) -> int:
        """Deletes at most so many rows that are over, for each way to be over; answers how many."""


SWEPT = (
    "access_token",
    "assertion",
    "creation",
    "initial_access_token",
    "grant",
    "session",
    "failure",
    "audit",
)
"""Tables whose rows are over one day; `feed` too, where it is compacted."""


@dataclass(frozen=True, slots=True)
class Store:
    """The whole of storage."""

    clients: ClientStore
    initial_access_tokens: InitialAccessTokenStore
    resources: ResourceStore
    roles: RoleStore
    keys: KeyStore
    feed: FeedStore
    leases: LeaseStore
    grants: GrantStore
    sessions: SessionStore
    assertions: AssertionStore
    tokens: TokenStore
    api_keys: ApiKeyStore
    users: UserStore
    failures: FailureStore
    revocations: RevocationStore
    sweeps: SweepStore
    audit: AuditStore

    def on_commit(self, tell: Callable[[int, Sequence[Change]], None]) -> None:
        """Has it told of each revision that is committed here, and of what changed with it."""
        listen = getattr(self.feed, "on_commit", None)
        if listen is not None:
            listen(tell)

    async def close(self) -> None:
        """Gives connections back."""
        close = getattr(self.feed, "close", None)
        if close is not None:
            await close()
