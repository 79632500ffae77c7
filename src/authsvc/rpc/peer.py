"""Who is on the connection: from gRPC's certificates to `model.Peer` (RFC 8705, X509-SVID)."""

import hashlib
import json
from base64 import b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, TypeAlias, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from authsvc.errors import AuthError, Reason
from authsvc.model import Peer, Validity
from authsvc.oauth import spiffe

PEERS_ENTRIES_MAX: Final = 4096
PEERS_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of the PEM that the cache is keyed by; what is made of it is of the same order."""
PRESENTED_BYTES_MAX: Final = 64 * 1024
PRESENTED_CERTIFICATES_MAX: Final = 4
"""Beside the leaf. Bounds the search for paths, which a caller could make long."""
AUTHORITIES_MAX: Final = 64
"""In one file."""
BUNDLE_BYTES_MAX: Final = 2**20

Authorities: TypeAlias = tuple[x509.Certificate, ...]
AuthContext: TypeAlias = Mapping[str, Iterable[bytes]]
"""As grpc.aio's `context.auth_context()` gives it."""
Presented: TypeAlias = tuple[Iterable[bytes] | None, Iterable[bytes] | None]
"""Leaf and chain, as they stand there."""

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose certificates a listener takes; another set is another object."""

    client_cas: Authorities
    bundles: Mapping[str, Authorities] = field(default_factory=lambda: MappingProxyType({}))
    """Outside trust domain -> CAs that vouch for its SPIFFE IDs, and for nothing else."""

    def pins(self, trust_domain: str) -> frozenset[str]:
        """What vouches for SPIFFE IDs of a trust domain; "" for names that are no SPIFFE ID.

        Where there is a bundle it is the bundle alone, else any client CA, by its key.
        """
        if trust_domain in self.bundles:
            return frozenset({bundle_pin(trust_domain)})
        return frozenset(map(spki_sha256, self.client_cas))

    def pem(self) -> bytes:
        """All CAs, for the handshake."""
        return b"".join(
            certificate.public_bytes(serialization.Encoding.PEM)
            for authorities in (self.client_cas, *self.bundles.values())
            for certificate in authorities
        )


def bundle_pin(trust_domain: str) -> str:
    """What stands for all CAs of a bundle, as they come and go: the ID of the trust domain."""
    return f"spiffe://{trust_domain}"


def spki_sha256(certificate: x509.Certificate) -> str:
    """The pin of a CA: lower-case hex SHA-256 of its SubjectPublicKeyInfo (RFC 7469 section 2.4).

    The same as `openssl x509 -pubkey -noout | openssl pkey -pubin -outform DER | sha256sum`.
    """
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(key).hexdigest()


def x5t_s256(certificate: x509.Certificate) -> str:
    """The thumbprint `x5t#S256` (RFC 8705 section 3.1)."""
    return urlsafe_b64encode(certificate.fingerprint(hashes.SHA256())).rstrip(b"=").decode()


def canonical_dn(text: str) -> str:
    """A subject as peers have it here (RFC 4514); ValueError where it is none."""
    return x509.Name.from_rfc4514_string(text).rfc4514_string()


def certificate_validity(certificate: x509.Certificate) -> Validity:
    """When a certificate itself is valid (RFC 5280 section 4.1.2.5)."""
    return Validity(
        certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    )


def read_certificates(pem: bytes) -> tuple[x509.Certificate, ...]:
    """All certificates of a PEM text; ValueError where one of them cannot be read."""
    certificates = tuple(x509.load_pem_x509_certificates(pem))
    # A file caught while it is written ends in a block that the reader passes over.
    if len(certificates) != pem.count(b"-----BEGIN"):
        raise ValueError("not only whole certificates in PEM")
    return certificates


def read_authorities(pem: bytes) -> Authorities:
    """The client CAs of a PEM text; ValueError unless each can issue (RFC 5280 section 4.2.1)."""
    return _checked(read_certificates(pem))


def _checked(authorities: Authorities) -> Authorities:
    if len(authorities) > AUTHORITIES_MAX:
        raise ValueError(f"more than {AUTHORITIES_MAX} CAs")
    for certificate in authorities:
        try:
            _check_authority(certificate)
        except ValueError as error:
            raise ValueError(f"{certificate.subject.rfc4514_string()!r}: {error}") from error
    return authorities


def read_bundle(content: bytes) -> Authorities:
    """The X.509 CAs of a SPIFFE bundle, or of a PEM text; ValueError where one is not usable.

    SPIFFE Trust Domain and Bundle section 4, X509-SVID section 6.2. A bundle without any means that
    the trust domain has none.
    """
    if not content.lstrip().startswith(b"{"):
        return read_authorities(content)
    if len(content) > BUNDLE_BYTES_MAX:
        raise ValueError(f"more than {BUNDLE_BYTES_MAX} bytes")
    keys = json.loads(content).get("keys")
    if not isinstance(keys, list) or not all(isinstance(jwk, dict) for jwk in keys):
        raise ValueError("not a JWK set")
    if any({"d", "k"} & jwk.keys() for jwk in keys):
        raise ValueError("it holds private keys, which belong to nobody but their owner")
    # An entry of another kind, and one without a certificate, has to be ignored.
    chains = [
        jwk["x5c"]
        for jwk in keys
        if jwk.get("use") == "x509-svid" and jwk.get("kty") in ("EC", "RSA") and jwk.get("x5c")
    ]
    return _checked(tuple(map(_first, chains)))


def _first(chain: object) -> x509.Certificate:
    """The certificate of an `x5c`; whatever follows it has to be ignored as well."""
    if not isinstance(chain, list) or not isinstance(chain[0], str):
        raise ValueError("x5c is not a list of texts")
    return x509.load_der_x509_certificate(b64decode(chain[0], validate=True))


def check_pair(certificate_pem: bytes, key_pem: bytes) -> None:
    """ValueError unless the key is the one of the first certificate, and of a usable kind."""
    certificate = read_certificates(certificate_pem)[0]
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except TypeError as error:
        raise ValueError("the private key is encrypted") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ValueError("the private key is neither EC nor RSA")
    if key.public_key() != certificate.public_key():
        raise ValueError("the private key is not the one of the certificate")


class Peers:
    """The peer of a call, judged by whom the listener trusts now.

    What a certificate says and which CAs issued it is remembered by its bytes; whether it is valid
    is asked on every call, since a connection outlives a certificate.
    """

    def __init__(
        self,
        trust: Callable[[], Trust],
        *,
        entries_max: int = PEERS_ENTRIES_MAX,
        bytes_max: int = PEERS_BYTES_MAX,
    ) -> None:
        self.trust = trust
        """Who is trusted now."""
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._follow(trust())

    def __call__(self, auth_context: AuthContext, now: float) -> Peer:
        """The peer of a connection, at `now` in seconds since the epoch (RFC 8705 section 2.1).

        Raises PEER_CERTIFICATE_MISSING, PEER_CERTIFICATE_INVALID or PEER_CERTIFICATE_EXPIRED.
        """
        trust = self.trust()
        if trust is not self._trusted:
            self._follow(trust)
        # The chain comes without the leaf: leaves of one intermediate have the same.
        key = (_property(auth_context, _LEAF), _property(auth_context, _CHAIN))
        known = self._known.get(key)
        if known is None:
            known = self._remember(key, now)
        else:
            self._known.move_to_end(key)
        if isinstance(known, str):
            raise AuthError(Reason.PEER_CERTIFICATE_INVALID, cause=known)
        for path in known.paths.values():  # each lies within the validity of the leaf
            if path.covers(now):
                return known
        raise AuthError(Reason.PEER_CERTIFICATE_EXPIRED)

    def _follow(self, trust: Trust) -> None:
        self._trusted = trust
        self._vouchers = _vouchers(trust)
        self._known: OrderedDict[tuple[bytes, bytes], Peer | str] = OrderedDict()
        self._bytes = 0

    def _remember(self, key: tuple[bytes, bytes], now: float) -> Peer | str:
        """Judge and keep; a refusal is kept too, as text, or it would cost a search per call."""
        if not key[0]:
            raise AuthError(Reason.PEER_CERTIFICATE_MISSING)
        if _size(key) > PRESENTED_BYTES_MAX:
            raise AuthError(Reason.PEER_CERTIFICATE_INVALID, cause="too many bytes presented")
        known: Peer | str
        try:
            known = _judge(*key, self._vouchers, now)
        except Exception as error:  # whatever a hostile certificate does to the parser
            known = f"{type(error).__name__}: {error}"
        self._known[key] = known
        self._bytes += _size(key)
        while len(self._known) > self._entries_max or self._bytes > self._bytes_max:
            self._bytes -= _size(self._known.popitem(last=False)[0])
        return known


class _Voucher:
    """CAs that vouch for the same names, and the paths that lead to them and to nobody else."""

    def __init__(self, bundle: str, authorities: Authorities, strangers: Iterable[Authorities]):
        """`bundle` is the trust domain of a bundle, "" for the client CAs of the listener.

        A path never leads through `strangers`, whoever signed them.
        """
        self.bundle = bundle
        by_key: dict[str, list[x509.Certificate]] = {}
        for certificate in authorities:
            by_key.setdefault(spki_sha256(certificate), []).append(certificate)
        self._anchors = [
            _Anchor(bundle_pin(bundle) if bundle else ca, certificates)
            for ca, certificates in by_key.items()
        ]
        self._strangers = {spki_sha256(ca) for cas in strangers for ca in cas}

    def paths(
        self, leaf: x509.Certificate, presented: Authorities, now: float
    ) -> Mapping[str, Validity]:
        """Pin -> validity of the best path to it; ValueError where there is no path."""
        others = [ca for ca in presented if spki_sha256(ca) not in self._strangers]
        found: dict[str, list[Validity]] = {}
        failures = []
        for anchor in self._anchors:
            try:
                path = anchor.path(leaf, others, now)
            except VerificationError as failure:
                failures.append(str(failure))
            else:
                found.setdefault(anchor.pin, []).append(path)
        if not found:
            whom = f"the bundle of {self.bundle}" if self.bundle else "a client CA of the listener"
            raise ValueError(f"no path to {whom}: {'; '.join(failures)}")
        return MappingProxyType({pin: _best(paths, now) for pin, paths in found.items()})


def _vouchers(trust: Trust) -> Mapping[str, _Voucher]:
    """Trust domain -> its bundle; "" -> the client CAs, for all other names."""
    everybody = {"": trust.client_cas, **trust.bundles}
    return {
        domain: _Voucher(domain, cas, (c for name, c in everybody.items() if name != domain))
        for domain, cas in everybody.items()
    }


class _Anchor:
    """One CA key, and the paths that lead to it and to no other."""

    def __init__(self, pin: str, certificates: list[x509.Certificate]) -> None:
        self.pin = pin
        self._certificates = certificates
        self._policy = (
            PolicyBuilder()
            .store(Store(certificates))
            .max_chain_depth(PRESENTED_CERTIFICATES_MAX)
            .extension_policies(
                ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=_leaf_policy()
            )
        )

    def path(self, leaf: x509.Certificate, others: list[x509.Certificate], now: float) -> Validity:
        """When the best path from the leaf is valid; VerificationError where there is none."""
        paths, failures = [], []
        for instant in self._instants(leaf, others, now):
            try:
                paths.append(self._path_at(instant, leaf, others))
            except VerificationError as failure:
                failures.append(failure)
        if not paths:
            raise failures[0]
        return _best(paths, now)

    def _instants(
        self, leaf: x509.Certificate, others: list[x509.Certificate], now: float
    ) -> list[int]:
        """Times in the life of the leaf that miss no path: each path begins at one of them.

        `now` comes first. An expired path is found as well, so that it can be remembered.
        """
        life = certificate_validity(leaf)
        starts = [certificate_validity(c).not_before for c in (*others, *self._certificates)]
        times = (min(max(time, life.not_before), life.not_after) for time in (now, *starts))
        return list(dict.fromkeys(int(time) for time in times))

    def _path_at(
        self, instant: int, leaf: x509.Certificate, others: list[x509.Certificate]
    ) -> Validity:
        policy = self._policy.time(datetime.fromtimestamp(instant, UTC))
        chain = policy.build_client_verifier().verify(leaf, others).chain
        if any(_constrains_directory_names(certificate) for certificate in chain):
            raise VerificationError("a name constraint on directory names, which none applies here")
        spans = [certificate_validity(certificate) for certificate in chain]
        return Validity(max(s.not_before for s in spans), min(s.not_after for s in spans))


def _best(paths: list[Validity], now: float) -> Validity:
    return max(paths, key=lambda path: (path.covers(now), path.not_after))


_LEAF: Final = "x509_pem_cert"
_CHAIN: Final = "x509_pem_cert_chain"


def presented(auth_context: AuthContext) -> Presented:
    """All that `Peers` looks at, to compare with what it looked at before."""
    return (auth_context.get(_LEAF), auth_context.get(_CHAIN))


def _property(auth_context: AuthContext, name: str) -> bytes:
    values = tuple(auth_context.get(name, ()))
    if len(values) > 1:
        raise AuthError(Reason.PEER_CERTIFICATE_INVALID, cause=f"more than one {name}")
    return values[0] if values else b""


def _size(key: tuple[bytes, bytes]) -> int:
    return len(key[0]) + len(key[1])


def _judge(leaf_pem: bytes, chain_pem: bytes, vouchers: Mapping[str, _Voucher], now: float) -> Peer:
    leaf = x509.load_pem_x509_certificate(leaf_pem)
    others = read_certificates(chain_pem) if chain_pem else ()
    if len(others) > PRESENTED_CERTIFICATES_MAX:
        raise ValueError("too many certificates presented")
    _check_usage(leaf)
    spiffe_id, dns_names = _names(leaf)
    voucher = vouchers.get(spiffe_id.trust_domain if spiffe_id else "", vouchers[""])
    return Peer(
        thumbprint=x5t_s256(leaf),
        spiffe_id=str(spiffe_id or ""),
        # A bundle vouches for the SPIFFE ID: what else the certificate says is worth nothing.
        dns_names=frozenset() if voucher.bundle else dns_names,
        subject_dn="" if voucher.bundle else leaf.subject.rfc4514_string(),
        validity=certificate_validity(leaf),
        paths=voucher.paths(leaf, others, now),
    )


def _check_usage(leaf: x509.Certificate) -> None:
    """A leaf that may authenticate a client and sign nothing (X509-SVID section 4)."""
    constraints = _extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise ValueError("a CA certificate")
    usage = _extension(leaf, x509.KeyUsage)
    if usage is not None and (usage.key_cert_sign or usage.crl_sign):
        raise ValueError("keyUsage lets it sign certificates or CRLs")
    if usage is not None and not usage.digital_signature:
        raise ValueError("keyUsage lacks digitalSignature")
    extended = _extension(leaf, x509.ExtendedKeyUsage)
    # Neither an absent extension nor anyExtendedKeyUsage says that clients were meant.
    if extended is None or ExtendedKeyUsageOID.CLIENT_AUTH not in extended:
        raise ValueError("extendedKeyUsage lacks clientAuth")


def _names(leaf: x509.Certificate) -> tuple[spiffe.SpiffeId | None, frozenset[str]]:
    """The SPIFFE ID and the DNS names (X509-SVID section 2, RFC 8705 section 2.1.2).

    A URI of another scheme names nobody here, and leaves the other names usable. One that claims
    to be a SPIFFE ID must be one, in a certificate with keyUsage.
    """
    names = _extension(leaf, x509.SubjectAlternativeName)
    if names is None:
        return None, frozenset()
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) > 1:
        raise ValueError("more than one URI")
    dns_names = frozenset(name.lower() for name in names.get_values_for_type(x509.DNSName))
    if not uris or not uris[0].lower().startswith("spiffe:"):
        return None, dns_names
    if _extension(leaf, x509.KeyUsage) is None:
        raise ValueError("a SPIFFE ID without keyUsage")
    return spiffe.parse_workload(uris[0]), dns_names


def _leaf_policy() -> ExtensionPolicy:
    """What the verifier asks of a leaf; `_check_usage` has asked for more already.

    Clients by subject have no SAN, companies' CAs leave out the key identifier, and RFC 5280 lets
    extendedKeyUsage be critical.
    """
    return (
        ExtensionPolicy.webpki_defaults_ee()
        .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
        .may_be_present(x509.AuthorityKeyIdentifier, Criticality.NON_CRITICAL, None)
        .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None)
    )


def _check_authority(certificate: x509.Certificate) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except x509.ExtensionNotFound as error:
        raise ValueError("not a CA certificate: no basicConstraints") from error
    if not (constraints.value.ca and constraints.critical):
        raise ValueError("not a CA certificate: basicConstraints without CA, or not critical")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        raise ValueError("not a CA certificate: keyUsage lacks keyCertSign")
    if not isinstance(certificate.public_key(), ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise ValueError("its key is neither EC nor RSA")


def _constrains_directory_names(certificate: x509.Certificate) -> bool:
    """Whether it limits subjects: the verifier does not apply that (RFC 5280 section 4.2.1.10)."""
    constraints = _extension(certificate, x509.NameConstraints)
    if constraints is None:
        return False
    names = (*(constraints.permitted_subtrees or ()), *(constraints.excluded_subtrees or ()))
    return any(isinstance(name, x509.DirectoryName) for name in names)


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
