"""A client by its registration access token (RFC 7592): what it may, and what ends that."""

import asyncio
from typing import Any

import pytest

from authsvc_client.v1 import auth_pb2, clients_pb2, revocations_pb2
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.harness import (
    ADMIN,
    CA,
    Member,
    Running,
    build,
    identity,
    issue_request,
    named,
    outcome,
    reason,
    spiffe,
)
from tests.rpc.conftest import API
from tests.rpc.test_authentication import JWKS
from tests.rpc.test_clients import APPROVED, PENDING, POST, Own, alive, by_secret, client, update

CREDENTIALS = clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS
EXCHANGE = clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE
TLS = clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH


async def own_client(server: Running, name: str, *scopes: str, approve: bool = True) -> Own:
    who = identity(name)
    made = await server.register(who, by=who, scopes=scopes, client_uri="https://x.test")
    if approve:
        await server.approve(made.client.client_id)
    return Own(server, who, made)


async def test_a_client_reads_itself_by_its_token(at: Running) -> None:
    """RFC 7592 section 2.1; the token is its client's alone."""
    one, two = [await own_client(at, name, "read") for name in ("one", "two")]
    assert (await one.get()).client_id == one.client_id
    assert (await two.get()).client_id == two.client_id
    for token in ("x", one.token[:-1], one.token + "a", one.token.swapcase()):
        request = clients_pb2.GetOwnClientRequest(registration_access_token=token)
        assert await reason(one.stub.GetOwnClient(request)) == "REGISTRATION_TOKEN_INVALID"


async def test_a_client_that_asks_for_less_or_says_other_things_stays_as_it_is(
    at: Running,
) -> None:
    """RFC 7592 section 2.2: all the metadata are replaced."""
    own = await own_client(at, "own", "read", "write")
    same = {"tls_client_auth_san_uri": spiffe("own")}
    member = Member(own.who, own.client_id)
    token = await at.token(member)
    changed = await own.update(scopes=["read", "write"], tos_uri="https://tos.test", **same)
    assert (changed.state, changed.metadata.client_uri) == (APPROVED, "")
    assert changed.metadata.tos_uri == "https://tos.test"
    assert await alive(at, token, member) == "OK"
    less = await own.update(scopes=["read"], **same)
    assert less.state == APPROVED
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"
    await at.token(member)
    assert (await own.get()).metadata.scopes == ["read"]  # its token survived its own cutoff


@pytest.mark.parametrize(
    "more",
    [
        {"scopes": ["read", "write"]},
        {"grant_types": [CREDENTIALS, EXCHANGE]},
        {"token_endpoint_auth_methods": [TLS, POST]},
        {"jwks": JWKS},
        {"tls_client_certificate_bound_access_tokens": False},
    ],
    ids=named,
)
async def test_a_client_that_asks_for_more_waits_again(at: Running, more: dict[str, Any]) -> None:
    own = await own_client(at, "own", "read")
    member = Member(own.who, own.client_id)
    token = await at.token(member)
    asked = {"scopes": ["read"], "tls_client_auth_san_uri": spiffe("own")} | more
    changed = await own.update(**asked)
    assert changed.state == PENDING
    assert await reason(at.token(member)) == "CLIENT_PENDING"
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"
    assert (await own.get()).state == PENDING
    await at.approve(own.client_id)
    await at.token(member)
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"


async def test_what_a_client_may_not_make_of_itself(at: Running) -> None:
    own, other = [await own_client(at, name, "read") for name in ("own", "other")]
    same: dict[str, Any] = {"scopes": ["read"], "tls_client_auth_san_uri": spiffe("own")}
    assert await reason(own.update(validates=["*"], **same)) == "REGISTRATION_NOT_ALLOWED"
    stranger = {**same, "tls_client_auth_san_uri": spiffe("stranger")}
    assert await reason(own.update(**stranger)) == "REGISTRATION_NOT_ALLOWED"
    assert await reason(own.update(other.client_id, **same)) == "REGISTRATION_TOKEN_INVALID"
    assert await reason(own.update(**{**same, "scopes": ["no"]})) == "INVALID_CLIENT_METADATA"
    assert (await own.get()).etag == "2"
    assert (await other.get()).etag == "2"


