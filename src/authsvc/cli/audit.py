"""Commands about the audit."""

from datetime import UTC, datetime
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from authsvc.cli.calls import Session, connected, more, named, span
from authsvc.cli.output import Column, Failure, command

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from google.protobuf.timestamp_pb2 import Timestamp

    from authsvc_client.v1 import audit_pb2

audit = typer.Typer(no_args_is_help=True, help="Audit: who did what, and how it ended.")

STYLES = {"SUCCEEDED": "green", "REFUSED": "red"}


class Outcome(StrEnum):
    """How an action ended, to filter by."""

    SUCCEEDED = auto()
    REFUSED = auto()


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(audit, connected, name="list")(list_events)
    app.add_typer(audit, name="audit")


def list_events(
    session: Session,
    since: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Only at or after it: 2026-07-01T12:00:00Z, or 2h, 3d: so long ago.",
        ),
    ] = "",
    until: Annotated[str, typer.Option(metavar="TIME", help="Only before it.")] = "",
    actor: Annotated[
        str,
        typer.Option(
            metavar="ACTOR", help="Only by this one: client, user or name in a certificate."
        ),
    ] = "",
    subject: Annotated[
        str, typer.Option(metavar="SUBJECT", help="Only what touched this user or client.")
    ] = "",
    client: Annotated[
        str, typer.Option(metavar="CLIENT_ID", help="Only what touched this client.")
    ] = "",
    action: Annotated[
        str, typer.Option(metavar="ACTION", help="Only this action, such as DisableUser.")
    ] = "",
    outcome: Annotated[
        Outcome | None,
        typer.Option(metavar="OUTCOME", help=f"Only what ended so: {', '.join(Outcome)}."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Most to list.")] = 100,
) -> None:
    """List what was done, the newest first; --json tells all of it."""
    from authsvc_client.v1 import audit_pb2
    from authsvc_client.v1.audit_pb2_grpc import AuditServiceStub

    request = audit_pb2.ListAuditEventsRequest(
        start_time=_time(since, "--since", session.now),
        end_time=_time(until, "--until", session.now),
        actor=actor,
        subject=subject,
        client_id=client,
        action=action,
    )
    if outcome is not None:
        request.outcome = audit_pb2.AuditOutcome.Value(f"AUDIT_OUTCOME_{outcome.name}")
    out, method = session.out, AuditServiceStub(session.channel).ListAuditEvents
    found = session.pages(method, request, "audit_events", limit)
    if out.json:
        return out.document(found)
    if not found.audit_events:
        return out.note("no audit events")
    columns = [Column("TIME (UTC)", is_id=True), Column("ACTION", is_id=True), Column("OUTCOME")]
    columns += [Column("ACTOR", is_id=True), Column("TOUCHED", is_id=True)]
    out.table(
        [*columns, Column("REVISION", is_id=True)],
        [
            (
                f"{event.create_time.ToDatetime():%Y-%m-%d %H:%M:%S}",
                event.action,
                _outcome(event),
                _actor(event),
                _touched(event),
                event.revision or "-",
            )
            for event in found.audit_events
        ],
    )
    return more(session, found.next_page_token)


def _time(text: str, option: str, now: float) -> "Timestamp | None":
    """A moment, or one that is so long ago."""
    from google.protobuf.timestamp_pb2 import Timestamp

    if not text:
        return None
    if text[0].isdigit() and text[-1] in "smhd":
        return Timestamp(seconds=int(now) - span(text, option))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        hint = "such as 2026-07-01T12:00:00Z, 2026-07-01 (UTC), 2h or 3d"
        raise Failure(f"{option}: not a time: {text}", hint) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    result = Timestamp()
    result.FromDatetime(moment)
    return result


def _outcome(event: "audit_pb2.AuditEvent") -> Text:
    from authsvc_client.v1 import audit_pb2
    from authsvc_client.v1.error_reason_pb2 import ErrorReason

    name = named(audit_pb2.AuditOutcome, event.outcome, "AUDIT_OUTCOME_")
    reason = named(ErrorReason, event.reason, "ERROR_REASON_") if event.reason else ""
    return Text(f"{name.lower()} {reason}".rstrip(), STYLES.get(name, ""))


def _actor(event: "audit_pb2.AuditEvent") -> str:
    who = event.actor or event.peer or event.address or "-"
    return f"{who} for {event.on_behalf_of}" if event.on_behalf_of else who


def _touched(event: "audit_pb2.AuditEvent") -> str:
    touched = dict.fromkeys((event.subject, event.client_id, event.object_id))
    return " ".join(filter(None, touched)) or "-"
