"""Bugs that the simulator must find. The product has no switch for them: each changes one step."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from authsvc.feed.follow import Follow
from authsvc.mint import Mint
from authsvc.rpc.agent import Beside
from authsvc.rpc.answers import Batch
from authsvc.rpc.convert import Asked
from authsvc.rpc.pipeline import Call
from authsvc.rpc.policy import Policy
from authsvc.store.port import FeedPage
from authsvc_client.core.markers import CUTOFF_KINDS, Marker
from authsvc_client.core.state import State
from authsvc_client.core.watched import Watched
from authsvc_client.validator import Local
from tests.sim.memory import Memory
from tests.sim.nodes import Worker

Plant = Callable[[pytest.MonkeyPatch], None]


def revision_before_markers(patch: pytest.MonkeyPatch) -> None:
    """The revision advances, then what has to be read is read, then the markers are applied."""
    reload = Worker._reload

    async def early(self: Worker, markers: tuple[Marker, ...]) -> None:
        if markers:
            self.state.apply((), max(marker.revision for marker in markers))
            await self.world.transit()
        await reload(self, markers)

    patch.setattr(Worker, "_reload", early)


def marks_dropped_early(patch: pytest.MonkeyPatch) -> None:
    """A mark runs out as if no leeway were given and nobody's state were old."""
    apply = State.apply

    def shorter(self: State, markers: Iterable[Marker], revision: int) -> None:
        early = [Marker(*(m.kind, m.key, m.revision), m.until - 14) for m in markers]
        apply(self, early, revision)

    patch.setattr(State, "apply", shorter)


