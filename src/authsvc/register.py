"""RegisterClient (RFC 7591): who asks to be a client, and then waits for review."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace

import structlog

from authsvc.errors import AuthError, FieldViolation, Reason, not_implemented
from authsvc.grants import GRANTS
from authsvc.keys.assertion import ClientKeys
from authsvc.keys.secrets import (
    CLIENT_SECRET_PREFIX,
    INITIAL_ACCESS_TOKEN_PREFIX,
    REGISTRATION_TOKEN_PREFIX,
    digest,
    is_secret,
    new_id,
    new_secret,
)
from authsvc.model import (
    ANY_AUDIENCE,
    SCOPE_ADMIN,
    SCOPE_REGISTER,
    AuthMethod,
    Caller,
    Catalog,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
    Peer,
    peer_names,
)
from authsvc.oauth.registration import RegistrationPolicy, beyond
from authsvc.oauth.spiffe import parse_workload
from authsvc.store.port import Admission, ClientStore, InitialAccessTokenStore, name_taken

SECRET_METHODS = frozenset({AuthMethod.CLIENT_SECRET_BASIC, AuthMethod.CLIENT_SECRET_POST})
_METHODS = SECRET_METHODS | {
    AuthMethod.PRIVATE_KEY_JWT,
    AuthMethod.TLS_CLIENT_AUTH,
    AuthMethod.API_KEY,
}
_GRANTS = GRANTS.keys() | {GrantType.REFRESH_TOKEN}
"""What this version can do; the rest of both is NOT_IMPLEMENTED."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Registration:
    """Metadata as they came: what is None or empty takes its default."""

    client_name: str
    grant_types: frozenset[GrantType]
    auth_methods: frozenset[AuthMethod]
    scopes: frozenset[str]
    identity_kind: IdentityKind | None
    identity_value: str
    identity_ca: str
    bound_access_tokens: bool | None
    validates: frozenset[str]
    texts: dict[str, str]
    contacts: tuple[str, ...]
    jwks: str = ""
    may_act: str = ""
    first_party: bool = False


@dataclass(frozen=True, slots=True)
class Registered:
    """The client, and what is shown this once."""

    client: Client
    secret: str = field(default="", repr=False)
    """Where a method needs one; empty where a repeated request finds it used."""
    registration_token: str = field(default="", repr=False)


class CheckMetadata:
    """Makes metadata of what was asked, defaults filled in (RFC 7591 section 2)."""

    def __init__(
        self,
        store: ClientStore,
        catalog: Callable[[], Awaitable[Catalog]],
        pins: Callable[[str], frozenset[str]],
    ) -> None:
        """`pins` answers which CAs may vouch now, by their pins: for SPIFFE IDs of a trust domain,
        or, given "", for names of other kinds.
        """
        self._store = store
        self._catalog = catalog
        self._pins = pins

    async def __call__(
        self, asked: Registration, peer: Peer | None, *, known: ClientMetadata | None = None
    ) -> ClientMetadata:
        """With a peer, of the CAs that vouch for it. `known` is what the client has already: it may
        keep what nobody could ask for any more.

        Raises AuthError INVALID_CLIENT_METADATA or NOT_IMPLEMENTED.
        """
        metadata = _with_defaults(asked, self._identity(asked, peer, known))
        await self._require_there(metadata, known)
        return metadata

    def _identity(
        self, asked: Registration, peer: Peer | None, known: ClientMetadata | None
    ) -> CertificateIdentity | None:
        """The certificate name, pinned to one CA: the one asked for, or the only candidate."""
        if asked.identity_kind is None:
            if asked.identity_ca:
                raise invalid("tls_client_auth_ca", "needs a certificate name")
            return None
        kind, value, trust_domain = asked.identity_kind, asked.identity_value, ""
        if not value:
            raise invalid(f"tls_client_auth_{kind.value}", "is empty")
        if kind is IdentityKind.SAN_URI:
            try:
                trust_domain = parse_workload(value).trust_domain
            except ValueError as error:
                raise invalid("tls_client_auth_san_uri", str(error)) from error
        elif kind is IdentityKind.SAN_DNS:
            value = value.lower()
        has = known.identity if known is not None else None
        if has is not None and has == CertificateIdentity(kind, value, asked.identity_ca or has.ca):
            return has
        pins = self._pins(trust_domain)
        candidates = pins if peer is None else pins & peer.paths.keys()
        if asked.identity_ca:
            candidates = candidates & {asked.identity_ca}
        if len(candidates) != 1:
            text = "name a client CA of the listener, or the bundle of the trust domain"
            raise invalid("tls_client_auth_ca", text)
        return CertificateIdentity(kind, value, next(iter(candidates)))

    async def _require_there(self, metadata: ClientMetadata, known: ClientMetadata | None) -> None:
        """That what it names newly is there."""
        catalog = await self._catalog()
        scopes, validates, may_act = metadata.scopes, metadata.validates, metadata.may_act
        if known is not None:
            scopes, validates = scopes - known.scopes, validates - known.validates
            may_act = "" if may_act == known.may_act else may_act
        for scope in sorted(scopes):
            if scope not in catalog.owner_of_scope:
                raise invalid("scopes", f"no resource defines {scope}")
        for audience in sorted(validates - {ANY_AUDIENCE}):
            if audience not in catalog.by_id:
                raise invalid("validates", f"no such resource: {audience}")
        if may_act and await self._store.get(may_act) is None:
            raise invalid("may_act", "no such client")


