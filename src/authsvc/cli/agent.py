"""The agent on the command line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from authsvc.cli.calls import (
    ADDRESS,
    As,
    Ca,
    Cert,
    Key,
    ServerName,
    StateDir,
    files_of,
    read_certificates,
    span,
)
from authsvc.cli.output import Failure, Output, command, reporting
from authsvc.cli.serve import there_while, write

if TYPE_CHECKING:
    from authsvc.agent import Agent


def register(app: typer.Typer) -> None:
    """Adds the command to the root."""
    command(app, reporting)(agent)


def agent(
    out: Output,
    issuer: Annotated[str, typer.Option(metavar="URL", help="Issuer of the tokens.")],
    audience: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Audience that may be asked about; may be repeated.",
            show_default="any",
        ),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="FILE", help="Unix socket to answer on.")
    ] = None,
    group: Annotated[
        str,
        typer.Option(metavar="NAME", help="Group that may open it.", show_default="the user alone"),
    ] = "",
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Address to answer on by mTLS, with the agent's certificate.",
        ),
    ] = "",
    when_stale: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="Past that bound: closed refuses, remote asks authsvc, a span (10m) goes on.",
        ),
    ] = "closed",
    staleness_max: Annotated[
        str, typer.Option(metavar="SPAN", help="Longest age of a confirmed state to judge by.")
    ] = "120s",
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", envvar="AUTHSVC_ADDRESS", help="authsvc.")
    ] = ADDRESS,
    as_: As = "agent",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    server_name: ServerName = None,
    state_dir: StateDir = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Written once tokens can be judged; removed at the end."),
    ] = None,
) -> None:
    """Answer ValidateToken on this machine, until SIGTERM or Ctrl-C.

    The agent is a client of authsvc with the scopes watch and validate. Any process of any language
    that may open the socket asks it as it would ask authsvc, without a certificate, and has its
    answer without a network: keys and revocations come over one stream. Opaque tokens, API keys,
    live permissions and strong consistency are passed on.
    """
    import asyncio

    if socket is None and not listen:
        raise Failure("nowhere to listen", "name a --socket, or --listen HOST:PORT")
    if group and socket is None:
        raise Failure("--group goes with --socket")
    from authsvc.agent import Agent, AgentError, Place, Upstream
    from authsvc.model import ANY_AUDIENCE
    from authsvc_client import CLOSED, REMOTE, open_for

    policies = {"closed": CLOSED, "remote": REMOTE}
    try:
        policy = policies.get(when_stale) or open_for(span(when_stale, "--when-stale"))
    except ValueError as error:
        raise Failure(f"--when-stale: {error}") from error
    files = files_of(as_, cert, key, ca, state_dir)
    read_certificates(files)
    where = Place(socket.absolute() if socket is not None else None, group, listen)
    upstream = Upstream(address, issuer, *files, server_name)

    async def run() -> None:
        from authsvc.app import serve
        from authsvc.telemetry import configure_logs

        configure_logs("info")
        made = Agent(
            where,
            upstream,
            audiences=frozenset(audience or (ANY_AUDIENCE,)),
            staleness_max_s=span(staleness_max, "--staleness-max"),
            when_stale=policy,
        )
        await made.start()
        told = asyncio.create_task(_tell(out, where.path, made, ready_file))
        try:
            await serve(made)
        finally:
            told.cancel()

    with suppress(KeyboardInterrupt), there_while(ready_file):
        try:
            asyncio.run(run())
        except AgentError as error:
            raise Failure(str(error)) from error
        except ValueError as error:
            raise Failure(str(error)) from error


async def _tell(out: Output, path: Path | None, agent: "Agent", ready_file: Path | None) -> None:
    await agent.ready()
    places = [f"unix:{path}"] if path is not None else []
    places += [f"port {agent.port}"] if agent.port else []
    out.title(f"authsvc agent answers on {' and '.join(places)}")
    if ready_file is not None:
        document = {"socket": str(path) if path is not None else None, "port": agent.port}
        write(ready_file, json.dumps(document) + "\n")
