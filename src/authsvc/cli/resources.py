"""Commands about resources."""

from typing import Annotated, Any

import typer

from authsvc.cli.calls import ALL, Limit, Session, connected, more, span, time_of
from authsvc.cli.output import Column, command

# What is heavy is imported where it is used: `--help` does not wait for it.
resources = typer.Typer(no_args_is_help=True, help="Resources: audiences and their scopes.")


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(resources, connected)(create)
    command(resources, connected, name="list")(list_resources)
    command(resources, connected)(show)
    app.add_typer(resources, name="resource")


def create(
    session: Session,
    resource_id: Annotated[
        str, typer.Argument(metavar="RESOURCE_ID", help="A URI, such as https://billing.internal")
    ],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE[=TEXT]", help="Scope that it defines, and what it permits; repeatable."
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name for people.")] = "",
    owner: Annotated[
        str, typer.Option(metavar="CLIENT_ID", help="Client that owns it: it may validate.")
    ] = "",
    token_lifetime: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Life of its tokens, 60s to 1h.", show_default="5m"),
    ] = None,
    staleness_max: Annotated[
        str | None,
        typer.Option(
            metavar="SPAN",
            help="Longest age of the state by which its tokens are judged.",
            show_default="the server's",
        ),
    ] = None,
) -> None:
    """Create a resource: an audience of tokens, and its scopes."""
    from google.protobuf.duration_pb2 import Duration

    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    resource = resources_pb2.Resource(
        resource_id=resource_id, display_name=name, owner_client_id=owner
    )
    for each in scope or ():
        scope_name, _, text = each.partition("=")
        resource.scopes.add(name=scope_name, description=text)
    if token_lifetime is not None:
        life = span(token_lifetime, "--token-lifetime")
        resource.token_lifetime.CopyFrom(Duration(seconds=life))
    if staleness_max is not None:
        bound = span(staleness_max, "--staleness-max")
        resource.staleness_max.CopyFrom(Duration(seconds=bound))
    answer = session.call(
        ResourceServiceStub(session.channel).CreateResource,
        resources_pb2.CreateResourceRequest(resource=resource),
    )
    _answer(session, answer)


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


def show(
    session: Session,
    resource_id: Annotated[str, typer.Argument(metavar="RESOURCE_ID", help="Its URI.")],
) -> None:
    """Show all that there is about a resource."""
    from authsvc_client.v1 import resources_pb2
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub

    answer = session.call(
        ResourceServiceStub(session.channel).GetResource,
        resources_pb2.GetResourceRequest(resource_id=resource_id),
    )
    _answer(session, answer)


def _answer(session: Session, answer: Any) -> None:
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
            ("created", time_of(resource, "create_time", session.now)),
            ("updated", time_of(resource, "update_time", session.now)),
            ("etag", resource.etag),
        )
    )
