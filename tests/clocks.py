"""Time for tests."""


class HandClock:
    """A clock that moves only by hand (authsvc.clock.Clock)."""

    def __init__(self, wall: float = 1_800_000_000.0, boot: float = 1000.0) -> None:
        self._wall = wall
        self._boot = boot

    def wall(self) -> float:
        return self._wall

    def boot(self) -> float:
        return self._boot

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self._wall += seconds
        self._boot += seconds

    def set_wall(self, wall: float) -> None:
        """Sets the wall clock, as an operator or NTP does; elapsed time knows nothing of it."""
        self._wall = wall