@pytest.mark.parametrize("event", ["client", "everything", "suspended", "rejected", "deleted"])
async def test_what_kills_a_registration_access_token(at: Running, event: str) -> None:
    own = await own_client(at, "own", "read", approve=event != "rejected")
    revocations = RevocationServiceStub(at.channel(ADMIN))
    await own.get()
    match event:
        case "client":
            request = revocations_pb2.RevokeClientRequest(client_id=own.client_id)
            await revocations.RevokeClient(request)
        case "everything":
            await revocations.RevokeEverything(revocations_pb2.RevokeEverythingRequest())
        case "suspended":
            await at.suspend(own.client_id)
            resume = clients_pb2.ResumeClientRequest(client_id=own.client_id)
            await at.clients().ResumeClient(resume)
        case "rejected":
            reject = clients_pb2.RejectClientRequest(client_id=own.client_id)
            await at.clients().RejectClient(reject)
        case "deleted":
            await own.delete()
    for call in (own.get(), own.update(), own.delete()):
        assert await reason(call) == "REGISTRATION_TOKEN_INVALID"


async def test_a_client_deletes_itself(at: Running) -> None:
    """RFC 7592 section 2.3."""
    own = await own_client(at, "own", "read")
    member = Member(own.who, own.client_id)
    token = await at.token(member)
    await own.delete()
    assert await reason(own.get()) == "REGISTRATION_TOKEN_INVALID"
    assert await reason(client(at, own.client_id)) == "CLIENT_NOT_FOUND"
    assert await alive(at, token, member) == "TOKEN_CUT_OFF"


async def test_the_token_of_another_is_worth_nothing(at: Running) -> None:
    """RFC 7592 section 2.2: the client_id must be that of the token's own client."""
    own, other = [await own_client(at, name, "read") for name in ("own", "other")]
    same: dict[str, Any] = {"scopes": ["read"], "tls_client_auth_san_uri": spiffe("other")}
    own_token, own.token = own.token, other.token
    assert await reason(own.update(**same)) == "REGISTRATION_TOKEN_INVALID"
    own.token = own_token
    assert await reason(own.update(other.client_id, **same)) == "REGISTRATION_TOKEN_INVALID"
    assert await reason(own.update(**same)) == "REGISTRATION_NOT_ALLOWED"  # the name of the other
    await own.delete()
    assert (await other.get()).metadata.tls_client_auth_san_uri == spiffe("other")


async def test_by_its_token_alone_a_client_is_not_its_certificate(at: Running) -> None:
    """Who stole the token over another certificate: it may say less, and gets no other name."""
    own, thief = await own_client(at, "own", "read"), identity("thief")
    own.who = thief
    same: dict[str, Any] = {"scopes": ["read"], "tls_client_auth_san_uri": spiffe("own")}
    assert (await own.update(**same)).state == APPROVED
    stolen = same | {"tls_client_auth_san_uri": spiffe("thief")}
    changed = await own.update(**stolen)  # its own name: a new review
    assert changed.state == PENDING
    request = issue_request(own.client_id)
    assert await reason(at.auth(thief).IssueToken(request)) == "CLIENT_PENDING"


async def test_all_that_is_left_out_takes_its_default(at: Running) -> None:
    """RFC 7592 section 2.2: this replaces, it does not augment."""
    who = identity("own")
    made = await at.register(
        who,
        scopes=["read"],
        contacts=["a@b.test"],
        tos_uri="https://tos.test",
        software_id="s",
        tls_client_certificate_bound_access_tokens=False,
        grant_types=[CREDENTIALS, EXCHANGE],
    )
    own = Own(at, who, made)
    changed = await own.update(client_name="bare", tls_client_auth_san_uri=spiffe("own"))
    assert changed.metadata == clients_pb2.ClientMetadata(
        client_name="bare",
        grant_types=[CREDENTIALS],
        token_endpoint_auth_methods=[TLS],
        tls_client_auth_san_uri=spiffe("own"),
        tls_client_auth_ca=CA.pin,
        tls_client_certificate_bound_access_tokens=True,
    )
    assert changed.client_id == own.client_id  # section 2.2: it is not changed
    assert changed.registrant == made.client.registrant
    assert changed.create_time == made.client.create_time


