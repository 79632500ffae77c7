"""AuditService: decode, call the verb, encode."""

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from authsvc.audit import Audit, place_of
from authsvc.model import AuditOutcome
from authsvc.rpc.convert import timestamp
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.store.port import AuditEvent, AuditFilter
from authsvc_client.v1 import audit_pb2, error_reason_pb2


class AuditServicer:
    """The audit."""

    def __init__(self, audit: Audit, pages: Pages) -> None:
        self._audit = audit
        self._pages = pages

    async def ListAuditEvents(
        self, request: audit_pb2.ListAuditEventsRequest, _call: Call
    ) -> audit_pb2.ListAuditEventsResponse:
        """A page of it."""
        wanted = _filter(request)
        what, size = f"audit:{wanted}", request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._audit.page_of(wanted, after, size + 1)
        return audit_pb2.ListAuditEventsResponse(
            audit_events=[event_pb(event) for event in found[:size]],
            next_page_token=self._pages.next([place_of(e) for e in found], size, what),
        )


def _filter(request: audit_pb2.ListAuditEventsRequest) -> AuditFilter:
    return AuditFilter(
        start_time=_seconds(request.start_time) if request.HasField("start_time") else None,
        end_time=_seconds(request.end_time) if request.HasField("end_time") else None,
        actor=request.actor,
        subject=request.subject,
        client_id=request.client_id,
        action=request.action,
        outcome=AuditOutcome(request.outcome) if request.outcome else None,
    )


def _seconds(moment: Timestamp) -> float:
    return moment.seconds + moment.nanos / 1e9


def event_pb(event: AuditEvent) -> audit_pb2.AuditEvent:
    """One event."""
    act = event.act
    return audit_pb2.AuditEvent(
        audit_event_id=event.audit_event_id,
        create_time=timestamp(event.create_time),
        action=act.action,
        outcome=audit_pb2.AuditOutcome.ValueType(event.outcome),
        reason=error_reason_pb2.ErrorReason.ValueType(event.reason),
        actor=act.actor,
        on_behalf_of=act.on_behalf_of,
        peer=act.peer,
        address=act.address,
        subject=event.touched.subject,
        client_id=event.touched.client_id,
        object_id=event.touched.object_id,
        update_mask=FieldMask(paths=act.fields) if act.fields else None,
        comment=act.comment,
        revision=event.revision,
        x_request_id=act.request_id,
    )
