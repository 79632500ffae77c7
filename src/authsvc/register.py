"""RegisterClient (RFC 7591): who asks to be a client, and then waits for review."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from authsvc.errors import AuthError, FieldViolation, Reason, not_implemented
from authsvc.grants import GRANTS
from authsvc.keys.secrets import CLIENT_SECRET_PREFIX, digest, new_id, new_secret
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
from authsvc.oauth.spiffe import parse_workload
from authsvc.store.port import ClientStore, name_taken

_METHODS = frozenset({AuthMethod.CLIENT_SECRET_POST, AuthMethod.TLS_CLIENT_AUTH})
"""What this version can do; the rest of AuthMethod is NOT_IMPLEMENTED."""


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


@dataclass(frozen=True, slots=True)
class Registered:
    """The client, and its secret where a method needs one: shown this once."""

    client: Client
    secret: str = field(default="", repr=False)


class RegisterClient:
    """Registers clients, PENDING."""

    def __init__(
        self,
        store: ClientStore,
        catalog: Callable[[], Awaitable[Catalog]],
        client_cas: Callable[[], frozenset[str]],
    ) -> None:
        """`client_cas` answers the listener's client CAs now, by their key digests."""
        self._store = store
        self._catalog = catalog
        self._client_cas = client_cas

    async def __call__(
        self, asked: Registration, caller: Caller | None, peer: Peer, now: float, *, dry: bool
    ) -> Registered:
        """`caller` is None for a peer that is no client yet.

        Raises AuthError INVALID_CLIENT_METADATA, REGISTRATION_NOT_ALLOWED, ALREADY_EXISTS or
        NOT_IMPLEMENTED.
        """
        trusted = caller is not None and bool(caller.scopes & {SCOPE_ADMIN, SCOPE_REGISTER})
        administrator = caller is not None and SCOPE_ADMIN in caller.scopes
        identity = self._identity(asked, peer, trusted=trusted)
        if not trusted:
            _require_own(identity, peer, now)
        if asked.validates and not administrator:
            raise AuthError(Reason.REGISTRATION_NOT_ALLOWED, "validates")
        metadata = _with_defaults(asked, identity)
        await self._require_known(metadata)
        client = Client(
            client_id=new_id(),
            metadata=metadata,
            state=ClientState.PENDING,
            create_time=now,
            update_time=now,
            registrant=caller.name if caller is not None else _name(peer),
        )
        if dry:
            await self._require_free(identity)
            return Registered(replace(client, client_id=""))
        secret = ""
        if AuthMethod.CLIENT_SECRET_POST in metadata.auth_methods:
            secret = new_secret(CLIENT_SECRET_PREFIX)
            client = replace(client, secret_digest=digest(secret))
        await self._store.add(client)
        return Registered(client, secret)

    def _identity(
        self, asked: Registration, peer: Peer, *, trusted: bool
    ) -> CertificateIdentity | None:
        """The certificate name, pinned to one CA: the one asked for, or the only candidate."""
        if asked.identity_kind is None:
            if asked.identity_ca:
                raise invalid("tls_client_auth_ca", "needs a certificate name")
            return None
        value = asked.identity_value
        if not value:
            raise invalid(f"tls_client_auth_{asked.identity_kind.value}", "is empty")
        if asked.identity_kind is IdentityKind.SAN_URI:
            try:
                parse_workload(value)
            except ValueError as error:
                raise invalid("tls_client_auth_san_uri", str(error)) from error
        elif asked.identity_kind is IdentityKind.SAN_DNS:
            value = value.lower()
        cas = self._client_cas()
        candidates = cas if trusted else cas & peer.paths.keys()
        if asked.identity_ca:
            candidates = candidates & {asked.identity_ca}
        if len(candidates) != 1:
            raise invalid("tls_client_auth_ca", "name one of the listener's client CAs")
        return CertificateIdentity(asked.identity_kind, value, next(iter(candidates)))

    async def _require_free(self, identity: CertificateIdentity | None) -> None:
        """What the store says of a name that is taken, without a change."""
        if identity and await self._store.by_identity([(identity.kind, identity.value)]):
            raise name_taken()

    async def _require_known(self, metadata: ClientMetadata) -> None:
        catalog = await self._catalog()
        for scope in sorted(metadata.scopes):
            if scope not in catalog.owner_of_scope:
                raise invalid("scopes", f"no resource defines {scope}")
        for audience in sorted(metadata.validates - {ANY_AUDIENCE}):
            if audience not in catalog.by_id:
                raise invalid("validates", f"no such resource: {audience}")


def _require_own(identity: CertificateIdentity | None, peer: Peer, now: float) -> None:
    """A peer that is nobody yet may ask for its own name alone."""
    if identity is None or not identity.matches(peer, now):
        raise AuthError(
            Reason.REGISTRATION_NOT_ALLOWED, "a peer registers the name in its own certificate"
        )


def _with_defaults(asked: Registration, identity: CertificateIdentity | None) -> ClientMetadata:
    grants = asked.grant_types or frozenset({GrantType.CLIENT_CREDENTIALS})
    for grant in sorted(grants - GRANTS.keys()):
        raise not_implemented(f"grant {grant.name.lower()}")
    default = AuthMethod.TLS_CLIENT_AUTH if identity else AuthMethod.CLIENT_SECRET_POST
    methods = asked.auth_methods or frozenset({default})
    for method in sorted(methods - _METHODS):
        raise not_implemented(f"client authentication {method.name.lower()}")
    if AuthMethod.TLS_CLIENT_AUTH in methods and identity is None:
        raise invalid("token_endpoint_auth_methods", "tls_client_auth needs a certificate name")
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
