"""What kills what of a person, as tests/credentials.py asks it of a service."""

from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from authsvc_client.v1 import clients_pb2, sessions_pb2, users_pb2
from tests.certs import HOUR
from tests.harness import ADMIN, ISSUER, Member, Running, identity, outcome, spiffe
from tests.people import API, NEW_PASSWORD, PASSWORD, People, self_service
from tests.probe import (
    LONG_S,
    TOKEN_S,
    Probe,
    Scene,
    Stages,
    Step,
    Use,
    access_token,
    ask_for_more,
    chores,
    delete_own,
    delete_resources,
    end_grant,
    expired,
    later,
    once,
    refresh_token,
    reuse,
    review,
    revocation,
    rotate_key,
    same,
    taint,
    take_scope,
    update,
)

FIRST: Final = [
    clients_pb2.GRANT_TYPE_PASSWORD,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
]
THIRD: Final = [clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE, clients_pb2.GRANT_TYPE_REFRESH_TOKEN]
READ: Final = "api.read"
OWN_TOKEN_S: Final = 300
"""Life of a token for authsvc itself."""
APP_METADATA: Final[dict[str, Any]] = {
    "client_name": "app",
    "grant_types": FIRST,
    "scopes": ["api.write", READ],
    "first_party": True,
    "tls_client_auth_san_uri": spiffe("first-party"),
}

# --- credentials ---


def people_at(scene: Scene) -> People:
    """The same members, by what tests/people.py can do."""
    app, other, partner = (scene.members[name] for name in ("app", "other", "partner"))
    return People(scene.server, app, other, partner, app)


async def _use_password(scene: Scene) -> str:
    """At `app`, for a token that no resource has a part in."""
    held = scene.held
    request = people_at(scene).login_request(held["name"], held["password"], resources=[ISSUER])
    return await outcome(scene.server.auth(scene.app.who).IssueToken(request))


async def _use_code(scene: Scene) -> str:
    """It stays good where the new password is refused."""
    request = users_pb2.ResetPasswordRequest(code=scene.held["reset code"], new_password="short")
    told = await outcome(scene.server.users(scene.app.who).ResetPassword(request))
    return "OK" if told == "PASSWORD_NOT_ACCEPTED" else told


async def _use_own(scene: Scene) -> str:
    """Who calls is known by then."""
    metadata = self_service(scene.held["token for authsvc"])
    listing = scene.server.users(scene.app.who).ListUsers(
        users_pb2.ListUsersRequest(), metadata=metadata
    )
    told = await outcome(listing)
    return "OK" if told == "INSUFFICIENT_SCOPE" else told


CREDENTIALS: Final[dict[str, Use]] = {
    "password": _use_password,
    "reset code": _use_code,
    "access token": access_token("access token"),
    "token for authsvc": _use_own,
    "refresh token": refresh_token("refresh token"),
    "other session: access token": access_token("other session: access token", "other"),
    "other session: refresh token": refresh_token("other session: refresh token", "other"),
    "third party: lent": access_token("third party: lent", "partner"),
    "third party: of its grant": access_token("third party: of its grant", "partner"),
    "third party: refresh token": refresh_token("third party: refresh token", "partner"),
}
ACCESS_TOKENS: Final = frozenset(
    {"access token", "token for authsvc", "other session: access token"}
    | {"third party: lent", "third party: of its grant"}
)
BEARERS: Final = {
    **dict.fromkeys([name for name in CREDENTIALS if name.startswith("third")], "partner"),
    **dict.fromkeys([name for name in CREDENTIALS if name.startswith("other")], "other"),
    **dict.fromkeys(("token for authsvc", "access token", "refresh token"), "app"),
}
"""Who has which token; what one brings forth comes before it."""


