"""What the doctor finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

LOOK = "this user must be able to look at it"


class Outcome(StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and what to do. Never holds a secret."""

    check: str
    outcome: Outcome
    looked_at: str
    found: str
    advice: str = ""


class Report:
    """The findings of one target, in their order."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.findings: list[Finding] = []

    def ok(self, check: str, looked_at: object, found: str) -> None:
        """Nothing to do."""
        self._add(check, Outcome.OK, looked_at, found, "")

    def warning(self, check: str, looked_at: object, found: str, advice: str) -> None:
        """It works, and somebody should know."""
        self._add(check, Outcome.WARNING, looked_at, found, advice)

    def problem(self, check: str, looked_at: object, found: str, advice: str) -> None:
        """It does not work, or not safely."""
        self._add(check, Outcome.PROBLEM, looked_at, found, advice)

    def skipped(self, check: str, looked_at: object, found: str) -> None:
        """There is nothing to look at."""
        self._add(check, Outcome.NOT_APPLICABLE, looked_at, found, "")

    @contextmanager
    def running(self, check: str, looked_at: object, advice: str = LOOK) -> Iterator[None]:
        """A check that cannot run is a problem with its cause."""
        try:
            yield
        except Exception as error:
            self.problem(check, looked_at, f"could not be looked at ({cause(error)})", advice)

    def has_problems(self) -> bool:
        """Whether any was found so far."""
        return any(finding.outcome is Outcome.PROBLEM for finding in self.findings)

    def _add(
        self, check: str, outcome: Outcome, looked_at: object, found: str, advice: str
    ) -> None:
        name = f"{self.target}.{check}"
        self.findings.append(Finding(name, outcome, str(looked_at), found, advice))


def root(error: BaseException) -> BaseException:
    """What an error came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def cause(error: BaseException) -> str:
    """The type of what an error came from; its text may hold secrets, but that of the system."""
    first = root(error)
    name = type(first).__name__
    if isinstance(first, OSError) and first.strerror:
        return f"{name}: {first.strerror}"
    return name
