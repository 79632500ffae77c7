"""people: users, sessions, roles, and the audit"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Users and their sessions, what they may do, and who did what."""
    _creations()
    _users()
    _sessions()
    _roles()
    _audit()


def _creations() -> None:
    op.drop_index("ix_registration_expire_time", "registration")
    op.rename_table("registration", "creation")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX registration_pkey RENAME TO creation_pkey")
    op.execute("ALTER TABLE creation RENAME COLUMN client_id TO object_id")
    op.create_index("ix_creation_expire_time", "creation", ["expire_time"])


def _users() -> None:
    op.create_table(
        "failure",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("wait_until", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index("ix_failure_expire_time", "failure", ["expire_time"], unique=False)
    op.create_table(
        "user",
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("username", sa.String(), nullable=False),
        sa.Column("username_key", sa.String(), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("email_key", sa.String(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("password_version", sa.Integer(), nullable=False),
        sa.Column("password_set_time", sa.Double(), nullable=True),
        sa.Column("reset_digest", sa.LargeBinary(), nullable=True),
        sa.Column("reset_rev", sa.BigInteger(), nullable=False),
        sa.Column("reset_expire_time", sa.Double(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("update_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("user_id"),
        sa.UniqueConstraint("username_key"),
    )
    op.create_index("ix_user_email_key", "user", ["email_key"], unique=False)
    op.create_index("ix_user_reset_digest", "user", ["reset_digest"], unique=True)
    op.create_index("user_state", "user", ["state", "user_id"], unique=False)


def _sessions() -> None:
    op.create_table(
        "session",
        sa.Column("session_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("rev", sa.BigInteger(), nullable=False),
        sa.Column("cutoff_keys", sa.Text(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("acr", sa.String(), nullable=False),
        sa.Column("amr", sa.Text(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("auth_time", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.Column("end_time", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("session_id"),
    )
    op.create_index(
        "ix_session_end_time",
        "session",
        ["end_time"],
        unique=False,
        sqlite_where=sa.text("end_time IS NOT NULL"),
        postgresql_where=sa.text("end_time IS NOT NULL"),
    )
    op.create_index("ix_session_expire_time", "session", ["expire_time"], unique=False)
    op.create_index("ix_session_user_id", "session", ["user_id"], unique=False)
    op.create_index("session_create_time", "session", ["create_time", "session_id"], unique=False)
    op.add_column(
        "grant", sa.Column("address", sa.String(), nullable=False, server_default=sa.text("''"))
    )


def _roles() -> None:
    op.create_table(
        "permission",
        sa.Column("resource_id", sa.String(length=512), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("resource_id", "name"),
    )
    op.create_table(
        "role",
        sa.Column("role_uid", sa.String(length=64), nullable=False),
        sa.Column("role_id", sa.String(length=64), nullable=False),
        sa.Column("display_name", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("update_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("role_uid"),
        sa.UniqueConstraint("role_id"),
    )
    op.create_table(
        "role_assignment",
        sa.Column("holder_id", sa.String(length=64), nullable=False),
        sa.Column("role_uid", sa.String(length=64), nullable=False),
        sa.Column("resource_id", sa.String(length=512), nullable=False),
        sa.Column("holder_kind", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("holder_id", "role_uid", "resource_id"),
    )
    op.create_index(
        "role_assignment_role", "role_assignment", ["role_uid", "holder_id"], unique=False
    )
    op.create_index("role_assignment_resource", "role_assignment", ["resource_id"], unique=False)
    op.create_table(
        "role_permission",
        sa.Column("role_uid", sa.String(length=64), nullable=False),
        sa.Column("resource_id", sa.String(length=512), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("role_uid", "resource_id", "name"),
    )
    op.create_index("role_permission_of", "role_permission", ["resource_id", "name"], unique=False)


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("audit_event_id", sa.String(length=64), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("outcome", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Integer(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("on_behalf_of", sa.String(), nullable=False),
        sa.Column("peer", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("client_id", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("fields", sa.String(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("audit_event_id"),
    )
    op.create_index("audit_action", "audit", ["action", "create_time"], unique=False)
    op.create_index("audit_actor", "audit", ["actor", "create_time"], unique=False)
    op.create_index("audit_client_id", "audit", ["client_id", "create_time"], unique=False)
    op.create_index("audit_revision", "audit", ["revision"], unique=False)
    op.create_index("audit_subject", "audit", ["subject", "create_time"], unique=False)
    op.create_index("ix_audit_create_time", "audit", ["create_time"], unique=False)


def downgrade() -> None:
    """A version before it would not see what was revoked: restore a backup and fence."""
    raise NotImplementedError
