"""Users and their passwords: what is kept, what each change tells, and who wins a race."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from authsvc.errors import AuthError, Reason
from authsvc.model import (
    AuthMethod,
    Client,
    ClientMetadata,
    ClientState,
    Grant,
    GrantType,
    Origin,
    User,
    UserState,
)
from authsvc.store.port import Change, Counter, Store, UserFilter, change
from authsvc.store.sql_users import FAILURE_S, REQUEST_S, wait_s
from authsvc_client.core.markers import MarkerKind
from tests.store.conftest import Place

HASH, OTHER = "$argon2id$one", "$argon2id$other"
CODE, SECOND = b"1" * 32, b"2" * 32
FIRST = (b"asker and id" + b"." * 20, b"what" + b"." * 28)


def _user(number: int = 1, username: str = "", **more: Any) -> User:
    return User(f"{number:032x}", username or f"user-{number}", 0.0, 0.0, **more)


async def _add(store: Store, number: int = 1, username: str = "", **more: Any) -> User:
    return await store.users.add(_user(number, username, **more), HASH)


async def _refused(call: Awaitable[Any]) -> AuthError:
    with pytest.raises(AuthError) as caught:
        await call
    return caught.value


async def _outcomes(*calls: Awaitable[Any]) -> list[str]:
    """OK or the reason of each, in order."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    return sorted(each.reason.name if isinstance(each, AuthError) else "OK" for each in found)


async def _said(store: Store, revision: int) -> set[tuple[MarkerKind, bytes]]:
    """What a revision tells everybody."""
    page = await store.feed.read(revision - 1)
    return {(m.kind, m.key) for m in page.markers if m.revision == revision}


def _told(*changes: Change) -> set[tuple[MarkerKind, bytes]]:
    return {(one.kind, one.key) for one in changes}


def _changed(user: User) -> Change:
    return change(MarkerKind.USER_CHANGED, user.user_id)


def _cutoff(user: User) -> Change:
    return change(MarkerKind.CUTOFF_SUBJECT, user.user_id)


async def _later(place: Place, seconds: float) -> None:
    """Lets time pass for what ends by itself."""
    if place.backend == "sqlite":
        place.clock.advance(seconds)
        return
    await place.sql(
        f"UPDATE failure SET wait_until = wait_until - {seconds},"
        f" expire_time = expire_time - {seconds}"
    )
    await place.sql(f"UPDATE creation SET expire_time = expire_time - {seconds}")
    await place.sql(f'UPDATE "user" SET reset_expire_time = reset_expire_time - {seconds}')


# --- what is kept ---


async def test_user_is_found_as_it_was_added(store: Store) -> None:
    asked = _user(1, "Zoë", display_name="Zoë Müller", email="Zoe@Example.test")
    added = await store.users.add(asked, HASH)
    assert added == await store.users.get(asked.user_id)
    assert replace(added, create_time=0, update_time=0, password_set_time=None) == asked
    times = (added.create_time, added.update_time, added.password_set_time or 0)
    assert max(times) - min(times) < 1
    assert added.create_time > 1_600_000_000
    for name in ("Zoë", "ZOË", "zoe\u0308"):
        known = await store.users.password_of(name)
        assert known is not None
        assert (known.user, known.password_version, known.hash) == (added, 1, HASH)
        assert known == await store.users.password(asked.user_id)
    for name in ("zoe", "", "Zoë "):
        assert await store.users.password_of(name) is None
    assert await store.users.get("0") is None
    assert await store.users.password("0") is None
    assert HASH not in repr(known)


async def test_user_without_a_password_has_none(store: Store) -> None:
    added = await store.users.add(_user(), "")
    assert added.password_set_time is None
    known = await store.users.password(added.user_id)
    assert known is not None
    assert (known.password_version, known.hash) == (0, "")


