"""Client authentication over a real server: client x method x grant, and every refusal."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ISSUER,
    NOW,
    Member,
    Running,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    spiffe,
)

ACCESS = "urn:ietf:params:oauth:token-type:access_token"
REFRESH = "urn:ietf:params:oauth:token-type:refresh_token"
API = "https://api.test"
METHODS = {
    "basic": clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_BASIC,
    "post": clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST,
    "assertion": clients_pb2.CLIENT_AUTH_METHOD_PRIVATE_KEY_JWT,
    "certificate": clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
    "api_key": clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
}
GRANTS = {
    "client_credentials": clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    "token_exchange": clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    "refresh_token": clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
}
KEY = ec.generate_private_key(ec.SECP256R1())
JWKS = json.dumps(
    {
        "keys": [
            {
                **jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True),
                "kid": "k",
                "alg": "ES256",
                "use": "sig",
            }
        ]
    }
)
_jtis = iter(range(10**9))

Offer = tuple[tuple[tuple[str, str], ...], auth_pb2.ClientCredential | None]
"""Metadata, and the credential in the request."""


@dataclass
class Applicant:
    """A client that registered exactly one method, and holds whatever others it could be given."""

    member: Member
    api_key: str = ""

    def offers(self, method: str) -> Offer:
        """What it sends to authenticate by a method, as well as it can."""
        client_id, secret = self.member.client_id, self.member.secret or "asvc_cs_none"
        match method:
            case "basic":
                return (("authorization", basic(client_id, secret)),), None
            case "post":
                return (), auth_pb2.ClientCredential(client_secret=secret)
            case "assertion":
                return (), auth_pb2.ClientCredential(client_assertion=assertion(client_id))
            case "api_key":
                return (("authorization", f"Bearer {self.api_key or 'asvc_ak_none'}"),), None
        return (), None


def basic(client_id: str, secret: str) -> str:
    """RFC 6749 section 2.3.1: both form-encoded, then as HTTP Basic."""
    pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def assertion(client_id: str, **changes: Any) -> str:
    """private_key_jwt; a claim of None is left out."""
    claims: dict[str, Any] = {
        "iss": client_id,
        "sub": client_id,
        "aud": ISSUER,
        "exp": int(NOW) + 300,
        "jti": f"jti-{next(_jtis)}",
    } | changes
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, KEY, algorithm="ES256", headers={"kid": "k"})


@dataclass
class Hall:
    """The server, the applicants, and what is exchanged and refreshed."""

    server: Running
    applicants: dict[str, Applicant]
    subject: str

    async def ask(
        self, client: Applicant, grant: str, offer: Offer, refresh_token: str = ""
    ) -> auth_pb2.IssuedToken:
        """Asks for a token by a grant, over the applicant's own connection."""
        metadata, credential = offer
        stub = self.server.auth(client.member.who)
        common: dict[str, Any] = {
            "client_id": client.member.client_id,
            "client_credential": credential,
        }
        if grant == "refresh_token":
            asked = auth_pb2.RefreshTokenRequest(refresh_token=refresh_token, **common)
            return (await stub.RefreshToken(asked, metadata=metadata)).token
        if grant == "client_credentials":
            request = auth_pb2.IssueTokenRequest(
                client_credentials=auth_pb2.ClientCredentialsGrant(), **common
            )
        else:
            wanted = REFRESH if grant == "open" else ACCESS
            request = auth_pb2.IssueTokenRequest(
                token_exchange=auth_pb2.TokenExchangeGrant(
                    subject_token=self.subject,
                    subject_token_type=ACCESS,
                    requested_token_type=wanted,
                ),
                **common,
            )
        return (await stub.IssueToken(request, metadata=metadata)).token


