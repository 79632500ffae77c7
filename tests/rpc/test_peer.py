"""From the certificates on a connection to a peer: what is refused, and which CA gets credit."""

import hashlib
from base64 import urlsafe_b64encode
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from authsvc.errors import AuthError, Reason
from authsvc.model import CertificateIdentity, IdentityKind, Peer, Validity
from authsvc.rpc import peer as module
from authsvc.rpc.peer import (
    Peers,
    Trust,
    check_pair,
    read_authorities,
    read_bundle,
    spki_sha256,
    x5t_s256,
)
from tests import certs
from tests.certs import DAY, HOUR, NOW, SPIFFE_ID, Context, Issued

ROOT = certs.ca("Root")
OTHER = certs.ca("Other")
INTERMEDIATE = certs.ca("Intermediate", issuer=ROOT)
LEAF = certs.leaf(ROOT)


def _peers(*authorities: Issued, **limits: int) -> Peers:
    trusted = Trust(tuple(ca.certificate for ca in authorities))
    return Peers(lambda: trusted, **limits)


def _refusal(peers: Peers, context: Context, now: float = NOW) -> tuple[Reason, str]:
    with pytest.raises(AuthError) as caught:
        peers(context, now)
    return caught.value.reason, caught.value.cause


def _invalid(peers: Peers, context: Context) -> str:
    reason, cause = _refusal(peers, context)
    assert reason is Reason.PEER_CERTIFICATE_INVALID
    return cause


def _outcome(peers: Peers, context: Context) -> Peer | Reason:
    try:
        return peers(context, NOW)
    except AuthError as error:
        return error.reason


# --- what is read ---


def test_peer_good_certificate_gives_its_names_and_its_ca() -> None:
    leaf = certs.leaf(ROOT, dns=("A.test.local", "b.test.local"), subject="orders, Inc.")
    peer = _peers(ROOT, OTHER)(leaf.context(), NOW)
    assert peer.spiffe_id == SPIFFE_ID
    assert peer.dns_names == {"a.test.local", "b.test.local"}
    assert peer.subject_dn == r"CN=orders\, Inc."
    assert peer.validity == Validity(NOW - HOUR, NOW + HOUR)
    assert peer.paths == {ROOT.pin: Validity(NOW - HOUR, NOW + HOUR)}


def test_thumbprint_is_the_digest_of_the_der() -> None:
    """RFC 8705 section 3.1."""
    der = LEAF.certificate.public_bytes(serialization.Encoding.DER)
    expected = urlsafe_b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")
    assert x5t_s256(LEAF.certificate) == expected
    assert _peers(ROOT)(LEAF.context(), NOW).thumbprint == expected


def test_spki_sha256_is_a_digest_of_the_key_alone() -> None:
    key = certs.ec_key()
    one, two = certs.ca("One", key=key), certs.ca("Two", key=key)
    assert one.pin == two.pin != ROOT.pin
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert spki in one.certificate.public_bytes(serialization.Encoding.DER)
    assert spki_sha256(one.certificate) == hashlib.sha256(spki).hexdigest()


@pytest.mark.parametrize(
    ("leaf", "spiffe_id", "dns_names", "subject_dn"),
    [
        (certs.leaf(ROOT, uris=(), subject="orders"), "", frozenset(), "CN=orders"),
        (certs.leaf(ROOT, uris=(), dns=("a.test",)), "", frozenset({"a.test"}), ""),
        (
            certs.leaf(ROOT, uris=("https://a.test/x",), dns=("a.test",)),
            "",
            frozenset({"a.test"}),
            "",
        ),
        (certs.leaf(ROOT, uris=(), subject="orders", key_usage=None), "", frozenset(), "CN=orders"),
        (certs.leaf(ROOT, is_ca=None, key_id=False), SPIFFE_ID, frozenset(), ""),
        (certs.leaf(ROOT, extended_critical=True), SPIFFE_ID, frozenset(), ""),
        (
            certs.leaf(ROOT, extended=(*certs.CLIENT, ExtendedKeyUsageOID.SERVER_AUTH)),
            SPIFFE_ID,
            frozenset(),
            "",
        ),
    ],
    ids=[
        "subject_only",
        "dns_only",
        "uri_of_another_scheme",
        "no_key_usage",
        "no_basic_constraints_no_key_id",
        "critical_extended_key_usage",
        "both_sides",
    ],
)
def test_peer_usable_shape_is_accepted(
    leaf: Issued, spiffe_id: str, dns_names: frozenset[str], subject_dn: str
) -> None:
    peer = _peers(ROOT)(leaf.context(), NOW)
    assert (peer.spiffe_id, peer.dns_names, peer.subject_dn) == (spiffe_id, dns_names, subject_dn)
    assert set(peer.paths) == {ROOT.pin}


def test_peer_rsa_certificates_are_accepted() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ca = certs.ca("RSA", key=key)
    assert set(_peers(ca)(certs.leaf(ca).context(), NOW).paths) == {ca.pin}


