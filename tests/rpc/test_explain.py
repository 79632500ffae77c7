"""ExplainToken: it says what ValidateToken and RefreshToken say, and why, and changes nothing."""

import itertools
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest

from authsvc.explain import ACCESS_CHECKS, REFRESH_CHECKS
from authsvc.keys.refresh import RefreshKeys
from authsvc.keys.secrets import (
    ACCESS_TOKEN_PREFIX,
    API_KEY_PREFIX,
    CLIENT_SECRET_PREFIX,
    new_secret,
)
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import (
    auth_pb2,
    clients_pb2,
    explain_pb2,
    keys_pb2,
    resources_pb2,
    sessions_pb2,
)
from authsvc_client.v1 import revocations_pb2 as revocations
from authsvc_client.v1.explain_pb2_grpc import ExplainServiceStub
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.clocks import HandClock
from tests.credentials import JWK
from tests.harness import (
    ADMIN,
    ISSUER,
    Member,
    Running,
    build,
    by_hand,
    failure,
    hand_clock,
    read_failure,
    reason,
)
from tests.people import API, People, people

JWT, OPAQUE, JWE, OTHER = (f"https://{name}.test" for name in ("jwt", "opaque", "jwe", "other"))
SCOPES = {JWT: "jwt.read", OPAQUE: "opaque.read", JWE: "jwe.read"}
PASSED, FAILED, NOT_REACHED = 1, 2, 3
ACCESS_TOKEN, REFRESH_TOKEN, API_KEY = 1, 2, 3


@dataclass
class Scene:
    """One token of every form, of the same client, for resources of the same owner."""

    people: People
    shop: Member
    owner: Member
    stranger: Member
    tokens: dict[str, str]
    ids: dict[str, str]
    """Name of a token -> its `jti`."""

    @property
    def server(self) -> Running:
        return self.people.server

    async def explain(
        self, token: str, by: Member | None = None, **asked: Any
    ) -> explain_pb2.ExplainTokenResponse:
        """As this client would be told; as one that may know all without it."""
        request = explain_pb2.ExplainTokenRequest(
            question=auth_pb2.ValidateTokenRequest(token=token, **asked),
            caller_client_id=by.client_id if by is not None else "",
        )
        answer = await ExplainServiceStub(self.server.channel(ADMIN)).ExplainToken(request)
        assert not token or token not in str(answer)
        return answer

    def revocations(self) -> Any:
        return RevocationServiceStub(self.server.channel(ADMIN))

    async def rows(self) -> list[Any]:
        """All that a database holds, but what moves by itself."""
        with closing(sqlite3.connect(self.file)) as connection:
            names = [
                n
                for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            ]
            return [
                (n, connection.execute(f'SELECT * FROM "{n}"').fetchall()) for n in sorted(names)
            ]

    @property
    def file(self) -> Path:
        return self.server.app._settings.state_dir / "authsvc.db"


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with people(tmp_path, clock=hand_clock()) as at:
        server = at.server
        owner = await server.member("books", "validate")
        stranger = await server.member("stranger", "validate")
        forms: dict[str, dict[str, Any]] = {
            JWT: {},
            OPAQUE: {"token_format": resources_pb2.TOKEN_FORMAT_OPAQUE},
            JWE: {
                "token_format": resources_pb2.TOKEN_FORMAT_JWE,
                "encryption_jwk": json.dumps(JWK),
            },
        }
        for resource, form in forms.items():
            await server.resource(resource, SCOPES[resource], owner=owner.client_id, **form)
        await server.resource(OTHER, "other.read", owner=owner.client_id)
        shop = await server.member(
            "shop",
            *SCOPES.values(),
            token_endpoint_auth_methods=[
                clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
                clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
            ],
            tls_client_certificate_bound_access_tokens=False,
        )
        tokens, ids = {}, {}
        for name, resource in {"JWT": JWT, "opaque": OPAQUE, "JWE": JWE}.items():
            issued = await server.token(shop, resources=[resource])
            tokens[name], ids[name] = issued.access_token, issued.jti
        make = clients_pb2.CreateApiKeyRequest(api_key=clients_pb2.ApiKey(scopes=["jwt.read"]))
        made = await server.clients(shop.who).CreateApiKey(make)
        tokens["API key"], ids["API key"] = made.value, made.api_key.api_key_id
        yield Scene(at, shop, owner, stranger, tokens, ids)


