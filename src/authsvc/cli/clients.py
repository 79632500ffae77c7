"""Commands about clients."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum, auto
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import (
    ALL,
    Limit,
    Scopes,
    Session,
    connected,
    more,
    secret_in,
    span,
    time_of,
    words,
)
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


Asked = tuple[Session, dict[str, Any]]
"""A session, and the metadata that the options give."""
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
    command(clients, described, name="register")(register_client)
    command(clients, connected, name="list")(list_clients)
    command(clients, connected)(show)
    command(clients, described)(update)
    for step in (approve, reject, suspend, resume, delete):
        command(clients, connected)(step)
    command(clients, connected, name="rotate-secret")(rotate_secret)
    app.add_typer(clients, name="client")


@contextmanager
def described(
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="Name for people.")] = None,
    scope: Scopes = None,
    san_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="SPIFFE ID in its certificate.")
    ] = None,
    san_dns: Annotated[
        str | None, typer.Option(metavar="NAME", help="DNS name in its certificate.")
    ] = None,
    subject_dn: Annotated[
        str | None, typer.Option(metavar="DN", help="Subject of its certificate (RFC 4514).")
    ] = None,
    ca_pin: Annotated[
        str | None,
        typer.Option(
            metavar="PIN",
            help="CA of that certificate, as `pki issue` tells; spiffe://DOMAIN for a bundle.",
            show_default="for a new client: the only one",
        ),
    ] = None,
    auth_method: Annotated[
        list[Method] | None,
        typer.Option(
            metavar="METHOD",
            help=f"How it authenticates, repeatable: {', '.join(Method)}.",
            show_default="tls_client_auth with a certificate name, else client_secret_post",
        ),
    ] = None,
    jwks: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Its public keys, for private_key_jwt (RFC 7517)."),
    ] = None,
    grant: Annotated[
        list[Grant] | None,
        typer.Option(
            metavar="GRANT",
            help=f"Grant that it may use, repeatable: {', '.join(Grant)}.",
            show_default="for a new client: client_credentials",
        ),
    ] = None,
    validates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RESOURCE",
            help="Audience whose tokens it may validate beside its own resources; * for all.",
        ),
    ] = None,
    may_act: Annotated[
        str | None,
        typer.Option(
            metavar="CLIENT_ID",
            help="The only client that may act for it at an exchange.",
            show_default="for a new client: any that its tokens are for",
        ),
    ] = None,
    bound: Annotated[
        bool | None,
        typer.Option(
            "--bound/--unbound",
            help="Its tokens are bound to its certificate.",
            show_default="for a new client: bound with a certificate name",
        ),
    ] = None,
    first_party: Annotated[
        bool | None,
        typer.Option(
            "--first-party/--third-party",
            help="It is yours, and trusted with the passwords of people.",
            show_default="for a new client: third party",
        ),
    ] = None,
    contact: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Whom to ask; may be repeated.")
    ] = None,
    client_uri: Annotated[str | None, typer.Option(metavar="URI", help="Home page.")] = None,
    software_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Software, over its instances.")
    ] = None,
    software_version: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Version of it.")
    ] = None,
    **connection: Any,
) -> Iterator[tuple[Session, dict[str, Any]]]:
    """The options of `connected` and those of a client's metadata: what is given, by field."""
    with connected(**connection) as session:
        from authsvc_client.v1.clients_pb2 import ClientAuthMethod, GrantType

        fields: dict[str, Any] = {
            "client_name": name,
            "scopes": None if scope is None else words(scope),
            "tls_client_auth_san_uri": san_uri,
            "tls_client_auth_san_dns": san_dns,
            "tls_client_auth_subject_dn": subject_dn,
            "tls_client_auth_ca": ca_pin,
            "token_endpoint_auth_methods": auth_method
            and [ClientAuthMethod.Value(f"CLIENT_AUTH_METHOD_{each.name}") for each in auth_method],
            "jwks": Path(jwks).read_text(encoding="utf-8") if jwks else jwks,
            "grant_types": grant and [GrantType.Value(f"GRANT_TYPE_{each.name}") for each in grant],
            "validates": None if validates is None else words(validates),
            "may_act": may_act,
            "tls_client_certificate_bound_access_tokens": bound,
            "first_party": first_party,
            "contacts": None if contact is None else list(filter(None, contact)),
            "client_uri": client_uri,
            "software_id": software_id,
            "software_version": software_version,
        }
        if sum(map(bool, (san_uri, san_dns, subject_dn))) > 1:
            raise Failure("--san-uri, --san-dns and --subject-dn exclude each other")
        yield session, {field: value for field, value in fields.items() if value is not None}


