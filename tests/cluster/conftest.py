"""Two replicas for all tests of the folder: to start them costs seconds."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.cluster.replicas import Cast, Cluster, Replica, cast, known
from tests.harness import migrate
from tests.servers import Postgres


@pytest.hookimpl(tryfirst=True)  # xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs them all: what one test does to a replica is no other's business."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session")
def shared_cluster(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    url = asyncio.run(postgres.database())
    asyncio.run(migrate(url))
    made = Cluster(tmp_path_factory.mktemp("cluster"), postgres, url)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Whole again after each test."""
    yield shared_cluster
    shared_cluster.mend()


@pytest.fixture
async def pair(cluster: Cluster) -> AsyncIterator[list[Replica]]:
    """Connections to both replicas."""
    replicas = [Replica(process) for process in cluster.processes]
    yield replicas
    for replica in replicas:
        await replica.disconnect()


@pytest.fixture
async def players(pair: list[Replica]) -> Cast:
    """A cast that both replicas know."""
    made = await cast(pair[0])
    await known(pair, made)
    return made
