"""What proves whom and what kills what, found by asking a server: the tables of the documents.

`python -m tests.credentials --write` brings docs/credentials.md up to date.
"""

import asyncio
import base64
import json
import logging
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from authsvc.keys.secrets import digest
from authsvc.model import AuthMethod
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2, users_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from authsvc_client.v1.users_pb2_grpc import UserServiceStub
from tests.certs import HOUR, Issued
from tests.credentials_of_people import PEOPLE
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
    migrated,
    outcome,
    read_failure,
    spiffe,
)
from tests.people import ACCESS, PASSWORD, REFRESH
from tests.probe import (
    CERTIFICATE_S,
    LONG_S,
    OWN_END,
    PENDING_S,
    SOON_S,
    TOKEN_S,
    Probe,
    ProbeError,
    Scene,
    Stages,
    Step,
    Table,
    Use,
    access_token,
    ask_for_more,
    chores,
    delete_own,
    delete_resources,
    end_grant,
    expired,
    is_alive,
    later,
    once,
    refresh_token,
    reuse,
    review,
    revocation,
    rotate_key,
    serving,
    stamp,
    taint,
    take_scope,
)

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "credentials.md"

GRANTS: Final = [
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
]
# JWT, OPAQUE and JWE go where a resource is deleted; a client logs in for KEPT.
JWT, OPAQUE, JWE, KEPT = (f"https://{name}.test" for name in ("jwt", "opaque", "jwe", "kept"))
SCOPES: Final = {JWT: "jwt.read", OPAQUE: "opaque.read", JWE: "jwe.read", KEPT: "kept.read"}

KEY: Final = ec.generate_private_key(ec.SECP256R1())
_to_jwk = jwt.algorithms.ECAlgorithm.to_jwk
JWK: Final[dict[str, str]] = _to_jwk(KEY.public_key(), as_dict=True)
JWKS: Final = json.dumps({"keys": [JWK | {"kid": "k", "alg": "ES256", "use": "sig"}]})
_jtis = iter(range(10**9))


def assertion(client_id: str, now: float) -> str:
    """private_key_jwt, made anew: each is good once."""
    claims = {"iss": client_id, "sub": client_id, "aud": ISSUER, "exp": int(now) + 300}
    claims["jti"] = f"jti-{next(_jtis)}"
    return jwt.encode(claims, KEY, algorithm="ES256", headers={"kid": "k"})


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


async def _use_api_key(scene: Scene) -> str:
    """As a token that somebody validates, and to authenticate its client: both or neither."""
    value = scene.held["API key"]
    metadata = (("authorization", f"Bearer {value}"),)
    stub = scene.server.auth(scene.members["orders"].who)
    asked = await outcome(stub.IssueToken(kept_request(scene.app.client_id), metadata=metadata))
    judged = await scene.server.judged(ADMIN, value)
    if (asked == "OK") is not (judged == "OK"):
        raise ProbeError(f"API key: {asked}, but {judged}")
    return judged


def _login(credential: Callable[[Scene], Mapping[str, str]], over: str = "orders") -> Use:
    """To authenticate `app`, over the connection of whom."""

    async def use(scene: Scene) -> str:
        request = kept_request(scene.app.client_id, **credential(scene))
        who = scene.members[over].who
        return await outcome(scene.server.auth(who).IssueToken(request))

    return use


async def _use_registration(scene: Scene) -> str:
    token = scene.held["registration token"]
    request = clients_pb2.GetOwnClientRequest(registration_access_token=token)
    return await outcome(scene.server.clients(scene.members["orders"].who).GetOwnClient(request))


async def _use_initial(scene: Scene) -> str:
    request = auth_pb2.RegisterClientRequest(
        metadata=clients_pb2.ClientMetadata(client_name="made"),
        initial_access_token=scene.held["initial token"],
    )
    return await outcome(scene.server.auth(scene.members["orders"].who).RegisterClient(request))


CREDENTIALS: Final[dict[str, Use]] = {
    "JWT": access_token("JWT"),
    "opaque": access_token("opaque"),
    "JWE": access_token("JWE"),
    "exchanged": access_token("exchanged", "orders"),
    "of the grant": access_token("of the grant"),
    "of the API key": access_token("of the API key"),
    "refresh token": refresh_token("refresh token"),
    "API key": _use_api_key,
    "client secret": _login(lambda scene: {"secret": scene.held["client secret"]}),
    "private key": _login(lambda scene: {"assertion": assertion(scene.app.client_id, scene.now)}),
    "certificate": _login(lambda _scene: {}, "app"),
    "registration token": _use_registration,
    "initial token": _use_initial,
}
ACCESS_TOKENS: Final = frozenset([*CREDENTIALS][:6])


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
    held["root"] = (await server.token(app, resources=[JWT])).access_token
    scene = Scene(server, {"app": app, "orders": orders}, held, APP_METADATA)
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


