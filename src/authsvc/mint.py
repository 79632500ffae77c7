"""Making tokens: access tokens in the form that their resource can read, and grants."""

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import structlog

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.keys.jwe import Encrypter
from authsvc.keys.jwt import encode
from authsvc.keys.refresh import RefreshKeys
from authsvc.keys.ring import KeyRing
from authsvc.keys.secrets import (
    ACCESS_TOKEN_PREFIX,
    digest,
    new_handle,
    new_id,
    new_secret,
)
from authsvc.model import Catalog, Client, Grant, GrantType, Origin, Peer, Session, TokenFormat
from authsvc.oauth.claims import Frozen, access_token_claims
from authsvc.oauth.resources import Target
from authsvc.store.port import GrantStore, SessionStore, StoredToken, TokenStore
from authsvc_client.core.jws import TOKEN_CHARS_MAX
from authsvc_client.core.markers import SKEW_S
from authsvc_client.core.state import State

MINT_S_MAX = 10.0
"""A token that took longer to make is abandoned: its `rev` and `iat` would be too old."""

log = structlog.get_logger()

_NEW = frozenset(("exp", "iat", "jti", "rev"))
"""Claims that no two tokens for the same request share."""
_encrypter = lru_cache(maxsize=256)(Encrypter)


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """A token and what is said of it; times in seconds since the epoch."""

    access_token: str = field(repr=False)
    jti: str
    scopes: tuple[str, ...]
    audiences: tuple[str, ...]
    expires: int
    lifetime_s: int
    refresh_token: str = field(default="", repr=False)
    issued_token_type: str = ""
    """At a token exchange (RFC 8693 section 2.2.1)."""
    again: "Again | None" = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Again:
    """Issues one more token, of the moment of the call, as long as these are the same, and the
    certificate leads to the client's CA. Raises as Mint.
    """

    client: Client
    catalog: Catalog
    issue: "Reissue"


class Reissued(NamedTuple):
    """What is new in one more token, as in TokenAnswer."""

    access_token: str
    jti: str
    expires: int
    lifetime_s: int


Reissue = Callable[[], Reissued]


class Moment(NamedTuple):
    """Before the first authority is read: `rev`, `iat` and `exp` count from here.

    Whatever is cut off while the token is made has a higher revision, and the token is dead.
    """

    started: float
    """Boot-time clock."""
    now: float
    """The database's time, in seconds since the epoch."""
    revision: int


class Mint:
    """Makes access tokens."""

    def __init__(
        self,
        issuer: str,
        ring: KeyRing,
        tokens: TokenStore,
        permissions: Callable[[str, str], Awaitable[Frozen]],
        state: State,
        clock: Clock,
    ) -> None:
        """`permissions` answers those of a subject on an audience, for tokens that freeze them."""
        self._issuer = issuer
        self._ring = ring
        self._tokens = tokens
        self._permissions = permissions
        self._state = state
        self._clock = clock

    def begin(self) -> Moment:
        """The moment that a token is judged to be of. Raises StateStale, AuthError STATE_STALE."""
        started, state = self._clock.boot(), self._state
        state.require_fresh(started)
        if state.ahead(started) > SKEW_S:
            # Tokens made now would begin in the future, and outlive their dead marks.
            raise AuthError(Reason.STATE_STALE, "the database's clock went back", retry_after_s=1.0)
        return Moment(started, state.now(started), state.revision)

    def end(self, moment: Moment) -> None:
        """Raises AuthError MINT_ABANDONED where it took too long."""
        if self._clock.boot() - moment.started > MINT_S_MAX:
            raise AuthError(Reason.MINT_ABANDONED)

    async def __call__(
        self,
        moment: Moment,
        client: Client,
        peer: Peer,
        origin: Origin,
        target: Target,
        *,
        expires: float = math.inf,
        revision: int | None = None,
    ) -> TokenAnswer:
        """A token that ends at `expires` at the latest; `revision` of a stored authority is lower.

        Raises AuthError PEER_CERTIFICATE_MISSING, INVALID_GRANT where nothing is left of its life,
        MINT_ABANDONED, and as TokenStore.
        """
        frozen = None
        if target.freeze_permissions:
            frozen = await self._permissions(origin.subject, target.audiences[0])
        claims = self._claims(
            moment, client, peer, origin, target, frozen, expires=expires, revision=revision
        )
        if target.token_format is TokenFormat.OPAQUE:
            token, kid = new_secret(ACCESS_TOKEN_PREFIX), ""
        else:
            signer = self._ring.signer
            token, kid = signer.sign(claims), signer.kid
        if target.token_format is TokenFormat.JWE:
            token = _encrypter(target.encryption_jwk).encrypt(token)
        answer = _answer(token, claims, target)
        if target.token_format is not TokenFormat.JWT:
            await self._tokens.add(StoredToken(digest(token), kid, claims, float(answer.expires)))
        self.end(moment)
        return answer

    def again(
        self, moment: Moment, client: Client, peer: Peer, origin: Origin, target: Target
    ) -> Reissue | None:
        """Issues a token such as was made just now, without a wait; None where it has to be written
        down, or permissions looked up.
        """
        if target.freeze_permissions or target.token_format is not TokenFormat.JWT:
            return None
        claims = self._claims(moment, client, peer, origin, target)
        same = encode({name: value for name, value in claims.items() if name not in _NEW})[:-1]

        def reissue() -> Reissued:
            moment = self.begin()
            now, jti = int(moment.now), new_id()
            end = _end(now, client, target)
            new = f'"exp":{end},"iat":{now},"jti":"{jti}","rev":{moment.revision}'
            token = _fitting(self._ring.signer.sign_text(f"{same},{new}}}"))
            return Reissued(token, jti, end, end - now)

        return reissue

    def _claims(
        self,
        moment: Moment,
        client: Client,
        peer: Peer,
        origin: Origin,
        target: Target,
        permissions: Frozen | None = None,
        *,
        expires: float = math.inf,
        revision: int | None = None,
    ) -> dict[str, Any]:
        bound = client.metadata.bound_access_tokens
        if bound and not peer.thumbprint:
            raise AuthError(Reason.PEER_CERTIFICATE_MISSING, "the client's tokens are bound to one")
        now = int(moment.now)
        return access_token_claims(
            issuer=self._issuer,
            client=client,
            origin=origin,
            target=target,
            jti=new_id(),
            now=now,
            expires=_end(now, client, target, expires),
            revision=moment.revision if revision is None else min(revision, moment.revision),
            thumbprint=peer.thumbprint if bound else "",
            permissions=permissions,
        )


