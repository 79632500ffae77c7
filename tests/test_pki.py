"""The development PKI, and what a SPIFFE ID may look like."""

import fcntl
import ipaddress
import multiprocessing
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from authsvc import pki
from authsvc.oauth import spiffe
from authsvc.rpc.peer import Peers, Trust, certificate_validity
from tests import certs
from tests.certs import DAY, NOW

TRUST_DOMAIN = "test.local"


@pytest.fixture
def authority(tmp_path: Path) -> pki.Authority:
    return pki.init(tmp_path / "pki", TRUST_DOMAIN, NOW)


def _certificate(pair: tuple[bytes, bytes]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pair[0])


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- the CA ---


def test_init_new_directory_writes_a_ca_that_may_issue_leaves_only(tmp_path: Path) -> None:
    """RFC 5280 sections 4.2.1.2, 4.2.1.3 and 4.2.1.9; X509-SVID section 3.2."""
    directory = tmp_path / "state" / "pki"
    certificate = pki.init(directory, TRUST_DOMAIN, NOW).certificate
    extensions = certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value) == (True, x509.BasicConstraints(ca=True, path_length=0))
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value) == (True, certs.usage("key_cert_sign", "crl_sign"))
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert _names(certificate).get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://test.local"
    ]
    validity = certificate_validity(certificate)
    assert validity.not_before == NOW - 300
    assert validity.not_after == NOW + 3650 * DAY
    assert sorted(_listing(directory)) == ["ca-key.pem", "ca.pem"]
    assert _mode(directory / "ca-key.pem") == 0o600
    assert _mode(directory) == 0o700


def test_load_after_init_gives_the_same_ca(tmp_path: Path) -> None:
    made = pki.init(tmp_path, TRUST_DOMAIN, NOW)
    found = pki.load(tmp_path)
    assert found.certificate == made.certificate
    assert found.trust_domain == TRUST_DOMAIN
    assert found.key.private_numbers() == made.key.private_numbers()
    assert found.certificate_pem == (tmp_path / "ca.pem").read_bytes()


def test_authority_repr_holds_no_key(authority: pki.Authority) -> None:
    assert "key=" not in repr(authority)


def test_init_twice_leaves_the_first_ca_alone(tmp_path: Path) -> None:
    pki.init(tmp_path, TRUST_DOMAIN, NOW)
    before = _listing(tmp_path)
    with pytest.raises(FileExistsError, match="has a CA already"):
        pki.init(tmp_path, "other.local", NOW)
    assert _listing(tmp_path) == before


def test_init_key_of_a_killed_run_is_taken_up(tmp_path: Path) -> None:
    pki.init(tmp_path, TRUST_DOMAIN, NOW)
    (tmp_path / "ca.pem").unlink()
    key = (tmp_path / "ca-key.pem").read_bytes()
    pki.init(tmp_path, TRUST_DOMAIN, NOW)
    assert (tmp_path / "ca-key.pem").read_bytes() == key
    assert pki.load(tmp_path).trust_domain == TRUST_DOMAIN


