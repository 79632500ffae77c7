"""The agent on the command line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from authsvc.cli.calls import ADDRESS, files_of, span
from authsvc.cli.output import Failure, Output, command, reporting
from authsvc.cli.serve import there_while, write


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
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="NAME",
            envvar="AUTHSVC_AS",
            help="Whose certificate to show: NAME.pem of the PKI in the state directory.",
        ),
    ] = "agent",
    cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="AUTHSVC_CERT", help="Certificate to show, instead."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="AUTHSVC_KEY", help="Its key.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="AUTHSVC_CA",
            help="CA of authsvc's certificate.",
            show_default="ca.pem of that PKI",
        ),
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="AUTHSVC_SERVER_NAME",
            help="DNS name in authsvc's certificate, where the address is another.",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="AUTHSVC_STATE_DIR",
            help="State directory of authsvc, for its PKI.",
            show_default="$XDG_STATE_HOME/authsvc",
        ),
    ] = None,
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
    certificate_files = files_of(as_, cert, key, ca, state_dir)
    where = Place(socket.absolute() if socket is not None else None, group, listen)
    upstream = Upstream(address, issuer, *certificate_files, server_name)

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
        except FileNotFoundError as error:
            hint = "authsvc pki issue NAME makes one for --as NAME"
            raise Failure(f"there is no {error.filename}", hint) from error
        except OSError as error:
            raise Failure(f"{error.filename}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise Failure(f"{certificate_files[1]}: {error}") from error


async def _tell(out: Output, path: Path | None, agent: object, ready_file: Path | None) -> None:
    from authsvc.agent import Agent

    assert isinstance(agent, Agent)
    await agent.ready()
    places = [f"unix:{path}"] if path is not None else []
    places += [f"port {agent.port}"] if agent.port else []
    out.title(f"authsvc agent answers on {' and '.join(places)}")
    if ready_file is not None:
        document = {"socket": str(path) if path is not None else None, "port": agent.port}
        write(ready_file, json.dumps(document) + "\n")
