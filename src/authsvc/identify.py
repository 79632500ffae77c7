"""Whose token it is: a JWT says so itself, every other one is found by its SHA-256."""

from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from authsvc.clock import Clock
from authsvc.errors import AuthError
from authsvc.keys.jwe import JWE_CHARS_MAX, is_jwe
from authsvc.keys.secrets import ACCESS_TOKEN_PREFIX, API_KEY_PREFIX, digest, is_secret
from authsvc.model import (
    SCOPE_ADMIN,
    SCOPE_REGISTER,
    ApiKey,
    AuthMethod,
    Catalog,
    Client,
)
from authsvc.oauth.policy import require_let_in
from authsvc.store.port import ApiKeyStore, TokenStore
from authsvc.store.reads import READS_MAX, Reads
from authsvc_client.core.cache import BytesCache
from authsvc_client.core.claims import Claims, parse_claims
from authsvc_client.core.judge import Judge, Question, Verdict, Verified
from authsvc_client.core.jws import Refused
from authsvc_client.core.standing import Standing

NEVER = 253402300799
"""`exp` of what has no end: the last second that a Timestamp can say."""
HELD_S = 600.0
"""What was found is read again after this long: markers that kill it are kept for longer."""
NOT_FOR_API_KEYS = frozenset({SCOPE_ADMIN, SCOPE_REGISTER})
"""Scopes that no API key carries: it is copied too easily."""
_PREFIXES = (ACCESS_TOKEN_PREFIX, API_KEY_PREFIX)
_HELD_BYTES = 32 * 2**20
_ENTRY_BYTES = 4096  # claims, keys and slots, measured generously
_CUT_OFF = -1  # a `rev` below every cutoff

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

log = structlog.get_logger()


class _Held(Generic[K, V]):
    """What was found is held, and looked for once by those who ask at once; nothing is not held."""

    def __init__(self, clock: Clock, size: Callable[[V], int]) -> None:
        self._clock = clock
        self._size = size
        self._held: BytesCache[K, tuple[float, V]] = BytesCache(_HELD_BYTES)
        self._reads: Reads[K, V | None] = Reads(READS_MAX)

    async def __call__(self, key: K, read: Callable[[], Awaitable[V | None]]) -> V | None:
        """What `read` finds, at most HELD_S ago. Raises as Reads."""
        started = self._clock.boot()
        held = self._held.get(key)
        if held is not None and started - held[0] <= HELD_S:
            return held[1]

        def keep(found: V | None) -> None:
            if found is not None:
                self._held.put(key, (started, found), self._size(found))

        return await self._reads(key, read, keep)


@dataclass(frozen=True, slots=True)
class _Standing:
    """What an API key is worth by rows of its client and of the resources."""

    client: Client
    verified: Verified
    cut_off: Verified
    """The same, dead: the client is not let in, or no scope is left."""


