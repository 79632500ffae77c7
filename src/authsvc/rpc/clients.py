"""ClientService: decode, call the verb, encode."""

from authsvc.api_keys import ApiKeys
from authsvc.clients import Clients, InitialAccessTokens, OwnClient
from authsvc.errors import AuthError, Reason
from authsvc.model import ClientState
from authsvc.review import ReviewClient
from authsvc.rpc import convert, registered
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.store.port import ClientStore
from authsvc_client.v1 import clients_pb2


class ClientServicer:
    """Clients and their review. RPCs that are not here answer UNIMPLEMENTED."""

    def __init__(
        self,
        store: ClientStore,
        review: ReviewClient,
        clients: Clients,
        own: OwnClient,
        initial: InitialAccessTokens,
        api_keys: ApiKeys,
        pages: Pages,
        client_pb: registered.ClientEncoder,
        pending_s: float,
    ) -> None:
        """After `pending_s` a PENDING client counts as EXPIRED."""
        self._store = store
        self._review = review
        self._clients = clients
        self._own = own
        self._initial = initial
        self._client_pb = client_pb
        self._api_keys = api_keys
        self._pages = pages
        self._pending_s = pending_s

    async def GetClient(
        self, request: clients_pb2.GetClientRequest, _call: Call
    ) -> clients_pb2.GetClientResponse:
        """One client."""
        client = await self._store.get(request.client_id)
        if client is None:
            raise AuthError(Reason.CLIENT_NOT_FOUND)
        return clients_pb2.GetClientResponse(client=self._client_pb(client))

    async def ListClients(
        self, request: clients_pb2.ListClientsRequest, _call: Call
    ) -> clients_pb2.ListClientsResponse:
        """A page of clients."""
        what, size = f"clients:{request.state}", request.page_size or PAGE_SIZE_DEFAULT
        state = ClientState(request.state) if request.state else None
        after = self._pages.after(request.page_token, what)
        found = await self._store.page(state, after, size + 1, self._pending_s)
        return clients_pb2.ListClientsResponse(
            clients=[self._client_pb(client) for client in found[:size]],
            next_page_token=self._pages.next([c.client_id for c in found], size, what),
        )

    async def ApproveClient(
        self, request: clients_pb2.ApproveClientRequest, call: Call
    ) -> clients_pb2.ApproveClientResponse:
        """PENDING or EXPIRED to APPROVED."""
        client, revision = await self._review.approve(
            request.client_id,
            call.caller,
            comment=request.comment,
            version=convert.version_of(request.etag),
            expire_time=(
                registered.seconds(request.approval_expire_time)
                if request.HasField("approval_expire_time")
                else None
            ),
            now=call.now,
        )
        return clients_pb2.ApproveClientResponse(client=self._client_pb(client), revision=revision)

    async def RejectClient(
        self, request: clients_pb2.RejectClientRequest, call: Call
    ) -> clients_pb2.RejectClientResponse:
        """PENDING or EXPIRED to REJECTED."""
        version = convert.version_of(request.etag)
        client, revision = await self._review.reject(
            request.client_id, call.caller, comment=request.comment, version=version
        )
        return clients_pb2.RejectClientResponse(client=self._client_pb(client), revision=revision)

    async def SuspendClient(
        self, request: clients_pb2.SuspendClientRequest, call: Call
    ) -> clients_pb2.SuspendClientResponse:
        """APPROVED to SUSPENDED; cuts its tokens off."""
        version = convert.version_of(request.etag)
        client, revision = await self._review.suspend(
            request.client_id, call.caller, comment=request.comment, version=version
        )
        return clients_pb2.SuspendClientResponse(client=self._client_pb(client), revision=revision)

    async def ResumeClient(
        self, request: clients_pb2.ResumeClientRequest, call: Call
    ) -> clients_pb2.ResumeClientResponse:
        """SUSPENDED to APPROVED; revives nothing."""
        version = convert.version_of(request.etag)
        client, revision = await self._review.resume(
            request.client_id, call.caller, comment=request.comment, version=version
        )
        return clients_pb2.ResumeClientResponse(client=self._client_pb(client), revision=revision)

    async def UpdateClient(
        self, request: clients_pb2.UpdateClientRequest, _call: Call
    ) -> clients_pb2.UpdateClientResponse:
        """Changes the fields of the mask."""
        version = convert.version_of(request.client.etag)
        metadata, expire_time = registered.edited(request)
        client, revision = await self._clients.update(
            request.client.client_id, version, metadata, expire_time
        )
        return clients_pb2.UpdateClientResponse(client=self._client_pb(client), revision=revision)

    async def DeleteClient(
        self, request: clients_pb2.DeleteClientRequest, _call: Call
    ) -> clients_pb2.DeleteClientResponse:
        """With all that it has."""
        version = convert.version_of(request.etag)
        revision = await self._clients.delete(request.client_id, version)
        return clients_pb2.DeleteClientResponse(revision=revision)

    async def RotateClientSecret(
        self, request: clients_pb2.RotateClientSecretRequest, _call: Call
    ) -> clients_pb2.RotateClientSecretResponse:
        """A new secret, beside the old one while they overlap."""
        overlaps = request.HasField("overlap_end_time")
        end = registered.seconds(request.overlap_end_time) if overlaps else None
        secret, revision = await self._clients.rotate_secret(request.client_id, end)
        return clients_pb2.RotateClientSecretResponse(client_secret=secret, revision=revision)

    async def CreateInitialAccessToken(
        self, request: clients_pb2.CreateInitialAccessTokenRequest, _call: Call
    ) -> clients_pb2.CreateInitialAccessTokenResponse:
        """Shows its value."""
        asked = request.initial_access_token
        token, value = await self._initial.create(
            asked.display_name, asked.uses_left or 1, registered.seconds(asked.expire_time)
        )
        return clients_pb2.CreateInitialAccessTokenResponse(
            initial_access_token=registered.initial_access_token_pb(token), value=value
        )

    async def ListInitialAccessTokens(
        self, request: clients_pb2.ListInitialAccessTokensRequest, _call: Call
    ) -> clients_pb2.ListInitialAccessTokensResponse:
        """A page of them."""
        what, size = "initial-access-tokens", request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._initial.page(after, size + 1)
        ids = [token.initial_access_token_id for token in found]
        return clients_pb2.ListInitialAccessTokensResponse(
            initial_access_tokens=map(registered.initial_access_token_pb, found[:size]),
            next_page_token=self._pages.next(ids, size, what),
        )

    async def DeleteInitialAccessToken(
        self, request: clients_pb2.DeleteInitialAccessTokenRequest, _call: Call
    ) -> clients_pb2.DeleteInitialAccessTokenResponse:
        """It registers nobody any more."""
        await self._initial.delete(request.initial_access_token_id)
        return clients_pb2.DeleteInitialAccessTokenResponse()

    async def GetOwnClient(
        self, request: clients_pb2.GetOwnClientRequest, _call: Call
    ) -> clients_pb2.GetOwnClientResponse:
        """The bearer's client (RFC 7592 section 2.1)."""
        client = await self._own.get(request.registration_access_token)
        return clients_pb2.GetOwnClientResponse(client=self._client_pb(client))

    async def UpdateOwnClient(
        self, request: clients_pb2.UpdateOwnClientRequest, call: Call
    ) -> clients_pb2.UpdateOwnClientResponse:
        """Other metadata for the bearer's client (RFC 7592 section 2.2)."""
        client, secret = await self._own.update(
            request.registration_access_token,
            request.client_id,
            registered.registration(request.metadata),
            call.peer,
            call.now,
        )
        return clients_pb2.UpdateOwnClientResponse(
            client=self._client_pb(client), client_secret=secret
        )

    async def DeleteOwnClient(
        self, request: clients_pb2.DeleteOwnClientRequest, _call: Call
    ) -> clients_pb2.DeleteOwnClientResponse:
        """No more of the bearer's client (RFC 7592 section 2.3)."""
        await self._own.delete(request.registration_access_token)
        return clients_pb2.DeleteOwnClientResponse()

    async def CreateApiKey(
        self, request: clients_pb2.CreateApiKeyRequest, call: Call
    ) -> clients_pb2.CreateApiKeyResponse:
        """A key of the caller's, or of any client for an administrator."""
        asked = request.api_key
        expires = asked.expire_time
        key, value = await self._api_keys.create(
            asked.client_id,
            asked.display_name,
            frozenset(asked.scopes),
            expires.seconds + expires.nanos / 1e9 if asked.HasField("expire_time") else None,
            call.require_caller,
        )
        return clients_pb2.CreateApiKeyResponse(api_key=registered.api_key_pb(key), value=value)

    async def ListApiKeys(
        self, request: clients_pb2.ListApiKeysRequest, call: Call
    ) -> clients_pb2.ListApiKeysResponse:
        """A page of keys."""
        caller = await call.require_caller()
        what = f"api-keys:{request.client_id or caller.client_id}"
        size = request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._api_keys.page(request.client_id, caller, after, size + 1)
        return clients_pb2.ListApiKeysResponse(
            api_keys=[registered.api_key_pb(key) for key in found[:size]],
            next_page_token=self._pages.next([key.api_key_id for key in found], size, what),
        )

    async def DeleteApiKey(
        self, request: clients_pb2.DeleteApiKeyRequest, call: Call
    ) -> clients_pb2.DeleteApiKeyResponse:
        """Dead at the answer."""
        caller = await call.require_caller()
        revision = await self._api_keys.delete(request.api_key_id, caller)
        return clients_pb2.DeleteApiKeyResponse(revision=revision)