async def test_page_is_in_order_and_filtered(store: Store) -> None:
    one = await _add(store, 3, "Ann", email="Shared@Example.test")
    two = await _add(store, 1, "bob", email="shared@example.TEST")
    three = await _add(store, 2, "Cid")
    disabled, _ = await store.users.move(one.user_id, None, UserState.DISABLED)
    page = store.users.page
    assert await page(UserFilter(), "", 9) == (two, three, disabled)
    assert await page(UserFilter(), "", 2) == (two, three)
    assert await page(UserFilter(), three.user_id, 2) == (disabled,)
    assert await page(UserFilter(username="BOB"), "", 9) == (two,)
    assert await page(UserFilter(username="bo"), "", 9) == ()
    assert await page(UserFilter(email="SHARED@example.test"), "", 9) == (two, disabled)
    assert await page(UserFilter(state=UserState.ACTIVE), "", 9) == (two, three)
    everything = UserFilter("ann", "shared@example.test", UserState.DISABLED)
    assert await page(everything, "", 9) == (disabled,)
    assert await page(replace(everything, state=UserState.ACTIVE), "", 9) == ()


async def test_row_of_a_newer_version_does_not_end_the_list(place: Place, store: Store) -> None:
    users = [await _add(store, number) for number in range(1, 5)]
    await place.sql(f"UPDATE \"user\" SET state = 77 WHERE user_id = '{users[1].user_id}'")
    assert await store.users.page(UserFilter(), "", 2) == (users[0], users[2])


# --- names ---


async def test_name_is_unique_without_regard_to_case(store: Store) -> None:
    await _add(store, 1, "Straße")
    for name in ("straße", "STRASSE", "\u017ftrasse"):
        refused = await _refused(_add(store, 2, name))
        assert refused.reason is Reason.ALREADY_EXISTS
        assert refused.metadata == {"field": "username"}
    other = await _add(store, 2, "strase")
    taken = store.users.update(
        other.user_id, None, lambda known: replace(known, username="Strasse")
    )
    assert (await _refused(taken)).reason is Reason.ALREADY_EXISTS
    assert await store.users.get(other.user_id) == other


async def test_of_two_that_take_one_name_at_once_one_wins(place: Place) -> None:
    one, two = place.open(), place.open()
    for number in range(10):
        found = await _outcomes(
            _add(one, 2 * number + 100, f"name-{number}"),
            _add(two, 2 * number + 101, f"NAME-{number}"),
        )
        assert found == ["ALREADY_EXISTS", "OK"]
    await _add(one, 1, "left")
    await _add(one, 2, "right")

    def rename(store: Store, number: int, name: str) -> Awaitable[Any]:
        return store.users.update(
            f"{number:032x}", None, lambda known: replace(known, username=name)
        )

    found = await _outcomes(rename(one, 1, "middle"), rename(two, 2, "MIDDLE"))
    assert found == ["ALREADY_EXISTS", "OK"]


# --- a request that is sent again ---


async def test_same_request_answers_the_same_user(place: Place, store: Store) -> None:
    users = store.users
    added = await users.add(_user(1, "ann"), HASH, FIRST)
    assert await users.add(_user(2, "ann"), OTHER, FIRST) == added
    changed, _ = await users.update(
        added.user_id, None, lambda known: replace(known, email="a@b.test")
    )
    assert await users.add(_user(3, "ann"), OTHER, FIRST) == changed
    known = await users.password(added.user_id)
    assert known is not None
    assert known.hash == HASH
    refused = await _refused(users.add(_user(4, "bob"), "", (FIRST[0], b"other" * 6)))
    assert refused.reason is Reason.REQUEST_ID_REUSED
    refused = await _refused(users.add(_user(4, "ann"), "", (b"other" * 6, FIRST[1])))
    assert refused.reason is Reason.ALREADY_EXISTS
    assert await users.page(UserFilter(), "", 9) == (changed,)
    await _later(place, REQUEST_S)
    refused = await _refused(users.add(_user(5, "ann"), HASH, FIRST))
    assert refused.reason is Reason.ALREADY_EXISTS


async def test_same_request_at_once_makes_one_user(place: Place) -> None:
    stores = [place.open(), place.open()]
    for turn in range(10):  # the first connects as it goes, and meets nobody
        name, request = f"ann-{turn}", (bytes([turn]) * 32, FIRST[1])
        added = await asyncio.gather(
            *(
                store.users.add(_user(10 * turn + n, name), HASH, request)
                for n, store in enumerate(stores * 3)
            )
        )
        assert len(set(added)) == 1
        assert await stores[0].users.page(UserFilter(name), "", 9) == (added[0],)