# --- what is refused ---


@pytest.mark.parametrize("context", [{}, {"x509_pem_cert": []}, {"x509_pem_cert": [b""]}])
def test_peer_no_certificate_is_missing(context: Context) -> None:
    peers = _peers(ROOT)
    assert _refusal(peers, context) == (Reason.PEER_CERTIFICATE_MISSING, "")
    assert _refusal(peers, context | {"x509_pem_cert_chain": [LEAF.pem]})[0] is (
        Reason.PEER_CERTIFICATE_MISSING
    )


def _spiffe(text: str) -> Issued:
    return certs.leaf(ROOT, uris=(text,), dns=("a.test",))


@pytest.mark.parametrize(
    ("leaf", "cause"),
    [
        (certs.leaf(ROOT, is_ca=True), "a CA certificate"),
        (certs.leaf(ROOT, key_usage=certs.usage("digital_signature", "key_cert_sign")), "sign"),
        (certs.leaf(ROOT, key_usage=certs.usage("digital_signature", "crl_sign")), "sign"),
        (certs.leaf(ROOT, key_usage=certs.usage("key_agreement")), "digitalSignature"),
        (certs.leaf(ROOT, key_usage=None), "without keyUsage"),
        (certs.leaf(ROOT, extended=None), "clientAuth"),
        (certs.leaf(ROOT, extended=(ExtendedKeyUsageOID.SERVER_AUTH,)), "clientAuth"),
        (certs.leaf(ROOT, extended=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)), "clientAuth"),
        (certs.leaf(ROOT, uris=(SPIFFE_ID, "spiffe://test.local/b")), "more than one URI"),
        (certs.leaf(ROOT, uris=(SPIFFE_ID, SPIFFE_ID)), "more than one URI"),
        (certs.leaf(ROOT, uris=(SPIFFE_ID, "https://a.test")), "more than one URI"),
        (_spiffe("spiffe://test.local"), "has a path"),
        (_spiffe("spiffe://Test.local/a"), "not a SPIFFE ID"),
        (_spiffe("SPIFFE://test.local/a"), "not a SPIFFE ID"),
        (_spiffe("spiffe:test.local/a"), "not a SPIFFE ID"),
        (
            certs.leaf(ROOT, extra=x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"")),
            "critical",
        ),
        (certs.leaf(OTHER), "no path"),
        (certs.leaf(None), "no path"),
        (certs.leaf(None, subject="Root"), "no path"),
        (certs.leaf(certs.ca("Root")), "no path"),
    ],
    ids=[
        "ca",
        "cert_sign",
        "crl_sign",
        "no_digital_signature",
        "spiffe_without_key_usage",
        "no_extended_key_usage",
        "server_auth_only",
        "any_extended_key_usage",
        "two_uris",
        "same_uri_twice",
        "second_uri_of_another_scheme",
        "spiffe_id_without_path",
        "upper_case_trust_domain",
        "upper_case_scheme",
        "spiffe_without_authority",
        "unknown_critical_extension",
        "ca_that_is_not_trusted",
        "self_signed",
        "self_signed_in_the_name_of_the_ca",
        "ca_of_the_same_name_with_another_key",
    ],
)
def test_peer_unusable_certificate_is_refused_for_its_fault(leaf: Issued, cause: str) -> None:
    peers = _peers(ROOT)
    assert peers(LEAF.context(), NOW).spiffe_id == SPIFFE_ID
    for _ in range(2):  # found, and remembered
        assert cause in _invalid(peers, leaf.context())
    assert cause in _invalid(peers, leaf.context(ROOT, OTHER))


@pytest.mark.parametrize(
    "text", [b"\x00", b"no PEM", LEAF.pem[:-40], LEAF.pem.replace(b"MII", b"MIJ", 1), LEAF.key_pem]
)
def test_peer_text_that_is_no_certificate_is_invalid(text: bytes) -> None:
    peers = _peers(ROOT)
    _invalid(peers, certs.context(text))
    _invalid(peers, certs.context(LEAF.pem, text))


def test_peer_two_values_of_a_property_are_invalid() -> None:
    peers = _peers(ROOT)
    assert "more than one" in _invalid(peers, {"x509_pem_cert": [LEAF.pem, LEAF.pem]})
    chains = {"x509_pem_cert": [LEAF.pem], "x509_pem_cert_chain": [ROOT.pem, ROOT.pem]}
    assert "more than one" in _invalid(peers, chains)


def test_peer_any_changed_byte_is_invalid_or_changes_no_name() -> None:
    """Only how the signature is written leaves room, so the thumbprint is not the certificate's.

    (Its count of unused bits may be wrong. A holder can also write an ECDSA signature anew.)
    """
    peers, der = _peers(ROOT), LEAF.certificate.public_bytes(serialization.Encoding.DER)
    good = peers(LEAF.context(), NOW)
    refused = 0
    for place in range(len(der)):
        changed = der[:place] + bytes([der[place] ^ 1]) + der[place + 1 :]
        text = b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n"
        found = _outcome(peers, certs.context(text % certs.base64_lines(changed)))
        if isinstance(found, Peer):
            assert found == replace(good, thumbprint=found.thumbprint) != good
        else:
            assert found is Reason.PEER_CERTIFICATE_INVALID
            refused += 1
    assert refused >= len(der) - 1


