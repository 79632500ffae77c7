"""Commands that call a server: client, resource, token, key."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from authsvc.cli.output import Exit, Failure, Json, Output, moment, reporting

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    import grpc
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

    from authsvc_client import Certificates

ADDRESS = "127.0.0.1:7443"
PAGE_SIZE_MAX = 200

Limit = Annotated[int, typer.Option(min=1, metavar="N", help="Most to list.", show_default="all")]
ALL = 10**9
Comment = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the audit.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what would die; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without a question.")]
Scopes = Annotated[
    list[str] | None,
    typer.Option(
        "--scope", metavar="SCOPE", help="Scope; may be repeated, or hold many with spaces between."
    ),
]


def _certificates(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the pairs in the PKI of the state directory, for the shell."""
    given = context.params.get("state_dir") or os.environ.get("AUTHSVC_STATE_DIR")
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    found = (Path(given) if given else base / "authsvc").glob("pki/*-key.pem")
    names = sorted(each.name.removesuffix("-key.pem") for each in found)
    return [name for name in names if name != "ca" and name.startswith(incomplete)]


As = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="NAME",
        envvar="AUTHSVC_AS",
        help="Whose certificate to show: NAME.pem of the PKI in the state directory.",
        autocompletion=_certificates,
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="AUTHSVC_CERT", help="Certificate to show, instead."),
]
Key = Annotated[Path | None, typer.Option(metavar="FILE", envvar="AUTHSVC_KEY", help="Its key.")]
Ca = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="AUTHSVC_CA",
        help="CA of the server's certificate.",
        show_default="ca.pem of that PKI",
    ),
]
ServerName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        envvar="AUTHSVC_SERVER_NAME",
        help="DNS name in the server's certificate, where the address is another.",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="AUTHSVC_STATE_DIR",
        help="State directory of the server, for its PKI.",
        show_default="$XDG_STATE_HOME/authsvc",
    ),
]


