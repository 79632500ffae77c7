"""Changes of resources, each one transaction."""

import asyncio
from dataclasses import replace

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.model import Resource, TokenFormat
from authsvc.store.port import RESOURCE_CHANGES, Store, change
from authsvc_client.core.markers import MarkerKind
from tests.store.conftest import Place

A = Resource(
    "urn:a",
    {"a.read": "Reads", "a.write": ""},
    1.5,
    2.5,
    "A",
    token_format=TokenFormat.JWE,
    encryption_jwk="{…}",
    freeze_permissions=True,
)
B = Resource("urn:b", {"b.read": ""}, 1.0, 1.0)


async def _found(store: Store, resource_id: str = "urn:a") -> Resource | None:
    return (await store.resources.catalog()).by_id.get(resource_id)


async def _reason(call: object) -> Reason:
    assert asyncio.iscoroutine(call)
    with pytest.raises(AuthError) as refused:
        await call
    return refused.value.reason


async def test_edit_is_made_of_what_is_there_and_kept_whole(store: Store) -> None:
    await store.resources.add(A)
    assert await _found(store) == A
    seen: list[Resource] = []

    def edit(known: Resource) -> Resource:
        seen.append(known)
        return replace(known, scopes={"a.write": "Writes", "a.add": ""}, update_time=9.0)

    changed, revision = await store.resources.update("urn:a", 1, edit)
    assert seen == [A]
    assert changed == replace(
        A, scopes={"a.write": "Writes", "a.add": ""}, update_time=9.0, version=2
    )
    assert await _found(store) == changed
    page = await store.feed.read(1)
    assert (page.head, [m.revision for m in page.markers][-1]) == (revision, revision)


async def test_refused_edit_changes_nothing(store: Store) -> None:
    await store.resources.add(A)
    head = await store.resources.add(B)

    def steals(known: Resource) -> Resource:
        return replace(known, display_name="x", scopes={"a.read": "", "b.read": ""})

    def fails(known: Resource) -> Resource:
        raise AuthError(Reason.FIELD_INVALID)

    update, delete = store.resources.update, store.resources.delete
    assert await _reason(update("urn:a", None, steals)) is Reason.ALREADY_EXISTS
    assert await _reason(update("urn:a", None, fails)) is Reason.FIELD_INVALID
    assert await _reason(update("urn:a", 2, lambda known: known)) is Reason.ETAG_MISMATCH
    assert await _reason(update("urn:c", None, lambda known: known)) is Reason.RESOURCE_NOT_FOUND
    stranger = update("urn:a", None, lambda known: replace(known, owner_client_id="nobody"))
    assert await _reason(stranger) is Reason.CLIENT_NOT_FOUND
    assert await _reason(delete("urn:a", 2)) is Reason.ETAG_MISMATCH
    assert await _reason(delete("urn:c", None)) is Reason.RESOURCE_NOT_FOUND
    assert await _found(store) == A
    assert (await store.feed.read(0)).head == head


async def test_deleted_resource_is_gone_and_its_tokens_are_cut_off(
    place: Place, store: Store
) -> None:
    await store.resources.add(A)
    revision = await store.resources.delete("urn:a", 1)
    assert await _found(store) is None
    page = await store.feed.read(revision - 1)
    cutoff = change(MarkerKind.CUTOFF_RESOURCE, "urn:a")
    assert {m.key for m in page.markers} == {cutoff.key, RESOURCE_CHANGES[0].key}
    await place.sql("DELETE FROM feed")
    assert await store.api_keys.cutoff([cutoff.key]) == revision
    await store.resources.add(replace(B, scopes={"a.read": ""}))  # its scopes are free
    await store.resources.add(replace(A, scopes={}))


async def test_of_workers_at_once_each_edits_what_the_one_before_left(place: Place) -> None:
    stores = [place.open() for _ in range(3)]
    await stores[0].resources.add(replace(A, display_name=""))

    def edit(known: Resource) -> Resource:
        return replace(known, display_name=known.display_name + "x")

    await asyncio.gather(
        *(stores[number % 3].resources.update("urn:a", None, edit) for number in range(12))
    )
    found = await _found(stores[0])
    assert found is not None
    assert (found.display_name, found.version) == ("x" * 12, 13)
    ends = await asyncio.gather(
        *(store.resources.delete("urn:a", 13) for store in stores), return_exceptions=True
    )
    assert sum(isinstance(end, int) for end in ends) == 1
    gone = [end.reason for end in ends if isinstance(end, AuthError)]
    assert gone == [Reason.RESOURCE_NOT_FOUND] * 2