def test_peer_cause_stays_out_of_the_public_text() -> None:
    with pytest.raises(AuthError) as caught:
        _peers(ROOT)(certs.leaf(OTHER).context(), NOW)
    assert caught.value.cause
    assert caught.value.text == "the client certificate is not usable here"


# --- paths ---


def test_path_intermediate_presented_leads_to_its_root() -> None:
    span = (NOW - HOUR / 2, NOW + HOUR / 2)
    intermediate = certs.ca("Short", issuer=ROOT, span=span)
    leaf = certs.leaf(intermediate)
    peer = _peers(ROOT, OTHER)(leaf.context(intermediate), NOW)
    assert peer.paths == {ROOT.pin: Validity(*span)}
    assert "no path" in _invalid(_peers(ROOT, OTHER), leaf.context())


def test_path_intermediate_that_is_trusted_itself_counts_beside_its_root() -> None:
    leaf = certs.leaf(INTERMEDIATE)
    peer = _peers(ROOT, INTERMEDIATE)(leaf.context(INTERMEDIATE), NOW)
    assert set(peer.paths) == {ROOT.pin, INTERMEDIATE.pin}


def test_path_leaf_repeated_in_the_chain_changes_nothing() -> None:
    leaf = certs.leaf(INTERMEDIATE)
    context = leaf.context(leaf, INTERMEDIATE, INTERMEDIATE)
    assert set(_peers(ROOT)(context, NOW).paths) == {ROOT.pin}


@pytest.mark.parametrize(
    ("intermediate", "cause"),
    [
        (certs.ca("Bad", issuer=ROOT, is_ca=False), "cA must be asserted"),
        (certs.ca("Bad", issuer=ROOT, critical=False), "criticality"),
        (certs.ca("Bad", issuer=ROOT, key_usage=certs.usage("crl_sign")), "keyCertSign"),
        (certs.ca("Bad", issuer=ROOT, key_usage=None), "missing required extension"),
        (certs.ca("Bad", issuer=certs.ca("Root")), "signature does not match"),
    ],
    ids=["no_ca", "not_critical", "no_cert_sign", "no_key_usage", "forged"],
)
def test_path_intermediate_that_may_not_issue_is_refused(intermediate: Issued, cause: str) -> None:
    good = certs.ca("Bad", issuer=ROOT)
    peers = _peers(ROOT)
    assert peers(certs.leaf(good).context(good), NOW).paths
    assert cause in _invalid(peers, certs.leaf(intermediate).context(intermediate))


def test_path_length_of_the_root_is_kept() -> None:
    """RFC 5280 section 4.2.1.9."""
    for length, allowed in ((1, True), (0, False)):
        root = certs.ca("Root", path_length=length)
        intermediate = certs.ca("Intermediate", issuer=root)
        context = certs.leaf(intermediate).context(intermediate)
        if allowed:
            assert _peers(root)(context, NOW).paths
        else:
            assert "path length" in _invalid(_peers(root), context)


def test_path_leaf_that_issues_is_refused() -> None:
    """A client must not make itself a CA (RFC 5280 section 6.1.4 k)."""
    forged = certs.leaf(replace(LEAF, certificate=certs.ca("x", key=LEAF.key).certificate))
    for middle in (LEAF, certs.ca("x", key=LEAF.key)):
        assert "no path" in _invalid(_peers(ROOT), forged.context(middle, ROOT))


def test_path_pinned_ca_appended_to_the_chain_proves_nothing() -> None:
    """The attack: another trusted CA's leaf, presented along with the pinned CA's certificate."""
    leaf = certs.leaf(OTHER)
    pinned = CertificateIdentity(IdentityKind.SAN_URI, SPIFFE_ID, ROOT.pin)
    for context in (leaf.context(ROOT), leaf.context(OTHER, ROOT), leaf.context(ROOT, OTHER)):
        peer = _peers(ROOT, OTHER)(context, NOW)
        assert set(peer.paths) == {OTHER.pin}
        assert not pinned.matches(peer, NOW)
    assert pinned.matches(_peers(ROOT, OTHER)(LEAF.context(), NOW), NOW)


def test_path_cas_of_one_name_are_told_apart_by_key() -> None:
    one, two = certs.ca("Twin"), certs.ca("Twin")
    for authorities in ((one, two), (two, one)):
        peers = _peers(*authorities)
        assert set(peers(certs.leaf(one).context(two), NOW).paths) == {one.pin}
        assert set(peers(certs.leaf(two).context(one), NOW).paths) == {two.pin}