async def admitted(server: Running, method: str) -> Applicant:
    made = await server.register(
        who := identity(f"by-{method}"),
        tls_client_auth_san_uri=spiffe(f"by-{method}"),
        client_name=method,
        scopes=["read", "write"],
        grant_types=list(GRANTS.values()),
        token_endpoint_auth_methods=[METHODS[method]],
        jwks=JWKS,
        validates=[API],
        tls_client_certificate_bound_access_tokens=False,
    )
    member = Member(who, made.client.client_id, made.client_secret)
    await server.approve(member.client_id)
    key = ""
    if method == "api_key":
        created = await server.clients().CreateApiKey(
            clients_pb2.CreateApiKeyRequest(
                api_key=clients_pb2.ApiKey(client_id=member.client_id, scopes=["read"])
            )
        )
        key = created.value
    return Applicant(member, key)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hall(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hall]:
    async with running(tmp_path_factory.mktemp("hall")) as server:
        owner = await server.member("owner", "validate")
        await server.resource(API, "read", "write", owner=owner.client_id)
        source = await server.member("source", "read", "write")
        subject = await server.token(source)
        applicants = {method: await admitted(server, method) for method in METHODS}
        yield Hall(server, applicants, subject.access_token)


def expected(registered: str, offered: str) -> str:
    """Only a credential that holds is told that its method is not registered."""
    if registered == offered:
        return "OK"
    holds = {
        "certificate": True,  # each has a name in a certificate, and uses it
        "assertion": True,  # each registered its keys
        "basic": registered == "post",
        "post": registered == "basic",
        "api_key": False,
    }
    return "AUTH_METHOD_NOT_REGISTERED" if holds[offered] else "CLIENT_AUTHENTICATION_FAILED"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("grant", [*GRANTS, "open"])
@pytest.mark.parametrize("offered", METHODS)
@pytest.mark.parametrize("registered", METHODS)
async def test_exactly_the_registered_method_works_for_every_grant(
    hall: Hall, registered: str, offered: str, grant: str
) -> None:
    """RFC 6749 section 2.3, RFC 7591 section 2: one method, and no other."""
    client = hall.applicants[registered]
    token = ""
    if grant == "refresh_token":
        token = (await hall.ask(client, "open", client.offers(registered))).refresh_token
    found = await outcome(hall.ask(client, grant, client.offers(offered), token))
    assert found == expected(registered, offered)
    if grant == "refresh_token" and found != "OK":  # the refused attempt cost nothing
        await hall.ask(client, grant, client.offers(registered), token)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("grant", GRANTS)
@pytest.mark.parametrize("second", ["basic", "api_key"])
@pytest.mark.parametrize("first", ["post", "assertion"])
async def test_two_methods_offered_are_refused(
    hall: Hall, first: str, second: str, grant: str
) -> None:
    """RFC 6749 section 2.3: not more than one authentication method in a request."""
    for registered in (first, second):
        client = hall.applicants[registered]
        offer = (client.offers(second)[0], client.offers(first)[1])
        assert await reason(hall.ask(client, grant, offer, "x")) in (
            "AUTH_METHOD_AMBIGUOUS",
            "INVALID_GRANT",  # a refresh token is read before anybody is asked
        )


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("method", METHODS)
async def test_another_clients_credential_proves_nothing(hall: Hall, method: str) -> None:
    client = hall.applicants[method]
    for other in hall.applicants.values():
        if other is client:
            continue
        stranger = Applicant(Member(other.member.who, client.member.client_id), other.api_key)
        offer = other.offers(method)
        if method == "basic":  # the right name beside another's secret
            secret = other.member.secret or "asvc_cs_none"
            offer = (("authorization", basic(client.member.client_id, secret)),), None
        found = await reason(hall.ask(stranger, "client_credentials", offer))
        assert found == "CLIENT_AUTHENTICATION_FAILED"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "authorization",
    [
        "Basic",
        "Basic ",
        "Basic %%%",
        "Basic " + base64.b64encode(b"nocolon").decode(),
        "Basic " + base64.b64encode(b"\xff\xfe:x").decode(),
        "Digest x",
        "Bearer",
        "Bearer x",
        "Negotiate " + "A" * 4000,
    ],
)
async def test_an_authorization_that_is_none_is_refused(hall: Hall, authorization: str) -> None:
    """It is offered, so the certificate of the connection is not asked instead."""
    for method in ("basic", "api_key", "certificate"):
        client = hall.applicants[method]
        offer: Offer = ((("authorization", authorization),), None)
        found = await reason(hall.ask(client, "client_credentials", offer))
        assert found == "CLIENT_AUTHENTICATION_FAILED"


