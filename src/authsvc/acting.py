"""Who acts: what the audit says of the cause of a change, wherever the change is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

ITSELF = "authsvc"
"""The actor of what authsvc does by itself."""


@dataclass(frozen=True, slots=True)
class Act:
    """One call, or one thing that authsvc does by itself."""

    action: str
    """Name of the RPC, or of what is done."""
    actor: str = ITSELF
    """Empty where nobody could be told."""
    on_behalf_of: str = ""
    peer: str = ""
    """Identity in the peer's certificate."""
    address: str = ""
    comment: str = ""
    fields: tuple[str, ...] = ()
    """Those that an update names."""
    request_id: str = ""


_under_way: ContextVar[Callable[[], Act]] = ContextVar("act", default=lambda: Act(""))


def act() -> Act:
    """What is under way in this task; without an action where nobody said."""
    return _under_way.get()()


def begin(acting: Callable[[], Act]) -> None:
    """Says what this task does from here on, and what it starts; asked only where it is written."""
    _under_way.set(acting)


@contextmanager
def by_itself(action: str) -> Iterator[None]:
    """What authsvc does by itself."""
    found = Act(action)
    token = _under_way.set(lambda: found)
    try:
        yield
    finally:
        _under_way.reset(token)
