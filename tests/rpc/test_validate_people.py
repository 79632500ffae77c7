"""ValidateToken of a person's token: live permissions, and how strongly it authenticated."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from authsvc_client.v1 import auth_pb2, resources_pb2, roles_pb2, users_pb2
from authsvc_client.v1.clients_pb2 import GRANT_TYPE_CLIENT_CREDENTIALS
from tests.clocks import HandClock
from tests.harness import build, failure, hand_clock, issue_request, reason
from tests.people import API, People, people

FULL = auth_pb2.TOKEN_VIEW_FULL
ACR = "urn:authsvc:acr:1fa"
OTHER = "https://other.test"


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path, clock=hand_clock()) as scene:
        await scene.role("reader", "doc.read", "doc.list")
        await scene.role("writer", "doc.write")
        yield scene


async def permissions(at: People, token: str, **asked: Any) -> list[str]:
    verdict = await at.verdict(token, view=FULL, **asked)
    assert verdict.active
    assert verdict.claims.subject
    return list(verdict.permissions)


async def test_permissions_are_those_of_now(at: People) -> None:
    ada = await at.user("ada")
    token = (await at.login("ada")).access_token
    assert await permissions(at, token) == []
    await at.assign("reader", ada)
    assert await permissions(at, token) == ["doc.list", "doc.read"]
    await at.assign("writer", ada, API)
    assert await permissions(at, token) == ["doc.list", "doc.read", "doc.write"]
    await at.unassign("reader", ada)
    assert await permissions(at, token) == ["doc.write"]
    role = roles_pb2.Role(role_id="writer")
    await at.roles().UpdateRole(
        build(roles_pb2.UpdateRoleRequest, role=role, update_mask={"paths": ["permissions"]})
    )
    assert await permissions(at, token) == []


async def test_required_permissions_must_all_be_held(at: People) -> None:
    ada = await at.user("ada")
    await at.assign("reader", ada)
    token = (await at.login("ada")).access_token
    assert await at.judged(token, required_permissions=["doc.read"]) == "OK"
    wanted = ["doc.read", "doc.write", "doc.burn"]
    refused = await at.verdict(token, required_permissions=wanted, view=FULL)
    assert not refused.active
    assert refused.reason == refused.reason.__class__(84)  # INSUFFICIENT_PERMISSIONS
    assert list(refused.missing_permissions) == ["doc.burn", "doc.write"]
    assert not refused.permissions
    assert not refused.HasField("claims")
    brief = await at.verdict(token, required_permissions=["doc.read"])
    assert brief.active
    assert not brief.permissions


async def test_a_client_holds_roles_for_itself_only(at: People) -> None:
    ada = await at.user("ada")
    held = roles_pb2.RoleAssignment(role_id="writer", client_id=at.partner.client_id)
    await at.roles().AssignRole(roles_pb2.AssignRoleRequest(role_assignment=held))
    own = await at.server.token(at.partner)
    assert await permissions(at, own.access_token) == ["doc.write"]
    lent = await at.exchange((await at.login("ada")).access_token)
    assert await permissions(at, lent.access_token) == []
    await at.assign("reader", ada)
    assert await permissions(at, lent.access_token) == ["doc.list", "doc.read"]


async def test_a_limit_holds_a_role_to_one_resource(at: People) -> None:
    ada = await at.user("ada")
    await at.server.resource(OTHER, "other.read", owner=at.owner.client_id)
    await at.assign("reader", ada, OTHER)  # which has none of the role's permissions
    token = (await at.login("ada")).access_token
    assert await permissions(at, token) == []
    assert await at.judged(token, required_permissions=["doc.read"]) != "OK"


async def test_which_audience_is_meant_must_be_clear(at: People) -> None:
    ada = await at.user("ada")
    await at.server.resource(OTHER, "other.read", owner=at.owner.client_id)
    both = await at.server.member(
        "both",
        "api.read",
        "other.read",
        grant_types=[GRANT_TYPE_CLIENT_CREDENTIALS],
        tls_client_certificate_bound_access_tokens=False,
    )
    token = (await at.server.token(both, resources=[API, OTHER])).access_token
    ask = at.server.auth(at.owner.who).ValidateToken
    for more in ({"view": FULL}, {"required_permissions": ["doc.read"]}):
        request = auth_pb2.ValidateTokenRequest(token=token, **more)
        found = await failure(ask(request))
        assert (found.reason, found.fields) == ("FIELD_INVALID", ("audience",))
    assert (await ask(auth_pb2.ValidateTokenRequest(token=token))).active
    await at.assign("reader", ada)
    single = (await at.login("ada")).access_token
    answer = await ask(auth_pb2.ValidateTokenRequest(token=single, view=FULL))
    assert list(answer.permissions) == ["doc.list", "doc.read"]


async def test_who_may_not_validate_learns_no_permission(at: People) -> None:
    ada = await at.user("ada")
    await at.assign("reader", ada)
    token = (await at.login("ada")).access_token
    stranger = await at.server.member("stranger", "validate")
    for asked in ({"view": FULL}, {"required_permissions": ["x"]}, {"acr_values": ["gold"]}):
        request = auth_pb2.ValidateTokenRequest(token=token, audience=API, **asked)
        answer = await at.server.auth(stranger.who).ValidateToken(request)
        assert answer == auth_pb2.ValidateTokenResponse()


async def test_at_least_the_revision_of_an_assignment_shows_it(at: People) -> None:
    ada = await at.user("ada")
    token = (await at.login("ada")).access_token
    for _ in range(10):
        revision = await at.assign("reader", ada)
        asked = auth_pb2.Consistency(at_least=revision)
        assert await permissions(at, token, consistency=asked) == ["doc.list", "doc.read"]
        revision = await at.unassign("reader", ada)
        asked = auth_pb2.Consistency(at_least=revision)
        assert await permissions(at, token, consistency=asked) == []


# --- how strongly, and how long ago (RFC 9470) ---


async def test_an_authentication_that_is_too_weak_is_told_how_to_step_up(at: People) -> None:
    await at.user("ada")
    token = (await at.login("ada")).access_token
    assert await at.judged(token, acr_values=["gold", ACR]) == "OK"
    found = await at.verdict(token, acr_values=["gold", "silver"], view=FULL)
    assert not found.active
    assert await at.judged(token, acr_values=["gold"]) == "INSUFFICIENT_USER_AUTHENTICATION"
    challenge = found.step_up_challenge
    assert list(challenge.acr_values) == ["gold", "silver"]
    assert not challenge.HasField("max_age")
    assert challenge.www_authenticate == (
        'Bearer error="insufficient_user_authentication",'
        ' error_description="a stronger or more recent authentication is needed",'
        ' acr_values="gold silver"'
    )
    assert not found.HasField("claims")


async def test_an_authentication_that_is_too_old_is_told_so(at: People) -> None:
    await at.user("ada")
    token = (await at.login("ada")).access_token
    clock = at.server.clock
    assert isinstance(clock, HandClock)
    limit = {"max_age": {"seconds": 60}}
    fresh = await at.verdict(token, **limit)
    assert fresh.active
    await at.server.advance(59)
    late = await at.verdict(token, **limit)
    assert late.active
    assert late.reusable_until.seconds <= late.check_time.seconds + 1
    await at.server.advance(2)
    assert await at.judged(token, **limit) == "INSUFFICIENT_USER_AUTHENTICATION"
    assert await at.judged(token) == "OK"
    found = await at.verdict(token, acr_values=[ACR], **limit)
    assert found.step_up_challenge.max_age.seconds == 60
    assert found.step_up_challenge.www_authenticate.endswith(f'acr_values="{ACR}", max_age="60"')


async def test_a_client_never_authenticated_as_a_person(at: People) -> None:
    token = (await at.server.token(at.partner)).access_token
    insufficient = "INSUFFICIENT_USER_AUTHENTICATION"
    assert await at.judged(token, max_age={"seconds": 3600}) == insufficient
    assert await at.judged(token, acr_values=[ACR]) == insufficient


@pytest.mark.parametrize("value", ["a b", 'a"b', "a\\b", "a\nb", "ä", ""])
async def test_an_acr_value_that_cannot_stand_in_a_header_is_refused(
    at: People, value: str
) -> None:
    call = at.server.auth(at.owner.who).ValidateToken(
        auth_pb2.ValidateTokenRequest(token="x", acr_values=[value])
    )
    assert await reason(call) == "FIELD_INVALID"


# --- the whole of access verification in one call ---


async def test_one_call_looks_at_token_client_and_user(at: People) -> None:
    ada = await at.user("ada")
    await at.assign("reader", ada)
    asked: dict[str, Any] = {"required_permissions": ["doc.read"], "view": FULL}
    token = (await at.login("ada")).access_token
    assert await at.judged(token, **asked) == "OK"
    await at.user_service().DisableUser(users_pb2.DisableUserRequest(user_id=ada))
    assert await at.judged(token, **asked) == "TOKEN_CUT_OFF"
    await at.user_service().EnableUser(users_pb2.EnableUserRequest(user_id=ada))
    assert await at.judged(token, **asked) == "TOKEN_CUT_OFF"  # nothing is revived
    again = (await at.login("ada")).access_token
    assert await at.judged(again, **asked) == "OK"
    await at.server.suspend(at.app.client_id)
    assert await at.judged(again, **asked) == "TOKEN_CUT_OFF"


# --- permissions that a resource asks to have in its tokens ---


async def test_a_resource_may_have_permissions_frozen_into_its_tokens(at: People) -> None:
    ada = await at.user("ada")
    revision = await at.assign("reader", ada)
    plain = (await at.login("ada")).access_token
    assert not (await at.claims(plain)).permissions
    await at.server.resources().UpdateResource(
        build(
            resources_pb2.UpdateResourceRequest,
            resource=resources_pb2.Resource(resource_id=API, freeze_permissions=True),
            update_mask={"paths": ["freeze_permissions"]},
        )
    )
    token = (await at.login("ada")).access_token
    claims = await at.claims(token)
    assert list(claims.permissions) == ["doc.list", "doc.read"]
    assert claims.permissions_revision >= revision
    await at.unassign("reader", ada)
    verdict = await at.verdict(token, view=FULL)
    assert list(verdict.claims.permissions) == ["doc.list", "doc.read"]
    assert list(verdict.permissions) == []  # the live ones, whatever the token says
    assert await at.judged(token, required_permissions=["doc.read"]) == "INSUFFICIENT_PERMISSIONS"


async def test_a_resource_that_freezes_permissions_stands_alone(at: People) -> None:
    await at.server.resource(OTHER, "other.read", freeze_permissions=True)
    both = await at.server.member("both", "api.read", "other.read")
    auth = at.server.auth(both.who)
    request = issue_request(both.client_id, resources=[API, OTHER])
    assert await reason(auth.IssueToken(request)) == "INVALID_TARGET"


async def test_permissions_that_do_not_fit_into_a_token_are_not_cut(at: People) -> None:
    ada = await at.user("ada")
    await at.role("wide", *(f"p{number:03d}.{'x' * 110}" for number in range(100)))
    await at.server.resources().UpdateResource(
        build(
            resources_pb2.UpdateResourceRequest,
            resource=resources_pb2.Resource(resource_id=API, freeze_permissions=True),
            update_mask={"paths": ["freeze_permissions"]},
        )
    )
    await at.assign("wide", ada)
    call = at.server.auth(at.app.who).IssueToken(at.login_request("ada"))
    assert await reason(call) == "INVALID_TARGET"
    assert await at.living_sessions(ada) == []
