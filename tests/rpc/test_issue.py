"""IssueToken over the wire: every refusal beside its nearest success, and what a token says."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict

from authsvc.keys.secrets import CLIENT_SECRET_PREFIX, new_secret
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ISSUER,
    Member,
    Running,
    build,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    spiffe,
    thumbprint,
)

ORDERS, BILLING = "https://orders.test", "urn:billing"
SECRET_POST = clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST
BY_TLS = clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH


@dataclass(frozen=True)
class Cast:
    """Who is there."""

    one: Member
    """Scopes on one resource."""
    two: Member
    """Scopes on two resources and on authsvc."""
    secret: Member
    """Authenticates by secret, over anybody's connection."""
    both: Member
    """May use its certificate or its secret."""
    idle: Member
    """Has no scope."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cast(server: Running) -> AsyncIterator[Cast]:
    await server.resource(ORDERS, "orders.read", "orders.write")
    await server.resource(BILLING, "billing.read", token_lifetime={"seconds": 60})
    await server.resource("https://closed.test", "closed.read")
    yield Cast(
        await server.member("one", "orders.read", "orders.write"),
        await server.member("two", "orders.read", "billing.read", "validate", "watch"),
        await server.member("secret", "orders.read", secret=True),
        await server.member(
            "both",
            "orders.read",
            tls_client_auth_san_uri=spiffe("both"),
            token_endpoint_auth_methods=[SECRET_POST, BY_TLS],
        ),
        await server.member("idle"),
    )


# --- who asks ---


async def test_certificate_of_the_client_is_its_credential(server: Running, cast: Cast) -> None:
    request = issue_request(cast.one.client_id)
    assert await outcome(server.auth(cast.one.who).IssueToken(request)) == "OK"
    for who in (cast.two.who, cast.secret.who, identity("stranger")):
        refused = await failure(server.auth(who).IssueToken(request))
        assert refused.reason == "CLIENT_AUTHENTICATION_FAILED"


async def test_wrong_credential_and_unknown_client_look_alike(server: Running, cast: Cast) -> None:
    """RFC 6749 section 5.2: a guess at ids learns nothing."""
    other = new_secret(CLIENT_SECRET_PREFIX)
    tries = [
        issue_request(client_id, secret=secret)
        for client_id in (cast.secret.client_id, cast.both.client_id, cast.one.client_id, "nobody")
        for secret in ("", other, "x", other[:-1], other + "x", "ü" * 9)
        if secret
    ]
    tries.append(issue_request("nobody"))
    tries.append(issue_request(cast.secret.client_id, secret=cast.secret.secret[:-7] + "x" * 7))
    seen = set()
    for request in tries:
        refused = await failure(server.auth(cast.two.who).IssueToken(request))
        seen.add((refused.code, refused.reason, refused.text, tuple(refused.metadata)))
    assert seen == {
        ("UNAUTHENTICATED", "CLIENT_AUTHENTICATION_FAILED", "client authentication failed", ())
    }
    good = issue_request(cast.secret.client_id, secret=cast.secret.secret)
    assert await outcome(server.auth(cast.two.who).IssueToken(good)) == "OK"


async def test_secret_beside_a_certificate_makes_the_certificate_no_credential(
    server: Running, cast: Cast
) -> None:
    auth = server.auth(cast.both.who)
    wrong = issue_request(cast.both.client_id, secret=new_secret(CLIENT_SECRET_PREFIX))
    assert await reason(auth.IssueToken(wrong)) == "CLIENT_AUTHENTICATION_FAILED"
    for request in (
        issue_request(cast.both.client_id),
        issue_request(cast.both.client_id, secret=cast.both.secret),
    ):
        assert await outcome(auth.IssueToken(request)) == "OK"


async def test_method_that_is_not_registered_is_named_to_who_proved_it(
    server: Running, cast: Cast
) -> None:
    unused = await server.member(
        "unused",
        "orders.read",
        tls_client_auth_san_uri=spiffe("unused"),
        token_endpoint_auth_methods=[SECRET_POST],
    )
    refused = await failure(server.auth(unused.who).IssueToken(issue_request(unused.client_id)))
    assert refused.reason == "AUTH_METHOD_NOT_REGISTERED"
    assert refused.metadata == {"method": "TLS_CLIENT_AUTH"}
    stranger = server.auth(identity("stranger"))
    assert await reason(stranger.IssueToken(issue_request(unused.client_id))) == (
        "CLIENT_AUTHENTICATION_FAILED"
    )
    await server.token(unused, secret=True)


async def test_two_ways_at_once_are_refused(server: Running, cast: Cast) -> None:
    request = issue_request(cast.both.client_id, secret=cast.both.secret)
    auth = server.auth(cast.both.who)
    given = (("authorization", "Basic YTpi"),)
    assert await reason(auth.IssueToken(request, metadata=given)) == "AUTH_METHOD_AMBIGUOUS"
    assert await outcome(auth.IssueToken(request)) == "OK"


@pytest.mark.parametrize("step", ["pending", "rejected", "suspended", "expired", "approved"])
async def test_client_that_is_not_let_in_hears_its_own_reason(tmp_path: Path, step: str) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        await server.resource(ORDERS, "orders.read")
        member = await server.member("client", "orders.read", approve=False)
        clients, client_id = server.clients(), member.client_id
        if step == "rejected":
            await clients.RejectClient(clients_pb2.RejectClientRequest(client_id=client_id))
        elif step != "pending":
            expiry = {"seconds": int(server.clock.wall()) + 60}
            await server.approve(
                client_id, **({"approval_expire_time": expiry} if step == "expired" else {})
            )
            await server.token(member)
        if step == "suspended":
            await server.suspend(client_id)
        await server.advance(61)
        found = await outcome(server.auth(member.who).IssueToken(issue_request(client_id)))
        assert found == ("OK" if step == "approved" else f"CLIENT_{step.upper()}")
        # The same before the credential is proved: nobody else learns the state.
        other = server.auth(identity("other")).IssueToken(issue_request(client_id))
        assert await reason(other) == "CLIENT_AUTHENTICATION_FAILED"


# --- what is asked ---


async def test_grants_that_are_not_built_say_so(server: Running, cast: Cast) -> None:
    auth = server.auth(cast.one.who)
    grants = auth_pb2.IssueTokenRequest.DESCRIPTOR.oneofs_by_name["grant"].fields
    assert len(grants) == 6
    for grant in grants:
        request = build(
            auth_pb2.IssueTokenRequest, client_id=cast.one.client_id, **{grant.name: {}}
        )
        if grant.name == "client_credentials":
            assert await outcome(auth.IssueToken(request)) == "OK"
            continue
        if grant.name in ("token_exchange", "password"):
            assert await reason(auth.IssueToken(request)) == "FIELD_INVALID"
            continue
        refused = await failure(auth.IssueToken(request))
        assert refused.reason == "NOT_IMPLEMENTED"
        assert refused.metadata == {"feature": f"grant {grant.name}"}
    nothing = auth_pb2.IssueTokenRequest(client_id=cast.one.client_id)
    assert await reason(auth.IssueToken(nothing)) == "GRANT_MISSING"


async def test_fields_that_are_not_built_say_so(server: Running, cast: Cast) -> None:
    auth = server.auth(cast.one.who)
    dpop = issue_request(cast.one.client_id, dpop_proof="x.y.z")
    refresh = auth_pb2.RefreshTokenRequest(
        refresh_token="x", client_id=cast.one.client_id, dpop_proof="x.y.z"
    )
    for call in (auth.IssueToken(dpop), auth.RefreshToken(refresh)):
        refused = await failure(call)
        assert (refused.reason, refused.metadata) == ("NOT_IMPLEMENTED", {"feature": "dpop_proof"})


@pytest.mark.parametrize(
    ("who", "scopes", "resources", "expected"),
    [
        # scopes
        ("one", [], [], [ORDERS, "orders.read", "orders.write"]),
        ("one", ["orders.read"], [], [ORDERS, "orders.read"]),
        ("one", ["orders.write", "orders.read"], [], [ORDERS, "orders.read", "orders.write"]),
        ("one", ["nobodys"], [], "SCOPE_UNKNOWN scope=nobodys"),
        ("one", ["orders.read", "nobodys"], [], "SCOPE_UNKNOWN scope=nobodys"),
        ("one", ["closed.read"], [], "SCOPE_NOT_ALLOWED scope=closed.read"),
        ("one", ["billing.read"], [BILLING], "SCOPE_NOT_ALLOWED scope=billing.read"),
        ("one", ["orders.read", "orders.read"], [], "FIELD_INVALID"),
        ("one", ["orders.read orders.write"], [], "SCOPE_UNKNOWN scope=orders.read orders.write"),
        ("one", ["Orders.read"], [], "SCOPE_UNKNOWN scope=Orders.read"),
        # resources
        ("one", [], [ORDERS], [ORDERS, "orders.read", "orders.write"]),
        ("one", ["orders.read"], [ORDERS], [ORDERS, "orders.read"]),
        ("one", [], ["https://nobody.test"], "INVALID_TARGET resource=https://nobody.test"),
        ("one", [], ["https://closed.test"], "INVALID_TARGET resource=https://closed.test"),
        ("one", [], [BILLING], f"INVALID_TARGET resource={BILLING}"),
        ("one", [], [ORDERS, BILLING], f"INVALID_TARGET resource={BILLING}"),
        ("one", [], [ORDERS + "/"], f"INVALID_TARGET resource={ORDERS}/"),
        ("one", [], [ORDERS, ORDERS], "FIELD_INVALID"),
        ("one", [], [ISSUER], f"INVALID_TARGET resource={ISSUER}"),
        # of two resources
        ("two", [], [], "INVALID_TARGET"),
        ("two", ["orders.read", "billing.read"], [], "INVALID_TARGET"),
        ("two", [], [ORDERS], [ORDERS, "orders.read"]),
        ("two", ["billing.read"], [], [BILLING, "billing.read"]),
        ("two", [], [ORDERS, BILLING], [ORDERS, BILLING, "billing.read", "orders.read"]),
        (
            "two",
            ["orders.read", "billing.read"],
            [BILLING, ORDERS],
            [ORDERS, BILLING, "billing.read", "orders.read"],
        ),
        ("two", ["orders.read", "billing.read"], [ORDERS], "INVALID_TARGET"),
        ("two", ["orders.read"], [BILLING], "INVALID_TARGET"),
        ("two", ["orders.read"], [ORDERS, BILLING], f"INVALID_TARGET resource={BILLING}"),
        # authsvc itself stands alone
        ("two", ["validate"], [], [ISSUER, "validate"]),
        ("two", [], [ISSUER], [ISSUER, "validate", "watch"]),
        ("two", [], [ISSUER, ORDERS], f"INVALID_TARGET resource={ISSUER}"),
        ("two", ["validate", "orders.read"], [], "INVALID_TARGET"),
        # nothing to ask for
        ("idle", [], [], "INVALID_TARGET"),
        ("idle", [], [ORDERS], f"INVALID_TARGET resource={ORDERS}"),
        ("idle", ["orders.read"], [], "SCOPE_NOT_ALLOWED scope=orders.read"),
    ],
)
async def test_scopes_and_resources(
    server: Running,
    cast: Cast,
    who: str,
    scopes: list[str],
    resources: list[str],
    expected: str | list[str],
) -> None:
    member: Member = getattr(cast, who)
    call = server.auth(member.who).IssueToken(
        issue_request(member.client_id, scopes=scopes, resources=resources)
    )
    if isinstance(expected, list):
        token = (await call).token
        assert [*token.audiences, *token.scopes] == expected
        return
    refused = await failure(call)
    told = "".join(f" {key}={value}" for key, value in refused.metadata.items())
    assert refused.reason + told == expected


# --- what a token says ---


async def test_token_verifies_with_bare_pyjwt_and_says_what_the_design_says(
    tmp_path: Path,
) -> None:
    """RFC 9068 section 2, as a resource server without a line of ours reads it."""
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        await server.resource(ORDERS, "orders.read", "orders.write")
        member = await server.member("orders", "orders.read", "orders.write")
        before, head = int(clock.wall()), await server.head()
        first = await server.token(member)
        # A change of something else: the next token's `rev` is the revision before it was made.
        await server.resource("https://later.test", "later")
        second = await server.token(member)
        keys = (await server.auth(member.who).GetKeys(auth_pb2.GetKeysRequest())).keys
        for token, revision in ((first, head), (second, head + 1)):
            header = jwt.get_unverified_header(token.access_token)
            assert header == {"alg": "ES256", "kid": keys[0].kid, "typ": "at+jwt"}
            (found,) = [MessageToDict(key) for key in keys if key.kid == header["kid"]]
            assert {name: found[name] for name in ("kty", "crv", "alg", "use")} == {
                "kty": "EC",
                "crv": "P-256",
                "alg": "ES256",
                "use": "sig",
            }
            claims = jwt.decode(
                token.access_token,
                jwt.PyJWK(found),
                algorithms=["ES256"],
                audience=ORDERS,
                issuer=ISSUER,
                options={"require": ["exp", "iat", "jti", "sub", "aud", "iss"]},
            )
            assert claims == {
                "iss": ISSUER,
                "sub": member.client_id,
                "client_id": member.client_id,
                "aud": ORDERS,
                "exp": before + 300,
                "iat": before,
                "jti": token.jti,
                "scope": "orders.read orders.write",
                "rev": revision,
                "cnf": {"x5t#S256": thumbprint(member.who)},
            }
        assert first.jti != second.jti
        assert first.token_type == "Bearer"
        assert first.expire_time.seconds == before + 300
        assert first.expires_in.seconds == 300
        assert not first.refresh_token
        assert not first.issued_token_type


def _claims(token: auth_pb2.IssuedToken) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token.access_token, options={"verify_signature": False})
    return claims


async def test_two_audiences_are_a_list_and_the_shorter_life_holds(
    server: Running, cast: Cast
) -> None:
    both = await server.token(cast.two, resources=[BILLING, ORDERS])
    one = await server.token(cast.two, resources=[ORDERS])
    assert _claims(both)["aud"] == [ORDERS, BILLING]
    assert _claims(one)["aud"] == ORDERS
    assert both.expires_in.seconds == 60
    assert one.expires_in.seconds == 300


async def test_token_is_bound_where_the_client_registered_it(server: Running) -> None:
    """RFC 8705 section 3.4: by default for clients with a certificate, else where asked for."""
    named = {"tls_client_auth_san_uri": spiffe("bind")}
    cases: list[tuple[dict[str, Any], bool, bool]] = [
        ({"tls_client_auth_san_uri": spiffe("bind1")}, False, True),
        (
            {
                "tls_client_auth_san_uri": spiffe("bind2"),
                "tls_client_certificate_bound_access_tokens": False,
            },
            False,
            False,
        ),
        ({"secret": True}, True, False),
        ({"secret": True, "tls_client_certificate_bound_access_tokens": True}, True, True),
        (
            {
                **named,
                "token_endpoint_auth_methods": [SECRET_POST],
            },
            True,
            True,
        ),
    ]
    for number, (metadata, by_secret, bound) in enumerate(cases, 1):
        member = await server.member(f"bind{number}", "validate", **metadata)
        token = await server.token(member, secret=by_secret)
        expected = {"x5t#S256": thumbprint(member.who)} if bound else None
        assert _claims(token).get("cnf") == expected, metadata


async def test_rev_is_the_revision_before_the_client_was_read(tmp_path: Path) -> None:
    """design section 5: a cutoff that comes while a token is made kills it."""
    async with running(tmp_path, clock=hand_clock()) as server:
        await server.resource(ORDERS, "orders.read")
        member = await server.member("racing", "orders.read")
        tokens = []

        async def issuing() -> None:
            while True:
                try:
                    tokens.append(await server.token(member))
                except Exception:
                    return

        task = asyncio.create_task(issuing())
        while len(tokens) < 20:  # noqa: ASYNC110
            await asyncio.sleep(0)
        revision = (await server.suspend(member.client_id)).revision
        await task
        assert len(tokens) >= 20
        assert all(_claims(token)["rev"] < revision for token in tokens)


async def test_claims_hold_no_name_of_the_machine_or_the_certificate(
    server: Running, cast: Cast
) -> None:
    text = json.dumps(_claims(await server.token(cast.one)))
    assert "spiffe" not in text
    assert "localhost" not in text
