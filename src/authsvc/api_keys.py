"""API keys: made, listed and deleted by their client, or by administrators."""

from collections.abc import Awaitable, Callable

import structlog

from authsvc.clock import Clock
from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.identify import NOT_FOR_API_KEYS
from authsvc.keys.secrets import API_KEY_PREFIX, digest, new_id, new_secret
from authsvc.model import OWN_SCOPES, SCOPE_ADMIN, ApiKey, AuthMethod, Caller, Client
from authsvc.oauth.policy import require_let_in
from authsvc.store.port import ApiKeyStore, ClientStore
from authsvc_client.core.state import State

KEYS_MAX = 100
"""Of one client."""

log = structlog.get_logger()


class ApiKeys:
    """Administers API keys. Another client's, and its keys, look like none."""

    def __init__(
        self,
        store: ApiKeyStore,
        clients: ClientStore,
        state: State,
        reach: Callable[[int], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._store = store
        self._clients = clients
        self._state = state
        self._reach = reach
        self._clock = clock

    async def create(
        self,
        client_id: str,
        display_name: str,
        scopes: frozenset[str],
        expire_time: float | None,
        caller: Callable[[], Awaitable[Caller]],
    ) -> tuple[ApiKey, str]:
        """A key and its value, shown this once; `client_id` empty: the caller's.

        Without scopes it gets all that its client has; authsvc's own only where there is nothing
        else, for what a key is shown to may show it to authsvc. `caller` is asked for after the
        revision is taken that the key is of: what is cut off meanwhile has a higher one. Raises
        AuthError CLIENT_NOT_FOUND, AUTH_METHOD_NOT_REGISTERED, SCOPE_NOT_ALLOWED, FIELD_INVALID, or
        the reason for which the client is not let in.
        """
        revision, now = self._state.revision, self._state.now(self._clock.boot())
        who = await caller()
        owner = _owner(client_id, who, "api_key.client_id")
        if expire_time is not None and expire_time <= now:
            raise _invalid("api_key.expire_time", "is in the past")
        client = await self._clients.get(owner)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        require_let_in(client, now)
        if AuthMethod.API_KEY not in client.metadata.auth_methods:
            raise AuthError(
                Reason.AUTH_METHOD_NOT_REGISTERED, metadata={"method": AuthMethod.API_KEY.name}
            )
        value = new_secret(API_KEY_PREFIX)
        key = ApiKey(
            api_key_id=new_id(),
            client_id=owner,
            display_name=display_name,
            scopes=_scopes(scopes, client, who),
            rev=revision,
            create_time=now,
            expire_time=expire_time,
            digest=digest(value),
        )
        await self._store.add(key, KEYS_MAX)
        log.info("api_key.created", client=owner, api_key=key.api_key_id, caller=who.name)
        return key, value

    async def page(
        self, client_id: str, caller: Caller, after: str, limit: int
    ) -> tuple[ApiKey, ...]:
        """In the order of their ids, from the one after `after`. AuthError CLIENT_NOT_FOUND."""
        owner = _owner(client_id, caller, "client_id")
        if await self._clients.get(owner) is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        return await self._store.page(owner, after, limit)

    async def delete(self, api_key_id: str, caller: Caller) -> int:
        """Dead, wherever it is asked for, at the revision. AuthError API_KEY_NOT_FOUND."""
        key = await self._store.get(api_key_id)
        if key is None or not _may(caller, key.client_id):
            raise AuthError(Reason.API_KEY_NOT_FOUND)
        revision = await self._store.delete(api_key_id)
        log.info("api_key.deleted", client=key.client_id, api_key=api_key_id, caller=caller.name)
        await self._reach(revision)
        return revision


def _may(caller: Caller, client_id: str) -> bool:
    return caller.client_id == client_id or SCOPE_ADMIN in caller.scopes


def _owner(client_id: str, caller: Caller, field: str) -> str:
    owner = client_id or caller.client_id
    if not owner:
        raise _invalid(field, "is required: the caller is no client")
    if not _may(caller, owner):
        raise AuthError(Reason.CLIENT_NOT_FOUND)
    return owner


def _scopes(asked: frozenset[str], client: Client, caller: Caller) -> frozenset[str]:
    """What a key may use: never more than whoever makes it, unless an administrator."""
    allowed = client.metadata.scopes - NOT_FOR_API_KEYS
    if SCOPE_ADMIN not in caller.scopes:
        allowed &= caller.scopes
    for scope in sorted(asked - allowed):
        raise AuthError(Reason.SCOPE_NOT_ALLOWED, metadata={"scope": scope})
    if asked and not asked.isdisjoint(OWN_SCOPES) and not asked <= set(OWN_SCOPES):
        own = " ".join(sorted(asked.intersection(OWN_SCOPES)))
        raise AuthError(
            Reason.SCOPE_NOT_ALLOWED, "authsvc's own stand alone", metadata={"scope": own}
        )
    return asked or allowed.difference(OWN_SCOPES) or allowed


def _invalid(field: str, text: str) -> AuthError:
    violations = (FieldViolation(field, text),)
    return AuthError(Reason.FIELD_INVALID, f"{field} {text}", violations=violations)
