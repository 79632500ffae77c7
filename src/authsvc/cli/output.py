"""What commands of the CLI print, and how they end."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from inspect import Parameter, signature
from typing import Annotated, Any, Concatenate, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

PLAIN_COLUMNS = 10_000
"""Width where nobody looks: no line is ever wrapped."""
TEXT_COLUMNS = 16
"""Least width of a text in a table; on a narrower terminal its lines are left to wrap."""


class Exit(IntEnum):
    """How a command ends."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    NOT_FOUND = 4
    CONFLICT = 5
    UNAVAILABLE = 6
    NOT_ACTIVE = 7
    NOT_IMPLEMENTED = 8
    PROBLEMS = 9


EXITS: Mapping[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILED: "internal, or anything else",
    Exit.USAGE: "wrong usage, setting or argument (apply --dry-run: something would change)",
    Exit.REFUSED: "refused: not authenticated, or not permitted (migrate --check: behind)",
    Exit.NOT_FOUND: "no such object",
    Exit.CONFLICT: "conflict: exists already, or the state does not allow it",
    Exit.UNAVAILABLE: "unavailable: try again",
    Exit.NOT_ACTIVE: "token validate, token explain: the token is not active",
    Exit.NOT_IMPLEMENTED: "this server cannot do that yet",
    Exit.PROBLEMS: "doctor: there are problems",
}
EXIT_OF_CODE: Mapping[str, Exit] = {
    "INVALID_ARGUMENT": Exit.USAGE,
    "UNAUTHENTICATED": Exit.REFUSED,
    "PERMISSION_DENIED": Exit.REFUSED,
    "NOT_FOUND": Exit.NOT_FOUND,
    "ALREADY_EXISTS": Exit.CONFLICT,
    "FAILED_PRECONDITION": Exit.CONFLICT,
    "ABORTED": Exit.CONFLICT,
    "OUT_OF_RANGE": Exit.CONFLICT,
    "UNAVAILABLE": Exit.UNAVAILABLE,
    "DEADLINE_EXCEEDED": Exit.UNAVAILABLE,
    "RESOURCE_EXHAUSTED": Exit.UNAVAILABLE,
    "UNIMPLEMENTED": Exit.NOT_IMPLEMENTED,
}
"""By gRPC status code; every other one is FAILED."""

HINTS: Mapping[str, str] = {
    "ALREADY_EXISTS": "look at what is there: authsvc resource list, users list, roles list",
    "API_KEY_NOT_FOUND": "authsvc api-key list tells the ids",
    "AUTH_METHOD_NOT_REGISTERED": "authsvc client show CLIENT_ID tells what it registered",
    "CALLER_UNKNOWN": "show another certificate: --as NAME, or --cert and --key;"
    " a new client needs `client register` and `client approve` first",
    "CLIENT_AUTHENTICATION_FAILED": "show the certificate of the client itself (--as NAME), or its"
    " secret (--client-secret-stdin); is --client-id right?",
    "CLIENT_EXPIRED": "register it anew: authsvc client register",
    "CLIENT_NOT_FOUND": "authsvc client list tells the ids",
    "CLIENT_PENDING": "an administrator lets it in: authsvc client approve CLIENT_ID",
    "CLIENT_REJECTED": "a rejection is for good; register it anew: authsvc client register",
    "CLIENT_STATE_CONFLICT": "authsvc client show CLIENT_ID tells its state",
    "CLIENT_SUSPENDED": "an administrator lets it in again: authsvc client resume CLIENT_ID",
    "COMMIT_UNKNOWN": "look first whether it was done, then try again",
    "ETAG_MISMATCH": "look again (show, or get), then use the new etag",
    "GRANT_NOT_FOUND": "it is over already, or never was",
    "INITIAL_ACCESS_TOKEN_NOT_FOUND": "authsvc registration-token list tells the ids",
    "INSUFFICIENT_SCOPE": "ask an administrator, or be one: --as admin in the development PKI",
    "INVALID_CLIENT_METADATA": "authsvc client register --help; the scopes that there are:"
    " authsvc resource list",
    "INVALID_GRANT": "what was shown is wrong, used up or over; which of these is not said",
    "INVALID_TARGET": "authsvc resource list tells the resources and their scopes",
    "PASSWORD_NOT_ACCEPTED": "choose another: longer, and none that is known",
    "PEER_CERTIFICATE_EXPIRED": "a new certificate of the development PKI: authsvc pki issue NAME",
    "PEER_CERTIFICATE_INVALID": "show a client certificate of the server's CA: --as NAME",
    "PERMISSION_NOT_FOUND": "authsvc permission list tells what there is",
    "REGISTRATION_NOT_ALLOWED": "a peer registers the name in its own certificate (--san-uri …);"
    " all else is for administrators: --as admin in the development PKI",
    "REGISTRATION_TOKEN_INVALID": "an administrator makes initial access tokens (authsvc"
    " registration-token create); the token of a client that is gone, or was cut off, is none any"
    " more",
    "REQUEST_ID_REUSED": "another --request-id, or the same request as before",
    "RESOURCE_NOT_FOUND": "authsvc resource list tells the ids",
    "ROLE_NOT_FOUND": "authsvc role list tells the ids",
    "SCOPE_NOT_ALLOWED": "authsvc client show CLIENT_ID tells its scopes",
    "SCOPE_UNKNOWN": "authsvc resource list tells the scopes that there are",
    "SESSION_NOT_FOUND": "it is over already, or never was",
    "SIGNING_KEY_NOT_FOUND": "authsvc key list tells the ids",
    "SIGNING_KEY_NOT_READY": "wait until then; a stolen key is not waited for: authsvc key taint",
    "SIGNING_KEY_STATE_CONFLICT": "authsvc key list tells which key is next and which signs",
    "STATE_STALE": "try again; the server's log tells why it lost its database",
    "STORE_UNAVAILABLE": "is the database up, and are its name, user and password right?",
    "SUBJECT_NOT_FOUND": "authsvc client list and authsvc user list tell the ids",
    "TOKEN_NOT_OWNED": "revoke it as its client (--as NAME), or as an administrator by --jti"
    " (authsvc token inspect tells it)",
    "USER_NOT_FOUND": "authsvc user list tells the ids; they are not the names",
    "USER_STATE_CONFLICT": "authsvc user show USER_ID tells its state",
}
"""What to do, by reason."""
PORTS_HINT = "end it, or choose other ports: --port, --metrics-port, --health-port (0: any)"