def test_path_cross_signed_ca_leads_to_both() -> None:
    cross = certs.ca("Root", issuer=OTHER, key=ROOT.key)
    peers = _peers(ROOT, OTHER)
    assert set(peers(LEAF.context(), NOW).paths) == {ROOT.pin}
    assert set(peers(LEAF.context(cross), NOW).paths) == {ROOT.pin, OTHER.pin}


def test_path_renewed_ca_with_the_same_key_is_one_ca() -> None:
    old = certs.ca("Root", key=ROOT.key, span=(NOW - 2 * DAY, NOW - DAY))
    for authorities in ((old, ROOT), (ROOT, old)):
        paths = _peers(*authorities)(LEAF.context(), NOW).paths
        assert paths == {ROOT.pin: Validity(NOW - HOUR, NOW + HOUR)}


_TEAM = x509.DirectoryName(certs.name("Team"))


@pytest.mark.parametrize("critical", [True, False], ids=["critical", "not_critical"])
@pytest.mark.parametrize(
    ("permitted", "excluded", "accepted"),
    [
        ([x509.DNSName("test.local")], None, True),
        ([x509.DNSName("other.local")], None, False),
        (None, [x509.DNSName("test.local")], False),
        ([x509.UniformResourceIdentifier("test.local")], None, False),
        ([_TEAM], None, False),
        (None, [_TEAM], False),
    ],
    ids=["dns", "dns_outside", "dns_excluded", "uri", "directory_name", "directory_name_excluded"],
)
def test_path_name_constraints_hold_or_refuse(
    permitted: list[x509.GeneralName] | None,
    excluded: list[x509.GeneralName] | None,
    accepted: bool,
    critical: bool,
) -> None:
    """RFC 5280 section 4.2.1.10: what is not applied must not be passed over."""
    limits = x509.NameConstraints(permitted, excluded)
    ca = certs.ca("Limited", constraints=limits, constraints_critical=critical)
    context = certs.leaf(ca, dns=("a.test.local",), subject="orders").context()
    if accepted:
        assert set(_peers(ca)(context, NOW).paths) == {ca.pin}
    else:
        cause = _invalid(_peers(ca), context)
        assert "nameconstraint" in cause.replace(" ", "").lower()


# --- bundles of outside trust domains ---

PARTNER = certs.ca("Partner")
NEW_PARTNER = certs.ca("Partner")
RIVAL = certs.ca("Rival")
TRUST = Trust(
    (ROOT.certificate, OTHER.certificate),
    {
        "partner.test": (PARTNER.certificate, NEW_PARTNER.certificate),
        "rival.test": (RIVAL.certificate,),
        "revoked.test": (),
    },
)
HOUR_AROUND = Validity(NOW - HOUR, NOW + HOUR)


def _of(trust: Trust) -> Peers:
    return Peers(lambda: trust)


def _svid(ca: Issued, domain: str, **more: Any) -> Issued:
    return certs.leaf(ca, uris=(f"spiffe://{domain}/a",), **more)


@pytest.mark.parametrize(
    ("leaf", "pins"),
    [
        (_svid(PARTNER, "partner.test"), {"spiffe://partner.test"}),
        (_svid(NEW_PARTNER, "partner.test"), {"spiffe://partner.test"}),
        (_svid(RIVAL, "rival.test"), {"spiffe://rival.test"}),
        (_svid(PARTNER, "rival.test"), None),
        (_svid(PARTNER, "test.local"), None),
        (_svid(PARTNER, "unknown.test"), None),
        (_svid(PARTNER, "sub.partner.test"), None),
        (_svid(PARTNER, "revoked.test"), None),
        (certs.leaf(PARTNER, uris=(), dns=("partner.test",)), None),
        (certs.leaf(PARTNER, uris=(), subject="partner"), None),
        (certs.leaf(PARTNER, uris=("https://partner.test/a",), dns=("partner.test",)), None),
        (_svid(ROOT, "partner.test"), None),
        (_svid(ROOT, "revoked.test"), None),
        (_svid(ROOT, "unknown.test"), {ROOT.pin}),
        (certs.leaf(ROOT, uris=(), dns=("partner.test",)), {ROOT.pin}),
    ],
    ids=[
        "own_ca_of_the_domain",
        "second_ca_of_the_domain",
        "other_domain",
        "another_partner",
        "domain_of_the_server",
        "domain_of_nobody",
        "subdomain",
        "empty_bundle",
        "dns_name",
        "subject",
        "uri_of_another_scheme",
        "client_ca_for_a_domain_with_a_bundle",
        "client_ca_for_a_domain_with_an_empty_bundle",
        "client_ca_for_a_domain_of_nobody",
        "client_ca_for_a_dns_name",
    ],
)
def test_bundle_vouches_for_its_domain_and_nobody_else_does(
    leaf: Issued, pins: set[str] | None
) -> None:
    """X509-SVID section 5.2: the signing authority was authorized to issue it."""
    for chain in ((), (ROOT, PARTNER), (RIVAL, ROOT)):
        if pins is None:
            assert "no path" in _invalid(_of(TRUST), leaf.context(*chain))
        else:
            assert set(_of(TRUST)(leaf.context(*chain), NOW).paths) == pins


