"""Commands about login sessions and grants."""

from typing import Annotated

import typer

from authsvc.cli.calls import ALL, Limit, Session, connected, more, named, time_of
from authsvc.cli.output import Column, command

# What is heavy is imported where it is used: `--help` does not wait for it.
sessions = typer.Typer(no_args_is_help=True, help="Sessions: where people are logged in.")
grants = typer.Typer(no_args_is_help=True, help="Grants: what clients got, for whom.")


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(sessions, connected, name="list")(list_sessions)
    command(sessions, connected, name="end")(end_session)
    command(sessions, connected, name="sign-out")(sign_out)
    app.add_typer(sessions, name="session")
    command(grants, connected, name="list")(list_grants)
    command(grants, connected, name="end")(end_grant)
    app.add_typer(grants, name="grant")


def list_sessions(
    server: Session,
    user: Annotated[str, typer.Option(metavar="USER_ID", help="Only of this user.")] = "",
    limit: Limit = ALL,
) -> None:
    """List live sessions, the newest first."""
    from authsvc_client.v1 import sessions_pb2 as pb
    from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub

    out, method = server.out, SessionServiceStub(server.channel).ListSessions
    found = server.pages(method, pb.ListSessionsRequest(user_id=user), "sessions", limit)
    if out.json:
        return out.document(found)
    if not found.sessions:
        return out.note("no sessions")
    columns = [Column("SESSION ID", is_id=True), Column("USER ID", is_id=True)]
    columns += [Column("FROM"), Column("BY"), Column("OPENED"), Column("EXPIRES")]
    out.table(
        columns,
        [
            (
                each.session_id,
                each.user_id,
                each.address or "-",
                " ".join(each.amr),
                time_of(each, "create_time", server.now),
                time_of(each, "expire_time", server.now),
            )
            for each in found.sessions
        ],
    )
    return more(server, found.next_page_token)


def end_session(
    server: Session,
    session_id: Annotated[
        str, typer.Argument(metavar="SESSION_ID", help="Login session, the `sid` of its tokens.")
    ],
) -> None:
    """End a session, and every grant and token in it."""
    from authsvc_client.v1 import sessions_pb2 as pb
    from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub

    method = SessionServiceStub(server.channel).EndSession
    answer = server.call(method, pb.EndSessionRequest(session_id=session_id))
    if server.out.json:
        return server.out.document(answer)
    server.out.pairs((("session_id", session_id), ("revision", answer.revision)))
    return server.out.note("Every grant and token in it is dead.")


def sign_out(
    server: Session,
    user_id: Annotated[str, typer.Argument(metavar="USER_ID", help="Id of the user.")],
) -> None:
    """End all sessions and grants of a user, and kill its tokens; it may log in again."""
    from authsvc_client.v1 import sessions_pb2 as pb
    from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub

    method = SessionServiceStub(server.channel).SignOutEverywhere
    answer = server.call(method, pb.SignOutEverywhereRequest(user_id=user_id))
    if server.out.json:
        return server.out.document(answer)
    server.out.pairs((("user_id", user_id), ("revision", answer.revision)))
    return server.out.note("Its sessions and grants ended; every token that it had is dead.")


def list_grants(
    server: Session,
    user: Annotated[
        str, typer.Option(metavar="SUBJECT", help="Only for this user, or this client.")
    ] = "",
    client: Annotated[
        str, typer.Option(metavar="CLIENT_ID", help="Only those that this client got.")
    ] = "",
    session: Annotated[
        str, typer.Option(metavar="SESSION_ID", help="Only those in this session.")
    ] = "",
    limit: Limit = ALL,
) -> None:
    """List live grants, the newest first."""
    from authsvc_client.v1 import sessions_pb2 as pb
    from authsvc_client.v1.clients_pb2 import GrantType
    from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub

    out, method = server.out, SessionServiceStub(server.channel).ListGrants
    request = pb.ListGrantsRequest(subject=user, client_id=client, session_id=session)
    found = server.pages(method, request, "grants", limit)
    if out.json:
        return out.document(found)
    if not found.grants:
        return out.note("no grants")
    columns = [Column("GRANT ID", is_id=True), Column("FOR", is_id=True)]
    columns += [Column("CLIENT ID", is_id=True), Column("BY"), Column("FROM"), Column("GOT")]
    out.table(
        [*columns, Column("LAST USED"), Column("SCOPES")],
        [
            (
                each.grant_id,
                each.subject,
                each.client_id,
                named(GrantType, each.grant_type, "GRANT_TYPE_").lower(),
                each.address or "-",
                time_of(each, "create_time", server.now),
                time_of(each, "last_use_time", server.now) or "never",
                " ".join(each.scopes),
            )
            for each in found.grants
        ],
    )
    return more(server, found.next_page_token)


def end_grant(
    server: Session,
    grant_id: Annotated[
        str, typer.Argument(metavar="GRANT_ID", help="Grant, the `gid` of its tokens.")
    ],
) -> None:
    """End a grant: its refresh token, and every access token from it."""
    from authsvc_client.v1 import sessions_pb2 as pb
    from authsvc_client.v1.sessions_pb2_grpc import SessionServiceStub

    method = SessionServiceStub(server.channel).EndGrant
    answer = server.call(method, pb.EndGrantRequest(grant_id=grant_id))
    if server.out.json:
        return server.out.document(answer)
    server.out.pairs((("grant_id", grant_id), ("revision", answer.revision)))
    return server.out.note("Its refresh token and every access token from it are dead.")
