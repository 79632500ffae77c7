"""What to do while nobody can say whether a token was revoked."""

from dataclasses import dataclass

from .core.markers import ACCESS_TOKEN_LIFETIME_S_MAX


@dataclass(frozen=True, slots=True)
class WhenStale:
    """What to do while authsvc could not confirm the state for longer than allowed."""

    remote: bool = False
    """Ask authsvc for each token."""
    open_s: float = 0.0
    """Go by a state of at most this age, in seconds, instead."""

    def __post_init__(self) -> None:
        """Raises ValueError for a time longer than any token lives."""
        if not 0 <= self.open_s <= ACCESS_TOKEN_LIFETIME_S_MAX:
            raise ValueError(f"open_s: not within 0 and {ACCESS_TOKEN_LIFETIME_S_MAX}")

    def stricter(self, other: "WhenStale") -> "WhenStale":
        """Of two that apply, what both allow."""
        return WhenStale(self.remote and other.remote, min(self.open_s, other.open_s))


CLOSED = WhenStale()
"""Refuse."""
REMOTE = WhenStale(remote=True)


def open_for(seconds: float) -> WhenStale:
    """Goes on for so long: a token revoked meanwhile is taken for live."""
    return WhenStale(open_s=seconds)