@pytest.mark.asyncio(loop_scope="module")
async def test_basic_is_form_encoded_within(hall: Hall) -> None:
    """RFC 6749 section 2.3.1."""
    client = hall.applicants["basic"]
    encoded = "".join(f"%{ord(char):02X}" for char in client.member.secret)
    pair = f"{client.member.client_id}:{encoded}"
    header = "basic " + base64.b64encode(pair.encode()).decode()
    await hall.ask(client, "client_credentials", ((("authorization", header),), None))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "changes",
    [
        {"aud": f"{ISSUER}/token"},
        {"aud": [ISSUER, "https://other.test"]},
        {"aud": None},
        {"iss": "other"},
        {"sub": "other"},
        {"exp": int(NOW) - 3600},
        {"exp": int(NOW) + 86400},
        {"exp": None},
        {"nbf": int(NOW) + 3600},
        {"jti": None},
        {"jti": ""},
    ],
)
async def test_assertions_that_do_not_hold(hall: Hall, changes: dict[str, Any]) -> None:
    """RFC 7523 section 3; rfc7523bis: the issuer is the only audience."""
    client = hall.applicants["assertion"]
    text = assertion(client.member.client_id, **changes)
    offer: Offer = ((), auth_pb2.ClientCredential(client_assertion=text))
    found = await reason(hall.ask(client, "client_credentials", offer))
    assert found == "CLIENT_AUTHENTICATION_FAILED"


@pytest.mark.asyncio(loop_scope="module")
async def test_an_assertion_is_good_once(hall: Hall) -> None:
    """RFC 7523 section 3, CVE-2020-15222: in sequence and at once."""
    client = hall.applicants["assertion"]
    offers = [client.offers("assertion") for _ in range(2)]
    await hall.ask(client, "client_credentials", offers[0])
    again = await reason(hall.ask(client, "client_credentials", offers[0]))
    assert again == "CLIENT_AUTHENTICATION_FAILED"
    found = await asyncio.gather(
        *(outcome(hall.ask(client, "client_credentials", offers[1])) for _ in range(32))
    )
    assert sorted(found) == ["CLIENT_AUTHENTICATION_FAILED"] * 31 + ["OK"]


async def test_an_assertion_is_good_once_over_two_workers_and_a_restart(
    migrated_url: str, tmp_path: Path
) -> None:
    keys = SecretStr("11" * 32)
    async with (
        running(tmp_path / "one", url=migrated_url, seal_keys=keys) as one,
        running(tmp_path / "two", url=migrated_url, seal_keys=keys) as two,
    ):
        owner = await one.member("owner", "validate")
        await one.resource(API, "read", "write", owner=owner.client_id)
        client = await admitted(one, "assertion")
        await two.app.follow.poll()
        requests = [
            issue_request(client.member.client_id, assertion=assertion(client.member.client_id))
            for _ in range(2)
        ]
        found = await asyncio.gather(
            *(
                outcome(server.auth(client.member.who).IssueToken(requests[0]))
                for server in (one, two) * 16
            )
        )
        assert found.count("OK") == 1
        await two.auth(client.member.who).IssueToken(requests[1])
    async with running(tmp_path / "three", url=migrated_url, seal_keys=keys) as three:
        for request in requests:
            call = three.auth(client.member.who).IssueToken(request)
            assert await reason(call) == "CLIENT_AUTHENTICATION_FAILED"


@pytest.mark.asyncio(loop_scope="module")
async def test_an_api_key_bounds_what_its_client_gets(hall: Hall) -> None:
    client = hall.applicants["api_key"]
    answer = await hall.ask(client, "client_credentials", client.offers("api_key"))
    assert answer.scopes == ["read"]
    request = issue_request(client.member.client_id, scopes=["write"])
    metadata = client.offers("api_key")[0]
    call = hall.server.auth(client.member.who).IssueToken(request, metadata=metadata)
    assert await reason(call) == "SCOPE_NOT_ALLOWED"
