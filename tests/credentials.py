"""What proves whom and what kills what, found by asking a server: the tables of the documents.

`python -m tests.credentials --write` brings docs/credentials.md up to date.
"""

import asyncio
import base64
import json
import logging
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from authsvc.config import Grants, Registration
from authsvc.keys.secrets import digest
from authsvc.model import AuthMethod
from authsvc_client.core.markers import LEEWAY_S, MARKER_LIFETIME_S
from authsvc_client.v1 import auth_pb2, clients_pb2, keys_pb2, resources_pb2, sessions_pb2
from authsvc_client.v1 import revocations_pb2 as pb
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub
from tests.certs import HOUR, Issued
from tests.clocks import HandClock
from tests.harness import (
    ADMIN,
    ISSUER,
    NOW,
    Member,
    Running,
    connect,
    hand_clock,
    identity,
    issue_request,
    outcome,
    read_failure,
    running,
    spiffe,
)

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "credentials.md"

ACCESS: Final = "urn:ietf:params:oauth:token-type:access_token"
REFRESH: Final = "urn:ietf:params:oauth:token-type:refresh_token"
GRANTS: Final = [
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
]
# JWT, OPAQUE and JWE go where a resource is deleted; a client logs in for KEPT.
JWT, OPAQUE, JWE, KEPT = (f"https://{name}.test" for name in ("jwt", "opaque", "jwe", "kept"))
SCOPES: Final = {JWT: "jwt.read", OPAQUE: "opaque.read", JWE: "jwe.read", KEPT: "kept.read"}
AT_ONCE: Final = 8
"""Servers that are asked at the same time: to stop one is mostly waiting."""

KEY: Final = ec.generate_private_key(ec.SECP256R1())
_to_jwk = jwt.algorithms.ECAlgorithm.to_jwk
JWK: Final[dict[str, str]] = _to_jwk(KEY.public_key(), as_dict=True)
JWKS: Final = json.dumps({"keys": [JWK | {"kid": "k", "alg": "ES256", "use": "sig"}]})
_jtis = iter(range(10**9))

Table: TypeAlias = dict[str, dict[str, str]]
"""Row -> column -> cell."""


class ProbeError(AssertionError):
    """An answer that no table can tell: neither yes nor a refusal that says why."""


def assertion(client_id: str, now: float) -> str:
    """private_key_jwt, made anew: each is good once."""
    claims = {"iss": client_id, "sub": client_id, "aud": ISSUER, "exp": int(now) + 300}
    claims["jti"] = f"jti-{next(_jtis)}"
    return jwt.encode(claims, KEY, algorithm="ES256", headers={"kid": "k"})


def stamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds))


def kept_request(client_id: str, **more: Any) -> auth_pb2.IssueTokenRequest:
    """Asks for a token that no event but the client's own takes away."""
    return issue_request(client_id, scopes=[SCOPES[KEPT]], **more)


def exchange_request(client_id: str, subject: str, wanted: str = ACCESS) -> Any:
    return auth_pb2.IssueTokenRequest(
        token_exchange=auth_pb2.TokenExchangeGrant(
            subject_token=subject, subject_token_type=ACCESS, requested_token_type=wanted
        ),
        client_id=client_id,
        resources=[JWT],
    )


# --- what kills what ---

REFUSALS: Final = {
    *("TOKEN_REVOKED", "GRANT_REVOKED", "SESSION_ENDED", "TOKEN_KEY_TAINTED", "TOKEN_CUT_OFF"),
    *("TOKEN_EXPIRED", "TOKEN_MALFORMED", "TOKEN_KEY_UNKNOWN"),
    *("CLIENT_AUTHENTICATION_FAILED", "PEER_CERTIFICATE_EXPIRED"),
    *("CLIENT_PENDING", "CLIENT_REJECTED", "CLIENT_EXPIRED", "CLIENT_SUSPENDED"),
    *("INVALID_GRANT", "REFRESH_TOKEN_REUSED", "REGISTRATION_TOKEN_INVALID"),
}
"""How a dead credential is refused; every other answer is a failure of the probe."""
DIES, LIVES = "**dies**", "lives"
APP_METADATA: Final[dict[str, Any]] = {
    "client_name": "app",
    "grant_types": GRANTS,
    "scopes": list(SCOPES.values()),
    "jwks": JWKS,
    "tls_client_auth_san_uri": spiffe("app"),
    "token_endpoint_auth_methods": [
        clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST,
        clients_pb2.CLIENT_AUTH_METHOD_PRIVATE_KEY_JWT,
        clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
        clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
    ],
}
# The ends of what has one: after the lifetime of markers, before that of the other certificates.
TOKEN_S, LONG_S, GRANT_S = 3600, 7 * HOUR, 7.5 * HOUR
CERTIFICATE_S, PENDING_S, SOON_S = 8 * HOUR, 4 * HOUR, 600.0


