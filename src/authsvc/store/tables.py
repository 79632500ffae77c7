"""The tables, as alembic sees them. Rows of these classes never leave this package."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    LargeBinary,
    Table,
    Text,
    false,
    text,
    true,
)
from sqlmodel import Field, SQLModel

from authsvc.model import ClientState, KeyState

HOLDS_NAME = text(
    f"identity_value IS NOT NULL AND state <> {int(ClientState.REJECTED)}"
    f" AND (state <> {int(ClientState.EXPIRED)} OR review_time IS NOT NULL)"
)
"""Who was turned away, or never let in, leaves its certificate name to others; who was let in once
has credentials and a past, and keeps it for a renewal.
"""
_CURRENT = text(f"state = '{KeyState.CURRENT}'")
_NEXT = text(f"state = '{KeyState.NEXT}'")
_ENDED = text("end_time IS NOT NULL")
_ENDS = text("approval_expire_time IS NOT NULL")


def _time(name: str, *, nullable: bool = False, **more: Any) -> Any:
    """A column in seconds since the epoch."""
    return Column(name, Double, nullable=nullable, **more)


def _bytes(name: str, *, nullable: bool = False, index: bool = False) -> Any:
    return Column(name, LargeBinary, nullable=nullable, index=index)


def _digest(name: str) -> Any:
    """SHA-256 of a secret, by which it is found."""
    return Column(name, LargeBinary, nullable=False, unique=True)


def _revision(name: str, **more: Any) -> Any:
    return Column(name, BigInteger, nullable=False, **more)


def _text(name: str, **more: Any) -> Any:
    """JSON, or another text without a limit of its own."""
    return Column(name, Text, nullable=False, **more)


class ClientRow(SQLModel, table=True):
    """A client; a certificate name belongs to one that holds it, whatever its CA."""

    __tablename__ = "client"
    __table_args__ = (
        Index(
            "client_identity",
            "identity_kind",
            "identity_value",
            unique=True,
            sqlite_where=HOLDS_NAME,
            postgresql_where=HOLDS_NAME,
        ),
        Index("client_state", "state", "client_id"),
        Index(
            "client_approval_end",
            "state",
            "approval_expire_time",
            sqlite_where=_ENDS,
            postgresql_where=_ENDS,
        ),
    )

    client_id: str = Field(primary_key=True, max_length=64)
    state: int
    details: str = Field(sa_column=_text("details"))
    identity_kind: str | None = None
    identity_value: str | None = None
    identity_ca: str | None = None
    secret_digest: bytes | None = Field(
        default=None, sa_column=_bytes("secret_digest", nullable=True)
    )
    secret_used: bool = Field(default=False, sa_column_kwargs={"server_default": true()})
    previous_secret_digest: bytes | None = Field(
        default=None, sa_column=_bytes("previous_secret_digest", nullable=True)
    )
    previous_secret_until: float | None = Field(
        default=None, sa_column=_time("previous_secret_until", nullable=True)
    )
    registration_digest: bytes | None = Field(
        default=None, sa_column=Column("registration_digest", LargeBinary, unique=True, index=True)
    )
    registration_rev: int = Field(
        default=0, sa_column=_revision("registration_rev", server_default="0")
    )
    version: int = 1
    registrant: str
    reviewer: str = ""
    review_comment: str = ""
    review_time: float | None = Field(default=None, sa_column=_time("review_time", nullable=True))
    approval_expire_time: float | None = Field(
        default=None, sa_column=_time("approval_expire_time", nullable=True)
    )
    create_time: float = Field(sa_column=_time("create_time"))
    update_time: float = Field(sa_column=_time("update_time"))


class ResourceRow(SQLModel, table=True):
    """A resource."""

    __tablename__ = "resource"

    resource_id: str = Field(primary_key=True, max_length=512)
    display_name: str = ""
    owner_client_id: str | None = Field(default=None, foreign_key="client.client_id", index=True)
    token_format: int
    token_lifetime_s: int
    staleness_max_s: int | None = None
    encryption_jwk: str = Field(
        default="", sa_column=_text("encryption_jwk", server_default=text("''"))
    )
    freeze_permissions: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    version: int = 1
    create_time: float = Field(sa_column=_time("create_time"))
    update_time: float = Field(sa_column=_time("update_time"))


class ScopeRow(SQLModel, table=True):
    """A scope; its name belongs to one resource."""

    __tablename__ = "scope"

    name: str = Field(primary_key=True, max_length=128)
    resource_id: str = Field(foreign_key="resource.resource_id", index=True)
    description: str = ""


class SigningKeyRow(SQLModel, table=True):
    """A signing key; at most one is current, and at most one is next."""

    __tablename__ = "signing_key"
    __table_args__ = (
        Index(
            "signing_key_current",
            "state",
            unique=True,
            sqlite_where=_CURRENT,
            postgresql_where=_CURRENT,
        ),
        Index(
            "signing_key_next",
            "state",
            unique=True,
            sqlite_where=_NEXT,
            postgresql_where=_NEXT,
        ),
    )

    kid: str = Field(primary_key=True, max_length=64)
    alg: str
    state: str
    public_jwk: str = Field(sa_column=_text("public_jwk"))
    sealed_private: bytes = Field(sa_column=_bytes("sealed_private"))
    create_time: float = Field(sa_column=_time("create_time"))
    ready_time: float = Field(sa_column=_time("ready_time", server_default="0"))
    activate_time: float | None = Field(
        default=None, sa_column=_time("activate_time", nullable=True)
    )
    retire_time: float | None = Field(default=None, sa_column=_time("retire_time", nullable=True))
    taint_time: float | None = Field(default=None, sa_column=_time("taint_time", nullable=True))


class GrantRow(SQLModel, table=True):
    """A grant and the refresh token that belongs to it; its secret part is in no table."""

    __tablename__ = "grant"
    # Of the few that ended: else a search for those that did not would go by it.
    __table_args__ = (
        Index("ix_grant_end_time", "end_time", sqlite_where=_ENDED, postgresql_where=_ENDED),
    )

    grant_id: str = Field(primary_key=True, max_length=64)
    handle: bytes = Field(sa_column=_digest("handle"))
    """Random, found in no other token."""
    generation: int = Field(sa_column=_revision("generation"))
    key_id: str
    """HMAC key of the live generation, and of the one before it."""
    previous_key_id: str = ""
    sender: str
    """Client id; of a public client the thumbprint of its key, or nothing."""
    client_id: str = Field(index=True)
    subject: str = Field(index=True)
    session_id: str = Field(default="", index=True)
    address: str = Field(default="", sa_column_kwargs={"server_default": text("''")})
    parent_id: str = Field(default="", index=True)
    """Grant of the subject token that it was exchanged from."""
    root_jti: str = Field(default="", index=True)
    details: str = Field(sa_column=_text("details"))
    rev: int = Field(sa_column=_revision("rev"))
    cutoff_keys: str = Field(sa_column=_text("cutoff_keys"))
    """Keys of the cutoffs that can kill it: JSON, a list of hexadecimal texts."""
    create_time: float = Field(sa_column=_time("create_time", index=True))
    use_time: float | None = Field(default=None, sa_column=_time("use_time", nullable=True))
    idle_expire_time: float = Field(sa_column=_time("idle_expire_time"))
    expire_time: float = Field(sa_column=_time("expire_time", index=True))
    end_time: float | None = Field(default=None, sa_column=_time("end_time", nullable=True))


class AccessTokenRow(SQLModel, table=True):
    """An access token that only its resource can read, or nobody: opaque or encrypted."""

    __tablename__ = "access_token"

    digest: bytes = Field(sa_column=Column("digest", LargeBinary, primary_key=True))
    kid: str = ""
    """Signing key of an encrypted one."""
    claims: str = Field(sa_column=_text("claims"))
    expire_time: float = Field(sa_column=_time("expire_time", index=True))


class ApiKeyRow(SQLModel, table=True):
    """An API key."""

    __tablename__ = "api_key"

    api_key_id: str = Field(primary_key=True, max_length=64)
    digest: bytes = Field(sa_column=_digest("digest"))
    client_id: str = Field(index=True)
    display_name: str = ""
    scopes: str = Field(sa_column=_text("scopes"))
    rev: int = Field(sa_column=_revision("rev"))
    create_time: float = Field(sa_column=_time("create_time"))
    expire_time: float | None = Field(default=None, sa_column=_time("expire_time", nullable=True))


class AssertionRow(SQLModel, table=True):
    """An assertion that was used, by a digest of its client and `jti`."""

    __tablename__ = "assertion"

    digest: bytes = Field(sa_column=Column("digest", LargeBinary, primary_key=True))
    expire_time: float = Field(sa_column=_time("expire_time", index=True))


class InitialAccessTokenRow(SQLModel, table=True):
    """A token that lets its bearer register clients (RFC 7591 section 1.2)."""

    __tablename__ = "initial_access_token"

    initial_access_token_id: str = Field(primary_key=True, max_length=64)
    digest: bytes = Field(sa_column=_digest("digest"))
    display_name: str = ""
    uses_left: int
    rev: int = Field(sa_column=_revision("rev"))
    create_time: float = Field(sa_column=_time("create_time"))
    expire_time: float = Field(sa_column=_time("expire_time", index=True))


class CreationRow(SQLModel, table=True):
    """A creation that may be asked for again, by a digest of who asks and of the request id."""

    __tablename__ = "creation"

    digest: bytes = Field(sa_column=Column("digest", LargeBinary, primary_key=True))
    request_digest: bytes = Field(sa_column=_bytes("request_digest"))
    object_id: str
    """Client or user."""
    expire_time: float = Field(sa_column=_time("expire_time", index=True))


class UserRow(SQLModel, table=True):
    """A person; the name that it logs in with is unique without regard to case."""

    __tablename__ = "user"
    __table_args__ = (Index("user_state", "state", "user_id"),)

    user_id: str = Field(primary_key=True, max_length=64)
    username: str
    username_key: str = Field(unique=True)
    """As it is compared."""
    display_name: str = ""
    email: str = ""
    email_key: str = Field(default="", index=True)
    state: int
    password_hash: str = Field(default="", sa_column=_text("password_hash"))
    """In argon2's own format; empty: it has no password."""
    password_version: int = 0
    """Counts passwords: a login that began with the one before opens nothing."""
    password_set_time: float | None = Field(
        default=None, sa_column=_time("password_set_time", nullable=True)
    )
    reset_digest: bytes | None = Field(
        default=None, sa_column=Column("reset_digest", LargeBinary, unique=True, index=True)
    )
    """SHA-256 of the code that resets the password."""
    reset_rev: int = Field(default=0, sa_column=_revision("reset_rev"))
    reset_expire_time: float | None = Field(
        default=None, sa_column=_time("reset_expire_time", nullable=True)
    )
    version: int = 1
    create_time: float = Field(sa_column=_time("create_time"))
    update_time: float = Field(sa_column=_time("update_time"))


