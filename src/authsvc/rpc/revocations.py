"""RevocationService: decode, call the verb, encode."""

from authsvc.revocations import Made, Order, Revocations
from authsvc.rpc.pipeline import Call
from authsvc_client.v1 import auth_pb2, revocations_pb2


class RevocationServicer:
    """Cutoffs and dead marks by hand."""

    def __init__(self, revocations: Revocations) -> None:
        self._revocations = revocations

    async def RevokeSubject(
        self, request: revocations_pb2.RevokeSubjectRequest, call: Call
    ) -> revocations_pb2.RevokeSubjectResponse:
        """Cuts a subject off."""
        made = await self._revocations.subject(request.subject, _order(request, call))
        return revocations_pb2.RevokeSubjectResponse(revision=made.revision, impact=_impact(made))

    async def RevokeClient(
        self, request: revocations_pb2.RevokeClientRequest, call: Call
    ) -> revocations_pb2.RevokeClientResponse:
        """Cuts a client off."""
        made = await self._revocations.client(request.client_id, _order(request, call))
        return revocations_pb2.RevokeClientResponse(revision=made.revision, impact=_impact(made))

    async def RevokeSubjectClient(
        self, request: revocations_pb2.RevokeSubjectClientRequest, call: Call
    ) -> revocations_pb2.RevokeSubjectClientResponse:
        """Cuts a client off from a subject."""
        made = await self._revocations.subject_client(
            request.subject, request.client_id, _order(request, call)
        )
        return revocations_pb2.RevokeSubjectClientResponse(
            revision=made.revision, impact=_impact(made)
        )

    async def RevokeSession(
        self, request: revocations_pb2.RevokeSessionRequest, call: Call
    ) -> revocations_pb2.RevokeSessionResponse:
        """Marks a session dead."""
        made = await self._revocations.session(request.session_id, _order(request, call))
        return revocations_pb2.RevokeSessionResponse(revision=made.revision, impact=_impact(made))

    async def RevokeGrant(
        self, request: revocations_pb2.RevokeGrantRequest, call: Call
    ) -> revocations_pb2.RevokeGrantResponse:
        """Marks a grant dead."""
        made = await self._revocations.grant(request.grant_id, _order(request, call))
        return revocations_pb2.RevokeGrantResponse(revision=made.revision, impact=_impact(made))

    async def RevokeEverything(
        self, request: revocations_pb2.RevokeEverythingRequest, call: Call
    ) -> revocations_pb2.RevokeEverythingResponse:
        """Cuts everything off."""
        made = await self._revocations.everything(_order(request, call))
        return revocations_pb2.RevokeEverythingResponse(
            revision=made.revision, impact=_impact(made)
        )


_Request = (
    revocations_pb2.RevokeSubjectRequest
    | revocations_pb2.RevokeClientRequest
    | revocations_pb2.RevokeSubjectClientRequest
    | revocations_pb2.RevokeSessionRequest
    | revocations_pb2.RevokeGrantRequest
    | revocations_pb2.RevokeEverythingRequest
)


def _order(request: _Request, call: Call) -> Order:
    return Order(call.caller.name, request.comment, request.validate_only)


def _impact(made: Made) -> revocations_pb2.RevocationImpact | None:
    if made.impact is None:
        return None
    return revocations_pb2.RevocationImpact(
        kind=auth_pb2.MarkerKind.ValueType(made.marker.kind),
        sessions=made.impact.sessions,
        grants=made.impact.grants,
        api_keys=made.impact.api_keys,
    )
