"""Tasks of the database: one of its workers does each, and another one after it."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from authsvc.config import Housekeeping as Settings
from authsvc.housekeeping import Housekeeping
from authsvc.store.sql_leases import SqlLeases
from tests.harness import Running, start, until
from tests.store.conftest import sql

LEASE_S = 3.0


@pytest.fixture
async def workers(
    tmp_path: Path, migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Running]]:
    monkeypatch.setattr("authsvc.housekeeping.FIRST_S", 0.1)
    made = [
        await start(
            tmp_path / str(number),
            url=migrated_url,
            seal_keys="ab" * 32,
            housekeeping=Settings(interval_s=LEASE_S / 3),
        )
        for number in range(3)
    ]
    yield made
    for each in made:
        await each.close()


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Housekeeping]:
    """Who did the chores, one entry for each time."""
    ran: list[Housekeeping] = []
    original = Housekeeping.run_once

    async def run_once(self: Housekeeping) -> None:
        ran.append(self)
        await original(self)

    monkeypatch.setattr(Housekeeping, "run_once", run_once)
    return ran


async def test_one_worker_does_the_chores_until_it_stops_or_dies(
    done: list[Housekeeping], workers: list[Running], migrated_url: str
) -> None:
    await until(lambda: len(done) >= 4)
    assert len(set(done)) == 1
    first = next(each for each in workers if each.app.housekeeping is done[0])
    rows = await sql(migrated_url, "SELECT holder FROM lease WHERE name = 'housekeeping'")
    assert rows == [(first.app._elected._holder,)]

    await first.close()  # well: it leaves the task to the others at once
    rows = await sql(migrated_url, f"SELECT name FROM lease WHERE holder = '{rows[0][0]}'")
    assert rows == []
    workers.remove(first)
    done.clear()
    await until(lambda: len(done) >= 2)
    assert len(set(done)) == 1
    second = next(each for each in workers if each.app.housekeeping is done[0])

    await second.app._tasks.stop()  # as if it had died: it gives nothing back
    done.clear()
    died = time.monotonic()
    await until(lambda: done)
    assert done[0] is not second.app.housekeeping
    assert time.monotonic() - died > LEASE_S / 3  # not before the lease was over


async def test_chores_of_everybody_would_be_noticed(
    done: list[Housekeeping],
    workers: list[Running],
    migrated_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def always(self: SqlLeases, name: str, holder: str, seconds: float) -> bool:
        del self, name, holder, seconds
        return True

    monkeypatch.setattr(SqlLeases, "take", always)
    done.clear()
    with pytest.raises(AssertionError):
        await test_one_worker_does_the_chores_until_it_stops_or_dies(done, workers, migrated_url)