class SessionRow(SQLModel, table=True):
    """A person's login."""

    __tablename__ = "session"
    __table_args__ = (
        Index("ix_session_end_time", "end_time", sqlite_where=_ENDED, postgresql_where=_ENDED),
        Index("session_create_time", "create_time", "session_id"),
    )

    session_id: str = Field(primary_key=True, max_length=64)
    user_id: str = Field(index=True)
    rev: int = Field(sa_column=_revision("rev"))
    cutoff_keys: str = Field(sa_column=_text("cutoff_keys"))
    """As of a grant."""
    address: str = ""
    acr: str = ""
    amr: str = Field(sa_column=_text("amr"))
    create_time: float = Field(sa_column=_time("create_time"))
    auth_time: float = Field(sa_column=_time("auth_time"))
    expire_time: float = Field(sa_column=_time("expire_time", index=True))
    end_time: float | None = Field(default=None, sa_column=_time("end_time", nullable=True))


class FailureRow(SQLModel, table=True):
    """Passwords that were tried for one account or by one peer, by a digest of which."""

    __tablename__ = "failure"

    digest: bytes = Field(sa_column=Column("digest", LargeBinary, primary_key=True))
    count: int
    wait_until: float = Field(sa_column=_time("wait_until"))
    """Nothing is tried before then."""
    expire_time: float = Field(sa_column=_time("expire_time", index=True))


