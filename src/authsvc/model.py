"""The nouns: plain immutable values that every layer shares. No I/O, no wire types."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import NamedTuple

ANY_AUDIENCE = "*"

# Scopes of authsvc itself, as a resource whose id is the issuer.
SCOPE_ADMIN = "admin"
SCOPE_VALIDATE = "validate"
SCOPE_WATCH = "watch"
SCOPE_REGISTER = "register"
OWN_SCOPES = (SCOPE_ADMIN, SCOPE_VALIDATE, SCOPE_WATCH, SCOPE_REGISTER)


@dataclass(frozen=True, slots=True)
class Validity:
    """A span of time, in seconds since the epoch; both ends belong to it (RFC 5280 4.1.2.5)."""

    not_before: float
    not_after: float

    def covers(self, now: float) -> bool:
        """Whether `now` lies in it."""
        return self.not_before <= now <= self.not_after


@dataclass(frozen=True, slots=True)
class Peer:
    """The certificate on the connection, and the CAs of the listener that its path leads to."""

    thumbprint: str
    """SHA-256 of the DER certificate, base64url without padding (`x5t#S256`, RFC 8705 3.1)."""
    spiffe_id: str
    """The URI SAN where there is exactly one and it is a SPIFFE ID; else empty."""
    dns_names: frozenset[str]
    """DNS SANs, in lower case; none where a bundle vouches for the SPIFFE ID."""
    subject_dn: str
    """Subject (RFC 4514); empty where the certificate has none, or a bundle vouches for it."""
    validity: Validity
    """Of the certificate itself."""
    paths: Mapping[str, Validity]
    """Pin of a CA -> validity of the whole path.

    A client CA of the listener is pinned by the lower-case hex SHA-256 of its SubjectPublicKeyInfo,
    the bundle of an outside trust domain by the ID of that: `spiffe://partner.example`.
    """


NOBODY = Peer("", "", frozenset(), "", Validity(0.0, 0.0), MappingProxyType({}))
"""Who is on a connection without a certificate: it matches no identity and binds no token."""


class IdentityKind(StrEnum):
    """Which name in a certificate identifies a client (RFC 8705 section 2.1.2)."""

    SAN_URI = "san_uri"
    SAN_DNS = "san_dns"
    SUBJECT_DN = "subject_dn"


@dataclass(frozen=True, slots=True)
class CertificateIdentity:
    """A name in a certificate, and the CA that must have issued it."""

    kind: IdentityKind
    value: str
    ca: str
    """A pin, as in `Peer.paths`."""

    def matches(self, peer: Peer, now: float) -> bool:
        """Whether the peer has this name, by a path to this CA that is valid at `now`."""
        path = peer.paths.get(self.ca)
        if path is None or not path.covers(now):
            return False
        return self.value in peer_names(peer, self.kind)


def peer_names(peer: Peer, kind: IdentityKind) -> frozenset[str]:
    """The names of a kind that the certificate carries."""
    if kind is IdentityKind.SAN_DNS:
        return peer.dns_names
    name = peer.spiffe_id if kind is IdentityKind.SAN_URI else peer.subject_dn
    return frozenset({name} if name else ())


class ClientState(IntEnum):
    """Where a client stands in its review; numbers are the contract's."""

    PENDING = 1
    APPROVED = 2
    REJECTED = 3
    EXPIRED = 4
    SUSPENDED = 5


class AuthMethod(IntEnum):
    """How a client authenticates; numbers are the contract's."""

    NONE = 1
    CLIENT_SECRET_BASIC = 2
    CLIENT_SECRET_POST = 3
    PRIVATE_KEY_JWT = 4
    TLS_CLIENT_AUTH = 5
    SELF_SIGNED_TLS_CLIENT_AUTH = 6
    API_KEY = 7


class GrantType(IntEnum):
    """Grants; numbers are the contract's."""

    CLIENT_CREDENTIALS = 1
    AUTHORIZATION_CODE = 2
    REFRESH_TOKEN = 3
    PASSWORD = 4
    DEVICE_CODE = 5
    TOKEN_EXCHANGE = 6
    JWT_BEARER = 7


