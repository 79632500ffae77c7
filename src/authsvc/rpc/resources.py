"""ResourceService: decode, call the verb, encode."""

from authsvc.resources import Resources
from authsvc.rpc import convert
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc_client.v1 import resources_pb2


class ResourceServicer:
    """Resources. RPCs that are not here answer UNIMPLEMENTED."""

    def __init__(self, resources: Resources, pages: Pages) -> None:
        self._resources = resources
        self._pages = pages

    async def CreateResource(
        self, request: resources_pb2.CreateResourceRequest, call: Call
    ) -> resources_pb2.CreateResourceResponse:
        """Creates one."""
        created = await self._resources.create(convert.resource(request.resource), call.now)
        return resources_pb2.CreateResourceResponse(resource=convert.resource_pb(created))

    async def GetResource(
        self, request: resources_pb2.GetResourceRequest, _call: Call
    ) -> resources_pb2.GetResourceResponse:
        """One resource."""
        found = await self._resources.get(request.resource_id)
        return resources_pb2.GetResourceResponse(resource=convert.resource_pb(found))

    async def ListResources(
        self, request: resources_pb2.ListResourcesRequest, _call: Call
    ) -> resources_pb2.ListResourcesResponse:
        """A page of resources."""
        owner, size = request.owner_client_id, request.page_size or PAGE_SIZE_DEFAULT
        what = f"resources:{owner}"
        after = self._pages.after(request.page_token, what)
        found = await self._resources.page(owner, after, size + 1)
        return resources_pb2.ListResourcesResponse(
            resources=[convert.resource_pb(row) for row in found[:size]],
            next_page_token=self._pages.next([row.resource_id for row in found], size, what),
        )

    async def UpdateResource(
        self, request: resources_pb2.UpdateResourceRequest, call: Call
    ) -> resources_pb2.UpdateResourceResponse:
        """Changes the fields of the mask."""
        changed, revision = await self._resources.update(
            convert.resource(request.resource),
            frozenset(request.update_mask.paths),
            convert.version_of(request.resource.etag),
            call.now,
        )
        return resources_pb2.UpdateResourceResponse(
            resource=convert.resource_pb(changed), revision=revision
        )

    async def DeleteResource(
        self, request: resources_pb2.DeleteResourceRequest, _call: Call
    ) -> resources_pb2.DeleteResourceResponse:
        """Deletes one, and its tokens."""
        version = convert.version_of(request.etag)
        revision = await self._resources.delete(request.resource_id, version)
        return resources_pb2.DeleteResourceResponse(revision=revision)
