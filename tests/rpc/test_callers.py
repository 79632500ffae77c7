"""Whose certificate counts for what: expiry, several CAs, and names of other kinds."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from authsvc_client.v1 import auth_pb2, clients_pb2
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from tests.harness import (
    ADMIN,
    CA,
    NOW,
    SECOND_CA,
    Member,
    Running,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    spiffe,
    thumbprint,
    to_the_end,
)

HOUR = 3600.0
LIST = clients_pb2.ListClientsRequest()
KEYS = auth_pb2.GetKeysRequest()
VALIDATE = auth_pb2.ValidateTokenRequest(token="x")


async def test_certificate_that_expires_on_an_open_connection_is_refused_at_the_next_call(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        await server.resource("https://a.test", "a")
        short = identity("short", span=(NOW - HOUR, NOW + HOUR))
        member = await server.member("short", "validate", "a", who=short)
        auth = server.auth(short)
        calls: list[Any] = [
            lambda: auth.GetKeys(KEYS),
            lambda: auth.ValidateToken(VALIDATE),
            lambda: auth.IssueToken(issue_request(member.client_id, scopes=["a"])),
            lambda: auth.RevokeToken(auth_pb2.RevokeTokenRequest(token="x")),
        ]
        await server.advance(HOUR - 1)
        for call in calls:
            assert await outcome(call()) == "OK"
        await server.advance(2)
        for call in calls:
            assert await reason(call()) == "PEER_CERTIFICATE_EXPIRED"
        assert await outcome(server.auth(ADMIN).GetKeys(KEYS)) == "OK"


async def test_stream_ends_where_the_certificate_expires(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        short = identity("short", span=(NOW - HOUR, NOW + HOUR))
        member = await server.member("short", "watch", who=short)
        lasting = await server.member("lasting", "watch")
        streams = [
            server.auth(who).WatchChanges(auth_pb2.WatchChangesRequest())
            for who in (member.who, lasting.who)
        ]
        for stream in streams:
            await stream.read()
        await server.advance(HOUR + 1)
        assert await reason(to_the_end(streams[0])) == "PEER_CERTIFICATE_EXPIRED"
        streams[1].cancel()


async def test_stream_ends_where_its_client_is_suspended(server: Running) -> None:
    watchers = [await server.member(name, "watch") for name in ("suspended", "not_suspended")]
    streams = [
        server.auth(watcher.who).WatchChanges(auth_pb2.WatchChangesRequest())
        for watcher in watchers
    ]
    for stream in streams:
        await stream.read()
    await server.suspend(watchers[0].client_id)
    assert await reason(to_the_end(streams[0])) == "CLIENT_SUSPENDED"
    for _ in range(5):
        assert await streams[1].read()
    streams[1].cancel()


# --- more than one client CA ---


def _other(name: str) -> Any:
    """The same SPIFFE ID by the other CA of the listener."""
    return identity(name, ca=SECOND_CA)


async def test_another_trusted_ca_is_not_the_pinned_one(tmp_path: Path) -> None:
    """RFC 8705 section 2.1; the pinned CA's certificate in the chain proves nothing."""
    async with running(tmp_path, client_cas=(CA, SECOND_CA), admin_ca=CA.pin) as server:
        await server.resource("https://a.test", "a")
        orders = identity("orders")
        made = await server.register(
            orders,
            scopes=["a", "validate"],
            tls_client_auth_san_uri=spiffe("orders"),
            tls_client_auth_ca=CA.pin,
        )
        await server.approve(made.client.client_id)
        member = Member(orders, made.client.client_id)
        bound = await server.token(member, "a")
        request = issue_request(member.client_id, scopes=["a"])
        for chain in (b"", CA.pem, CA.pem + SECOND_CA.pem, orders.pem, orders.pem + CA.pem):
            attacker = server.auth(_other("orders"), chain)
            assert await outcome(attacker.GetKeys(KEYS)) == "OK"  # a verified peer, nothing more
            assert await reason(attacker.IssueToken(request)) == "CLIENT_AUTHENTICATION_FAILED"
            assert await reason(attacker.ValidateToken(VALIDATE)) == "CALLER_UNKNOWN"
            revoke = auth_pb2.RevokeTokenRequest(
                token=bound.access_token, client_id=member.client_id
            )
            assert await reason(attacker.RevokeToken(revoke)) == "CLIENT_AUTHENTICATION_FAILED"
            assert await reason(attacker.RegisterClient(_registration("orders"))) == (
                "ALREADY_EXISTS"
            )
            pinned = _registration("new", tls_client_auth_ca=CA.pin)
            fresh = server.auth(_other("new"), chain)
            assert await reason(fresh.RegisterClient(pinned)) == "INVALID_CLIENT_METADATA"
            admin = server.channel(_other("admin"), chain)
            assert await reason(_list(admin)) == "CALLER_UNKNOWN"
        assert await outcome(server.auth(orders).IssueToken(request)) == "OK"
        assert await outcome(server.auth(orders, CA.pem).IssueToken(request)) == "OK"
        assert await outcome(_list(server.channel(ADMIN))) == "OK"
        mine = _registration("new", tls_client_auth_ca=SECOND_CA.pin)
        answer = await server.auth(_other("new")).RegisterClient(mine)
        assert answer.client.metadata.tls_client_auth_ca == SECOND_CA.pin


