"""What a subject may do on an audience now: its roles, kept in this process."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache, partial
from operator import call
from typing import TypeVar

from authsvc.errors import AuthError, Reason
from authsvc.model import PermissionRef
from authsvc.store.port import ANY_KEY, Holding, RoleStore, RowKind, Share, unshared
from authsvc.store.reads import READS_MAX, Reads
from authsvc_client.core.cache import BytesCache
from authsvc_client.core.markers import Marker, MarkerKind, marker_key
from authsvc_client.core.state import State

BYTES_MAX = 32 * 2**20
TRIES = 8
"""Of a read that a change overtakes each time."""
# Objects and dictionary slots, measured generously; the names of a union are its roles' own.
_ENTRY_BYTES, _HOLDING_BYTES, _UNION_BYTES, _NAME_BYTES = 1024, 256, 512, 128

_OF_EVERYBODY = frozenset(
    # The second stands for kinds of change that only a newer version knows.
    {MarkerKind.CUTOFF_RESOURCE, MarkerKind.CUTOFF_EVERYTHING}
)
_OF_THESE = frozenset(
    {MarkerKind.PERMISSIONS_CHANGED, MarkerKind.ROLE_CHANGED, MarkerKind.RESOURCE_CHANGED}
)

T = TypeVar("T")

_Role = Mapping[str, frozenset[str]]
"""Resource -> names of the role's permissions there. Of a role that is gone: nothing."""


class Held:
    """The live permissions of a subject on an audience."""

    __slots__ = ("encoded", "names", "revision")

    def __init__(self, names: frozenset[str], revision: int) -> None:
        self.names = names
        self.revision = revision
        """They are as of this one; as long as they are at hand, as of the applied one too."""
        self.encoded: bytes | None = None
        """Room for an edge to keep its own form of the names."""


class _Holder:
    """What a subject holds, and what comes of it on each audience that was asked for."""

    __slots__ = ("by_limit", "bytes", "unions")

    def __init__(self, holdings: Iterable[Holding]) -> None:
        self.by_limit: dict[str, list[tuple[bytes, str]]] = {}
        """Resource, or "" without one -> key and uid of the roles that are limited to it."""
        self.bytes = _ENTRY_BYTES
        for holding in holdings:
            at = (_role_key(holding.role_id), holding.role_uid)
            self.by_limit.setdefault(holding.resource_id, []).append(at)
            self.bytes += _HOLDING_BYTES + len(holding.resource_id)
        self.unions: dict[str, tuple[int, Held]] = {}
        """With the generation of roles that it was made of."""

    def roles(self, audience: str) -> list[tuple[bytes, str]]:
        """Those that say what it may do there."""
        limited = self.by_limit.get(audience, []) if audience else []
        return self.by_limit.get("", []) + limited


