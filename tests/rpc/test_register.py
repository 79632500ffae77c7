"""RegisterClient over the wire: who may register what, and what is kept of it."""

from pathlib import Path
from typing import Any

import pytest

from authsvc.keys.secrets import digest
from authsvc.store.port import Store
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ADMIN,
    CA,
    Running,
    build,
    failure,
    hand_clock,
    identity,
    issue_request,
    named,
    outcome,
    reason,
    running,
    spiffe,
)
from tests.rpc.test_authentication import JWKS

GRANTS = clients_pb2.GrantType
METHODS = clients_pb2.ClientAuthMethod
PENDING = clients_pb2.CLIENT_STATE_PENDING


def _request(*, dry: bool = False, **metadata: Any) -> auth_pb2.RegisterClientRequest:
    metadata.setdefault("client_name", "test")
    return auth_pb2.RegisterClientRequest(
        metadata=clients_pb2.ClientMetadata(**metadata), validate_only=dry
    )


async def _count(server: Running) -> int:
    request = clients_pb2.ListClientsRequest(page_size=200)
    return len((await server.clients().ListClients(request)).clients)


# --- who ---


async def test_unknown_peer_registers_the_names_in_its_own_certificate_alone(
    server: Running,
) -> None:
    who = identity("newcomer", dns=("newcomer.test",))
    count = await _count(server)
    for metadata in (
        {"tls_client_auth_san_uri": spiffe("somebody")},
        {"tls_client_auth_san_uri": spiffe("admin")},
        {"tls_client_auth_san_dns": "somebody.test"},
        {"tls_client_auth_subject_dn": "CN=somebody"},
        {"token_endpoint_auth_methods": [METHODS.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST]},
        {},
    ):
        call = server.auth(who).RegisterClient(_request(**metadata))
        assert await reason(call) == "REGISTRATION_NOT_ALLOWED", metadata
    assert await _count(server) == count
    answer = await server.auth(who).RegisterClient(
        _request(tls_client_auth_san_uri=spiffe("newcomer"))
    )
    assert answer.client.state == PENDING
    assert answer.client.registrant == spiffe("newcomer")
    assert answer.client.metadata.tls_client_auth_ca == CA.pin
    by_dns = await server.auth(identity(dns=("alone.test",))).RegisterClient(
        _request(tls_client_auth_san_dns="Alone.test")
    )
    assert by_dns.client.registrant == "alone.test"


async def test_administrators_and_registrars_register_any(server: Running) -> None:
    registrar = await server.member("registrar", "register")
    plain = await server.member("plain", "watch")
    for who, name, expected in (
        (ADMIN, "for_a", "OK"),
        (registrar.who, "for_b", "OK"),
        (plain.who, "for_c", "REGISTRATION_NOT_ALLOWED"),
    ):
        request = _request(tls_client_auth_san_uri=spiffe(name))
        assert await outcome(server.auth(who).RegisterClient(request)) == expected
    answer = await server.auth(registrar.who).RegisterClient(_request())
    assert answer.client_secret
    assert answer.client.registrant == registrar.client_id


async def test_validates_is_set_by_administrators_alone(server: Running) -> None:
    await server.resource("https://val.test", "val.read")
    registrar = await server.member("val_registrar", "register")
    for number, (who, validates, expected) in enumerate(
        (
            (registrar.who, ["https://val.test"], "REGISTRATION_NOT_ALLOWED"),
            (registrar.who, ["*"], "REGISTRATION_NOT_ALLOWED"),
            (identity("val2"), ["*"], "REGISTRATION_NOT_ALLOWED"),
            (registrar.who, [], "OK"),
            (ADMIN, ["https://val.test", "*"], "OK"),
            (ADMIN, ["https://nobody.test"], "INVALID_CLIENT_METADATA"),
        )
    ):
        request = _request(tls_client_auth_san_uri=spiffe(f"val{number}"), validates=validates)
        assert await outcome(server.auth(who).RegisterClient(request)) == expected, number


async def test_bearer_with_the_scope_registers(server: Running) -> None:
    registrar = await server.member("bearer_registrar", "register", "watch")
    tokens = [(await server.token(registrar, s)).access_token for s in ("register", "watch")]
    for token, expected in zip(tokens, ("OK", "REGISTRATION_NOT_ALLOWED"), strict=True):
        call = server.auth(registrar.who).RegisterClient(
            _request(), metadata=(("authorization", f"Bearer {token}"),)
        )
        assert await outcome(call) == expected
    bad = server.auth(ADMIN).RegisterClient(_request(), metadata=(("authorization", "Bearer x"),))
    assert await reason(bad) == "CALLER_TOKEN_INVALID"