def test_bundle_vouches_for_no_other_name_in_the_certificate() -> None:
    names: dict[str, Any] = {"dns": ("orders.test.local",), "subject": "orders"}
    outside = _of(TRUST)(_svid(PARTNER, "partner.test", **names).context(), NOW)
    assert (outside.spiffe_id, outside.dns_names, outside.subject_dn) == (
        "spiffe://partner.test/a",
        frozenset(),
        "",
    )
    own = _of(TRUST)(_svid(ROOT, "test.local", **names).context(), NOW)
    assert (set(own.dns_names), own.subject_dn) == ({"orders.test.local"}, "CN=orders")
    for pin in ("spiffe://partner.test", ROOT.pin):
        for kind, value in (
            (IdentityKind.SAN_DNS, "orders.test.local"),
            (IdentityKind.SUBJECT_DN, "CN=orders"),
        ):
            identity = CertificateIdentity(kind, value, pin)
            assert not identity.matches(outside, NOW)
            assert identity.matches(own, NOW) == (pin == ROOT.pin)


def test_bundle_chain_by_an_intermediate_counts() -> None:
    middle = certs.ca("Partner, team", issuer=PARTNER, span=(NOW - HOUR, NOW + HOUR / 2))
    leaf = _svid(middle, "partner.test")
    assert _of(TRUST)(leaf.context(middle), NOW).paths == {
        "spiffe://partner.test": Validity(NOW - HOUR, NOW + HOUR / 2)
    }
    assert "no path" in _invalid(_of(TRUST), leaf.context())
    for domain in ("test.local", "rival.test"):
        assert "no path" in _invalid(_of(TRUST), _svid(middle, domain).context(middle))


@pytest.mark.parametrize(
    ("leaf", "cross"),
    [
        (_svid(PARTNER, "test.local"), certs.ca("Partner", issuer=ROOT, key=PARTNER.key)),
        (
            certs.leaf(PARTNER, uris=(), dns=("a.test",)),
            certs.ca("Partner", issuer=ROOT, key=PARTNER.key),
        ),
        (_svid(ROOT, "partner.test"), certs.ca("Root", issuer=PARTNER, key=ROOT.key)),
        (_svid(RIVAL, "partner.test"), certs.ca("Rival", issuer=PARTNER, key=RIVAL.key)),
    ],
    ids=["own_id", "own_dns_name", "client_ca_into_bundle", "bundle_into_bundle"],
)
def test_bundle_cross_signed_ca_leads_nowhere_else(leaf: Issued, cross: Issued) -> None:
    """The cross-signing is real: with the other side's file away the path is there."""
    assert "no path" in _invalid(_of(TRUST), leaf.context(cross))
    trusted = Trust(
        (ROOT.certificate,) if cross.certificate.issuer == ROOT.certificate.subject else (),
        {"partner.test": (PARTNER.certificate,)}
        if cross.certificate.issuer == PARTNER.certificate.subject
        else {},
    )
    assert _of(trusted)(leaf.context(cross), NOW).paths


def test_bundle_best_path_of_all_its_cas_is_the_one_that_counts() -> None:
    """A CA that was renewed under another key, cross-signed by the old one that ends first."""
    span = (NOW - DAY, NOW + HOUR / 4)
    old = certs.ca("Old", span=span)
    new = certs.ca("New", span=(NOW - DAY, NOW + DAY))
    cross = certs.ca("New", issuer=old, key=new.key, span=span)
    leaf = _svid(new, "partner.test")
    for cas in ((old, new), (new, old)):
        trust = Trust((ROOT.certificate,), {"partner.test": tuple(ca.certificate for ca in cas)})
        assert _of(trust)(leaf.context(cross), NOW).paths == {"spiffe://partner.test": HOUR_AROUND}


def test_bundle_rotated_ca_is_the_same_pin() -> None:
    trusted = [Trust((ROOT.certificate,), {"partner.test": (PARTNER.certificate,)})]
    peers = Peers(lambda: trusted[0])
    old, new = (_svid(ca, "partner.test") for ca in (PARTNER, NEW_PARTNER))
    identity = CertificateIdentity(
        IdentityKind.SAN_URI, "spiffe://partner.test/a", "spiffe://partner.test"
    )
    assert identity.matches(peers(old.context(), NOW), NOW)
    assert "no path" in _invalid(peers, new.context())
    trusted[0] = Trust((ROOT.certificate,), {"partner.test": (NEW_PARTNER.certificate,)})
    assert "no path" in _invalid(peers, old.context())
    assert identity.matches(peers(new.context(), NOW), NOW)