@dataclass
class Scene:
    """`app` holds one credential of each kind; `orders` acts for it by an exchanged token."""

    server: Running
    app: Member
    orders: Member
    held: dict[str, str]
    """By name; also ids, and `root`, which the exchanged token and the grant come from."""

    @property
    def now(self) -> float:
        return self.server.clock.wall()

    async def admin(self, method: str, **fields: Any) -> Any:
        """A call of RevocationService, by an administrator."""
        stub = RevocationServiceStub(self.server.channel(ADMIN))
        return await getattr(stub, method)(getattr(pb, f"{method}Request")(**fields))

    async def refresh(self, token: str) -> auth_pb2.IssuedToken:
        request = auth_pb2.RefreshTokenRequest(refresh_token=token, client_id=self.app.client_id)
        return (await self.server.auth(self.app.who).RefreshToken(request)).token

    async def revoke(self, token: str, by: Member | None = None) -> None:
        by = by or self.app
        request = auth_pb2.RevokeTokenRequest(token=token, client_id=by.client_id)
        await self.server.auth(by.who).RevokeToken(request)


Use: TypeAlias = Callable[[Scene], Awaitable[str]]
"""Uses a credential: OK, or why not."""


def _token(name: str, bearer: str = "app") -> Use:
    async def use(scene: Scene) -> str:
        presenter: Member = getattr(scene, bearer)
        return await scene.server.judged(ADMIN, scene.held[name], of=presenter.who)

    return use


async def _use_refresh(scene: Scene) -> str:
    async def use() -> None:
        scene.held["refresh token"] = (
            await scene.refresh(scene.held["refresh token"])
        ).refresh_token

    return await outcome(use())


async def _use_api_key(scene: Scene) -> str:
    """As a token that somebody validates, and to authenticate its client: both or neither."""
    value = scene.held["API key"]
    metadata = (("authorization", f"Bearer {value}"),)
    stub = scene.server.auth(scene.orders.who)
    asked = await outcome(stub.IssueToken(kept_request(scene.app.client_id), metadata=metadata))
    judged = await scene.server.judged(ADMIN, value)
    if (asked == "OK") is not (judged == "OK"):
        raise ProbeError(f"API key: {asked}, but {judged}")
    return judged


def _login(credential: Callable[[Scene], Mapping[str, str]], over: str = "orders") -> Use:
    """To authenticate `app`, over the connection of whom."""

    async def use(scene: Scene) -> str:
        request = kept_request(scene.app.client_id, **credential(scene))
        connected: Member = getattr(scene, over)
        return await outcome(scene.server.auth(connected.who).IssueToken(request))

    return use


async def _use_registration(scene: Scene) -> str:
    token = scene.held["registration token"]
    request = clients_pb2.GetOwnClientRequest(registration_access_token=token)
    return await outcome(scene.server.clients(scene.orders.who).GetOwnClient(request))


async def _use_initial(scene: Scene) -> str:
    request = auth_pb2.RegisterClientRequest(
        metadata=clients_pb2.ClientMetadata(client_name="made"),
        initial_access_token=scene.held["initial token"],
    )
    return await outcome(scene.server.auth(scene.orders.who).RegisterClient(request))


CREDENTIALS: Final[dict[str, Use]] = {
    "JWT": _token("JWT"),
    "opaque": _token("opaque"),
    "JWE": _token("JWE"),
    "exchanged": _token("exchanged", "orders"),
    "of the grant": _token("of the grant"),
    "of the API key": _token("of the API key"),
    "refresh token": _use_refresh,
    "API key": _use_api_key,
    "client secret": _login(lambda scene: {"secret": scene.held["client secret"]}),
    "private key": _login(lambda scene: {"assertion": assertion(scene.app.client_id, scene.now)}),
    "certificate": _login(lambda _scene: {}, "app"),
    "registration token": _use_registration,
    "initial token": _use_initial,
}
ACCESS_TOKENS: Final = ("JWT", "opaque", "JWE", "exchanged", "of the grant", "of the API key")
"""They are over before a marker is forgotten."""


async def create_resources(server: Running, *resources: str) -> None:
    """Resources of the names above, each with its form of tokens."""
    formats: dict[str, dict[str, Any]] = {
        OPAQUE: {"token_format": resources_pb2.TOKEN_FORMAT_OPAQUE},
        JWE: {"token_format": resources_pb2.TOKEN_FORMAT_JWE, "encryption_jwk": json.dumps(JWK)},
    }
    for resource in resources:
        more = {"token_lifetime": {"seconds": TOKEN_S}} | formats.get(resource, {})
        await server.resource(resource, SCOPES[resource], **more)


