"""Client authentication (RFC 6749 section 2.3, RFC 7523, RFC 8705): who asks for a token."""

import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol
from urllib.parse import unquote_plus

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.keys.assertion import ClientKeys
from authsvc.keys.secrets import CLIENT_SECRET_PREFIX, matches
from authsvc.model import ApiKey, AuthMethod, Client, Peer
from authsvc.store.port import AssertionStore
from authsvc_client.core.markers import LEEWAY_S
from authsvc_client.core.state import State

_client_keys = lru_cache(maxsize=1024)(ClientKeys)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the request offers; an empty text is not offered."""

    client_id: str
    secret: str = field(default="", repr=False)
    assertion: str = field(default="", repr=False)
    authorization: str = field(default="", repr=False)
    """The `authorization` metadata."""


@dataclass(frozen=True, slots=True)
class Authenticated:
    """A client that proved itself, whatever its state."""

    client: Client
    method: AuthMethod
    api_key: ApiKey | None = None
    """Bounds what the client may get, where it came with one."""

    @property
    def scopes(self) -> frozenset[str]:
        """All that it could ask for."""
        scopes = self.client.metadata.scopes
        return scopes if self.api_key is None else scopes & self.api_key.scopes


class Clients(Protocol):
    """Where clients are read from."""

    async def get(self, client_id: str) -> Client | None:
        """One client."""


class Authenticate:
    """Proves that a request comes from the client that it names, by exactly one method."""

    def __init__(
        self,
        issuer: str,
        clients: Clients,
        secret_used: Callable[[str], Awaitable[None]],
        assertions: AssertionStore,
        api_key: Callable[[str], Awaitable[tuple[ApiKey, Client] | None]],
        state: State,
        clock: Clock,
    ) -> None:
        """`secret_used` remembers that a client has its secret; `api_key` finds a living one."""
        self._issuer = issuer
        self._clients = clients
        self._secret_used = secret_used
        self._assertions = assertions
        self._api_key = api_key
        self._state = state
        self._clock = clock

    async def __call__(self, offered: Credentials, peer: Peer) -> Authenticated:
        """Raises AuthError CLIENT_AUTHENTICATION_FAILED (for an unknown client too),
        AUTH_METHOD_AMBIGUOUS or AUTH_METHOD_NOT_REGISTERED, and as the store.

        The connection's certificate is offered where nothing else is.
        """
        if sum(map(bool, (offered.secret, offered.assertion, offered.authorization))) > 1:
            raise AuthError(Reason.AUTH_METHOD_AMBIGUOUS)
        scheme, _, value = offered.authorization.partition(" ")
        if scheme.lower() == "bearer":
            return await self._by_api_key(offered.client_id, value.strip())
        client = await self._clients.get(offered.client_id)
        if offered.authorization:
            secret = _basic_secret(offered) if scheme.lower() == "basic" else ""
            return await self._by_secret(client, secret, AuthMethod.CLIENT_SECRET_BASIC)
        if offered.secret:
            return await self._by_secret(client, offered.secret, AuthMethod.CLIENT_SECRET_POST)
        if offered.assertion:
            return await self._by_assertion(client, offered.assertion)
        return _by_certificate(client, peer, self._clock.wall())

    async def _by_secret(
        self, client: Client | None, secret: str, method: AuthMethod
    ) -> Authenticated:
        """RFC 6749 section 2.3.1. The secret before a rotation holds until its overlap ends."""
        now = self._state.now(self._clock.boot())
        until = client.previous_secret_until if client is not None else None
        previous = client.previous_secret_digest if client is not None and until else None
        if until is None or until <= now:
            previous = None
        is_current = matches(
            secret, CLIENT_SECRET_PREFIX, client.secret_digest if client is not None else None
        )
        is_previous = matches(secret, CLIENT_SECRET_PREFIX, previous)
        if client is None or not (is_current or is_previous):
            raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED)
        found = _registered(client, method)
        if is_current and not client.secret_used:
            await self._secret_used(client.client_id)
        return found

    async def _by_assertion(self, client: Client | None, assertion: str) -> Authenticated:
        """private_key_jwt (RFC 7523 section 3): for the issuer alone, each `jti` good once."""
        if client is None or not client.metadata.jwks:
            raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED)
        now = self._state.now(self._clock.boot())
        try:
            keys = _client_keys(client.metadata.jwks)
            proof = keys.verify(assertion, client.client_id, self._issuer, now)
        except ValueError as error:
            raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED, cause=str(error)) from error
        found = _registered(client, AuthMethod.PRIVATE_KEY_JWT)
        expires = float(proof.expires + LEEWAY_S)
        if not await self._assertions.use(client.client_id, proof.jti, expires):
            raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED, cause="the jti was used before")
        return found

    async def _by_api_key(self, client_id: str, value: str) -> Authenticated:
        found = await self._api_key(value)
        if found is None or found[0].client_id != client_id:
            raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED)
        api_key, client = found
        _registered(client, AuthMethod.API_KEY)
        return Authenticated(client, AuthMethod.API_KEY, api_key)


def _by_certificate(client: Client | None, peer: Peer, now: float) -> Authenticated:
    """tls_client_auth (RFC 8705 section 2.1): the name, by a path to the client's own CA."""
    identity = client.metadata.identity if client is not None else None
    if client is None or identity is None or not identity.matches(peer, now):
        raise AuthError(Reason.CLIENT_AUTHENTICATION_FAILED)
    return _registered(client, AuthMethod.TLS_CLIENT_AUTH)


def _registered(client: Client, method: AuthMethod) -> Authenticated:
    """Only a credential that holds is told that its method is not registered."""
    if method not in client.metadata.auth_methods:
        raise AuthError(Reason.AUTH_METHOD_NOT_REGISTERED, metadata={"method": method.name})
    return Authenticated(client, method)


def _basic_secret(offered: Credentials) -> str:
    """The secret, where the name beside it is the client's that the request names; else nothing.

    Both are form-encoded within the base64 (RFC 6749 section 2.3.1, RFC 7617 section 2).
    """
    try:
        value = offered.authorization.partition(" ")[2].strip()
        pair = base64.b64decode(value, validate=True).decode()
    except ValueError:
        return ""
    name, _, secret = pair.partition(":")
    return unquote_plus(secret) if unquote_plus(name) == offered.client_id else ""
