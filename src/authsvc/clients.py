"""Clients that are registered: changed and deleted, by administrators or by themselves."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.keys.secrets import (
    CLIENT_SECRET_PREFIX,
    INITIAL_ACCESS_TOKEN_PREFIX,
    REGISTRATION_TOKEN_PREFIX,
    digest,
    is_secret,
    new_id,
    new_secret,
)
from authsvc.model import Client, ClientMetadata, ClientState, InitialAccessToken, Peer
from authsvc.oauth.registration import grows, shrinks
from authsvc.register import SECRET_METHODS, CheckMetadata, Registration, require_own
from authsvc.store.port import ClientStore, InitialAccessTokenStore

OVERLAP_S_MAX = 30 * 24 * 3600.0
Reach = Callable[[int], Awaitable[None]]
AsOfNow = Callable[[Client], Client]
"""Gives a client the state that it has by time (oauth.registration.as_of)."""

_STOPPED = (ClientState.REJECTED, ClientState.SUSPENDED)
"""A registration access token is nothing in these; a suspension cut it off as well."""

log = structlog.get_logger()


def _field_invalid(name: str, text: str) -> AuthError:
    violation = FieldViolation(name, text)
    return AuthError(Reason.FIELD_INVALID, f"{name} {text}", violations=(violation,))


class Clients:
    """What administrators do with clients beside their review."""

    def __init__(
        self,
        store: ClientStore,
        check: CheckMetadata,
        reach: Reach,
        as_of_now: AsOfNow,
        now: Callable[[], float],
    ) -> None:
        """`now` answers the database's time, in seconds since the epoch."""
        self._store = store
        self._check = check
        self._reach = reach
        self._as_of_now = as_of_now
        self._now = now

    async def update(
        self,
        client_id: str,
        version: int | None,
        asked: Callable[[Client], Registration],
        expire_time: Callable[[Client], float | None],
    ) -> tuple[Client, int]:
        """`asked` and `expire_time` say what becomes of the client that is there.

        What takes something away cuts off what was issued. Raises AuthError CLIENT_NOT_FOUND,
        ETAG_MISMATCH, INVALID_CLIENT_METADATA, ALREADY_EXISTS, FIELD_INVALID, and
        CLIENT_STATE_CONFLICT for the end of an approval that there is not.
        """
        client = await self._read(client_id, version)
        metadata = await self._check(asked(client), None, known=client.metadata)
        expires = expire_time(client)
        if expires != client.approval_expire_time:
            if client.state not in (ClientState.APPROVED, ClientState.SUSPENDED):
                raise AuthError(Reason.CLIENT_STATE_CONFLICT, metadata={"state": client.state.name})
            if expires is not None and expires <= self._now():
                raise _field_invalid("client.approval_expire_time", "is in the past")
        changed = with_secret(replace(client, approval_expire_time=expires), metadata)
        return await self._write(changed, cut_off=shrinks(client.metadata, metadata))

    async def delete(self, client_id: str, version: int | None) -> int:
        """Raises AuthError CLIENT_NOT_FOUND, ETAG_MISMATCH."""
        revision = await self._store.delete(client_id, version)
        log.info("client.deleted", client=client_id, revision=revision)
        await self._reach(revision)
        return revision

    async def rotate_secret(self, client_id: str, overlap_end: float | None) -> tuple[str, int]:
        """A new secret; the one before works until the overlap ends, 30 days ahead at most.

        Raises AuthError CLIENT_NOT_FOUND, CLIENT_STATE_CONFLICT, AUTH_METHOD_NOT_REGISTERED,
        FIELD_INVALID, and ETAG_MISMATCH where two rotate at once.
        """
        now = self._now()
        if overlap_end is not None and not now < overlap_end <= now + OVERLAP_S_MAX:
            raise _field_invalid("overlap_end_time", "is not within the next 30 days")
        client = await self._read(client_id, None)
        if client.state in (ClientState.REJECTED, ClientState.EXPIRED):
            raise AuthError(Reason.CLIENT_STATE_CONFLICT, metadata={"state": client.state.name})
        if not client.metadata.auth_methods & SECRET_METHODS:
            raise AuthError(Reason.AUTH_METHOD_NOT_REGISTERED, "no method of it needs a secret")
        secret = new_secret(CLIENT_SECRET_PREFIX)
        rotated = replace(
            client,
            secret_digest=digest(secret),
            secret_used=True,  # whoever registered it, and asks again, does not get it
            previous_secret_digest=client.secret_digest if overlap_end is not None else None,
            previous_secret_until=overlap_end,
        )
        _, revision = await self._write(rotated, cut_off=False)
        log.info("client.secret_rotated", client=client_id, revision=revision)
        return secret, revision

    async def _read(self, client_id: str, version: int | None) -> Client:
        client = await self._store.get(client_id)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        if version not in (None, client.version):
            raise AuthError(Reason.ETAG_MISMATCH)
        return self._as_of_now(client)

    async def _write(self, client: Client, *, cut_off: bool) -> tuple[Client, int]:
        written, revision = await self._store.replace(client, cut_off=cut_off)
        log.info("client.updated", client=client.client_id, revision=revision, cut_off=cut_off)
        await self._reach(revision)
        return written, revision