class Failure(Exception):
    """An expected failure: what, and what to do about it. Never holds a secret."""

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        code: str = "INVALID_ARGUMENT",
        reason: str = "",
        violations: Iterable[tuple[str, str]] = (),
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        """`code` is a gRPC status code's name; `violations` are fields and what is wrong."""
        super().__init__(message)
        self.message, self.hint = message, hint or HINTS.get(reason, "")
        self.code, self.reason = code, reason
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.request_id, self.retry_after_s = request_id, retry_after_s
        self.exit = EXIT_OF_CODE.get(code, Exit.FAILED)

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint,
            "violations": [{"field": f, "description": text} for f, text in self.violations],
            "metadata": self.metadata,
            "request_id": self.request_id,
            "retry_after_seconds": self.retry_after_s,
        }


def shown(text: object) -> str:
    """Text of others for a terminal: what would move its cursor or hide is escaped."""
    if isinstance(text, str):
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return str(text)


def moment(seconds: float, now: float) -> str:
    """A time for people: absolute, and how far away it is."""
    away = abs(seconds - now)
    unit, size = next(
        (
            (unit, size)
            for unit, size in (("d", 86400), ("h", 3600), ("min", 60))
            if away >= 2 * size
        ),
        ("s", 1),
    )
    far = f"in {away / size:.0f} {unit}" if seconds > now else f"{away / size:.0f} {unit} ago"
    if away < 1:
        far = "now"
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC ({far})"
    except (ValueError, OverflowError, OSError):
        return str(seconds)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; an id is never wrapped."""

    name: str
    is_id: bool = False


class Output:
    """Data go to standard output, all else to standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self.json = as_json
        self._data, self._notes = _console(sys.stdout), _console(sys.stderr)

    def document(self, document: Any) -> None:
        """One JSON document, of plain data or of a protobuf message (with snake_case names)."""
        typer.echo(json.dumps(plain(document), indent=2, ensure_ascii=False))

    def raw(self, text: str) -> None:
        """A line exactly as it is."""
        typer.echo(text)

    def title(self, text: str, style: str = "bold") -> None:
        """A line of data that stands above the rest."""
        self._line(self._data, Text(shown(text), style))

    def pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Keys and values, one a line, a value of many under each other; empty ones left out."""
        kept = [(key, value) for key, value in pairs if value not in ("", None, [], ())]
        width = max((len(key) for key, _ in kept), default=0)
        for key, value in kept:
            for at, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                text = item if isinstance(item, Text) else Text(shown(item))
                head = f"  {'' if at else key:<{width}}  "
                self._line(self._data, Text.assemble((head, "dim"), text))

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
        """Rows under a head; long texts are wrapped on a terminal, ids never."""
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        cells = [[c if isinstance(c, Text) else Text(shown(c)) for c in row] for row in rows]
        widths = [
            max([len(column.name), *(row[at].cell_len for row in cells)])
            for at, column in enumerate(columns)
        ]
        least = sum(
            2 + (width if column.is_id else min(width, TEXT_COLUMNS))
            for column, width in zip(columns, widths, strict=True)
        )
        fits = least <= self._data.width
        for column, width in zip(columns, widths, strict=True):
            rigid = column.is_id or not fits
            table.add_column(column.name, no_wrap=rigid, min_width=width if rigid else None)
        for row in cells:
            table.add_row(*row)
        if fits and self._data.is_terminal:
            self._data.print(table)
            return
        self._data.width = PLAIN_COLUMNS
        with self._data.capture() as captured:
            self._data.print(table)
        for line in captured.get().splitlines():
            typer.echo(line.rstrip())

    def note(self, text: str, style: str = "") -> None:
        """A line for the person at the terminal; programs do not get it."""
        if not self.json:
            self._line(self._notes, Text(shown(text), style))

    @contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[Callable[[float, str], None]]:
        """How far something is, on a terminal; gone at the end."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        off = self.json or not self._notes.is_terminal
        with Progress(*columns, console=self._notes, transient=True, disable=off) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, told: bar.update(task, completed=done, description=told)

    def steps(self, *commands: str) -> None:
        """What one would do next, to be copied."""
        if not self.json:
            for at, command in enumerate(commands):
                head = "       " if at else "next:  "
                self._line(self._notes, Text.assemble((head, "dim"), (shown(command), "cyan")))

    def fail(self, failure: Failure) -> None:
        """Says what failed and what to do about it."""
        if self.json:
            typer.echo(json.dumps(failure.document(), ensure_ascii=False), err=True)
            return
        suffix = f" ({failure.reason})" if failure.reason else ""
        told = shown(failure.message) + suffix
        self._line(self._notes, Text.assemble(("error: ", "bold red"), told))
        for field, text in failure.violations:
            if text not in failure.message:
                self._line(self._notes, Text(f"  {shown(field)}: {shown(text)}"))
        if failure.hint:
            self._line(self._notes, Text.assemble(("hint:  ", "bold"), shown(failure.hint)))

    def _line(self, console: Console, text: Text) -> None:
        """Not wrapped by us: what a terminal wraps itself is copied whole."""
        console.print(text, soft_wrap=True, highlight=False)


