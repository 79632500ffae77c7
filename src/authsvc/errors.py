"""The one error type, and the one table of what each reason means on the wire."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from authsvc_client.core.reason import Reason

__all__ = ["RULES", "AuthError", "Code", "FieldViolation", "Reason", "Rule", "not_implemented"]


class Code(Enum):
    """Canonical gRPC status codes, by their numbers."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Rule:
    """What a reason becomes: gRPC code, OAuth error (RFC 6749 section 5.2), public text."""

    code: Code
    text: str
    oauth: str = ""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A request field that breaks its limit (`google.rpc.BadRequest.FieldViolation`)."""

    field: str
    text: str


class AuthError(Exception):
    """A refusal. `detail`, `metadata` and `violations` reach the caller; `cause` only the log."""

    def __init__(
        self,
        reason: Reason,
        detail: str = "",
        *,
        metadata: Mapping[str, str] = MappingProxyType({}),
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
        cause: str = "",
    ) -> None:
        super().__init__(reason.name)
        self.reason = reason
        self.rule = RULES[reason]
        self.metadata = metadata
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.cause = cause
        self.text = f"{self.rule.text}: {detail}" if detail else self.rule.text


def not_implemented(feature: str) -> AuthError:
    """The refusal of what this version cannot do yet: never ignored, never guessed."""
    return AuthError(Reason.NOT_IMPLEMENTED, feature, metadata={"feature": feature})


_ARG, _UNAUTH, _DENIED = Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED
_DOWN, _MISSING, _STATE = Code.UNAVAILABLE, Code.NOT_FOUND, Code.FAILED_PRECONDITION
_BUSY = Code.RESOURCE_EXHAUSTED

# Every reason but the ones that are verdicts only; a verdict that becomes an error (of a bearer
# token on authsvc's own methods) travels in the metadata of CALLER_TOKEN_INVALID.
RULES: Mapping[Reason, Rule] = {
    Reason.INTERNAL: Rule(Code.INTERNAL, "internal error", "server_error"),
    Reason.NOT_IMPLEMENTED: Rule(
        Code.UNIMPLEMENTED, "this server cannot do that yet", "invalid_request"
    ),
    Reason.FIELD_INVALID: Rule(_ARG, "a field is not valid", "invalid_request"),
    Reason.STATE_STALE: Rule(
        _DOWN, "the state could not be confirmed for too long", "temporarily_unavailable"
    ),
    Reason.STORE_UNAVAILABLE: Rule(
        _DOWN, "the database does not answer", "temporarily_unavailable"
    ),
    Reason.COMMIT_UNKNOWN: Rule(
        _DOWN, "it is not known whether the change was made", "temporarily_unavailable"
    ),
    Reason.RATE_LIMITED: Rule(_BUSY, "too many calls", "temporarily_unavailable"),
    Reason.DEADLINE_EXCEEDED: Rule(
        Code.DEADLINE_EXCEEDED, "the call took too long", "temporarily_unavailable"
    ),
    Reason.DRAINING: Rule(_DOWN, "the server is going away", "temporarily_unavailable"),
    Reason.PEER_CERTIFICATE_MISSING: Rule(
        _UNAUTH, "the connection carries no client certificate", "invalid_client"
    ),
    Reason.PEER_CERTIFICATE_INVALID: Rule(
        _UNAUTH, "the client certificate is not usable here", "invalid_client"
    ),
    Reason.PEER_CERTIFICATE_EXPIRED: Rule(
        _UNAUTH, "the client certificate is not valid now", "invalid_client"
    ),
    Reason.CALLER_UNKNOWN: Rule(_UNAUTH, "no approved client has this identity", "invalid_client"),
    Reason.CALLER_TOKEN_INVALID: Rule(_UNAUTH, "the bearer token is not good", "invalid_token"),
    Reason.CLIENT_AUTHENTICATION_FAILED: Rule(
        _UNAUTH, "client authentication failed", "invalid_client"
    ),
    Reason.AUTH_METHOD_AMBIGUOUS: Rule(
        _ARG, "more than one way to authenticate was offered", "invalid_request"
    ),
    Reason.AUTH_METHOD_NOT_REGISTERED: Rule(
        _UNAUTH, "the client did not register this way to authenticate", "invalid_client"
    ),
    Reason.CLIENT_PENDING: Rule(_DENIED, "the client waits for review", "unauthorized_client"),
    Reason.CLIENT_REJECTED: Rule(_DENIED, "the client was rejected", "unauthorized_client"),
    Reason.CLIENT_EXPIRED: Rule(
        _DENIED, "the approval of the client ran out", "unauthorized_client"
    ),
    Reason.CLIENT_SUSPENDED: Rule(_DENIED, "the client is suspended", "unauthorized_client"),
    Reason.GRANT_TYPE_NOT_ALLOWED: Rule(
        _DENIED, "the client is not registered for this grant", "unauthorized_client"
    ),
    Reason.SCOPE_UNKNOWN: Rule(_ARG, "no resource defines the scope", "invalid_scope"),
    Reason.SCOPE_NOT_ALLOWED: Rule(
        _ARG, "the client is not registered for the scope", "invalid_scope"
    ),
    Reason.INVALID_TARGET: Rule(_ARG, "the resource cannot be asked for", "invalid_target"),
    Reason.INVALID_GRANT: Rule(_UNAUTH, "the grant is not good", "invalid_grant"),
    Reason.REFRESH_TOKEN_REUSED: Rule(_UNAUTH, "the grant is not good", "invalid_grant"),
    Reason.INVALID_DPOP_PROOF: Rule(_UNAUTH, "the DPoP proof is not good", "invalid_dpop_proof"),
    Reason.USE_DPOP_NONCE: Rule(_UNAUTH, "repeat with the nonce", "use_dpop_nonce"),
    Reason.AUTHORIZATION_PENDING: Rule(
        _STATE, "the person has not answered yet", "authorization_pending"
    ),
    Reason.SLOW_DOWN: Rule(_BUSY, "ask less often", "slow_down"),
    Reason.ACCESS_DENIED: Rule(_DENIED, "the person said no", "access_denied"),
    Reason.GRANT_MISSING: Rule(_ARG, "the request names no grant", "invalid_request"),
    Reason.MINT_ABANDONED: Rule(
        _DOWN, "the token could not be made in time", "temporarily_unavailable"
    ),
    Reason.INSUFFICIENT_SCOPE: Rule(_DENIED, "a scope is missing", "insufficient_scope"),
    Reason.INSUFFICIENT_PERMISSIONS: Rule(_DENIED, "a permission is missing", "access_denied"),
    Reason.INSUFFICIENT_USER_AUTHENTICATION: Rule(
        _DENIED, "a stronger authentication is needed", "insufficient_user_authentication"
    ),
    Reason.TOKEN_MISSING: Rule(_UNAUTH, "one bearer token is needed", "invalid_request"),
    Reason.ALREADY_EXISTS: Rule(Code.ALREADY_EXISTS, "the name is taken", "invalid_request"),
    Reason.ETAG_MISMATCH: Rule(Code.ABORTED, "the object changed since it was read"),
    Reason.PAGE_TOKEN_INVALID: Rule(_ARG, "the page token is not good"),
    Reason.REQUEST_ID_REUSED: Rule(
        Code.ALREADY_EXISTS, "the request id was used for another request"
    ),
    Reason.CLIENT_NOT_FOUND: Rule(_MISSING, "no such client"),
    Reason.CLIENT_STATE_CONFLICT: Rule(_STATE, "the state of the client does not allow it"),
    Reason.INVALID_CLIENT_METADATA: Rule(
        _ARG, "the metadata is not acceptable", "invalid_client_metadata"
    ),
    Reason.INVALID_REDIRECT_URI: Rule(
        _ARG, "a redirect URI is not acceptable", "invalid_redirect_uri"
    ),
    Reason.REGISTRATION_NOT_ALLOWED: Rule(
        _DENIED, "the caller may not register this client", "access_denied"
    ),
    Reason.REGISTRATION_TOKEN_INVALID: Rule(
        _UNAUTH, "the registration token is not good", "invalid_token"
    ),
    Reason.RESOURCE_NOT_FOUND: Rule(_MISSING, "no such resource"),
    Reason.API_KEY_NOT_FOUND: Rule(_MISSING, "no such API key"),
    Reason.INITIAL_ACCESS_TOKEN_NOT_FOUND: Rule(_MISSING, "no such initial access token"),
    Reason.USER_NOT_FOUND: Rule(_MISSING, "no such user"),
    Reason.USER_STATE_CONFLICT: Rule(_STATE, "the state of the user does not allow it"),
    Reason.ROLE_NOT_FOUND: Rule(_MISSING, "no such role"),
    Reason.PERMISSION_NOT_FOUND: Rule(_MISSING, "no such permission"),
    Reason.SESSION_NOT_FOUND: Rule(_MISSING, "no such session"),
    Reason.GRANT_NOT_FOUND: Rule(_MISSING, "no such grant"),
    Reason.SIGNING_KEY_NOT_FOUND: Rule(_MISSING, "no such signing key"),
    Reason.SIGNING_KEY_STATE_CONFLICT: Rule(
        _STATE, "the state of the signing key does not allow it"
    ),
    Reason.PASSWORD_NOT_ACCEPTED: Rule(_ARG, "the password does not meet the policy"),
    Reason.SUBJECT_NOT_FOUND: Rule(_MISSING, "no user and no client has this id"),
    Reason.SIGNING_KEY_NOT_READY: Rule(_STATE, "not every validator knows the signing key yet"),
    Reason.TOKEN_NOT_OWNED: Rule(
        _DENIED, "the token was issued to another client", "unauthorized_client"
    ),
    Reason.REVISION_UNKNOWN: Rule(_STATE, "the revision does not exist yet"),
    Reason.REVISION_COMPACTED: Rule(Code.OUT_OF_RANGE, "the revision is compacted"),
    Reason.WATCHER_TOO_SLOW: Rule(_BUSY, "the watcher did not read fast enough"),
}
