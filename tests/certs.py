"""Certificates for tests: good ones from authsvc.pki, odd ones built by hand."""

import json
from base64 import b64encode, encodebytes, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from authsvc.rpc.peer import spki_sha256

NOW: Final = 1_800_000_000.0
HOUR: Final = 3600.0
DAY: Final = 24 * HOUR

Span: TypeAlias = tuple[float, float]
"""First and last second of a validity."""
Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
Context: TypeAlias = dict[str, list[bytes]]

LONG: Final = (NOW - 1000 * DAY, NOW + 1000 * DAY)
SHORT: Final = (NOW - HOUR, NOW + HOUR)
CLIENT: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)
SPIFFE_ID: Final = "spiffe://test.local/orders"


@dataclass(frozen=True)
class Issued:
    """A certificate with its key: a CA, or a leaf."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        return pem(self.certificate)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @property
    def pin(self) -> str:
        return spki_sha256(self.certificate)

    def context(self, *others: "Issued") -> Context:
        """What gRPC hands over when it is presented with these other certificates."""
        return context(self.pem, b"".join(other.pem for other in others))


def context(leaf: bytes, chain: bytes = b"") -> Context:
    """As `context.auth_context()` of grpc.aio: no chain where the leaf came alone."""
    return {"x509_pem_cert": [leaf]} | ({"x509_pem_cert_chain": [chain]} if chain else {})


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def base64_lines(der: bytes) -> bytes:
    """The inside of a PEM block."""
    return encodebytes(der).strip()


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def usage(*names: str) -> x509.KeyUsage:
    """A keyUsage with only these bits."""
    bits = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{bit: bit in names for bit in bits.split()})


MAY_ISSUE: Final = usage("key_cert_sign", "crl_sign")
MAY_SIGN: Final = usage("digital_signature")


def ca(
    called: str = "Test CA",
    *,
    issuer: Issued | None = None,
    key: Key | None = None,
    span: Span = LONG,
    is_ca: bool = True,
    critical: bool = True,
    path_length: int | None = None,
    key_usage: x509.KeyUsage | None = MAY_ISSUE,
    constraints: x509.NameConstraints | None = None,
    constraints_critical: bool = True,
) -> Issued:
    """A CA; self-signed without an issuer."""
    key = key or ec_key()
    basic = x509.BasicConstraints(ca=is_ca, path_length=path_length)
    builder = _builder(name(called), key, issuer, span).add_extension(basic, critical)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=True)
    if constraints is not None:
        builder = builder.add_extension(constraints, constraints_critical)
    return _sign(builder, key, issuer)


def leaf(
    issuer: Issued | None,
    *,
    uris: Sequence[str] = (SPIFFE_ID,),
    dns: Sequence[str] = (),
    subject: str = "",
    span: Span = SHORT,
    is_ca: bool | None = False,
    key_usage: x509.KeyUsage | None = MAY_SIGN,
    extended: Sequence[x509.ObjectIdentifier] | None = CLIENT,
    extended_critical: bool = False,
    key_id: bool = True,
    extra: x509.UnrecognizedExtension | None = None,
    key: Key | None = None,
) -> Issued:
    """A client's certificate; self-signed without an issuer. None leaves an extension out."""
    key = key or ec_key()
    builder = _builder(name(subject), key, issuer, span, key_id=key_id)
    if is_ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(is_ca, None), critical=True)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=True)
    if extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), extended_critical)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.DNSName(name) for name in dns]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not subject)
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    return _sign(builder, key, issuer)


def jwk(ca: Issued, **changes: Any) -> dict[str, Any]:
    """The entry of a CA in a SPIFFE bundle (X509-SVID section 6.1)."""
    assert isinstance(ca.key, ec.EllipticCurvePrivateKey)
    numbers = ca.key.public_key().public_numbers()
    x, y = (
        urlsafe_b64encode(value.to_bytes(32, "big")).rstrip(b"=").decode()
        for value in (numbers.x, numbers.y)
    )
    certificate = b64encode(ca.certificate.public_bytes(serialization.Encoding.DER)).decode()
    entry = {"use": "x509-svid", "kty": "EC", "crv": "P-256", "x": x, "y": y, "x5c": [certificate]}
    return entry | changes


def bundle(*entries: Issued | dict[str, Any]) -> bytes:
    """A SPIFFE bundle as a bundle endpoint answers it."""
    keys = [jwk(entry) if isinstance(entry, Issued) else entry for entry in entries]
    return json.dumps({"spiffe_sequence": 1, "spiffe_refresh_hint": 300, "keys": keys}).encode()


def name(text: str) -> x509.Name:
    """A distinguished name with one common name; empty for no text."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def _builder(
    subject: x509.Name, key: Key, issuer: Issued | None, span: Span, *, key_id: bool = True
) -> x509.CertificateBuilder:
    first, last = (datetime.fromtimestamp(second, UTC) for second in span)
    issuer_key = (issuer.key if issuer else key).public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if not key_id:
        return builder
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return builder.add_extension(aki, critical=False)


def _sign(builder: x509.CertificateBuilder, key: Key, issuer: Issued | None) -> Issued:
    signer = issuer.key if issuer else key
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Issued(builder.sign(signer, algorithm), key)