def test_init_certificate_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    # A dangling link "does not exist", and yet no file can be made in its place.
    (tmp_path / "ca.pem").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        pki.init(tmp_path, TRUST_DOMAIN, NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["ca.pem"]


def test_init_while_it_works_others_wait(tmp_path: Path) -> None:
    key_file = tmp_path / "ca-key.pem"
    os.mkfifo(key_file)  # opening it for writing waits until init reads
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(pki.init, tmp_path, TRUST_DOMAIN, NOW)
        with key_file.open("wb") as key:
            directory = os.open(tmp_path, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            key.write(certs.ca().key_pem)
        assert made.result().trust_domain == TRUST_DOMAIN
    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(directory)


def _init_quietly(directory: Path) -> bool:
    try:
        pki.init(directory, TRUST_DOMAIN, NOW)
    except FileExistsError:
        return False
    return True


def test_init_by_processes_at_once_makes_one_ca(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.map(_init_quietly, [tmp_path] * 8, chunksize=1)
    assert sum(made) == 1
    assert pki.load(tmp_path).trust_domain == TRUST_DOMAIN
    assert sorted(_listing(tmp_path)) == ["ca-key.pem", "ca.pem"]


@pytest.mark.parametrize("name", ["", "Test.local", "test.local/a", "a b", "täst", "a:1", "a@b"])
def test_init_bad_trust_domain_is_refused_before_a_file_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"SPIFFE ID|trust domain"):
        pki.init(tmp_path / "pki", name, NOW)
    assert not (tmp_path / "pki").exists()


def test_load_empty_directory_finds_no_ca(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pki.load(tmp_path)


def test_load_key_of_another_ca_is_refused(tmp_path: Path) -> None:
    pki.init(tmp_path / "a", TRUST_DOMAIN, NOW)
    pki.init(tmp_path / "b", TRUST_DOMAIN, NOW)
    (tmp_path / "b" / "ca-key.pem").replace(tmp_path / "a" / "ca-key.pem")
    with pytest.raises(ValueError, match=r"ca-key\.pem: not the key of"):
        pki.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ca.pem", b"no PEM"),
        ("ca.pem", certs.ca().pem),  # names no trust domain
        ("ca.pem", certs.leaf(certs.ca(), uris=("https://a",)).pem),
        ("ca-key.pem", b"no PEM"),
        ("ca-key.pem", certs.ca(key=ed25519.Ed25519PrivateKey.generate()).key_pem),
    ],
    ids=["no_pem", "foreign_ca", "no_spiffe_id", "no_key", "no_ec_key"],
)
def test_load_broken_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    pki.init(tmp_path, TRUST_DOMAIN, NOW)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        pki.load(tmp_path)


# --- leaves ---


def test_issue_client_has_the_shape_of_an_svid(authority: pki.Authority) -> None:
    """One URI, digitalSignature alone, no CA (X509-SVID sections 2 to 4)."""
    certificate = _certificate(pki.issue(authority, spiffe_path="team/orders", now=NOW))
    extensions = certificate.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical  # the subject is empty
    assert list(names.value) == [x509.UniformResourceIdentifier("spiffe://test.local/team/orders")]
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value) == (True, certs.usage("digital_signature"))
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    ca_id = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    key_id = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert key_id == ca_id.value.digest
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def test_issue_server_has_loopback_names_and_server_auth(authority: pki.Authority) -> None:
    pair = pki.issue(
        authority,
        spiffe_path="authsvc",
        dns_names=("auth.test.local", "localhost"),
        common_name="authsvc",
        server=True,
        now=NOW,
    )
    names = _names(_certificate(pair))
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "auth.test.local"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("::1"),
    ]
    extended = _certificate(pair).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(extended) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert _certificate(pair).subject.rfc4514_string() == "CN=authsvc"


def test_issue_client_names_no_host(authority: pki.Authority) -> None:
    names = _names(_certificate(pki.issue(authority, spiffe_path="a", now=NOW)))
    assert names.get_values_for_type(x509.DNSName) == []
    assert names.get_values_for_type(x509.IPAddress) == []


def test_issue_is_accepted_by_a_listener_of_the_ca(authority: pki.Authority) -> None:
    trusted = Trust((authority.certificate,))
    pair = pki.issue(authority, spiffe_id="spiffe://test.local/a", now=NOW)
    peer = Peers(lambda: trusted)(certs.context(pair[0]), NOW)
    assert peer.spiffe_id == "spiffe://test.local/a"


def test_issue_key_belongs_to_the_certificate_and_serials_differ(
    authority: pki.Authority,
) -> None:
    pairs = [pki.issue(authority, spiffe_path="a", now=NOW) for _ in range(3)]
    for pair in pairs:
        key = serialization.load_pem_private_key(pair[1], password=None)
        assert key.public_key() == _certificate(pair).public_key()
    assert len({_certificate(pair).serial_number for pair in pairs}) == 3


def test_issue_starts_a_little_in_the_past_and_lives_its_lifetime(
    authority: pki.Authority,
) -> None:
    later = NOW + 10 * DAY
    pair = pki.issue(authority, spiffe_path="a", lifetime=timedelta(hours=2), now=later)
    validity = certificate_validity(_certificate(pair))
    assert (validity.not_before, validity.not_after) == (later - 300, later + 7200)


def test_issue_never_outlives_its_ca(authority: pki.Authority) -> None:
    ca = certificate_validity(authority.certificate)
    early = pki.issue(authority, spiffe_path="a", now=ca.not_before + 1)
    late = pki.issue(authority, spiffe_path="a", now=ca.not_after - DAY)
    assert certificate_validity(_certificate(early)).not_before == ca.not_before
    assert certificate_validity(_certificate(late)).not_after == ca.not_after
    with pytest.raises(ValueError, match="never be valid"):
        pki.issue(authority, spiffe_path="a", now=ca.not_after + DAY)


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(days=-1)])
def test_issue_lifetime_that_is_none_is_refused(
    authority: pki.Authority, lifetime: timedelta
) -> None:
    with pytest.raises(ValueError, match="never be valid"):
        pki.issue(authority, spiffe_path="a", lifetime=lifetime, now=NOW)


