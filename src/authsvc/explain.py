"""ExplainToken: what a token is, which check it passes or fails, and what killed it."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

from authsvc.clock import Clock
from authsvc.errors import AuthError, Reason
from authsvc.identify import Identify
from authsvc.keys.jwe import is_jwe
from authsvc.keys.refresh import RefreshKeys, has_form
from authsvc.keys.secrets import (
    ACCESS_TOKEN_PREFIX,
    API_KEY_PREFIX,
    CLIENT_SECRET_PREFIX,
    INITIAL_ACCESS_TOKEN_PREFIX,
    REFRESH_TOKEN_PREFIX,
    REGISTRATION_TOKEN_PREFIX,
    RESET_CODE_PREFIX,
    digest,
    is_secret,
)
from authsvc.model import ANY_AUDIENCE, AuthMethod, Catalog, Client, Grant, TokenFormat
from authsvc.oauth.policy import require_let_in, validated_by
from authsvc.store.port import (
    ApiKeyStore,
    AuditStore,
    Change,
    GrantStore,
    Standing,
    TokenStore,
    Told,
    change,
)
from authsvc_client.core.claims import Claims, parse_claims
from authsvc_client.core.explain import (
    CHECKS,
    UNREADABLE,
    Check,
    Checks,
    explain,
    killers,
    listed,
    moment,
)
from authsvc_client.core.judge import Judge, Question, Verdict, Verified
from authsvc_client.core.markers import DEAD_KINDS, MarkerKind
from authsvc_client.core.state import StateStale

ACCESS_CHECKS = (*CHECKS, "permissions")
REFRESH_CHECKS = (
    "format",
    "signature",
    "grant",
    "entitled",
    "expiry",
    "grant_mark",
    "cutoff",
    "generation",
)
"""Of a refresh token, in the order in which its use depends on them."""
_OURS = ("format", "type", "header", "issuer")
"""Checks that what authsvc made passes."""


_FOUND = (ACCESS_TOKEN_PREFIX, API_KEY_PREFIX)
_NOUNS = {
    ACCESS_TOKEN_PREFIX: "an opaque access token",
    API_KEY_PREFIX: "an API key",
    CLIENT_SECRET_PREFIX: "a client secret",
    INITIAL_ACCESS_TOKEN_PREFIX: "an initial access token",
    REGISTRATION_TOKEN_PREFIX: "a registration access token",
    RESET_CODE_PREFIX: "a password reset code",
}


class TokenKind(IntEnum):
    """Kinds of token; numbers are the contract's."""

    NONE = 0
    ACCESS_TOKEN = 1
    REFRESH_TOKEN = 2
    API_KEY = 3


@dataclass(frozen=True, slots=True)
class Explained:
    """Everything that there is to say of a token."""

    kind: TokenKind
    format: TokenFormat | None
    claims: Claims
    active: bool
    reason: Reason
    """As the caller would be told."""
    checks: tuple[Check, ...]
    markers: tuple[Told, ...]
    revision: int
    check_time: float


class Permitted(Protocol):
    """Live permissions."""

    @property
    def names(self) -> frozenset[str]:
        """All that the subject holds on the audience."""


class Answer(Protocol):
    """What ValidateToken answers."""

    @property
    def verdict(self) -> Verdict:
        """By the state at that moment."""

    @property
    def permissions(self) -> Permitted | None:
        """By which it was made, where they were asked for."""


class Validate(Protocol):
    """ValidateToken."""

    async def catch_up(self, at_least: int) -> None:
        """Applies what was written before. Raises AuthError."""

    async def __call__(self, token: str, question: Question) -> Answer:
        """The answer to a client. Raises StateStale and AuthError."""