def outcomes(answer: explain_pb2.ExplainTokenResponse) -> dict[str, int]:
    return {check.name: check.outcome for check in answer.checks}


def failed(answer: explain_pb2.ExplainTokenResponse) -> list[str]:
    return [check.name for check in answer.checks if check.outcome == FAILED]


def detail(answer: explain_pb2.ExplainTokenResponse, name: str) -> str:
    return next(check.detail for check in answer.checks if check.name == name)


def said(answer: Any) -> tuple[bool, str]:
    """What both services say."""
    return answer.active, Reason(answer.reason).name


QUESTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"audience": JWT},
    {"audience": OTHER},
    {"audience": "https://nobody.test"},
    {"required_scopes": ["jwt.read"]},
    {"required_scopes": ["other.read", "jwt.read"], "audience": JWT},
    {"require_bound": True},
    {"presenter": auth_pb2.Presenter(certificate_thumbprint="x" * 43)},
    {"acr_values": ["gold"]},
    {"max_age": {"seconds": 60}, "required_scopes": ["nothing"]},
    {"required_permissions": ["doc.read"], "audience": JWT},
    {"consistency": auth_pb2.Consistency(strong=auth_pb2.StrongConsistency())},
)
Event = Callable[[Scene], Awaitable[Any]]


async def _taint(scene: Scene) -> None:
    keys = (
        await scene.server.keys().ListSigningKeys(keys_pb2.ListSigningKeysRequest())
    ).signing_keys
    request = keys_pb2.TaintSigningKeyRequest(kid=keys[0].kid, comment="leaked")
    await scene.server.keys().TaintSigningKey(request)


async def _delete_resources(scene: Scene) -> None:
    for resource in SCOPES:
        request = resources_pb2.DeleteResourceRequest(resource_id=resource)
        await scene.server.resources().DeleteResource(request)


def _revoke(name: str, **ids: str) -> Event:
    """A call of RevocationService, for what these name of the shop."""

    async def event(scene: Scene) -> None:
        known = {"shop": scene.shop.client_id}
        request = getattr(revocations, f"{name}Request")(
            comment="stolen", **{field: known[value] for field, value in ids.items()}
        )
        await getattr(scene.revocations(), name)(request)

    return event


async def _revoke_tokens(scene: Scene) -> None:
    for jti in scene.ids.values():
        await scene.server.auth(ADMIN).RevokeToken(auth_pb2.RevokeTokenRequest(jti=jti))


async def _suspend(scene: Scene) -> None:
    await scene.server.suspend(scene.shop.client_id)


async def _later(scene: Scene) -> None:
    await scene.server.advance(340)


async def _nothing(_scene: Scene) -> None:
    """Nothing happens."""


EVENTS: dict[str, tuple[Event, str, str]] = {
    "nothing": (_nothing, "", ""),
    "later": (_later, "", ""),
    "RevokeToken": (_revoke_tokens, "TOKEN_DEAD", "token_mark"),
    "RevokeClient": (_revoke("RevokeClient", client_id="shop"), "CUTOFF_CLIENT", "cutoff"),
    "RevokeSubject": (_revoke("RevokeSubject", subject="shop"), "CUTOFF_SUBJECT", "cutoff"),
    "RevokeSubjectClient": (
        _revoke("RevokeSubjectClient", subject="shop", client_id="shop"),
        "CUTOFF_SUBJECT_CLIENT",
        "cutoff",
    ),
    "RevokeEverything": (_revoke("RevokeEverything"), "CUTOFF_EVERYTHING", "cutoff"),
    "TaintSigningKey": (_taint, "KEY_TAINTED", "key_mark"),
    "DeleteResource": (_delete_resources, "CUTOFF_RESOURCE", "cutoff"),
    "SuspendClient": (_suspend, "CUTOFF_CLIENT", "cutoff"),
}
"""RPC -> the marker that it sets, and the check that fails by it."""
SPARED = {("later", "API key"), ("TaintSigningKey", "opaque"), ("TaintSigningKey", "API key")}
"""What the event does not kill."""
GONE = {("RevokeToken", "API key"), ("DeleteResource", "API key")}
"""The row is deleted, or holds no audience any more: nothing is left to tell the marker by."""


# --- it says what the judges say ---


