"""Commands about resources."""

from enum import StrEnum, auto
from pathlib import Path
from typing import Annotated, Any

import typer

from authsvc.cli.calls import ALL, Limit, Session, connected, more, span, time_of
from authsvc.cli.output import Column, Failure, command

# What is heavy is imported where it is used: `--help` does not wait for it.
resources = typer.Typer(no_args_is_help=True, help="Resources: audiences and their scopes.")


class Format(StrEnum):
    """Forms of access tokens."""

    JWT = auto()
    OPAQUE = auto()
    JWE = auto()


class Field(StrEnum):
    """Fields that can be cleared; names are the contract's."""

    display_name = "name"
    owner_client_id = "owner"
    scopes = "scopes"
    token_format = "format"  # noqa: S105 - no password
    token_lifetime = "token-lifetime"  # noqa: S105
    staleness_max = "staleness-max"
    encryption_jwk = "encryption-jwk"


ResourceId = Annotated[str, typer.Argument(metavar="RESOURCE_ID", help="Its URI.")]
ScopeTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--scope",
        metavar="SCOPE[=TEXT]",
        help="Scope that it defines, and what it permits; repeatable.",
    ),
]
Name = Annotated[str | None, typer.Option("--name", metavar="TEXT", help="Name for people.")]
Owner = Annotated[
    str | None,
    typer.Option("--owner", metavar="CLIENT_ID", help="Client that owns it: it may validate."),
]
FormatOption = Annotated[
    Format | None,
    typer.Option(
        "--format",
        metavar="FORM",
        help=f"Form of its access tokens: {', '.join(Format)}; at first jwt.",
    ),
]
EncryptionJwk = Annotated[
    Path | None,
    typer.Option(
        "--encryption-jwk",
        metavar="FILE",
        help="Public JWK that its tokens are encrypted to; for --format jwe.",
    ),
]
TokenLifetime = Annotated[
    str | None,
    typer.Option(
        "--token-lifetime",
        metavar="SPAN",
        help="Life of its tokens, 60s to 1h; at first 5m.",
    ),
]
StalenessMax = Annotated[
    str | None,
    typer.Option(
        "--staleness-max",
        metavar="SPAN",
        help="Longest age of the state by which its tokens are judged; at first the server's.",
    ),
]
FreezePermissions = Annotated[
    bool | None,
    typer.Option(
        "--freeze-permissions/--live-permissions",
        help="Put permissions into its tokens, or ask for them live; at first live.",
    ),
]
Etag = Annotated[
    str,
    typer.Option(
        "--etag",
        metavar="ETAG",
        help="Only if it is still as `resource show` told with this etag.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(resources, connected)(create)
    command(resources, connected, name="list")(list_resources)
    for step in (show, update, delete):
        command(resources, connected)(step)
    app.add_typer(resources, name="resource")


def create(
    session: Session,
    resource_id: Annotated[
        str, typer.Argument(metavar="RESOURCE_ID", help="A URI, such as https://billing.internal")
    ],
    scope: ScopeTexts = None,
    name: Name = None,
    owner: Owner = None,
    token_format: FormatOption = None,
    encryption_jwk: EncryptionJwk = None,
    token_lifetime: TokenLifetime = None,
    staleness_max: StalenessMax = None,
    freeze_permissions: FreezePermissions = None,
) -> None:
    """Create a resource: an audience of tokens, and its scopes."""
    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    given = _fields(
        scope,
        name,
        owner,
        token_format,
        encryption_jwk,
        token_lifetime,
        staleness_max,
        freeze_permissions,
    )
    answer = session.call(
        ResourceServiceStub(session.channel).CreateResource,
        resources_pb2.CreateResourceRequest(
            resource=resources_pb2.Resource(resource_id=resource_id, **given)
        ),
    )
    _answer(session, answer)


def update(
    session: Session,
    resource_id: ResourceId,
    scope: ScopeTexts = None,
    name: Name = None,
    owner: Owner = None,
    token_format: FormatOption = None,
    encryption_jwk: EncryptionJwk = None,
    token_lifetime: TokenLifetime = None,
    staleness_max: StalenessMax = None,
    freeze_permissions: FreezePermissions = None,
    clear: Annotated[
        list[Field] | None,
        typer.Option(
            metavar="FIELD", help=f"Take back to its default, repeatable: {', '.join(Field)}."
        ),
    ] = None,
    etag: Etag = "",
) -> None:
    """Change what the options name, and nothing else; --scope names all scopes that remain."""
    from google.protobuf.field_mask_pb2 import FieldMask

    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    given = _fields(
        scope,
        name,
        owner,
        token_format,
        encryption_jwk,
        token_lifetime,
        staleness_max,
        freeze_permissions,
    )
    cleared = {field.name for field in clear or ()}
    if twice := sorted(cleared & given.keys()):
        raise Failure(f"--clear {twice[0].replace('_', '-')}: it is given too")
    if not cleared | given.keys():
        raise Failure("nothing to change", "authsvc resource update --help tells what there is")
    answer = session.call(
        ResourceServiceStub(session.channel).UpdateResource,
        resources_pb2.UpdateResourceRequest(
            resource=resources_pb2.Resource(resource_id=resource_id, etag=etag, **given),
            update_mask=FieldMask(paths=sorted(cleared | given.keys())),
        ),
    )
    _answer(session, answer)


def delete(session: Session, resource_id: ResourceId, etag: Etag = "") -> None:
    """Delete a resource, and kill every token that names it."""
    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    answer = session.call(
        ResourceServiceStub(session.channel).DeleteResource,
        resources_pb2.DeleteResourceRequest(resource_id=resource_id, etag=etag),
    )
    if session.out.json:
        return session.out.document(answer)
    session.out.pairs((("resource_id", resource_id), ("revision", answer.revision)))
    return session.out.note("Every token that named it is dead.")


def _fields(
    scope: list[str] | None,
    name: str | None,
    owner: str | None,
    token_format: Format | None,
    encryption_jwk: Path | None,
    token_lifetime: str | None,
    staleness_max: str | None,
    freeze_permissions: bool | None,
) -> dict[str, Any]:
    """Fields of a resource that the options name."""
    from google.protobuf.duration_pb2 import Duration

    from authsvc_client.v1 import resources_pb2

    given: dict[str, Any] = {}
    if scope:
        parts = [each.partition("=") for each in scope]
        given["scopes"] = [
            resources_pb2.Scope(name=name, description=text) for name, _, text in parts
        ]
    if name is not None:
        given["display_name"] = name
    if owner is not None:
        given["owner_client_id"] = owner
    if token_format is not None:
        given["token_format"] = resources_pb2.TokenFormat.Value(f"TOKEN_FORMAT_{token_format.name}")
    if encryption_jwk is not None:
        try:
            given["encryption_jwk"] = encryption_jwk.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"{encryption_jwk}: cannot be read", "a file with one JWK") from error
    if token_lifetime is not None:
        given["token_lifetime"] = Duration(seconds=span(token_lifetime, "--token-lifetime"))
    if staleness_max is not None:
        given["staleness_max"] = Duration(seconds=span(staleness_max, "--staleness-max"))
    if freeze_permissions is not None:
        given["freeze_permissions"] = freeze_permissions
    return given


def list_resources(
    session: Session,
    owner: Annotated[
        str, typer.Option(metavar="CLIENT_ID", help="Only resources of this client.")
    ] = "",
    limit: Limit = ALL,
) -> None:
    """List resources, in the order of their ids."""
    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    out, method = session.out, ResourceServiceStub(session.channel).ListResources
    request = resources_pb2.ListResourcesRequest(owner_client_id=owner)
    found = session.pages(method, request, "resources", limit)
    if out.json:
        return out.document(found)
    if not found.resources:
        return out.note("no resources")
    columns = [Column("RESOURCE ID", is_id=True), Column("NAME"), Column("TOKENS", is_id=True)]
    columns += [Column("OWNER", is_id=True), Column("SCOPES")]
    out.table(
        columns,
        [
            (
                resource.resource_id,
                resource.display_name,
                f"{resource.token_lifetime.seconds} s",
                resource.owner_client_id or "-",
                " ".join(scope.name for scope in resource.scopes),
            )
            for resource in found.resources
        ],
    )
    return more(session, found.next_page_token)


def show(session: Session, resource_id: ResourceId) -> None:
    """Show all that there is about a resource."""
    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    answer = session.call(
        ResourceServiceStub(session.channel).GetResource,
        resources_pb2.GetResourceRequest(resource_id=resource_id),
    )
    _answer(session, answer)


def _answer(session: Session, answer: Any) -> None:
    """Of any call that answers a resource."""
    if session.out.json:
        return session.out.document(answer)
    from authsvc_client.v1 import resources_pb2

    resource: resources_pb2.Resource = answer.resource
    token_format = resources_pb2.TokenFormat.Name(resource.token_format)
    bound = f"{resource.staleness_max.seconds} s" if resource.HasField("staleness_max") else ""
    scopes = [f"{scope.name}  {scope.description}".rstrip() for scope in resource.scopes]
    return session.out.pairs(
        (
            ("resource_id", resource.resource_id),
            ("name", resource.display_name),
            ("owner", resource.owner_client_id),
            ("scopes", scopes),
            ("token format", token_format.removeprefix("TOKEN_FORMAT_")),
            ("tokens live", f"{resource.token_lifetime.seconds} s"),
            ("staleness_max", bound),
            ("encryption_jwk", resource.encryption_jwk),
            ("permissions", "frozen into its tokens" if resource.freeze_permissions else ""),
            ("created", time_of(resource, "create_time", session.now)),
            ("updated", time_of(resource, "update_time", session.now)),
            ("etag", resource.etag),
        )
    )
