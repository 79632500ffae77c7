"""What is dead at which revision, which keys verify, and how old that knowledge is."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice, takewhile
from typing import Any

from .jws import KeyRefused, Verifier
from .markers import CUTOFF_KINDS, DEAD_KINDS, Marker, MarkerKind
from .reason import Reason

REVISIONS_PER_EPOCH = 2**32
_SWEEP_S = 10
_SWEEP_MAX = 4096
"""So many go at once, in a few milliseconds; the rest after the next confirmations."""
_SHARDS = 256
_SECOND_BITS = 32
_SECOND_MAX = (1 << _SECOND_BITS) - 1


class StateStale(Exception):
    """The state was not confirmed for longer than allowed: no answer would be safe."""

    def __init__(self, age_s: float) -> None:
        super().__init__(f"state is {age_s:.1f} s old")
        self.age_s = age_s


class Keys:
    """Verifiers by `kid`, and by the encoded headers that were seen with a good signature."""

    __slots__ = ("by_header", "by_kid", "held")

    def __init__(self, by_kid: Mapping[str, Verifier]) -> None:
        self.by_kid = dict(by_kid)
        self.held = frozenset(by_kid.values())
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
        "_offset",
        "_seconds",
        "_sweeping",
        "_swept",
        "confirmed",
        "everything",
        "keys",
        "kills",
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
        self.kills = 0
        """How often anything was marked or cut off: by the same number nothing more is dead."""
        self.keys = Keys({})
        self.confirmed: float | None = None
        """Boot-time clock at the start of the read that confirmed the head; None: never."""
        self._dead: tuple[dict[bytes, int], ...] = tuple({} for _ in range(_SHARDS))
        """The second in which a mark runs out, by the first byte of its key: one dictionary of a
        million would hold everybody up when it grows. Each is in the order in which marks came,
        about that in which they run out, so a sweep looks at the first of them and no further."""
        self._cutoffs: dict[bytes, int] = {}
        """A revision, and in the lowest bits the second in which it runs out; in the same order."""
        self._seconds: dict[int, int] = {}
        """Each second is one object, however many marks run out in it."""
        self._offset = -math.inf
        self._floor = 0.0
        self._behind = 0.0
        self._swept = 0.0
        self._sweeping = 0
        """How far this sweep has come."""

    def apply(self, markers: Iterable[Marker], revision: int) -> None:
        """Takes in changes and moves to `revision`, never back within an epoch."""
        for marker in markers:
            if marker.kind in DEAD_KINDS:
                self._mark_dead(marker.key, marker.until)
            elif marker.kind in CUTOFF_KINDS:
                self._cut_off(marker)
        self.revision = max(revision, self.revision)

    def _mark_dead(self, key: bytes, until: float) -> None:
        self.kills += 1
        shard = self._dead[key[0]]
        held = shard.get(key, -1)
        second = _second(until)
        if second > held:
            if held >= 0:
                del shard[key]  # it moves to the end of the order
            shard[key] = self._seconds.setdefault(second, second)

    def _cut_off(self, marker: Marker) -> None:
        self.kills += 1
        if marker.kind == MarkerKind.CUTOFF_EVERYTHING:
            self.everything = max(self.everything, marker.revision)
            return
        held = self._cutoffs.pop(marker.key, 0)
        revision = max(marker.revision, held >> _SECOND_BITS)
        second = max(_second(marker.until), held & _SECOND_MAX)
        self._cutoffs[marker.key] = revision << _SECOND_BITS | second

    def confirm(self, started: float, database_time: float) -> None:
        """Says that at boot time `started` a read began which found the head at `revision`."""
        now = self.now(started)
        self._offset = database_time - started
        self.confirmed = started
        # Where the database's clock went back, later markers run out too early by ours.
        self._behind = max(self._behind, now - database_time)
        now = self.now(started)
        if now - self._swept > _SWEEP_S:
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        """Forgets some of what ran out: a million marks may do so in one second."""
        over_at = now - self._behind
        left = _SWEEP_MAX
        for marks in (*self._dead, self._cutoffs)[self._sweeping :]:
            over = takewhile(lambda mark: mark[1] & _SECOND_MAX <= over_at, marks.items())
            keys = [key for key, _ in islice(over, left)]
            for key in keys:
                del marks[key]
            left -= len(keys)
            if not left:
                return
            if not marks:
                marks.clear()  # gives its memory back
            self._sweeping += 1
        for second in [each for each in self._seconds if each <= over_at]:
            del self._seconds[second]
        self._sweeping, self._swept = 0, now

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
        confirmed, bound = self.confirmed, self.staleness_max_s
        age = math.inf if confirmed is None else boot - confirmed
        for audience in audiences:
            bound = min(bound, self.staleness.get(audience, bound))
        if age > bound and age > at_least_s:
            raise StateStale(age)

    def is_dead(self, key: bytes) -> bool:
        """Whether a token, grant, session or signing key is dead."""
        return key in self._dead[key[0]]

    def killer(self, keys: tuple[bytes, ...], reasons: tuple[Reason, ...]) -> Reason | None:
        """What stands in the place of the first of these keys that is dead."""
        dead = self._dead
        for key in keys:
            if key in dead[key[0]]:
                return reasons[keys.index(key)]
        return None

    def cutoff(self, keys: tuple[bytes, ...]) -> int:
        """The highest cutoff that applies: whatever carries a lower `rev` is dead."""
        highest, cutoffs = self.everything, self._cutoffs
        if cutoffs.keys().isdisjoint(keys):
            return highest
        return max(highest, *(cutoffs.get(key, 0) >> _SECOND_BITS for key in keys))

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


def _second(until: float) -> int:
    """The first whole second in which a mark that runs out then is over."""
    return min(max(math.ceil(until), 0), _SECOND_MAX)