class OwnClient:
    """What the bearer of a registration access token does with its client (RFC 7592)."""

    def __init__(
        self,
        store: ClientStore,
        check: CheckMetadata,
        clients: Clients,
        reach: Reach,
        as_of_now: AsOfNow,
    ) -> None:
        self._store = store
        self._check = check
        self._clients = clients
        self._reach = reach
        self._as_of_now = as_of_now

    async def get(self, token: str) -> Client:
        """Raises AuthError REGISTRATION_TOKEN_INVALID, whatever is wrong with the token."""
        if is_secret(token, REGISTRATION_TOKEN_PREFIX):
            found = await self._store.by_registration_token(digest(token))
            if found is not None and found.state not in _STOPPED:
                client = self._as_of_now(found)
                # The end of an approval cuts it off, as soon as the row is moved.
                if client.state is found.state or found.state is ClientState.PENDING:
                    return client
        raise AuthError(Reason.REGISTRATION_TOKEN_INVALID)

    async def update(
        self, token: str, client_id: str, asked: Registration, peer: Peer, now: float
    ) -> tuple[Client, str]:
        """Replaces all the metadata (RFC 7592 section 2.2). Who asks for more waits for a review
        again, and has nothing until then. `now` is this machine's time.

        Answers a secret too, where a method needs one and there was none.

        Raises AuthError REGISTRATION_TOKEN_INVALID (for another client's id too),
        INVALID_CLIENT_METADATA, REGISTRATION_NOT_ALLOWED, ALREADY_EXISTS, ETAG_MISMATCH.
        """
        client = await self.get(token)
        if client.client_id != client_id:
            raise AuthError(Reason.REGISTRATION_TOKEN_INVALID)
        metadata = await self._check(asked, None, known=client.metadata)
        if metadata.validates - client.metadata.validates:
            raise AuthError(Reason.REGISTRATION_NOT_ALLOWED, "validates")
        if metadata.identity is not None and metadata.identity != client.metadata.identity:
            require_own(metadata.identity, peer, now)
        more = grows(client.metadata, metadata)
        changed, secret = with_secret(client, metadata), ""
        if metadata.auth_methods & SECRET_METHODS and changed.secret_digest is None:
            secret = new_secret(CLIENT_SECRET_PREFIX)
            changed = replace(changed, secret_digest=digest(secret))
        if more:
            changed = replace(changed, state=ClientState.PENDING, approval_expire_time=None)
        written, revision = await self._store.replace(
            changed,
            cut_off=more or shrinks(client.metadata, metadata),
            keep_registration=True,
        )
        log.info("client.updated_itself", client=client_id, revision=revision, more=more)
        await self._reach(revision)
        return written, secret

    async def delete(self, token: str) -> None:
        """Deletes it (RFC 7592 section 2.3). Raises AuthError REGISTRATION_TOKEN_INVALID."""
        client = await self.get(token)
        await self._clients.delete(client.client_id, None)


class InitialAccessTokens:
    """Makes initial access tokens (RFC 7591 section 1.2)."""

    def __init__(
        self,
        store: InitialAccessTokenStore,
        revision: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._revision = revision
        self._now = now

    async def create(
        self, display_name: str, uses: int, expire_time: float
    ) -> tuple[InitialAccessToken, str]:
        """The token, and its value. Raises AuthError FIELD_INVALID."""
        now = self._now()
        if expire_time <= now:
            raise _field_invalid("initial_access_token.expire_time", "is in the past")
        value = new_secret(INITIAL_ACCESS_TOKEN_PREFIX)
        token = InitialAccessToken(
            new_id(), display_name, uses, self._revision(), now, expire_time, digest(value)
        )
        await self._store.add(token)
        log.info("initial_access_token.created", id=token.initial_access_token_id, uses=uses)
        return token, value

    async def page(self, after: str, limit: int) -> tuple[InitialAccessToken, ...]:
        """In the order of their ids, from the one after `after`."""
        return await self._store.page(after, limit)

    async def delete(self, initial_access_token_id: str) -> None:
        """Raises AuthError INITIAL_ACCESS_TOKEN_NOT_FOUND."""
        if not await self._store.delete(initial_access_token_id):
            raise AuthError(Reason.INITIAL_ACCESS_TOKEN_NOT_FOUND)
        log.info("initial_access_token.deleted", id=initial_access_token_id)


def with_secret(client: Client, metadata: ClientMetadata) -> Client:
    """The client with other metadata; a secret that no method of it needs is forgotten."""
    changed = replace(client, metadata=metadata)
    if metadata.auth_methods & SECRET_METHODS:
        return changed
    return replace(
        changed, secret_digest=None, previous_secret_digest=None, previous_secret_until=None
    )