class Permissions:
    """Live permissions; the feed drops what changed before the applied revision advances.

    What was read is used once what the database knew is applied, and read again where a change of
    its key came meanwhile. So all that is at hand is as of the applied revision, neither older nor
    newer: a role with what it got after it was taken away is never seen (docs/decisions/0003).
    """

    def __init__(
        self,
        store: RoleStore,
        state: State,
        reach: Callable[[int], Awaitable[None]],
        share: Share = unshared,
        *,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        """`reach` applies a revision; `bytes_max` bounds what is kept of holders, and as much what
        is kept of roles.
        """
        self._store = store
        self._share = share
        self._state = state
        self._holders: BytesCache[bytes, _Holder] = BytesCache(bytes_max)
        self._roles: BytesCache[bytes, Mapping[str, _Role]] = BytesCache(bytes_max)
        """By key of the id, then by uid: those who held a role that is gone still name it."""
        self._generation = 0
        """Counts changes of roles: unions of an older one are made anew."""
        self._reach = reach
        self._reads: Reads[bytes, _Keep] = Reads(READS_MAX)

    async def changed(self, markers: tuple[Marker, ...]) -> None:
        """Drops what changed; called before the applied revision advances."""
        for marker in markers:
            kind, key = marker.kind, marker.key
            if kind in _OF_EVERYBODY or (key == ANY_KEY and kind in _OF_THESE):
                self._reads.overtake_all()
                self._holders.clear()
                self._roles.clear()
                self._generation += 1
            elif kind is MarkerKind.PERMISSIONS_CHANGED:
                self._reads.overtake(key)
                self._holders.drop(key)
            elif kind is MarkerKind.ROLE_CHANGED:
                self._reads.overtake(key)
                self._roles.drop(key)
                self._generation += 1

    def at_hand(self, subject: str, audience: str) -> Held | None:
        """What is known without a read, as of the applied revision; None where that is nothing."""
        holder = self._holders.get(_holder_key(subject))
        if holder is None:
            return None
        union = holder.unions.get(audience)
        if union is not None and union[0] == self._generation:
            return union[1]
        return self._unite(subject, holder, audience)

    async def __call__(self, subject: str, audience: str) -> Held:
        """Raises AuthError STORE_UNAVAILABLE, also where changes overtake every read."""
        for _ in range(TRIES):
            held = self.at_hand(subject, audience) or await self._read(subject, audience)
            if held is not None:
                return held
        raise AuthError(Reason.STORE_UNAVAILABLE, retry_after_s=1.0, cause="permissions change")

    def _unite(self, subject: str, holder: _Holder, audience: str) -> Held | None:
        """None where a role is not at hand."""
        parts: list[frozenset[str]] = []
        for key, uid in holder.roles(audience):
            role = (self._roles.get(key) or {}).get(uid)
            if role is None:
                return None
            if audience in role:
                parts.append(role[audience])
        names = parts[0] if len(parts) == 1 else frozenset[str]().union(*parts)
        known = holder.unions.get(audience)
        if known is not None and known[1].names == names:
            held = known[1]  # and its encoded form
        else:
            held = Held(names, self._state.revision)
            holder.bytes += _union_bytes(names)
            holder.bytes -= _union_bytes(known[1].names) if known is not None else 0
        holder.unions[audience] = (self._generation, held)
        self._holders.put(_holder_key(subject), holder, holder.bytes)
        return held

    async def _read(self, subject: str, audience: str) -> Held | None:
        """Reads what is missing; None where a change overtook a read."""
        key = _holder_key(subject)
        holder = self._holders.get(key)
        if holder is None:
            await self._reads(key, partial(self._read_holder, key, subject), call, subject)
            holder = self._holders.get(key)
        for role_key, uid in holder.roles(audience) if holder is not None else ():
            if uid not in (self._roles.get(role_key) or {}):
                await self._reads(role_key, partial(self._read_role, role_key, uid), call, uid)
        return self.at_hand(subject, audience)

    async def _read_holder(self, key: bytes, subject: str) -> "_Keep":
        read = partial(self._store.assignments_of, subject)
        holder = _Holder(await self._applied(RowKind.HOLDER, key, subject, read))
        return lambda: self._holders.put(key, holder, holder.bytes)

    async def _read_role(self, key: bytes, uid: str) -> "_Keep":
        read = partial(self._store.role_by_uid, uid)
        found = await self._applied(RowKind.ROLE, key, uid, read)
        role = _by_resource(found.permissions if found is not None else ())

        def keep() -> None:
            roles = {**(self._roles.get(key) or {}), uid: role}
            self._roles.put(key, roles, sum(map(_role_bytes, roles.values())))

        return keep

    async def _applied(
        self, kind: RowKind, key: bytes, name: str, read: Callable[[], Awaitable[tuple[int, T]]]
    ) -> T:
        """A row, once what the database knew with it is applied.

        Raises AuthError STORE_UNAVAILABLE where a database answers that is older than what is
        applied, or newer than what can be.
        """
        begun = self._state.revision
        head, row = await self._share(kind, key, name, read)
        if head > self._state.revision:
            await self._reach(head)
        if not begun <= head <= self._state.revision:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="feed and database differ")
        return row


_Keep = Callable[[], None]


@lru_cache(maxsize=2**16)  # the same subjects come again and again
def _holder_key(subject: str) -> bytes:
    return marker_key(MarkerKind.PERMISSIONS_CHANGED, subject)


@lru_cache(maxsize=2**12)
def _role_key(role_id: str) -> bytes:
    return marker_key(MarkerKind.ROLE_CHANGED, role_id)


def _by_resource(permissions: Iterable[PermissionRef]) -> _Role:
    found: dict[str, set[str]] = {}
    for ref in permissions:
        found.setdefault(ref.resource_id, set()).add(ref.name)
    return {resource_id: frozenset(names) for resource_id, names in found.items()}


def _union_bytes(names: Iterable[str]) -> int:
    """With the encoded form."""
    return _UNION_BYTES + sum(_NAME_BYTES // 2 + len(name) for name in names)


def _role_bytes(role: _Role) -> int:
    held = (len(at) + sum(_NAME_BYTES + len(name) for name in names) for at, names in role.items())
    return _ENTRY_BYTES + sum(_HOLDING_BYTES + each for each in held)
