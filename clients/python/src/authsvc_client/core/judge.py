"""The judgement of an access token: one function for server, agent and local validation."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .cache import BytesCache
from .claims import Claims, audiences_of, parse_claims
from .jws import Refused, Verifier, decode, json_object, split
from .markers import LEEWAY_S, MarkerKind, marker_key
from .reason import Reason
from .state import State
from .step_up import NO_STEP_UP, StepUp

ANY_AUDIENCE = "*"
REUSABLE_S = 1.0
TOKEN_TYPES = ("at+jwt", "application/at+jwt")
_ACTIVE = Reason.UNSPECIFIED
_ENTRY_BYTES = 4096  # claims, keys and dictionary slots of a cached token, measured generously


@dataclass(frozen=True, slots=True)
class Question:
    """What a token must hold up to. Compared with the verdict it is asked for once per call."""

    audiences: frozenset[str]
    """Audiences that the asker may validate; ANY_AUDIENCE means all."""
    audience: str = ""
    """The expected one; empty means any of `audiences`."""
    scopes: frozenset[str] = frozenset()
    thumbprint: str = ""
    """`x5t#S256` of the presenter's certificate, if one was shown."""
    require_bound: bool = False
    step_up: StepUp = NO_STEP_UP
    """Which authentication of its person is asked for."""
    permissions: frozenset[str] = frozenset()
    """Live permissions of its subject on the audience; the issuer alone judges them."""
    open_s: float = 0.0
    """Age of the state, in seconds, that will do whatever the bounds say."""


@dataclass(slots=True)
class Verdict:
    """The answer. `visible` False: the asker learns nothing but that it is not active."""

    reason: Reason
    """UNSPECIFIED when active."""
    revision: int
    check_time: float
    reusable_until: float
    verified: "Verified | None" = None
    missing_scopes: frozenset[str] = frozenset()
    visible: bool = True
    step_up: StepUp = NO_STEP_UP
    """The challenge, with INSUFFICIENT_USER_AUTHENTICATION."""
    missing_permissions: frozenset[str] = frozenset()

    @property
    def active(self) -> bool:
        """Whether the token holds."""
        return self.reason is _ACTIVE

    @property
    def claims(self) -> Claims | None:
        """Claims of the token, where its signature holds."""
        return self.verified.claims if self.verified else None


class Verified:
    """These exact bytes were signed by this key and say these claims. Nothing else is known.

    Without a verifier the issuer found them in its own tables; `kid` names the key within, if any.
    """

    __slots__ = (
        "begins",
        "claims",
        "cutoffs",
        "encoded",
        "ends",
        "kid",
        "marks",
        "reasons",
        "seen",
        "verifier",
    )

    def __init__(self, verifier: Verifier | None, claims: Claims, *, kid: str = "") -> None:
        self.verifier = verifier
        self.kid = verifier.kid if verifier is not None else kid
        """Of the signing key; empty where there is no signature."""
        self.claims = claims
        self.begins = max(claims.issued, claims.not_before) - LEEWAY_S
        self.ends = claims.expires + LEEWAY_S
        """It holds from `begins` until before `ends`."""
        taint = verifier.taint_key if verifier is not None else _taint(kid)
        self.marks, self.reasons = _marks(taint, claims)
        """Keys of the dead marks that can kill the token, and what each of them means."""
        self.cutoffs = cutoff_keys(
            claims.client_id, claims.subject, claims.actors, claims.audiences
        )
        self.encoded: Any = None
        """Room for an edge to keep its own form of the claims."""
        self.seen = False
        """Room for an edge to know that it was asked about before."""


def _taint(kid: str) -> bytes:
    return marker_key(MarkerKind.KEY_TAINTED, kid)


def _marks(taint: bytes, claims: Claims) -> tuple[tuple[bytes, ...], tuple[Reason, ...]]:
    """A tuple of bytes alone is nothing to the garbage collector, and many tokens share the
    reasons: what each cached token adds makes a collection longer.
    """
    found = [marker_key(MarkerKind.TOKEN_DEAD, claims.jti)]
    reasons = [Reason.TOKEN_REVOKED]
    if claims.root_jti:
        found.append(marker_key(MarkerKind.TOKEN_DEAD, claims.root_jti))
        reasons.append(Reason.TOKEN_REVOKED)
    if claims.session_id:  # before the grants in it, which end with it
        found.append(marker_key(MarkerKind.SESSION_DEAD, claims.session_id))
        reasons.append(Reason.SESSION_ENDED)
    if claims.grant_id:
        found.append(marker_key(MarkerKind.GRANT_DEAD, claims.grant_id))
        reasons.append(Reason.GRANT_REVOKED)
    found += [taint, *map(_taint, claims.key_ids)]
    reasons += [Reason.TOKEN_KEY_TAINTED] * (1 + len(claims.key_ids))
    return tuple(found), _shared(tuple(reasons))


