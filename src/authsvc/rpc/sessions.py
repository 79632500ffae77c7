"""SessionService: decode, call the verb, encode."""

from authsvc.model import Grant
from authsvc.rpc.convert import timestamp
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.sessions import Sessions, place_of
from authsvc.store.port import GrantFilter
from authsvc_client.v1 import clients_pb2, sessions_pb2


class SessionServicer:
    """Grants. RPCs that are not here answer UNIMPLEMENTED."""

    def __init__(self, sessions: Sessions, pages: Pages) -> None:
        self._sessions = sessions
        self._pages = pages

    async def ListGrants(
        self, request: sessions_pb2.ListGrantsRequest, _call: Call
    ) -> sessions_pb2.ListGrantsResponse:
        """A page of living grants."""
        wanted = GrantFilter(request.subject, request.client_id, request.session_id)
        what, size = f"grants:{wanted}", request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._sessions.page_of_grants(wanted, after, size + 1)
        return sessions_pb2.ListGrantsResponse(
            grants=[_grant_pb(grant) for grant in found[:size]],
            next_page_token=self._pages.next([place_of(g) for g in found], size, what),
        )

    async def EndGrant(
        self, request: sessions_pb2.EndGrantRequest, call: Call
    ) -> sessions_pb2.EndGrantResponse:
        """Dead at the answer."""
        revision = await self._sessions.end_grant(request.grant_id, call.caller.name)
        return sessions_pb2.EndGrantResponse(revision=revision)


def _grant_pb(grant: Grant) -> sessions_pb2.Grant:
    return sessions_pb2.Grant(
        grant_id=grant.grant_id,
        subject=grant.origin.subject,
        client_id=grant.client_id,
        session_id=grant.origin.session_id,
        grant_type=clients_pb2.GrantType.ValueType(grant.grant_type),
        scopes=sorted(grant.scopes),
        audiences=grant.audiences,
        create_time=timestamp(grant.create_time),
        last_use_time=timestamp(grant.use_time),
        expire_time=timestamp(grant.expire_time),
    )