async def test_request_of_a_deleted_user_makes_another(store: Store) -> None:
    added = await store.users.add(_user(1, "ann"), HASH, FIRST)
    await store.users.delete(added.user_id, None)
    again = await store.users.add(_user(2, "ann"), HASH, FIRST)
    assert again.user_id == _user(2).user_id


# --- changes ---


async def test_update_writes_what_the_edit_makes(store: Store) -> None:
    user = await _add(store, 1, "ann")
    seen: list[User] = []

    def edit(known: User) -> User:
        seen.append(known)
        return replace(known, username="Anna", display_name="Anna", email="Anna@x.test")

    changed, revision = await store.users.update(user.user_id, 1, edit)
    assert seen == [user]
    assert changed == await store.users.get(user.user_id)
    assert changed == replace(edit(user), version=2, update_time=changed.update_time)
    assert await _said(store, revision) == _told(_changed(user))
    assert await store.users.page(UserFilter("ANNA", "anna@X.test"), "", 2) == (changed,)
    await _add(store, 2, "ann")


async def test_update_is_refused_whole(store: Store) -> None:
    user = await _add(store)
    head = (await store.feed.read(0)).head

    def edit(_known: User) -> User:
        raise AuthError(Reason.FIELD_INVALID)

    for version, call, told in (
        (2, lambda known: known, Reason.ETAG_MISMATCH),
        (1, edit, Reason.FIELD_INVALID),
    ):
        refused = await _refused(store.users.update(user.user_id, version, call))
        assert refused.reason is told
    refused = await _refused(store.users.update("0", None, lambda known: known))
    assert refused.reason is Reason.USER_NOT_FOUND
    assert await store.users.get(user.user_id) == user
    assert (await store.feed.read(0)).head == head


async def test_of_those_who_read_one_version_one_changes_it(place: Place) -> None:
    one, two = place.open(), place.open()
    user = await _add(one)

    def edit(known: User) -> User:
        return replace(known, display_name="x")

    found = await _outcomes(
        one.users.update(user.user_id, 1, edit),
        two.users.update(user.user_id, 1, edit),
        one.users.move(user.user_id, 1, UserState.DISABLED),
        two.users.delete(user.user_id, 1),
    )
    assert found.count("OK") == 1
    assert set(found) <= {"OK", "ETAG_MISMATCH", "USER_NOT_FOUND"}


async def test_disabled_user_is_cut_off_and_enabled_is_not_revived(store: Store) -> None:
    user, other = await _add(store, 1), await _add(store, 2)
    disabled, at = await store.users.move(user.user_id, 1, UserState.DISABLED)
    assert disabled == replace(
        user, state=UserState.DISABLED, version=2, update_time=disabled.update_time
    )
    assert await _said(store, at) == _told(_changed(user), _cutoff(user))
    refused = await _refused(store.users.move(user.user_id, None, UserState.DISABLED))
    assert refused.reason is Reason.USER_STATE_CONFLICT
    assert refused.metadata == {"state": "DISABLED"}
    for version in (1, 3):
        refused = await _refused(store.users.move(user.user_id, version, UserState.ACTIVE))
        assert refused.reason is Reason.ETAG_MISMATCH
    enabled, at = await store.users.move(user.user_id, 2, UserState.ACTIVE)
    assert enabled.state is UserState.ACTIVE
    assert await _said(store, at) == _told(_changed(user))
    refused = await _refused(store.users.move(user.user_id, None, UserState.ACTIVE))
    assert refused.reason is Reason.USER_STATE_CONFLICT
    refused = await _refused(store.users.move("0", None, UserState.ACTIVE))
    assert refused.reason is Reason.USER_NOT_FOUND
    assert await store.users.get(other.user_id) == other


