"""The id by which one request is followed through services and their logs."""

import os
import re
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from .errors import REQUEST_ID_KEY

_is_good = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_current: ContextVar[str] = ContextVar("authsvc_request_id", default="")


def request_id() -> str:
    """Of the call that is being served behind a RequireInterceptor, for its log; empty outside of
    one. Calls to authsvc, and those with a bearer token, carry it on by themselves."""
    return _current.get()


def begin(context: Any) -> str:
    """Serves a call under the id that it came with, or under a new one."""
    given = {str(key): value for key, value in context.invocation_metadata() or ()}
    found = given.get(REQUEST_ID_KEY, "")
    chosen = found if isinstance(found, str) and _is_good(found) else _new()
    _current.set(chosen)
    return chosen


def header(metadata: Iterable[Any] | None = None) -> tuple[tuple[str, str], ...]:
    """What a call sends beside its own metadata, unless these name an id."""
    if any(key.lower() == REQUEST_ID_KEY for key, _ in metadata or ()):
        return ()
    return ((REQUEST_ID_KEY, _current.get() or _new()),)


def _new() -> str:
    return os.urandom(16).hex()