class RegisterClient:
    """Registers clients: PENDING, unless the policy lets them in at once."""

    def __init__(
        self,
        store: ClientStore,
        initial: InitialAccessTokenStore,
        check: CheckMetadata,
        policy: RegistrationPolicy,
        revision: Callable[[], int],
    ) -> None:
        """`revision` answers the applied one."""
        self._store = store
        self._initial = initial
        self._check = check
        self._policy = policy
        self._revision = revision

    async def __call__(
        self,
        asked: Registration,
        caller: Caller | None,
        peer: Peer,
        now: float,
        *,
        dry: bool,
        request_id: str = "",
        initial_access_token: str = "",
    ) -> Registered:
        """`caller` is None for a peer that is no client yet.

        Raises AuthError INVALID_CLIENT_METADATA, REGISTRATION_NOT_ALLOWED, ALREADY_EXISTS,
        REGISTRATION_TOKEN_INVALID, REQUEST_ID_REUSED, RATE_LIMITED or NOT_IMPLEMENTED.
        """
        revision = self._revision()
        administrator = caller is not None and SCOPE_ADMIN in caller.scopes
        registrant = caller.name if caller is not None else _name(peer)
        trusted = caller is not None and bool(caller.scopes & {SCOPE_ADMIN, SCOPE_REGISTER})
        if initial_access_token:
            may_repeat = bool(request_id) and not dry
            registrant = await self._bearer(initial_access_token, may_repeat=may_repeat)
            trusted = True
        if asked.validates and not administrator:
            raise AuthError(Reason.REGISTRATION_NOT_ALLOWED, "validates")
        metadata = await self._check(asked, None if trusted else peer)
        if not trusted:
            require_own(metadata.identity, peer, now)
        approved = self._policy.approve and not beyond(metadata, self._policy)
        client = Client(
            client_id=new_id(),
            metadata=metadata,
            state=ClientState.APPROVED if approved else ClientState.PENDING,
            create_time=now,
            update_time=now,
            registrant=registrant,
            reviewer="policy" if approved else "",
            review_time=now if approved else None,
        )
        if dry:
            await self._require_free(metadata.identity)
            return Registered(replace(client, client_id=""))
        secret = ""
        if metadata.auth_methods & SECRET_METHODS:
            secret = new_secret(CLIENT_SECRET_PREFIX)
            client = replace(client, secret_digest=digest(secret))
        token = new_secret(REGISTRATION_TOKEN_PREFIX)
        client = replace(client, registration_digest=digest(token), registration_rev=revision)
        admission = Admission(
            digest(initial_access_token) if initial_access_token else None,
            _request(registrant, request_id, metadata) if request_id else None,
            None if administrator else self._policy.pending_per_registrant,
        )
        stored = await self._store.add(client, admission)
        log.info("client.registered", client=stored.client_id, registrant=registrant)
        is_new = stored.secret_digest == client.secret_digest
        return Registered(stored, secret if is_new else "", token)

    async def _bearer(self, token: str, *, may_repeat: bool) -> str:
        """Who registers by an initial access token (RFC 7591 section 3).

        One that is used up may still repeat a request; the store knows of which.
        """
        if is_secret(token, INITIAL_ACCESS_TOKEN_PREFIX):
            found = await self._initial.find(digest(token))
            if found is not None and (found.uses_left or may_repeat):
                return f"initial access token {found.initial_access_token_id}"
        raise AuthError(Reason.REGISTRATION_TOKEN_INVALID)

    async def _require_free(self, identity: CertificateIdentity | None) -> None:
        """What the store says of a name that is taken, without a change."""
        if identity and await self._store.by_identity([(identity.kind, identity.value)]):
            raise name_taken()