async def _revoke_itself(scene: Scene) -> None:
    """Whatever it is, as a text; last what takes its access tokens along."""
    last = {"of the grant": "refresh token", "of the API key": "API key"}
    for token, origin in last.items():
        await scene.revoke(scene.held[token])
        uses = {name: CREDENTIALS[name] for name in (token, origin)}
        living = [name for name, use in uses.items() if await is_alive(scene, name, use)]
        if living != [origin]:
            raise ProbeError(f"RevokeToken of {token}: then {living}")
    await scene.revoke(scene.held["exchanged"], scene.members["orders"])
    texts = ("JWT", "opaque", "JWE", "client secret", "registration token", "initial token")
    for name in (*texts, *last.values()):
        await scene.revoke(scene.held[name])


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


async def _create_resources(scene: Scene) -> None:
    await create_resources(scene.server, JWT, OPAQUE, JWE)


EVENTS: Final[dict[str, Stages]] = {
    "`RevokeToken` of itself": once(_revoke_itself),
    "`RevokeToken` of the token at the root of an exchange": once(
        lambda scene: scene.revoke(scene.held["root"])
    ),
    "`RevokeToken` of the refresh token": once(
        lambda scene: scene.revoke(scene.held["refresh token"])
    ),
    "a refresh token comes again after its successor was used": once(reuse("refresh token")),
    "`RevokeGrant`": once(revocation("RevokeGrant", grant_id="grant")),
    "`EndGrant`": once(end_grant("grant")),
    "`RevokeSubject`": once(revocation("RevokeSubject", subject="app")),
    "`RevokeClient`": once(revocation("RevokeClient", client_id="app")),
    "`RevokeClient` of the client that acts by the exchange": once(
        revocation("RevokeClient", client_id="orders")
    ),
    "`RevokeSubjectClient`": once(
        revocation("RevokeSubjectClient", subject="app", client_id="app")
    ),
    "`RevokeSubjectClient` with the client that acts by the exchange": once(
        revocation("RevokeSubjectClient", subject="app", client_id="orders")
    ),
    "`RevokeEverything`": once(revocation("RevokeEverything")),
    "`ActivateSigningKey` of the next key": once(rotate_key),
    "`TaintSigningKey` of the current key": once(taint),
    "`SuspendClient`": once(review("Suspend")),
    "`SuspendClient`, then `ResumeClient`": once(review("Suspend"), review("Resume")),
    "the approval ends": (
        ("", expired),
        ("at the next housekeeping", chores),
    ),
    "the approval ends, then `ApproveClient`": once(expired, chores, review("Approve")),
    "`UpdateClient` that takes a scope away": once(take_scope),
    "`UpdateOwnClient` that asks for more": once(ask_for_more),
    "the same, then `RejectClient`": once(ask_for_more, review("Reject")),
    "the same, and nobody reviews it in time": once(ask_for_more, later(PENDING_S + 1), chores),
    "`DeleteClient`": once(review("Delete")),
    "`DeleteOwnClient`": once(delete_own),
    "`RotateClientSecret`": once(_rotate_secret()),
    "`RotateClientSecret` with an overlap": (
        ("", _rotate_secret(SOON_S)),
        ("after the overlap", later(SOON_S + 1)),
    ),
    "`DeleteApiKey`": once(_delete_api_key),
    "`DeleteInitialAccessToken`": once(_delete_initial),
    "`DeleteResource` of its audience": once(delete_resources(JWT, OPAQUE, JWE)),
    "`DeleteResource`, then `CreateResource` of the same id": once(
        delete_resources(JWT, OPAQUE, JWE), _create_resources
    ),
    "its own end": OWN_END,
}
SERVICES: Final = Probe(equip, CREDENTIALS, ACCESS_TOKENS, EVENTS)


# --- what proves whom ---