class PermissionRow(SQLModel, table=True):
    """Something that may be done on a resource."""

    __tablename__ = "permission"

    resource_id: str = Field(primary_key=True, max_length=512)
    name: str = Field(primary_key=True, max_length=128)
    description: str = ""
    create_time: float = Field(sa_column=_time("create_time"))


class RoleRow(SQLModel, table=True):
    """Permissions that are held together."""

    __tablename__ = "role"

    role_uid: str = Field(primary_key=True, max_length=64)
    """Another one each time that a role is made under the same id."""
    role_id: str = Field(unique=True, max_length=64)
    display_name: str = ""
    description: str = ""
    version: int = 1
    create_time: float = Field(sa_column=_time("create_time"))
    update_time: float = Field(sa_column=_time("update_time"))


class RolePermissionRow(SQLModel, table=True):
    """That a role holds a permission."""

    __tablename__ = "role_permission"
    __table_args__ = (Index("role_permission_of", "resource_id", "name"),)

    role_uid: str = Field(primary_key=True, max_length=64)
    resource_id: str = Field(primary_key=True, max_length=512)
    name: str = Field(primary_key=True, max_length=128)


class RoleAssignmentRow(SQLModel, table=True):
    """That a user or a client holds a role."""

    __tablename__ = "role_assignment"
    __table_args__ = (
        Index("role_assignment_role", "role_uid", "holder_id"),
        Index("role_assignment_resource", "resource_id"),
    )

    holder_id: str = Field(primary_key=True, max_length=64)
    """User id or client id; no two are the same."""
    role_uid: str = Field(primary_key=True, max_length=64)
    resource_id: str = Field(default="", primary_key=True, max_length=512)
    """Only the role's permissions there; empty means all."""
    holder_kind: str
    create_time: float = Field(sa_column=_time("create_time"))


