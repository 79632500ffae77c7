"""The development PKI on the command line: pki init and pki issue.

What is heavy is imported where it is used: `--help` does not wait for it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from authsvc.cli.output import Failure, Json, Output, command, moment, reporting

RESERVED = ("server", "admin")
"""Pairs of the server's own PKI directory: `serve` makes and renews them."""

group = typer.Typer(
    no_args_is_help=True, help="A CA and certificates for development; not for production."
)

PkiDir = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="Directory of the CA.",
        show_default="pki in the state directory",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(group, opened)(init)
    command(group, opened)(issue)
    app.add_typer(group, name="pki")


@contextmanager
def opened(as_json: Json = False) -> Iterator[Output]:
    """Failures of the PKI speak of arguments and files."""
    with reporting(as_json) as out:
        try:
            yield out
        except ValueError as error:
            raise Failure(str(error)) from error


def init(
    out: Output,
    directory: PkiDir = None,
    trust_domain: Annotated[
        str,
        typer.Option(
            metavar="NAME", envvar="AUTHSVC_TRUST_DOMAIN", help="Trust domain of the SPIFFE IDs."
        ),
    ] = "authsvc.local",
) -> None:
    """Make a CA: ca.pem and ca-key.pem. One that is there is never overwritten."""
    from authsvc import pki
    from authsvc.clock import SystemClock

    directory = _directory(directory)
    now = SystemClock().wall()
    pki.init(directory, trust_domain, now)
    ca_file = directory / "ca.pem"
    _answer(out, ca_file, directory / "ca-key.pem", ca_file, now)
    out.steps("authsvc pki issue NAME")


def issue(
    out: Output,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the files, and of the service in its SPIFFE ID."
        ),
    ],
    directory: PkiDir = None,
    dns: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="DNS name; may be repeated.")
    ] = None,
    spiffe_id: Annotated[
        str,
        typer.Option(
            metavar="URI", show_default="spiffe://TRUST_DOMAIN/NAME", help="The SPIFFE ID."
        ),
    ] = "",
    common_name: Annotated[
        str, typer.Option(metavar="TEXT", help="Common name of the subject.")
    ] = "",
    server: Annotated[
        bool,
        typer.Option("--server", help="Also for a server: with localhost and loopback addresses."),
    ] = False,
    days: Annotated[int, typer.Option(min=1, max=3650, metavar="N", help="Life, in days.")] = 90,
    into: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to write it.", show_default="--dir"),
    ] = None,
) -> None:
    """Issue a certificate: NAME.pem and NAME-key.pem. Older ones of that name are replaced."""
    from datetime import timedelta

    from authsvc import pki
    from authsvc.clock import SystemClock

    directory = _directory(directory)
    into = (into or directory).absolute()
    if name in RESERVED and into == directory:
        raise Failure(
            f"{name} is the name of a certificate that authsvc serve makes and renews",
            "choose another name, or another directory: --out DIR",
        )
    now = SystemClock().wall()
    try:
        authority = pki.load(directory)
    except FileNotFoundError as error:
        raise Failure(
            f"there is no CA in {directory}",
            "make one: authsvc pki init (authsvc serve does so too), or name its directory: --dir",
            code="NOT_FOUND",
        ) from error
    certificate, key = pki.issue(
        authority,
        now=now,
        spiffe_path="" if spiffe_id else name,
        spiffe_id=spiffe_id,
        dns_names=dns or (),
        common_name=common_name,
        lifetime=timedelta(days=days),
        server=server,
    )
    files = pki.write_pair(certificate, key, into, name)
    _answer(out, *files, directory / "ca.pem", now)


def _directory(directory: Path | None) -> Path:
    if directory is None:
        from authsvc.config import default_state_dir

        state_dir = os.environ.get("AUTHSVC_STATE_DIR")
        directory = (Path(state_dir) if state_dir else default_state_dir()) / "pki"
    return directory.absolute()


def _answer(out: Output, file: Path, key_file: Path, ca_file: Path, now: float) -> None:
    from authsvc import pki
    from authsvc.rpc.peer import spki_sha256, x5t_s256

    certificate = pki.read(file)
    spiffe_id, dns_names = pki.names(certificate)
    end = certificate.not_valid_after_utc
    found = {
        "certificate": str(file),
        "key": str(key_file),
        "ca": str(ca_file),
        "ca_pin": spki_sha256(pki.read(ca_file)),
        "spiffe_id": spiffe_id,
        "dns_names": dns_names,
        "thumbprint": x5t_s256(certificate),
        "expire_time": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if out.json:
        out.document(found)
    else:
        out.pairs({**found, "expire_time": moment(end.timestamp(), now)}.items())
