"""Resources: the audiences of tokens, and the scopes that they define."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from authsvc.errors import AuthError, FieldViolation, Reason, not_implemented
from authsvc.model import OWN_SCOPES, Resource, TokenFormat
from authsvc.oauth.resources import is_resource_id
from authsvc.oauth.scopes import is_scope
from authsvc.store.port import ResourceStore

TOKEN_LIFETIME_S_MIN = 60
TOKEN_LIFETIME_S_MAX = 3600
STALENESS_S_MIN = 5


class Resources:
    """Creates and reads resources. authsvc is one itself, whose id is the issuer."""

    def __init__(
        self,
        store: ResourceStore,
        reach: Callable[[int], Awaitable[None]],
        *,
        issuer: str,
        staleness_max_s: float,
    ) -> None:
        self._store = store
        self._reach = reach
        self._issuer = issuer
        self._staleness_max_s = staleness_max_s

    async def ensure_own(self, now: float) -> None:
        """Makes authsvc's own resource where it is missing; one of many workers wins."""
        if self._issuer in (await self._store.catalog()).by_id:
            return
        own = Resource(
            self._issuer, dict.fromkeys(OWN_SCOPES, "authsvc itself"), now, now, "authsvc"
        )
        try:
            await self._store.add(own)
        except AuthError as error:
            if self._issuer not in (await self._store.catalog()).by_id:
                raise AuthError(
                    error.reason, "the scopes of authsvc belong to another issuer's resource"
                ) from error

    async def create(self, asked: Resource, now: float) -> Resource:
        """Raises AuthError FIELD_INVALID, ALREADY_EXISTS, CLIENT_NOT_FOUND or NOT_IMPLEMENTED."""
        if asked.token_format is not TokenFormat.JWT:
            raise not_implemented(f"token_format {asked.token_format.name}")
        violations = tuple(self._violations(asked))
        if violations:
            raise AuthError(
                Reason.FIELD_INVALID,
                f"{violations[0].field}: {violations[0].text}",
                violations=violations,
            )
        resource = replace(asked, create_time=now, update_time=now, version=1)
        await self._reach(await self._store.add(resource))
        return resource

    def _violations(self, asked: Resource) -> list[FieldViolation]:
        wrong: dict[str, str] = {}
        if not is_resource_id(asked.resource_id):
            wrong["resource_id"] = "is no absolute URI without fragment"
        if not all(map(is_scope, asked.scopes)):
            wrong["scopes"] = "holds what is no scope token"
        if not TOKEN_LIFETIME_S_MIN <= asked.token_lifetime_s <= TOKEN_LIFETIME_S_MAX:
            wrong["token_lifetime"] = "is not within 60 s and 1 h"  # noqa: S105 - no password
        bound = asked.staleness_max_s
        if bound is not None and not STALENESS_S_MIN <= bound <= self._staleness_max_s:
            wrong["staleness_max"] = f"is not within 5 s and {self._staleness_max_s:.0f} s"
        return [FieldViolation(f"resource.{field}", text) for field, text in wrong.items()]

    async def get(self, resource_id: str) -> Resource:
        """Raises AuthError RESOURCE_NOT_FOUND."""
        resource = (await self._store.catalog()).by_id.get(resource_id)
        if resource is None:
            raise AuthError(Reason.RESOURCE_NOT_FOUND)
        return resource

    async def page(self, owner: str, after: str, limit: int) -> list[Resource]:
        """In the order of their ids, from the one after `after`."""
        rows = (await self._store.catalog()).by_id
        wanted = (rows[key] for key in sorted(rows) if key > after)
        return [row for row in wanted if owner in ("", row.owner_client_id)][:limit]