OWN: Final = ["validate"]
NOT_TAKEN: Final = {
    *("CLIENT_AUTHENTICATION_FAILED", "AUTH_METHOD_NOT_REGISTERED", "INVALID_GRANT"),
    *("CALLER_UNKNOWN", "CALLER_TOKEN_INVALID", "PEER_CERTIFICATE_MISSING", "FIELD_INVALID"),
    *("REGISTRATION_TOKEN_INVALID", "REGISTRATION_NOT_ALLOWED", "INVALID_CLIENT_METADATA"),
    *("GRANT_TYPE_NOT_ALLOWED", "TOKEN_MISSING", "INSUFFICIENT_SCOPE", "TOKEN_NOT_OWNED"),
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
    "password of a person": (
        "`password.username` and `password.password`, beside a first party's own proof",
        "its argon2id hash",
    ),
    "access token of a person for authsvc": (
        "metadata `authorization: Bearer …`, beside the current password",
        "nothing of a JWT",
    ),
    "reset code of a person": ("`code`", DIGEST),
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
    """The client secret that goes with a refresh token or a password."""
    username: str = "nobody"
    password: str = "x"
    """The person's, where the text is its token."""
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
        self._users: Any = UserServiceStub(channel)
        self._now = now

    def _offer(self, way: Way) -> tuple[dict[str, Any], Any]:
        offer = way.offer(self._now)
        fields = {"client_id": way.client_id, "client_credential": offer.get("credential")}
        return fields, offer.get("metadata", ())

    def _offer_beside(self, way: Way) -> tuple[dict[str, Any], Any]:
        """The same, of a way that goes with the client's own proof."""
        fields, metadata = self._offer(way)
        if not way.beside:
            return fields, metadata
        fields["client_credential"] = auth_pb2.ClientCredential(client_secret=way.beside)
        return fields, ()

    async def issue(self, way: Way) -> Any:
        fields, metadata = self._offer(way)
        request = auth_pb2.IssueTokenRequest(
            client_credentials=auth_pb2.ClientCredentialsGrant(), scopes=OWN, **fields
        )
        return (await self._auth.IssueToken(request, metadata=metadata)).token

    async def log_in(self, way: Way) -> Any:
        """For a token that no scope is needed for."""
        fields, metadata = self._offer_beside(way)
        told = auth_pb2.PasswordGrant(username=way.username, password=way.text)
        request = auth_pb2.IssueTokenRequest(password=told, resources=[ISSUER], **fields)
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
        fields, metadata = self._offer_beside(way)
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

    async def set_password(self, way: Way) -> None:
        _, metadata = self._offer(way)
        request = users_pb2.SetPasswordRequest(
            current_password=way.password, new_password=TOO_SHORT
        )
        await _refused_for_the_new_one(self._users.SetPassword(request, metadata=metadata))

    async def reset_password(self, way: Way) -> None:
        request = users_pb2.ResetPasswordRequest(code=way.text, new_password=TOO_SHORT)
        await _refused_for_the_new_one(self._users.ResetPassword(request))

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


TOO_SHORT: Final = "short"


async def _refused_for_the_new_one(call: Awaitable[Any]) -> None:
    """A password is looked at when it is known who sets it: then nothing is set."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if read_failure(error).reason != "PASSWORD_NOT_ACCEPTED":
            raise
    else:
        raise ProbeError("a password that is too short was taken")


PLACES: Final[dict[str, tuple[Callable[[Desk, Way], Awaitable[Any]], ...]]] = {
    "`IssueToken`": (Desk.issue, Desk.log_in),
    "`RefreshToken`": (Desk.refresh,),
    "`RevokeToken`": (Desk.revoke, Desk.revoke_as_caller),
    "methods with a scope": (Desk.validate,),
    "own registration": (Desk.own,),
    "own password": (Desk.set_password, Desk.reset_password),
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
    return ways | await _ways_of_a_person(server, strangers)


async def _ways_of_a_person(server: Running, strangers: Desk) -> dict[str, Way]:
    """By a first party that has a secret."""
    made = await server.register(
        identity("console"),
        secret=True,
        grant_types=[clients_pb2.GRANT_TYPE_PASSWORD],
        first_party=True,
        tls_client_certificate_bound_access_tokens=False,
    )
    client_id = made.client.client_id
    await server.approve(client_id)
    user = users_pb2.User(username="ada")
    added = await server.users().CreateUser(
        users_pb2.CreateUserRequest(user=user, password=PASSWORD)
    )
    request = users_pb2.CreatePasswordResetCodeRequest(user_id=added.user.user_id)
    by_password = Way(client_id, PASSWORD, username="ada", beside=made.client_secret)
    token = (await strangers.log_in(by_password)).access_token
    by_token = Way(client_id, token, bearer=True, token=token, password=PASSWORD)
    alone = {"a password": (replace(by_password, beside=""), Desk.log_in)}
    alone["a token"] = (replace(by_token, password="x"), Desk.set_password)
    for name, (way, call) in alone.items():
        if await _is_taken(strangers, way, (call,)):
            raise ProbeError(f"{name} of a person alone was enough")
    code = (await server.users().CreatePasswordResetCode(request)).code
    return {
        "password of a person": by_password,
        "access token of a person for authsvc": by_token,
        "reset code of a person": Way("x", code, bearer=True),
    }


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
    with tempfile.TemporaryDirectory() as temporary:
        await migrated(Path(temporary))  # one database that all copy
        whom, services, people = await asyncio.gather(what_proves_whom(), SERVICES(), PEOPLE())
    return placed(
        text,
        {
            "what proves whom": markdown("proof", whom),
            "what kills what": markdown("event", services),
            "what kills what of a person": markdown("event", people),
        },
    )


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    written = DOCUMENT.read_text()
    found = asyncio.run(document(written))
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(found)
    elif found != written:
        sys.exit(f"{DOCUMENT}: not what the server does; run with --write")