def compacted_early(patch: pytest.MonkeyPatch) -> None:
    """The database forgets a change while tokens live that it killed."""
    init = Memory.__init__

    def short(self: Memory, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        self.marker_lifetime_s = 3.0

    patch.setattr(Memory, "__init__", short)


def new_epoch_forgets(patch: pytest.MonkeyPatch) -> None:
    """Who has to take another snapshot throws the old marks away first."""
    forget = Watched.forget

    def forgets(self: Watched) -> None:
        forget(self)
        _forget_marks(self.state)

    patch.setattr(Watched, "forget", forgets)


def _forget_marks(state: State) -> None:
    empty = State(state.staleness_max_s)
    for name in ("_dead", "_cutoffs", "everything"):
        setattr(state, name, getattr(empty, name))


def age_from_the_receipt(patch: pytest.MonkeyPatch) -> None:
    """An event counts as of when it was received, however long it was under way."""

    def heartbeat(self: Watched, revision: int, age_s: float, time: float, boot: float) -> None:
        if self._has_snapshot and revision == self.state.revision:
            self.state.confirm(boot - age_s, time)

    patch.setattr(Watched, "heartbeat", heartbeat)


def hop_without_its_age(patch: pytest.MonkeyPatch) -> None:
    """What a worker says counts as of now, whatever its own age."""
    heartbeat = Watched.heartbeat

    def young(self: Watched, revision: int, age_s: float, time: float, boot: float) -> None:
        heartbeat(self, revision, 0.0, time, boot)

    patch.setattr(Watched, "heartbeat", young)


def beat_that_did_not_move(patch: pytest.MonkeyPatch) -> None:
    """Any answer of a database confirms, as of now."""

    def confirm(self: Follow, started: float, page: FeedPage) -> None:
        self._state.confirm(started, page.time)

    patch.setattr(Follow, "_confirm", confirm)


def message_advances(patch: pytest.MonkeyPatch) -> None:
    """A published message advances the applied revision."""
    hear = Follow.hear

    async def advance(self: Follow, markers: Iterable[Marker]) -> None:
        told = list(markers)
        await hear(self, told)
        self._state.apply((), max(marker.revision for marker in told))

    patch.setattr(Follow, "hear", advance)


def rev_after_authority(patch: pytest.MonkeyPatch) -> None:
    """`rev` is what is applied when a token is signed."""
    mint = Mint.__call__

    async def late(self: Mint, moment: Any, *given: Any, **named: Any) -> Any:
        await asyncio.sleep(1)
        signed = moment._replace(revision=self._state.revision)
        return await mint(self, signed, *given, **named)

    patch.setattr(Mint, "__call__", late)


def snapshot_of_before(patch: pytest.MonkeyPatch) -> None:
    """A snapshot is swapped in whatever its revision."""

    def snapshot(
        self: Watched,
        revision: int,
        markers: Iterable[Marker],
        keys: Any,
        staleness: Any,
        *,
        last: bool,
    ) -> None:
        self.state.apply(markers, 0)
        if keys:
            self.state.replace_keys(keys)
        if last:
            self.state.revision = revision
            self._has_snapshot = True

    patch.setattr(Watched, "snapshot", snapshot)
    patch.setattr(Watched, "open", _always_anew)


def _always_anew(self: Watched, boot: float) -> int:
    self._opened, self._ahead, self._resumes = boot, None, False
    return 0


def snapshot_of_two_histories(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether the pieces of a snapshot are of one database."""

    async def whatever() -> None:
        pass

    patch.setattr(Follow, "still", lambda _self: whatever)


def no_generation(patch: pytest.MonkeyPatch) -> None:
    """Any refresh token of a living grant is good."""
    patch.setattr(Memory, "is_good", lambda _self, _held, _use: True)


def successor_again(patch: pytest.MonkeyPatch) -> None:
    """The token before the live one gets a further generation rather than the same."""
    use = Memory.use

    def further(self: Memory, asked: Any) -> Any:
        held = self._of(asked.handle)
        if held is not None and held.grant.generation - 1 == asked.generation:
            asked = replace(asked, generation=held.grant.generation)
        return use(self, asked)

    patch.setattr(Memory, "use", further)


def lowest_cutoff(patch: pytest.MonkeyPatch) -> None:
    """Of several cutoffs the first counts."""
    apply = State.apply
    known: dict[tuple[int, bytes], int] = {}

    def first(self: State, markers: Iterable[Marker], revision: int) -> None:
        kept = [
            each
            for each in markers
            if each.kind not in CUTOFF_KINDS
            or known.setdefault((id(self), each.key), each.revision) == each.revision
        ]
        apply(self, kept, revision)

    patch.setattr(State, "apply", first)


def cutoff_at_its_own(patch: pytest.MonkeyPatch) -> None:
    """A cutoff kills what was made right after it, too."""
    cutoff = State.cutoff

    def above(self: State, keys: Any) -> int:
        found = cutoff(self, keys)
        return found + 1 if found else 0

    patch.setattr(State, "cutoff", above)


def word_taken_back(patch: pytest.MonkeyPatch) -> None:
    """What a message killed lives again where it was not read from the table soon."""
    hear = Follow.hear

    async def forgets(self: Follow, markers: Iterable[Marker]) -> None:
        state, revision = self._state, self._state.revision
        before = tuple(dict(each) for each in state._dead), dict(state._cutoffs), state.everything

        def back() -> None:
            if state.revision == revision:
                state._dead, state._cutoffs, state.everything = before

        await hear(self, markers)
        asyncio.get_running_loop().call_later(0.5, back)

    patch.setattr(Follow, "hear", forgets)


def reissued_to_whomever(patch: pytest.MonkeyPatch) -> None:
    """Who was issued a token is issued more of them, whatever became of it."""
    patch.setattr(Policy, "stand", lambda *_: True)


def not_strong(patch: pytest.MonkeyPatch) -> None:
    """A strong answer joins a read that is under way already."""

    async def fresh(self: Follow) -> None:
        await asyncio.sleep(0)

    patch.setattr(Follow, "fresh", fresh)


def agent_without_its_age(patch: pytest.MonkeyPatch) -> None:
    """An agent answers as if it had been told of everything a moment ago."""
    at_hand = Beside.at_hand

    def young(self: Beside, asked: Asked, call: Call) -> bytes | None:
        local = self._local
        now, confirmed = local._now, local.state.confirmed
        if confirmed is not None:
            local._now = lambda: confirmed
        try:
            return at_hand(self, asked, call)
        finally:
            local._now = now

    patch.setattr(Beside, "at_hand", young)


def answer_of_before(patch: pytest.MonkeyPatch) -> None:
    """An agent gives the answer again that it gave before its stream was cut."""
    at_hand = Beside.at_hand

    def again(self: Beside, asked: Asked, call: Call) -> bytes | None:
        known = vars(self).setdefault("known", {})
        if asked.token not in known or not self._local._is_degraded:
            known[asked.token] = at_hand(self, asked, call)
        return cast("bytes | None", known[asked.token])

    patch.setattr(Beside, "at_hand", again)


def forgotten_at_a_resume(patch: pytest.MonkeyPatch) -> None:
    """Whoever resumes forgets what kills: that comes again, does it not?"""
    opened = Watched.open

    def forgets(self: Watched, boot: float) -> int:
        _forget_marks(self.state)
        return opened(self, boot)

    patch.setattr(Watched, "open", forgets)


def asked_of_one_behind(patch: pytest.MonkeyPatch) -> None:
    """Any worker may answer a validator, also one that has not applied what it has."""
    asks = Local.asks
    patch.setattr(Local, "asks", lambda self: asks(self) and 0)


def told_and_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What a worker refused as revoked is accepted by who asked, until it hears of it."""
    patch.setattr(Local, "told", lambda _self, _token, reason: reason)


def answers_in_disorder(patch: pytest.MonkeyPatch) -> None:
    """Of several questions the last is answered first."""
    batch = Batch.__call__

    async def backwards(self: Batch, asked: Sequence[Any], call: Call) -> bytes:
        return await batch(self, asked[::-1], call)

    patch.setattr(Batch, "__call__", backwards)


PLANTS: dict[Plant, int] = {
    revision_before_markers: 1,
    marks_dropped_early: 1,
    compacted_early: 1,
    new_epoch_forgets: 1,
    age_from_the_receipt: 1,
    hop_without_its_age: 1,
    beat_that_did_not_move: 1,
    message_advances: 1,
    rev_after_authority: 1,
    snapshot_of_two_histories: 1,
    lowest_cutoff: 1,
    not_strong: 1,
    agent_without_its_age: 1,
    answer_of_before: 1,
    forgotten_at_a_resume: 1,
    asked_of_one_behind: 1,
    answers_in_disorder: 2,
    cutoff_at_its_own: 2,
    snapshot_of_before: 3,
    no_generation: 4,
    successor_again: 4,
    reissued_to_whomever: 4,
    word_taken_back: 5,
    told_and_forgotten: 5,
}
"""Each with the invariant that tells of it; others may be broken first."""
SEEN_FROM: dict[Plant, int] = {
    not_strong: 16,
    age_from_the_receipt: 17,
    hop_without_its_age: 17,
    agent_without_its_age: 19,
    word_taken_back: 19,
    message_advances: 54,
    asked_of_one_behind: 72,
    beat_that_did_not_move: 135,
    answer_of_before: 136,
    snapshot_of_two_histories: 275,
}
"""The first seed that found it once; who starts there need not search for long."""