async def test_validates_stay_as_an_administrator_set_them(at: Running) -> None:
    who = identity("own")
    made = await at.register(who, scopes=["read"], validates=[API])
    await at.approve(made.client.client_id)
    own = Own(at, who, made)
    same: dict[str, Any] = {"scopes": ["read"], "tls_client_auth_san_uri": spiffe("own")}
    assert (await own.update(validates=[API], **same)).metadata.validates == [API]
    assert await reason(own.update(validates=[API, "*"], **same)) == "REGISTRATION_NOT_ALLOWED"
    assert not (await own.update(**same)).metadata.validates
    assert await reason(own.update(validates=[API], **same)) == "REGISTRATION_NOT_ALLOWED"


async def test_a_secret_is_made_where_a_method_newly_needs_one(at: Running) -> None:
    own = await own_client(at, "own", "read")
    request = clients_pb2.UpdateOwnClientRequest(
        registration_access_token=own.token,
        client_id=own.client_id,
        metadata=clients_pb2.ClientMetadata(
            client_name="own",
            scopes=["read"],
            tls_client_auth_san_uri=spiffe("own"),
            tls_client_certificate_bound_access_tokens=False,
            token_endpoint_auth_methods=[TLS, POST],
        ),
    )
    answer = await own.stub.UpdateOwnClient(request)
    assert answer.client_secret.startswith("asvc_cs_")
    again = await own.stub.UpdateOwnClient(request)  # shown once
    assert (again.client_secret, again.client.state) == ("", PENDING)
    await at.approve(own.client_id)
    await by_secret(at, Member(own.who, own.client_id), answer.client_secret)
    request.metadata.ClearField("token_endpoint_auth_methods")
    await own.stub.UpdateOwnClient(request)
    stored = await at.store.clients.get(own.client_id)
    assert stored is not None
    assert stored.secret_digest is None  # no method needs it any more


async def test_of_updates_of_its_own_at_once_none_is_lost(at: Running) -> None:
    own = await own_client(at, "own", "read")
    same: dict[str, Any] = {"scopes": ["read"], "tls_client_auth_san_uri": spiffe("own")}
    found = await asyncio.gather(
        *(outcome(own.update(software_version=str(n), **same)) for n in range(32))
    )
    assert set(found) <= {"OK", "ETAG_MISMATCH"}
    assert int((await own.get()).etag) == 2 + found.count("OK")


async def test_revoked_while_it_updates_itself_a_client_is_cut_off_for_good(at: Running) -> None:
    """Either the update came first, or the token is none any more."""
    revoke = revocations_pb2.RevokeClientRequest
    for number in range(8):
        own = await own_client(at, f"own{number}", "read", "write")
        same = {"tls_client_auth_san_uri": spiffe(f"own{number}")}
        stub = RevocationServiceStub(at.channel(ADMIN))
        _, found = await asyncio.gather(
            stub.RevokeClient(revoke(client_id=own.client_id)),
            outcome(own.update(scopes=["read"], **same)),
        )
        assert found in ("OK", "REGISTRATION_TOKEN_INVALID")
        assert await reason(own.get()) == "REGISTRATION_TOKEN_INVALID"


@pytest.mark.parametrize(
    "metadata",
    [
        {"client_name": "x" * 129},
        {"client_name": ""},
        {"jwks": "x" * 16385},
        {"contacts": ["x"] * 2},
        {"contacts": [str(n) for n in range(9)]},
        {"software_version": "x" * 65},
        {"scopes": [f"s{n}" for n in range(257)]},
        {"tls_client_auth_san_uri": "x" * 2049},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
async def test_metadata_have_limits_wherever_they_come(
    server: Running, metadata: dict[str, Any]
) -> None:
    own = await own_client(server, f"limits{id(metadata)}", "validate", approve=False)
    assert await reason(own.update(**metadata)) == "FIELD_INVALID"
    assert await reason(update(server, own.client_id, **metadata)) == "FIELD_INVALID"
    request = {"metadata": {"client_name": "x"} | metadata}
    call = server.auth(own.who).RegisterClient(build(auth_pb2.RegisterClientRequest, **request))
    assert await reason(call) == "FIELD_INVALID"
    assert (await own.get()).etag == "1"
