"""The development PKI: a CA in a directory, and certificates from it. Not for production."""

import contextlib
import fcntl
import ipaddress
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from authsvc.oauth import spiffe

CA_NAME: Final = "ca"
CA_LIFETIME: Final = timedelta(days=3650)
LEAF_LIFETIME: Final = timedelta(days=90)
BACKDATED: Final = timedelta(minutes=5)
"""How far a certificate starts in the past: clocks of a network differ."""

_LOOPBACK = (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1"))


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA that can issue."""

    certificate: x509.Certificate
    trust_domain: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate, to trust."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def init(directory: Path, trust_domain: str, now: float) -> Authority:
    """Make a CA in a directory: `ca.pem` and `ca-key.pem` (RFC 5280 section 4.2.1).

    FileExistsError where the directory has one: a CA is never overwritten, and of processes that
    start at once one makes it.
    """
    spiffe.check_trust_domain(trust_domain)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(directory):
        certificate_file, key_file = _files(directory, CA_NAME)
        if certificate_file.exists():
            raise FileExistsError(f"{certificate_file}: the directory has a CA already")
        # A key alone is what a killed run leaves: taken up, as deleting a key is never ours to do.
        found = key_file.exists()
        key = _read_key(key_file) if found else ec.generate_private_key(ec.SECP256R1())
        authority = Authority(_ca_certificate(key, trust_domain, now), trust_domain, key)
        _publish(authority, certificate_file, None if found else key_file)
    return authority


def load(directory: Path) -> Authority:
    """The CA of a directory; FileNotFoundError where there is none, ValueError where it is broken.

    Only CAs of `init` are taken: the certificate names its trust domain (X509-SVID section 3.2).
    """
    certificate_file, key_file = _files(directory, CA_NAME)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        trust_domain = spiffe.parse(uri).trust_domain
    except (ValueError, x509.ExtensionNotFound) as error:
        raise ValueError(f"{certificate_file}: not a CA of authsvc's PKI ({error})") from error
    key = _read_key(key_file)
    if key.public_key() != certificate.public_key():
        raise ValueError(f"{key_file}: not the key of {certificate_file}")
    return Authority(certificate, trust_domain, key)


def issue(
    authority: Authority,
    *,
    now: float,
    spiffe_path: str = "",
    spiffe_id: str = "",
    dns_names: Sequence[str] = (),
    common_name: str = "",
    lifetime: timedelta = LEAF_LIFETIME,
    server: bool = False,
    client: bool = True,
) -> tuple[bytes, bytes]:
    """A leaf certificate and its key, in PEM (X509-SVID sections 2 to 4).

    Its one URI is `spiffe://<trust domain>/<spiffe_path>` or `spiffe_id`. `server` adds serverAuth,
    localhost and the loopback addresses. It starts and ends within the life of its CA.
    """
    usages = _usages(server=server, client=client)
    names = _names(authority.trust_domain, spiffe_path, spiffe_id)
    if server:
        dns_names = tuple(dict.fromkeys(("localhost", *dns_names)))
    names += [x509.DNSName(name) for name in dns_names]
    names += [x509.IPAddress(address) for address in _LOOPBACK if server]
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(key.public_key(), _span(authority, lifetime, now), authority.key.public_key())
        .subject_name(_subject(common_name))
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        # RFC 5280 section 4.2.1.6: critical where the subject is empty.
        .add_extension(x509.SubjectAlternativeName(names), critical=not common_name)
    )
    certificate = builder.sign(authority.key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def read(file: Path) -> x509.Certificate:
    """The certificate of a file in PEM; ValueError where it is none."""
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not a certificate in PEM") from error


def names(certificate: x509.Certificate) -> tuple[str, list[str]]:
    """SPIFFE ID and DNS names of a certificate of this PKI."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = found.get_values_for_type(x509.UniformResourceIdentifier)
    return uri, found.get_values_for_type(x509.DNSName)


def is_current(authority: Authority, directory: Path, name: str, until: float) -> bool:
    """Whether the directory holds this pair, issued by this CA and valid until `until`."""
    certificate_file, key_file = _files(directory, name)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        certificate.verify_directly_issued_by(authority.certificate)
        fits = _read_key(key_file).public_key() == certificate.public_key()
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    return fits and certificate.not_valid_after_utc.timestamp() >= until


def write_pair(certificate: bytes, key: bytes, directory: Path, name: str) -> tuple[Path, Path]:
    """Write `<name>.pem` and `<name>-key.pem` (mode 0600), each at once; give their paths.

    An older pair is replaced, the key first: a reader that meets the two halves between sees a
    pair that does not fit, and reads again.
    """
    if name in ("", CA_NAME) or name.startswith(".") or Path(name).name != name:
        raise ValueError(f"not a name for a pair of files: {name!r}")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate_file, key_file = _files(directory, name)
    _temporary(key, key_file, mode=0o600).replace(key_file)
    _temporary(certificate, certificate_file, mode=0o644).replace(certificate_file)
    _sync(directory)
    return certificate_file, key_file


def _ca_certificate(
    key: ec.EllipticCurvePrivateKey, trust_domain: str, now: float
) -> x509.Certificate:
    start = datetime.fromtimestamp(now, UTC)
    # The key's digest tells CAs of the same trust domain apart.
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    name = _subject(f"authsvc development CA {digest}")
    uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")
    return (
        _builder(key.public_key(), (start - BACKDATED, start + CA_LIFETIME), key.public_key())
        .subject_name(name)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    public_key: ec.EllipticCurvePublicKey,
    span: tuple[datetime, datetime],
    issuer_key: ec.EllipticCurvePublicKey,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(span[0])
        .not_valid_after(span[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False
        )
    )


def _span(authority: Authority, lifetime: timedelta, now: float) -> tuple[datetime, datetime]:
    start = datetime.fromtimestamp(now, UTC)
    ca = authority.certificate
    first = max(start - BACKDATED, ca.not_valid_before_utc)
    last = min(start + lifetime, ca.not_valid_after_utc)
    if lifetime <= timedelta(0) or last <= first:
        raise ValueError("the certificate would never be valid")
    return first, last


def _names(trust_domain: str, path: str, spiffe_id: str) -> list[x509.GeneralName]:
    if bool(path) == bool(spiffe_id):
        raise ValueError("a certificate takes either spiffe_path or spiffe_id")
    text = spiffe_id or f"spiffe://{trust_domain}/{path.removeprefix('/')}"
    if spiffe.parse_workload(text).trust_domain != trust_domain:
        raise ValueError(f"the CA issues in the trust domain {trust_domain} only")
    return [x509.UniformResourceIdentifier(text)]


def _usages(*, server: bool, client: bool) -> list[x509.ObjectIdentifier]:
    usages = [ExtendedKeyUsageOID.SERVER_AUTH] if server else []
    if client:
        usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    if not usages:
        raise ValueError("a certificate is for a server, a client or both")
    return usages


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(common_name: str) -> x509.Name:
    name = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
    return x509.Name(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a private key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path}: not an EC key")
    return key


def _files(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"{name}.pem", directory / f"{name}-key.pem"


def _publish(authority: Authority, certificate_file: Path, key_file: Path | None) -> None:
    """Make the files appear, the certificate last: it is what says that there is a CA."""
    if key_file is not None:
        create_file(_key_pem(authority.key), key_file, mode=0o600)
    try:
        create_file(authority.certificate_pem, certificate_file, mode=0o644)
    except BaseException:
        if key_file is not None:
            key_file.unlink()
        raise
    _sync(certificate_file.parent)


def create_file(content: bytes, path: Path, *, mode: int) -> None:
    """Create a file, whole and on disk; FileExistsError, as by O_EXCL, where it exists."""
    temporary = _temporary(content, path, mode=mode)
    try:
        path.hardlink_to(temporary)
    finally:
        temporary.unlink()
    _sync(path.parent)


def _temporary(content: bytes, beside: Path, *, mode: int) -> Path:
    """A new file in the same directory with the content on disk; gone again if that fails."""
    handle, name = tempfile.mkstemp(prefix=f".{beside.name}.", dir=beside.parent)  # 0600, O_EXCL
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(content)
            file.flush()
            os.fsync(handle)
    except BaseException:
        path.unlink()
        raise
    return path


def _sync(directory: Path) -> None:
    """Put the names in a directory on disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of `init`; the lock goes with the process."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
