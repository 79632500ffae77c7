"""The audit, listed."""

from authsvc.store.port import AuditEvent, AuditFilter, AuditStore


class Audit:
    """Who did what, as an administrator sees it."""

    def __init__(self, store: AuditStore) -> None:
        self._store = store

    async def page_of(self, wanted: AuditFilter, after: str, limit: int) -> tuple[AuditEvent, ...]:
        """Events, the newest first, from the one after the place `after`, if any."""
        time, _, event_id = after.partition(" ")
        place = (float(time), event_id) if after else None
        return await self._store.page(wanted, place, limit)


def place_of(event: AuditEvent) -> str:
    """Its place in the list, for `page_of`."""
    return f"{event.create_time!r} {event.audit_event_id}"
