"""Workloads of outside trust domains over a real listener: who vouches for whom, and rotation."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from authsvc.app import StartError, prepare
from authsvc.clock import SystemClock
from authsvc.config import load
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests import certs
from tests.certs import DAY, Issued
from tests.harness import (
    ADMIN,
    CA,
    NOW,
    SECOND_CA,
    TIMEOUT_S,
    Member,
    Running,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    settings_for,
    spiffe,
    thumbprint,
    to_the_end,
)

KEYS: Final = auth_pb2.GetKeysRequest()
VALIDATE: Final = auth_pb2.ValidateTokenRequest(token="x")
WATCH: Final = auth_pb2.WatchChangesRequest()
PIN: Final = "spiffe://partner.test"
BILLING: Final = f"{PIN}/billing"


def _ca(name: str, **more: Any) -> Issued:
    return certs.ca(name, span=(NOW - DAY, NOW + DAY), **more)


PARTNER: Final = _ca("Partner")
NEW_PARTNER: Final = _ca("Partner")
"""Of the same name, as SPIRE's are."""
RIVAL: Final = _ca("Rival")
MIDDLE: Final = _ca("Team", issuer=PARTNER)


def svid(ca: Issued = PARTNER, spiffe_id: str = BILLING, **more: Any) -> Issued:
    return identity(ca=ca, uris=(spiffe_id,), **more)


@asynccontextmanager
async def partnered(directory: Path, **settings: Any) -> AsyncIterator[Running]:
    """A server with the bundles of two partners."""
    bundles = {"partner.test": directory / "partner.json", "rival.test": directory / "rival.json"}
    write(directory, PARTNER)
    bundles["rival.test"].write_bytes(certs.bundle(RIVAL))
    settings |= {"bundles": bundles, "trust_domain": "test.local"}
    async with running(directory, **settings) as server:
        await server.resource("https://a.test", "a")
        yield server


def write(directory: Path, *cas: Issued) -> None:
    """The partner's bundle, at once."""
    (directory / "next").write_bytes(certs.bundle(*cas))
    (directory / "next").replace(directory / "partner.json")


def owners() -> list[tuple[Issued, dict[str, Any]]]:
    """Own clients by names that are no SPIFFE IDs."""
    return [
        (
            identity(dns=("orders.test.local",)),
            {"tls_client_auth_san_dns": "orders.test.local"},
        ),
        (identity(subject="orders"), {"tls_client_auth_subject_dn": "CN=orders"}),
    ]


async def joined(server: Running, who: Issued, *scopes: str) -> Member:
    """Registers with its own certificate, and is approved."""
    made = await server.register(who, by=who, scopes=scopes)
    await server.approve(made.client.client_id)
    return Member(who, made.client.client_id)


async def eventually(call: Callable[[], Awaitable[Any]], expected: str) -> None:
    """Calls until the outcome is the one that a reload brings."""
    async with asyncio.timeout(TIMEOUT_S):
        while await outcome(call()) != expected:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def test_outside_workload_registers_is_approved_and_gets_a_token(tmp_path: Path) -> None:
    async with partnered(tmp_path) as server:
        who = svid()
        made = await server.register(who, by=who, scopes=["a", "validate"])
        assert made.client.metadata.tls_client_auth_ca == PIN
        assert made.client.metadata.tls_client_auth_san_uri == BILLING
        assert await reason(server.auth(who).ValidateToken(VALIDATE)) == "CLIENT_PENDING"
        member = Member(who, made.client.client_id)
        await server.approve(member.client_id)
        token = (await server.token(member, "a")).access_token
        assert await server.judged(ADMIN, token, of=who) == "OK"
        assert await server.judged(ADMIN, token, of=svid()) == "PROOF_MISMATCH"
        assert await outcome(server.auth(who).ValidateToken(VALIDATE)) == "OK"
        again = svid()  # an SVID lives for an hour: the next one is the same client
        assert thumbprint(again) != thumbprint(who)
        assert await outcome(server.token(Member(again, member.client_id), "a")) == "OK"


async def test_chain_with_an_intermediate_leads_to_the_bundle(tmp_path: Path) -> None:
    async with partnered(tmp_path) as server:
        member = await joined(server, svid(), "a")
        below = svid(MIDDLE)
        request = issue_request(member.client_id, scopes=["a"])
        assert await outcome(server.auth(below, MIDDLE.pem).IssueToken(request)) == "OK"
        own_id = svid(MIDDLE, spiffe("orders"))
        refused = server.auth(own_id, MIDDLE.pem).GetKeys(KEYS)
        assert await reason(refused) == "PEER_CERTIFICATE_INVALID"