def _list(channel: Any) -> Any:
    return ClientServiceStub(channel).ListClients(LIST)


def _registration(name: str, **more: Any) -> auth_pb2.RegisterClientRequest:
    metadata = clients_pb2.ClientMetadata(
        client_name=name, tls_client_auth_san_uri=spiffe(name), **more
    )
    return auth_pb2.RegisterClientRequest(metadata=metadata)


@pytest.mark.parametrize(
    ("cas", "admin_ca", "admitted"),
    [
        ((CA,), "", [True, False]),
        ((CA, SECOND_CA), "", [False, False]),
        ((CA, SECOND_CA), CA.pin, [True, False]),
        ((CA, SECOND_CA), SECOND_CA.pin, [False, True]),
        ((CA, SECOND_CA), "0" * 64, [False, False]),
    ],
    ids=["one", "two", "two_and_first", "two_and_second", "two_and_unknown"],
)
async def test_administrators_of_the_settings_come_from_one_ca(
    tmp_path: Path, cas: tuple[Any, ...], admin_ca: str, admitted: list[bool]
) -> None:
    async with running(tmp_path, client_cas=cas, admin_ca=admin_ca) as server:
        found = []
        for who in (identity("admin"), _other("admin")):
            for chain in (b"", CA.pem, SECOND_CA.pem):
                said = await outcome(_list(server.channel(who, chain)))
                found.append(said == "OK")
                assert said in ("OK", "CALLER_UNKNOWN", "UNAVAILABLE")
        assert found == [admitted[0]] * 3 + [admitted[1]] * 3


async def test_client_ca_that_is_gone_takes_its_clients_along(tmp_path: Path) -> None:
    async with running(tmp_path, client_cas=(CA, SECOND_CA), admin_ca=CA.pin) as server:
        who = _other("late")
        made = await server.register(
            who, by=who, tls_client_auth_san_uri=spiffe("late"), scopes=["validate"]
        )
        await server.approve(made.client.client_id)
        auth = server.auth(who)
        assert await outcome(auth.ValidateToken(VALIDATE)) == "OK"
        (tmp_path / "clients.pem").write_bytes(CA.pem)
        async with asyncio.timeout(20):
            while await outcome(auth.GetKeys(KEYS)) == "OK":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await reason(auth.ValidateToken(VALIDATE)) == "PEER_CERTIFICATE_INVALID"
        assert await outcome(_list(server.channel(ADMIN))) == "OK"


# --- names of other kinds ---


async def test_dns_client_is_found_without_case(server: Running) -> None:
    await server.resource("https://dns.test", "dns.read")
    one = identity(dns=("Host.Example.COM",))
    made = await server.register(
        one,
        by=one,
        tls_client_auth_san_dns="HOST.example.com",
        scopes=["dns.read", "validate"],
    )
    assert made.client.metadata.tls_client_auth_san_dns == "host.example.com"
    await server.approve(made.client.client_id)
    request = issue_request(made.client.client_id, scopes=["dns.read"])
    for names in (("host.example.com",), ("HOST.EXAMPLE.COM", "more.example.com")):
        auth = server.auth(identity(dns=names))
        assert await outcome(auth.IssueToken(request)) == "OK"
        assert await outcome(auth.ValidateToken(VALIDATE)) == "OK"
    for names in (("other.example.com",), ("x.host.example.com",), ("*.example.com",)):
        auth = server.auth(identity(dns=names))
        assert await reason(auth.IssueToken(request)) == "CLIENT_AUTHENTICATION_FAILED"
        assert await reason(auth.ValidateToken(VALIDATE)) == "CALLER_UNKNOWN"


