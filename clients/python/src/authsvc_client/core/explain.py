"""Why a token holds or not: the checks of the judge, made one by one and put into words."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, TypeVar

from .claims import Claims, audiences_of, parse_claims
from .judge import (
    ANY_AUDIENCE,
    Judge,
    Question,
    Verified,
    require_audience,
    require_entitled,
    require_members,
    require_proof,
    require_type,
)
from .jws import Refused, Verifier, decode, json_object, split
from .markers import LEEWAY_S, MarkerKind, marker_key
from .reason import Reason
from .state import StateStale
from .step_up import NO_STEP_UP

T = TypeVar("T")

CHECKS = (
    "format",
    "entitled",
    "type",
    "header",
    "issuer",
    "key",
    "signature",
    "claims",
    "staleness",
    "expiry",
    "not_before",
    "token_mark",
    "session_mark",
    "grant_mark",
    "key_mark",
    "cutoff",
    "audience",
    "proof",
    "scopes",
    "authentication",
)
"""In the order of the judge: the first one that fails is its reason."""
UNREADABLE = Claims("", "", (), 0, 0, "", "", frozenset(), 0)
"""What cannot be read at all claims nothing."""
_MARKED = {
    "token_mark": Reason.TOKEN_REVOKED,
    "grant_mark": Reason.GRANT_REVOKED,
    "session_mark": Reason.SESSION_ENDED,
    "key_mark": Reason.TOKEN_KEY_TAINTED,
}
_CHARS_MAX = 128
_FAR = 2**62
_TIME_MAX = 253402300799  # the end of the year 9999


class Outcome(IntEnum):
    """How a check ended; numbers are the contract's."""

    PASSED = 1
    FAILED = 2
    NOT_REACHED = 3


class Check(NamedTuple):
    """One check of a token."""

    name: str
    outcome: Outcome
    reason: Reason = Reason.UNSPECIFIED
    detail: str = ""
    """What was compared with what, for people: never a secret, and never the token."""


