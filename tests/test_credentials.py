"""docs/credentials.md says what a server does, and the probe that wrote it can tell."""

import asyncio
from pathlib import Path

import pytest

from tests import credentials
from tests.harness import NOW, hand_clock


async def test_document_is_what_the_server_does() -> None:
    text = credentials.DOCUMENT.read_text()
    assert await credentials.document(text) == text, "run `make docs`"


async def test_probe_fails_where_an_answer_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unavailable(_scene: credentials.Scene) -> str:
        return "STORE_UNAVAILABLE"

    monkeypatch.setitem(credentials.CREDENTIALS, "opaque", unavailable)
    with pytest.raises(credentials.ProbeError, match="opaque: STORE_UNAVAILABLE"):
        await credentials.what_kills_what(["`RevokeGrant`"])


async def test_probe_fails_where_an_event_is_undone_by_compaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The durable side of a marker taken away by hand: what it killed comes back."""

    async def only_a_marker(scene: credentials.Scene) -> None:
        await scene.admin("RevokeEverything")
        directory = scene.server.app._settings.state_dir
        await asyncio.to_thread(credentials.sql, directory, "DELETE FROM cutoff")

    event = credentials.once(only_a_marker)
    monkeypatch.setitem(credentials.EVENTS, "`RevokeEverything`", event)
    with pytest.raises(credentials.ProbeError, match="compacted"):
        await credentials.what_kills_what(["`RevokeEverything`"])


async def test_new_way_needs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(credentials.WORDS, "initial access token")
    with pytest.raises(credentials.ProbeError, match="no words for"):
        await credentials.what_proves_whom()


async def test_token_that_an_api_key_got_ends_with_it(tmp_path: Path) -> None:
    async with credentials.serving(tmp_path, hand_clock()) as server:
        scene = await credentials.equip(server)
        await server.advance(credentials.LONG_S - 60)
        request = credentials.kept_request(scene.app.client_id)
        metadata = (("authorization", f"Bearer {scene.held['API key']}"),)
        got = (await server.auth(scene.app.who).IssueToken(request, metadata=metadata)).token
        assert got.expire_time == credentials.stamp(NOW + credentials.LONG_S)