async def test_subject_client_is_found_by_its_whole_name(server: Running) -> None:
    one = identity(uris=(), subject="batch, Inc.")
    made = await server.register(
        one, by=one, tls_client_auth_subject_dn=r"CN=batch\, Inc.", scopes=["validate"]
    )
    await server.approve(made.client.client_id)
    assert await outcome(server.auth(one).ValidateToken(VALIDATE)) == "OK"
    again = identity(uris=(), subject="batch, Inc.")
    assert await outcome(server.auth(again).ValidateToken(VALIDATE)) == "OK"
    for subject in ("batch", "Batch, Inc.", "batch, Inc"):
        other = server.auth(identity(uris=(), subject=subject))
        assert await reason(other.ValidateToken(VALIDATE)) == "CALLER_UNKNOWN"


async def test_two_uris_are_nobody(server: Running) -> None:
    """X509-SVID section 2: exactly one URI SAN."""
    member = await server.member("twin", "validate")
    both = identity(uris=(spiffe("twin"), spiffe("other")))
    request = issue_request(member.client_id)
    for call in (
        server.auth(both).GetKeys(KEYS),
        server.auth(both).ValidateToken(VALIDATE),
        server.auth(both).IssueToken(request),
        server.auth(both).RegisterClient(_registration("other")),
    ):
        assert await reason(call) == "PEER_CERTIFICATE_INVALID"
    assert await outcome(server.auth(member.who).ValidateToken(VALIDATE)) == "OK"


async def test_name_of_another_kind_with_the_same_text_is_another_name(server: Running) -> None:
    await server.member("kinds", "validate", tls_client_auth_san_dns="kinds.example.com")
    as_subject = identity(uris=(), subject="kinds.example.com")
    assert await reason(server.auth(as_subject).ValidateToken(VALIDATE)) == "CALLER_UNKNOWN"
    as_dns = identity(dns=("kinds.example.com",))
    assert await outcome(server.auth(as_dns).ValidateToken(VALIDATE)) == "OK"


async def test_certificate_is_a_credential_only_where_its_method_is_registered(
    server: Running,
) -> None:
    """design section 7: per client exactly the methods it registered."""
    only_secret = await server.member(
        "only_secret",
        "validate",
        tls_client_auth_san_uri=spiffe("only_secret"),
        token_endpoint_auth_methods=[clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST],
    )
    assert await reason(server.auth(only_secret.who).ValidateToken(VALIDATE)) == "CALLER_UNKNOWN"
    both = await server.member(
        "both",
        "validate",
        tls_client_auth_san_uri=spiffe("both"),
        token_endpoint_auth_methods=[
            clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST,
            clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
        ],
    )
    assert await outcome(server.auth(both.who).ValidateToken(VALIDATE)) == "OK"


async def test_thumbprint_is_the_connections_own(server: Running) -> None:
    member = await server.member("thumb", "validate")
    token = await server.token(member, "validate")
    other = identity("thumb")  # the same client, renewed
    given = (("authorization", f"Bearer {token.access_token}"),)
    refused = await failure(server.auth(other).ValidateToken(VALIDATE, metadata=given))
    assert (refused.reason, refused.metadata) == (
        "CALLER_TOKEN_INVALID",
        {"verdict": "PROOF_MISMATCH"},
    )
    assert thumbprint(other) != thumbprint(member.who)
    assert await outcome(server.auth(member.who).ValidateToken(VALIDATE, metadata=given)) == "OK"


async def test_forwarded_certificate_of_a_stranger_is_no_certificate(server: Running) -> None:
    stranger = server.auth(identity("stranger"))
    for key in ("x-forwarded-client-cert", "x-client-cert", "x-ssl-client-s-dn"):
        given = ((key, f"By=x;URI={spiffe('admin')}"),)
        call = server.clients(identity("stranger")).ListClients(LIST, metadata=given)
        assert await reason(call) == "CALLER_UNKNOWN"
    assert await outcome(stranger.GetKeys(KEYS)) == "OK"