# --- twice ---


async def test_name_belongs_to_one_client(server: Running) -> None:
    who = identity("once", dns=("once.test",))
    request = _request(tls_client_auth_san_uri=spiffe("once"))
    first = await server.auth(who).RegisterClient(request)
    for dry in (False, True):
        again = _request(tls_client_auth_san_uri=spiffe("once"), dry=dry)
        for by in (who, ADMIN, identity("once")):
            refused = await failure(server.auth(by).RegisterClient(again))
            assert refused.reason == "ALREADY_EXISTS"
            assert refused.metadata == {"field": "metadata.tls_client_auth"}
    await server.approve(first.client.client_id)
    assert await reason(server.auth(who).RegisterClient(request)) == "ALREADY_EXISTS"
    await server.suspend(first.client.client_id)
    assert await reason(server.auth(who).RegisterClient(request)) == "ALREADY_EXISTS"


async def test_rejected_name_may_be_asked_for_again(server: Running) -> None:
    who = identity("again")
    request = _request(tls_client_auth_san_uri=spiffe("again"))
    first = (await server.auth(who).RegisterClient(request)).client
    reject = clients_pb2.RejectClientRequest(client_id=first.client_id)
    await server.clients().RejectClient(reject)
    second = (await server.auth(who).RegisterClient(request)).client
    assert first.client_id != second.client_id
    assert second.state == PENDING


async def test_clients_with_secrets_may_share_a_name_for_people(server: Running) -> None:
    ids = {
        (await server.auth(ADMIN).RegisterClient(_request(client_name="same"))).client.client_id
        for _ in range(3)
    }
    assert len(ids) == 3


# --- what is not built, or not right ---


async def test_grants_and_methods_that_are_not_built_say_so(server: Running) -> None:
    built = {
        "GRANT_TYPE_CLIENT_CREDENTIALS",
        "GRANT_TYPE_TOKEN_EXCHANGE",
        "GRANT_TYPE_PASSWORD",
        "CLIENT_AUTH_METHOD_CLIENT_SECRET_BASIC",
        "CLIENT_AUTH_METHOD_CLIENT_SECRET_POST",
        "CLIENT_AUTH_METHOD_PRIVATE_KEY_JWT",
        "CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH",
        "CLIENT_AUTH_METHOD_API_KEY",
    }
    for enum, field, prefix in (
        (GRANTS, "grant_types", "GRANT_TYPE_"),
        (METHODS, "token_endpoint_auth_methods", "CLIENT_AUTH_METHOD_"),
    ):
        for name, number in enum.items():
            metadata = {
                field: [number],
                "tls_client_auth_san_uri": spiffe("built"),
                "jwks": JWKS,
            }
            call = server.auth(ADMIN).RegisterClient(_request(dry=True, **metadata))
            if number == 0:
                assert await reason(call) == "FIELD_INVALID"
            elif name in built:
                assert await outcome(call) == "OK"
            elif name == "GRANT_TYPE_REFRESH_TOKEN":  # by itself there is nothing to refresh
                assert (await failure(call)).metadata == {"field": "grant_types"}
            else:
                refused = await failure(call)
                assert refused.reason == "NOT_IMPLEMENTED"
                feature = name.removeprefix(prefix).lower()
                assert refused.metadata["feature"].endswith(f" {feature}")


@pytest.mark.parametrize(
    ("metadata", "feature"),
    [
        ({"redirect_uris": ["https://a.test/cb"]}, "redirect_uris"),
        ({"jwks_uri": "https://a.test/jwks"}, "jwks_uri"),
        ({"software_statement": "x"}, "software_statement"),
    ],
    ids=str,
)
async def test_metadata_that_are_not_built_say_so(
    server: Running, metadata: dict[str, Any], feature: str
) -> None:
    count = await _count(server)
    refused = await failure(server.auth(ADMIN).RegisterClient(_request(**metadata)))
    assert (refused.reason, refused.metadata) == ("NOT_IMPLEMENTED", {"feature": feature})
    assert await _count(server) == count


