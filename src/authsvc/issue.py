"""IssueToken: authenticate the client, prove the grant, narrow, mint. No database when warm."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from authsvc.authenticate import Authenticate, Credentials
from authsvc.errors import AuthError, Reason, not_implemented
from authsvc.grants import GRANTS
from authsvc.grants.proof import Exchange, Password, Presented, Proof
from authsvc.grants.token_exchange import ACCESS_TOKEN_TYPE, REFRESH_TOKEN_TYPE
from authsvc.mint import Again, Mint, Moment, OpenGrant, TokenAnswer
from authsvc.model import AuthMethod, Catalog, Client, GrantType, Origin, Peer
from authsvc.oauth.policy import require_grant, require_let_in, validated_by
from authsvc.oauth.resources import Target, pick
from authsvc.oauth.scopes import narrow
from authsvc.passwords import CheckPassword
from authsvc.store.port import PasswordRecord
from authsvc_client.core.cache import BytesCache
from authsvc_client.core.judge import Verified

PICKED_BYTES_MAX = 8 * 2**20

_Asked = tuple[tuple[str, ...], tuple[str, ...], frozenset[str], bool]
_Picked = tuple[Catalog, Target]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What both edges decode an IssueToken into."""

    grant_type: GrantType
    credentials: Credentials
    scopes: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    exchange: Exchange | None = None
    password: Password | None = None
    address: str = ""
    """Network address of the peer."""