async def equip(server: Running) -> Scene:
    """Makes everybody, and gives them everything."""
    await create_resources(server, *SCOPES)
    orders = await server.member("orders", SCOPES[JWT], grant_types=GRANTS, validates=[JWT])
    who = identity("app", span=(NOW - HOUR, NOW + CERTIFICATE_S))
    made = await server.register(who, **APP_METADATA)
    app = Member(who, made.client.client_id, made.client_secret)
    await server.approve(app.client_id)
    held = {"client secret": made.client_secret}
    held["registration token"] = made.registration_access_token
    for name, resource in {"JWT": JWT, "opaque": OPAQUE, "JWE": JWE}.items():
        held[name] = (await server.token(app, resources=[resource])).access_token
    # A login session comes with people: this one is signed into the root token by hand.
    root = (await server.token(app, resources=[JWT])).access_token
    claims = jwt.decode(root, options={"verify_signature": False})
    held["session"] = claims["sid"] = "ab" * 16
    held["root"] = server.app._ring.signer.sign(claims)
    scene = Scene(server, app, orders, held)
    request = exchange_request(orders.client_id, held["root"])
    held["exchanged"] = (await server.auth(orders.who).IssueToken(request)).token.access_token
    request = exchange_request(app.client_id, held["root"], REFRESH)
    opened = (await server.auth(app.who).IssueToken(request)).token.refresh_token
    used = await scene.refresh(opened)
    held["refresh token"], held["of the grant"] = used.refresh_token, used.access_token
    said = await server.verdict(ADMIN, used.access_token, of=who, view=auth_pb2.TOKEN_VIEW_CLAIMS)
    held["grant"] = said.claims.grant_id
    key = clients_pb2.ApiKey(scopes=[SCOPES[JWT], SCOPES[KEPT]], expire_time=stamp(NOW + LONG_S))
    created = await server.clients(who).CreateApiKey(clients_pb2.CreateApiKeyRequest(api_key=key))
    held["API key"], held["API key id"] = created.value, created.api_key.api_key_id
    got = await server.auth(who).IssueToken(
        issue_request(app.client_id, scopes=[SCOPES[JWT]]),
        metadata=(("authorization", f"Bearer {created.value}"),),
    )
    held["of the API key"] = got.token.access_token
    initial = clients_pb2.InitialAccessToken(uses_left=100, expire_time=stamp(NOW + LONG_S))
    answer = await server.clients().CreateInitialAccessToken(
        clients_pb2.CreateInitialAccessTokenRequest(initial_access_token=initial)
    )
    held["initial token"] = answer.value
    held["initial token id"] = answer.initial_access_token.initial_access_token_id
    return scene


# --- the events ---

Step: TypeAlias = Callable[[Scene], Awaitable[Any]]


async def _revoke_itself(scene: Scene) -> None:
    """Whatever it is, as a text; last what takes its access tokens along."""
    last = {"of the grant": "refresh token", "of the API key": "API key"}
    for token, origin in last.items():
        await scene.revoke(scene.held[token])
        living = [name for name in (token, origin) if await _is_alive(scene, name)]
        if living != [origin]:
            raise ProbeError(f"RevokeToken of {token}: then {living}")
    await scene.revoke(scene.held["exchanged"], scene.orders)
    texts = ("JWT", "opaque", "JWE", "client secret", "registration token", "initial token")
    for name in (*texts, *last.values()):
        await scene.revoke(scene.held[name])


def _revocation(method: str, **fields: str) -> Step:
    """A call of RevocationService; fields name a member, or what is held."""

    async def step(scene: Scene) -> Any:
        ids = {"app": scene.app.client_id, "orders": scene.orders.client_id} | scene.held
        return await scene.admin(method, **{name: ids[of] for name, of in fields.items()})

    return step


async def _end_grant(scene: Scene) -> None:
    request = sessions_pb2.EndGrantRequest(grant_id=scene.held["grant"])
    await SessionServiceStub(scene.server.channel(ADMIN)).EndGrant(request)


async def _reuse(scene: Scene) -> None:
    first = scene.held["refresh token"]
    second = (await scene.refresh(first)).refresh_token
    scene.held["refresh token"] = (await scene.refresh(second)).refresh_token
    assert await outcome(scene.refresh(first)) == "REFRESH_TOKEN_REUSED"


def _review(verb: str, **more: Any) -> Step:
    """A step of the review of `app`."""

    async def step(scene: Scene) -> Any:
        request = getattr(clients_pb2, f"{verb}ClientRequest")(
            client_id=scene.app.client_id, **more
        )
        return await getattr(scene.server.clients(), f"{verb}Client")(request)

    return step