class Identify:
    """Judges tokens of every form, and finds API keys.

    What is not stored, or not well formed, is judged as the JWT that it is not: TOKEN_MALFORMED,
    or nothing at all for who may not be told.
    """

    def __init__(
        self,
        issuer: str,
        judge: Judge,
        tokens: TokenStore,
        api_keys: ApiKeyStore,
        client: Callable[[str], Awaitable[Client | None]],
        catalog: Callable[[], Awaitable[Catalog]],
        clock: Clock,
    ) -> None:
        """`client` and `catalog` answer one object as long as nothing changed."""
        self._issuer = issuer
        self._judge = judge
        self._tokens = tokens
        self._api_keys = api_keys
        self._client = client
        self._catalog = catalog
        self._clock = clock
        self._found: _Held[bytes, Verified] = _Held(clock, _size)
        self._keys: _Held[bytes, ApiKey] = _Held(clock, lambda key: _scopes_size(key.scopes))
        self._standings: _Held[tuple[bytes, int], _Standing] = _Held(clock, _standing_size)
        self._standings_by: Catalog | None = None

    def at_hand(self, token: str, question: Question) -> Verdict | None:
        """The verdict on a JWT; None of a token that has to be found. Raises StateStale."""
        if _is_stored(token):
            return None
        return self._judge(token, question, self._clock.boot(), None)

    async def __call__(self, token: str, question: Question) -> Verdict:
        """The verdict. Raises StateStale, and AuthError STORE_UNAVAILABLE for a stored token."""
        known = await self._find(token) if _is_stored(token) else None
        return self._judge(token, question, self._clock.boot(), known)

    def standing(self, verdict: Verdict, question: Question) -> Standing:
        """A verdict that was just given, for the next time. Raises as Standing."""
        return Standing(self._judge, verdict, question)

    async def alive(self, token: str) -> Verified | None:
        """A token of ours that is alive, whoever presents it and whatever it is for.

        Raises as `__call__`.
        """
        known = await self._find(token) if _is_stored(token) else None
        return self._judge.identify(token, self._clock.boot(), known)

    async def stored(self, token: str) -> Verified | None:
        """What is stored of a token, be it dead; None of what is not, as of a JWT.

        Raises as `__call__`.
        """
        return await self._find(token) if _is_stored(token) else None

    async def api_key(self, token: str) -> tuple[ApiKey, Client] | None:
        """A living API key and its client, whatever the client's state. Raises as `__call__`."""
        if not is_secret(token, API_KEY_PREFIX):
            return None
        self._judge.state.require_fresh(self._clock.boot())
        found = await self._api_key(token)
        if found is None:
            return None
        key, standing = found
        claims = standing.verified.claims._replace(expires=_end(key))  # not with the approval
        known = Verified(None, claims)
        if self._judge.identify(token, self._clock.boot(), known) is None:
            return None
        return key, standing.client

    async def _find(self, token: str) -> Verified | None:
        self._judge.state.require_fresh(self._clock.boot())
        if not token.startswith(API_KEY_PREFIX):
            key = digest(token)
            return await self._found(key, lambda: self._read_token(key))
        found = await self._api_key(token)
        if found is None:
            return None
        standing = found[1]
        now = self._judge.state.now(self._clock.boot())
        is_good = standing.verified.claims.audiences and _is_let_in(standing.client, now)
        return standing.verified if is_good else standing.cut_off

    async def _read_token(self, key: bytes) -> Verified | None:
        row = await self._tokens.find(key)
        if row is None:
            return None
        try:
            claims = parse_claims(row.claims)
        except Refused:
            log.error("store.unreadable", table="access_token")
            return None
        if claims.issuer != self._issuer:
            return None
        return Verified(None, _cut_off(claims) if row.cut_off else claims, kid=row.kid)

    async def _api_key(self, token: str) -> tuple[ApiKey, _Standing] | None:
        value = digest(token)
        key = await self._keys(value, lambda: self._api_keys.find(value))
        client = await self._client(key.client_id) if key is not None else None
        if key is None or client is None:
            return None
        catalog = await self._catalog()
        if catalog is not self._standings_by:
            self._standings, self._standings_by = _Held(self._clock, _standing_size), catalog
        # A client's row is held with what was made of it, so no other one has its address.
        standing = await self._standings(
            (value, id(client)), lambda: self._read_standing(key, client, catalog)
        )
        return (key, standing) if standing is not None else None

    async def _read_standing(self, key: ApiKey, client: Client, catalog: Catalog) -> _Standing:
        claims = _claims(self._issuer, key, client, catalog)
        verified = Verified(None, claims)
        if key.rev < await self._api_keys.cutoff(verified.cutoffs):
            verified = Verified(None, _cut_off(claims))
        return _Standing(client, verified, Verified(None, _cut_off(claims)))


def _is_stored(token: str) -> bool:
    """Whether it has the form, and the checksum, of a token that is found."""
    if token.startswith(_PREFIXES):
        return any(is_secret(token, prefix) for prefix in _PREFIXES)
    # Dots are counted first, and of no endless text: every JWT comes by here.
    return len(token) <= JWE_CHARS_MAX and token.count(".") == 4 and is_jwe(token)


def _is_let_in(client: Client, now: float) -> bool:
    """Whether a client may use its API keys now."""
    try:
        require_let_in(client, now)
    except AuthError:
        return False
    return AuthMethod.API_KEY in client.metadata.auth_methods


def _claims(issuer: str, key: ApiKey, client: Client, catalog: Catalog) -> Claims:
    """What an API key says as an access token: scopes that it, its client and a resource have.

    Its audiences are the owners of these, and it ends with its client's approval.
    """
    scopes = (
        key.scopes & client.metadata.scopes & catalog.owner_of_scope.keys()
    ) - NOT_FOR_API_KEYS
    ends = (_end(key), client.approval_expire_time or NEVER)
    return Claims(
        issuer=issuer,
        subject=client.client_id,
        audiences=tuple(sorted({catalog.owner_of_scope[scope] for scope in scopes})),
        expires=int(min(ends)),
        issued=int(key.create_time),
        jti=key.api_key_id,
        client_id=client.client_id,
        scopes=frozenset(scopes),
        revision=key.rev,
    )


def _end(key: ApiKey) -> int:
    return int(key.expire_time) if key.expire_time is not None else NEVER


def _cut_off(claims: Claims) -> Claims:
    return claims._replace(revision=_CUT_OFF)


def _size(verified: Verified) -> int:
    return _ENTRY_BYTES + _scopes_size(verified.claims.scopes)


def _standing_size(standing: _Standing) -> int:
    return 2 * _size(standing.verified)


def _scopes_size(scopes: frozenset[str]) -> int:
    return _ENTRY_BYTES + sum(128 + len(scope) for scope in scopes)
