"""Users out of a CSV file: read as a stream, sent in batches, refused line by line."""

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from authsvc.cli.calls import Session, named
from authsvc.cli.output import Column, Exit, Failure
from authsvc.oauth.usernames import username_key

COLUMNS = ("username", "display_name", "email", "password")
BATCH = 20
"""Rows of a call, of which every password is hashed: seconds, where a call may take 30."""
TIMEOUT_S = 30.0
FIELD_CHARS_MAX = 4096
"""Longer than any field may be; keeps a batch below the largest message."""
LINE_BYTES_MAX = 2**20
REFUSALS_SHOWN, NAME_CHARS_SHOWN = 50, 40

AGAIN = frozenset(("RATE_LIMITED", "STORE_UNAVAILABLE", "COMMIT_UNKNOWN", "DEADLINE_EXCEEDED"))
"""A row may be sent again: what is there with the same fields is left as it is."""
TRIES_MAX = 8
"""In a row that bring nothing."""
WAIT_S, WAIT_S_MAX = 0.5, 4.0


@dataclass(frozen=True, slots=True)
class Row:
    """A user to import."""

    line: int
    fields: dict[str, str] = field(repr=False)

    @property
    def username(self) -> str:
        """Its name."""
        return self.fields["username"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a line was not imported; holds no password."""

    line: int
    username: str
    reason: str
    message: str


REPORT_COLUMNS = tuple(Refusal.__slots__)


def import_users(
    session: Session,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.csv",
            help=f"CSV in UTF-8, its first line names the columns: {', '.join(COLUMNS)};"
            " username alone is required.",
        ),
    ],
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Write the refused lines there, as CSV: {', '.join(REPORT_COLUMNS)}.",
        ),
    ] = None,
) -> None:
    """Create the users of a CSV file; exit code 1 where lines were refused.

    It may be run again, also where it was stopped half-way: who is there already with the same
    fields is left alone, password and all.
    """
    with file.open("rb") as source, _reported(file, report) as tell:
        rows = read(source, str(file))
        importing = _Import(session, tell)
        size = file.stat().st_size if file.is_file() else None
        try:
            with session.out.progress("importing", size) as advance:
                while batch := list(islice(rows, BATCH)):
                    importing(batch)
                    advance(source.tell() if size else 0, f"line {batch[-1].line}")
        finally:
            importing.summary(report)
    if importing.refused:
        raise typer.Exit(Exit.FAILED)


@contextmanager
def _reported(file: Path, report: Path | None) -> Iterator[Callable[[Refusal], None]]:
    """Writes refusals into a file, each at once: an import may be stopped."""
    if report is None:
        yield lambda _refusal: None
        return
    if report.exists() and report.samefile(file):
        raise Failure("--report: this is the file to import")
    with report.open("w", encoding="utf-8", newline="") as target:
        writer = csv.DictWriter(target, REPORT_COLUMNS)
        writer.writeheader()

        def tell(refusal: Refusal) -> None:
            writer.writerow(asdict(refusal))
            target.flush()

        yield tell


def read(file: BinaryIO, name: str) -> Iterator[Row | Refusal]:
    """The rows of a file, and the lines that are none. Raises Failure where its head is wrong."""
    reader = csv.reader(_lines(file, name), strict=True)
    try:
        columns = [column.strip() for column in next(reader, ())]
    except csv.Error as error:
        raise Failure(f"{name}: line 1: {error}", "it must be CSV") from error
    hint = f"the first line names the columns: {', '.join(COLUMNS)}"
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise Failure(f"{name}: unknown column: {_clean(unknown[0])}", hint)
    if "username" not in columns:
        raise Failure(f"{name}: there is no column username", hint)
    if len(set(columns)) != len(columns):
        raise Failure(f"{name}: a column is there twice", hint)
    return _rows(reader, columns, name)


def _rows(reader: Any, columns: list[str], name: str) -> Iterator[Row | Refusal]:
    seen: dict[str, int] = {}
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise Failure(
                f"{name}: line {line}: {error}", "what stands before it may be imported already"
            ) from error
        if values is None:
            return
        if not values:  # an empty line
            continue
        fields = dict(zip(columns, values, strict=False))
        username = _clean(fields.get("username", ""))
        wrong = _wrong(values, fields, len(columns))
        first = seen.setdefault(username_key(username), line)
        if wrong:
            yield Refusal(line, username[:FIELD_CHARS_MAX], "FIELD_INVALID", wrong)
        elif first != line:
            yield Refusal(line, username, "ALREADY_EXISTS", f"the username is that of line {first}")
        else:
            yield Row(line, fields)


def _wrong(values: list[str], fields: dict[str, str], columns: int) -> str:
    """What keeps a line from being sent at all."""
    if len(values) != columns:
        return f"it has {len(values)} fields, the first line {columns}"
    if not fields["username"]:
        return "username is empty"
    for column, value in fields.items():
        if len(value) > FIELD_CHARS_MAX:
            return f"{column} is longer than {FIELD_CHARS_MAX}"
        if _clean(value) != value:
            return f"{column} is no UTF-8"
    return ""


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines of text; bytes that are none stay recognizable."""
    at = 0
    while raw := file.readline(LINE_BYTES_MAX):
        at += 1
        if len(raw) == LINE_BYTES_MAX:
            raise Failure(f"{name}: line {at} is too long")
        if at == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        yield raw.decode("utf-8", "surrogateescape")


def _clean(text: str) -> str:
    """Without what `_lines` found to be no text."""
    return text.encode("utf-8", "replace").decode()


class _Import:
    """Sends batches and counts what became of them."""

    def __init__(self, session: Session, tell: Callable[[Refusal], None]) -> None:
        from authsvc_client.v1.users_pb2_grpc import UserServiceStub

        timeout_s = max(TIMEOUT_S, session.timeout_s)
        self._session = replace(session, timeout_s=timeout_s)
        self._method = UserServiceStub(session.channel).ImportUsers
        self._tell = tell
        self._refusals: list[Refusal] = []
        self._created = self._existing = self.refused = 0

    def __call__(self, batch: list[Row | Refusal]) -> None:
        """All rows of it are imported or refused at the return."""
        refusals = [each for each in batch if isinstance(each, Refusal)]
        left, tries = [each for each in batch if isinstance(each, Row)], 0
        while left:
            again, wait_s = [], None
            try:
                results = self._send(left)
            except Exception as error:
                if not _is_passing(error) or tries == TRIES_MAX:
                    raise
                again, wait_s = left, getattr(error, "retry_after_s", None)
            else:
                for row, result in zip(left, results, strict=True):
                    refusal = self._count(row, result)
                    if refusal is None:
                        continue
                    if refusal.reason in AGAIN and tries < TRIES_MAX:
                        again.append(row)
                    else:
                        refusals.append(refusal)
            tries = tries + 1 if len(again) == len(left) else 0
            left = again
            if left:
                time.sleep(wait_s or min(WAIT_S * 2**tries, WAIT_S_MAX))
        for refusal in sorted(refusals, key=lambda each: each.line):
            self._refuse(refusal)

    def _send(self, rows: list[Row]) -> Any:
        from authsvc_client.v1 import users_pb2

        sent = [users_pb2.ImportUsersRow(**row.fields) for row in rows]
        request = users_pb2.ImportUsersRequest(rows=sent)
        return self._session.call(self._method, request).results

    def _count(self, row: Row, result: Any) -> Refusal | None:
        from authsvc_client.v1.error_reason_pb2 import ErrorReason

        if result.WhichOneof("result") == "user":
            self._created += result.created
            self._existing += not result.created
            return None
        reason = named(ErrorReason, result.error.reason, "ERROR_REASON_")
        return Refusal(row.line, row.username, reason, result.error.message)

    def _refuse(self, refusal: Refusal) -> None:
        self.refused += 1
        self._tell(refusal)
        if self._session.out.json or len(self._refusals) < REFUSALS_SHOWN:
            self._refusals.append(refusal)

    def summary(self, report: Path | None) -> None:
        """What became of the lines so far."""
        out = self._session.out
        counts = {"created": self._created, "existing": self._existing, "refused": self.refused}
        if out.json:
            return out.document(counts | {"refusals": [asdict(each) for each in self._refusals]})
        if self._refusals:
            columns = [Column("LINE", is_id=True), Column("USERNAME"), Column("REASON", is_id=True)]
            out.table(
                [*columns, Column("MESSAGE")],
                [
                    (each.line, _short(each.username), each.reason, each.message)
                    for each in self._refusals
                ],
            )
        out.pairs(
            (
                ("created", self._created),
                ("there already", self._existing),
                ("refused", self.refused),
            )
        )
        hidden = self.refused - len(self._refusals)
        if report is not None and self.refused:
            return out.note(f"all refused lines: {report}")
        if hidden:
            return out.note(f"{hidden} more lines were refused: --report FILE tells all")
        return None


def _short(text: str) -> str:
    return text if len(text) <= NAME_CHARS_SHOWN else f"{text[: NAME_CHARS_SHOWN - 1]}…"


def _is_passing(error: Exception) -> bool:
    """Whether a call may go well later."""
    from authsvc_client import errors

    if isinstance(error, Failure):  # nobody answered
        return error.code == "UNAVAILABLE"
    kinds = (errors.Unavailable, errors.ResourceExhausted, errors.DeadlineExceeded)
    return isinstance(error, kinds)