def _in_turn(*steps: Step) -> Step:
    async def step(scene: Scene) -> None:
        for one in steps:
            await one(scene)

    return step


def _later(seconds: float) -> Step:
    async def step(scene: Scene) -> None:
        await scene.server.advance(seconds)

    return step


async def _chores(scene: Scene) -> None:
    await scene.server.app.housekeeping.run_once()
    await scene.server.app.follow.poll()


def _update(*paths: str, **changed: Any) -> Step:
    async def step(scene: Scene) -> None:
        client = clients_pb2.Client(client_id=scene.app.client_id, **changed)
        request = clients_pb2.UpdateClientRequest(client=client, update_mask=FieldMask(paths=paths))
        await scene.server.clients().UpdateClient(request)

    return step


async def _ask_for_more(scene: Scene) -> None:
    metadata = APP_METADATA | {"scopes": [*SCOPES.values(), "validate"]}
    request = clients_pb2.UpdateOwnClientRequest(
        registration_access_token=scene.held["registration token"],
        client_id=scene.app.client_id,
        metadata=clients_pb2.ClientMetadata(**metadata),
    )
    await scene.server.clients(scene.app.who).UpdateOwnClient(request)


async def _delete_own(scene: Scene) -> None:
    token = scene.held["registration token"]
    request = clients_pb2.DeleteOwnClientRequest(registration_access_token=token)
    await scene.server.clients(scene.app.who).DeleteOwnClient(request)


def _rotate_secret(overlap_s: float | None = None) -> Step:
    async def step(scene: Scene) -> None:
        end = stamp(scene.now + overlap_s) if overlap_s else None
        request = clients_pb2.RotateClientSecretRequest(
            client_id=scene.app.client_id, overlap_end_time=end
        )
        await scene.server.clients().RotateClientSecret(request)

    return step


async def _delete_api_key(scene: Scene) -> None:
    request = clients_pb2.DeleteApiKeyRequest(api_key_id=scene.held["API key id"])
    await scene.server.clients(scene.app.who).DeleteApiKey(request)


async def _delete_initial(scene: Scene) -> None:
    request = clients_pb2.DeleteInitialAccessTokenRequest(
        initial_access_token_id=scene.held["initial token id"]
    )
    await scene.server.clients().DeleteInitialAccessToken(request)


async def _delete_resources(scene: Scene) -> None:
    for resource in (JWT, OPAQUE, JWE):
        request = resources_pb2.DeleteResourceRequest(resource_id=resource)
        await scene.server.resources().DeleteResource(request)


async def _create_resources(scene: Scene) -> None:
    await create_resources(scene.server, JWT, OPAQUE, JWE)


async def _rotate_key(scene: Scene) -> None:
    keys = scene.server.keys()
    prepared = (await keys.PrepareSigningKey(keys_pb2.PrepareSigningKeyRequest())).signing_key
    await scene.server.advance(prepared.ready_time.seconds + 1 - scene.now)
    await keys.ActivateSigningKey(keys_pb2.ActivateSigningKeyRequest(kid=prepared.kid))


async def _taint(scene: Scene) -> None:
    keys = scene.server.keys()
    listed = await keys.ListSigningKeys(keys_pb2.ListSigningKeysRequest())
    request = keys_pb2.TaintSigningKeyRequest(kid=listed.signing_keys[0].kid)
    await keys.TaintSigningKey(request)


_approval_ends = _update("approval_expire_time", approval_expire_time=stamp(NOW + SOON_S))
_expired = _in_turn(_approval_ends, _later(SOON_S + 1))
Stages: TypeAlias = tuple[tuple[str, Step], ...]


def once(*steps: Step) -> Stages:
    return (("", _in_turn(*steps)),)