async def test_deleted_user_leaves_nothing_but_its_cutoff(place: Place, store: Store) -> None:
    user = await store.users.add(_user(1, "ann"), HASH, FIRST)
    other = await _add(store, 2)
    for each in (user, other):
        await place.sql(
            "INSERT INTO role_assignment"
            " (holder_id, role_uid, resource_id, holder_kind, create_time)"
            f" VALUES ('{each.user_id}', 'role', '', 'user', 0)"
        )
    assert (await _refused(store.users.delete(user.user_id, 2))).reason is Reason.ETAG_MISMATCH
    at = await store.users.delete(user.user_id, 1)
    lost = change(MarkerKind.PERMISSIONS_CHANGED, user.user_id)
    assert await _said(store, at) == _told(_changed(user), _cutoff(user), lost)
    assert (await _refused(store.users.delete(user.user_id, 1))).reason is Reason.USER_NOT_FOUND
    assert await store.users.page(UserFilter(), "", 9) == (other,)
    assert await place.sql("SELECT holder_id FROM role_assignment") == [(other.user_id,)]
    assert await place.sql("SELECT object_id FROM creation") == []


# --- passwords ---


async def test_new_password_cuts_everything_off(store: Store) -> None:
    user = await _add(store)
    await store.users.add_reset_code(user.user_id, CODE, 2**40, 60.0)
    at = await store.users.set_password(user.user_id, OTHER, version=1)
    assert await _said(store, at) == _told(_changed(user), _cutoff(user))
    known = await store.users.password(user.user_id)
    assert known is not None
    assert (known.hash, known.password_version, known.user.version) == (OTHER, 2, 2)
    assert (known.user.password_set_time or 0) >= (user.password_set_time or 0)
    assert await store.users.by_reset_code(CODE) is None


async def test_new_password_is_refused(store: Store) -> None:
    user = await _add(store)
    refused = await _refused(store.users.set_password("0", OTHER))
    assert refused.reason is Reason.USER_NOT_FOUND
    for version in (0, 2):
        refused = await _refused(store.users.set_password(user.user_id, OTHER, version=version))
        assert refused.reason is Reason.INVALID_GRANT
    await store.users.move(user.user_id, None, UserState.DISABLED)
    for call in (
        store.users.set_password(user.user_id, OTHER),
        store.users.add_reset_code(user.user_id, CODE, 0, 60.0),
    ):
        refused = await _refused(call)
        assert refused.reason is Reason.USER_STATE_CONFLICT
        assert refused.metadata == {"state": "DISABLED"}
    known = await store.users.password(user.user_id)
    assert known is not None
    assert (known.hash, known.password_version) == (HASH, 1)
    refused = await _refused(store.users.add_reset_code("0", CODE, 0, 60.0))
    assert refused.reason is Reason.USER_NOT_FOUND


async def test_of_two_who_change_one_password_one_does(place: Place) -> None:
    one, two = place.open(), place.open()
    user = await _add(one)
    found = await _outcomes(
        one.users.set_password(user.user_id, "a", version=1, keep_session="s"),
        two.users.set_password(user.user_id, "b", version=1),
    )
    assert found == ["INVALID_GRANT", "OK"]


async def _client(store: Store, client_id: str, *, first_party: bool) -> None:
    metadata = ClientMetadata(
        client_id,
        frozenset({GrantType.CLIENT_CREDENTIALS}),
        frozenset({AuthMethod.API_KEY}),
        frozenset(),
        first_party=first_party,
    )
    await store.clients.add(Client(client_id, metadata, ClientState.APPROVED, 0.0, 0.0, "admin"))


async def _grant(
    store: Store, place: Place, name: str, client_id: str, subject: str, session: str, **more: Any
) -> None:
    now = place.clock.wall() if place.backend == "sqlite" else 4e9
    grant = Grant(
        grant_id=name,
        client_id=client_id,
        origin=Origin(subject=subject, session_id=session, grant_id=more.pop("parent", "")),
        grant_type=GrantType.PASSWORD,
        scopes=frozenset(),
        audiences=(),
        sender=client_id,
        rev=2**40,
        handle=name.encode().ljust(16, b"."),
        key_id="k",
        create_time=0.0,
        idle_expire_time=now + 100,
        expire_time=more.pop("expire_time", now + 100),
    )
    assert await store.grants.add(grant)


async def _session(
    place: Place, session_id: str, user: User, *, over: bool = False, ended: bool = False
) -> None:
    """As a login makes it."""
    now = place.clock.wall() if place.backend == "sqlite" else 4e9
    await place.sql(
        "INSERT INTO session (session_id, user_id, rev, cutoff_keys, address, acr, amr,"
        " create_time, auth_time, expire_time, end_time) VALUES"
        f" ('{session_id}', '{user.user_id}', {2**40}, '[]', '', '', '[]', 0, 0,"
        f" {1 if over else now + 100}, {1 if ended else 'NULL'})"
    )


