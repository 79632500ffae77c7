"""The review of clients: approve, reject, suspend, resume."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.model import Caller, Catalog, Client, ClientState
from authsvc.store.port import ClientStore, Transition

_REVIEWED = frozenset({ClientState.PENDING, ClientState.EXPIRED})
"""States that wait for a decision."""

log = structlog.get_logger()


class ReviewClient:
    """Takes review steps; each is one transaction with its revision."""

    def __init__(
        self,
        store: ClientStore,
        catalog: Callable[[], Awaitable[Catalog]],
        reach: Callable[[int], Awaitable[None]],
        pending_s: float,
    ) -> None:
        """After `pending_s` a PENDING client counts as EXPIRED."""
        self._store = store
        self._catalog = catalog
        self._reach = reach
        self._pending_s = pending_s

    async def approve(
        self,
        client_id: str,
        caller: Caller,
        *,
        comment: str,
        version: int | None,
        expire_time: float | None,
        now: float,
    ) -> tuple[Client, int]:
        """Lets a PENDING client in, or an EXPIRED one again; AuthError as the contract says."""
        if expire_time is not None and expire_time <= now:
            text = "is in the past"
            raise AuthError(
                Reason.FIELD_INVALID,
                f"approval_expire_time: {text}",
                violations=(FieldViolation("approval_expire_time", text),),
            )
        client = await self._store.get(client_id)
        if client is not None:
            catalog = await self._catalog()
            for scope in sorted(client.metadata.scopes - catalog.owner_of_scope.keys()):
                raise AuthError(
                    Reason.INVALID_CLIENT_METADATA,
                    f"no resource defines {scope}",
                    metadata={"field": "scopes"},
                )
        step = Transition(
            client_id,
            _REVIEWED,
            ClientState.APPROVED,
            caller.name,
            comment,
            version,
            expire_time,
        )
        return await self._take(step)

    async def reject(
        self, client_id: str, caller: Caller, *, comment: str, version: int | None
    ) -> tuple[Client, int]:
        """Turns a PENDING or EXPIRED client away."""
        return await self._take(
            Transition(client_id, _REVIEWED, ClientState.REJECTED, caller.name, comment, version)
        )

    async def suspend(
        self, client_id: str, caller: Caller, *, comment: str, version: int | None
    ) -> tuple[Client, int]:
        """Stops an APPROVED client and kills every token that it has."""
        allowed = frozenset({ClientState.APPROVED})
        step = Transition(
            client_id,
            allowed,
            ClientState.SUSPENDED,
            caller.name,
            comment,
            version,
            cut_off=True,
        )
        return await self._take(step)

    async def resume(
        self, client_id: str, caller: Caller, *, comment: str, version: int | None
    ) -> tuple[Client, int]:
        """Lets a SUSPENDED client in again; what was cut off stays dead."""
        allowed = frozenset({ClientState.SUSPENDED})
        # To APPROVED, by another way than approve: the end of the approval stays what it was.
        step = Transition(
            client_id,
            allowed,
            ClientState.APPROVED,
            caller.name,
            comment,
            version,
            keep_expiry=True,
        )
        return await self._take(step)

    async def _take(self, step: Transition) -> tuple[Client, int]:
        client, revision = await self._store.move(replace(step, pending_s=self._pending_s))
        log.info(
            "client.reviewed",
            client=step.client_id,
            state=step.to.name,
            reviewer=step.reviewer,
            revision=revision,
        )
        await self._reach(revision)
        return client, revision
