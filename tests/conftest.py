"""What the whole test session shares."""

import os
from collections.abc import Iterator

import pytest

from tests.servers import Postgres


def pytest_report_header() -> str:
    vectors = os.environ.get("AUTHSVC_VECTORS")
    where = vectors or "AUTHSVC_VECTORS is unset, so tests/vectors is not collected"
    return f"outside vectors: {where}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server