async def test_kept_session_keeps_what_first_parties_got_in_it(place: Place, store: Store) -> None:
    user, other = await _add(store, 1), await _add(store, 2)
    await _client(store, "ours", first_party=True)
    await _client(store, "theirs", first_party=False)
    for name, whose, state in (
        ("mine", user, {}),
        ("second", user, {}),
        ("third", user, {}),
        ("over", user, {"over": True}),
        ("ended", user, {"ended": True}),
        ("foreign", other, {}),
    ):
        await _session(place, name, whose, **state)
    mine = user.user_id
    await _grant(store, place, "kept", "ours", mine, "mine")
    await _grant(store, place, "kept-child", "ours", mine, "mine", parent="kept")
    await _grant(store, place, "third-party", "theirs", mine, "mine")
    await _grant(store, place, "its-child", "ours", mine, "mine", parent="third-party")
    await _grant(store, place, "elsewhere", "ours", mine, "second")
    await _grant(store, place, "nowhere", "ours", mine, "")
    await _grant(store, place, "of-nobody", "deleted", mine, "mine")
    await _grant(store, place, "past", "theirs", mine, "mine", expire_time=1.0)
    await _grant(store, place, "not-mine", "theirs", other.user_id, "foreign")
    at = await store.users.set_password(mine, OTHER, version=1, keep_session="mine")
    dead = ("third-party", "its-child", "elsewhere", "nowhere", "of-nobody")
    assert await _said(store, at) == _told(
        _changed(user),
        *(change(MarkerKind.SESSION_DEAD, each) for each in ("second", "third")),
        *(change(MarkerKind.GRANT_DEAD, each) for each in dead),
    )
    grants = (*dead, "kept", "kept-child", "not-mine", "past")
    alive = {name for name in grants if await store.grants.living(name)}
    assert alive == {"kept", "kept-child", "not-mine"}
    rows = await place.sql("SELECT session_id FROM session WHERE end_time IS NULL")
    assert {row[0] for row in rows} == {"mine", "over", "foreign"}


# --- reset codes ---


async def test_code_is_good_once(place: Place, store: Store) -> None:
    user = await _add(store)
    head = (await store.feed.read(0)).head
    end = await store.users.add_reset_code(user.user_id, CODE, head, 60.0)
    assert end > user.create_time + 59
    assert await store.users.by_reset_code(CODE) == user
    assert await store.users.by_reset_code(SECOND) is None
    assert await store.users.reset_password(SECOND, OTHER) is None
    assert (await store.feed.read(0)).head == head
    at = await store.users.reset_password(CODE, OTHER)
    assert at is not None
    assert await _said(store, at) == _told(_changed(user), _cutoff(user))
    known = await store.users.password(user.user_id)
    assert known is not None
    assert (known.hash, known.password_version) == (OTHER, 2)
    assert await store.users.by_reset_code(CODE) is None
    assert await store.users.reset_password(CODE, HASH) is None
    row = 'SELECT reset_digest, reset_rev, reset_expire_time FROM "user"'
    assert await place.sql(row) == [(None, 0, None)]


async def test_of_those_who_use_one_code_one_does(place: Place) -> None:
    one, two = place.open(), place.open()
    user = await _add(one)
    head = (await one.feed.read(0)).head
    for number in range(8):
        await one.users.add_reset_code(user.user_id, CODE, head, 60.0)
        found = await asyncio.gather(
            one.users.reset_password(CODE, f"one {number}"),
            two.users.reset_password(CODE, f"two {number}"),
        )
        assert found.count(None) == 1
        head = max(revision for revision in found if revision is not None)
    known = await one.users.password(user.user_id)
    assert known is not None
    assert known.password_version == 9


End = Callable[[Place, Store, User], Awaitable[Any]]


async def _over(place: Place, _store: Store, _user: User) -> None:
    await _later(place, 60.0)


async def _replaced(_place: Place, store: Store, user: User) -> None:
    await store.users.add_reset_code(user.user_id, SECOND, 2**40, 60.0)


