"""SessionService: decode, call the verb, encode."""

from authsvc.model import Grant, Session
from authsvc.rpc.convert import timestamp
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.sessions import Sessions, place_of
from authsvc.store.port import GrantFilter
from authsvc_client.v1 import clients_pb2, sessions_pb2


class SessionServicer:
    """Sessions and grants."""

    def __init__(self, sessions: Sessions, pages: Pages) -> None:
        self._sessions = sessions
        self._pages = pages

    async def ListSessions(
        self, request: sessions_pb2.ListSessionsRequest, _call: Call
    ) -> sessions_pb2.ListSessionsResponse:
        """A page of living sessions."""
        what, size = f"sessions:{request.user_id}", request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._sessions.page(request.user_id, after, size + 1)
        return sessions_pb2.ListSessionsResponse(
            sessions=[_session_pb(session) for session in found[:size]],
            next_page_token=self._pages.next([place_of(s) for s in found], size, what),
        )

    async def EndSession(
        self, request: sessions_pb2.EndSessionRequest, call: Call
    ) -> sessions_pb2.EndSessionResponse:
        """Dead at the answer."""
        revision = await self._sessions.end(request.session_id, call.caller.name)
        return sessions_pb2.EndSessionResponse(revision=revision)

    async def SignOutEverywhere(
        self, request: sessions_pb2.SignOutEverywhereRequest, call: Call
    ) -> sessions_pb2.SignOutEverywhereResponse:
        """Cut off at the answer."""
        revision = await self._sessions.sign_out_everywhere(request.user_id, call.caller.name)
        return sessions_pb2.SignOutEverywhereResponse(revision=revision)

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


def _session_pb(session: Session) -> sessions_pb2.Session:
    return sessions_pb2.Session(
        session_id=session.session_id,
        user_id=session.user_id,
        address=session.address,
        create_time=timestamp(session.create_time),
        auth_time=timestamp(session.auth_time),
        acr=session.acr,
        amr=session.amr,
        expire_time=timestamp(session.expire_time),
    )


def _grant_pb(grant: Grant) -> sessions_pb2.Grant:
    return sessions_pb2.Grant(
        grant_id=grant.grant_id,
        subject=grant.origin.subject,
        client_id=grant.client_id,
        session_id=grant.origin.session_id,
        grant_type=clients_pb2.GrantType.ValueType(grant.grant_type),
        scopes=sorted(grant.scopes),
        audiences=grant.audiences,
        address=grant.address,
        create_time=timestamp(grant.create_time),
        last_use_time=timestamp(grant.use_time),
        expire_time=timestamp(grant.expire_time),
    )