# --- what its CAs sign in vain ---


FORGED: Final = {
    "id of the server's trust domain": (svid(PARTNER, spiffe("orders")), b""),
    "administrator": (svid(PARTNER, spiffe("admin")), b""),
    "id of another partner": (svid(PARTNER, "spiffe://rival.test/billing"), b""),
    "id of a domain of nobody": (svid(PARTNER, "spiffe://unknown.test/billing"), b""),
    "id of a subdomain": (svid(PARTNER, "spiffe://a.partner.test/billing"), b""),
    "DNS name alone": (identity(ca=PARTNER, dns=("orders.test.local",)), b""),
    "subject alone": (identity(ca=PARTNER, subject="orders"), b""),
    "another partner's": (svid(RIVAL), b""),
    "client CA": (svid(CA), b""),
    "pinned CA appended": (svid(PARTNER, spiffe("orders")), CA.pem),
    "partner's CA appended": (svid(CA), PARTNER.pem),
    "cross-signed by the client CA": (
        svid(PARTNER, spiffe("orders")),
        _ca("Partner", issuer=CA, key=PARTNER.key).pem,
    ),
    "DNS name, cross-signed by the client CA": (
        identity(ca=PARTNER, dns=("orders.test.local",)),
        _ca("Partner", issuer=CA, key=PARTNER.key).pem,
    ),
    "client CA cross-signed by the partner": (
        svid(CA),
        _ca("Clients", issuer=PARTNER, key=CA.key).pem,
    ),
}


async def test_forged_certificates_name_nobody(tmp_path: Path) -> None:
    """X509-SVID section 5.2. The handshake lets them in: every call is refused."""
    async with partnered(tmp_path) as server:
        orders = await server.member("orders", "a", "validate")
        by_name = [await server.member("", "a", who=who, **name) for who, name in owners()]
        billing = await joined(server, svid(), "a")
        members = [orders, *by_name, billing]
        assert [await outcome(server.token(member, "a")) for member in members] == ["OK"] * 4
        for name, (who, chain) in FORGED.items():
            auth = server.auth(who, chain)
            calls: list[Any] = [auth.GetKeys(KEYS), auth.ValidateToken(VALIDATE)]
            calls += [auth.IssueToken(issue_request(each.client_id)) for each in members]
            calls += [server.clients(who).ListClients(clients_pb2.ListClientsRequest())]
            found = [await reason(call) for call in calls]
            assert found == ["PEER_CERTIFICATE_INVALID"] * len(calls), name


async def test_other_names_in_an_outside_certificate_are_nobodys(tmp_path: Path) -> None:
    async with partnered(tmp_path) as server:
        for who, name in owners():
            member = await server.member("", "a", "validate", who=who, **name)
            request = issue_request(member.client_id, scopes=["a"])
            assert await outcome(server.auth(who).IssueToken(request)) == "OK"
            thief = server.auth(svid(dns=("orders.test.local",), subject="orders"))
            assert await reason(thief.IssueToken(request)) == "CLIENT_AUTHENTICATION_FAILED"
            assert await reason(thief.ValidateToken(VALIDATE)) == "CALLER_UNKNOWN"


# --- what a name may be pinned to ---


NAMES: Final[dict[str, dict[str, Any]]] = {
    "partner": {"tls_client_auth_san_uri": BILLING},
    "own": {"tls_client_auth_san_uri": spiffe("new")},
    "nobody's": {"tls_client_auth_san_uri": "spiffe://unknown.test/new"},
    "dns": {"tls_client_auth_san_dns": "partner.test"},
    "subject": {"tls_client_auth_subject_dn": "CN=new"},
}
PINS: Final = [
    ("partner", "", PIN),
    ("partner", PIN, PIN),
    ("partner", CA.pin, None),
    ("partner", PARTNER.pin, None),
    ("partner", "spiffe://rival.test", None),
    ("partner", f"{PIN}/", None),
    ("partner", BILLING, None),
    ("partner", "partner.test", None),
    ("own", "", CA.pin),
    ("own", CA.pin, CA.pin),
    ("own", PIN, None),
    ("own", "spiffe://test.local", None),
    ("own", PARTNER.pin, None),
    ("nobody's", "", CA.pin),
    ("nobody's", PIN, None),
    ("nobody's", "spiffe://unknown.test", None),
    ("dns", "", CA.pin),
    ("dns", PIN, None),
    ("subject", "", CA.pin),
    ("subject", PIN, None),
]