async def _disabled_and_enabled(_place: Place, store: Store, user: User) -> None:
    await store.users.move(user.user_id, None, UserState.DISABLED)
    assert await store.users.by_reset_code(CODE) is None
    await store.users.move(user.user_id, None, UserState.ACTIVE)


ENDS: dict[str, End] = {
    "time": _over,
    "a newer one": _replaced,
    "another password": lambda _, store, user: store.users.set_password(user.user_id, OTHER),
    "disabled": lambda _, store, user: store.users.move(user.user_id, None, UserState.DISABLED),
    "disabled and enabled": _disabled_and_enabled,
    "deleted": lambda _, store, user: store.users.delete(user.user_id, None),
    "its cutoff": lambda _, store, user: store.feed.append([_cutoff(user)]),
    "everything": lambda _, store, _user: store.feed.append([change(MarkerKind.CUTOFF_EVERYTHING)]),
}


@pytest.mark.parametrize("end", ENDS)
async def test_code_ends(place: Place, store: Store, end: str) -> None:
    user = await _add(store)
    head = (await store.feed.read(0)).head
    await store.users.add_reset_code(user.user_id, CODE, head, 60.0)
    await store.feed.append([change(MarkerKind.CUTOFF_SUBJECT, "another")])
    assert await store.users.by_reset_code(CODE) == user
    await ENDS[end](place, store, user)
    before = await store.users.password(user.user_id)
    await place.sql("DELETE FROM feed")
    assert await store.users.by_reset_code(CODE) is None
    assert await store.users.reset_password(CODE, "late") is None
    assert await store.users.password(user.user_id) == before


async def test_rehash_replaces_the_hash_it_knows_alone(store: Store) -> None:
    user = await _add(store)
    head = (await store.feed.read(0)).head
    await store.users.rehash(user.user_id, "another", OTHER)
    before = await store.users.password(user.user_id)
    assert before is not None
    assert before.hash == HASH
    await store.users.rehash(user.user_id, HASH, OTHER)
    assert await store.users.password(user.user_id) == replace(before, hash=OTHER)
    assert (await store.feed.read(0)).head == head


# --- failures ---


ONE, TWO = Counter(b"1" * 32, 2), Counter(b"2" * 32, 100)


async def _counts(place: Place) -> dict[bytes, int]:
    rows = await place.sql("SELECT digest, count FROM failure")
    return {bytes(digest): count for digest, count in rows}


def test_wait_grows_to_a_minute() -> None:
    assert [wait_s(count, 5) for count in range(13)] == [
        *[0.0] * 5,
        *(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0),
    ]
    assert wait_s(10**6, 5) == 60.0


async def test_failures_cost_nothing_then_more_and_more(place: Place, store: Store) -> None:
    charge = store.failures.charge
    assert [await charge([ONE, TWO]) for _ in range(2)] == [0.0, 0.0]
    for count, wait in ((2, 1.0), (3, 2.0), (4, 4.0)):
        left = await charge([ONE, TWO])
        assert wait - 0.9 < left <= wait
        assert await charge([TWO, ONE]) <= left
        assert await _counts(place) == {ONE.digest: count, TWO.digest: count}
        assert await charge([TWO]) == 0.0  # whoever waits for one need not for the other
        await store.failures.take_back([TWO], forget=[])
        await _later(place, left)
        assert await charge([ONE, TWO]) == 0.0


async def test_failures_are_forgotten_one_by_one(place: Place, store: Store) -> None:
    each_s = FAILURE_S / ONE.free
    for _ in range(2):
        await store.failures.charge([ONE])
    for seconds, count in ((each_s - 5, 3), (6, 3), (each_s, 3), (FAILURE_S, 1)):
        await _later(place, seconds)
        assert await store.failures.charge([ONE]) == 0.0
        assert await _counts(place) == {ONE.digest: count}


async def test_good_try_keeps_no_failure_from_being_forgotten(place: Place, store: Store) -> None:
    for _ in range(10):
        await store.failures.charge([TWO])
    for _ in range(10):
        await _later(place, 5)
        await store.failures.charge([TWO])
        await store.failures.take_back([TWO])
    assert 4 <= (await _counts(place))[TWO.digest] <= 5