@pytest.mark.parametrize("event", EVENTS)
async def test_it_says_what_validate_token_says_to_everybody_and_why(
    scene: Scene, event: str
) -> None:
    happens, marker, check = EVENTS[event]
    for token in scene.tokens.values():
        assert (await scene.explain(token)).active
    await happens(scene)
    for form, token in scene.tokens.items():
        await _agrees(scene, token)
        if marker and (event, form) not in SPARED | GONE:
            # Nobody checks the signature of a tainted key any more.
            failing = "key" if (event, form) == ("TaintSigningKey", "JWT") else check
            await _is_told(scene, form, event, marker, failing)


async def _agrees(scene: Scene, token: str) -> None:
    """Whatever is asked, and whoever asks."""
    for asked, asker in itertools.product(QUESTIONS, (None, scene.owner, scene.stranger)):
        who = asker.who if asker is not None else ADMIN
        verdict = await scene.server.verdict(who, token, view=auth_pb2.TOKEN_VIEW_CLAIMS, **asked)
        answer = await scene.explain(token, asker, **asked)
        assert said(answer) == said(verdict), (asked, asker)
        assert [c.name for c in answer.checks] == list(ACCESS_CHECKS)
        assert answer.active == (not failed(answer))
        first = next((c.reason for c in answer.checks if c.outcome == FAILED), 0)
        assert answer.reason == (0 if "entitled" in failed(answer) else first)
        for made in answer.checks:
            assert bool(made.reason) == (made.outcome == FAILED)
            assert bool(made.detail) == (made.outcome != NOT_REACHED)
        if verdict.active:
            assert answer.claims == verdict.claims


async def _is_told(scene: Scene, form: str, event: str, marker: str, check: str) -> None:
    """The marker that killed it, and who set it."""
    answer = await scene.explain(scene.tokens[form])
    assert check in failed(answer)
    [found] = answer.markers
    assert auth_pb2.MarkerKind.Name(found.kind) == f"MARKER_KIND_{marker}"
    assert found.audit_event.action == event
    assert found.audit_event.actor == "spiffe://test.local/admin"
    assert found.revision == found.audit_event.revision <= answer.revision
    assert found.create_time == found.audit_event.create_time
    if event.startswith("Revoke") and event != "RevokeToken":
        assert found.audit_event.comment == "stolen"
    assert answer.claims.jti == scene.ids[form]
    assert answer.claims.revision < found.revision


async def test_it_says_what_a_token_is(scene: Scene) -> None:
    for form, (kind, shape) in {
        "JWT": (ACCESS_TOKEN, "JWT"),
        "opaque": (ACCESS_TOKEN, "OPAQUE"),
        "JWE": (ACCESS_TOKEN, "JWE"),
        "API key": (API_KEY, "UNSPECIFIED"),
    }.items():
        answer = await scene.explain(scene.tokens[form])
        assert (answer.kind, answer.active) == (kind, True)
        assert resources_pb2.TokenFormat.Name(answer.format) == f"TOKEN_FORMAT_{shape}"
        assert set(outcomes(answer).values()) == {PASSED}
        assert answer.claims.subject == scene.shop.client_id
        assert not answer.markers
        assert answer.revision == await scene.server.head()
        assert answer.check_time.seconds > 0


def _signed(token: str, **changes: Any) -> str:
    """A JWT that says something else, under the same header, by a key of no use."""
    header = jwt.get_unverified_header(token)
    payload = jwt.decode(token, options={"verify_signature": False}) | changes
    return jwt.encode(payload, "x" * 32, headers=header | {"alg": "HS256"})


