"""A state that is fed by WatchChanges: what of the stream may be believed, and how old it is."""

from collections.abc import Iterable, Mapping
from typing import Any

from .jws import KeyRefused
from .markers import Marker, MarkerKind
from .state import REVISIONS_PER_EPOCH, State

DELAY_S_MAX = 5.0
"""An event that was longer under way speaks of a moment too long ago to go by."""
OPENING_S_MAX = 1.0
"""A stream that took longer to open says too little of the database's clock, for as long as it
lasts: opened again it says more.
"""
OPENINGS_MAX = 3
"""Where so many in a row took long, more would."""

Keys = Iterable[Mapping[str, Any]]


class OutOfStep(Exception):
    """The stream does not continue what is known; it has to be opened again."""


class Watched:
    """Applies the events of one stream after another to a state.

    Nothing is ever taken away from the state: while a stream is down, or does not fit, it ages.

    How old a confirmation is nobody can read off a clock of this machine, and an event may have
    waited long in a buffer. What the server said after a stream was opened is younger than the
    opening; that bounds how far the database's clock is ahead of the one here, and so how long any
    later event was under way.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._has_snapshot = self._resumes = False
        self._opened = 0.0
        self._slow = 0
        """Streams in a row that took long to open."""
        self._ahead: float | None = None
        """Of the database's clock to the boot-time clock, at most."""
        self._staged: tuple[int, Keys, Mapping[str, float]] | None = None

    def open(self, boot: float) -> int:
        """A stream is opened now; the revision to resume from, 0 for a snapshot."""
        self._opened, self._ahead, self._staged = boot, None, None
        self._resumes = self._has_snapshot
        return self.state.revision if self._resumes else 0

    def forget(self) -> None:
        """The next stream begins with a snapshot; what kills goes on killing."""
        self._has_snapshot = False

    def snapshot(
        self,
        revision: int,
        markers: Iterable[Marker],
        keys: Keys,
        staleness: Mapping[str, float],
        *,
        last: bool,
    ) -> None:
        """A chunk; raises OutOfStep for a snapshot of before what is known.

        What kills counts at once, the revision and the rest with the last chunk.
        """
        staged = self._staged or (revision, tuple(keys), staleness)
        if revision < self.state.revision or revision != staged[0]:
            raise OutOfStep("a snapshot that is older than what is known")
        self._staged = staged
        self.state.apply(markers, self.state.revision)
        if last:
            self._staged = None
            self._replace_keys(staged[1])
            self.state.staleness = staged[2]
            self.state.apply((), revision)
            self._has_snapshot = True

    def delta(
        self,
        revision: int,
        markers: Iterable[Marker],
        keys: Keys,
        staleness: Mapping[str, float],
    ) -> None:
        """Changes; raises OutOfStep where they do not follow what is known."""
        before = self.state.revision
        if not self._has_snapshot or revision < before or _epoch(revision) != _epoch(before):
            self.forget()
            raise OutOfStep("changes that do not follow")
        told = tuple(markers)
        self.state.apply(told, before)
        found = tuple(keys)
        if found:
            self._replace_keys(found)
        if staleness or any(marker.kind is MarkerKind.RESOURCE_CHANGED for marker in told):
            self.state.staleness = staleness
        self.state.apply((), revision)

    def heartbeat(self, revision: int, age_s: float, database_time: float, boot: float) -> None:
        """Confirms the state as of `age_s` before it was sent; raises OutOfStep where it cannot.

        `boot` is when it was received.
        """
        if not self._has_snapshot or revision != self.state.revision:
            self.forget()
            raise OutOfStep("a heartbeat of another revision")
        is_slow = False
        if self._ahead is None:
            self._ahead = database_time - self._opened
            is_slow = boot - self._opened > OPENING_S_MAX
            self._slow = self._slow + 1 if is_slow else 0
            if boot - self._opened > DELAY_S_MAX:  # judged time would be as far ahead, for good
                raise OutOfStep("the stream took very long to open")
        sent = database_time - self._ahead
        if sent > boot + DELAY_S_MAX:  # nothing says how long it was under way
            raise OutOfStep("the database's clock was set")
        started = min(sent, boot) - max(age_s, 0.0)
        if self.state.confirmed is None or started > self.state.confirmed:
            self.state.confirm(started, started + self._ahead)
        if is_slow and not (self._resumes and self._slow >= OPENINGS_MAX):
            raise OutOfStep("the stream took long to open")
        if sent < boot - DELAY_S_MAX:
            raise OutOfStep("an event of long ago, or a clock that was set")

    def _replace_keys(self, keys: Keys) -> None:
        try:
            self.state.replace_keys(keys)
        except KeyRefused as error:
            self.forget()
            raise OutOfStep("keys that cannot be used") from error


def _epoch(revision: int) -> int:
    return revision // REVISIONS_PER_EPOCH
