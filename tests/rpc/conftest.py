"""One server for all tests of a module, on SQLite."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.harness import Running, running

API = "https://api.test"
SHARED = {"server", "callers"}
"""Fixtures that live as long as a module, and so does the event loop of the tests that use them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if pytest_asyncio.is_async_test(item) and SHARED & set(item.fixturenames):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("migrated_url")) if request.param == "postgres" else ""


@pytest.fixture
async def at(url: str, tmp_path: Path) -> AsyncIterator[Running]:
    """A server with a resource, on each kind of database."""
    async with running(tmp_path, url=url) as server:
        owner = await server.member("owner", "validate")
        await server.resource(API, "read", "write", owner=owner.client_id)
        yield server