@pytest.mark.parametrize(
    "request_id", ["short", "x" * 65, "with space", "gr\u00fc\u00dfe-gott", "a\0bcdefgh"]
)
async def test_request_id_has_a_form(server: Running, request_id: str) -> None:
    request = _request()
    request.request_id = request_id
    found = await failure(server.auth(ADMIN).RegisterClient(request))
    assert (found.reason, found.fields) == ("FIELD_INVALID", ("request_id",))


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"tls_client_auth_san_uri": ""}, "tls_client_auth_san_uri"),
        ({"tls_client_auth_san_uri": "https://a.test"}, "tls_client_auth_san_uri"),
        ({"tls_client_auth_san_uri": "spiffe://test.local"}, "tls_client_auth_san_uri"),
        ({"tls_client_auth_san_uri": "SPIFFE://test.local/x"}, "tls_client_auth_san_uri"),
        ({"tls_client_auth_san_uri": "spiffe://test.local/a/../b"}, "tls_client_auth_san_uri"),
        ({"tls_client_auth_san_uri": "spiffe://test.local/ü"}, "tls_client_auth_san_uri"),
        ({"tls_client_auth_san_dns": ""}, "tls_client_auth_san_dns"),
        ({"tls_client_auth_subject_dn": ""}, "tls_client_auth_subject_dn"),
        ({"tls_client_auth_ca": CA.pin}, "tls_client_auth_ca"),
        (
            {"tls_client_auth_san_uri": spiffe("x"), "tls_client_auth_ca": "0" * 64},
            "tls_client_auth_ca",
        ),
        (
            {"tls_client_auth_san_uri": spiffe("x"), "tls_client_auth_ca": CA.pin.upper()},
            "tls_client_auth_ca",
        ),
        (
            {"token_endpoint_auth_methods": [METHODS.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH]},
            "token_endpoint_auth_methods",
        ),
        ({"scopes": ["nobodys"]}, "scopes"),
        ({"validates": ["https://nobody.test"]}, "validates"),
    ],
    ids=named,
)
async def test_metadata_that_are_not_right_are_named(
    server: Running, metadata: dict[str, Any], field: str
) -> None:
    """RFC 7591 section 3.2.2."""
    refused = await failure(server.auth(ADMIN).RegisterClient(_request(**metadata)))
    assert refused.reason == "INVALID_CLIENT_METADATA"
    assert refused.metadata == {"field": field}
    assert refused.fields == (f"metadata.{field}",)


async def test_nearest_metadata_are_taken(server: Running) -> None:
    for metadata in (
        {"tls_client_auth_san_uri": "spiffe://test.local/a.-_b/c"},
        {"tls_client_auth_san_uri": spiffe("near"), "tls_client_auth_ca": CA.pin},
        {"tls_client_auth_san_dns": "near.test"},
        {"tls_client_auth_subject_dn": "CN=near"},
        {"scopes": ["validate"], "validates": ["https://issuer.test"]},
    ):
        assert await outcome(server.auth(ADMIN).RegisterClient(_request(**metadata))) == "OK"


async def test_error_stays_readable_however_long_the_text_that_is_wrong(server: Running) -> None:
    """Trailers have limits of their own: past them the caller would see another error."""
    for text in ("x" * 512, "\U0001f511" * 512):
        for _ in range(20):
            refused = await failure(server.auth(ADMIN).RegisterClient(_request(validates=[text])))
            assert refused.reason == "INVALID_CLIENT_METADATA"
        deep = build(
            auth_pb2.IssueTokenRequest,
            client_id="x" * 65,
            client_credentials={},
            scopes=[text[:129]] * 2,
            resources=[text + "x"],
        )
        assert await reason(server.auth(ADMIN).IssueToken(deep)) == "FIELD_INVALID"


# --- what is kept ---


async def test_everything_said_is_kept_and_defaults_are_filled_in(server: Running) -> None:
    await server.resource("https://kept.test", "kept.read", "kept.write")
    asked = clients_pb2.ClientMetadata(
        client_name="Ünïcödé 🔑",
        grant_types=[GRANTS.GRANT_TYPE_CLIENT_CREDENTIALS],
        token_endpoint_auth_methods=[
            METHODS.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST,
            METHODS.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
        ],
        scopes=["kept.read", "kept.write"],
        tls_client_auth_san_uri=spiffe("kept"),
        tls_client_auth_ca=CA.pin,
        tls_client_certificate_bound_access_tokens=False,
        contacts=["a@kept.test", "b@kept.test"],
        client_uri="https://kept.test/",
        logo_uri="https://kept.test/logo",
        policy_uri="https://kept.test/policy",
        tos_uri="https://kept.test/tos",
        software_id="kept",
        software_version="1.2",
        validates=["https://kept.test"],
    )
    request = auth_pb2.RegisterClientRequest(metadata=asked)
    answer = await server.auth(ADMIN).RegisterClient(request)
    assert answer.client.metadata == asked
    get = clients_pb2.GetClientRequest(client_id=answer.client.client_id)
    assert (await server.clients().GetClient(get)).client == answer.client
    bare = (await server.auth(ADMIN).RegisterClient(_request())).client.metadata
    assert bare == clients_pb2.ClientMetadata(
        client_name="test",
        grant_types=[GRANTS.GRANT_TYPE_CLIENT_CREDENTIALS],
        token_endpoint_auth_methods=[METHODS.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST],
        tls_client_certificate_bound_access_tokens=False,
    )
    certified = await server.auth(ADMIN).RegisterClient(
        _request(tls_client_auth_san_uri=spiffe("certified"))
    )
    metadata = certified.client.metadata
    assert list(metadata.token_endpoint_auth_methods) == [
        METHODS.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH
    ]
    assert metadata.tls_client_certificate_bound_access_tokens
    assert not certified.client_secret