STRANGE: dict[str, tuple[Callable[[Scene], str], int, str]] = {
    "nothing like it": (lambda _: "hunter2", 0, "format"),
    "three parts of nothing": (lambda _: "a.b.c", 0, "format"),
    "too long": (lambda _: "a" * 100_000, 0, "format"),
    "opaque, not stored": (lambda _: new_secret(ACCESS_TOKEN_PREFIX), ACCESS_TOKEN, "format"),
    "opaque, cut short": (lambda s: s.tokens["opaque"][:-1], ACCESS_TOKEN, "format"),
    "API key, not stored": (lambda _: new_secret(API_KEY_PREFIX), API_KEY, "format"),
    "a client secret": (lambda _: new_secret(CLIENT_SECRET_PREFIX), 0, "format"),
    "a foreign JWE": (lambda _: "a.b.c.d.e", 0, "format"),
    "a foreign JWT": (lambda s: _signed(s.tokens["JWT"], iss="https://other.test"), 0, "issuer"),
    "another alg": (lambda s: _signed(s.tokens["JWT"], sub="root"), ACCESS_TOKEN, "key"),
    "forged": (
        lambda s: s.tokens["JWT"].rpartition(".")[0] + "." + "A" * 86,
        ACCESS_TOKEN,
        "signature",
    ),
    "another type": (
        lambda _: jwt.encode({"aud": JWT, "iss": ISSUER}, "x" * 32, headers={"typ": "JWT"}),
        0,
        "type",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
async def test_what_authsvc_did_not_make_is_explained_too(scene: Scene, name: str) -> None:
    make, kind, check = STRANGE[name]
    token = make(scene)
    answer = await scene.explain(token)
    assert said(answer) == said(await scene.server.verdict(ADMIN, token))
    assert (answer.kind, failed(answer)[0]) == (kind, check)
    assert outcomes(answer)["scopes"] == NOT_REACHED
    assert not answer.markers
    hidden = await scene.explain(token, scene.stranger)
    assert said(hidden) == (False, "UNSPECIFIED")


async def test_claims_are_read_of_what_was_forged_and_of_what_is_over(scene: Scene) -> None:
    forged = await scene.explain(_signed(scene.tokens["JWT"], sub="root", exp=2**62))
    assert forged.claims.subject == "root"
    assert outcomes(forged)["signature"] == NOT_REACHED
    await scene.server.advance(303)
    over = await scene.explain(scene.tokens["JWT"])
    assert over.active, "within the leeway"
    await scene.server.advance(30)
    over = await scene.explain(scene.tokens["JWT"])
    assert over.claims.jti == scene.ids["JWT"]
    assert failed(over) == ["expiry"]
    assert re.match(r"exp 2\d{3}-\S+Z is 3[34] s ago, 30 s are", detail(over, "expiry"))


async def test_every_check_after_one_that_fails_is_made_too(scene: Scene) -> None:
    await _revoke_tokens(scene)
    await _suspend(scene)
    asked: dict[str, Any] = {
        "audience": OTHER,
        "required_scopes": ["a", "b"],
        "require_bound": True,
    }
    answer = await scene.explain(scene.tokens["JWT"], **asked)
    assert failed(answer) == ["token_mark", "cutoff", "audience", "proof", "scopes"]
    assert detail(answer, "scopes") == "required a b, has jwt.read"
    kinds = [auth_pb2.MarkerKind.Name(marker.kind) for marker in answer.markers]
    assert kinds == ["MARKER_KIND_TOKEN_DEAD", "MARKER_KIND_CUTOFF_CLIENT"]
    assert [list(marker.ids) for marker in answer.markers] == [
        [scene.ids["JWT"]],
        [scene.shop.client_id],
    ]


async def test_cutoff_that_is_older_than_a_token_does_not_kill_it(scene: Scene) -> None:
    await _revoke("RevokeClient", client_id="shop")(scene)
    token = (await scene.server.token(scene.shop, resources=[JWT])).access_token
    answer = await scene.explain(token)
    assert answer.active
    assert not answer.markers
    await _revoke("RevokeClient", client_id="shop")(scene)
    [marker] = (await scene.explain(token)).markers
    assert len((await scene.explain(scene.tokens["JWT"])).markers) == 2
    assert marker.revision == await scene.server.head()


async def test_api_key_of_a_client_that_may_not_use_it_says_so(scene: Scene) -> None:
    await _suspend(scene)
    answer = await scene.explain(scene.tokens["API key"])
    assert detail(answer, "cutoff") == "its client: CLIENT_SUSPENDED"
    assert answer.claims.revision > 0


async def test_stored_token_that_was_cut_off_keeps_its_own_revision(scene: Scene) -> None:
    """Its row is read anew by a worker that never saw it: all that is left of why is the table."""
    await _revoke("RevokeClient", client_id="shop")(scene)
    answer = await scene.explain(scene.tokens["opaque"])
    assert answer.claims.revision > 0
    marker = answer.markers[-1].revision
    assert (
        detail(answer, "cutoff") == f"rev {answer.claims.revision}, the highest cutoff is {marker}"
    )


async def test_audience_of_its_own_bound_on_staleness(scene: Scene) -> None:
    """ValidateToken refuses to answer; the explanation says that, and the rest."""
    request = build(
        resources_pb2.UpdateResourceRequest,
        resource={"resource_id": JWT, "staleness_max": {"seconds": 5}},
        update_mask={"paths": ["staleness_max"]},
    )
    await scene.server.resources().UpdateResource(request)
    clock = scene.server.clock
    assert isinstance(clock, HandClock)
    async with scene.server.app.follow._lock:
        clock.advance(7)
        refused = await failure(scene.server.verdict(ADMIN, scene.tokens["JWT"]))
        assert refused.reason == "STATE_STALE"
        answer = await scene.explain(scene.tokens["JWT"])
        assert said(answer) == (False, "STATE_STALE")
        assert failed(answer) == ["staleness"]
        assert (await scene.explain(scene.tokens["opaque"])).active
        clock.advance(200)
        assert await reason(scene.explain(scene.tokens["JWT"])) == "STATE_STALE"


async def test_live_permissions_are_compared(scene: Scene) -> None:
    at = scene.people
    ada = await at.user("ada")
    await at.role("reader", "doc.read")
    await at.assign("reader", ada)
    token = (await at.login("ada")).access_token
    asked: dict[str, Any] = {"audience": API, "required_permissions": ["doc.read"]}
    good = await scene.explain(token, at.owner, **asked)
    assert said(good) == said(await at.verdict(token, required_permissions=["doc.read"]))
    assert detail(good, "permissions") == "required doc.read, holds doc.read"
    await at.unassign("reader", ada)
    lost = await scene.explain(token, at.owner, **asked)
    assert said(lost) == (False, "INSUFFICIENT_PERMISSIONS")
    assert failed(lost) == ["permissions"]
    assert detail(lost, "permissions") == "required doc.read, holds none"
    later = await scene.explain(token, at.owner, required_scopes=["x"], **asked)
    assert outcomes(later)["permissions"] == NOT_REACHED
    assert said(later) == (False, "INSUFFICIENT_SCOPE")


async def test_person_whose_session_and_grant_ended(scene: Scene) -> None:
    at = scene.people
    ada = await at.user("ada")
    issued = await at.login("ada")
    [session] = await at.living_sessions(ada)
    before = await scene.explain(issued.access_token)
    assert before.claims.session_id == session.session_id
    end = sessions_pb2.EndSessionRequest(session_id=session.session_id)
    await at.sessions().EndSession(end)
    answer = await scene.explain(issued.access_token)
    assert said(answer) == said(await at.verdict(issued.access_token))
    assert "session_mark" in failed(answer)
    assert {m.audit_event.action for m in answer.markers} == {"EndSession"}
    assert [session.session_id] in [list(m.ids) for m in answer.markers]


# --- how it is asked ---


async def test_question_that_cannot_be_put(scene: Scene) -> None:
    token = scene.tokens["JWT"]
    stub = ExplainServiceStub(scene.server.channel(ADMIN))
    empty = await failure(stub.ExplainToken(explain_pb2.ExplainTokenRequest()))
    assert (empty.reason, empty.fields) == ("FIELD_INVALID", ("question",))
    nobody = explain_pb2.ExplainTokenRequest(
        question=auth_pb2.ValidateTokenRequest(token=token), caller_client_id="nobody"
    )
    assert await reason(stub.ExplainToken(nobody)) == "CLIENT_NOT_FOUND"
    above = auth_pb2.Consistency(at_least=await scene.server.head() + 1)
    assert await reason(scene.explain(token, consistency=above)) == "REVISION_UNKNOWN"
    assert (await scene.explain(token, consistency=auth_pb2.Consistency(at_least=1))).active


async def test_it_changes_nothing(scene: Scene) -> None:
    at = scene.people
    await at.user("ada")
    first = (await at.login("ada")).refresh_token
    await at.refresh((await at.refresh(first)).refresh_token)
    before = await scene.rows()
    for token in (*scene.tokens.values(), first, "hunter2"):
        await scene.explain(token)
    assert await scene.rows() == before


# --- refresh tokens ---


@dataclass
class Refreshed:
    """A grant's refresh tokens, the oldest first; the last one is live."""

    scene: Scene
    user_id: str
    tokens: list[str]

    async def use(self, token: str) -> str:
        """OK, or the reason of RefreshToken."""
        try:
            await self.scene.people.refresh(token)
        except grpc.aio.AioRpcError as error:
            return read_failure(error).reason
        return "OK"


@pytest.fixture
async def grant(scene: Scene) -> Refreshed:
    at = scene.people
    user_id = await at.user("ada")
    tokens = [(await at.login("ada")).refresh_token]
    for _ in range(3):
        tokens.append((await at.refresh(tokens[-1])).refresh_token)
    return Refreshed(scene, user_id, tokens)


async def _end_grant(grant: Refreshed) -> None:
    at = grant.scene.people
    [one] = await at.living_grants(grant.user_id)
    await at.sessions().EndGrant(sessions_pb2.EndGrantRequest(grant_id=one.grant_id))


async def _cut_off(grant: Refreshed) -> None:
    await grant.scene.revocations().RevokeSubject(
        revocations.RevokeSubjectRequest(subject=grant.user_id, comment="gone")
    )


async def _idle(grant: Refreshed) -> None:
    await by_hand(grant.scene.file, 'UPDATE "grant" SET idle_expire_time = 1')


async def _reused(grant: Refreshed) -> None:
    assert await grant.use(grant.tokens[0]) == "REFRESH_TOKEN_REUSED"


async def _keep(_grant: Refreshed) -> None:
    """Nothing happens."""


GRANT_EVENTS: dict[str, tuple[Callable[[Refreshed], Awaitable[None]], str, str, str]] = {
    "nothing": (_keep, "", "", ""),
    "ended": (_end_grant, "grant_mark", "GRANT_DEAD", "EndGrant"),
    "cut off": (_cut_off, "cutoff", "CUTOFF_SUBJECT", "RevokeSubject"),
    "idle": (_idle, "expiry", "", ""),
    "reused": (_reused, "grant_mark", "GRANT_DEAD", "EndReusedGrant"),
}


@pytest.mark.parametrize("age", range(4))
@pytest.mark.parametrize("event", GRANT_EVENTS)
async def test_refresh_token_is_explained_as_its_use_would_end(
    grant: Refreshed, event: str, age: int
) -> None:
    happens, check, marker, action = GRANT_EVENTS[event]
    await happens(grant)
    token = grant.tokens[-1 - age]
    answer = await grant.scene.explain(token, grant.scene.people.app)
    assert answer.kind == REFRESH_TOKEN
    assert [c.name for c in answer.checks] == list(REFRESH_CHECKS)
    assert failed(answer) == [check] * bool(check) + ["generation"] * (age > 1)
    assert answer.claims.subject == grant.user_id
    assert answer.claims.client_id == grant.scene.people.app.client_id
    if marker:
        found = answer.markers[-1]
        assert auth_pb2.MarkerKind.Name(found.kind) == f"MARKER_KIND_{marker}"
        assert found.audit_event.action == action
    else:
        assert not answer.markers
    assert said(answer) == (
        answer.active,
        "UNSPECIFIED" if answer.active else Reason(answer.reason).name,
    )
    used = await grant.use(token)
    assert used == ("OK" if answer.active else Reason(answer.reason).name)


async def test_refresh_token_of_another_client_or_of_nobody(grant: Refreshed) -> None:
    scene, live = grant.scene, grant.tokens[-1]
    other = await scene.explain(live, scene.people.other)
    assert (said(other), failed(other)) == ((False, "INVALID_GRANT"), ["entitled"])
    forged = live[:-1] + ("A" if live[-1] != "A" else "Q")
    signature = await scene.explain(forged)
    assert (said(signature), failed(signature)) == ((False, "INVALID_GRANT"), ["signature"])
    assert signature.kind == REFRESH_TOKEN
    assert not signature.HasField("claims")
    cut = await scene.explain(live[:-1])
    assert (said(cut), failed(cut)) == ((False, "INVALID_GRANT"), ["format"])
    keys: RefreshKeys = scene.server.app._prepared.refresh_keys
    unknown = await scene.explain(keys.mint(b"\0" * 16, 1))
    assert (said(unknown), failed(unknown)) == ((False, "INVALID_GRANT"), ["grant"])
    assert outcomes(unknown)["generation"] == NOT_REACHED
    assert (await scene.explain(live)).active, "nobody used it"
