"""Rows that one worker read, for the others: in Redis, which may lose, keep and mix up anything."""

import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter

from authsvc.cache.redis import RedisLink
from authsvc.clock import Clock
from authsvc.keys.secrets import Mac
from authsvc.model import Client, Role
from authsvc.store.port import ANY_KEY, Holding, RowKind
from authsvc.telemetry import Counters, Metrics
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import REVISIONS_PER_EPOCH, State

T = TypeVar("T")

TTL_S = 600
"""Far shorter than change events are kept (markers.MARKER_LIFETIME_S)."""
SKEW_S = 5.0
"""Between what two workers take for the database's time; older knowledge is not shared."""
CHANGES_MAX = 2**14
ROW_BYTES_MAX = 2**18
LAYOUT = 1
"""Of what is kept; what the rows consist of is known by itself."""

_FROM_EVERYTHING = frozenset({MarkerKind.CUTOFF_RESOURCE, MarkerKind.CUTOFF_EVERYTHING})
"""They touch rows that they do not name (permissions.py)."""
_OF_ROWS = frozenset(
    {MarkerKind.CLIENT_CHANGED, MarkerKind.PERMISSIONS_CHANGED, MarkerKind.ROLE_CHANGED}
)
_HEAD = struct.Struct(">Qd")
_JSON = ConfigDict(val_json_bytes="hex")
_ROWS: Mapping[RowKind, TypeAdapter[Any]] = {
    RowKind.CLIENT: TypeAdapter(tuple[Client], config=_JSON),
    RowKind.HOLDER: TypeAdapter(tuple[tuple[Holding, ...]], config=_JSON),
    RowKind.ROLE: TypeAdapter(tuple[Role], config=_JSON),
}


class SharedRows:
    """Asks Redis before the database (`store.port.Share`).

    A row carries the revision that it contains all changes up to, and the database's time before it
    was read. It is taken if no change of its key since is known, if that revision is applied here,
    and if it is younger than its TTL, whatever Redis thinks of that (docs/decisions/0019).
    """

    def __init__(
        self, link: RedisLink, mac: Mac, issuer: str, state: State, clock: Clock, metrics: Metrics
    ) -> None:
        self._link = link
        self._mac = mac
        self._state = state
        self._clock = clock
        self._changes: dict[bytes, int] = {}
        """Key of a row -> revision of its last change that is known, the latest at the end."""
        self._floor = 0
        """What contains less is not taken: its key may have changed unnoticed."""
        deployment = sha256(issuer.encode()).hexdigest()[:16]
        self._places = {
            kind: f"authsvc:{deployment}:row:{kind}:{_layout(rows)}" for kind, rows in _ROWS.items()
        }
        outcomes = Counters(
            "authsvc_shared_rows",
            "Rows that Redis was asked for, by outcome (hit, miss, refused)",
            ("outcome",),
        )
        metrics.registry.register(outcomes)
        self._hit, self._miss, self._refused = (
            outcomes.labels(name).inc for name in ("hit", "miss", "refused")
        )

    async def changed(self, markers: tuple[Marker, ...]) -> None:
        """Called before the applied revision advances, and before any cache reads again."""
        for marker in markers:
            if marker.kind in _FROM_EVERYTHING or marker.key == ANY_KEY:
                self._floor = max(self._floor, marker.revision)
            elif marker.kind in _OF_ROWS:
                known = self._changes.pop(marker.key, 0)
                self._changes[marker.key] = max(known, marker.revision)
        while len(self._changes) > CHANGES_MAX:
            first = next(iter(self._changes))
            self._floor = max(self._floor, self._changes.pop(first))

    async def __call__(
        self, kind: RowKind, key: bytes, name: str, read: Callable[[], Awaitable[tuple[int, T]]]
    ) -> tuple[int, T]:
        """See `Share`. Raises what `read` raises, and nothing else."""
        place = self._place(kind, key, name)
        if not self._is_sure():
            return await read()
        kept = await self._link.run(lambda redis: redis.execute_command("GET", place), None)
        if isinstance(kept, bytes):
            found = self._opened(kind, key, place, kept)
            if found is not None:
                self._hit()
                return max(found[0], self._state.revision), cast("T", found[1])
            self._refused()
        else:
            self._miss()
        revision, now = self._state.revision, self._state.now(self._clock.boot())
        place = self._place(kind, key, name)
        head, row = await read()
        revision = head or revision
        if row is not None and self._is_sure() and self._is_current(key, revision):
            kept = self._mac.seal(place, _HEAD.pack(revision, now) + _dumped(row))
            if len(kept) <= ROW_BYTES_MAX:
                command = ("SET", place, kept, "EX", TTL_S)
                await self._link.run(lambda redis: redis.execute_command(*command), None)
        return head, row

    def _place(self, kind: RowKind, key: bytes, name: str) -> str:
        """Also what the row is sealed for: it is worth nothing elsewhere."""
        epoch = self._state.revision // REVISIONS_PER_EPOCH
        about = sha256(key + name.encode()).hexdigest()[:32]
        return f"{self._places[kind]}:{epoch}:{{{about}}}"

    def _is_sure(self) -> bool:
        """Whether this worker knows the database's time, and follows it."""
        return self._state.revision > 0 and self._state.age(self._clock.boot()) <= SKEW_S

    def _is_current(self, key: bytes, revision: int) -> bool:
        return max(self._floor, self._changes.get(key, 0)) <= revision

    def _opened(self, kind: RowKind, key: bytes, place: str, kept: bytes) -> tuple[int, Any] | None:
        payload = self._mac.open(place, kept)
        if payload is None:
            return None
        revision, written = _HEAD.unpack_from(payload)
        # One of a worker that is ahead may hold what is not applied here.
        if not self._is_current(key, revision) or revision > self._state.revision:
            return None
        if not -SKEW_S <= self._state.now(self._clock.boot()) - written <= TTL_S:
            return None
        try:
            return revision, _ROWS[kind].validate_json(payload[_HEAD.size :])[0]
        except ValueError:
            return None


def _layout(rows: TypeAdapter[Any]) -> str:
    """Names what rows consist of: workers of another version do not see each other's."""
    about = json.dumps([LAYOUT, rows.json_schema()], sort_keys=True)
    return sha256(about.encode()).hexdigest()[:16]


def _dumped(row: object) -> bytes:
    return json.dumps([row], default=_plain, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, frozenset):
        return list(value)
    if isinstance(value, bytes):
        return value.hex()
    return dict(value)  # a read-only mapping
