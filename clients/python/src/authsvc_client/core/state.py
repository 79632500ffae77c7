"""What is dead at which revision, which keys verify, and how old that knowledge is."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .jws import KeyRefused, Verifier
from .markers import CUTOFF_KINDS, DEAD_KINDS, Marker, MarkerKind

REVISIONS_PER_EPOCH = 2**32
_SWEEP_S = 10


class StateStale(Exception):
    """The state was not confirmed for longer than allowed: no answer would be safe."""

    def __init__(self, age_s: float) -> None:
        super().__init__(f"state is {age_s:.1f} s old")
        self.age_s = age_s


class Keys:
    """Verifiers by `kid`, and by the encoded headers that were seen with a good signature."""

    __slots__ = ("by_header", "by_kid")

    def __init__(self, by_kid: Mapping[str, Verifier]) -> None:
        self.by_kid = dict(by_kid)
        self.by_header: dict[str, Verifier] = {}


class State:
    """One object for the server, the agent and a caller's process; fed by the table or a stream.

    Kill marks are only ever added or run out: a new epoch or snapshot takes none away.
    """

    __slots__ = (
        "_behind",
        "_cutoffs",
        "_dead",
        "_floor",
        "_marked",
        "_offset",
        "_swept",
        "confirmed",
        "everything",
        "keys",
        "revision",
        "staleness",
        "staleness_max_s",
    )

    def __init__(self, staleness_max_s: float) -> None:
        self.staleness_max_s = staleness_max_s
        self.staleness: Mapping[str, float] = {}
        """Audience -> its own bound in seconds, where it is lower."""
        self.revision = 0
        self.everything = 0
        self.keys = Keys({})
        self.confirmed: float | None = None
        """Boot-time clock at the start of the read that confirmed the head; None: never."""
        self._dead: dict[bytes, float] = {}
        self._cutoffs: dict[bytes, tuple[int, float]] = {}
        self._marked: dict[float, tuple[float, list[bytes]]] = {}
        """By the second in which they run out: a sweep looks at nothing else, and each second is
        one object however many marks run out in it."""
        self._offset = -math.inf
        self._floor = 0.0
        self._behind = 0.0
        self._swept = 0.0

    def apply(self, markers: Iterable[Marker], revision: int) -> None:
        """Takes in changes and moves to `revision`, never back within an epoch."""
        for marker in markers:
            if marker.kind in DEAD_KINDS:
                self._mark_dead(marker.key, float(math.ceil(marker.until)))
            elif marker.kind in CUTOFF_KINDS:
                self._cut_off(marker)
        self.revision = max(revision, self.revision)

    def _mark_dead(self, key: bytes, until: float) -> None:
        if until > self._dead.get(key, 0.0):
            second, keys = self._marked.setdefault(until, (until, []))
            self._dead[key] = second
            keys.append(key)

    def _cut_off(self, marker: Marker) -> None:
        if marker.kind == MarkerKind.CUTOFF_EVERYTHING:
            self.everything = max(self.everything, marker.revision)
            return
        revision, until = self._cutoffs.get(marker.key, (0, 0.0))
        self._cutoffs[marker.key] = (max(marker.revision, revision), max(marker.until, until))

    def confirm(self, started: float, database_time: float) -> None:
        """Says that at boot time `started` a read began which found the head at `revision`."""
        now = self.now(started)
        self._offset = database_time - started
        self.confirmed = started
        # Where the database's clock went back, later markers run out too early by ours.
        self._behind = max(self._behind, now - database_time)
        now = self.now(started)
        if now - self._swept > _SWEEP_S:
            self._swept = now
            self._sweep(now - self._behind)

    def _sweep(self, now: float) -> None:
        for until in [until for until in self._marked if until <= now]:
            for key in self._marked.pop(until)[1]:
                if self._dead.get(key, math.inf) <= now:  # else it was marked again
                    del self._dead[key]
        self._cutoffs = {key: cut for key, cut in self._cutoffs.items() if cut[1] > now}

    def now(self, boot: float) -> float:
        """Database time at boot time `boot`, 0 before the first confirmation; never goes back."""
        now = boot + self._offset
        if now > self._floor:
            self._floor = now
        return self._floor

    def ahead(self, boot: float) -> float:
        """Seconds by which judged time is ahead of the database's clock, which went back."""
        return self.now(boot) - (boot + self._offset)

    def age(self, boot: float) -> float:
        """Seconds since the head was confirmed; infinite before the first time."""
        return float("inf") if self.confirmed is None else boot - self.confirmed

    def require_fresh(
        self, boot: float, audiences: tuple[str, ...] = (), at_least_s: float = 0.0
    ) -> None:
        """Raises StateStale past the bound, or past an audience's own lower one; not below
        `at_least_s`, which is the word of who judges for itself.
        """
        age = self.age(boot)
        bound = self.staleness_max_s
        for audience in audiences:
            bound = min(bound, self.staleness.get(audience, bound))
        if age > max(bound, at_least_s):
            raise StateStale(age)

    def is_dead(self, key: bytes) -> bool:
        """Whether a token, grant, session or signing key is dead."""
        return key in self._dead

    def cutoff(self, keys: tuple[bytes, ...]) -> int:
        """The highest cutoff that applies: whatever carries a lower `rev` is dead."""
        highest = self.everything
        for key in keys:
            cut = self._cutoffs.get(key)
            if cut is not None and cut[0] > highest:
                highest = cut[0]
        return highest

    def replace_keys(self, jwks: Iterable[Mapping[str, Any]]) -> None:
        """Takes a new key set; a key that stays keeps its verifier, and what it verified.

        Raises KeyRefused, and changes nothing, where one may not verify or two share a `kid`.
        """
        held = self.keys.by_kid
        verifiers: dict[str, Verifier] = {}
        for jwk in jwks:
            kid = jwk.get("kid")
            if not isinstance(kid, str) or not kid or kid in verifiers:
                raise KeyRefused("kid missing or not unique")
            known = held.get(kid)
            verifiers[kid] = known if known and known.jwk == jwk else Verifier(jwk)
        if verifiers != held:
            self.keys = Keys(verifiers)