@dataclass(frozen=True, slots=True)
class ClientMetadata:
    """What a client says of itself (RFC 7591 section 2), defaults filled in."""

    client_name: str
    grant_types: frozenset[GrantType]
    auth_methods: frozenset[AuthMethod]
    scopes: frozenset[str]
    identity: CertificateIdentity | None = None
    bound_access_tokens: bool = False
    validates: frozenset[str] = frozenset()
    texts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """client_uri, logo_uri, policy_uri, tos_uri, software_id, software_version."""
    contacts: tuple[str, ...] = ()
    jwks: str = ""
    """Public keys for private_key_jwt (RFC 7517, JSON)."""
    may_act: str = ""
    """The only client that may act for it at a token exchange (RFC 8693 section 4.4)."""
    first_party: bool = False
    """Its operator is authsvc's own, who trusts it with the passwords of people."""


@dataclass(frozen=True, slots=True)
class Client:
    """A registered client."""

    client_id: str
    metadata: ClientMetadata
    state: ClientState
    create_time: float
    update_time: float
    registrant: str
    version: int = 1
    """Counts changes; the etag."""
    reviewer: str = ""
    review_comment: str = ""
    review_time: float | None = None
    approval_expire_time: float | None = None
    secret_digest: bytes | None = None
    """SHA-256 of the secret."""
    secret_used: bool = False
    """The secret authenticated once; until then a retried registration replaces it."""
    previous_secret_digest: bytes | None = None
    previous_secret_until: float | None = None
    """Until when the secret before it works too."""
    registration_digest: bytes | None = None
    """SHA-256 of the registration access token (RFC 7592)."""
    registration_rev: int = 0
    """Revision that the registration access token comes from."""


@dataclass(frozen=True, slots=True)
class InitialAccessToken:
    """A token that lets its bearer register clients (RFC 7591 section 1.2), without its value."""

    initial_access_token_id: str
    display_name: str
    uses_left: int
    rev: int
    create_time: float
    expire_time: float
    digest: bytes = field(default=b"", repr=False)
    """SHA-256 of its value."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whom a token speaks for and where it comes from: what is kept over an exchange."""

    subject: str
    actors: tuple[str, ...] = ()
    """`act.sub`, outermost first (RFC 8693 section 4.1)."""
    grant_id: str = ""
    session_id: str = ""
    root_jti: str = ""
    """`jti` of the token that an exchange began with, or id of the API key that it was got by."""
    key_ids: tuple[str, ...] = ()
    """Signing keys of the tokens that it was exchanged from."""
    auth_time: int | None = None
    acr: str = ""
    amr: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grant:
    """What a client got for a subject, and where its refresh token stands."""

    grant_id: str
    client_id: str
    origin: Origin
    """Its own, with `grant_id` the grant that it was exchanged from, if any."""
    grant_type: GrantType
    """How it was got."""
    scopes: frozenset[str]
    audiences: tuple[str, ...]
    sender: str
    """Client id; of a public client the thumbprint of its key, or nothing."""
    rev: int
    handle: bytes = field(repr=False)
    key_id: str
    """Key of the refresh token's live generation."""
    create_time: float
    idle_expire_time: float
    expire_time: float
    generation: int = 1
    use_time: float | None = None
    """When its refresh token was last used."""
    address: str = ""
    """Network address that it was got from."""


class UserState(IntEnum):
    """Whether a user is let in; numbers are the contract's."""

    ACTIVE = 1
    DISABLED = 2


@dataclass(frozen=True, slots=True)
class User:
    """A person, without its password."""

    user_id: str
    username: str
    create_time: float
    update_time: float
    display_name: str = ""
    email: str = ""
    state: UserState = UserState.ACTIVE
    password_set_time: float | None = None
    """None: it has no password."""
    version: int = 1
    """Counts changes; the etag."""


@dataclass(frozen=True, slots=True)
class Session:
    """A person's login."""

    session_id: str
    user_id: str
    rev: int
    address: str
    create_time: float
    auth_time: float
    expire_time: float
    acr: str = ""
    amr: tuple[str, ...] = ()


class PermissionRef(NamedTuple):
    """A permission, named by its resource and its name there."""

    resource_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Permission:
    """Something that may be done on a resource."""

    ref: PermissionRef
    description: str
    create_time: float


