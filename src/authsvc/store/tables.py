"""The tables, as alembic sees them. Rows of these classes never leave this package."""

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, Table, Text, text
from sqlmodel import Field, SQLModel

from authsvc.model import ClientState, KeyState

_NOT_REJECTED = text(f"identity_value IS NOT NULL AND state <> {int(ClientState.REJECTED)}")
_CURRENT = text(f"state = '{KeyState.CURRENT}'")


class ClientRow(SQLModel, table=True):
    """A client; a certificate name belongs to one client that is not rejected, whatever its CA."""

    __tablename__ = "client"
    __table_args__ = (
        Index(
            "client_identity",
            "identity_kind",
            "identity_value",
            unique=True,
            sqlite_where=_NOT_REJECTED,
            postgresql_where=_NOT_REJECTED,
        ),
        Index("client_state", "state", "client_id"),
    )

    client_id: str = Field(primary_key=True, max_length=64)
    state: int
    details: str = Field(sa_column=Column("details", Text, nullable=False))
    identity_kind: str | None = None
    identity_value: str | None = None
    identity_ca: str | None = None
    secret_digest: bytes | None = Field(
        default=None, sa_column=Column("secret_digest", LargeBinary)
    )
    cutoff: int = Field(default=0, sa_column=Column("cutoff", BigInteger, nullable=False))
    version: int = 1
    registrant: str
    reviewer: str = ""
    review_comment: str = ""
    review_time: float | None = Field(default=None, sa_column=Column("review_time", Double))
    approval_expire_time: float | None = Field(
        default=None, sa_column=Column("approval_expire_time", Double)
    )
    create_time: float = Field(sa_column=Column("create_time", Double, nullable=False))
    update_time: float = Field(sa_column=Column("update_time", Double, nullable=False))


class ResourceRow(SQLModel, table=True):
    """A resource."""

    __tablename__ = "resource"

    resource_id: str = Field(primary_key=True, max_length=512)
    display_name: str = ""
    owner_client_id: str | None = Field(default=None, foreign_key="client.client_id", index=True)
    token_format: int
    token_lifetime_s: int
    staleness_max_s: int | None = None
    version: int = 1
    create_time: float = Field(sa_column=Column("create_time", Double, nullable=False))
    update_time: float = Field(sa_column=Column("update_time", Double, nullable=False))


class ScopeRow(SQLModel, table=True):
    """A scope; its name belongs to one resource."""

    __tablename__ = "scope"

    name: str = Field(primary_key=True, max_length=128)
    resource_id: str = Field(foreign_key="resource.resource_id", index=True)
    description: str = ""


class SigningKeyRow(SQLModel, table=True):
    """A signing key; at most one is current."""

    __tablename__ = "signing_key"
    __table_args__ = (
        Index(
            "signing_key_current",
            "state",
            unique=True,
            sqlite_where=_CURRENT,
            postgresql_where=_CURRENT,
        ),
    )

    kid: str = Field(primary_key=True, max_length=64)
    alg: str
    state: str
    public_jwk: str = Field(sa_column=Column("public_jwk", Text, nullable=False))
    sealed_private: bytes = Field(sa_column=Column("sealed_private", LargeBinary, nullable=False))
    create_time: float = Field(sa_column=Column("create_time", Double, nullable=False))


class FeedRow(SQLModel, table=True):
    """One change; `nonce` tells two histories apart that share a revision."""

    __tablename__ = "feed"

    revision: int = Field(sa_column=Column("revision", BigInteger, primary_key=True))
    kind: int = Field(primary_key=True)
    key: bytes = Field(sa_column=Column("key", LargeBinary, primary_key=True))
    until: float = Field(sa_column=Column("until", Double, nullable=False, index=True))
    payload: bytes | None = Field(default=None, sa_column=Column("payload", LargeBinary))
    nonce: str


class FeedHeadRow(SQLModel, table=True):
    """The one row that every change takes its revision from."""

    __tablename__ = "feed_head"

    id: int = Field(primary_key=True)
    revision: int = Field(sa_column=Column("revision", BigInteger, nullable=False))
    compacted_to: int = Field(sa_column=Column("compacted_to", BigInteger, nullable=False))
    cutoff: int = Field(sa_column=Column("cutoff", BigInteger, nullable=False))
    fingerprint: str = ""
    nonce: str = ""


def table(row: type[SQLModel]) -> Table:
    """The Core table of a row class: queries select columns and never build row objects."""
    found = SQLModel.metadata.tables[str(row.__tablename__)]
    assert isinstance(found, Table)
    return found


CLIENT, RESOURCE, SCOPE = table(ClientRow), table(ResourceRow), table(ScopeRow)
SIGNING_KEY, FEED, FEED_HEAD = table(SigningKeyRow), table(FeedRow), table(FeedHeadRow)
