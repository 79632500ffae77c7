"""docs/credentials.md says what a server does, and the probe that wrote it can tell."""

import pytest

from tests import credentials


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
        credentials.sql(scene.server.app._settings.state_dir, "DELETE FROM cutoff")

    event = credentials.once(only_a_marker)
    monkeypatch.setitem(credentials.EVENTS, "`RevokeEverything`", event)
    with pytest.raises(credentials.ProbeError, match="compacted"):
        await credentials.what_kills_what(["`RevokeEverything`"])


async def test_new_way_needs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(credentials.WORDS, "initial access token")
    with pytest.raises(credentials.ProbeError, match="no words for"):
        await credentials.what_proves_whom()
