"""TLS of the listeners: certificate, key and CAs from files, replaced while they run."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar

import grpc
import structlog

from authsvc.rpc.peer import (
    Authorities,
    Trust,
    check_pair,
    read_authorities,
    read_bundle,
    spki_sha256,
)

T = TypeVar("T")

HANDSHAKES_S = 0.25
"""What handshakes that begin have, to take hold of the old configuration before it is freed; it
takes them microseconds. The others wait meanwhile, once after each reload."""
_NO_BUNDLES: Mapping[str, Path] = MappingProxyType({})

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Own:
    """The listener's certificate, key and client CAs, which change together."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_cas: Authorities


class _Followed(Generic[T]):
    """What files say, as of the last time that they could be used."""

    def __init__(self, files: Sequence[Path], parse: Callable[..., T]) -> None:
        """`parse` makes a value of their contents; ValueError where it cannot."""
        self._files = files
        self._parse = parse
        self._failure = ""
        self._contents = self._read()
        self.value = parse(*self._contents)

    def reload(self) -> bool:
        """True where they changed. What is not whole and right is logged, once for each failure."""
        try:
            contents = self._read()
            changed = contents != self._contents
            if changed:
                self.value = self._parse(*contents)
        except ValueError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                _log.error("tls_reload_refused", error=self._failure)
            return False
        self._contents, self._failure = contents, ""
        return changed

    def _read(self) -> list[bytes]:
        try:
            return [file.read_bytes() for file in self._files]
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from error


class ServerTls:
    """Whom the listeners are and whom they trust, as their files say (RFC 8446, RFC 8705).

    A handshake that began under an old set of CAs ends under it. So the CAs that a handshake
    trusted prove nothing: `rpc.peer.Peers` judges each call by `trust`.
    """

    def __init__(
        self,
        cert_file: Path,
        key_file: Path,
        client_ca_file: Path,
        bundle_files: Mapping[str, Path] = _NO_BUNDLES,
    ) -> None:
        """`bundle_files` by trust domain. ValueError, naming the file, where one is not usable."""
        self._files = (cert_file, key_file, client_ca_file)
        self._bundles: dict[str, _Followed[Authorities]] = {}
        self._own = _Followed(self._files, self._load)
        for domain, file in bundle_files.items():
            self._bundles[domain] = _Followed((file,), partial(self._load_bundle, domain, file))
        self._combine()

    def pins(self, trust_domain: str) -> frozenset[str]:
        """As `Trust.pins`, now."""
        return self.trust.pins(trust_domain)

    def credentials(self, *, client_certificates: bool = True) -> grpc.ServerCredentials:
        """Of one listener that requires client certificates, or asks for none; follow `reload`."""
        taken = self._configuration

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Asked at each handshake, one at a time. None keeps what was taken.

            gRPC's core frees what it has for what it gets, though a handshake that asked just
            before may be about to read it: a process that always answers crashes.
            """
            nonlocal taken
            if taken is self._configuration:
                return None
            time.sleep(HANDSHAKES_S)
            taken = self._configuration
            return taken

        return grpc.dynamic_ssl_server_credentials(
            taken,
            fetch,  # type: ignore[arg-type] # the stubs do not know of None
            require_client_authentication=client_certificates,
        )

    def reload(self) -> bool:
        """Read the files again; True where they changed and are in use from the next handshake.

        Certificate, key and client CAs change together, and each bundle by itself: what others
        write must not hold up the own files. Where a file cannot be used the old stays.
        """
        changed = [self._own.reload(), *(bundle.reload() for bundle in self._bundles.values())]
        if any(changed):
            self._combine()
            counts = {name: len(cas) for name, cas in self.trust.bundles.items()}
            _log.info("tls_reloaded", client_cas=len(self.trust.client_cas), bundles=counts)
        return any(changed)

    async def watch(self, interval_s: float) -> None:
        """Reload every `interval_s` seconds until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.reload)  # the files may be on a network

    def _combine(self) -> None:
        own = self._own.value
        bundles = {domain: bundle.value for domain, bundle in self._bundles.items()}
        for domain, authorities in bundles.items():
            if not authorities:  # allowed, and seldom meant
                _log.warning("tls_bundle_empty", trust_domain=domain)
        self.trust = Trust(own.client_cas, MappingProxyType(bundles))
        """Whose certificates are taken now; another object after each reload that changed it."""
        self._configuration = grpc.ssl_server_certificate_configuration(
            [(own.key, own.certificate)], self.trust.pem()
        )

    def _load(self, certificate: bytes, key: bytes, client_ca: bytes) -> _Own:
        cert_file, key_file, client_ca_file = self._files
        # The parser has more than ValueError for what it does not like, and `watch` must live on.
        try:
            check_pair(certificate, key)
        except Exception as error:
            raise ValueError(f"{cert_file} with {key_file}: {error}") from error
        try:
            authorities = read_authorities(client_ca)
            _require_apart(authorities, self._others(""))
        except Exception as error:
            raise ValueError(f"{client_ca_file}: {error}") from error
        return _Own(certificate, key, authorities)

    def _load_bundle(self, domain: str, file: Path, content: bytes) -> Authorities:
        try:
            authorities = read_bundle(content)
            _require_apart(authorities, self._others(domain))
        except Exception as error:
            raise ValueError(f"{file}: {error}") from error
        return authorities

    def _others(self, domain: str) -> Iterator[tuple[str, Authorities]]:
        """What the other files say now, each with what it is called."""
        if domain:
            yield "tls.client_ca", self._own.value.client_cas
        for other, bundle in self._bundles.items():
            if other != domain:
                yield f"the bundle of {other}", bundle.value


def _require_apart(authorities: Authorities, others: Iterator[tuple[str, Authorities]]) -> None:
    """ValueError where somebody else has one of these CAs: a key vouches for one kind of names."""
    taken = {spki_sha256(ca): name for name, cas in others for ca in cas}
    for ca in authorities:
        if (name := taken.get(spki_sha256(ca))) is not None:
            raise ValueError(f"{ca.subject.rfc4514_string()!r} is in {name} as well")
