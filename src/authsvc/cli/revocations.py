"""Commands that revoke: `authsvc revoke`. Each tells what would die, asks, and does it."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from authsvc.cli.calls import (
    Comment,
    DryRun,
    Session,
    Yes,
    carefully,
    connected,
    named,
    secret_of_stdin,
)
from authsvc.cli.output import Output, command

# What is heavy is imported where it is used: `--help` does not wait for it.
revoke = typer.Typer(
    no_args_is_help=True,
    help="Kill what was issued. Each command tells what would die and asks; --yes does not.",
)

COUNT_MAX = 100_000
"""Where the server stops counting."""

ClientId = Annotated[str, typer.Argument(metavar="CLIENT_ID", help="Id of the client.")]
Subject = Annotated[
    str, typer.Argument(metavar="SUBJECT", help="User or client, the `sub` of its tokens.")
]
SessionId = Annotated[
    str, typer.Argument(metavar="SESSION_ID", help="Login session, the `sid` of its tokens.")
]
GrantId = Annotated[str, typer.Argument(metavar="GRANT_ID", help="Grant, the `gid` of its tokens.")]
Kid = Annotated[str, typer.Argument(metavar="KID", help="Signing key, the `kid` of its tokens.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    each: Callable[..., None]
    for each in (
        *(everything, client, subject, subject_client),
        *(session, grant, token, signing_key),
    ):
        command(revoke, connected, name=each.__name__.replace("_", "-"))(each)
    app.add_typer(revoke, name="revoke")


def everything(
    server: Session, comment: Comment = "", dry_run: DryRun = False, yes: Yes = False
) -> None:
    """Kill everything that was ever issued; secrets and passwords stay."""
    _revoke(server, "Everything", "everything", comment, dry_run=dry_run, yes=yes)


def client(
    server: Session,
    client_id: ClientId,
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill all that was issued to a client, its API keys too; its secrets stay."""
    what = f"all that was issued to client {client_id}"
    _revoke(server, "Client", what, comment, dry_run=dry_run, yes=yes, client_id=client_id)


def subject(
    server: Session,
    who: Subject,
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill all that was issued for a subject, or to it as an actor."""
    what = f"all that was issued for {who}"
    _revoke(server, "Subject", what, comment, dry_run=dry_run, yes=yes, subject=who)


def subject_client(
    server: Session,
    who: Subject,
    client_id: ClientId,
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill what a client got for a subject."""
    ids = {"subject": who, "client_id": client_id}
    what = f"what client {client_id} got for {who}"
    _revoke(server, "SubjectClient", what, comment, dry_run=dry_run, yes=yes, **ids)


def session(
    server: Session,
    session_id: SessionId,
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill a login session and all that was issued in it."""
    what = f"login session {session_id}"
    _revoke(server, "Session", what, comment, dry_run=dry_run, yes=yes, session_id=session_id)


def grant(
    server: Session,
    grant_id: GrantId,
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill a grant: its refresh token, and all that was issued from it."""
    what = f"grant {grant_id}"
    _revoke(server, "Grant", what, comment, dry_run=dry_run, yes=yes, grant_id=grant_id)


def token(
    server: Session,
    jti: Annotated[
        str,
        typer.Option(metavar="JTI", help="An access token by its identity; else it is read."),
    ] = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill one token: that on standard input (with --as, its client), or that of --jti."""
    from authsvc_client.v1 import auth_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    request = (
        auth_pb2.RevokeTokenRequest(jti=jti)
        if jti
        else auth_pb2.RevokeTokenRequest(token=secret_of_stdin("Token"))
    )

    def tell(answer: Any, rehearsal: bool) -> None:
        if server.out.json:
            return server.out.document(answer)
        if not answer.revoked:
            return server.out.title("nothing to revoke: the token is unknown, forged or expired")
        _title(server.out, rehearsal=rehearsal)
        kinds = [
            (named(auth_pb2.MarkerKind, each.kind, "MARKER_KIND_").removesuffix("_DEAD"), each.id)
            for each in answer.revoked
        ]
        pairs = [(kind.lower(), text) for kind, text in kinds]
        return server.out.pairs((*pairs, ("revision", answer.revision or "")))

    method = AuthServiceStub(server.channel).RevokeToken
    carefully(server, method, request, tell, "Kill this token?", dry_run=dry_run, yes=yes)


def signing_key(
    server: Session,
    kid: Kid,
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Kill all tokens of a signing key, as `key taint` does: it never signs again."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    def tell(answer: Any, rehearsal: bool) -> None:
        if server.out.json:
            return server.out.document(answer)
        _title(server.out, rehearsal=rehearsal)
        signs = answer.current_signing_key.kid or "a key that is made then"
        pairs = ("every token of", kid), ("would sign" if rehearsal else "signs now", signs)
        return server.out.pairs((*pairs, ("revision", answer.revision or "")))

    request = keys_pb2.TaintSigningKeyRequest(kid=kid, comment=comment)
    method = KeyServiceStub(server.channel).TaintSigningKey
    question = f"Kill every token of signing key {kid}?"
    carefully(server, method, request, tell, question, dry_run=dry_run, yes=yes)


def _revoke(
    server: Session, marker: str, what: str, comment: str, *, dry_run: bool, yes: bool, **ids: str
) -> None:
    """Calls RevocationService.Revoke<marker>."""
    from authsvc_client.v1 import revocations_pb2 as pb
    from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub

    request = getattr(pb, f"Revoke{marker}Request")(comment=comment, **ids)
    method: Callable[..., Any] = getattr(RevocationServiceStub(server.channel), f"Revoke{marker}")

    def tell(answer: Any, rehearsal: bool) -> None:
        _tell(server.out, answer, rehearsal=rehearsal)

    carefully(server, method, request, tell, f"Kill {what}?", dry_run=dry_run, yes=yes)


def _tell(out: Output, answer: Any, *, rehearsal: bool) -> None:
    if out.json:
        return out.document(answer)
    if not rehearsal and not answer.revision:
        return out.note("It was dead before.")
    if answer.HasField("impact"):
        counts = {name: getattr(answer.impact, name) for name in ("sessions", "grants", "api_keys")}
        shown = {
            name.replace("_", " "): f"{count} or more" if count >= COUNT_MAX else str(count)
            for name, count in counts.items()
        }
    else:
        shown = {"impact": "not counted in time"}
    _title(out, rehearsal=rehearsal)
    out.pairs((*shown.items(), ("revision", answer.revision or "")))
    return out.note("Their access tokens too, which are not counted.")


def _title(out: Output, *, rehearsal: bool) -> None:
    out.title("would die" if rehearsal else "dead", "yellow" if rehearsal else "bold red")
