"""Python client of authsvc: tokens of its own for a service, and a check of its callers' tokens."""

from .admission import Verdict
from .channel import Certificates, ReloadingChannel, channel, sync_channel
from .client import AuthsvcClient
from .client_interceptors import bearer
from .core.claims import Claims
from .core.reason import Reason
from .errors import (
    AuthsvcError,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    NotImplementedByServer,
    PermissionDenied,
    ResourceExhausted,
    TokenUnavailable,
    Unauthenticated,
    Unavailable,
    Violation,
)
from .identity import Caller, caller
from .interceptors import RequireInterceptor, Validator
from .messages import KeySet, RemoteVerdict
from .request_id import request_id
from .rules import RuleRefused
from .staleness import CLOSED, REMOTE, WhenStale, open_for
from .sync_client import SyncAuthsvcClient
from .sync_client_interceptors import sync_bearer
from .sync_interceptors import SyncRequireInterceptor, SyncValidator
from .sync_token_source import SyncTokenSource
from .sync_validator import SyncLocalValidator
from .token_source import Pace, Step, Token, TokenPlan, TokenSource
from .validator import Counts, LocalValidator

__all__ = [
    "CLOSED",
    "REMOTE",
    "AuthsvcClient",
    "AuthsvcError",
    "Caller",
    "Certificates",
    "Claims",
    "Conflict",
    "Counts",
    "DeadlineExceeded",
    "Internal",
    "InvalidRequest",
    "KeySet",
    "LocalValidator",
    "NotFound",
    "NotImplementedByServer",
    "Pace",
    "PermissionDenied",
    "Reason",
    "ReloadingChannel",
    "RemoteVerdict",
    "RequireInterceptor",
    "ResourceExhausted",
    "RuleRefused",
    "Step",
    "SyncAuthsvcClient",
    "SyncLocalValidator",
    "SyncRequireInterceptor",
    "SyncTokenSource",
    "SyncValidator",
    "Token",
    "TokenPlan",
    "TokenSource",
    "TokenUnavailable",
    "Unauthenticated",
    "Unavailable",
    "Validator",
    "Verdict",
    "Violation",
    "WhenStale",
    "bearer",
    "caller",
    "channel",
    "open_for",
    "request_id",
    "sync_bearer",
    "sync_channel",
]