TLS_FAILURES = {
    "CERTIFICATE_VERIFY_FAILED": (
        "the server's certificate is not by a CA that is trusted here",
        "name its CA: --ca FILE; or the server's state directory: --state-dir",
    ),
    "WRONG_VERSION_NUMBER": (
        "this port does not speak TLS",
        "the gRPC port is the one that authsvc serve tells first: 7443 by default",
    ),
    "Hostname Verification": (
        "the server's certificate does not have this name",
        "name one that it has: --server-name NAME",
    ),
}
"""What gRPC says, and what it means."""


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to a server, and where answers go."""

    out: Output
    channel: "grpc.Channel"
    address: str
    timeout_s: float
    now: float

    def call(self, method: Callable[..., Any], request: Any) -> Any:
        """The response. Raises AuthsvcError, or Failure where nobody answers."""
        import grpc

        from authsvc_client.errors import AuthsvcError, Unavailable

        try:
            return method(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            known = AuthsvcError.from_rpc_error(error)
            if isinstance(known, Unavailable) and not known.reason_name:
                raise _unreachable(self.address, known.message) from error
            raise known from error

    def pages(self, method: Callable[..., Any], request: Any, field: str, limit: int) -> Any:
        """The responses of all pages in one, with at most `limit` items."""
        whole: Any = None
        while True:
            left = limit - (len(getattr(whole, field)) if whole is not None else 0)
            request.page_size = min(PAGE_SIZE_MAX, left)
            page = self.call(method, request)
            if whole is None:
                whole = page
            else:
                getattr(whole, field).extend(getattr(page, field))
                whole.next_page_token = page.next_page_token
            request.page_token = whole.next_page_token
            if not whole.next_page_token or len(getattr(whole, field)) >= limit:
                return whole


@contextmanager
def connected(
    address: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", envvar="AUTHSVC_ADDRESS", help="The server."),
    ] = ADDRESS,
    as_: As = "admin",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    server_name: ServerName = None,
    state_dir: StateDir = None,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="Longest time of a call."),
    ] = 10.0,
    as_json: Json = False,
) -> Iterator[Session]:
    """A channel with mTLS by the options of a command."""
    with reporting(as_json) as out:
        files = files_of(as_, cert, key, ca, state_dir)
        from authsvc.clock import SystemClock
        from authsvc_client import sync_channel

        certificates = read_certificates(files)
        # A service of the own network is not behind the proxy of the environment.
        options = (("grpc.enable_http_proxy", 0),)
        channel = sync_channel(address, certificates, server_name=server_name, options=options)
        with channel:
            yield Session(out, channel, address, timeout, SystemClock().wall())


def read_certificates(files: tuple[Path, Path, Path]) -> "Certificates":
    """What `files_of` named. Raises Failure that says what to do."""
    from authsvc_client import Certificates

    try:
        return Certificates.from_files(*files)
    except FileNotFoundError as error:
        raise Failure(
            f"there is no {error.filename}",
            "authsvc serve makes the PKI and the administrator's certificate, authsvc pki"
            " issue NAME one for --as NAME; or name files: --ca, --cert, --key",
        ) from error
    except OSError as error:
        raise Failure(f"{error.filename}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Failure(f"{files[1]} with {files[2]}: {error}") from error


def carefully(
    session: Session,
    method: Callable[..., Any],
    request: Any,
    tell: Callable[[Any, bool], None],
    question: str,
    *,
    dry_run: bool,
    yes: bool,
) -> None:
    """What cannot be undone: told first (`tell` gets the answer and whether it is a rehearsal),
    then done once a person said yes, or `yes` was said before.
    """
    out = session.out
    if not (dry_run or yes) and (out.json or not sys.stdin.isatty()):
        raise Failure("nobody is there to be asked", "look with --dry-run, then add --yes")
    if dry_run or not yes:
        rehearsal = type(request)()
        rehearsal.CopyFrom(request)
        rehearsal.validate_only = True
        tell(session.call(method, rehearsal), True)
        if dry_run or not typer.confirm(question, err=True):
            out.note("Nothing was changed.")
            if not dry_run:
                raise typer.Exit(Exit.FAILED)
            return
    tell(session.call(method, request), False)


def files_of(
    name: str, cert: Path | None, key: Path | None, ca: Path | None, state_dir: Path | None
) -> tuple[Path, Path, Path]:
    """CA, certificate and key."""
    if (cert is None) != (key is None):
        raise Failure("--cert and --key belong together")
    if cert is not None and key is not None and ca is not None:
        return ca, cert, key
    if Path(name).name != name:
        raise Failure(
            f"--as takes the name of a certificate, no path: {name}", "paths: --cert, --key"
        )
    if state_dir is None:
        from authsvc.config import default_state_dir

        state_dir = default_state_dir()
    pki = state_dir / "pki"
    return ca or pki / "ca.pem", cert or pki / f"{name}.pem", key or pki / f"{name}-key.pem"


def _unreachable(address: str, details: str) -> Failure:
    """Of a connection that gRPC could not make, or lost."""
    for sign, (message, hint) in TLS_FAILURES.items():
        if sign in details:
            return Failure(f"{address}: {message}", hint, code="UNAVAILABLE")
    last = re.sub(r".*last error: ", "", details)
    cause = re.sub(r"^\w+: (ipv[46]:\S+ )?(Failed to connect to remote host: )?", "", last)
    hint = "is it running there (authsvc serve)? another address: --address, or AUTHSVC_ADDRESS"
    if re.search(r"SSL|TLS|[Hh]andshake|certificate|reset|closed", details):
        hint = "do both sides trust the CA of the other's certificate? --ca, --as, --cert, --key"
    return Failure(f"no answer from {address}: {cause}", hint, code="UNAVAILABLE")


def words(values: Iterable[str] | None) -> list[str]:
    """Values of an option that may be repeated, or hold many with spaces between."""
    return [word for value in values or () for word in value.split()]


def secret_of_stdin(what: str) -> str:
    """A secret that nobody sees: the first line of standard input, asked for on a terminal."""
    if sys.stdin.isatty():
        asked: str = typer.prompt(what, hide_input=True, err=True)
        return asked.strip()
    text = sys.stdin.readline().strip()
    if not text:
        raise Failure(f"standard input holds no {what.lower()}")
    return text


def secret_in(file: Path, what: str) -> str:
    """A secret in a file, or on standard input where the file is `-`."""
    return secret_of_stdin(what) if str(file) == "-" else file.read_text(encoding="utf-8").strip()


def password_of(file: Path | None, what: str = "Password", *, new: bool = False) -> str:
    """A password in a file; without one, or where it is `-`, as `secret_of_stdin`.

    Spaces around it belong to it. A new one is asked for twice on a terminal.
    """
    if file is not None and str(file) != "-":
        try:
            value = file.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise Failure(f"{file}: no text in UTF-8") from error
    elif sys.stdin.isatty():
        value = typer.prompt(what, hide_input=True, err=True, confirmation_prompt=new)
    else:
        value = sys.stdin.readline().rstrip("\r\n")
    if not value or "\n" in value:
        raise Failure(f"{what.lower()}: there must be one line, in a file or on standard input")
    return value


def client_secret(from_stdin: bool) -> str:
    """The secret of a client, never an argument: other users see those of a process."""
    if from_stdin:
        return secret_of_stdin("Client secret")
    if secret := os.environ.get("AUTHSVC_CLIENT_SECRET"):
        return secret
    if file := os.environ.get("AUTHSVC_CLIENT_SECRET_FILE"):
        return Path(file).read_text(encoding="utf-8").strip()
    return ""


_SPAN = re.compile(r"(\d+)(s|m|h|d)?").fullmatch
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}


def span(text: str, option: str) -> int:
    """Seconds of `300`, `300s`, `5m`, `12h` or `90d`."""
    found = _SPAN(text)
    if found is None or len(text) > 9:
        raise Failure(f"{option}: not a span of time: {text}", "such as 300, 90s, 5m, 12h or 90d")
    return int(found[1]) * _UNITS[found[2]]


def seconds(value: "Timestamp | Duration") -> float:
    """Of a protobuf time or span."""
    return value.seconds + value.nanos / 1e9


def time_of(message: Any, field: str, now: float) -> str:
    """A time of a message, for people; empty where it is unset."""
    return moment(seconds(getattr(message, field)), now) if message.HasField(field) else ""


def named(enum: Any, number: int, prefix: str) -> str:
    """Name of an enum's value without its prefix; the number of one of a newer server."""
    try:
        name: str = enum.Name(number)
    except ValueError:
        return str(number)
    return name.removeprefix(prefix)


def more(session: Session, next_page_token: str) -> None:
    """Says where a list was cut."""
    if next_page_token:
        session.out.note("there are more: a higher --limit tells them", "dim")
