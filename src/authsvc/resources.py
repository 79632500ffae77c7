"""Resources: the audiences of tokens, and the scopes that they define."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.keys.jwe import Encrypter
from authsvc.model import OWN_SCOPES, Resource, TokenFormat
from authsvc.oauth.resources import is_resource_id
from authsvc.oauth.scopes import is_scope
from authsvc.store.port import ResourceStore
from authsvc_client.core.markers import STALENESS_S_MIN

TOKEN_LIFETIME_S_MIN = 60
TOKEN_LIFETIME_S_MAX = 3600

EDITABLE = {
    "display_name": "display_name",
    "owner_client_id": "owner_client_id",
    "scopes": "scopes",
    "token_format": "token_format",
    "token_lifetime": "token_lifetime_s",
    "staleness_max": "staleness_max_s",
    "encryption_jwk": "encryption_jwk",
    "freeze_permissions": "freeze_permissions",
}
"""Field of a resource as it is asked for -> where it is kept."""
_OWN_EDITABLE = frozenset({"display_name", "token_lifetime", "staleness_max"})


class Resources:
    """Administers resources. authsvc is one itself, whose id is the issuer."""

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
        """Raises AuthError FIELD_INVALID, ALREADY_EXISTS or CLIENT_NOT_FOUND."""
        self._require_valid(asked)
        resource = replace(asked, create_time=now, update_time=now, version=1)
        await self._reach(await self._store.add(resource))
        return resource

    async def update(
        self, asked: Resource, fields: frozenset[str], version: int | None, now: float
    ) -> tuple[Resource, int]:
        """Changes these fields, names of EDITABLE, to what is asked; answers the revision too.

        Raises AuthError RESOURCE_NOT_FOUND, ETAG_MISMATCH, and as `create`.
        """
        allowed = EDITABLE.keys() if asked.resource_id != self._issuer else _OWN_EDITABLE
        if not fields or not fields <= allowed:
            text = f"names one or more of: {', '.join(sorted(allowed))}"
            raise _invalid([FieldViolation("update_mask", text)])
        changed = {EDITABLE[field]: getattr(asked, EDITABLE[field]) for field in fields}

        def edit(known: Resource) -> Resource:
            resource = replace(known, **changed, update_time=now)
            self._require_valid(resource)
            return resource

        resource, revision = await self._store.update(asked.resource_id, version, edit)
        await self._reach(revision)
        return resource, revision

    async def delete(self, resource_id: str, version: int | None) -> int:
        """Deletes a resource, and with it every token that names it; answers the revision.

        Raises AuthError RESOURCE_NOT_FOUND, ETAG_MISMATCH, and FIELD_INVALID for authsvc itself.
        """
        if resource_id == self._issuer:
            raise _invalid([FieldViolation("resource_id", "is authsvc itself")])
        revision = await self._store.delete(resource_id, version)
        await self._reach(revision)
        return revision

    def _require_valid(self, asked: Resource) -> None:
        violations = self._violations(asked)
        if violations:
            raise _invalid(violations)

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
        if bool(asked.encryption_jwk) is not (asked.token_format is TokenFormat.JWE):
            wrong["encryption_jwk"] = "goes with token_format JWE, and with no other"
        elif asked.encryption_jwk and not _can_encrypt(asked.encryption_jwk):
            wrong["encryption_jwk"] = "is no public key that can be encrypted to"
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


def _can_encrypt(jwk: str) -> bool:
    try:
        Encrypter(jwk)
    except ValueError:
        return False
    return True


def _invalid(violations: list[FieldViolation]) -> AuthError:
    first = violations[0]
    return AuthError(
        Reason.FIELD_INVALID, f"{first.field}: {first.text}", violations=tuple(violations)
    )
