"""Servers that the whole test session shares."""

from collections.abc import Iterator

import pytest

from tests.servers import Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server
