"""Client authentication (RFC 6749 section 2.3, RFC 8705 section 2): who asks for a token."""

from dataclasses import dataclass, field
from typing import Protocol

from authsvc.errors import AuthError, Reason, not_implemented
from authsvc.keys.secrets import CLIENT_SECRET_PREFIX, matches
from authsvc.model import AuthMethod, Client, Peer


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the request offers; an empty text is not offered."""

    client_id: str
    secret: str = field(default="", repr=False)
    assertion: str = field(default="", repr=False)
    authorization: str = field(default="", repr=False)
    """The `authorization` metadata."""


class Clients(Protocol):
    """Where clients are read from."""

    async def get(self, client_id: str) -> Client | None:
        """One client."""


class Authenticate:
    """Proves that a request comes from the client that it names, by exactly one method."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def __call__(self, offered: Credentials, peer: Peer, now: float) -> Client:
        """The client, whatever its state; `now` is this machine's time.

        Raises AuthError CLIENT_AUTHENTICATION_FAILED (for an unknown client too),
        AUTH_METHOD_AMBIGUOUS, AUTH_METHOD_NOT_REGISTERED or NOT_IMPLEMENTED.
        """
        if sum(map(bool, (offered.secret, offered.assertion, offered.authorization))) > 1:
            raise AuthError(Reason.AUTH_METHOD_AMBIGUOUS)
        if offered.assertion:
            raise not_implemented("private_key_jwt")
        if offered.authorization:
            raise not_implemented("client_secret_basic")
        client = await self._clients.get(offered.client_id)
        if offered.secret:
            return _by_secret(client, offered.secret)
        return _by_certificate(client, peer, now)


def _by_secret(client: Client | None, secret: str) -> Client:
    """client_secret_post. The certificate of the connection is then no credential."""
    stored = client.secret_digest if client is not None else None
    if not matches(secret, CLIENT_SECRET_PREFIX, stored) or client is None:
        raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED)
    return _registered(client, AuthMethod.CLIENT_SECRET_POST)


def _by_certificate(client: Client | None, peer: Peer, now: float) -> Client:
    """tls_client_auth (RFC 8705 section 2.1): the name, by a path to the client's own CA."""
    identity = client.metadata.identity if client is not None else None
    if client is None or identity is None or not identity.matches(peer, now):
        raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED)
    return _registered(client, AuthMethod.TLS_CLIENT_AUTH)


def _registered(client: Client, method: AuthMethod) -> Client:
    """Only a credential that holds is told that its method is not registered."""
    if method not in client.metadata.auth_methods:
        raise AuthError(Reason.AUTH_METHOD_NOT_REGISTERED, metadata={"method": method.name})
    return client
