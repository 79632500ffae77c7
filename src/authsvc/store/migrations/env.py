"""Alembic's entry: runs on the connection that authsvc.store.migrate hands over."""

from alembic import context
from sqlmodel import SQLModel

from authsvc.store import tables

assert tables.FEED_HEAD is not None  # the import registers the tables

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