def _end(now: int, client: Client, target: Target, expires: float = math.inf) -> int:
    """Raises AuthError INVALID_GRANT where nothing is left."""
    end = int(min(now + target.lifetime_s, expires, client.approval_expire_time or math.inf))
    if end <= now:
        raise AuthError(Reason.INVALID_GRANT, cause="nothing is left of its life")
    return end


def _fitting(token: str) -> str:
    """The same. Raises AuthError INVALID_TARGET for one that no validator would take."""
    if len(token) > TOKEN_CHARS_MAX:
        raise AuthError(Reason.INVALID_TARGET, "its permissions do not fit into a token")
    return token


def _answer(token: str, claims: Mapping[str, Any], target: Target) -> TokenAnswer:
    end: int = claims["exp"]
    return TokenAnswer(
        _fitting(token),
        claims["jti"],
        tuple(sorted(target.scopes)),
        target.audiences,
        end,
        end - claims["iat"],
    )


@dataclass(frozen=True, slots=True)
class GrantLife:
    """How long grants live, in seconds."""

    most_s: float
    idle_s: float
    """Without a use of the refresh token."""


@dataclass(frozen=True, slots=True)
class Login:
    """A person's session, and the grant of a client in it, before they are written."""

    session: Session
    grant: Grant

    @property
    def origin(self) -> Origin:
        """Of the tokens in it."""
        return replace(self.grant.origin, grant_id=self.grant.grant_id)


class OpenGrant:
    """Opens grants."""

    def __init__(
        self, store: GrantStore, sessions: SessionStore, keys: RefreshKeys, life: GrantLife
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._keys = keys
        self._life = life

    async def __call__(
        self,
        moment: Moment,
        client: Client,
        origin: Origin,
        target: Target,
        grant_type: GrantType,
        address: str,
    ) -> tuple[str, float]:
        """The first refresh token of a confidential client's grant, and the end of the grant.

        Raises AuthError INVALID_GRANT where what it comes from died meanwhile.
        """
        grant = self._grant(moment, client, origin, target, grant_type, address)
        if not await self._store.add(grant):
            raise AuthError(Reason.INVALID_GRANT, cause="what it was exchanged from is dead")
        log.info("grant.opened", grant=grant.grant_id, client=client.client_id)
        return self._refresh_token(grant), grant.expire_time

    def login(
        self,
        moment: Moment,
        client: Client,
        origin: Origin,
        target: Target,
        grant_type: GrantType,
        address: str,
    ) -> Login:
        """A session of a person, and the grant in it; both end with the access token where no
        refresh token keeps them going.
        """
        life_s = self._life.most_s if _refreshes(client) else float(target.lifetime_s)
        origin = replace(origin, session_id=new_id())
        grant = self._grant(moment, client, origin, target, grant_type, address, life_s)
        session = Session(
            session_id=origin.session_id,
            user_id=origin.subject,
            rev=moment.revision,
            address=address,
            create_time=moment.now,
            auth_time=moment.now,
            expire_time=grant.expire_time,
            acr=origin.acr,
            amr=origin.amr,
        )
        return Login(session, grant)

    async def open(self, login: Login, client: Client, password_version: int) -> str:
        """Writes a login; answers the refresh token of a client that is registered for one.

        Raises AuthError INVALID_GRANT where the person was stopped, or changed its password,
        meanwhile.
        """
        session, grant = login.session, login.grant
        if not await self._sessions.open(session, grant, password_version):
            raise AuthError(Reason.INVALID_GRANT, cause="the user changed meanwhile")
        log.info("session.opened", session=session.session_id, client=grant.client_id)
        return self._refresh_token(grant) if _refreshes(client) else ""

    def _grant(
        self,
        moment: Moment,
        client: Client,
        origin: Origin,
        target: Target,
        grant_type: GrantType,
        address: str,
        life_s: float | None = None,
    ) -> Grant:
        life_s = self._life.most_s if life_s is None else life_s
        return Grant(
            grant_id=new_id(),
            client_id=client.client_id,
            origin=origin,
            grant_type=grant_type,
            scopes=target.scopes,
            audiences=target.audiences,
            sender=client.client_id,
            rev=moment.revision,
            handle=new_handle(),
            key_id=self._keys.current,
            create_time=moment.now,
            idle_expire_time=moment.now + self._life.idle_s,
            expire_time=moment.now + life_s,
            address=address,
        )

    def _refresh_token(self, grant: Grant) -> str:
        return self._keys.mint(grant.handle, grant.generation, grant.key_id)


def _refreshes(client: Client) -> bool:
    return GrantType.REFRESH_TOKEN in client.metadata.grant_types