class AuditRow(SQLModel, table=True):
    """One action, in the transaction of what it did. Never a secret, a password or a token."""

    __tablename__ = "audit"
    __table_args__ = (
        Index("audit_action", "action", "create_time"),
        Index("audit_actor", "actor", "create_time"),
        Index("audit_subject", "subject", "create_time"),
        Index("audit_client_id", "client_id", "create_time"),
        Index("audit_revision", "revision"),
    )

    audit_event_id: str = Field(primary_key=True, max_length=64)
    create_time: float = Field(sa_column=_time("create_time", index=True))
    action: str
    outcome: int
    reason: int = 0
    actor: str = ""
    on_behalf_of: str = ""
    peer: str = ""
    address: str = ""
    subject: str = ""
    client_id: str = ""
    object_id: str = ""
    fields: str = ""
    """Those that an update named, comma-separated."""
    comment: str = Field(default="", sa_column=_text("comment"))
    revision: int = Field(default=0, sa_column=_revision("revision"))
    request_id: str = ""


class CutoffRow(SQLModel, table=True):
    """The latest cutoff of a key, for ever: what carries a lower `rev` is dead."""

    __tablename__ = "cutoff"

    key: str = Field(primary_key=True, max_length=32)
    """Key of its marker, hexadecimal."""
    revision: int = Field(sa_column=_revision("revision"))


class FeedRow(SQLModel, table=True):
    """One change; `nonce` tells two histories apart that share a revision."""

    __tablename__ = "feed"

    revision: int = Field(sa_column=Column("revision", BigInteger, primary_key=True))
    kind: int = Field(primary_key=True)
    key: bytes = Field(sa_column=Column("key", LargeBinary, primary_key=True, index=True))
    until: float = Field(sa_column=_time("until", index=True))
    payload: bytes | None = Field(default=None, sa_column=_bytes("payload", nullable=True))
    nonce: str


class FeedHeadRow(SQLModel, table=True):
    """The one row that every change takes its revision from."""

    __tablename__ = "feed_head"

    id: int = Field(primary_key=True)
    revision: int = Field(sa_column=_revision("revision"))
    compacted_to: int = Field(sa_column=_revision("compacted_to"))
    fingerprint: str = ""
    nonce: str = ""


class BeatRow(SQLModel, table=True):
    """The one row by which a worker knows that the database takes writes."""

    __tablename__ = "beat"

    id: int = Field(primary_key=True)
    time: float = Field(sa_column=_time("time"))


class LeaseRow(SQLModel, table=True):
    """Who does a task of the database, until when."""

    __tablename__ = "lease"

    name: str = Field(primary_key=True, max_length=64)
    holder: str
    until: float = Field(sa_column=_time("until"))


def table(row: type[SQLModel]) -> Table:
    """The Core table of a row class: queries select columns and never build row objects."""
    found = SQLModel.metadata.tables[str(row.__tablename__)]
    assert isinstance(found, Table)
    return found


CLIENT, RESOURCE, SCOPE = table(ClientRow), table(ResourceRow), table(ScopeRow)
SIGNING_KEY, FEED, FEED_HEAD = table(SigningKeyRow), table(FeedRow), table(FeedHeadRow)
CUTOFF, GRANT, ACCESS_TOKEN = table(CutoffRow), table(GrantRow), table(AccessTokenRow)
API_KEY, ASSERTION = table(ApiKeyRow), table(AssertionRow)
INITIAL_ACCESS_TOKEN, CREATION = table(InitialAccessTokenRow), table(CreationRow)
USER, SESSION, FAILURE = table(UserRow), table(SessionRow), table(FailureRow)
PERMISSION, ROLE = table(PermissionRow), table(RoleRow)
ROLE_PERMISSION, ROLE_ASSIGNMENT = table(RolePermissionRow), table(RoleAssignmentRow)
AUDIT, BEAT, LEASE = table(AuditRow), table(BeatRow), table(LeaseRow)
