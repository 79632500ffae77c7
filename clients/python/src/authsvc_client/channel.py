"""Channels with mutual TLS, and what it takes to give a long-lived one new certificates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .client_interceptors import bearer
from .sync_client_interceptors import sync_bearer
from .sync_token_source import SyncTokenSource
from .token_source import TokenSource

Options = Sequence[tuple[str, Any]]

# What a gRPC server takes that was not told otherwise; it drops who asks more often. While calls
# are made, a vanished server is noticed by TCP_USER_TIMEOUT, which is the second.
KEEPALIVE_S = 300.0
KEEPALIVE_TIMEOUT_S = 10.0
RECONNECT_S_MAX = 2.0
MESSAGE_BYTES_MAX = 4 * 2**20
GRACE_S = 30.0

# Issuing, refreshing and registering are left to the caller: who repeats a refresh looks like a
# thief. gRPC itself repeats what never left this machine, whatever the method.
RETRIED = ("ValidateToken", "BatchValidateTokens", "GetKeys")
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "authsvc.v1.AuthService", "method": name} for name in RETRIED],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # A server of gRPC's core that stops says CANCELLED to calls that just came in; who
                # cancels a call himself is never asked again.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}


@dataclass(frozen=True, slots=True)
class Certificates:
    """What one side of a connection shows and trusts, as PEM; the key never shows in a repr."""

    ca: bytes
    """Authorities that may have signed the other side's certificate."""
    certificate: bytes
    """Own certificate, followed by its intermediates."""
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a key of another certificate; gRPC would just fail to connect."""
        leaf = x509.load_pem_x509_certificate(self.certificate)
        if load_pem_private_key(self.key, None).public_key() != leaf.public_key():
            raise ValueError("the key is not the certificate's (replaced one after the other?)")
        for pem in (self.certificate, self.ca):
            # The reader passes over the end of a file that is still being written.
            if len(x509.load_pem_x509_certificates(pem)) != pem.count(b"-----BEGIN"):
                raise ValueError("not only whole certificates")

    @classmethod
    def from_files(cls, ca: str | Path, certificate: str | Path, key: str | Path) -> Self:
        """Reads PEM files, once."""
        return cls(Path(ca).read_bytes(), Path(certificate).read_bytes(), Path(key).read_bytes())

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a client."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that lets in nobody without a certificate by `ca`."""
        pair = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pair, self.ca, require_client_auth=True)


def channel(
    target: str,
    certificates: Certificates,
    *,
    token_source: TokenSource | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    server_name: str | None = None,
    keepalive_s: float = KEEPALIVE_S,
    options: Options = (),
) -> grpc.aio.Channel:
    """A channel with mTLS, to authsvc or to any service.

    With a `token_source` its calls carry a bearer token. `server_name` is the DNS name in the
    server's certificate where `target` is not; gRPC cannot check a SPIFFE id there. `options` win
    over the own ones.
    """
    return grpc.aio.secure_channel(
        target,
        certificates.channel_credentials(),
        options=_options(server_name, keepalive_s, options),
        interceptors=[*interceptors, *(bearer(token_source, tls=True) if token_source else ())],
    )


def sync_channel(
    target: str,
    certificates: Certificates,
    *,
    token_source: SyncTokenSource | None = None,
    interceptors: Sequence[Any] = (),
    server_name: str | None = None,
    keepalive_s: float = KEEPALIVE_S,
    options: Options = (),
) -> grpc.Channel:
    """As `channel`, for the blocking stubs."""
    credentials = certificates.channel_credentials()
    opened = grpc.secure_channel(target, credentials, _options(server_name, keepalive_s, options))
    own = sync_bearer(token_source, tls=True) if token_source else ()
    return grpc.intercept_channel(opened, *interceptors, *own)


def _options(
    server_name: str | None, keepalive_s: float, options: Options
) -> list[tuple[str, Any]]:
    own: dict[str, Any] = {
        "grpc.service_config": json.dumps(SERVICE_CONFIG),
        "grpc.keepalive_time_ms": int(keepalive_s * 1000),
        "grpc.keepalive_timeout_ms": int(KEEPALIVE_TIMEOUT_S * 1000),
        # gRPC's own pause grows to two minutes; a server that came back should be found at once.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": int(RECONNECT_S_MAX * 1000),
        "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
        "grpc.max_send_message_length": MESSAGE_BYTES_MAX,
        # A new channel must not find the connection that the old certificate opened.
        "grpc.use_local_subchannel_pool": 1,
    }
    if server_name is not None:
        own["grpc.ssl_target_name_override"] = server_name
    return list((own | dict(options)).items())


class ReloadingChannel(grpc.aio.Channel):
    """A channel that can be given new certificates while stubs hold it.

    gRPC cannot swap a channel's certificate. Each call goes over the channel of that moment;
    `reload` opens a new one and closes the old one when its calls are done.
    """

    def __init__(self, target: str, certificates: Certificates, **settings: Any) -> None:
        """`settings` are those of `channel`."""
        self._target, self._settings = target, settings
        self.current = channel(target, certificates, **settings)

    async def reload(self, certificates: Certificates, grace_s: float = GRACE_S) -> None:
        """Calls that still run on the old channel after `grace_s` are cancelled."""
        old, self.current = self.current, channel(self._target, certificates, **self._settings)
        await old.close(grace_s)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _Callable(self, "stream_stream", args, kwargs)

    async def close(self, grace: float | None = None) -> None:
        await self.current.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class _Callable:
    """One method of a stub, made anew when the channel was."""

    def __init__(self, owner: ReloadingChannel, kind: str, args: Any, kwargs: Any) -> None:
        self._owner, self._kind, self._args, self._kwargs = owner, kind, args, kwargs
        self._made(owner.current)

    def _made(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._callable = getattr(channel, self._kind)(*self._args, **self._kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._channel is not self._owner.current:
            self._made(self._owner.current)
        return self._callable(*args, **kwargs)
