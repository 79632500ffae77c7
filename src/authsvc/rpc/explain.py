"""ExplainService: decode, call the verb, encode."""

from authsvc.explain import Explained, ExplainToken
from authsvc.identify import NEVER
from authsvc.rpc import convert
from authsvc.rpc.audit import event_pb
from authsvc.rpc.pipeline import Call
from authsvc.store.port import Told
from authsvc_client.core.claims import Claims
from authsvc_client.core.explain import UNREADABLE, Check
from authsvc_client.v1 import auth_pb2, error_reason_pb2, explain_pb2, resources_pb2


class ExplainServicer:
    """Why a token holds or not."""

    def __init__(self, explain: ExplainToken) -> None:
        self._explain = explain

    async def ExplainToken(
        self, request: explain_pb2.ExplainTokenRequest, _call: Call
    ) -> explain_pb2.ExplainTokenResponse:
        """All that there is to say of it."""
        terms = convert.Terms(request.question)
        found = await self._explain(
            request.question.token,
            terms.by(frozenset()),
            request.caller_client_id,
            at_least=terms.at_least,
            strong=terms.strong,
        )
        return _explained_pb(found)


def _explained_pb(found: Explained) -> explain_pb2.ExplainTokenResponse:
    return explain_pb2.ExplainTokenResponse(
        kind=explain_pb2.TokenKind.ValueType(found.kind),
        format=resources_pb2.TokenFormat.ValueType(found.format or 0),
        claims=_claims_pb(found.claims) if found.claims != UNREADABLE else None,
        active=found.active,
        reason=error_reason_pb2.ErrorReason.ValueType(found.reason),
        checks=[_check_pb(check) for check in found.checks],
        markers=[_marker_pb(told) for told in found.markers],
        revision=found.revision,
        check_time=convert.timestamp(found.check_time),
    )


def _claims_pb(claims: Claims) -> auth_pb2.TokenClaims:
    """As of a token that holds, but that anybody may have written it: no time is impossible."""
    times = {
        name: value
        for name in ("expires", "issued", "auth_time")
        if (value := getattr(claims, name)) is not None
    }
    within = {name: min(value, NEVER) for name, value in times.items()}
    return convert.claims_pb(claims._replace(**within))


def _check_pb(check: Check) -> explain_pb2.TokenCheck:
    return explain_pb2.TokenCheck(
        name=check.name,
        outcome=explain_pb2.CheckOutcome.ValueType(check.outcome),
        reason=error_reason_pb2.ErrorReason.ValueType(check.reason),
        detail=check.detail,
    )


def _marker_pb(told: Told) -> explain_pb2.TokenMarker:
    return explain_pb2.TokenMarker(
        kind=auth_pb2.MarkerKind.ValueType(told.change.kind),
        ids=told.change.ids,
        revision=told.revision,
        create_time=convert.timestamp(told.create_time),
        audit_event=event_pb(told.event) if told.event is not None else None,
    )
