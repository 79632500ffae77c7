"""the first schema"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Clients, resources, signing keys and the feed."""
    op.create_table(
        "client",
        sa.Column("client_id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("identity_kind", sa.String(), nullable=True),
        sa.Column("identity_value", sa.String(), nullable=True),
        sa.Column("identity_ca", sa.String(), nullable=True),
        sa.Column("secret_digest", sa.LargeBinary(), nullable=True),
        sa.Column("cutoff", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("registrant", sa.String(), nullable=False),
        sa.Column("reviewer", sa.String(), nullable=False),
        sa.Column("review_comment", sa.String(), nullable=False),
        sa.Column("review_time", sa.Double(), nullable=True),
        sa.Column("approval_expire_time", sa.Double(), nullable=True),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("update_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("client_id"),
    )
    op.create_index(
        "client_identity",
        "client",
        ["identity_kind", "identity_value"],
        unique=True,
        sqlite_where=sa.text("identity_value IS NOT NULL AND state <> 3"),
        postgresql_where=sa.text("identity_value IS NOT NULL AND state <> 3"),
    )
    op.create_index("client_state", "client", ["state", "client_id"], unique=False)

    op.create_table(
        "feed",
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("nonce", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("revision", "kind", "key"),
    )
    op.create_index("ix_feed_until", "feed", ["until"], unique=False)

    op.create_table(
        "feed_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("compacted_to", sa.BigInteger(), nullable=False),
        sa.Column("cutoff", sa.BigInteger(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("nonce", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "signing_key",
        sa.Column("kid", sa.String(length=64), nullable=False),
        sa.Column("alg", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("public_jwk", sa.Text(), nullable=False),
        sa.Column("sealed_private", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("kid"),
    )
    op.create_index(
        "signing_key_current",
        "signing_key",
        ["state"],
        unique=True,
        sqlite_where=sa.text("state = 'current'"),
        postgresql_where=sa.text("state = 'current'"),
    )

    op.create_table(
        "resource",
        sa.Column("resource_id", sa.String(length=512), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("owner_client_id", sa.String(), nullable=True),
        sa.Column("token_format", sa.Integer(), nullable=False),
        sa.Column("token_lifetime_s", sa.Integer(), nullable=False),
        sa.Column("staleness_max_s", sa.Integer(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("update_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner_client_id"],
            ["client.client_id"],
        ),
        sa.PrimaryKeyConstraint("resource_id"),
    )
    op.create_index("ix_resource_owner_client_id", "resource", ["owner_client_id"], unique=False)

    op.create_table(
        "scope",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("resource_id", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["resource_id"],
            ["resource.resource_id"],
        ),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_index("ix_scope_resource_id", "scope", ["resource_id"], unique=False)

    # Epoch 1, nothing written yet; 0 is no revision.
    op.execute(
        "INSERT INTO feed_head (id, revision, compacted_to, cutoff, fingerprint, nonce)"
        " VALUES (1, 4294967296, 4294967296, 0, '', '')"
    )


def downgrade() -> None:
    """There is nothing before it: drop the database."""
    raise NotImplementedError