async def test_secret_is_shown_once_works_and_is_stored_as_a_digest(tmp_path: Path) -> None:
    stores: list[Store] = []

    def wrap(store: Store) -> Store:
        stores.append(store)
        return store

    async with running(tmp_path, clock=hand_clock(), wrap=wrap) as server:
        await server.resource("https://s.test", "s.read")
        made = await server.member("s", "s.read", secret=True)
        assert made.secret.startswith("asvc_cs_")
        await server.token(made, secret=True)
        stored = await stores[0].clients.get(made.client_id)
        assert stored is not None
        assert stored.secret_digest == digest(made.secret)
        assert made.secret not in repr(stored)
        get = clients_pb2.GetClientRequest(client_id=made.client_id)
        seen = [
            await server.clients().GetClient(get),
            await server.clients().ListClients(clients_pb2.ListClientsRequest()),
            await server.suspend(made.client_id),
        ]
        assert all(made.secret not in f"{answer}" for answer in seen)


async def test_validate_only_answers_and_changes_nothing(server: Running) -> None:
    count, head = await _count(server), await server.head()
    request = _request(tls_client_auth_san_uri=spiffe("dry"), dry=True)
    answer = await server.auth(identity("dry")).RegisterClient(request)
    assert not answer.client.client_id
    assert not answer.client_secret
    assert answer.client.metadata.tls_client_auth_san_uri == spiffe("dry")
    by_secret = await server.auth(ADMIN).RegisterClient(_request(dry=True))
    assert not by_secret.client_secret
    assert (await _count(server), await server.head()) == (count, head)
    request.validate_only = False
    assert (await server.auth(identity("dry")).RegisterClient(request)).client.client_id


async def test_pending_client_gets_no_token(server: Running) -> None:
    pending = await server.member("waits", "validate", approve=False)
    call = server.auth(pending.who).IssueToken(issue_request(pending.client_id))
    assert await reason(call) == "CLIENT_PENDING"
    await server.approve(pending.client_id)
    await server.token(pending)


async def test_registration_that_is_pending_takes_nothing_from_another_client(
    server: Running,
) -> None:
    """A name that two certificates share must not let one lock the other out."""
    victim = await server.member("victim", "validate", who=identity("victim", dns=("shared.test",)))
    validate = auth_pb2.ValidateTokenRequest(token="x")
    assert await outcome(server.auth(victim.who).ValidateToken(validate)) == "OK"
    attacker = identity("attacker", dns=("shared.test",))
    request = _request(tls_client_auth_san_dns="shared.test")
    assert await outcome(server.auth(attacker).RegisterClient(request)) == "OK"
    renewed = identity("victim", dns=("shared.test",))
    for who in (victim.who, renewed):
        assert await outcome(server.auth(who).ValidateToken(validate)) == "OK"


@pytest.mark.parametrize("field", ["client_id", "client_name", "tls_client_auth_subject_dn"])
async def test_text_that_no_database_can_hold_is_a_fault_of_the_request(
    tmp_path: Path, migrated_url: str, field: str
) -> None:
    """PostgreSQL has no NUL in a text."""
    async with running(tmp_path, url=migrated_url) as server:
        if field == "client_id":
            calls: Any = [
                server.auth(ADMIN).IssueToken(issue_request("x\0")),
                server.clients().GetClient(clients_pb2.GetClientRequest(client_id="x\0")),
                server.clients().ApproveClient(clients_pb2.ApproveClientRequest(client_id="x\0")),
                server.clients().ApproveClient(
                    clients_pb2.ApproveClientRequest(client_id="x", comment="\0")
                ),
                server.resource("https://nul.test", "nul", owner="x\0"),
                server.resource("https://nul.test", "nul", display_name="x\0"),
            ]
        else:
            named: dict[str, Any] = {field: "x\0"}
            calls = [server.auth(ADMIN).RegisterClient(_request(**named))]
        for call in calls:
            assert await reason(call) == "FIELD_INVALID"
        assert await outcome(server.auth(ADMIN).RegisterClient(_request(client_name="x\n"))) == "OK"
