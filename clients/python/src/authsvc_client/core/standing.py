"""A verdict that is asked for again: what a key and the claims decided stands, the rest is judged
at every call."""

from .judge import REUSABLE_S, Judge, Question, Verdict
from .jws import Refused
from .step_up import NO_STEP_UP


class Standing:
    """An active verdict on a signed token, for the same question.

    Signature, audience, proof and scopes are those of the same bytes; they stand while the keys are
    the same object. Staleness and time are judged at each call, and dead marks and cutoffs as soon
    as there is one more of them.
    """

    __slots__ = ("_judge", "_keys", "_kills", "_until", "verified")

    def __init__(self, judge: Judge, verdict: Verdict, question: Question) -> None:
        """ValueError for a verdict that does not stand: of other tokens, and where time tells."""
        verified, keys = verdict.verified, judge.state.keys
        if not verdict.active or verified is None or verified.verifier is None:
            raise ValueError("not active, or not signed")
        if keys.by_kid.get(verified.kid) is not verified.verifier:
            raise ValueError("its key is gone")
        if question.step_up is not NO_STEP_UP or question.permissions or question.open_s:
            raise ValueError("asks for more than stands")
        self.verified = verified
        self._judge = judge
        self._keys = keys
        self._kills = -1  # the first time they are judged
        self._until = verified.claims.expires - REUSABLE_S

    def at(self, boot: float) -> float | None:
        """Database time at boot time `boot`, if the verdict is the same, reusable for REUSABLE_S;
        None where it has to be judged in full. Raises StateStale.
        """
        state, verified = self._judge.state, self.verified
        state.require_fresh(boot, verified.claims.audiences if state.staleness else ())
        now = state.now(boot)
        if now > self._until or state.keys is not self._keys:
            return None
        kills = state.kills
        if kills != self._kills:
            try:
                self._judge.require_alive(verified, now)
            except Refused:
                return None
            self._kills = kills
        return now
