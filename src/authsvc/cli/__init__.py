"""The command line: `authsvc --help`."""

import os
import sys
import warnings
from typing import Annotated

import typer

from authsvc.cli import (
    agent,
    api_keys,
    apply,
    audit,
    clients,
    doctor,
    export,
    fence,
    keys,
    pki,
    registrations,
    resources,
    revocations,
    roles,
    serve,
    sessions,
    tokens,
    users,
)
from authsvc.cli.output import EXITS

_EPILOG = "\n".join(
    (
        "\b",  # leave these lines as they are
        "Exit codes:",
        *(f"  {code.value}  {text}" for code, text in EXITS.items()),
        "",
        "Data go to standard output, all else to standard error; with --json both as one JSON"
        " document. Start with: authsvc serve",
    )
)

app = typer.Typer(
    name="authsvc",
    help="The token service that backend services use among themselves.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
serve.register(app)
agent.register(app)
doctor.register(app)
fence.register(app)
pki.register(app)
clients.register(app)
registrations.register(app)
resources.register(app)
tokens.register(app)
keys.register(app)
api_keys.register(app)
revocations.register(app)
users.register(app)
roles.register(app)
sessions.register(app)
audit.register(app)
apply.register(app)
export.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"authsvc {version('authsvc')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs one command; ends the process with a code of `Exit`."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # errors are told by us, once
    app(prog_name="authsvc")
