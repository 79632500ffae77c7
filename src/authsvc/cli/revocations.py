"""Commands that revoke in bulk: `authsvc revoke`."""

from typing import Annotated, Any

import typer

from authsvc.cli.calls import Session, connected
from authsvc.cli.output import command

# What is heavy is imported where it is used: `--help` does not wait for it.
revoke = typer.Typer(no_args_is_help=True, help="Revocations: kill what was issued, in bulk.")

COUNT_MAX = 100_000
"""Where the server stops counting."""

Comment = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the audit.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what would die; change nothing.")]
ClientId = Annotated[str, typer.Argument(metavar="CLIENT_ID", help="Id of the client.")]
Subject = Annotated[
    str, typer.Argument(metavar="SUBJECT", help="User or client, the `sub` of its tokens.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    for step in (everything, client, subject, session, grant):
        command(revoke, connected)(step)
    command(revoke, connected, name="subject-client")(subject_client)
    app.add_typer(revoke, name="revoke")


def everything(server: Session, comment: Comment = "", dry_run: DryRun = False) -> None:
    """Kill everything that was ever issued; secrets and passwords stay."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = pb.RevokeEverythingRequest(comment=comment, validate_only=dry_run)
    method = RevocationServiceStub(server.channel).RevokeEverything
    _answer(server, server.call(method, request), dry_run=dry_run)


def client(
    server: Session, client_id: ClientId, comment: Comment = "", dry_run: DryRun = False
) -> None:
    """Kill all that was issued to a client, its API keys too; its secrets stay."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = pb.RevokeClientRequest(client_id=client_id, comment=comment, validate_only=dry_run)
    method = RevocationServiceStub(server.channel).RevokeClient
    _answer(server, server.call(method, request), dry_run=dry_run)


def subject(server: Session, who: Subject, comment: Comment = "", dry_run: DryRun = False) -> None:
    """Kill all that was issued for a subject, or to it as an actor."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = pb.RevokeSubjectRequest(subject=who, comment=comment, validate_only=dry_run)
    method = RevocationServiceStub(server.channel).RevokeSubject
    _answer(server, server.call(method, request), dry_run=dry_run)


def subject_client(
    server: Session,
    who: Subject,
    client_id: ClientId,
    comment: Comment = "",
    dry_run: DryRun = False,
) -> None:
    """Kill what a client got for a subject."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = pb.RevokeSubjectClientRequest(
        subject=who, client_id=client_id, comment=comment, validate_only=dry_run
    )
    method = RevocationServiceStub(server.channel).RevokeSubjectClient
    _answer(server, server.call(method, request), dry_run=dry_run)


def session(
    server: Session,
    session_id: Annotated[
        str, typer.Argument(metavar="SESSION_ID", help="Login session, the `sid` of its tokens.")
    ],
    comment: Comment = "",
    dry_run: DryRun = False,
) -> None:
    """Kill a login session and all that was issued in it."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = pb.RevokeSessionRequest(session_id=session_id, comment=comment, validate_only=dry_run)
    method = RevocationServiceStub(server.channel).RevokeSession
    _answer(server, server.call(method, request), dry_run=dry_run)


def grant(
    server: Session,
    grant_id: Annotated[
        str, typer.Argument(metavar="GRANT_ID", help="Grant, the `gid` of its tokens.")
    ],
    comment: Comment = "",
    dry_run: DryRun = False,
) -> None:
    """Kill a grant: its refresh token, and all that was issued from it."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = pb.RevokeGrantRequest(grant_id=grant_id, comment=comment, validate_only=dry_run)
    method = RevocationServiceStub(server.channel).RevokeGrant
    _answer(server, server.call(method, request), dry_run=dry_run)


def _answer(server: Session, answer: Any, *, dry_run: bool) -> None:
    out = server.out
    if out.json:
        return out.document(answer)
    if answer.HasField("impact"):
        counts = {name: getattr(answer.impact, name) for name in ("sessions", "grants", "api_keys")}
        shown = {
            name.replace("_", " "): f"{count} or more" if count >= COUNT_MAX else str(count)
            for name, count in counts.items()
        }
    else:
        shown = {"impact": "not counted in time"}
    out.pairs((*shown.items(), ("revision", answer.revision or "")))
    if dry_run:
        return out.note("Nothing was changed.")
    if answer.revision:
        return out.note("Their access tokens are dead too, and not counted.")
    return out.note("It was dead before.")
