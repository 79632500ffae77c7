import os
from pathlib import Path

import pytest

from tests import redis_servers
from tests.redis_servers import Redis
from tests.servers import ServerError


def test_two_run_side_by_side_and_closing_leaves_nothing() -> None:
    with Redis() as one, Redis(password="hunter2") as other:
        one.ask("SET", "key", "value")
        assert other.ask("GET", "key") is None
        folder, pid = other.folder, other.pid
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_begins_again_where_it_was_with_what_was_saved() -> None:
    with Redis() as server:
        port = server.port
        server.ask("SET", "kept", "1")
        server.save()
        server.ask("SET", "lost", "1")
        server.stop()
        server.start()
        assert (server.port, server.ask("KEYS", "*")) == (port, ["kept"])


def test_where_none_can_be_had_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTHSVC_TEST_REDIS", "wheel")
    monkeypatch.setattr(redis_servers, "WHEEL", Path("/nowhere"))
    with pytest.raises(ServerError, match="apt-get install redis-server"):
        Redis()