class ExplainToken:
    """Explains access tokens of every form, refresh tokens and API keys; changes nothing."""

    def __init__(
        self,
        validate: Validate,
        identify: Identify,
        judge: Judge,
        refresh_keys: RefreshKeys,
        grants: GrantStore,
        tokens: TokenStore,
        api_keys: ApiKeyStore,
        audit: AuditStore,
        client: Callable[[str], Awaitable[Client | None]],
        catalog: Callable[[], Awaitable[Catalog]],
        clock: Clock,
    ) -> None:
        self._validate = validate
        self._identify = identify
        self._judge = judge
        self._refresh_keys = refresh_keys
        self._grants = grants
        self._tokens = tokens
        self._api_keys = api_keys
        self._audit = audit
        self._client = client
        self._catalog = catalog
        self._clock = clock

    async def __call__(
        self,
        token: str,
        question: Question,
        caller_client_id: str,
        *,
        at_least: int = 0,
        strong: bool = False,
    ) -> Explained:
        """As ValidateToken judges the question of this client, or of one that may know all.

        Raises AuthError CLIENT_NOT_FOUND, and as ValidateToken.
        """
        if strong or at_least > self._judge.state.revision:
            await self._validate.catch_up(at_least)
        question = replace(question, audiences=await self._audiences(caller_client_id))
        answer = await self._answer(token, question)
        if token.startswith(REFRESH_TOKEN_PREFIX):
            return await self._refresh_token(token, caller_client_id)
        return await self._access_token(token, question, answer)

    async def _audiences(self, client_id: str) -> frozenset[str]:
        if not client_id:
            return frozenset({ANY_AUDIENCE})
        client = await self._client(client_id)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        return validated_by(client, await self._catalog())

    async def _answer(self, token: str, question: Question) -> Answer | None:
        """What ValidateToken says; None where the state is too old for this audience alone."""
        try:
            return await self._validate(token, question)
        except StateStale:
            self._judge.state.require_fresh(self._clock.boot())
            return None

    async def _access_token(
        self, token: str, question: Question, answer: Answer | None
    ) -> Explained:
        known = await self._identify.stored(token)
        boot = self._clock.boot()
        state = self._judge.state
        # Nothing is awaited from here to the verdict: all of it is by one state.
        explanation = explain(self._judge, token, question, boot, known)
        active, reason = self._verdict(token, question, boot, known)
        revision, now = state.revision, state.now(boot)
        checks, claims = explanation.checks, explanation.claims
        if active and answer is not None and not answer.verdict.active:
            active, reason = False, answer.verdict.reason
        _permissions(checks, question, answer, is_active=active)
        kind, form = _kind(token, checks)
        cause = ""
        if known is None and checks.has_failed("format"):
            checks.say("format", _missing(token), Reason.TOKEN_MALFORMED)
        if known is not None:
            claims, cause = await self._as_stored(token, claims, now)
        told: tuple[Told, ...] = ()
        if kind is not TokenKind.NONE and not checks.has_failed("signature"):
            made = [Change(*one) for one in killers(claims, explanation.kid).values()]
            told = await self._told(made, claims.revision, revision)
        if checks.has_failed("cutoff") and known is not None:
            highest = max((t.revision for t in told), default=0)
            cause = cause or f"rev {claims.revision}, the highest cutoff is {highest}"
            checks.say("cutoff", cause, Reason.TOKEN_CUT_OFF)
        return Explained(
            kind,
            form,
            claims,
            active,
            reason,
            tuple(checks.all(ACCESS_CHECKS)),
            told,
            revision,
            now,
        )

    def _verdict(
        self, token: str, question: Question, boot: float, known: Verified | None
    ) -> tuple[bool, Reason]:
        try:
            verdict = self._judge(token, question, boot, known)
        except StateStale:
            return False, Reason.STATE_STALE
        return verdict.active, verdict.reason if verdict.visible else Reason.UNSPECIFIED

    async def _as_stored(self, token: str, claims: Claims, now: float) -> tuple[Claims, str]:
        """Its claims with the revision that it carries, and why it counts as cut off, if it is an
        API key: one whose client may not use it is judged as if it carried none.
        """
        if not token.startswith(API_KEY_PREFIX):
            row = await self._tokens.find(digest(token))
            return (parse_claims(row.claims) if row is not None else claims), ""
        key = await self._api_keys.find(digest(token))
        client = await self._client(key.client_id) if key is not None else None
        if key is None or client is None:
            return claims, ""
        return claims._replace(revision=key.rev), _not_let_in(client, claims, now)

    async def _told(self, changes: Iterable[Change], rev: int, revision: int) -> tuple[Told, ...]:
        """Those of the markers that kill what carries this `rev`, up to a revision."""
        return tuple(
            told
            for told in await self._audit.told(list(changes))
            if told.revision <= revision and (told.change.kind in DEAD_KINDS or told.revision > rev)
        )

    async def _refresh_token(self, token: str, caller_client_id: str) -> Explained:
        """By the database, as its use is."""
        state = self._judge.state
        checks = Checks()
        presented = self._refresh_keys.read(token)
        is_formed = has_form(token)
        checks.say("format", f"{len(token)} characters", _unless(is_formed, Reason.INVALID_GRANT))
        if is_formed:
            detail = "by a configured key" if presented else "by no configured key"
            checks.say("signature", detail, _unless(presented is not None, Reason.INVALID_GRANT))
        standing = None
        if presented is not None:
            standing = await self._grants.standing(
                presented.handle, presented.generation, presented.key_id
            )
            detail = standing.grant.grant_id if standing else "none: it ended long ago"
            checks.say("grant", detail, _unless(standing is not None, Reason.INVALID_GRANT))
        now = state.now(self._clock.boot())
        claims, told = UNREADABLE, tuple[Told, ...]()
        if presented is not None and standing is not None:
            grant = standing.grant
            _grant_checks(checks, standing, caller_client_id, presented.generation, now)
            claims = self._grant_claims(grant)
            killing = [Change(*one) for one in killers(claims, "").values()]
            if grant.origin.grant_id:
                killing.append(change(MarkerKind.GRANT_DEAD, grant.origin.grant_id))
            told = await self._told(killing, grant.rev, 2**63)
        made = checks.all(REFRESH_CHECKS)
        reason = next((check.reason for check in made if check.reason), Reason.UNSPECIFIED)
        return Explained(
            TokenKind.REFRESH_TOKEN,
            None,
            claims,
            not reason,
            reason,
            tuple(made),
            told,
            state.revision,
            now,
        )

    def _grant_claims(self, grant: Grant) -> Claims:
        """What a grant says as a token."""
        origin = grant.origin
        return UNREADABLE._replace(
            issuer=self._judge.issuer,
            subject=origin.subject,
            audiences=grant.audiences,
            expires=int(grant.expire_time),
            issued=int(grant.create_time),
            client_id=grant.client_id,
            scopes=grant.scopes,
            revision=grant.rev,
            grant_id=grant.grant_id,
            session_id=origin.session_id,
            root_jti=origin.root_jti,
            auth_time=origin.auth_time,
            acr=origin.acr,
            amr=origin.amr,
            actors=origin.actors,
            key_ids=origin.key_ids,
        )


