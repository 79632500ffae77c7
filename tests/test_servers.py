import os
from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import Postgres, ServerError


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as started:
        yield started


async def ask(url: str, statement: str) -> list[object]:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            answer = await connection.execute(text(statement))
            return [row[0] for row in answer] if answer.returns_rows else []
    finally:
        await engine.dispose()


async def test_each_database_is_empty_and_its_own(server: Postgres) -> None:
    first, second = await server.database(), await server.database()
    await ask(first, "CREATE TABLE things (id int)")
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    assert await ask(first, tables) == ["things"]
    assert await ask(second, tables) == []


async def test_it_is_a_supported_version_with_utf8(server: Postgres) -> None:
    url = await server.database()
    [version] = await ask(url, "SELECT current_setting('server_version_num')::int")
    assert isinstance(version, int)
    assert version >= 150_000
    assert await ask(url, "SELECT current_setting('server_encoding')") == ["UTF8"]
    assert await ask(url, "SELECT current_setting('listen_addresses')") == [""]


async def test_two_run_side_by_side_and_stopping_leaves_nothing(server: Postgres) -> None:
    with Postgres() as other:
        assert await ask(await other.database(), "SELECT 1") == [1]
        folder, pid = other.folder, other.pid
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert await ask(await server.database(), "SELECT 1") == [1]


def test_where_none_can_be_had_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTHSVC_TEST_POSTGRES", "wheel")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ServerError, match="apt-get install postgresql"):
        Postgres()