def test_pins_of_a_domain_with_a_bundle_are_the_bundle() -> None:
    assert TRUST.pins("partner.test") == {"spiffe://partner.test"}
    assert TRUST.pins("revoked.test") == {"spiffe://revoked.test"}
    assert TRUST.pins("test.local") == TRUST.pins("") == {ROOT.pin, OTHER.pin}


def _changed(**changes: Any) -> bytes:
    return certs.bundle(ROOT, certs.jwk(OTHER, **changes))


def _without(name: str) -> bytes:
    return certs.bundle(
        ROOT, {key: value for key, value in certs.jwk(OTHER).items() if key != name}
    )


X5C = certs.jwk(OTHER)["x5c"][0]


@pytest.mark.parametrize(
    ("content", "cas"),
    [
        (certs.bundle(ROOT, OTHER), (ROOT, OTHER)),
        (b"\n " + certs.bundle(ROOT), (ROOT,)),
        (ROOT.pem + OTHER.pem, (ROOT, OTHER)),
        (_changed(kid="x", unknown=[1]), (ROOT, OTHER)),
        (_changed(use="jwt-svid"), (ROOT,)),
        (_changed(use="X509-SVID"), (ROOT,)),
        (_changed(use=["x509-svid"]), (ROOT,)),
        (_without("use"), (ROOT,)),
        (_changed(kty="OKP"), (ROOT,)),
        (_without("kty"), (ROOT,)),
        (_without("x5c"), (ROOT,)),
        (_changed(x5c=[]), (ROOT,)),
        (_changed(x5c=[X5C, certs.jwk(PARTNER)["x5c"][0]]), (ROOT, OTHER)),
        (certs.bundle(), ()),
        (certs.bundle(certs.jwk(ROOT, use="jwt-svid")), ()),
    ],
    ids=[
        "bundle",
        "white_space",
        "pem",
        "unknown_members",
        "jwt_svid",
        "use_in_upper_case",
        "use_of_another_kind",
        "no_use",
        "unknown_kty",
        "no_kty",
        "no_x5c",
        "empty_x5c",
        "second_certificate_is_passed_over",
        "no_keys_at_all",
        "no_x509",
    ],
)
def test_read_bundle_takes_what_counts_and_passes_over_the_rest(
    content: bytes, cas: tuple[Issued, ...]
) -> None:
    """SPIFFE Trust Domain and Bundle section 4.2, X509-SVID section 6.2."""
    assert read_bundle(content) == tuple(ca.certificate for ca in cas)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "PEM"),
        (b"[]", "PEM"),
        (b"null", "PEM"),
        (b"{}", "not a JWK set"),
        (b'{"keys": {}}', "not a JWK set"),
        (b'{"keys": [1]}', "not a JWK set"),
        (certs.bundle(ROOT)[:-20], "delimiter|Unterminated|Expecting"),
        (b"\xff" + certs.bundle(ROOT), "PEM"),
        (ROOT.pem + OTHER.pem[:-30], "PEM|whole"),
        (_changed(d="AAAA"), "private keys"),
        (certs.bundle(ROOT, {"kty": "oct", "k": "AAAA"}), "private keys"),
        (certs.bundle(ROOT, {"kty": "EC", "use": "jwt-svid", "d": "AAAA"}), "private keys"),
        (_changed(x5c=X5C), "not a list"),
        (_changed(x5c=[1]), "not a list"),
        (_changed(x5c={"0": X5C}), "not a list"),
        (_changed(x5c=[X5C[:-8]]), "asn1"),
        (_changed(x5c=["-" + X5C]), "base64|alphabet"),
        (_changed(x5c=[certs.jwk(LEAF)["x5c"][0]]), "not a CA certificate"),
        (certs.bundle(*[ROOT] * (module.AUTHORITIES_MAX + 1)), "more than 64"),
        (certs.bundle(ROOT) + b" " * module.BUNDLE_BYTES_MAX, "bytes"),
        (ROOT.pem + ROOT.key_pem, "whole"),
    ],
    ids=[
        "empty",
        "list",
        "null",
        "no_keys",
        "keys_is_no_list",
        "key_is_no_object",
        "half_written",
        "no_utf8",
        "half_written_pem",
        "private_key",
        "symmetric_key",
        "private_key_of_another_use",
        "x5c_is_a_text",
        "x5c_holds_a_number",
        "x5c_is_an_object",
        "x5c_is_cut",
        "x5c_is_no_base64",
        "leaf",
        "too_many",
        "too_long",
        "private_key_in_pem",
    ],
)
def test_read_bundle_what_cannot_be_used_is_refused(content: bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        read_bundle(content)


# --- time ---


@pytest.mark.parametrize(
    ("now", "valid"),
    [
        (NOW - HOUR - 0.001, False),
        (NOW - HOUR, True),
        (NOW + HOUR, True),
        (NOW + HOUR + 0.001, False),
        (0.0, False),
    ],
)
def test_validity_of_the_leaf_is_asked_on_every_call(now: float, valid: bool) -> None:
    warm = _peers(ROOT)
    warm(LEAF.context(), NOW)
    for peers in (warm, _peers(ROOT)):
        if valid:
            assert peers(LEAF.context(), now).paths
        else:
            assert _refusal(peers, LEAF.context(), now) == (Reason.PEER_CERTIFICATE_EXPIRED, "")


def test_validity_not_yet_valid_leaf_works_once_its_time_comes() -> None:
    leaf, peers = certs.leaf(ROOT, span=(NOW + HOUR, NOW + 2 * HOUR)), _peers(ROOT)
    assert _refusal(peers, leaf.context())[0] is Reason.PEER_CERTIFICATE_EXPIRED
    assert peers(leaf.context(), NOW + 1.5 * HOUR).paths == {
        ROOT.pin: Validity(NOW + HOUR, NOW + 2 * HOUR)
    }


def test_validity_expired_path_stays_known_and_does_not_match() -> None:
    """Each CA counts for its own time: one of the two paths has run out."""
    cross = certs.ca("Root", issuer=OTHER, key=ROOT.key, span=(NOW - DAY, NOW - HOUR / 2))
    peer = _peers(ROOT, OTHER)(LEAF.context(cross), NOW)
    assert peer.paths[OTHER.pin] == Validity(NOW - HOUR, NOW - HOUR / 2)
    identity = CertificateIdentity(IdentityKind.SAN_URI, SPIFFE_ID, OTHER.pin)
    assert not identity.matches(peer, NOW)
    assert identity.matches(peer, NOW - HOUR / 2)
    assert replace(identity, ca=ROOT.pin).matches(peer, NOW)


def test_validity_all_paths_expired_is_expired() -> None:
    ca = certs.ca("Ended", span=(NOW - DAY, NOW - HOUR / 2))
    peers, leaf = _peers(ca), certs.leaf(ca)
    assert _refusal(peers, leaf.context()) == (Reason.PEER_CERTIFICATE_EXPIRED, "")
    assert peers(leaf.context(), NOW - HOUR / 2).validity == Validity(NOW - HOUR, NOW + HOUR)


def test_validity_path_that_never_was_is_invalid() -> None:
    """The intermediate ended before the leaf began: there is no time at which the path holds."""
    intermediate = certs.ca("Ended", issuer=ROOT, span=(NOW - 2 * DAY, NOW - DAY))
    assert "no path" in _invalid(_peers(ROOT), certs.leaf(intermediate).context(intermediate))


def test_validity_best_of_two_intermediates_is_taken() -> None:
    old = certs.ca("Middle", issuer=ROOT, span=(NOW - DAY, NOW + HOUR / 4))
    new = certs.ca("Middle", issuer=ROOT, key=old.key, span=(NOW - HOUR / 4, NOW + DAY))
    leaf = certs.leaf(old)
    for chain in ((old, new), (new, old)):
        early = _peers(ROOT)(leaf.context(*chain), NOW - HOUR / 2)
        assert early.paths == {ROOT.pin: Validity(NOW - HOUR, NOW + HOUR / 4)}
        late = _peers(ROOT)(leaf.context(*chain), NOW + HOUR / 2)
        assert late.paths == {ROOT.pin: Validity(NOW - HOUR / 4, NOW + HOUR)}


# --- what is remembered ---


def test_cache_same_bytes_give_the_same_peer() -> None:
    peers = _peers(ROOT)
    first = peers(LEAF.context(), NOW)
    assert peers(certs.context(bytes(bytearray(LEAF.pem))), NOW + 1) is first


def test_cache_leaves_behind_one_intermediate_are_told_apart() -> None:
    """gRPC's chain comes without the leaf, so it is the same for both."""
    peers = _peers(ROOT)
    for name in ("spiffe://test.local/a", "spiffe://test.local/b") * 2:
        context = certs.leaf(INTERMEDIATE, uris=(name,)).context(INTERMEDIATE)
        assert peers(context, NOW).spiffe_id == name


def test_cache_chain_is_part_of_the_key() -> None:
    peers, leaf = _peers(ROOT), certs.leaf(INTERMEDIATE)
    assert peers(leaf.context(INTERMEDIATE), NOW).paths
    assert "no path" in _invalid(peers, leaf.context())
    assert peers(leaf.context(INTERMEDIATE), NOW).paths


def test_cache_new_authorities_drop_what_is_known() -> None:
    trusted = [Trust((ROOT.certificate, OTHER.certificate))]
    peers = Peers(lambda: trusted[0])
    before = peers(LEAF.context(), NOW)
    trusted[0] = Trust((OTHER.certificate,))
    assert "no path" in _invalid(peers, LEAF.context())
    trusted[0] = Trust((ROOT.certificate,))
    after = peers(LEAF.context(), NOW)
    assert after == before
    assert after is not before


def test_cache_full_of_entries_forgets_the_least_used() -> None:
    leaves = [certs.leaf(ROOT) for _ in range(3)]
    peers = _peers(ROOT, entries_max=2)
    first, second = (peers(leaf.context(), NOW) for leaf in leaves[:2])
    assert peers(leaves[0].context(), NOW) is first  # used again
    third = peers(leaves[2].context(), NOW)
    assert peers(leaves[0].context(), NOW) is first
    assert peers(leaves[2].context(), NOW) is third
    assert peers(leaves[1].context(), NOW) is not second


def test_cache_full_of_bytes_forgets_the_least_used() -> None:
    leaves = [certs.leaf(ROOT) for _ in range(2)]
    size = len(leaves[0].pem)
    peers = _peers(ROOT, bytes_max=2 * size + size // 2)
    first = peers(leaves[0].context(), NOW)
    peers(leaves[1].context(), NOW)
    assert peers(leaves[0].context(), NOW) is first
    peers(certs.leaf(ROOT).context(ROOT), NOW)  # pushes both out
    assert peers(leaves[0].context(), NOW) is not first
    for _ in range(20):
        peers(certs.leaf(ROOT).context(), NOW)
        assert peers._bytes == sum(map(module._size, peers._known)) <= 2 * size + size // 2


def test_cache_refusals_are_kept_within_the_same_limits() -> None:
    peers = _peers(ROOT, entries_max=2)
    for _ in range(5):
        _invalid(peers, certs.leaf(OTHER).context())
        assert len(peers._known) <= 2
    assert len(peers._known) == 2


def test_presented_too_much_is_refused_unread_and_not_kept() -> None:
    peers = _peers(ROOT)
    many = [certs.ca(str(number)) for number in range(module.PRESENTED_CERTIFICATES_MAX)]
    assert peers(LEAF.context(*many), NOW).paths
    assert "too many certificates" in _invalid(peers, LEAF.context(*many, OTHER))
    known = len(peers._known)
    long = certs.context(LEAF.pem, b" " * (module.PRESENTED_BYTES_MAX - len(LEAF.pem) + 1))
    assert "too many bytes" in _invalid(peers, long)
    assert len(peers._known) == known


def test_limits_one_entry_fits_many_times() -> None:
    assert module.PRESENTED_BYTES_MAX * 100 <= module.PEERS_BYTES_MAX == 16 * 2**20
    assert module.PEERS_ENTRIES_MAX == 4096


# --- files of CAs and keys ---


def test_read_authorities_gives_all_cas_in_order() -> None:
    text = b"# comment\n" + ROOT.pem + b"\n" + OTHER.pem
    assert read_authorities(text) == (ROOT.certificate, OTHER.certificate)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "PEM"),
        (b"no PEM", "PEM"),
        (ROOT.pem + OTHER.pem[:-30], r"PEM|whole"),
        (ROOT.pem + b"-----BEGIN CERTIFICATE-----\nMIIB", r"PEM|whole"),
        (ROOT.pem + ROOT.key_pem, "whole"),
        (ROOT.pem + LEAF.pem, "not a CA certificate"),
        (certs.leaf(None, is_ca=None, subject="x").pem, "no basicConstraints"),
        (certs.ca(critical=False).pem, "not critical"),
        (certs.ca(key_usage=None).pem, "keyCertSign"),
        (certs.ca(key_usage=certs.usage("crl_sign")).pem, "keyCertSign"),
        (certs.ca(key=ed25519.Ed25519PrivateKey.generate()).pem, "neither EC nor RSA"),
        (ROOT.pem * (module.AUTHORITIES_MAX + 1), "more than 64"),
    ],
)
def test_read_authorities_what_cannot_issue_is_refused(text: bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        read_authorities(text)


def _encrypted(issued: Issued) -> bytes:
    return issued.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


_ED25519 = certs.leaf(ROOT, key=ed25519.Ed25519PrivateKey.generate())


@pytest.mark.parametrize(
    ("certificate", "key", "cause"),
    [
        (LEAF.pem, certs.leaf(ROOT).key_pem, "not the one of the certificate"),
        (ROOT.pem + LEAF.pem, LEAF.key_pem, "not the one of the certificate"),
        (LEAF.pem, LEAF.pem, r"PEM|key"),
        (LEAF.pem, LEAF.key_pem[:-40], r"PEM|key|parse|deserialize"),
        (LEAF.pem, _encrypted(LEAF), "encrypted"),
        (LEAF.pem + ROOT.pem[:-30], LEAF.key_pem, r"PEM|whole"),
        (_ED25519.pem, _ED25519.key_pem, "neither EC nor RSA"),
    ],
    ids=["other", "wrong_order", "no_key", "cut_key", "encrypted", "cut_chain", "ed25519"],
)
def test_check_pair_that_does_not_fit_is_refused(
    certificate: bytes, key: bytes, cause: str
) -> None:
    check_pair(LEAF.pem + ROOT.pem, LEAF.key_pem)
    with pytest.raises(ValueError, match=cause):
        check_pair(certificate, key)
