"""The password grant from outside: who may use it, and what comes of it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from authsvc.config import Grants
from authsvc_client.v1 import auth_pb2, clients_pb2, users_pb2
from authsvc_client.v1.clients_pb2 import GRANT_TYPE_PASSWORD
from tests.harness import ISSUER, failure, outcome, reason
from tests.people import (
    API,
    NEW_PASSWORD,
    PASSWORD,
    People,
    people,
    self_service,
)


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as scene:
        yield scene


async def test_a_login_opens_a_session_and_a_grant(at: People) -> None:
    ada = await at.user("Ada")
    token = await at.login("ada")  # without regard to case
    claims = await at.claims(token.access_token)
    assert (claims.subject, claims.client_id) == (ada, at.app.client_id)
    assert set(claims.scopes) == {"api.read", "api.write"}
    assert list(claims.audiences) == [API]
    assert (claims.acr, list(claims.amr)) == ("urn:authsvc:acr:1fa", ["pwd"])
    assert claims.auth_time == claims.issue_time
    [session] = await at.living_sessions(ada)
    [grant] = await at.living_grants(ada)
    assert claims.session_id == session.session_id == grant.session_id
    assert claims.grant_id == grant.grant_id
    assert (session.user_id, grant.subject, grant.client_id) == (ada, ada, at.app.client_id)
    assert (session.address, grant.address) == ("127.0.0.1", "127.0.0.1")
    assert (session.acr, list(session.amr)) == (claims.acr, list(claims.amr))
    assert session.expire_time == grant.expire_time
    again = await at.refresh(token.refresh_token)
    renewed = await at.claims(again.access_token)
    kept = ("subject", "session_id", "grant_id", "acr", "auth_time")
    assert all(getattr(renewed, name) == getattr(claims, name) for name in kept)


async def test_without_a_refresh_token_all_ends_with_the_access_token(at: People) -> None:
    ada = await at.user("ada")
    brief = await at.server.member(
        "brief",
        "api.read",
        grant_types=[GRANT_TYPE_PASSWORD],
        first_party=True,
        tls_client_certificate_bound_access_tokens=False,
    )
    token = await at.login("ada", at=brief)
    assert token.refresh_token == ""
    assert await at.judged(token.access_token) == "OK"
    [session] = await at.living_sessions(ada)
    assert session.expire_time.seconds == token.expire_time.seconds


async def test_it_is_off_by_default(tmp_path: Path) -> None:
    async with people(tmp_path, grants=Grants()) as scene:
        await scene.user("ada")
        auth = scene.server.auth(scene.app.who)
        found = await failure(auth.IssueToken(scene.login_request("ada")))
        assert (found.code, found.reason) == ("PERMISSION_DENIED", "GRANT_TYPE_NOT_ALLOWED")
        assert "grants.password" in found.text


async def test_a_third_party_is_refused_whatever_it_registered_for(at: People) -> None:
    await at.user("ada")
    third = await at.server.member("third", "api.read", grant_types=[GRANT_TYPE_PASSWORD])
    request = at.login_request("ada", at=third)
    assert await reason(at.server.auth(third.who).IssueToken(request)) == "GRANT_TYPE_NOT_ALLOWED"
    request = at.login_request("ada", at=at.partner)
    partner = at.server.auth(at.partner.who)
    assert await reason(partner.IssueToken(request)) == "GRANT_TYPE_NOT_ALLOWED"


async def test_client_and_person_are_both_asked(at: People) -> None:
    await at.user("ada")
    request = at.login_request("ada")
    thief = at.server.auth(at.partner.who)
    assert await reason(thief.IssueToken(request)) == "CLIENT_AUTHENTICATION_FAILED"
    wrong = at.login_request("ada", "wrong")
    assert await reason(at.server.auth(at.app.who).IssueToken(wrong)) == "INVALID_GRANT"
    await at.server.suspend(at.app.client_id)
    assert await reason(at.server.auth(at.app.who).IssueToken(request)) == "CLIENT_SUSPENDED"


@pytest.mark.parametrize("username", ["nobody", "disabled", "bare", "ada"])
async def test_who_is_not_let_in_learns_nothing(at: People, username: str) -> None:
    """Unknown, disabled with its right password, without a password, with a wrong one."""
    await at.user("ada")
    await at.user("bare", "")
    disabled = await at.user("disabled")
    await at.user_service().DisableUser(users_pb2.DisableUserRequest(user_id=disabled))
    tried = PASSWORD if username != "ada" else "wrong"
    request = at.login_request(username, tried)
    found = await failure(at.server.auth(at.app.who).IssueToken(request))
    assert (found.code, found.reason) == ("UNAUTHENTICATED", "INVALID_GRANT")
    assert found.text == "the grant is not good"
    assert found.metadata == {}


async def test_no_scope_of_authsvc_itself_reaches_a_person(at: People) -> None:
    await at.user("ada")
    console = await at.server.member(
        "console",
        "admin",
        "validate",
        "api.read",
        grant_types=[GRANT_TYPE_PASSWORD],
        first_party=True,
        tls_client_certificate_bound_access_tokens=False,
    )
    auth = at.server.auth(console.who)
    request = at.login_request("ada", at=console, scopes=["admin"])
    assert await reason(auth.IssueToken(request)) == "SCOPE_NOT_ALLOWED"
    token = await at.login("ada", at=console, resources=[ISSUER])
    assert list(token.audiences) == [ISSUER]
    assert list(token.scopes) == []
    listing = at.user_service(at.app.who).ListUsers(
        users_pb2.ListUsersRequest(), metadata=self_service(token.access_token)
    )
    assert await reason(listing) == "INSUFFICIENT_SCOPE"


async def test_a_person_for_itself_is_not_its_client(at: People) -> None:
    """The API keys of the client are not the user's to list, nor its tokens to revoke."""
    await at.user("ada")
    token = await at.login("ada", resources=[ISSUER])
    metadata = self_service(token.access_token)
    clients = at.server.clients(at.app.who)
    listing = clients.ListApiKeys(
        clients_pb2.ListApiKeysRequest(client_id=at.app.client_id), metadata=metadata
    )
    assert await outcome(listing) in ("CLIENT_NOT_FOUND", "INSUFFICIENT_SCOPE")
    victim = await at.login("ada")
    revoking = at.server.auth(at.app.who).RevokeToken(
        auth_pb2.RevokeTokenRequest(token=victim.access_token), metadata=metadata
    )
    assert await outcome(revoking) == "TOKEN_NOT_OWNED"
    assert await at.judged(victim.access_token) == "OK"


async def test_a_person_changes_its_own_password(at: People) -> None:
    ada = await at.user("ada")
    bob = await at.user("bob")
    token = await at.login("ada", resources=[ISSUER])
    service, metadata = at.user_service(at.app.who), self_service(token.access_token)

    def asked(**fields: Any) -> Any:
        request = users_pb2.SetPasswordRequest(new_password=NEW_PASSWORD, **fields)
        return service.SetPassword(request, metadata=metadata)

    assert await reason(asked(current_password="wrong")) == "INVALID_GRANT"
    assert await outcome(asked(current_password=PASSWORD, user_id=bob)) != "OK"
    assert await outcome(asked(current_password=PASSWORD, user_id=ada, keep_session=True)) == "OK"
    assert await outcome(at.server.auth(at.app.who).IssueToken(at.login_request("ada"))) != "OK"
    await at.login("ada", NEW_PASSWORD)
    again = await at.refresh(token.refresh_token)  # its own session lives on
    assert list(again.audiences) == [ISSUER]
