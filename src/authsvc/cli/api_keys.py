"""Commands about API keys."""

from typing import Annotated

import typer
from rich.text import Text

from authsvc.cli.calls import ALL, Limit, Scopes, Session, connected, more, span, time_of, words
from authsvc.cli.output import Column, command

# What is heavy is imported where it is used: `--help` does not wait for it.
api_keys = typer.Typer(no_args_is_help=True, help="API keys of clients.")

ClientId = Annotated[
    str,
    typer.Option(metavar="CLIENT_ID", help="Whose keys.", show_default="the client that asks"),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(api_keys, connected)(create)
    command(api_keys, connected, name="list")(list_api_keys)
    command(api_keys, connected)(delete)
    app.add_typer(api_keys, name="api-key")


def create(
    session: Session,
    client_id: ClientId = "",
    scope: Scopes = None,
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name for people.")] = "",
    expires_in: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="End of its life: 12h, 90d.", show_default="never"),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the id, and its value on a second line.")
    ] = False,
) -> None:
    """Create an API key; its value is shown once, here.

    Without --scope it may use all scopes of its client but those of authsvc itself.
    """
    from google.protobuf.timestamp_pb2 import Timestamp

    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    asked = clients_pb2.ApiKey(client_id=client_id, display_name=name, scopes=words(scope))
    if expires_in is not None:
        end = int(session.now) + span(expires_in, "--expires-in")
        asked.expire_time.CopyFrom(Timestamp(seconds=end))
    answer = session.call(
        ClientServiceStub(session.channel).CreateApiKey,
        clients_pb2.CreateApiKeyRequest(api_key=asked),
    )
    out, key = session.out, answer.api_key
    if out.json:
        return out.document(answer)
    if quiet:
        for line in (key.api_key_id, answer.value):
            out.raw(line)
        return None
    out.pairs(
        (
            ("api_key_id", key.api_key_id),
            ("client_id", key.client_id),
            ("name", key.display_name),
            ("scopes", list(key.scopes)),
            ("expires", time_of(key, "expire_time", session.now) or "never"),
            ("api_key", Text(answer.value, "bold")),
        )
    )
    return out.note("The key is shown this once: keep it where nobody else reads it.", "yellow")


def list_api_keys(session: Session, client_id: ClientId = "", limit: Limit = ALL) -> None:
    """List the API keys of a client, never their values."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    out, method = session.out, ClientServiceStub(session.channel).ListApiKeys
    request = clients_pb2.ListApiKeysRequest(client_id=client_id)
    found = session.pages(method, request, "api_keys", limit)
    if out.json:
        return out.document(found)
    if not found.api_keys:
        return out.note("no API keys")
    columns = [Column("API KEY ID", is_id=True), Column("NAME"), Column("CREATED")]
    columns += [Column("EXPIRES"), Column("SCOPES")]
    out.table(
        columns,
        [
            (
                key.api_key_id,
                key.display_name,
                time_of(key, "create_time", session.now),
                time_of(key, "expire_time", session.now) or "never",
                " ".join(key.scopes),
            )
            for key in found.api_keys
        ],
    )
    return more(session, found.next_page_token)


def delete(
    session: Session,
    api_key_id: Annotated[str, typer.Argument(metavar="API_KEY_ID", help="Id of the key.")],
) -> None:
    """Delete an API key: it is dead at once."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    answer = session.call(
        ClientServiceStub(session.channel).DeleteApiKey,
        clients_pb2.DeleteApiKeyRequest(api_key_id=api_key_id),
    )
    if session.out.json:
        return session.out.document(answer)
    return session.out.pairs((("api_key_id", api_key_id), ("revision", answer.revision)))