def _console(file: Any) -> Console:
    console = Console(file=file, highlight=False, emoji=False, markup=False)
    return console if console.is_terminal else Console(file=file, width=PLAIN_COLUMNS)


def plain(document: Any) -> Any:
    """A protobuf message, or what holds some, as JSON values."""
    if isinstance(document, dict):
        return {key: plain(value) for key, value in document.items()}
    if isinstance(document, list):
        return [plain(item) for item in document]
    if hasattr(document, "DESCRIPTOR"):
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(
            document, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    return document


Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@contextmanager
def reporting(as_json: Json = False) -> Iterator[Output]:
    """Turns what is raised into a message and an exit code."""
    out = Output(as_json=as_json)
    try:
        yield out
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        failure = explained(error)
        if failure.exit is Exit.FAILED and os.environ.get("AUTHSVC_DEBUG"):
            raise
        out.fail(failure)
        raise typer.Exit(failure.exit) from error


def explained(error: Exception) -> Failure:
    """The failure that an exception is; text that may hold secrets is left out."""
    if isinstance(error, Failure):
        return error
    modules = ("authsvc_client.errors", "authsvc.errors", "authsvc.app")
    client, server, app = map(sys.modules.get, modules)
    if client is not None and isinstance(error, client.AuthsvcError):
        return Failure(
            error.message,
            _incident(error.metadata),
            code=error.code.name,
            reason=error.reason_name,
            violations=[(violation.field, violation.description) for violation in error.violations],
            metadata=error.metadata,
            request_id=error.request_id,
            retry_after_s=error.retry_after_s,
        )
    if server is not None and isinstance(error, server.AuthError):
        text = error.text
        root = error.__cause__
        while root is not None and root.__cause__ is not None:
            root = root.__cause__
        if root is not None:
            text += f": {type(root).__name__}"
        return Failure(text, code=error.rule.code.name, reason=error.reason.name)
    if app is not None and isinstance(error, app.StartError):
        return Failure(str(error), PORTS_HINT if str(error).startswith("cannot listen") else "")
    if isinstance(error, FileNotFoundError):
        return Failure(f"no such file: {error.filename}", code="NOT_FOUND")
    if isinstance(error, FileExistsError):
        return Failure(str(error), code="ALREADY_EXISTS")
    if isinstance(error, OSError):
        return Failure(f"{error.filename or 'system'}: {error.strerror}", code="UNKNOWN")
    return Failure(
        f"unexpected {type(error).__name__}",
        "this should not happen; AUTHSVC_DEBUG=1 shows where it does",
        code="INTERNAL",
    )


def _incident(metadata: Mapping[str, str]) -> str:
    incident = metadata.get("incident")
    return f"the server's log tells more, at incident {incident}" if incident else ""


def command(
    group: typer.Typer,
    shared: Callable[..., AbstractContextManager[T]],
    **settings: Any,
) -> Callable[[Callable[Concatenate[T, ...], None]], Callable[Concatenate[T, ...], None]]:
    """Adds a command that has the options of `shared` too, and gets what `shared` opens."""

    def decorate(function: Callable[Concatenate[T, ...], None]) -> Any:
        common = signature(shared).parameters.values()
        own = list(signature(function).parameters.values())[1:]

        def run(**values: Any) -> None:
            with shared(**{each.name: values.pop(each.name) for each in common}) as opened:
                function(opened, **values)

        taken = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*own, *common)]
        run.__dict__["__signature__"] = inspect.Signature(taken)
        run.__annotations__ = {each.name: each.annotation for each in taken}
        run.__doc__ = function.__doc__
        group.command(**{"name": function.__name__, **settings})(run)
        return function

    return decorate
