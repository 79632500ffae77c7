"""Commands about registrations: initial access tokens, and a client by its own token."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from authsvc.cli.calls import ALL, Limit, Session, connected, more, secret_in, span, time_of
from authsvc.cli.clients import Asked, described, show_client, shown_once
from authsvc.cli.output import Column, Failure, command

# What is heavy is imported where it is used: `--help` does not wait for it.
initial = typer.Typer(
    no_args_is_help=True, help="Initial access tokens: their bearers register clients."
)
own = typer.Typer(no_args_is_help=True, help="A client, by the token of its own registration.")

Token = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help="File with the registration access token; - for standard input.",
        show_default="standard input",
    ),
]
STDIN = Path("-")


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(initial, connected)(create)
    command(initial, connected, name="list")(list_tokens)
    command(initial, connected)(delete)
    app.add_typer(initial, name="registration-token")
    command(own, connected, name="show")(show_own)
    command(own, described, name="update")(update_own)
    command(own, connected, name="delete")(delete_own)
    app.add_typer(own, name="own-client")


def create(
    session: Session,
    expires_in: Annotated[
        str, typer.Option(metavar="SPAN", help="How long it is good: 12h, 90d.")
    ] = "24h",
    uses: Annotated[
        int, typer.Option(min=1, max=1000, metavar="N", help="How many clients it registers.")
    ] = 1,
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name for people.")] = "",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the id, and its value on a second line.")
    ] = False,
) -> None:
    """Create an initial access token; its value is shown once, here."""
    from google.protobuf.timestamp_pb2 import Timestamp

    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    end = int(session.now) + span(expires_in, "--expires-in")
    asked = clients_pb2.InitialAccessToken(
        display_name=name, uses_left=uses, expire_time=Timestamp(seconds=end)
    )
    answer = session.call(
        ClientServiceStub(session.channel).CreateInitialAccessToken,
        clients_pb2.CreateInitialAccessTokenRequest(initial_access_token=asked),
    )
    out, token = session.out, answer.initial_access_token
    if out.json:
        return out.document(answer)
    if quiet:
        for line in (token.initial_access_token_id, answer.value):
            out.raw(line)
        return None
    out.pairs(
        (
            ("id", token.initial_access_token_id),
            ("name", token.display_name),
            ("uses left", token.uses_left),
            ("expires", time_of(token, "expire_time", session.now)),
            ("token", Text(answer.value, "bold")),
        )
    )
    return shown_once(session, "token")


def list_tokens(session: Session, limit: Limit = ALL) -> None:
    """List initial access tokens, never their values."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    out, method = session.out, ClientServiceStub(session.channel).ListInitialAccessTokens
    request = clients_pb2.ListInitialAccessTokensRequest()
    found = session.pages(method, request, "initial_access_tokens", limit)
    if out.json:
        return out.document(found)
    if not found.initial_access_tokens:
        return out.note("no initial access tokens")
    columns = [Column("ID", is_id=True), Column("NAME"), Column("USES LEFT")]
    columns += [Column("CREATED"), Column("EXPIRES")]
    out.table(
        columns,
        [
            (
                token.initial_access_token_id,
                token.display_name,
                str(token.uses_left),
                time_of(token, "create_time", session.now),
                time_of(token, "expire_time", session.now),
            )
            for token in found.initial_access_tokens
        ],
    )
    return more(session, found.next_page_token)


def delete(
    session: Session,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the token.")],
) -> None:
    """Delete an initial access token: it registers nobody any more."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    answer = session.call(
        ClientServiceStub(session.channel).DeleteInitialAccessToken,
        clients_pb2.DeleteInitialAccessTokenRequest(initial_access_token_id=token_id),
    )
    if session.out.json:
        return session.out.document(answer)
    return session.out.pairs((("id", token_id),))


def show_own(session: Session, token: Token = STDIN) -> None:
    """Show all that there is about the client (RFC 7592 section 2.1)."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    answer = session.call(
        ClientServiceStub(session.channel).GetOwnClient,
        clients_pb2.GetOwnClientRequest(registration_access_token=_value(token)),
    )
    if session.out.json:
        return session.out.document(answer)
    return show_client(session, answer.client)


def update_own(
    asked: Asked,
    client_id: Annotated[str, typer.Argument(metavar="CLIENT_ID", help="Its own id.")],
    token: Token = STDIN,
) -> None:
    """Replace what the client says of itself, all of it (RFC 7592 section 2.2).

    Whatever no option names takes its default. Who asks for more than before waits for a review.
    """
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    session, given = asked
    if "client_name" not in given:
        raise Failure("--name is missing")
    answer = session.call(
        ClientServiceStub(session.channel).UpdateOwnClient,
        clients_pb2.UpdateOwnClientRequest(
            registration_access_token=_value(token),
            client_id=client_id,
            metadata=clients_pb2.ClientMetadata(**given),
        ),
    )
    if session.out.json:
        return session.out.document(answer)
    show_client(session, answer.client, answer.client_secret)
    return shown_once(session, "secret" if answer.client_secret else "")


def delete_own(session: Session, token: Token = STDIN) -> None:
    """Delete the client (RFC 7592 section 2.3)."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    answer = session.call(
        ClientServiceStub(session.channel).DeleteOwnClient,
        clients_pb2.DeleteOwnClientRequest(registration_access_token=_value(token)),
    )
    if session.out.json:
        return session.out.document(answer)
    return session.out.note("It is deleted, and every token that it had is dead.")


def _value(file: Path) -> str:
    return secret_in(file, "Registration access token")
