"""Commands about clients."""

from enum import StrEnum, auto
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import ALL, Limit, Scopes, Session, connected, more, span, time_of, words
from authsvc.cli.output import Column, Failure, command

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from authsvc_client.v1 import clients_pb2

clients = typer.Typer(no_args_is_help=True, help="Clients: their registration and review.")

STYLES = {
    "PENDING": "yellow",
    "APPROVED": "green",
    "REJECTED": "red",
    "EXPIRED": "red",
    "SUSPENDED": "red",
}


class State(StrEnum):
    """States of a client, to filter by."""

    PENDING = auto()
    APPROVED = auto()
    REJECTED = auto()
    EXPIRED = auto()
    SUSPENDED = auto()


class Method(StrEnum):
    """How a client authenticates (RFC 7591 section 2)."""

    NONE = auto()
    CLIENT_SECRET_BASIC = auto()
    CLIENT_SECRET_POST = auto()
    PRIVATE_KEY_JWT = auto()
    TLS_CLIENT_AUTH = auto()
    SELF_SIGNED_TLS_CLIENT_AUTH = auto()
    API_KEY = auto()


class Grant(StrEnum):
    """Grants of a client."""

    CLIENT_CREDENTIALS = auto()
    AUTHORIZATION_CODE = auto()
    REFRESH_TOKEN = auto()
    PASSWORD = auto()
    DEVICE_CODE = auto()
    TOKEN_EXCHANGE = auto()
    JWT_BEARER = auto()


ClientId = Annotated[str, typer.Argument(metavar="CLIENT_ID", help="Id of the client.")]
Comment = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept with the client.")]
Etag = Annotated[
    str,
    typer.Option(
        metavar="ETAG", help="Only if the client is still as `client show` told with this etag."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(clients, connected, name="register")(register_client)
    command(clients, connected, name="list")(list_clients)
    for step in (show, approve, reject, suspend, resume):
        command(clients, connected)(step)
    app.add_typer(clients, name="client")


def register_client(
    session: Session,
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name for people.")],
    scope: Scopes = None,
    san_uri: Annotated[str, typer.Option(metavar="URI", help="SPIFFE ID in its certificate.")] = "",
    san_dns: Annotated[str, typer.Option(metavar="NAME", help="DNS name in its certificate.")] = "",
    subject_dn: Annotated[
        str, typer.Option(metavar="DN", help="Subject of its certificate (RFC 4514).")
    ] = "",
    ca_pin: Annotated[
        str,
        typer.Option(
            metavar="HEX",
            help="CA of that certificate, as `pki issue` tells.",
            show_default="the only one",
        ),
    ] = "",
    auth_method: Annotated[
        list[Method] | None,
        typer.Option(
            metavar="METHOD",
            help=f"How it authenticates, repeatable: {', '.join(Method)}.",
            show_default="tls_client_auth with a certificate name, else client_secret_post",
        ),
    ] = None,
    grant: Annotated[
        list[Grant] | None,
        typer.Option(
            metavar="GRANT",
            help=f"Grant that it may use, repeatable: {', '.join(Grant)}.",
            show_default="client_credentials",
        ),
    ] = None,
    validates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RESOURCE",
            help="Audience whose tokens it may validate beside its own resources; * for all.",
        ),
    ] = None,
    bound: Annotated[
        bool | None,
        typer.Option(
            "--bound/--unbound",
            help="Its tokens are bound to its certificate.",
            show_default="bound with a certificate name",
        ),
    ] = None,
    contact: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Whom to ask; may be repeated.")
    ] = None,
    client_uri: Annotated[str, typer.Option(metavar="URI", help="Home page.")] = "",
    software_id: Annotated[
        str, typer.Option(metavar="ID", help="Software, over its instances.")
    ] = "",
    software_version: Annotated[str, typer.Option(metavar="TEXT", help="Version of it.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be registered; change nothing.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print the id alone; a secret on a second line."),
    ] = False,
) -> None:
    """Register a client, which then waits for its review.

    Administrators register any; `--as NAME` registers the name in that certificate. A client with a
    certificate name needs no secret; the secret of another one is shown once, here.
    """
    from authsvc_client.v1 import auth_pb2, clients_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    identity = {
        "tls_client_auth_san_uri": san_uri,
        "tls_client_auth_san_dns": san_dns,
        "tls_client_auth_subject_dn": subject_dn,
    }
    identity = {field: value for field, value in identity.items() if value}
    if len(identity) > 1:
        raise Failure("--san-uri, --san-dns and --subject-dn exclude each other")
    metadata = clients_pb2.ClientMetadata(
        client_name=name,
        scopes=words(scope),
        tls_client_auth_ca=ca_pin,
        token_endpoint_auth_methods=[
            clients_pb2.ClientAuthMethod.Value(f"CLIENT_AUTH_METHOD_{method.name}")
            for method in auth_method or ()
        ],
        grant_types=[
            clients_pb2.GrantType.Value(f"GRANT_TYPE_{each.name}") for each in grant or ()
        ],
        validates=words(validates),
        tls_client_certificate_bound_access_tokens=bound,
        contacts=contact or (),
        client_uri=client_uri,
        software_id=software_id,
        software_version=software_version,
        **identity,
    )
    answer = session.call(
        AuthServiceStub(session.channel).RegisterClient,
        auth_pb2.RegisterClientRequest(metadata=metadata, validate_only=dry_run),
    )
    _registered(session, answer, dry_run=dry_run, quiet=quiet)