@dataclass(frozen=True, slots=True)
class Role:
    """Permissions that are held together."""

    role_id: str
    permissions: frozenset[PermissionRef]
    create_time: float
    update_time: float
    display_name: str = ""
    description: str = ""
    version: int = 1


class HolderKind(StrEnum):
    """Who can hold a role."""

    USER = "user"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class RoleAssignment:
    """That a user or a client holds a role."""

    role_id: str
    holder_kind: HolderKind
    holder_id: str
    resource_id: str
    """Only the role's permissions there; empty means all of them."""
    create_time: float = 0.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key of a client, without its value."""

    api_key_id: str
    client_id: str
    display_name: str
    scopes: frozenset[str]
    rev: int
    create_time: float
    expire_time: float | None = None
    digest: bytes = field(default=b"", repr=False)
    """SHA-256 of its value."""


class Touched(NamedTuple):
    """What an action touched: ids, empty where there is none."""

    subject: str = ""
    client_id: str = ""
    object_id: str = ""
    """Of what else, as the action says."""


class AuditOutcome(IntEnum):
    """How an action ended; numbers are the contract's."""

    SUCCEEDED = 1
    REFUSED = 2


class TokenFormat(IntEnum):
    """The form of a resource's access tokens; numbers are the contract's."""

    JWT = 1
    OPAQUE = 2
    JWE = 3


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource server, as an audience (RFC 8707)."""

    resource_id: str
    scopes: Mapping[str, str]
    """Scope -> description."""
    create_time: float
    update_time: float
    display_name: str = ""
    owner_client_id: str = ""
    token_format: TokenFormat = TokenFormat.JWT
    token_lifetime_s: int = 300
    staleness_max_s: int | None = None
    encryption_jwk: str = ""
    """Public JWK that its tokens are encrypted to (RFC 7517, JSON)."""
    freeze_permissions: bool = False
    version: int = 1


class Catalog:
    """All resources, by id, by scope and by owner; immutable."""

    def __init__(self, resources: tuple[Resource, ...]) -> None:
        self.by_id = {r.resource_id: r for r in resources}
        self.owner_of_scope = {scope: r.resource_id for r in resources for scope in r.scopes}
        owned: dict[str, set[str]] = {}
        for r in resources:
            if r.owner_client_id:
                owned.setdefault(r.owner_client_id, set()).add(r.resource_id)
        self._owned = {client: frozenset(ids) for client, ids in owned.items()}

    def owned_by(self, client_id: str) -> frozenset[str]:
        """Resources that a client owns."""
        return self._owned.get(client_id, frozenset())


class KeyState(StrEnum):
    """Where a signing key stands."""

    NEXT = "next"
    CURRENT = "current"
    RETIRED = "retired"
    TAINTED = "tainted"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A signing key as it is stored."""

    kid: str
    alg: str
    state: KeyState
    public_jwk: Mapping[str, str]
    """Empty once no token of it can be alive."""
    sealed_private: bytes = field(repr=False)
    """PKCS #8, encrypted at rest (keys.secrets); empty once it signs no more."""
    create_time: float
    ready_time: float = 0.0
    """When every validator knows it, so that it may sign."""
    activate_time: float | None = None
    retire_time: float | None = None
    taint_time: float | None = None

    @property
    def verifies(self) -> bool:
        """Whether its signatures are taken; a tainted one's never are, marker or not."""
        return self.state is not KeyState.TAINTED and bool(self.public_jwk)

    def is_over(self, before: float) -> bool:
        """Whether it verifies, but was retired before then."""
        return self.verifies and self.retire_time is not None and self.retire_time < before


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls one of authsvc's own methods, and what it may do."""

    name: str
    """Client id, or SPIFFE ID of an administrator by the settings."""
    client_id: str
    """Empty for an administrator by the settings, and for a person."""
    scopes: frozenset[str]
    audiences: frozenset[str]
    """Whose tokens it may validate; ANY_AUDIENCE means all."""
    peer: Peer
    subject: str = ""
    """Of its bearer token; empty without one."""
    session_id: str = ""
    """Of its bearer token, if any."""