async def test_wait_is_no_longer_where_the_clock_went_back(place: Place, store: Store) -> None:
    for _ in range(3):
        await store.failures.charge([ONE])
        await _later(place, 1)
    assert await store.failures.charge([ONE]) > 0
    await _later(place, -7200)
    assert await store.failures.charge([ONE]) == 0.0
    assert 3.0 < await store.failures.charge([ONE]) <= 4.0


async def test_many_at_once_are_counted_one_by_one(place: Place) -> None:
    stores = [place.open(), place.open()]
    counters = [Counter(b"a" * 32, 5), Counter(b"p" * 32, 100)]
    found = await asyncio.gather(
        *(stores[n % 2].failures.charge(counters[:: 1 - n % 2 * 2]) for n in range(50))
    )
    assert found.count(0.0) == 5
    assert await _counts(place) == {b"a" * 32: 5, b"p" * 32: 5}


async def test_what_is_taken_back_was_never_there(place: Place, store: Store) -> None:
    for _ in range(2):
        await store.failures.charge([ONE, TWO])
    assert await store.failures.charge([ONE]) > 0
    await store.failures.take_back([ONE, TWO], forget=[])
    assert await _counts(place) == {ONE.digest: 1, TWO.digest: 1}
    assert await store.failures.charge([ONE]) == 0.0
    await store.failures.take_back([TWO], forget=[ONE])
    assert await _counts(place) == {TWO.digest: 0}
    await store.failures.take_back([ONE, TWO], forget=[ONE])
    assert await _counts(place) == {TWO.digest: 0}
    assert await store.failures.charge([ONE, TWO]) == 0.0


async def test_success_beside_failures_takes_nothing_of_theirs(place: Place) -> None:
    one, two = place.open(), place.open()
    await asyncio.gather(*(one.failures.charge([TWO]) for _ in range(20)))
    await asyncio.gather(
        *(store.failures.take_back([TWO], forget=[ONE]) for store in (one, two) * 5),
        *(store.failures.charge([ONE, TWO]) for store in (one, two)),
    )
    assert (await _counts(place))[TWO.digest] == 12


async def test_refusal_is_recorded(place: Place, store: Store) -> None:
    await store.failures.refused("someone", Reason.INVALID_GRANT)
    await store.failures.refused("", Reason.INVALID_GRANT)
    rows = await place.sql("SELECT subject, reason, outcome, revision FROM audit ORDER BY subject")
    assert rows == [("", Reason.INVALID_GRANT, 2, 0), ("someone", Reason.INVALID_GRANT, 2, 0)]


async def test_each_change_is_recorded_once(place: Place, store: Store) -> None:
    users = store.users
    user = await users.add(_user(), HASH, FIRST)
    mine = user.user_id
    changes: list[Callable[[], Awaitable[Any]]] = [
        lambda: users.add(_user(), HASH, FIRST),  # the same: nothing changes
        lambda: users.update(mine, None, lambda known: known),
        lambda: users.set_password(mine, OTHER),
        lambda: users.set_password(mine, OTHER, keep_session="s"),
        lambda: users.rehash(mine, OTHER, HASH),
        lambda: users.rehash(mine, OTHER, HASH),  # another hash by now
        lambda: users.add_reset_code(mine, CODE, 2**40, 60.0),
        lambda: users.reset_password(CODE, OTHER),
        lambda: users.reset_password(CODE, OTHER),  # used up
        lambda: users.move(mine, None, UserState.DISABLED),
        lambda: users.move(mine, None, UserState.ACTIVE),
        lambda: users.delete(mine, None),
    ]
    counted = [await _rows(place, mine)]
    for each in changes:
        await each()
        counted.append(await _rows(place, mine))
    steps = [after - before for before, after in pairwise(counted)]
    assert counted[0] == 1
    assert steps == [0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1]
    text = json.dumps(await place.sql("SELECT * FROM audit"))
    assert HASH not in text
    assert OTHER not in text


async def _rows(place: Place, subject: str) -> int:
    """How often the audit names a subject; and that it names no other."""
    rows = await place.sql("SELECT subject FROM audit")
    assert {row[0] for row in rows} <= {subject}
    return len(rows)