async def equip(server: Running) -> Scene:
    """A user with a session at `app` and one at `other`; a third party got at the first one."""
    await server.resource(API, READ, "api.write", token_lifetime={"seconds": TOKEN_S})
    who = identity("first-party")
    made = await server.register(who, **APP_METADATA)
    await server.approve(made.client.client_id)
    members = {
        "app": Member(who, made.client.client_id),
        "other": await server.member("other-party", READ, grant_types=FIRST, first_party=True),
        "partner": await server.member("third-party", READ, grant_types=THIRD, validates=[API]),
    }
    held = {"name": "ada", "password": PASSWORD}
    scene = Scene(server, members, held, APP_METADATA)
    at, partner = people_at(scene), members["partner"]
    held["registration token"] = made.registration_access_token
    held["user"] = await at.user("ada")
    login = await at.login("ada", scopes=[READ])
    held["root"] = login.access_token
    used = await scene.refresh(login.refresh_token)
    held["access token"], held["refresh token"] = used.access_token, used.refresh_token
    own = await at.exchange(held["root"], by=at.app, resources=[ISSUER])
    held["token for authsvc"] = own.access_token
    elsewhere = await at.login("ada", at=at.other)
    held["other session: access token"] = elsewhere.access_token
    held["other session: refresh token"] = elsewhere.refresh_token
    held["third party: lent"] = (await at.exchange(held["root"])).access_token
    granted = await at.exchange(held["root"], refreshable=True)
    used = await scene.refresh(granted.refresh_token, partner)
    held["third party: of its grant"] = used.access_token
    held["third party: refresh token"] = used.refresh_token
    grants = {grant.client_id: grant for grant in await at.living_grants(held["user"])}
    held["grant of app"] = grants[at.app.client_id].grant_id
    held["grant of partner"] = grants[partner.client_id].grant_id
    held["session"] = grants[at.app.client_id].session_id
    await _make_code(scene)
    return scene


# --- events ---


async def _make_code(scene: Scene) -> str:
    request = users_pb2.CreatePasswordResetCodeRequest(
        user_id=scene.held["user"], lifetime=Duration(seconds=int(LONG_S))
    )
    made = await scene.server.users().CreatePasswordResetCode(request)
    return scene.held.setdefault("reset code", made.code)


async def _revoke_itself(scene: Scene) -> None:
    """A token as its bearer, what is no token as a text; each takes nothing else along."""
    for name in ("password", "reset code"):
        await scene.revoke(scene.held[name])
    living = set(CREDENTIALS)
    for name, bearer in BEARERS.items():
        await scene.revoke(scene.held[name], scene.members[bearer])
        living -= {name}
        same(await PEOPLE.living(scene), living, f"RevokeToken of {name}")


def _user(verb: str) -> Step:
    async def step(scene: Scene) -> None:
        request = getattr(users_pb2, f"{verb}UserRequest")(user_id=scene.held["user"])
        await getattr(scene.server.users(), f"{verb}User")(request)

    return step


async def _create_again(scene: Scene) -> None:
    await people_at(scene).user(scene.held["name"], NEW_PASSWORD)


async def _rename(scene: Scene) -> None:
    scene.held["name"] = "lovelace"
    request = users_pb2.UpdateUserRequest(
        user=users_pb2.User(user_id=scene.held["user"], username="lovelace"),
        update_mask=FieldMask(paths=["username"]),
    )
    await scene.server.users().UpdateUser(request)


async def _set_password(scene: Scene) -> None:
    request = users_pb2.SetPasswordRequest(user_id=scene.held["user"], new_password=NEW_PASSWORD)
    await scene.server.users().SetPassword(request)


def _set_own_password(*, keep: bool) -> Step:
    async def step(scene: Scene) -> None:
        request = users_pb2.SetPasswordRequest(
            current_password=PASSWORD, new_password=NEW_PASSWORD, keep_session=keep
        )
        metadata = self_service(scene.held["token for authsvc"])
        await scene.server.users(scene.app.who).SetPassword(request, metadata=metadata)

    return step


async def _reset_password(scene: Scene) -> None:
    request = users_pb2.ResetPasswordRequest(
        code=scene.held["reset code"], new_password=NEW_PASSWORD
    )
    await scene.server.users(scene.app.who).ResetPassword(request)


async def _end_session(scene: Scene) -> None:
    request = sessions_pb2.EndSessionRequest(session_id=scene.held["session"])
    await people_at(scene).sessions(ADMIN).EndSession(request)