async def test_names_are_pinned_to_who_vouches_for_them(tmp_path: Path) -> None:
    async with partnered(tmp_path) as server:
        for name, asked, pin in PINS:
            metadata = clients_pb2.ClientMetadata(
                client_name="new", tls_client_auth_ca=asked, **NAMES[name]
            )
            call = server.auth(ADMIN).RegisterClient(
                auth_pb2.RegisterClientRequest(metadata=metadata, validate_only=True)
            )
            if pin is None:
                assert await reason(call) == "INVALID_CLIENT_METADATA", (name, asked)
            else:
                assert (await call).client.metadata.tls_client_auth_ca == pin, (name, asked)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tls_client_auth_san_uri": BILLING}, "OK"),
        ({"tls_client_auth_san_uri": BILLING, "tls_client_auth_ca": PIN}, "OK"),
        ({"tls_client_auth_san_uri": BILLING, "tls_client_auth_ca": CA.pin}, None),
        ({"tls_client_auth_san_uri": f"{PIN}/payroll"}, "REGISTRATION_NOT_ALLOWED"),
        ({"tls_client_auth_san_uri": "spiffe://rival.test/billing"}, None),
        ({"tls_client_auth_san_uri": spiffe("orders")}, None),
        ({"tls_client_auth_san_dns": "billing.test"}, None),
        ({"tls_client_auth_subject_dn": "CN=billing"}, None),
    ],
)
async def test_outside_workload_registers_its_own_id_alone(
    tmp_path: Path, metadata: dict[str, str], expected: str | None
) -> None:
    async with partnered(tmp_path) as server:
        who = svid(dns=("billing.test",), subject="billing")
        call = server.register(who, by=who, **metadata)
        assert await outcome(call) == (expected or "INVALID_CLIENT_METADATA")


async def test_id_pinned_to_a_client_ca_ends_where_its_domain_gets_a_bundle(tmp_path: Path) -> None:
    """Fail closed: neither the old issuer nor the bundle is that client any more."""
    async with running(tmp_path, client_cas=(CA, SECOND_CA), admin_ca=CA.pin) as server:
        await server.resource("https://a.test", "a")
        member = await server.member("", "a", who=svid(CA), tls_client_auth_ca=CA.pin)
        request = issue_request(member.client_id, scopes=["a"])
        assert await outcome(server.auth(member.who).IssueToken(request)) == "OK"
    write(tmp_path, PARTNER)
    bundles = {"partner.test": tmp_path / "partner.json"}
    cas: dict[str, Any] = {"client_cas": (CA, SECOND_CA), "admin_ca": CA.pin}
    async with running(tmp_path, bundles=bundles, **cas) as server:
        refused = server.auth(member.who).IssueToken(request)
        assert await reason(refused) == "PEER_CERTIFICATE_INVALID"
        outside = server.auth(svid())
        assert await reason(outside.IssueToken(request)) == "CLIENT_AUTHENTICATION_FAILED"
        assert await outcome(server.auth(ADMIN).GetKeys(KEYS)) == "OK"
    async with running(tmp_path, **cas) as server:
        assert await outcome(server.auth(member.who).IssueToken(request)) == "OK"


# --- rotation ---


async def test_rotated_ca_needs_no_registration_and_the_old_one_ends_on_open_connections(
    tmp_path: Path,
) -> None:
    async with partnered(tmp_path) as server:
        member = await joined(server, svid(), "a", "watch")
        request = issue_request(member.client_id, scopes=["a"])
        old = server.auth(member.who)
        stream = old.WatchChanges(WATCH)
        await stream.read()
        assert await outcome(old.IssueToken(request)) == "OK"

        new = svid(NEW_PARTNER)
        write(tmp_path, PARTNER, NEW_PARTNER)
        await eventually(lambda: server.auth(new).IssueToken(request), "OK")
        assert await outcome(old.IssueToken(request)) == "OK"

        write(tmp_path, NEW_PARTNER)
        await eventually(lambda: old.IssueToken(request), "PEER_CERTIFICATE_INVALID")
        assert await reason(to_the_end(stream)) == "PEER_CERTIFICATE_INVALID"
        assert await outcome(server.auth(new).IssueToken(request)) == "OK"
        assert await outcome(server.auth(svid(RIVAL)).GetKeys(KEYS)) == "PEER_CERTIFICATE_INVALID"


