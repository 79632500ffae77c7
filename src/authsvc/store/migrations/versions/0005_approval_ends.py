"""approval ends: clients whose approval is over are found by an index"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The version before does not need it."""
    ends = sa.text("approval_expire_time IS NOT NULL")
    op.create_index(
        "client_approval_end",
        "client",
        ["state", "approval_expire_time"],
        sqlite_where=ends,
        postgresql_where=ends,
    )


def downgrade() -> None:
    """A version before it would not see what was revoked: restore a backup and fence."""
    raise NotImplementedError
