"""The schema: where it stands, and how it is brought up to date."""

from enum import Enum
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from authsvc.store.sql import Database
from authsvc.store.tables import FEED_HEAD

_LOCK = 0x61757468  # PostgreSQL advisory lock: two that migrate at once take turns


class Schema(Enum):
    """What a database holds."""

    EMPTY = "empty"
    CURRENT = "current"
    BEHIND = "behind"
    UNKNOWN = "unknown"


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def standing_of(connection: Connection) -> Schema:
    """Where the schema stands."""
    scripts = ScriptDirectory.from_config(_config(connection))
    stamps = MigrationContext.configure(connection).get_current_heads()
    tables = set(inspect(connection).get_table_names())
    if not stamps:
        return Schema.UNKNOWN if tables else Schema.EMPTY
    known = {script.revision for script in scripts.walk_revisions()}
    # The stamp of another program that uses alembic too may look like ours.
    if len(stamps) > 1 or stamps[0] not in known or FEED_HEAD.name not in tables:
        return Schema.UNKNOWN
    return Schema.CURRENT if stamps[0] == scripts.get_current_head() else Schema.BEHIND


def _upgrade(connection: Connection) -> Schema:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    found = standing_of(connection)
    if found in (Schema.EMPTY, Schema.BEHIND):
        command.upgrade(_config(connection), "head")
    return found


async def standing(database: Database) -> Schema:
    """Where the schema stands. Raises AuthError STORE_UNAVAILABLE."""
    async with database.write() as connection:
        return await connection.run_sync(standing_of)


async def upgrade(database: Database) -> Schema:
    """Brings an empty or older schema up to date and answers what was found; one transaction.

    What is UNKNOWN is left alone. Raises AuthError STORE_UNAVAILABLE or COMMIT_UNKNOWN.
    """
    found: Any = None
    async with database.write() as connection:
        found = await connection.run_sync(_upgrade)
    assert isinstance(found, Schema)
    return found