async def test_bundle_without_keys_ends_all_its_workloads(tmp_path: Path) -> None:
    """A trust domain that withdrew its keys; the server's own clients go on."""
    async with partnered(tmp_path) as server:
        member = await joined(server, svid(), "a")
        request = issue_request(member.client_id, scopes=["a"])
        assert await outcome(server.auth(member.who).IssueToken(request)) == "OK"
        write(tmp_path)
        await eventually(
            lambda: server.auth(member.who).IssueToken(request), "PEER_CERTIFICATE_INVALID"
        )
        assert await outcome(server.auth(ADMIN).GetKeys(KEYS)) == "OK"


async def test_half_written_bundle_leaves_the_old_one(tmp_path: Path) -> None:
    """The rival's file, whole at the same time, tells that the reload has been there."""
    async with partnered(tmp_path) as server:
        member = await joined(server, svid(), "a")
        request = issue_request(member.client_id, scopes=["a"])
        rival = svid(RIVAL, "spiffe://rival.test/a")
        await server.auth(rival).GetKeys(KEYS)  # connected before its CA goes
        (tmp_path / "partner.json").write_bytes(certs.bundle(NEW_PARTNER)[:-7])
        (tmp_path / "rival.json").write_bytes(certs.bundle())
        await eventually(lambda: server.auth(rival).GetKeys(KEYS), "PEER_CERTIFICATE_INVALID")
        assert await outcome(server.auth(member.who).IssueToken(request)) == "OK"
        write(tmp_path, NEW_PARTNER)
        await eventually(
            lambda: server.auth(member.who).IssueToken(request), "PEER_CERTIFICATE_INVALID"
        )


# --- settings ---


def test_same_ca_among_the_client_cas_and_in_a_bundle_is_refused_at_start(tmp_path: Path) -> None:
    write(tmp_path, CA)
    settings = settings_for(tmp_path, bundles={"partner.test": tmp_path / "partner.json"})
    with pytest.raises(StartError, match=r"'CN=Clients' is in tls.client_ca as well"):
        prepare(settings, SystemClock())
    write(tmp_path, PARTNER)
    assert prepare(settings, SystemClock()).tls.trust.pins("partner.test") == {PIN}


@pytest.mark.parametrize(
    ("bundles", "more", "wrong"),
    [
        ({"partner.test": "x"}, {}, ""),
        ({"test.local": "x"}, {}, "test.local is the own trust domain"),
        ({"Partner.test": "x"}, {}, "not a SPIFFE ID"),
        ({"spiffe://partner.test": "x"}, {}, "not a SPIFFE ID"),
        ({"partner.test/a": "x"}, {}, "a trust domain has no path"),
        ({"": "x"}, {}, "not a SPIFFE ID"),
        ({"partner.test": "x"}, {"admins": ["spiffe://partner.test/admin"]}, "no administrators"),
        ({"partner.test": "x"}, {"admin_ca": PIN}, "admin_ca"),
        ({f"{number}.test": "x" for number in range(65)}, {}, "at most 64"),
    ],
)
def test_settings_of_bundles(
    monkeypatch: pytest.MonkeyPatch, bundles: dict[str, str], more: dict[str, Any], wrong: str
) -> None:
    monkeypatch.setenv("AUTHSVC_TLS__BUNDLES", json.dumps(bundles))
    if wrong:
        with pytest.raises(ValueError, match=wrong):
            load(trust_domain="test.local", **more)
    else:
        found = load(trust_domain="test.local", **more).tls.bundles
        assert found == {name: Path(file) for name, file in bundles.items()}


def test_certificate_of_the_own_pki_and_a_bundle_go_together(tmp_path: Path) -> None:
    """Without a setting for the listener's own files."""
    write(tmp_path, PARTNER)
    settings = load(
        state_dir=tmp_path / "state", tls={"bundles": {"partner.test": tmp_path / "partner.json"}}
    )
    trust = prepare(settings, SystemClock()).tls.trust
    assert trust.pins("partner.test") == {PIN}
    assert len(trust.pins("authsvc.local")) == 1
