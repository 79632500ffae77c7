"""docs/credentials.md says what a server does, and the probe that wrote it can tell."""

from pathlib import Path

import pytest

from tests import credentials, credentials_of_people
from tests.credentials import SERVICES
from tests.credentials_of_people import PEOPLE
from tests.harness import NOW, hand_clock
from tests.probe import LONG_S, Probe, ProbeError, Scene, once, serving, sql, stamp


async def test_document_is_what_the_server_does() -> None:
    text = credentials.DOCUMENT.read_text()
    assert await credentials.document(text) == text, "run `make docs`"


async def test_probe_fails_where_an_answer_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unavailable(_scene: Scene) -> str:
        return "STORE_UNAVAILABLE"

    monkeypatch.setitem(credentials.CREDENTIALS, "opaque", unavailable)
    with pytest.raises(ProbeError, match="opaque: STORE_UNAVAILABLE"):
        await SERVICES(["`RevokeGrant`"])


@pytest.mark.parametrize(
    ("probe", "event", "undone", "when"),
    [
        (SERVICES, "`RevokeEverything`", "DELETE FROM cutoff", "compacted"),
        (PEOPLE, "`EndSession`", "DELETE FROM feed", "restarted"),
    ],
)
async def test_probe_fails_where_an_event_is_undone_later(
    probe: Probe, event: str, undone: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps it is taken away by hand: what it killed comes back."""
    [(_, step)] = probe.events[event]

    async def step_undone(scene: Scene) -> None:
        await step(scene)
        directory = scene.server.app._settings.state_dir
        await sql(directory, undone)

    monkeypatch.setitem(probe.events, event, once(step_undone))
    with pytest.raises(ProbeError, match=when):
        await probe([event])


async def test_probe_fails_where_a_token_takes_another_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refresh token that is revoked before the tokens that it brought forth."""
    bearers = {"refresh token": "app"} | credentials_of_people.BEARERS
    monkeypatch.setattr(credentials_of_people, "BEARERS", bearers)
    with pytest.raises(ProbeError, match="RevokeToken of refresh token"):
        await PEOPLE(["`RevokeToken` of itself"])


@pytest.mark.parametrize("way", ["initial access token", "password of a person"])
async def test_new_way_needs_words(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(credentials.WORDS, way)
    with pytest.raises(ProbeError, match="no words for"):
        await credentials.what_proves_whom()


async def test_token_that_an_api_key_got_ends_with_it(tmp_path: Path) -> None:
    async with serving(tmp_path, hand_clock()) as server:
        scene = await credentials.equip(server)
        await server.advance(LONG_S - 60)
        request = credentials.kept_request(scene.app.client_id)
        metadata = (("authorization", f"Bearer {scene.held['API key']}"),)
        got = (await server.auth(scene.app.who).IssueToken(request, metadata=metadata)).token
        assert got.expire_time == stamp(NOW + LONG_S)
