"""A cache bounded by bytes, cheap enough for the hot path."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BytesCache(Generic[K, V]):
    """Two generations: what was not used while the young one filled up is dropped.

    As good as least-recently-used here, without its bookkeeping on every hit.
    """

    __slots__ = ("_half", "_old", "_young", "_young_bytes")

    def __init__(self, bytes_max: int) -> None:
        self._half = bytes_max // 2
        self.clear()

    def clear(self) -> None:
        """Drops everything."""
        self._young: dict[K, tuple[V, int]] = {}
        self._old: dict[K, tuple[V, int]] = {}
        self._young_bytes = 0

    def get(self, key: K) -> V | None:
        """The value, or None."""
        entry = self._young.get(key)
        if entry is not None:
            return entry[0]
        entry = self._old.get(key)
        if entry is None:
            return None
        self.put(key, *entry)
        return entry[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keeps a value of `size` bytes, its key included, unless it is too big."""
        if size > self._half:
            self.drop(key)
            return
        if self._young_bytes + size > self._half:
            self._old, self._young, self._young_bytes = self._young, {}, 0
        previous = self._young.get(key)
        self._young_bytes += size - (previous[1] if previous else 0)
        self._young[key] = (value, size)

    def drop(self, key: K) -> None:
        """Forgets a key."""
        entry = self._young.pop(key, None)
        if entry is not None:
            self._young_bytes -= entry[1]
        self._old.pop(key, None)

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())
