"""every credential"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from authsvc_client.core.markers import MarkerKind, marker_key

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Stored credentials, durable cutoffs in a table of their own, states of signing keys."""
    _cutoffs()
    _clients()
    _keys_and_resources()
    _grants()
    _tokens()


def _cutoffs() -> None:
    op.create_table(
        "cutoff",
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    bind = op.get_bind()
    found = [
        (marker_key(MarkerKind.CUTOFF_CLIENT, row.client_id), row.cutoff)
        for row in bind.execute(sa.text("SELECT client_id, cutoff FROM client WHERE cutoff > 0"))
    ] + [
        (marker_key(MarkerKind.CUTOFF_EVERYTHING), row.cutoff)
        for row in bind.execute(sa.text("SELECT cutoff FROM feed_head WHERE cutoff > 0"))
    ]
    for key, cutoff in found:
        bind.execute(
            sa.text("INSERT INTO cutoff (key, revision) VALUES (:key, :revision)"),
            {"key": key.hex(), "revision": cutoff},
        )
    for table in ("client", "feed_head"):
        op.drop_column(table, "cutoff")
    _index("feed", "key")


def _clients() -> None:
    _add(
        "client",
        sa.Column("secret_used", sa.Boolean(), nullable=False, server_default=sa.true()),
        sa.Column("previous_secret_digest", sa.LargeBinary(), nullable=True),
        sa.Column("previous_secret_until", sa.Double(), nullable=True),
        sa.Column("registration_digest", sa.LargeBinary(), nullable=True),
        sa.Column("registration_rev", sa.BigInteger(), nullable=False, server_default="0"),
    )
    _index("client", "registration_digest", unique=True)
    op.drop_index("client_identity", "client")
    holds_name = sa.text(
        "identity_value IS NOT NULL AND state <> 3 AND (state <> 4 OR review_time IS NOT NULL)"
    )
    op.create_index(
        "client_identity",
        "client",
        ["identity_kind", "identity_value"],
        unique=True,
        sqlite_where=holds_name,
        postgresql_where=holds_name,
    )
    op.create_table(
        "initial_access_token",
        sa.Column("initial_access_token_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("uses_left", sa.Integer(), nullable=False),
        sa.Column("rev", sa.BigInteger(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("initial_access_token_id"),
        sa.UniqueConstraint("digest"),
    )
    _index("initial_access_token", "expire_time")
    op.create_table(
        "registration",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("request_digest", sa.LargeBinary(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    _index("registration", "expire_time")


def _keys_and_resources() -> None:
    _add(
        "signing_key",
        sa.Column("ready_time", sa.Double(), nullable=False, server_default="0"),
        sa.Column("activate_time", sa.Double(), nullable=True),
        sa.Column("retire_time", sa.Double(), nullable=True),
        sa.Column("taint_time", sa.Double(), nullable=True),
    )
    op.execute("UPDATE signing_key SET ready_time = create_time")
    op.execute("UPDATE signing_key SET activate_time = create_time WHERE state = 'current'")
    op.create_index(
        "signing_key_next",
        "signing_key",
        ["state"],
        unique=True,
        sqlite_where=sa.text("state = 'next'"),
        postgresql_where=sa.text("state = 'next'"),
    )
    _add(
        "resource",
        sa.Column("encryption_jwk", sa.Text(), nullable=False, server_default=sa.text("''")),
        sa.Column("freeze_permissions", sa.Boolean(), nullable=False, server_default=sa.false()),
    )


def _grants() -> None:
    op.create_table(
        "grant",
        sa.Column("grant_id", sa.String(length=64), nullable=False),
        sa.Column("handle", sa.LargeBinary(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("previous_key_id", sa.String(), nullable=False),
        sa.Column("sender", sa.String(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("parent_id", sa.String(), nullable=False),
        sa.Column("root_jti", sa.String(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("rev", sa.BigInteger(), nullable=False),
        sa.Column("cutoff_keys", sa.Text(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("use_time", sa.Double(), nullable=True),
        sa.Column("idle_expire_time", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.Column("end_time", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("grant_id"),
        sa.UniqueConstraint("handle"),
    )
    for column in (
        "client_id",
        "subject",
        "session_id",
        "parent_id",
        "root_jti",
        "create_time",
        "expire_time",
    ):
        _index("grant", column)
    ended = sa.text("end_time IS NOT NULL")
    op.create_index(
        "ix_grant_end_time", "grant", ["end_time"], sqlite_where=ended, postgresql_where=ended
    )


def _tokens() -> None:
    op.create_table(
        "access_token",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("kid", sa.String(), nullable=False),
        sa.Column("claims", sa.Text(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    _index("access_token", "expire_time")
    op.create_table(
        "api_key",
        sa.Column("api_key_id", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("rev", sa.BigInteger(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("api_key_id"),
        sa.UniqueConstraint("digest"),
    )
    _index("api_key", "client_id")
    op.create_table(
        "assertion",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    _index("assertion", "expire_time")


def _add(table: str, *columns: sa.Column[Any]) -> None:
    # Not as a batch: SQLite would make the table anew, and others refer to its rows.
    for column in columns:
        op.add_column(table, column)


def _index(table: str, column: str, *, unique: bool = False) -> None:
    op.create_index(f"ix_{table}_{column}", table, [column], unique=unique)


def downgrade() -> None:
    """A version before it would not see what was revoked: restore a backup and fence."""
    raise NotImplementedError