EVENTS: Final[dict[str, Stages]] = {
    "`RevokeToken` of itself": once(_revoke_itself),
    "`RevokeToken` of the token at the root of an exchange": once(
        lambda scene: scene.revoke(scene.held["root"])
    ),
    "`RevokeToken` of the refresh token": once(
        lambda scene: scene.revoke(scene.held["refresh token"])
    ),
    "a refresh token comes again after its successor was used": once(_reuse),
    "`RevokeGrant`": once(_revocation("RevokeGrant", grant_id="grant")),
    "`EndGrant`": once(_end_grant),
    "`RevokeSession` (of the root)": once(_revocation("RevokeSession", session_id="session")),
    "`RevokeSubject`": once(_revocation("RevokeSubject", subject="app")),
    "`RevokeClient`": once(_revocation("RevokeClient", client_id="app")),
    "`RevokeClient` of the client that acts by the exchange": once(
        _revocation("RevokeClient", client_id="orders")
    ),
    "`RevokeSubjectClient`": once(
        _revocation("RevokeSubjectClient", subject="app", client_id="app")
    ),
    "`RevokeSubjectClient` with the client that acts by the exchange": once(
        _revocation("RevokeSubjectClient", subject="app", client_id="orders")
    ),
    "`RevokeEverything`": once(_revocation("RevokeEverything")),
    "`ActivateSigningKey` of the next key": once(_rotate_key),
    "`TaintSigningKey` of the current key": once(_taint),
    "`SuspendClient`": once(_review("Suspend")),
    "`SuspendClient`, then `ResumeClient`": once(_review("Suspend"), _review("Resume")),
    "the approval ends": (
        ("", _expired),
        ("at the next housekeeping", _chores),
    ),
    "the approval ends, then `ApproveClient`": once(_expired, _chores, _review("Approve")),
    "`UpdateClient` that takes a scope away": once(
        _update(
            "metadata.scopes", metadata={"client_name": "app", "scopes": [*SCOPES.values()][1:]}
        )
    ),
    "`UpdateOwnClient` that asks for more": once(_ask_for_more),
    "the same, then `RejectClient`": once(_ask_for_more, _review("Reject")),
    "the same, and nobody reviews it in time": once(_ask_for_more, _later(PENDING_S + 1), _chores),
    "`DeleteClient`": once(_review("Delete")),
    "`DeleteOwnClient`": once(_delete_own),
    "`RotateClientSecret`": once(_rotate_secret()),
    "`RotateClientSecret` with an overlap": (
        ("", _rotate_secret(SOON_S)),
        ("after the overlap", _later(SOON_S + 1)),
    ),
    "`DeleteApiKey`": once(_delete_api_key),
    "`DeleteInitialAccessToken`": once(_delete_initial),
    "`DeleteResource` of its audience": once(_delete_resources),
    "`DeleteResource`, then `CreateResource` of the same id": once(
        _delete_resources, _create_resources
    ),
    "its own end": (
        ("before it", _later(TOKEN_S - 10)),
        ("", _later(GRANT_S - TOKEN_S + 10 + LEEWAY_S + 1)),
        ("", _later(CERTIFICATE_S - GRANT_S)),
    ),
}


# --- the probe ---


@asynccontextmanager
async def serving(directory: Path, clock: HandClock, **more: Any) -> AsyncIterator[Running]:
    """A server whose chores are done when the probe says so."""
    lives = Grants(lifetime_days=GRANT_S / 86400, idle_days=6 / 24)
    registration = Registration(pending_days=PENDING_S / 86400)
    async with running(
        directory, clock=clock, grants=lives, registration=registration, **more
    ) as server:
        for task in server.app._tasks._running:
            if task.get_name() == "housekeeping":
                task.cancel()
        yield server


async def _is_alive(scene: Scene, name: str) -> bool:
    told = await CREDENTIALS[name](scene)
    if told != "OK" and told not in REFUSALS:
        raise ProbeError(f"{name}: {told}")
    return told == "OK"


