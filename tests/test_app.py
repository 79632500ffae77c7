"""Starts that must fail, each with what to do, beside the one that works."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from authsvc.app import StartError, kept, open_app, prepare
from authsvc.clock import SystemClock
from authsvc.config import Database, Listen, Settings, load
from authsvc.errors import AuthError, Reason

LISTEN = Listen(port=0, metrics_port=0, health_port=0)


def settings(state_dir: Path, **changes: Any) -> Settings:
    return load(state_dir=state_dir, listen=LISTEN, **changes)


async def start(chosen: Settings) -> None:
    app = await open_app(chosen)
    await app.start()
    await app.stop()


async def test_start_with_another_seal_key_says_so(tmp_path: Path) -> None:
    await start(settings(tmp_path))
    with pytest.raises(StartError, match="seal_keys"):
        await start(settings(tmp_path, seal_keys="ab" * 32))
    rotated = "ab" * 32 + "," + (tmp_path / "seal.key").read_text()
    await start(settings(tmp_path, seal_keys=rotated))


async def test_start_with_another_issuer_is_refused(tmp_path: Path) -> None:
    """The scopes of authsvc belong to the old issuer's resource: nobody could call."""
    await start(settings(tmp_path))
    app = await open_app(settings(tmp_path, issuer="https://other.test"))
    with pytest.raises(AuthError) as caught:
        await app.start()
    await app.stop()
    assert caught.value.reason is Reason.ALREADY_EXISTS
    await start(settings(tmp_path))


def test_start_with_another_trust_domain_is_refused(tmp_path: Path) -> None:
    prepare(settings(tmp_path), SystemClock())
    with pytest.raises(StartError, match="trust_domain"):
        prepare(settings(tmp_path, trust_domain="other.test"), SystemClock())


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    prepared = prepare(settings(tmp_path, seal_keys="ab" * 32), SystemClock())
    assert repr(bytes.fromhex("ab" * 32))[2:-1] not in repr(prepared)


def test_kept_file_is_private_whole_and_made_once(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    assert kept(file, "one") == "one"
    assert kept(file, "two") == "one"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_nothing_that_a_server_makes_is_readable_by_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    asyncio.run(start(settings(tmp_path)))
    public = {"ca.pem", "server.pem", "admin.pem"}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in public]
    assert {"authsvc.db", "seal.key", "database.id"} <= {path.name for path in files}
    assert not [path for path in files if path.stat().st_mode & 0o077]


async def test_one_file_is_not_the_database_of_two_state_directories(tmp_path: Path) -> None:
    """Each would take the other's writes for another history, in turn, and cut off all tokens."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'one' / 'authsvc.db'}"
    database = Database(url=SecretStr(url))
    first = await open_app(settings(tmp_path / "one"))
    same = await open_app(settings(tmp_path / "one"))  # as the workers of one server
    with pytest.raises(StartError, match="state directory"):
        await open_app(settings(tmp_path / "two", database=database))
    await first.stop()
    with pytest.raises(StartError, match="state directory"):
        await open_app(settings(tmp_path / "two", database=database))
    await same.stop()
    after = await open_app(settings(tmp_path / "two", database=database))
    with pytest.raises(StartError, match="state directory"):
        await open_app(settings(tmp_path / "one"))
    await after.stop()
