"""The server on the command line: serve and migrate."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from authsvc.cli.output import Exit, Failure, Output, command, reporting

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from pydantic import ValidationError

    from authsvc.app import App
    from authsvc.config import Settings
    from authsvc.supervise import Supervisor

MADE = (
    ("pki/ca.pem", "CA of the development PKI; its key lies beside it"),
    ("pki/server.pem", "certificate of this server"),
    ("pki/admin.pem", "certificate of the administrator, which the CLI shows"),
    ("seal.key", "encrypts what is secret in the database: back up both, together"),
    ("authsvc.db", "the database"),
)
"""What a server without configuration makes in its state directory."""

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", envvar="AUTHSVC_CONFIG", help="Settings, in TOML."),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        envvar="AUTHSVC_STATE_DIR",
        show_default="$XDG_STATE_HOME/authsvc",
        help="Directory for all that has no setting: keys, certificates, database.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    app.command()(serve)
    command(app, reporting)(migrate)


def serve(
    config: ConfigFile = None,
    state_dir: StateDir = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Address of the gRPC port.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            metavar="PORT",
            help="gRPC over mTLS; 0: the kernel chooses.",
            show_default="7443",
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            metavar="PORT",
            help="/metrics, /livez and /readyz over HTTP.",
            show_default="7490",
        ),
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, metavar="PORT", help="gRPC health without TLS.", show_default="7491"
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="debug, info, warning or error.",
            show_default="info",
            autocompletion=lambda: ["debug", "info", "warning", "error"],
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=256,
            metavar="N",
            help="Processes that serve; 0: one per processor. SIGHUP replaces them one by one.",
            show_default="1",
        ),
    ] = None,
    worker: Annotated[int | None, typer.Option(hidden=True)] = None,
    reflection: Annotated[
        bool | None,
        typer.Option("--reflection/--no-reflection", help="Answer gRPC server reflection."),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Written once the server serves: JSON with its addresses and files;"
            " removed at the end.",
        ),
    ] = None,
) -> None:
    """Run the server, until SIGTERM or Ctrl-C.

    Without any setting it makes what it needs in the state directory, serves on loopback, and tells
    what to do next. Every setting is also an environment variable (AUTHSVC_LISTEN__PORT=7443), and
    secrets may come from a file (AUTHSVC_DATABASE__URL_FILE); a flag goes before the environment,
    the environment before the file, the file before the default.
    """
    import asyncio
    import signal

    with reporting() as out, suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, _end)  # until the server has handlers of its own
        if worker is not None:
            asyncio.run(_work(worker))
            return
        ports = {"port": port, "host": host}
        ports |= {"metrics_port": metrics_port, "health_port": health_port}
        listen = {name: value for name, value in ports.items() if value is not None}
        flags: dict[str, Any] = {
            "state_dir": str(state_dir) if state_dir else None,
            "log_level": log_level,
            "reflection": reflection,
            "listen": listen or None,
            "workers": workers,
        }
        settings = settings_of(config, **flags)
        with there_while(ready_file):
            asyncio.run(_serve(out, settings, flags, ready_file))


@contextmanager
def there_while(ready_file: Path | None) -> Iterator[None]:
    """A server that was killed may have left the file; nobody shall take it for this one's."""
    try:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
        yield
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


async def _serve(
    out: Output, settings: "Settings", flags: dict[str, Any], ready_file: Path | None
) -> None:
    from authsvc.app import open_app, serve, settle
    from authsvc.supervise import CrashLoopError, Supervisor, processors
    from authsvc.telemetry import configure_logs

    configure_logs(settings.log_level, instance=settings.instance, once=True)
    before = _made(settings)
    made: list[str] | None = None
    count = settings.workers or processors()

    def ready(server: "App | Supervisor") -> None:
        nonlocal made
        where = _where(settings, server)
        if isinstance(server, Supervisor):
            where["workers"] = server.pids
        if made is None:
            made = [name for name in _made(settings) if name not in before]
            _banner(out, settings, server, made)
        if ready_file is not None:
            write(ready_file, json.dumps(where, indent=2) + "\n")

    if count == 1:
        app = await open_app(settings)
        settle()
        await app.start()
        await serve(app, lambda: ready(app))
        return
    supervisor = Supervisor(settings, count, flags)
    try:
        await supervisor.run(lambda: ready(supervisor))
    except CrashLoopError as error:
        raise Failure(
            str(error),
            "its last words are in the log above; what SIGKILL ended may have been too large for"
            " the memory",
            code="INTERNAL",
        ) from error


async def _work(index: int) -> None:
    from structlog.contextvars import bind_contextvars

    from authsvc.app import Seat, open_app, serve, settle
    from authsvc.supervise import take_orders, tell_ready
    from authsvc.telemetry import configure_logs

    orders = take_orders()
    settings = settings_of(None, **orders.flags)
    configure_logs(settings.log_level, instance=settings.instance, once=True)
    bind_contextvars(worker=index, pid=os.getpid())
    app = await open_app(settings, seat=Seat(index, Path(orders.probes)))
    settle()
    await app.start()
    await serve(app, tell_ready)


def _made(settings: "Settings") -> list[str]:
    return [name for name, _ in MADE if (settings.state_dir / name).exists()]


