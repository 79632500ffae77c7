"""TLS of the listener: certificate, key and client CAs from files, replaced while it runs."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog

from authsvc.rpc.peer import Authorities, check_pair, read_authorities

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Contents:
    """The files as they were read."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes


@dataclass(frozen=True, slots=True)
class _Material:
    """What one handshake works with: replaced as a whole, never changed."""

    contents: _Contents
    authorities: Authorities
    configuration: grpc.ServerCertificateConfiguration


class ServerTls:
    """A listener that requires client certificates, and follows its files (RFC 8446, RFC 8705).

    A handshake that began under an old set of client CAs ends under it. So the CAs that a handshake
    trusted prove nothing: `rpc.peer.Peers` judges each call by `authorities`.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path) -> None:
        """ValueError, naming the file, where they cannot be used."""
        self._files = (cert_file, key_file, client_ca_file)
        self._failure = ""
        self._material = self._load(self._read())
        self._credentials = grpc.dynamic_ssl_server_credentials(
            self._material.configuration,
            lambda: self._material.configuration,
            require_client_authentication=True,
        )

    @property
    def authorities(self) -> Authorities:
        """The client CAs now; another object after each reload that changed something."""
        return self._material.authorities

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of the listener; they follow `reload`."""
        return self._credentials

    def reload(self) -> bool:
        """Read the files again; True where they changed and are in use from the next handshake.

        Certificate, key and client CAs change together. What is not whole and right is logged, once
        for each failure, and the old stays.
        """
        try:
            contents = self._read()
            changed = contents != self._material.contents
            if changed:
                self._material = self._load(contents)
        except ValueError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                _log.error("tls_reload_refused", error=self._failure)
            return False
        self._failure = ""
        if changed:
            _log.info("tls_reloaded", client_cas=len(self.authorities))
        return changed

    async def watch(self, interval_s: float) -> None:
        """Reload every `interval_s` seconds until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.reload)  # the files may be on a network

    def _read(self) -> _Contents:
        try:
            return _Contents(*(file.read_bytes() for file in self._files))
        except OSError as error:
            raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from error

    def _load(self, contents: _Contents) -> _Material:
        cert_file, key_file, client_ca_file = self._files
        # The parser has more than ValueError for what it does not like, and `watch` must live on.
        try:
            check_pair(contents.certificate, contents.key)
        except Exception as error:
            raise ValueError(f"{cert_file} with {key_file}: {error}") from error
        try:
            authorities = read_authorities(contents.client_ca)
        except Exception as error:
            raise ValueError(f"{client_ca_file}: {error}") from error
        configuration = grpc.ssl_server_certificate_configuration(
            [(contents.key, contents.certificate)], contents.client_ca
        )
        return _Material(contents, authorities, configuration)
