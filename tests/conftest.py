"""What the whole test session shares."""

import asyncio
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.emptied import Emptied
from tests.redis_servers import Redis
from tests.servers import Postgres

# A machine that is busy is no failure; `timeout` is what ends a test.
settings.register_profile("authsvc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("authsvc")


def pytest_report_header() -> str:
    vectors = os.environ.get("AUTHSVC_VECTORS")
    where = vectors or "AUTHSVC_VECTORS is unset, so tests/vectors is not collected"
    return f"outside vectors: {where}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def shared_postgres(postgres: Postgres) -> Emptied:
    return Emptied(postgres)


@pytest.fixture
def migrated_url(shared_postgres: Emptied) -> str:
    """An empty PostgreSQL database whose schema is current, and stays as it is."""
    return asyncio.run(shared_postgres.again())


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """One for all tests: who stops, freezes or fills it starts one of their own."""
    with Redis() as server:
        yield server
