"""Access tokens and API keys that are found: what is kept, and what kills them for ever."""

from dataclasses import replace
from typing import Any

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.model import ApiKey, AuthMethod, Client, ClientMetadata, ClientState, GrantType
from authsvc.store.port import Change, Store, StoredToken, change
from authsvc_client.core.markers import MarkerKind
from tests.store.conftest import Place

CLAIMS: dict[str, Any] = {
    "iss": "https://issuer.test",
    "sub": "alice",
    "aud": ["https://a.test", "https://b.test"],
    "exp": 300,
    "iat": 0,
    "jti": "jti",
    "client_id": "shop",
    "act": {"sub": "agent"},
    "scope": "ä read",
}
KILLERS = [
    change(MarkerKind.CUTOFF_EVERYTHING),
    change(MarkerKind.CUTOFF_CLIENT, "shop"),
    change(MarkerKind.CUTOFF_CLIENT, "agent"),
    change(MarkerKind.CUTOFF_SUBJECT, "alice"),
    change(MarkerKind.CUTOFF_SUBJECT, "agent"),
    change(MarkerKind.CUTOFF_SUBJECT_CLIENT, "alice", "shop"),
    change(MarkerKind.CUTOFF_RESOURCE, "https://b.test"),
]
OTHERS = [
    change(MarkerKind.CUTOFF_CLIENT, "alice's"),
    change(MarkerKind.CUTOFF_SUBJECT_CLIENT, "shop", "alice"),
    change(MarkerKind.CUTOFF_RESOURCE, "https://c.test"),
    change(MarkerKind.CLIENT_CHANGED, "shop"),
]


def _client(client_id: str = "shop") -> Client:
    metadata = ClientMetadata(
        client_id,
        frozenset({GrantType.CLIENT_CREDENTIALS}),
        frozenset({AuthMethod.API_KEY}),
        frozenset({"a.read"}),
    )
    return Client(client_id, metadata, ClientState.APPROVED, 0.0, 0.0, "admin")


def _key(number: int, client_id: str = "shop", **more: Any) -> ApiKey:
    return ApiKey(
        api_key_id=f"key-{number}",
        client_id=client_id,
        display_name="Nächtlich",
        scopes=frozenset({"a.read", "b.write"}),
        rev=7,
        create_time=1.5,
        digest=bytes([number]) * 32,
        **more,
    )


async def test_token_is_found_as_it_was_added_and_by_nothing_else(store: Store) -> None:
    token = StoredToken(b"1" * 32, "kid", {**CLAIMS, "rev": 5}, 300.0)
    await store.tokens.add(token)
    assert await store.tokens.find(b"1" * 32) == token
    assert await store.tokens.find(b"1" * 31 + b"2") is None
    assert await store.tokens.find(b"") is None


@pytest.mark.parametrize("killer", KILLERS, ids=str)
async def test_cutoff_outlives_its_marker(place: Place, store: Store, killer: Change) -> None:
    before = await store.feed.append(OTHERS)
    await store.tokens.add(StoredToken(b"1" * 32, "", {**CLAIMS, "rev": before}, 300.0))
    others = await store.feed.append(OTHERS[:1])
    found = await store.tokens.find(b"1" * 32)
    assert found is not None
    assert not found.cut_off
    at = await store.feed.append([killer])
    assert at > others
    await store.tokens.add(StoredToken(b"2" * 32, "", {**CLAIMS, "rev": at}, 300.0))
    await place.sql("DELETE FROM feed")
    found = await store.tokens.find(b"1" * 32)
    assert found is not None
    assert found.cut_off
    later = await store.tokens.find(b"2" * 32)
    assert later is not None
    assert not later.cut_off


async def test_api_key_is_found_as_it_was_added(store: Store) -> None:
    await store.clients.add(_client())
    await store.clients.add(_client("other"))
    keys = [_key(1), _key(2, expire_time=9.25), _key(3, "other"), _key(4)]
    for key in keys:
        await store.api_keys.add(key, 100)
    assert [await store.api_keys.get(key.api_key_id) for key in keys] == keys
    assert [await store.api_keys.find(key.digest) for key in keys] == keys
    assert await store.api_keys.page("shop", "", 2) == (keys[0], keys[1])
    assert await store.api_keys.page("shop", "key-2", 2) == (keys[3],)
    assert await store.api_keys.page("nobody", "", 2) == ()
    assert await store.api_keys.find(b"\0" * 32) is None
    assert await store.api_keys.get("key-9") is None


async def test_api_keys_have_a_client_and_are_not_too_many(store: Store) -> None:
    with pytest.raises(AuthError) as refused:
        await store.api_keys.add(_key(1), 2)
    assert refused.value.reason is Reason.CLIENT_NOT_FOUND
    await store.clients.add(_client())
    await store.clients.add(_client("other"))
    await store.api_keys.add(_key(1), 2)
    await store.api_keys.add(_key(2), 2)
    with pytest.raises(AuthError) as refused:
        await store.api_keys.add(_key(3), 2)
    assert refused.value.reason is Reason.FIELD_INVALID
    await store.api_keys.add(_key(3, "other"), 2)
    await store.api_keys.delete("key-1")
    await store.api_keys.add(replace(_key(4)), 2)


async def test_deleted_key_is_gone_and_its_death_has_a_revision(store: Store) -> None:
    await store.clients.add(_client())
    await store.api_keys.add(_key(1), 100)
    await store.api_keys.add(_key(2), 100)
    revision = await store.api_keys.delete("key-1")
    page = await store.feed.read(1)
    dead = change(MarkerKind.TOKEN_DEAD, "key-1")
    assert [(m.kind, m.key, m.revision) for m in page.markers] == [(dead.kind, dead.key, revision)]
    with pytest.raises(AuthError) as refused:
        await store.api_keys.delete("key-1")
    assert refused.value.reason is Reason.API_KEY_NOT_FOUND
    assert (await store.feed.read(0)).head == revision
    await store.feed.append([change(MarkerKind.TOKEN_DEAD, "key-2")])  # as any token is revoked
    assert await store.api_keys.page("shop", "", 9) == ()


async def test_durable_cutoff_is_the_highest_of_the_keys(store: Store) -> None:
    one, two = (change(MarkerKind.CUTOFF_CLIENT, name) for name in ("one", "two"))
    assert await store.api_keys.cutoff([]) == 0
    first = await store.feed.append([one])
    second = await store.feed.append([two])
    assert await store.api_keys.cutoff([one.key]) == first
    assert await store.api_keys.cutoff([one.key, two.key]) == second
    assert await store.api_keys.cutoff([change(MarkerKind.CUTOFF_CLIENT, "three").key]) == 0
    everything = await store.feed.append([change(MarkerKind.CUTOFF_EVERYTHING)])
    assert await store.api_keys.cutoff([one.key]) == everything
    assert await store.api_keys.cutoff([]) == everything
