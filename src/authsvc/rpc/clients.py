"""ClientService: decode, call the verb, encode."""

from authsvc.errors import AuthError, Reason
from authsvc.model import ClientState
from authsvc.review import ReviewClient
from authsvc.rpc import convert
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.store.port import ClientStore
from authsvc_client.v1 import clients_pb2


class ClientServicer:
    """Clients and their review. RPCs that are not here answer UNIMPLEMENTED."""

    def __init__(self, store: ClientStore, review: ReviewClient, pages: Pages) -> None:
        self._store = store
        self._review = review
        self._pages = pages

    async def GetClient(
        self, request: clients_pb2.GetClientRequest, _call: Call
    ) -> clients_pb2.GetClientResponse:
        """One client."""
        client = await self._store.get(request.client_id)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        return clients_pb2.GetClientResponse(client=convert.client_pb(client))

    async def ListClients(
        self, request: clients_pb2.ListClientsRequest, _call: Call
    ) -> clients_pb2.ListClientsResponse:
        """A page of clients."""
        what, size = f"clients:{request.state}", request.page_size or PAGE_SIZE_DEFAULT
        state = ClientState(request.state) if request.state else None
        after = self._pages.after(request.page_token, what)
        found = await self._store.page(state, after, size + 1)
        return clients_pb2.ListClientsResponse(
            clients=[convert.client_pb(client) for client in found[:size]],
            next_page_token=self._pages.next([c.client_id for c in found], size, what),
        )

    async def ApproveClient(
        self, request: clients_pb2.ApproveClientRequest, call: Call
    ) -> clients_pb2.ApproveClientResponse:
        """PENDING to APPROVED."""
        expiry = request.approval_expire_time
        client, revision = await self._review.approve(
            request.client_id,
            call.caller,
            comment=request.comment,
            version=convert.version_of(request.etag),
            expire_time=(
                expiry.seconds + expiry.nanos / 1e9
                if request.HasField("approval_expire_time")
                else None
            ),
            now=call.now,
        )
        return clients_pb2.ApproveClientResponse(
            client=convert.client_pb(client), revision=revision
        )

    async def RejectClient(
        self, request: clients_pb2.RejectClientRequest, call: Call
    ) -> clients_pb2.RejectClientResponse:
        """PENDING to REJECTED."""
        version = convert.version_of(request.etag)
        client, revision = await self._review.reject(
            request.client_id, call.caller, comment=request.comment, version=version
        )
        return clients_pb2.RejectClientResponse(client=convert.client_pb(client), revision=revision)

    async def SuspendClient(
        self, request: clients_pb2.SuspendClientRequest, call: Call
    ) -> clients_pb2.SuspendClientResponse:
        """APPROVED to SUSPENDED; cuts its tokens off."""
        version = convert.version_of(request.etag)
        client, revision = await self._review.suspend(
            request.client_id, call.caller, comment=request.comment, version=version
        )
        return clients_pb2.SuspendClientResponse(
            client=convert.client_pb(client), revision=revision
        )

    async def ResumeClient(
        self, request: clients_pb2.ResumeClientRequest, call: Call
    ) -> clients_pb2.ResumeClientResponse:
        """SUSPENDED to APPROVED; revives nothing."""
        version = convert.version_of(request.etag)
        client, revision = await self._review.resume(
            request.client_id, call.caller, comment=request.comment, version=version
        )
        return clients_pb2.ResumeClientResponse(client=convert.client_pb(client), revision=revision)
