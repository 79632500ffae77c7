"""What kills what of a person: each event and each credential, on every store, and restarted."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from authsvc.config import Grants
from authsvc_client.v1 import revocations_pb2, sessions_pb2, users_pb2
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.harness import ADMIN, ISSUER, Running, build, migrate, outcome, start
from tests.people import (
    CHEAP,
    NEW_PASSWORD,
    PASSWORD,
    People,
    enter,
    self_service,
)
from tests.servers import Postgres

ALIVE, DEAD = True, False


@dataclass
class Held:
    """What a user and its clients hold before the event."""

    user_id: str
    name: str
    own: str
    """Token for authsvc itself, in the first session."""
    access: dict[str, str] = field(default_factory=dict)
    refresh: dict[str, str] = field(default_factory=dict)
    """By who holds them; they rotate as they are looked at."""
    session_id: str = ""
    partner_grant_id: str = ""


Event = Callable[[People, Held], Awaitable[Any]]

FIRST = "the app, first session"
SECOND = "the app, second session"
OTHER = "another first party"
PARTNER = "a third party, by exchange in the first session"
LENT = "a third party, an access token alone"
HOLDERS = (FIRST, SECOND, OTHER, PARTNER, LENT)


async def held_by(at: People, name: str) -> Held:
    """A new user with two sessions at the app, one at another client, and a third party's grant."""
    user_id = await at.user(name)
    first = await at.login(name)
    second = await at.login(name)
    other = await at.login(name, at=at.other)
    own = await at.exchange(first.access_token, by=at.app, resources=[ISSUER])
    held = Held(user_id, name, own.access_token)
    held.access = {
        FIRST: first.access_token,
        SECOND: second.access_token,
        OTHER: other.access_token,
        LENT: (await at.exchange(first.access_token)).access_token,
    }
    granted = await at.exchange(first.access_token, refreshable=True)
    used = await at.refresh(granted.refresh_token, by=at.partner)
    held.access[PARTNER] = used.access_token
    held.refresh = {
        FIRST: first.refresh_token,
        SECOND: second.refresh_token,
        OTHER: other.refresh_token,
        PARTNER: used.refresh_token,
    }
    claims = await at.claims(first.access_token)
    held.session_id = claims.session_id
    held.partner_grant_id = (await at.claims(used.access_token)).grant_id
    assert held.partner_grant_id != claims.grant_id
    return held


async def alive(at: People, held: Held) -> dict[str, bool]:
    """What still is; a refresh token is used, and its successor kept."""
    found: dict[str, bool] = {}
    members = {FIRST: at.app, SECOND: at.app, OTHER: at.other, PARTNER: at.partner}
    for holder in HOLDERS:
        found[f"{holder}: access"] = await at.judged(held.access[holder]) == "OK"
    for holder, token in held.refresh.items():
        try:
            used = await at.refresh(token, by=members[holder])
        except grpc.aio.AioRpcError:
            found[f"{holder}: refresh"] = DEAD
            continue
        held.refresh[holder] = used.refresh_token
        found[f"{holder}: refresh"] = ALIVE
        assert await at.judged(used.access_token) == "OK"
    return found


# --- the events ---


async def nothing(_at: People, _held: Held) -> None:
    """Nothing happens."""


async def disable(at: People, held: Held) -> None:
    await at.user_service().DisableUser(users_pb2.DisableUserRequest(user_id=held.user_id))


async def disable_and_enable(at: People, held: Held) -> None:
    await disable(at, held)
    await at.user_service().EnableUser(users_pb2.EnableUserRequest(user_id=held.user_id))


async def delete(at: People, held: Held) -> None:
    await at.user_service().DeleteUser(users_pb2.DeleteUserRequest(user_id=held.user_id))


async def rename(at: People, held: Held) -> None:
    user = users_pb2.User(user_id=held.user_id, username=f"{held.name}-renamed")
    await at.user_service().UpdateUser(
        build(users_pb2.UpdateUserRequest, user=user, update_mask={"paths": ["username"]})
    )


async def password_by_administrator(at: People, held: Held) -> None:
    request = users_pb2.SetPasswordRequest(user_id=held.user_id, new_password=NEW_PASSWORD)
    await at.user_service().SetPassword(request)


async def password_by_itself(at: People, held: Held, *, keep: bool = False) -> None:
    request = users_pb2.SetPasswordRequest(
        current_password=PASSWORD, new_password=NEW_PASSWORD, keep_session=keep
    )
    await at.user_service(at.app.who).SetPassword(request, metadata=self_service(held.own))


async def password_and_stay(at: People, held: Held) -> None:
    await password_by_itself(at, held, keep=True)


async def password_by_code(at: People, held: Held) -> None:
    made = await at.user_service().CreatePasswordResetCode(
        users_pb2.CreatePasswordResetCodeRequest(user_id=held.user_id)
    )
    request = users_pb2.ResetPasswordRequest(code=made.code, new_password=NEW_PASSWORD)
    await at.user_service(at.app.who).ResetPassword(request)


async def cut_off(at: People, held: Held) -> None:
    await revocations(at).RevokeSubject(revocations_pb2.RevokeSubjectRequest(subject=held.user_id))