def sql(directory: Path, *statements: str) -> None:
    """What nobody may: changes by hand."""
    with closing(sqlite3.connect(directory / "authsvc.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


async def _living(scene: Scene) -> set[str]:
    return {name for name in CREDENTIALS if await _is_alive(scene, name)}


async def _row(template: Path, scene: Scene, stages: Stages) -> dict[str, str]:
    """What an event kills, at once, after a restart and when its markers are compacted."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(shutil.copytree(template, Path(temporary) / "state"))
        clock, held = hand_clock(), dict(scene.held)
        cells: dict[str, str] = {}

        def at(server: Running) -> Scene:
            return Scene(server, scene.app, scene.orders, held)

        async with serving(directory, clock) as server:
            living = await _living(at(server))
            _same(living, set(CREDENTIALS), "before")
            for when, step in stages:
                await step(at(server))
                await server.app.follow.poll()  # a slow machine may answer before it has applied
                left = await _living(at(server))
                _same(left - living, set(), "revived")
                cells |= dict.fromkeys(living - left, f"{DIES} {when}".strip())
                living = left
        async with serving(directory, clock) as server:
            _same(await _living(at(server)), living, "restarted")
        clock.advance(MARKER_LIFETIME_S + 1)
        sql(directory, "DELETE FROM feed", "UPDATE feed_head SET compacted_to = revision")
        async with serving(directory, clock) as server:
            _same(await _living(at(server)), living.difference(ACCESS_TOKENS), "compacted")
    return {name: cells.get(name, LIVES) for name in CREDENTIALS}


def _same(found: set[str], expected: set[str], when: str) -> None:
    if found != expected:
        raise ProbeError(f"{when}: {sorted(found ^ expected)}")


async def what_kills_what(events: Iterable[str] = EVENTS) -> Table:
    """Event -> credential -> whether it dies of it. Raises ProbeError."""
    with tempfile.TemporaryDirectory() as temporary:
        template = Path(temporary) / "state"
        template.mkdir()
        async with serving(template, hand_clock()) as server:
            scene = await equip(server)
        free = asyncio.Semaphore(AT_ONCE)

        async def row(event: str) -> dict[str, str]:
            async with free:
                try:
                    return await _row(template, scene, EVENTS[event])
                except Exception as error:
                    error.add_note(event)
                    raise

        return dict(zip(events, await asyncio.gather(*map(row, events)), strict=True))


# --- what proves whom ---

OWN: Final = ["validate"]
NOT_TAKEN: Final = {
    *("CLIENT_AUTHENTICATION_FAILED", "AUTH_METHOD_NOT_REGISTERED", "INVALID_GRANT"),
    *("CALLER_UNKNOWN", "CALLER_TOKEN_INVALID", "PEER_CERTIFICATE_MISSING", "FIELD_INVALID"),
    *("REGISTRATION_TOKEN_INVALID", "REGISTRATION_NOT_ALLOWED", "INVALID_CLIENT_METADATA"),
}
"""How a way that does not count is refused; every other answer is a failure of the probe."""
DIGEST: Final = "its SHA-256"
WORDS: Final[dict[AuthMethod | str, tuple[str, str]]] = {
    AuthMethod.CLIENT_SECRET_BASIC: ("metadata `authorization: Basic …`", DIGEST),
    AuthMethod.CLIENT_SECRET_POST: ("`client_credential.client_secret`", DIGEST),
    AuthMethod.PRIVATE_KEY_JWT: (
        "`client_credential.client_assertion`",
        "the public keys; a digest of each `jti` until its assertion ends",
    ),
    AuthMethod.TLS_CLIENT_AUTH: (
        "the connection's certificate, and nothing else",
        "its name, and the pin of its CA",
    ),
    AuthMethod.API_KEY: ("metadata `authorization: Bearer …`", DIGEST),
    "certificate of an administrator": ("the connection's certificate", "nothing: a setting"),
    "certificate of nobody yet": ("the connection's certificate", "nothing"),
    "access token for authsvc": (
        "metadata `authorization: Bearer …`",
        "nothing of a JWT; of others the SHA-256 and the claims",
    ),
    "the same, bound to a certificate": (
        "metadata `authorization: Bearer …`, over a connection with that certificate",
        "the same",
    ),
    "refresh token": (
        "`refresh_token`, beside its client's own proof",
        "its random handle; the key of its HMAC is in no table",
    ),
    "registration access token": ("`registration_access_token`", DIGEST),
    "initial access token": ("`initial_access_token`", DIGEST),
}
"""What no call tells: how each is offered, and what is stored of it."""


@dataclass
class Way:
    """A way to prove oneself, and what there is to be got by it."""

    client_id: str
    text: str = "x"
    """The credential, where it is a text."""
    bearer: bool = False
    """The text is shown in the metadata `authorization` too."""
    method: AuthMethod | None = None
    who: Issued | None = None
    """Whose connection, where the certificate counts."""
    token: str = "x"
    """An access token of the client."""
    refresh_token: str = "x"
    beside: str = ""
    """The client secret that goes with a refresh token."""
    own_name: str = ""
    """The SPIFFE ID that it registers, and no other client."""

    def offer(self, now: float) -> dict[str, Any]:
        """What a request carries, beside `client_id`."""
        match self.method:
            case AuthMethod.CLIENT_SECRET_POST:
                return {"credential": auth_pb2.ClientCredential(client_secret=self.text)}
            case AuthMethod.PRIVATE_KEY_JWT:
                proof = assertion(self.client_id, now)
                return {"credential": auth_pb2.ClientCredential(client_assertion=proof)}
            case AuthMethod.CLIENT_SECRET_BASIC:
                pair = base64.b64encode(f"{self.client_id}:{self.text}".encode()).decode()
                return {"metadata": (("authorization", f"Basic {pair}"),)}
        shown = (("authorization", f"Bearer {self.text}"),) if self.bearer else ()
        return {"metadata": shown}


class Desk:
    """Asks for everything over one connection."""

    def __init__(self, channel: grpc.aio.Channel, now: float) -> None:
        self._auth: Any = AuthServiceStub(channel)
        self._clients: Any = ClientServiceStub(channel)
        self._now = now

    def _offer(self, way: Way) -> tuple[dict[str, Any], Any]:
        offer = way.offer(self._now)
        fields = {"client_id": way.client_id, "client_credential": offer.get("credential")}
        return fields, offer.get("metadata", ())

    async def issue(self, way: Way) -> Any:
        fields, metadata = self._offer(way)
        request = auth_pb2.IssueTokenRequest(
            client_credentials=auth_pb2.ClientCredentialsGrant(), scopes=OWN, **fields
        )
        return (await self._auth.IssueToken(request, metadata=metadata)).token

    async def open(self, way: Way) -> str:
        """A refresh token."""
        fields, metadata = self._offer(way)
        exchange = auth_pb2.TokenExchangeGrant(
            subject_token=way.token, subject_token_type=ACCESS, requested_token_type=REFRESH
        )
        request = auth_pb2.IssueTokenRequest(token_exchange=exchange, scopes=OWN, **fields)
        issued = await self._auth.IssueToken(request, metadata=metadata)
        return str(issued.token.refresh_token)

    async def refresh(self, way: Way) -> None:
        fields, metadata = self._offer(way)
        if way.beside:
            fields["client_credential"] = auth_pb2.ClientCredential(client_secret=way.beside)
            metadata = ()
        request = auth_pb2.RefreshTokenRequest(refresh_token=way.refresh_token, **fields)
        answer = await self._auth.RefreshToken(request, metadata=metadata)
        way.refresh_token = answer.token.refresh_token

    async def revoke(self, way: Way) -> None:
        fields, metadata = self._offer(way)
        request = auth_pb2.RevokeTokenRequest(token=way.token, validate_only=True, **fields)
        await self._auth.RevokeToken(request, metadata=metadata)

    async def revoke_as_caller(self, way: Way) -> None:
        """Without the name of a client."""
        _, metadata = self._offer(way)
        request = auth_pb2.RevokeTokenRequest(token=way.token, validate_only=True)
        await self._auth.RevokeToken(request, metadata=metadata)

    async def validate(self, way: Way) -> None:
        _, metadata = self._offer(way)
        request = auth_pb2.ValidateTokenRequest(token="x")
        await self._auth.ValidateToken(request, metadata=metadata)

    async def own(self, way: Way) -> None:
        request = clients_pb2.GetOwnClientRequest(registration_access_token=way.text)
        await self._clients.GetOwnClient(request)

    async def register(self, way: Way) -> None:
        _, metadata = self._offer(way)
        asked = clients_pb2.ClientMetadata(client_name="made")
        if way.own_name:
            asked.tls_client_auth_san_uri = way.own_name
        request = auth_pb2.RegisterClientRequest(metadata=asked, validate_only=True)
        await self._auth.RegisterClient(request, metadata=metadata)

    async def register_by_token(self, way: Way) -> None:
        request = auth_pb2.RegisterClientRequest(
            metadata=clients_pb2.ClientMetadata(client_name="made"),
            initial_access_token=way.text,
            validate_only=True,
        )
        await self._auth.RegisterClient(request)


PLACES: Final[dict[str, tuple[Callable[[Desk, Way], Awaitable[Any]], ...]]] = {
    "`IssueToken`": (Desk.issue,),
    "`RefreshToken`": (Desk.refresh,),
    "`RevokeToken`": (Desk.revoke, Desk.revoke_as_caller),
    "methods with a scope": (Desk.validate,),
    "own registration": (Desk.own,),
    "`RegisterClient`": (Desk.register, Desk.register_by_token),
}
"""Where a way may count: it does if one of these calls is answered."""


async def _client_of(server: Running, method: AuthMethod) -> Way | None:
    """An approved client with exactly this method; None where this version cannot do it."""
    name = method.name.lower()
    is_certificate = method is AuthMethod.TLS_CLIENT_AUTH
    who = identity(name)
    try:
        made = await server.register(
            who,
            secret=not is_certificate,
            client_name=name,
            grant_types=GRANTS,
            scopes=[*OWN, "register"],
            token_endpoint_auth_methods=[clients_pb2.ClientAuthMethod.ValueType(method)],
            jwks=JWKS,
            tls_client_certificate_bound_access_tokens=False,
        )
    except grpc.aio.AioRpcError as error:
        if read_failure(error).reason == "NOT_IMPLEMENTED":
            return None
        raise
    way = Way(made.client.client_id, made.client_secret or "x", method=method)
    await server.approve(way.client_id)
    if is_certificate:
        way.who = who
    if method is AuthMethod.API_KEY:
        key = clients_pb2.ApiKey(client_id=way.client_id, scopes=OWN)
        request = clients_pb2.CreateApiKeyRequest(api_key=key)
        way.text, way.bearer = (await server.clients().CreateApiKey(request)).value, True
    return way


async def _ways(server: Running, strangers: Desk) -> dict[str, Way]:
    """One of each; what a client can only get by proving itself it gets here."""
    ways: dict[str, Way] = {}
    for method in AuthMethod:
        way = await _client_of(server, method)
        if way is None:
            continue
        desk = Desk(server.channel(way.who), server.clock.wall()) if way.who else strangers
        way.token = (await desk.issue(way)).access_token
        way.refresh_token = await desk.open(way)
        ways[method.name.lower()] = way
        if method is AuthMethod.CLIENT_SECRET_POST:
            opened = await desk.open(way)
            ways["refresh token"] = replace(
                way, text=opened, method=None, refresh_token=opened, beside=way.text
            )
            if await _is_taken(
                strangers, replace(ways["refresh token"], beside=""), (Desk.refresh,)
            ):
                raise ProbeError("a refresh token alone was enough")
    initial = clients_pb2.InitialAccessToken(uses_left=1, expire_time=stamp(NOW + HOUR))
    bound = await server.member("bound", *OWN, "register")
    by_secret = Member(
        bound.who, ways["client_secret_post"].client_id, ways["client_secret_post"].text
    )
    shown = {
        "access token for authsvc": (
            await server.token(by_secret, *OWN, "register", secret=True)
        ).access_token,
        "the same, bound to a certificate": (await server.token(bound)).access_token,
    }
    for name, token in shown.items():
        ways[name] = Way(bound.client_id, token, bearer=True, token=token)
    ways["access token for authsvc"].client_id = ways["client_secret_post"].client_id
    ways["the same, bound to a certificate"].who = bound.who
    made = await server.register(identity("made"), secret=True)
    ways["registration access token"] = Way("x", made.registration_access_token, bearer=True)
    request = clients_pb2.CreateInitialAccessTokenRequest(initial_access_token=initial)
    value = (await server.clients().CreateInitialAccessToken(request)).value
    ways["initial access token"] = Way("x", value, bearer=True)
    ways["certificate of an administrator"] = Way("x", who=ADMIN)
    nobody = identity("nobody")
    ways["certificate of nobody yet"] = Way("x", who=nobody, own_name=spiffe("nobody"))
    return ways


async def _is_taken(
    desk: Desk, way: Way, calls: Iterable[Callable[[Desk, Way], Awaitable[Any]]]
) -> bool:
    told = [await outcome(call(desk, way)) for call in calls]
    if not NOT_TAKEN.union({"OK"}).issuperset(told):
        raise ProbeError(f"{way}: {told}")
    return "OK" in told


def _is_stored(directory: Path, value: bytes) -> bool:
    return any(value in file.read_bytes() for file in directory.glob("authsvc.db*"))


async def what_proves_whom() -> Table:
    """Way -> how it is offered, what is stored, and where it counts. Raises ProbeError."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "state"
        directory.mkdir()
        async with serving(directory, hand_clock(), tls_only=True) as server:
            stranger = identity("stranger")
            ways = await _ways(server, Desk(server.channel(stranger), NOW))
            table: Table = {}
            async with connect(server.app.tls_port, None) as plain:
                for key, (offered, stored) in WORDS.items():
                    name = key.name.lower() if isinstance(key, AuthMethod) else key
                    way = ways.pop(name)
                    if _is_stored(directory, digest(way.text)) is not (stored == DIGEST):
                        raise ProbeError(f"{name}: not what is stored of it: {stored}")
                    desks = {
                        "mTLS": Desk(server.channel(way.who or stranger), NOW),
                        "TLS only": Desk(plain, NOW),
                    }
                    row = {"offered as": offered, "stored": stored}
                    for place, calls in PLACES.items():
                        where = [
                            on for on, desk in desks.items() if await _is_taken(desk, way, calls)
                        ]
                        row[place] = "both" if len(where) > 1 else "".join(where) or "no"
                        if way.own_name and where:
                            row[place] += ", its own name"
                    table[f"`{name}`" if isinstance(key, AuthMethod) else name] = row
            if ways:
                raise ProbeError(f"no words for {sorted(ways)}")
            return table


# --- the document ---


def markdown(corner: str, table: Table) -> str:
    """A table with a name for its first column."""
    columns = [*next(iter(table.values()))]
    lines = [(corner, *columns), ("---",) * (len(columns) + 1)]
    lines += [(name, *row.values()) for name, row in table.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def placed(text: str, tables: Mapping[str, str]) -> str:
    """The document with these tables where it names them."""
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        assert mark, f"{DOCUMENT.name}: no place for {name}"
        text = f"{before}{mark}\n{table}\n{end}{after}"
    return text


async def document(text: str) -> str:
    """The document as it should be. Raises ProbeError."""
    whom, what = await what_proves_whom(), await what_kills_what()
    return placed(
        text,
        {"what proves whom": markdown("proof", whom), "what kills what": markdown("event", what)},
    )


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    written = DOCUMENT.read_text()
    found = asyncio.run(document(written))
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(found)
    elif found != written:
        sys.exit(f"{DOCUMENT}: not what the server does; run with --write")