@pytest.mark.parametrize(
    ("spiffe_path", "spiffe_id"),
    [
        ("", ""),
        ("a", "spiffe://test.local/a"),
        ("", "spiffe://other.local/a"),
        ("", "spiffe://test.local"),
        ("", "https://test.local/a"),
        ("a/../b", ""),
        ("/", ""),
        ("//a", ""),
        ("a b", ""),
        ("a" * 2048, ""),
    ],
)
def test_issue_bad_identity_is_refused(
    authority: pki.Authority, spiffe_path: str, spiffe_id: str
) -> None:
    with pytest.raises(ValueError, match=r"SPIFFE ID|spiffe_id|trust domain"):
        pki.issue(authority, spiffe_path=spiffe_path, spiffe_id=spiffe_id, now=NOW)


def test_issue_for_neither_side_is_refused(authority: pki.Authority) -> None:
    with pytest.raises(ValueError, match="server, a client or both"):
        pki.issue(authority, spiffe_path="a", client=False, now=NOW)


def test_issue_leading_slash_of_the_path_is_the_same_identity(authority: pki.Authority) -> None:
    names = _names(_certificate(pki.issue(authority, spiffe_path="/a", now=NOW)))
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://test.local/a"]


# --- files ---


def test_write_pair_writes_both_files_and_hides_the_key(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    paths = pki.write_pair(b"certificate", b"key", directory, "orders")
    assert paths == (directory / "orders.pem", directory / "orders-key.pem")
    assert _listing(directory) == {"orders.pem": b"certificate", "orders-key.pem": b"key"}
    assert _mode(paths[1]) == 0o600
    assert _mode(paths[0]) == 0o644


def test_write_pair_again_replaces_files_instead_of_writing_into_them(tmp_path: Path) -> None:
    certificate_file, key_file = pki.write_pair(b"old", b"old key", tmp_path, "orders")
    key_file.chmod(0o644)
    with certificate_file.open("rb") as old:
        pki.write_pair(b"new", b"new key", tmp_path, "orders")
        assert old.read() == b"old"
    assert _listing(tmp_path) == {"orders.pem": b"new", "orders-key.pem": b"new key"}
    assert _mode(key_file) == 0o600


def test_write_pair_failure_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        pki.write_pair(b"certificate", "text", tmp_path, "a")  # type: ignore[arg-type]  # on purpose
    assert _listing(tmp_path) == {}


@pytest.mark.parametrize("name", ["", "ca", ".", "..", "a/b", "../a", ".hidden", "/a"])
def test_write_pair_name_that_leaves_the_directory_or_hits_the_ca_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="not a name"):
        pki.write_pair(b"c", b"k", tmp_path / "certs", name)
    assert not (tmp_path / "certs").exists()


# --- SPIFFE IDs (SPIFFE-ID sections 2.1 to 2.3) ---


@pytest.mark.parametrize(
    ("text", "trust_domain", "path"),
    [
        ("spiffe://test.local", "test.local", ""),
        ("spiffe://test.local/a", "test.local", "/a"),
        ("spiffe://t-e_s.t.0/A/b-_./...", "t-e_s.t.0", "/A/b-_./..."),
        ("spiffe://" + "a" * 255, "a" * 255, ""),
        ("spiffe://a/" + "b" * 2037, "a", "/" + "b" * 2037),
    ],
)
def test_parse_good_id_gives_its_parts(text: str, trust_domain: str, path: str) -> None:
    parsed = spiffe.parse(text)
    assert (parsed.trust_domain, parsed.path, str(parsed)) == (trust_domain, path, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "test.local/a",
        "https://test.local/a",
        "SPIFFE://test.local/a",
        "spiffe:/test.local/a",
        "spiffe:///a",
        "spiffe://Test.local/a",
        "spiffe://test.local/",
        "spiffe://test.local/a/",
        "spiffe://test.local//a",
        "spiffe://test.local/./a",
        "spiffe://test.local/a/..",
        "spiffe://test.local/a%2Fb",
        "spiffe://test.local/ä",
        "spiffe://tëst.local/a",
        "spiffe://test.local/a?b",
        "spiffe://test.local/a#b",
        "spiffe://test.local:443/a",
        "spiffe://user@test.local/a",
        "spiffe://test.local/a\n",
        "spiffe://test.local/a\x00",
        " spiffe://test.local/a",
        "spiffe://test.local/\u0661",
        "spiffe://" + "a" * 256,
        "spiffe://a/" + "b" * 2038,
    ],
)
def test_parse_bad_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"SPIFFE ID|trust domain"):
        spiffe.parse(text)


def test_parse_workload_needs_a_path() -> None:
    """X509-SVID sections 3.1 and 5.2: the ID of a leaf has a path."""
    assert spiffe.parse_workload("spiffe://test.local/a").path == "/a"
    with pytest.raises(ValueError, match="has a path"):
        spiffe.parse_workload("spiffe://test.local")


def test_check_trust_domain_takes_a_name_and_no_path() -> None:
    spiffe.check_trust_domain("test.local")
    with pytest.raises(ValueError, match="no path"):
        spiffe.check_trust_domain("test.local/a")