async def _sign_out(scene: Scene) -> None:
    request = sessions_pb2.SignOutEverywhereRequest(user_id=scene.held["user"])
    await people_at(scene).sessions(ADMIN).SignOutEverywhere(request)


async def _create_resource(scene: Scene) -> None:
    await scene.server.resource(API, READ, "api.write")


EVENTS: Final[dict[str, Stages]] = {
    "`DisableUser`": once(_user("Disable")),
    "`DisableUser`, then `EnableUser`": once(_user("Disable"), _user("Enable")),
    "`DeleteUser`": once(_user("Delete")),
    "`DeleteUser`, then `CreateUser` of the same name": once(_user("Delete"), _create_again),
    "`UpdateUser` of the name": once(_rename),
    "`SetPassword` by an administrator": once(_set_password),
    "`SetPassword` by the person": once(_set_own_password(keep=False)),
    "`SetPassword` by the person, with `keep_session`": once(_set_own_password(keep=True)),
    "`CreatePasswordResetCode` once more": once(_make_code),
    "`ResetPassword`": once(_reset_password),
    "`EndSession`": once(_end_session),
    "`RevokeSession`": once(revocation("RevokeSession", session_id="session")),
    "`SignOutEverywhere`": once(_sign_out),
    "`EndGrant` of `app`": once(end_grant("grant of app")),
    "`EndGrant` of the third party": once(end_grant("grant of partner")),
    "`RevokeSubject`": once(revocation("RevokeSubject", subject="user")),
    "`RevokeSubjectClient` with `app`": once(
        revocation("RevokeSubjectClient", subject="user", client_id="app")
    ),
    "`RevokeSubjectClient` with the third party": once(
        revocation("RevokeSubjectClient", subject="user", client_id="partner")
    ),
    "`RevokeClient` of `app`": once(revocation("RevokeClient", client_id="app")),
    "`RevokeClient` of the third party": once(revocation("RevokeClient", client_id="partner")),
    "`RevokeEverything`": once(revocation("RevokeEverything")),
    "`RevokeToken` of itself": once(_revoke_itself),
    "`RevokeToken` of the token at the root of the exchanges": once(
        lambda scene: scene.revoke(scene.held["root"])
    ),
    "`RevokeToken` of the refresh token": once(
        lambda scene: scene.revoke(scene.held["refresh token"])
    ),
    "the refresh token comes again after its successor was used": once(reuse("refresh token")),
    "`ActivateSigningKey` of the next key": once(rotate_key),
    "`TaintSigningKey` of the current key": once(taint),
    "`SuspendClient` of `app`": once(review("Suspend")),
    "`SuspendClient` of `app`, then `ResumeClient`": once(review("Suspend"), review("Resume")),
    "`SuspendClient` of the third party": once(review("Suspend", "partner")),
    "the approval of `app` ends": (("", expired), ("at the next housekeeping", chores)),
    "the approval of `app` ends, then `ApproveClient`": once(expired, chores, review("Approve")),
    "`UpdateClient` that takes a scope from `app`": once(take_scope),
    "`UpdateClient`: `app` is no first party any more": once(
        update("metadata.first_party", metadata={"client_name": "app", "first_party": False})
    ),
    "`UpdateOwnClient`: `app` asks for more": once(ask_for_more),
    "the same, then `RejectClient`": once(ask_for_more, review("Reject")),
    "`DeleteClient` of `app`": once(review("Delete")),
    "`DeleteOwnClient`": once(delete_own),
    "`DeleteClient` of the third party": once(review("Delete", "partner")),
    "`DeleteResource` of the audience": once(delete_resources(API)),
    "`DeleteResource`, then `CreateResource` of the same id": once(
        delete_resources(API), _create_resource
    ),
    "its own end": (("before it", later(OWN_TOKEN_S - 10)), ("", later(LONG_S + HOUR))),
}
PEOPLE: Final = Probe(equip, CREDENTIALS, ACCESS_TOKENS, EVENTS)