def _registered(session: Session, answer: Any, *, dry_run: bool, quiet: bool) -> None:
    out, client, secret = session.out, answer.client, answer.client_secret
    if out.json:
        out.document(answer)
    elif quiet:
        for line in filter(None, (client.client_id, secret)):
            out.raw(line)
        return
    else:
        _show(session, client, secret)
        if secret:
            out.note("The secret is shown this once: keep it where nobody else reads it.", "yellow")
    if dry_run:
        out.note("dry run: nothing was registered")
    elif client.client_id:
        out.steps(f"authsvc client approve {client.client_id}")


def list_clients(
    session: Session,
    state: Annotated[
        State | None,
        typer.Option(metavar="STATE", help=f"Only clients in this state: {', '.join(State)}."),
    ] = None,
    limit: Limit = ALL,
) -> None:
    """List clients, in the order of their ids."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    out, method = session.out, ClientServiceStub(session.channel).ListClients
    request = clients_pb2.ListClientsRequest()
    if state is not None:
        request.state = clients_pb2.ClientState.Value(f"CLIENT_STATE_{state.name}")
    found = session.pages(method, request, "clients", limit)
    if out.json:
        return out.document(found)
    if not found.clients:
        return out.note("no clients" if state is None else f"no {state} clients")
    columns = [Column("CLIENT ID", is_id=True), Column("NAME"), Column("STATE", is_id=True)]
    columns += [Column("IDENTITY", is_id=True), Column("SCOPES")]
    out.table(
        columns,
        [
            (
                client.client_id,
                client.metadata.client_name,
                _state(client),
                _identity(client.metadata) or "secret",
                " ".join(client.metadata.scopes),
            )
            for client in found.clients
        ],
    )
    return more(session, found.next_page_token)


def show(session: Session, client_id: ClientId) -> None:
    """Show all that there is about a client; never its secret."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    answer = session.call(
        ClientServiceStub(session.channel).GetClient,
        clients_pb2.GetClientRequest(client_id=client_id),
    )
    if session.out.json:
        return session.out.document(answer)
    client = answer.client
    _show(session, client)
    if client.state == clients_pb2.CLIENT_STATE_PENDING:
        session.out.steps(
            f"authsvc client approve {client_id} --etag {client.etag}",
            f"authsvc client reject {client_id} --etag {client.etag} --comment …",
        )
    return None