@lru_cache(maxsize=64)
def _shared(reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
    return reasons


@lru_cache(maxsize=8192)  # the same client and subject come again with every token of theirs
def cutoff_keys(
    client_id: str, subject: str, actors: tuple[str, ...] = (), audiences: tuple[str, ...] = ()
) -> tuple[bytes, ...]:
    """Keys of the cutoffs that can kill a credential, beside the one for everything.

    Each client and each subject that it went through: an exchanged token dies with all of them.
    """
    parties = dict.fromkeys((client_id, subject, *actors))
    keys = [marker_key(kind, party) for party in parties for kind in _OF_PARTY]
    clients = dict.fromkeys((client_id, *actors))
    if actors:
        clients[subject] = None  # a client that was the subject itself had the token before them
    kind = MarkerKind.CUTOFF_SUBJECT_CLIENT
    keys += [marker_key(kind, subject, client) for client in clients]
    keys += [marker_key(kind, actor, client_id) for actor in actors if actor != subject]
    keys += [marker_key(MarkerKind.CUTOFF_RESOURCE, audience) for audience in audiences]
    return tuple(dict.fromkeys(keys))


_OF_PARTY = (MarkerKind.CUTOFF_CLIENT, MarkerKind.CUTOFF_SUBJECT)

_ANYTHING = Question(frozenset({ANY_AUDIENCE}))


class Judge:
    """Judges tokens of one issuer by one state.

    The cache says only whose signature the bytes carry: times, marks, key, audience, proof and
    scopes are judged at every call.
    """

    def __init__(self, issuer: str, state: State, *, cache_bytes: int = 64 * 2**20) -> None:
        self.state = state
        self.issuer = issuer
        self._cache: BytesCache[str, Verified] = BytesCache(cache_bytes)

    def __call__(
        self, token: str, question: Question, boot: float, known: Verified | None = None
    ) -> Verdict:
        """Judges at boot time `boot` (seconds); raises StateStale where no answer is safe.

        `known` is what the issuer found of a token that no signature tells it.
        """
        state = self.state
        state.require_fresh(boot, (), question.open_s)
        now = state.now(boot)
        try:
            verified = known or self._cache.get(token)
            if verified is None or verified.verifier not in state.keys.held:
                verified = known or self._verify(token, question)
            claims = verified.claims
            if ANY_AUDIENCE not in question.audiences:
                require_entitled(question, claims.audiences)
            if state.staleness:
                state.require_fresh(boot, claims.audiences, question.open_s)
            self.require_alive(verified, now)
            if question.audience not in claims.audiences:
                require_audience(question, claims)
            is_shown = question.thumbprint == claims.certificate_thumbprint  # or neither is there
            if not is_shown or question.require_bound or claims.jwk_thumbprint:
                require_proof(question, claims)
        except Refused as refusal:
            return Verdict(refusal.reason, state.revision, now, now, visible=refusal.visible)
        reusable = now + REUSABLE_S
        if reusable > claims.expires:
            reusable = claims.expires
        if not question.scopes <= claims.scopes:
            missing = question.scopes - claims.scopes
            return Verdict(
                Reason.INSUFFICIENT_SCOPE, state.revision, now, reusable, verified, missing
            )
        step_up = question.step_up
        if step_up is not NO_STEP_UP:
            if not step_up.is_met(claims.acr, claims.auth_time, now):
                reason = Reason.INSUFFICIENT_USER_AUTHENTICATION
                return Verdict(reason, state.revision, now, reusable, verified, step_up=step_up)
            if step_up.max_age_s is not None and claims.auth_time is not None:
                reusable = min(reusable, claims.auth_time + step_up.max_age_s)
        return Verdict(_ACTIVE, state.revision, now, reusable, verified)

    def identify(self, token: str, boot: float, known: Verified | None = None) -> Verified | None:
        """The token if it is ours and alive, whoever presents it and whatever it is for.

        For whoever revokes it: neither audience nor proof is judged. Raises StateStale.
        """
        state = self.state
        state.require_fresh(boot)
        try:
            verified = known or self._cache.get(token)
            if verified is None or verified.verifier not in state.keys.held:
                verified = known or self._verify(token, _ANYTHING)
            self.require_alive(verified, state.now(boot))
        except Refused:
            return None
        return verified

    def _verify(self, token: str, question: Question) -> Verified:
        """The expensive part, after everything that can refuse without it.

        The asker's right to the audience comes first: without it no other reason is ever told.
        """
        require_entitled(question, question.audiences)
        header_b64, payload_b64, signature_b64 = split(token)
        payload = json_object(decode(payload_b64))
        require_entitled(question, audiences_of(payload))
        keys = self.state.keys
        verifier = keys.by_header.get(header_b64)
        header = json_object(decode(header_b64)) if verifier is None else {}
        if verifier is None:
            require_type(header)
            require_members(header)
        self.require_issuer(payload)
        verifier = verifier or self.find_key(header)
        verifier.verify(f"{header_b64}.{payload_b64}".encode(), decode(signature_b64))
        keys.by_header[header_b64] = verifier
        verified = Verified(verifier, parse_claims(payload))
        self._cache.put(token, verified, len(token) + _ENTRY_BYTES)
        return verified

    def require_issuer(self, payload: Mapping[str, Any]) -> None:
        """Raises Refused unless it is from the issuer of this judge."""
        if payload.get("iss") != self.issuer:
            raise Refused(Reason.TOKEN_ISSUER_WRONG)

    def find_key(self, header: Mapping[str, Any]) -> Verifier:
        """The key that a header names, by its one algorithm; raises Refused."""
        verifier = self.state.keys.by_kid.get(header["kid"])
        if verifier is None and self.state.is_dead(_taint(header["kid"])):
            raise Refused(Reason.TOKEN_KEY_TAINTED)  # nobody need wait for it to be published
        if verifier is None or verifier.alg != header["alg"]:
            raise Refused(Reason.TOKEN_KEY_UNKNOWN)
        return verifier

    def require_alive(self, verified: Verified, now: float) -> None:
        """Raises Refused for what is over, not yet begun, dead or cut off."""
        if not verified.begins <= now < verified.ends:
            is_over = verified.ends <= now
            raise Refused(Reason.TOKEN_EXPIRED if is_over else Reason.TOKEN_NOT_YET_VALID)
        state = self.state
        reason = state.killer(verified.marks, verified.reasons)
        if reason is not None:
            raise Refused(reason)
        if verified.claims.revision < state.cutoff(verified.cutoffs):
            raise Refused(Reason.TOKEN_CUT_OFF)


def require_type(header: Mapping[str, Any]) -> None:
    """Raises Refused for a JWT of another kind (RFC 8725 section 3.11)."""
    typ = header.get("typ")
    if not isinstance(typ, str) or typ.lower() not in TOKEN_TYPES:
        raise Refused(Reason.TOKEN_TYPE_WRONG)


def require_members(header: Mapping[str, Any]) -> None:
    """Refuses crit, jwk, jku, x5u, x5c, zip, cty, rather than ignore them (RFC 8725 3.10)."""
    if header.keys() != {"alg", "kid", "typ"} or not isinstance(header["kid"], str):
        raise Refused(Reason.TOKEN_MALFORMED)


def require_entitled(question: Question, audiences: Collection[str]) -> None:
    """Refuses invisibly: who may not validate a token learns nothing of it, whatever its state."""
    allowed = question.audiences
    if ANY_AUDIENCE in allowed:
        return
    if question.audience and question.audience not in allowed:
        raise Refused(Reason.TOKEN_INACTIVE, visible=False)
    if allowed.isdisjoint(audiences):
        raise Refused(Reason.TOKEN_INACTIVE, visible=False)


def require_audience(question: Question, claims: Claims) -> None:
    """Raises Refused for a token that is not for the expected one."""
    if question.audience and question.audience not in claims.audiences:
        raise Refused(Reason.TOKEN_AUDIENCE_WRONG)


def require_proof(question: Question, claims: Claims) -> None:
    """Proof of possession (RFC 8705 section 3): a bound token is worth nothing without its key."""
    if claims.jwk_thumbprint:
        raise Refused(Reason.PROOF_MISSING)
    bound = claims.certificate_thumbprint
    if bound and bound != question.thumbprint:
        raise Refused(Reason.PROOF_MISMATCH if question.thumbprint else Reason.PROOF_MISSING)
    if question.require_bound and not bound:
        raise Refused(Reason.TOKEN_NOT_BOUND)