def _request(registrant: str, request_id: str, asked: ClientMetadata) -> tuple[bytes, bytes]:
    """Digests of who asks under which id, and of what is asked.

    The CA of the name is part of that: two CAs may vouch for peers of one name.
    """
    content = json.dumps(asdict(asked), sort_keys=True, default=sorted)
    return digest(json.dumps([registrant, request_id])), digest(content)


def require_own(identity: CertificateIdentity | None, peer: Peer, now: float) -> None:
    """A peer that is nobody yet may ask for its own name alone: REGISTRATION_NOT_ALLOWED."""
    if identity is None or not identity.matches(peer, now):
        raise AuthError(
            Reason.REGISTRATION_NOT_ALLOWED, "a peer registers the name in its own certificate"
        )


def _with_defaults(asked: Registration, identity: CertificateIdentity | None) -> ClientMetadata:
    grants = asked.grant_types or frozenset({GrantType.CLIENT_CREDENTIALS})
    for grant in sorted(grants - _GRANTS):
        raise not_implemented(f"grant {grant.name.lower()}")
    if grants == {GrantType.REFRESH_TOKEN}:
        raise invalid("grant_types", "refresh_token needs a grant that gives one")
    default = AuthMethod.TLS_CLIENT_AUTH if identity else AuthMethod.CLIENT_SECRET_POST
    methods = asked.auth_methods or frozenset({default})
    for method in sorted(methods - _METHODS):
        raise not_implemented(f"client authentication {method.name.lower()}")
    if AuthMethod.TLS_CLIENT_AUTH in methods and identity is None:
        raise invalid("token_endpoint_auth_methods", "tls_client_auth needs a certificate name")
    if asked.jwks:
        try:
            ClientKeys(asked.jwks)
        except ValueError as error:
            raise invalid("jwks", str(error)) from error
    elif AuthMethod.PRIVATE_KEY_JWT in methods:
        raise invalid("token_endpoint_auth_methods", "private_key_jwt needs jwks")
    bound = asked.bound_access_tokens
    return ClientMetadata(
        client_name=asked.client_name,
        grant_types=grants,
        auth_methods=methods,
        scopes=asked.scopes,
        identity=identity,
        bound_access_tokens=identity is not None if bound is None else bound,
        validates=asked.validates,
        texts=asked.texts,
        contacts=asked.contacts,
        jwks=asked.jwks,
        may_act=asked.may_act,
        first_party=asked.first_party,
    )


def _name(peer: Peer) -> str:
    for kind in IdentityKind:
        for name in sorted(peer_names(peer, kind)):
            return name
    return f"x5t#S256:{peer.thumbprint}"


def invalid(field: str, text: str) -> AuthError:
    """invalid_client_metadata (RFC 7591 section 3.2.2)."""
    return AuthError(
        Reason.INVALID_CLIENT_METADATA,
        f"{field}: {text}",
        metadata={"field": field},
        violations=(FieldViolation(f"metadata.{field}", text),),
    )