described.__dict__["__signature__"] = Signature(
    [
        *(
            each
            for each in signature(described).parameters.values()
            if each.kind != each.VAR_KEYWORD
        ),
        *signature(connected).parameters.values(),
    ]
)


def register_client(
    asked: Asked,
    request_id: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="8 to 64 of A-Z a-z 0-9 _ -; the same one again within 10 minutes answers the same"
            " client.",
        ),
    ] = "",
    initial_access_token: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with the initial access token to use; - for standard input."
        ),
    ] = None,
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
    certificate name needs no secret; the secret of another one is shown once, here, as is the
    token by which a client reads, changes and deletes itself.
    """
    from authsvc_client.v1 import auth_pb2, clients_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    session, given = asked
    if "client_name" not in given:
        raise Failure("--name is missing")
    token = initial_access_token
    answer = session.call(
        AuthServiceStub(session.channel).RegisterClient,
        auth_pb2.RegisterClientRequest(
            metadata=clients_pb2.ClientMetadata(**given),
            request_id=request_id,
            initial_access_token=secret_in(token, "Initial access token") if token else "",
            validate_only=dry_run,
        ),
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
        show_client(session, client, secret, answer.registration_access_token)
        shown_once(session, "secret" if secret else "", answer.registration_access_token)
    if dry_run:
        out.note("dry run: nothing was registered")
    elif client.client_id:
        out.steps(f"authsvc client approve {client.client_id}")


def shown_once(session: Session, secret: str, registration_token: str = "") -> None:
    """Tells so of what is there."""
    what = " and ".join(filter(None, (secret, registration_token and "registration token")))
    if what:
        text = f"Shown this once: {what}. Keep it where nobody else reads it."
        session.out.note(text, "yellow")


def update(
    asked: Asked,
    client_id: ClientId,
    expires_in: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="End of its approval: 12h, 90d; or never."),
    ] = None,
    etag: Etag = "",
) -> None:
    """Change what the options name, and nothing else.

    An empty value takes it away: --scope '', --jwks ''. What is taken away cuts off the tokens that
    the client has.
    """
    from google.protobuf.field_mask_pb2 import FieldMask
    from google.protobuf.timestamp_pb2 import Timestamp

    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    session, given = asked
    paths = [f"metadata.{field}" for field in given]
    end = None
    if expires_in is not None:
        paths.append("approval_expire_time")
        if expires_in != "never":
            end = Timestamp(seconds=int(session.now) + span(expires_in, "--expires-in"))
    if not paths:
        raise Failure("nothing to change", "authsvc client update --help tells what there is")
    given.setdefault("client_name", "-")  # required in the message; counts where the mask has it
    answer = session.call(
        ClientServiceStub(session.channel).UpdateClient,
        clients_pb2.UpdateClientRequest(
            client=clients_pb2.Client(
                client_id=client_id,
                etag=etag,
                metadata=clients_pb2.ClientMetadata(**given),
                approval_expire_time=end,
            ),
            update_mask=FieldMask(paths=paths),
        ),
    )
    if session.out.json:
        return session.out.document(answer)
    return show_client(session, answer.client)


def delete(session: Session, client_id: ClientId, etag: Etag = "") -> None:
    """Delete a client, and kill every token that it has."""
    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    answer = session.call(
        ClientServiceStub(session.channel).DeleteClient,
        clients_pb2.DeleteClientRequest(client_id=client_id, etag=etag),
    )
    if session.out.json:
        return session.out.document(answer)
    session.out.pairs((("client_id", client_id), ("revision", answer.revision)))
    return session.out.note("Every token that it had is dead.")


def rotate_secret(
    session: Session,
    client_id: ClientId,
    overlap: Annotated[
        str | None,
        typer.Option(
            metavar="SPAN",
            help="How long the old secret works too: 12h, 30d at most.",
            show_default="not at all",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the secret alone.")] = False,
) -> None:
    """Make a new secret of a client; it is shown once, here."""
    from google.protobuf.timestamp_pb2 import Timestamp

    from authsvc_client.v1 import clients_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub

    request = clients_pb2.RotateClientSecretRequest(client_id=client_id)
    if overlap is not None:
        end = int(session.now) + span(overlap, "--overlap")
        request.overlap_end_time.CopyFrom(Timestamp(seconds=end))
    answer = session.call(ClientServiceStub(session.channel).RotateClientSecret, request)
    if session.out.json:
        return session.out.document(answer)
    if quiet:
        return session.out.raw(answer.client_secret)
    session.out.pairs(
        (
            ("client_id", client_id),
            ("client_secret", Text(answer.client_secret, "bold")),
            ("old one until", time_of(request, "overlap_end_time", session.now)),
            ("revision", answer.revision),
        )
    )
    return shown_once(session, "secret")


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
    columns += [Column("IDENTITY", is_id=True), Column("SCOPES"), Column("BEYOND POLICY")]
    out.table(
        columns,
        [
            (
                client.client_id,
                client.metadata.client_name,
                _state(client),
                _identity(client.metadata) or _methods(client.metadata)[0],
                " ".join(client.metadata.scopes),
                ", ".join(client.policy_diff),
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
    show_client(session, client)
    if client.state in (clients_pb2.CLIENT_STATE_PENDING, clients_pb2.CLIENT_STATE_EXPIRED):
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
    """Let a pending client in, or an expired one again."""
    fields: dict[str, Any] = {}
    if expires_in is not None:
        from google.protobuf.timestamp_pb2 import Timestamp

        end = int(session.now) + span(expires_in, "--expires-in")
        fields["approval_expire_time"] = Timestamp(seconds=end)
    client = _step(session, "Approve", client_id, comment, etag, **fields)
    how = "--as NAME_OF_ITS_CERTIFICATE" if _identity(client.metadata) else "--client-secret-stdin"
    session.out.steps(f"authsvc token issue --client-id {client_id} {how}")


def reject(session: Session, client_id: ClientId, comment: Comment = "", etag: Etag = "") -> None:
    """Turn a pending or expired client away, for good."""
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
            ("beyond policy", list(client.policy_diff)),
            ("revision", answer.revision),
        )
    )
    return client


def show_client(
    session: Session, client: "clients_pb2.Client", secret: str = "", registration_token: str = ""
) -> None:
    """All of it, with what is shown once."""
    from authsvc_client.v1 import clients_pb2

    metadata, now = client.metadata, session.now
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
            ("auth methods", _methods(metadata)),
            ("keys", "given" if metadata.jwks else ""),
            ("grants", [g.removeprefix("GRANT_TYPE_").lower() for g in grants]),
            ("tokens", "bound to its certificate" if bound else "not bound"),
            ("validates", list(metadata.validates)),
            ("may_act", metadata.may_act),
            ("first party", "trusted with passwords of people" if metadata.first_party else ""),
            ("contacts", list(metadata.contacts)),
            ("client_uri", metadata.client_uri),
            ("software", f"{metadata.software_id} {metadata.software_version}".strip()),
            ("registered", time_of(client, "create_time", now)),
            ("by", client.registrant),
            ("reviewed", time_of(client, "review_time", now)),
            ("by ", client.reviewer),
            ("comment", client.review_comment),
            ("approved until", time_of(client, "approval_expire_time", now)),
            ("beyond policy", list(client.policy_diff)),
            ("etag", client.etag),
            ("client_secret", Text(secret, "bold") if secret else ""),
            ("registration token", Text(registration_token, "bold") if registration_token else ""),
        )
    )


def _methods(metadata: "clients_pb2.ClientMetadata") -> list[str]:
    from authsvc_client.v1 import clients_pb2

    names = map(clients_pb2.ClientAuthMethod.Name, metadata.token_endpoint_auth_methods)
    return [name.removeprefix("CLIENT_AUTH_METHOD_").lower() for name in names]


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