async def cut_off_app(at: People, held: Held) -> None:
    await _cut_off_client(at, held, at.app.client_id)


async def cut_off_partner(at: People, held: Held) -> None:
    await _cut_off_client(at, held, at.partner.client_id)


async def _cut_off_client(at: People, held: Held, client_id: str) -> None:
    await revocations(at).RevokeSubjectClient(
        revocations_pb2.RevokeSubjectClientRequest(subject=held.user_id, client_id=client_id)
    )


async def end_session(at: People, held: Held) -> None:
    await at.sessions().EndSession(sessions_pb2.EndSessionRequest(session_id=held.session_id))


async def revoke_session(at: People, held: Held) -> None:
    await revocations(at).RevokeSession(
        revocations_pb2.RevokeSessionRequest(session_id=held.session_id)
    )


async def end_grant(at: People, held: Held) -> None:
    await at.sessions().EndGrant(sessions_pb2.EndGrantRequest(grant_id=held.partner_grant_id))


async def sign_out(at: People, held: Held) -> None:
    await at.sessions().SignOutEverywhere(
        sessions_pb2.SignOutEverywhereRequest(user_id=held.user_id)
    )


def revocations(at: People) -> Any:
    return RevocationServiceStub(at.server.channel(ADMIN))


# --- the table ---

ALL = frozenset(HOLDERS)
SESSION = frozenset({FIRST, PARTNER, LENT})
"""What was issued in the first session."""

EVENTS: dict[Event, tuple[frozenset[str], bool]] = {
    nothing: (frozenset(), True),
    rename: (frozenset(), True),
    disable: (ALL, False),
    disable_and_enable: (ALL, True),
    delete: (ALL, False),
    password_by_administrator: (ALL, False),
    password_by_itself: (ALL, False),
    # What was lent in the session that stays ends with its own few minutes, or with the session.
    password_and_stay: (ALL - {FIRST, LENT}, False),
    password_by_code: (ALL, False),
    cut_off: (ALL, True),
    # What went through the app dies with it, whoever holds it now.
    cut_off_app: (ALL - {OTHER}, True),
    cut_off_partner: (frozenset({PARTNER, LENT}), True),
    end_session: (SESSION, True),
    revoke_session: (SESSION, True),
    end_grant: (frozenset({PARTNER}), True),
    sign_out: (ALL, True),
}
"""Event -> whose credentials die, and whether the old password still lets its user in."""


@pytest.fixture(params=["sqlite", "postgres"])
async def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Starts the server on one database, again and again."""
    url = ""
    if request.param == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        url = await server.database()
        await migrate(url)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Running]:
        running = await start(tmp_path, url=url, grants=Grants(password=True), passwords=CHEAP)
        try:
            yield running
        finally:
            await running.close()

    return opened


async def test_each_event_kills_what_it_should_and_nothing_else(
    scene: Callable[[], Any],
) -> None:
    async with scene() as server:
        at = await enter(server)
        bystander = await held_by(at, "bystander")
        everybody = {event: await held_by(at, event.__name__) for event in EVENTS}
        for event, held in everybody.items():
            await event(at, held)
        await server.app.follow.poll()
        for event, held in everybody.items():
            dead, _ = EVENTS[event]
            assert await alive(at, held) == expected(dead), event.__name__
    async with scene() as server:
        at.server = server
        for event, held in everybody.items():
            dead, lets_in = EVENTS[event]
            assert await alive(at, held) == expected(dead), f"{event.__name__}, restarted"
            name = held.name if event is not rename else f"{held.name}-renamed"
            login = server.auth(at.app.who).IssueToken(at.login_request(name))
            assert (await outcome(login) == "OK") is lets_in, event.__name__
            assert await alive(at, held) == expected(dead), f"{event.__name__}, logged in again"
        assert await alive(at, bystander) == expected(frozenset())


def expected(dead: frozenset[str]) -> dict[str, bool]:
    found = {f"{holder}: access": holder not in dead for holder in HOLDERS}
    return found | {f"{h}: refresh": h not in dead for h in HOLDERS if h != LENT}


async def test_what_lives_is_listed_and_nothing_else(tmp_path: Path) -> None:
    server = await start(tmp_path, grants=Grants(password=True), passwords=CHEAP)
    try:
        at = await enter(server)
        held = await held_by(at, "ada")
        assert len(await at.living_sessions(held.user_id)) == 3
        assert len(await at.living_grants(held.user_id)) == 4
        await end_grant(at, held)
        assert len(await at.living_grants(held.user_id)) == 3
        await end_session(at, held)
        assert len(await at.living_sessions(held.user_id)) == 2
        assert {g.session_id for g in await at.living_grants(held.user_id)} == {
            s.session_id for s in await at.living_sessions(held.user_id)
        }
        assert await outcome(end_session(at, held)) == "SESSION_NOT_FOUND"
        assert await outcome(end_grant(at, held)) == "GRANT_NOT_FOUND"
        await sign_out(at, held)
        assert await at.living_sessions(held.user_id) == []
        assert await at.living_grants(held.user_id) == []
    finally:
        await server.close()