def approve(
    session: Session,
    client_id: ClientId,
    comment: Comment = "",
    etag: Etag = "",
    expires_in: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="End of the approval: 12h, 90d.", show_default="never"),
    ] = None,
) -> None:
    """Let a pending client in."""
    fields: dict[str, Any] = {}
    if expires_in is not None:
        from google.protobuf.timestamp_pb2 import Timestamp

        end = int(session.now) + span(expires_in, "--expires-in")
        fields["approval_expire_time"] = Timestamp(seconds=end)
    client = _step(session, "Approve", client_id, comment, etag, **fields)
    how = "--as NAME_OF_ITS_CERTIFICATE" if _identity(client.metadata) else "--client-secret-stdin"
    session.out.steps(f"authsvc token issue --client-id {client_id} {how}")


def reject(session: Session, client_id: ClientId, comment: Comment = "", etag: Etag = "") -> None:
    """Turn a pending client away, for good."""
    _step(session, "Reject", client_id, comment, etag)


def suspend(session: Session, client_id: ClientId, comment: Comment = "", etag: Etag = "") -> None:
    """Stop a client and kill every token it has."""
    _step(session, "Suspend", client_id, comment, etag)
    session.out.note("Every token that it had is dead.")


def resume(session: Session, client_id: ClientId, comment: Comment = "", etag: Etag = "") -> None:
    """Let a suspended client in again; its old tokens stay dead."""
    _step(session, "Resume", client_id, comment, etag)


def _step(
    session: Session, verb: str, client_id: str, comment: str, etag: str, **fields: Any
) -> "clients_pb2.Client":
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    request = getattr(clients_pb2, f"{verb}ClientRequest")(
        client_id=client_id, comment=comment, etag=etag, **fields
    )
    method = getattr(ClientServiceStub(session.channel), f"{verb}Client")
    answer = session.call(method, request)
    client: clients_pb2.Client = answer.client
    if session.out.json:
        session.out.document(answer)
        return client
    session.out.pairs(
        (
            ("client_id", client_id),
            ("name", client.metadata.client_name),
            ("state", _state(client)),
            ("approved until", time_of(client, "approval_expire_time", session.now)),
            ("revision", answer.revision),
        )
    )
    return client


def _show(session: Session, client: "clients_pb2.Client", secret: str = "") -> None:
    from authsvc_client.v1 import clients_pb2

    metadata, now = client.metadata, session.now
    methods = map(clients_pb2.ClientAuthMethod.Name, metadata.token_endpoint_auth_methods)
    grants = map(clients_pb2.GrantType.Name, metadata.grant_types)
    bound = metadata.tls_client_certificate_bound_access_tokens
    session.out.pairs(
        (
            ("client_id", client.client_id),
            ("name", metadata.client_name),
            ("state", _state(client)),
            ("identity", _identity(metadata)),
            ("ca_pin", metadata.tls_client_auth_ca),
            ("scopes", list(metadata.scopes)),
            ("auth methods", [m.removeprefix("CLIENT_AUTH_METHOD_").lower() for m in methods]),
            ("grants", [g.removeprefix("GRANT_TYPE_").lower() for g in grants]),
            ("tokens", "bound to its certificate" if bound else "not bound"),
            ("validates", list(metadata.validates)),
            ("contacts", list(metadata.contacts)),
            ("client_uri", metadata.client_uri),
            ("software", f"{metadata.software_id} {metadata.software_version}".strip()),
            ("registered", time_of(client, "create_time", now)),
            ("by", client.registrant),
            ("reviewed", time_of(client, "review_time", now)),
            ("by ", client.reviewer),
            ("comment", client.review_comment),
            ("approved until", time_of(client, "approval_expire_time", now)),
            ("policy", list(client.policy_diff)),
            ("etag", client.etag),
            ("client_secret", Text(secret, "bold") if secret else ""),
        )
    )


def _identity(metadata: "clients_pb2.ClientMetadata") -> str:
    field = metadata.WhichOneof("tls_client_auth")
    value: str = getattr(metadata, field) if field else ""
    return value


def _state(client: "clients_pb2.Client") -> Text:
    from authsvc_client.v1 import clients_pb2

    try:
        name = clients_pb2.ClientState.Name(client.state).removeprefix("CLIENT_STATE_")
    except ValueError:  # of a newer server
        name = str(client.state)
    return Text(name.lower(), STYLES.get(name, ""))