class Checks:
    """The checks that were made so far."""

    def __init__(self) -> None:
        self._made: dict[str, Check] = {}

    def make(self, name: str, check: Callable[[], T], detail: str = "") -> T | None:
        """Makes a check, and answers what it answers; None where it fails."""
        try:
            found = check()
        except Refused as refusal:
            self.say(name, detail, refusal.reason)
            return None
        self.say(name, detail)
        return found

    def say(self, name: str, detail: str, reason: Reason = Reason.UNSPECIFIED) -> None:
        """How a check ended: it failed where there is a reason."""
        outcome = Outcome.FAILED if reason else Outcome.PASSED
        self._made[name] = Check(name, outcome, reason, detail)

    def has_failed(self, *names: str) -> bool:
        """Whether one of these failed; of any, without a name."""
        return any(
            check.outcome is Outcome.FAILED
            for check in self._made.values()
            if check.name in names or not names
        )

    def has_passed(self, name: str) -> bool:
        """Whether this one was made, and holds."""
        return name in self._made and not self.has_failed(name)

    def all(self, names: Iterable[str]) -> list[Check]:
        """These, in this order."""
        missing = Outcome.NOT_REACHED
        return [self._made.get(name, Check(name, missing)) for name in names]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a token claims, and which checks it passes."""

    claims: Claims
    kid: str
    """Of the key that it says it was signed by; empty where there is no signature."""
    checks: Checks


def explain(
    judge: Judge, token: str, question: Question, boot: float, known: Verified | None = None
) -> Explanation:
    """Makes every check that can be made, also those after one that fails.

    As `judge(token, question, boot, known)`; raises StateStale where that has no state to go by.
    """
    judge.state.require_fresh(boot)
    checks = Checks()
    verified = known
    if known is not None:
        claims, kid = known.claims, known.kid
        checks.make(
            "entitled",
            lambda: require_entitled(question, claims.audiences),
            _entitled(question, claims.audiences),
        )
        for name in ("format", "type", "header", "issuer", "key", "signature", "claims"):
            checks.say(name, "found by its SHA-256")
    else:
        claims, kid, verified = _read(judge, token, question, checks)
    if verified is not None:
        _judge(judge, verified, question, boot, checks)
    return Explanation(claims, kid, checks)


def _read(
    judge: Judge, token: str, question: Question, checks: Checks
) -> tuple[Claims, str, Verified | None]:
    """A JWT: whose it is, and what it says."""
    parts = _parts(token)
    payload = parts.payload if parts is not None else {}
    claims = _claims(payload)
    audiences = checks.make(
        "format",
        lambda: _require_format(token),
        "a compact JWS whose payload has an audience"
        if parts is not None and "aud" in payload
        else f"no compact JWS with a payload that has an audience; {len(token)} characters",
    )
    first = Checks()
    entitled = _entitled(question, audiences or ())
    first.make("entitled", lambda: require_entitled(question, question.audiences), entitled)
    if audiences is not None or first.has_failed():
        wanted = audiences or question.audiences
        checks.make("entitled", lambda: require_entitled(question, wanted), entitled)
    if parts is None:
        return claims, "", None
    verifier = _key(judge, parts, checks)
    kid = _text(parts.header.get("kid"))
    if verifier is None:
        return claims, kid, None
    checks.make(
        "signature",
        lambda: verifier.verify(parts.signed, decode(parts.signature)),
        f"by the key {verifier.kid}",
    )
    if not checks.has_passed("signature"):
        return claims, kid, None
    parsed = checks.make("claims", lambda: parse_claims(payload), "typed as RFC 9068 has them")
    return claims, kid, Verified(verifier, parsed) if parsed is not None else None


class _Parts(NamedTuple):
    """A JWT taken apart, without trust."""

    header: Mapping[str, Any]
    payload: Mapping[str, Any]
    signature: str
    signed: bytes
    has_header: bool


def _parts(token: str) -> _Parts | None:
    try:
        header_b64, payload_b64, signature = split(token)
        payload = json_object(decode(payload_b64))
    except Refused:
        return None
    signed = f"{header_b64}.{payload_b64}".encode()
    try:
        return _Parts(json_object(decode(header_b64)), payload, signature, signed, True)
    except Refused:
        return _Parts({}, payload, signature, signed, False)


def _require_format(token: str) -> tuple[str, ...]:
    _, payload_b64, _ = split(token)
    return audiences_of(json_object(decode(payload_b64)))


def _key(judge: Judge, parts: _Parts, checks: Checks) -> Verifier | None:
    """The key that a JWT names, where it names one as it should."""
    header, payload = parts.header, parts.payload
    if parts.has_header:
        checks.make("type", lambda: require_type(header), f"typ {_show(header.get('typ'))}")
        members = " ".join(sorted(map(_show, header)))
        checks.make("header", lambda: require_members(header), f"members {members}")
    else:
        checks.say("header", "no JSON object", Reason.TOKEN_MALFORMED)
    checks.make(
        "issuer",
        lambda: judge.require_issuer(payload),
        f"iss {_show(payload.get('iss'))}, this is {judge.issuer}",
    )
    if not checks.has_passed("header"):
        return None
    alg, kid = _show(header["alg"]), _show(header["kid"])
    return checks.make("key", lambda: judge.find_key(header), f"kid {kid}, alg {alg}")


def _judge(
    judge: Judge, verified: Verified, question: Question, boot: float, checks: Checks
) -> None:
    state, claims = judge.state, verified.claims
    now = state.now(boot)
    stale = Reason.UNSPECIFIED
    try:
        state.require_fresh(boot, claims.audiences)
    except StateStale:
        stale = Reason.STATE_STALE
    checks.say("staleness", f"the state was confirmed {state.age(boot):.1f} s ago", stale)
    for name, detail, alone in _alive(judge, verified, now):
        checks.make(name, partial(judge.require_alive, alone, now), detail)
    checks.make(
        "audience",
        lambda: require_audience(question, claims),
        f"expected {_show(question.audience) or 'any'}, is for {listed(claims.audiences)}",
    )
    checks.make("proof", lambda: require_proof(question, claims), _proof(question, claims))
    missing = question.scopes - claims.scopes
    checks.say(
        "scopes",
        f"required {listed(question.scopes)}, has {listed(claims.scopes)}",
        Reason.INSUFFICIENT_SCOPE if missing else Reason.UNSPECIFIED,
    )
    step_up = question.step_up
    is_met = step_up is NO_STEP_UP or step_up.is_met(claims.acr, claims.auth_time, now)
    checks.say(
        "authentication",
        _authentication(question, claims, now),
        Reason.UNSPECIFIED if is_met else Reason.INSUFFICIENT_USER_AUTHENTICATION,
    )


def _alive(judge: Judge, verified: Verified, now: float) -> Iterator[tuple[str, str, Verified]]:
    """What `require_alive` asks, one thing at a time: a token that only that can kill."""
    state, claims = judge.state, verified.claims
    spared = claims._replace(expires=_FAR, issued=0, not_before=0, revision=_FAR)
    begins = max(claims.issued, claims.not_before)
    yield (
        "expiry",
        f"exp {moment(claims.expires)} is {_distance(claims.expires - now)}",
        _only(verified, spared._replace(expires=claims.expires)),
    )
    yield (
        "not_before",
        f"iat and nbf {moment(begins)} is {_distance(begins - now)}",
        _only(verified, spared._replace(issued=begins)),
    )
    for name, reason in _MARKED.items():
        able = zip(verified.marks, verified.reasons, strict=True)
        marks = tuple(key for key, means in able if means is reason)
        ids = " ".join(_show(id_) for kind, id_ in _marked(verified) if kind == name)
        if ids:
            dead = any(map(state.is_dead, marks))
            detail = f"{ids}: {'marked dead' if dead else 'not marked'}"
        else:
            detail = "has none"
        yield name, detail, _only(verified, spared, marks, (reason,) * len(marks))
    yield (
        "cutoff",
        f"rev {claims.revision}, the highest cutoff is {state.cutoff(verified.cutoffs) or 'none'}",
        _only(verified, spared._replace(revision=claims.revision)),
    )


def _only(
    verified: Verified,
    claims: Claims,
    marks: tuple[bytes, ...] = (),
    reasons: tuple[Reason, ...] = (),
) -> Verified:
    """The same token, but for these claims and marks; the same cutoffs apply to it."""
    alone = Verified(verified.verifier, claims, kid=verified.kid)
    alone.marks, alone.reasons, alone.cutoffs = marks, reasons, verified.cutoffs
    return alone


def _marked(verified: Verified) -> Iterator[tuple[str, str]]:
    claims = verified.claims
    for kind, id_ in (
        ("token_mark", claims.jti),
        ("token_mark", claims.root_jti),
        ("grant_mark", claims.grant_id),
        ("session_mark", claims.session_id),
        *(("key_mark", kid) for kid in (verified.kid, *claims.key_ids)),
    ):
        if id_:
            yield kind, id_


def killers(claims: Claims, kid: str) -> dict[bytes, tuple[MarkerKind, tuple[str, ...]]]:
    """The markers that can kill what claims this, signed by this key, by their keys."""
    verified = Verified(None, claims, kid=kid)
    able = {*verified.marks, *verified.cutoffs}
    able.add(marker_key(MarkerKind.CUTOFF_EVERYTHING))
    found = {marker_key(kind, *ids): (kind, ids) for kind, ids in _candidates(claims, kid)}
    return {key: found[key] for key in found.keys() & able}


def _candidates(claims: Claims, kid: str) -> Iterator[tuple[MarkerKind, tuple[str, ...]]]:
    yield MarkerKind.CUTOFF_EVERYTHING, ()
    parties = (claims.client_id, claims.subject, *claims.actors)
    for kind, ids in {
        MarkerKind.TOKEN_DEAD: (claims.jti, claims.root_jti),
        MarkerKind.GRANT_DEAD: (claims.grant_id,),
        MarkerKind.SESSION_DEAD: (claims.session_id,),
        MarkerKind.KEY_TAINTED: (kid, *claims.key_ids),
        MarkerKind.CUTOFF_CLIENT: parties,
        MarkerKind.CUTOFF_SUBJECT: parties,
        MarkerKind.CUTOFF_RESOURCE: claims.audiences,
    }.items():
        yield from ((kind, (id_,)) for id_ in ids if id_)
    for subject in parties:
        yield from ((MarkerKind.CUTOFF_SUBJECT_CLIENT, (subject, client)) for client in parties)


def _claims(payload: Mapping[str, Any]) -> Claims:
    """As `parse_claims`; of what that refuses, each claim that is of its type."""
    try:
        return parse_claims(payload)
    except Refused:
        pass
    found = UNREADABLE
    names = {
        "iss": "issuer",
        "sub": "subject",
        "jti": "jti",
        "client_id": "client_id",
        "gid": "grant_id",
        "sid": "session_id",
        "rti": "root_jti",
        "acr": "acr",
    }
    numbers = {"exp": "expires", "iat": "issued", "rev": "revision", "auth_time": "auth_time"}
    changes: dict[str, Any] = {field: _text(payload.get(name)) for name, field in names.items()}
    for name, field in numbers.items():
        value = payload.get(name)
        if type(value) is int and 0 <= value < 2**63:
            changes[field] = value
    with suppress(Refused):
        changes["audiences"] = audiences_of(payload)
    changes["scopes"] = frozenset(filter(None, _text(payload.get("scope")).split(" ")))
    return found._replace(**changes)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def moment(seconds: float) -> str:
    """A time for people."""
    if not 0 <= seconds <= _TIME_MAX:
        return f"{seconds:.0f}"
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def _distance(seconds: float) -> str:
    side = "ahead" if seconds > 0 else "ago"
    return f"{abs(seconds):.0f} s {side}, {LEEWAY_S} s are tolerated"


def _entitled(question: Question, audiences: Iterable[str]) -> str:
    allowed = question.audiences
    may = "all" if ANY_AUDIENCE in allowed else listed(allowed)
    of = _show(question.audience) or listed(audiences)
    return f"may validate {may}; asked of {of}"


def _proof(question: Question, claims: Claims) -> str:
    if claims.jwk_thumbprint:
        return "bound to a DPoP key, which cannot be proved here yet"
    bound, shown = claims.certificate_thumbprint, question.thumbprint
    if not bound:
        return f"not bound, {'which was asked for' if question.require_bound else 'need not be'}"
    return f"bound to certificate {_show(bound)}, the presenter showed {_show(shown) or 'none'}"


def _authentication(question: Question, claims: Claims, now: float) -> str:
    acr_values, max_age_s = question.step_up
    wanted = [f"acr {listed(acr_values)}"] if acr_values else []
    wanted += [f"at most {max_age_s} s ago"] if max_age_s is not None else []
    has = [f"acr {_show(claims.acr)}"] if claims.acr else []
    has += [f"{now - claims.auth_time:.0f} s ago"] if claims.auth_time is not None else []
    return f"required {' '.join(wanted) or 'none'}, has {' '.join(has) or 'none'}"


def listed(values: Iterable[str]) -> str:
    """In alphabetical order, for people."""
    return clipped(" ".join(sorted(map(_show, values)))) or "none"


def _show(value: Any) -> str:
    """What a stranger may have written, on one line."""
    text = value if isinstance(value, str) else repr(value)
    return clipped(
        "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    )


def clipped(text: str) -> str:
    """Its beginning, where it is long."""
    return text if len(text) <= _CHARS_MAX else f"{text[:_CHARS_MAX]}…"