def _where(settings: "Settings", app: "App | Supervisor") -> dict[str, Any]:
    """Where the server is to be reached, and by which files, for programs."""
    from authsvc.app import address

    listen = settings.listen
    pki = settings.state_dir / "pki" if settings.tls.certificate is None else None
    files = {"ca": "ca.pem", "admin_certificate": "admin.pem", "admin_key": "admin-key.pem"}
    metrics = address(_reachable(listen.metrics_host), app.metrics_port)
    tls_only = {}
    if app.tls_port:
        where = address(_reachable(listen.tls_host), app.tls_port)
        tls_only = {"tls_address": where, "tls_port": app.tls_port}
    return {
        "pid": os.getpid(),
        "issuer": settings.issuer,
        "address": address(_reachable(listen.host), app.port),
        "port": app.port,
        **tls_only,
        "health_address": address(_reachable(listen.health_host), app.health_port),
        "health_port": app.health_port,
        "metrics_url": f"http://{metrics}/metrics",
        "metrics_port": app.metrics_port,
        "state_dir": str(settings.state_dir.absolute()),
        **{key: str((pki / name).absolute()) if pki else None for key, name in files.items()},
    }


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here


def write(path: Path, text: str) -> None:
    """At once: who reads it reads the whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _banner(out: Output, settings: "Settings", app: "App | Supervisor", made: list[str]) -> None:
    where = _where(settings, app)
    state_dir = settings.state_dir.absolute()
    out.title(f"authsvc serves on {where['address']} (gRPC, mTLS)")
    tls_only = (("TLS only", f"{where['tls_address']} (gRPC)"),) if "tls_port" in where else ()
    out.pairs(
        (
            ("issuer", where["issuer"]),
            *tls_only,
            ("health", f"{where['health_address']} (gRPC, without TLS)"),
            ("metrics", where["metrics_url"]),
            ("state", str(state_dir)),
        )
    )
    if made:
        out.raw("")
        out.title("Made, as it was missing:")
        out.pairs([(name, text) for name, text in MADE if name in made])
    if settings.tls.certificate is None:
        out.raw("")
        out.title("Next, in another terminal:")
        for line in _first_token(settings, where):
            out.title(f"  {line}", "cyan")


def _first_token(settings: "Settings", where: dict[str, Any]) -> list[str]:
    """Commands from nothing to a token, for a shell."""
    from authsvc.config import Listen, default_state_dir

    chosen = {}
    if where["address"] != f"127.0.0.1:{Listen().port}":
        chosen["AUTHSVC_ADDRESS"] = where["address"]
    if settings.state_dir != default_state_dir():
        chosen["AUTHSVC_STATE_DIR"] = where["state_dir"]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in chosen.items()]
    name = f"spiffe://{settings.trust_domain}/orders"
    pem = shlex.quote(str(Path(where["ca"]).with_name("orders.pem")))
    return [
        *exports,
        "authsvc pki issue orders",
        "ID=$(authsvc client register --quiet --name orders --scope validate \\",
        f"  --san-uri {name})",
        'authsvc client approve "$ID"',
        'authsvc token issue --quiet --as orders --client-id "$ID" \\',
        f"  | authsvc token validate --claims --presenter-cert {pem}",
    ]


def settings_of(config: Path | None, **flags: Any) -> "Settings":
    from pydantic import ValidationError

    from authsvc.config import CONFIG_VARIABLE, load

    file = config or os.environ.get(CONFIG_VARIABLE)
    try:
        return load(config, **flags)
    except ValidationError as error:
        violations = _violations(error, file)
        if len(violations) == 1:
            raise Failure(": ".join(violations[0]), violations=violations) from error
        raise Failure("these settings cannot be used", violations=violations) from error
    except OSError as error:
        raise Failure(f"{error.filename}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOML, and what is no JSON in the environment
        raise Failure(f"{file}: {error}" if file else str(error)) from error


def _violations(error: "ValidationError", file: object) -> list[tuple[str, str]]:
    """Key, and what is wrong with it and where it comes from; never its value."""
    found = []
    for each in error.errors(include_input=False, include_url=False, include_context=False):
        key = ".".join(map(str, each["loc"]))
        variable = "AUTHSVC_" + "__".join(map(str, each["loc"])).upper()
        origin = file
        for name in (f"{variable}_FILE", variable):
            origin = name if name in os.environ else origin
        text = each["msg"].removeprefix("Value error, ")
        if each["type"] == "extra_forbidden":
            text = "no such setting"
        found.append((key, f"{text} ({origin})" if origin else text))
    return found


def migrate(
    out: Output,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only tell: exit code 3 where it is behind.")
    ] = False,
) -> None:
    """Bring the schema of the database up to date.

    The database is that of the settings, as for serve. A schema that is not authsvc's, or that of a
    newer version, is refused and left alone.
    """
    import asyncio

    settings = settings_of(config, state_dir=state_dir)
    from authsvc import app
    from authsvc.store.migrate import Schema

    database, found = asyncio.run(app.migrate(settings, check=check))
    if found is Schema.UNKNOWN:
        raise Failure(
            f"{database}: the schema is not one that this version knows",
            "nothing was changed; is it the right database, and this version not an older one?",
            code="FAILED_PRECONDITION",
        )
    behind = found is not Schema.CURRENT
    done = "nothing" if check or not behind else "migrated"
    if out.json:
        out.document({"database": database, "found": found.value, "done": done})
    else:
        told = {
            "empty": ("empty", "made the schema"),
            "behind": ("of an older version", "brought the schema up to date"),
            "current": ("up to date", "nothing"),
        }[found.value]
        out.pairs(
            (("database", database), ("found", told[0]), ("done", "nothing" if check else told[1]))
        )
        if check and behind:
            out.steps("authsvc migrate")
    if check and behind:
        raise typer.Exit(Exit.REFUSED)
