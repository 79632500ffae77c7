"""KeyService: decode, call the key ring, encode."""

from collections.abc import Awaitable, Callable

import structlog

from authsvc.keys.jwt import ALGORITHMS_OFFERED
from authsvc.keys.ring import KeyRing
from authsvc.rpc import convert
from authsvc.rpc.limits import field_invalid
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc_client.v1 import keys_pb2

log = structlog.get_logger()


class KeyServicer:
    """Signing keys and their rotation by hand."""

    def __init__(
        self, ring: KeyRing, reach: Callable[[int], Awaitable[None]], pages: Pages
    ) -> None:
        self._ring = ring
        self._reach = reach
        self._pages = pages

    async def ListSigningKeys(
        self, request: keys_pb2.ListSigningKeysRequest, _call: Call
    ) -> keys_pb2.ListSigningKeysResponse:
        """A page of keys, the newest first."""
        what, size = "signing-keys", request.page_size or PAGE_SIZE_DEFAULT
        found = await self._ring.page(self._pages.after(request.page_token, what), size + 1)
        return keys_pb2.ListSigningKeysResponse(
            signing_keys=[convert.signing_key_pb(key) for key in found[:size]],
            next_page_token=self._pages.next([key.kid for key in found], size, what),
        )

    async def PrepareSigningKey(
        self, request: keys_pb2.PrepareSigningKeyRequest, _call: Call
    ) -> keys_pb2.PrepareSigningKeyResponse:
        """The NEXT key."""
        if request.alg and request.alg not in ALGORITHMS_OFFERED:
            raise field_invalid("alg", f"is none of {', '.join(ALGORITHMS_OFFERED)}")
        key, revision = await self._ring.prepare(request.alg)
        await self._reach(revision)
        return keys_pb2.PrepareSigningKeyResponse(
            signing_key=convert.signing_key_pb(key), revision=revision
        )

    async def ActivateSigningKey(
        self, request: keys_pb2.ActivateSigningKeyRequest, _call: Call
    ) -> keys_pb2.ActivateSigningKeyResponse:
        """NEXT to CURRENT."""
        key, revision = await self._ring.activate(request.kid)
        await self._reach(revision)
        return keys_pb2.ActivateSigningKeyResponse(
            signing_key=convert.signing_key_pb(key), revision=revision
        )

    async def RetireSigningKey(
        self, request: keys_pb2.RetireSigningKeyRequest, _call: Call
    ) -> keys_pb2.RetireSigningKeyResponse:
        """NEXT to RETIRED."""
        key, revision = await self._ring.retire(request.kid)
        await self._reach(revision)
        return keys_pb2.RetireSigningKeyResponse(
            signing_key=convert.signing_key_pb(key), revision=revision
        )

    async def TaintSigningKey(
        self, request: keys_pb2.TaintSigningKeyRequest, call: Call
    ) -> keys_pb2.TaintSigningKeyResponse:
        """Any state to TAINTED."""
        done = await self._ring.taint(request.kid, dry=request.validate_only)
        if done.revision:
            log.warning(
                "key.tainted", kid=request.kid, by=call.caller.name, comment=request.comment
            )
            await self._reach(done.revision)
        return keys_pb2.TaintSigningKeyResponse(
            signing_key=convert.signing_key_pb(done.key),
            current_signing_key=convert.signing_key_pb(done.current) if done.current else None,
            revision=done.revision,
        )