def _unless(holds: bool, reason: Reason) -> Reason:
    return Reason.UNSPECIFIED if holds else reason


def _permissions(
    checks: Checks, question: Question, answer: Answer | None, *, is_active: bool
) -> None:
    wanted = question.permissions
    if not wanted:
        if checks.has_passed("claims"):
            checks.say("permissions", "required none")
        return
    reason = answer.verdict.reason if answer is not None else Reason.UNSPECIFIED
    held = answer.permissions if answer is not None else None
    if held is not None and (is_active or reason is Reason.INSUFFICIENT_PERMISSIONS):
        detail = f"required {listed(wanted)}, holds {listed(held.names)}"
        checks.say("permissions", detail, reason)


def _kind(token: str, checks: Checks) -> tuple[TokenKind, TokenFormat | None]:
    """What a token is, by its form, and where it is a JWT by what it says of itself."""
    if token.startswith(API_KEY_PREFIX):
        return TokenKind.API_KEY, None
    if token.startswith(ACCESS_TOKEN_PREFIX):
        return TokenKind.ACCESS_TOKEN, TokenFormat.OPAQUE
    if checks.has_failed(*_OURS):
        return TokenKind.NONE, None
    return TokenKind.ACCESS_TOKEN, TokenFormat.JWE if is_jwe(token) else TokenFormat.JWT


def _missing(token: str) -> str:
    """What a token that is neither stored nor a JWT may have been."""
    for prefix, noun in _NOUNS.items():
        if token.startswith(prefix):
            if not is_secret(token, prefix):
                return f"begins as {noun}, but not all of it is there"
            if prefix not in _FOUND:
                return f"{noun}, which is no token"
            return f"{noun} that is not stored: it ended, was deleted, or never was"
    if is_jwe(token):
        return "an encrypted token that is not stored: it ended, or was never made here"
    return f"no compact JWS with a payload that has an audience; {len(token)} characters"


def _not_let_in(client: Client, claims: Claims, now: float) -> str:
    """Why a client may not use its API key, whatever was cut off; empty where it may."""
    try:
        require_let_in(client, now)
    except AuthError as error:
        return f"its client: {error.reason.name}"
    if AuthMethod.API_KEY not in client.metadata.auth_methods:
        return "its client did not register API keys"
    return "" if claims.audiences else "no scope of it is left"


def _grant_checks(
    checks: Checks, standing: Standing, caller_client_id: str, generation: int, now: float
) -> None:
    grant, bad = standing.grant, Reason.INVALID_GRANT
    is_its = caller_client_id in ("", grant.client_id)
    checks.say("entitled", f"is of the client {grant.client_id}", _unless(is_its, bad))
    checks.say(
        "expiry",
        f"ends {moment(grant.expire_time)}, unused {moment(grant.idle_expire_time)};"
        f" now {moment(now)}",
        _unless(not (standing.is_expired or standing.is_idle), bad),
    )
    ended = f"ended {moment(standing.end_time)}" if standing.end_time is not None else "alive"
    checks.say("grant_mark", f"the grant {ended}", _unless(not standing.is_ended, bad))
    checks.say(
        "cutoff",
        f"rev {grant.rev} is {'below' if standing.is_cut_off else 'not below'} a cutoff",
        _unless(not standing.is_cut_off, bad),
    )
    which = {0: "the live one", 1: "the one before the live one"}.get(
        grant.generation - generation, "neither the live one nor the one before it"
    )
    checks.say(
        "generation",
        f"{generation}, {which}, which is {grant.generation}",
        _unless(standing.is_good, Reason.REFRESH_TOKEN_REUSED),
    )