class IssueToken:
    """Issues tokens."""

    def __init__(
        self,
        issuer: str,
        authenticate: Authenticate,
        catalog: Callable[[], Awaitable[Catalog]],
        alive: Callable[[str], Awaitable[Verified | None]],
        mint: Mint,
        open_grant: OpenGrant,
        check_password: CheckPassword | None,
        fresh: Callable[[], Awaitable[None]],
    ) -> None:
        """`alive` finds an access token of ours that is alive now, whoever presents it; `fresh`
        applies all that was written before it was called.

        Without `check_password` no client is let in by the password grant.
        """
        self._issuer = issuer
        self._authenticate = authenticate
        self._catalog = catalog
        self._alive = alive
        self._mint = mint
        self._open_grant = open_grant
        self._check_password = check_password
        self._fresh = fresh
        self._picked: BytesCache[_Asked, _Picked] = BytesCache(PICKED_BYTES_MAX)

    async def __call__(self, request: TokenRequest, peer: Peer) -> TokenAnswer:
        """Raises AuthError with the reasons of the contract, and StateStale."""
        if request.grant_type is GrantType.PASSWORD and self._check_password is not None:
            # Whoever set the password elsewhere cut its user off: a `rev` of before would be dead.
            await self._fresh()
        moment = self._mint.begin()
        grant = GRANTS.get(request.grant_type)
        if grant is None:
            raise not_implemented(f"grant {request.grant_type.name.lower()}")
        who = await self._authenticate(request.credentials, peer)
        client = who.client
        require_let_in(client, moment.now)
        require_grant(client, request.grant_type)
        if request.grant_type is GrantType.PASSWORD and self._check_password is None:
            raise AuthError(
                Reason.GRANT_TYPE_NOT_ALLOWED,
                "switched off by the setting grants.password",
                metadata={"grant_type": "PASSWORD"},
            )
        wants_refresh_token = _wants_refresh_token(request)
        if wants_refresh_token:
            require_grant(client, GrantType.REFRESH_TOKEN)
        catalog = await self._catalog()
        proof = await grant(
            Presented(
                client,
                peer.thumbprint,
                validated_by(client, catalog),
                self._alive,
                moment.now,
                request.exchange,
                partial(self._check, request, peer),
            )
        )
        most = who.scopes if proof.scopes is None else who.scopes & proof.scopes
        to_issuer = _may_speak_to_authsvc(client, proof)
        target = self._target(request.scopes, request.resources, most, catalog, bare=to_issuer)
        if wants_refresh_token:
            return await self._granted(
                moment, client, proof, target, request.grant_type, request.address
            )
        if proof.password_version is not None:
            return await self._logged_in(
                moment, client, peer, request, proof.origin, target, proof.password_version
            )
        origin, expires = proof.origin, proof.expires
        if who.api_key is not None:
            if not origin.root_jti:
                origin = replace(origin, root_jti=who.api_key.api_key_id)  # it dies with the key
            expires = min(expires, who.api_key.expire_time or expires)
        answer = await self._mint(
            moment,
            client,
            peer,
            origin,
            target,
            expires=expires,
            revision=who.api_key.rev if who.api_key is not None else None,
        )
        if request.exchange is not None:
            return replace(answer, issued_token_type=ACCESS_TOKEN_TYPE)
        proves_itself = request.grant_type is GrantType.CLIENT_CREDENTIALS
        if not proves_itself or who.method is not AuthMethod.TLS_CLIENT_AUTH:
            return answer  # what else was presented is to be presented anew
        again = self._mint.again(moment, client, peer, origin, target)
        return replace(answer, again=Again(client, catalog, again)) if again is not None else answer

    def _target(
        self,
        scopes: tuple[str, ...],
        resources: tuple[str, ...],
        most: frozenset[str],
        catalog: Catalog,
        *,
        bare: bool,
    ) -> Target:
        """What is asked for, of what may be had; the same for the same catalog.

        Raises AuthError SCOPE_UNKNOWN, SCOPE_NOT_ALLOWED and INVALID_TARGET.
        """
        asked = (scopes, resources, most, bare)
        found = self._picked.get(asked)
        if found is not None and found[0] is catalog:
            return found[1]
        issuer = frozenset({self._issuer}) if bare else frozenset[str]()
        granted = narrow(scopes, most, catalog)
        target = pick(resources, granted, bool(scopes), catalog, self._issuer, issuer)
        size = sum(256 + len(text) for part in (scopes, resources, most) for text in part)
        self._picked.put(asked, (catalog, target), 4096 + size)
        return target

    async def _logged_in(
        self,
        moment: Moment,
        client: Client,
        peer: Peer,
        request: TokenRequest,
        origin: Origin,
        target: Target,
        password_version: int,
    ) -> TokenAnswer:
        """Written last: what could not be minted leaves no session behind."""
        login = self._open_grant.login(
            moment, client, origin, target, request.grant_type, request.address
        )
        answer = await self._mint(
            moment, client, peer, login.origin, target, expires=login.grant.expire_time
        )
        refresh_token = await self._open_grant.open(login, client, password_version)
        self._mint.end(moment)
        return replace(answer, refresh_token=refresh_token)

    async def _check(self, request: TokenRequest, peer: Peer) -> PasswordRecord:
        assert self._check_password is not None
        assert request.password is not None
        told = request.password
        return await self._check_password(told.username, told.password, peer, request.address)

    async def _granted(
        self,
        moment: Moment,
        client: Client,
        proof: Proof,
        target: Target,
        grant_type: GrantType,
        address: str,
    ) -> TokenAnswer:
        """A refresh token alone (RFC 8693 section 2.2.1), for what is not past its end."""
        if proof.expires <= moment.now:
            raise AuthError(Reason.INVALID_GRANT, cause="the subject token is past its end")
        refresh_token, expires = await self._open_grant(
            moment, client, proof.origin, target, grant_type, address
        )
        self._mint.end(moment)
        return TokenAnswer(
            access_token="",
            jti="",
            scopes=tuple(sorted(target.scopes)),
            audiences=target.audiences,
            expires=int(expires),
            lifetime_s=int(expires - moment.now),
            refresh_token=refresh_token,
            issued_token_type=REFRESH_TOKEN_TYPE,
        )


def _may_speak_to_authsvc(client: Client, proof: Proof) -> bool:
    """A person may, for itself, at a first party: no scope is needed for that, and none is had."""
    return client.metadata.first_party and proof.origin.auth_time is not None


def _wants_refresh_token(request: TokenRequest) -> bool:
    exchange = request.exchange
    return exchange is not None and exchange.requested_token_type == REFRESH_TOKEN_TYPE
