"""UserService: administration of users, and the import."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from authsvc.config import Passwords
from authsvc.errors import AuthError, Reason
from authsvc.rpc import users as module
from authsvc.store.port import Store
from authsvc_client.v1 import auth_pb2, clients_pb2, users_pb2
from tests.harness import ADMIN, Running, failure, outcome, reason, running

GOOD = "correct horse battery"
Results = list[users_pb2.ImportUsersResult]


async def create(
    server: Running, username: str, *, password: str = "", request_id: str = "", **fields: Any
) -> users_pb2.User:
    request = users_pb2.CreateUserRequest(
        user=users_pb2.User(username=username, **fields), password=password, request_id=request_id
    )
    return (await server.users().CreateUser(request)).user


async def get(server: Running, user_id: str) -> users_pb2.User:
    return (await server.users().GetUser(users_pb2.GetUserRequest(user_id=user_id))).user


async def update(
    server: Running, mask: Iterable[str], **fields: Any
) -> users_pb2.UpdateUserResponse:
    request = users_pb2.UpdateUserRequest(user=users_pb2.User(**fields))
    request.update_mask.paths.extend(mask)
    return await server.users().UpdateUser(request)


async def disable(server: Running, user_id: str, etag: str = "") -> users_pb2.DisableUserResponse:
    request = users_pb2.DisableUserRequest(user_id=user_id, etag=etag, comment="left")
    return await server.users().DisableUser(request)


async def enable(server: Running, user_id: str, etag: str = "") -> users_pb2.EnableUserResponse:
    request = users_pb2.EnableUserRequest(user_id=user_id, etag=etag, comment="is back")
    return await server.users().EnableUser(request)


async def delete(server: Running, user_id: str, etag: str = "") -> int:
    request = users_pb2.DeleteUserRequest(user_id=user_id, etag=etag)
    return (await server.users().DeleteUser(request)).revision


async def listed(server: Running, size: int = 0, **wanted: Any) -> list[users_pb2.User]:
    found: list[users_pb2.User] = []
    request = users_pb2.ListUsersRequest(page_size=size, **wanted)
    while True:
        page = await server.users().ListUsers(request)
        found += page.users
        if not page.next_page_token:
            return found
        assert len(page.users) == (size or 50)
        request.page_token = page.next_page_token


def row(username: str, password: str = "", **fields: Any) -> users_pb2.ImportUsersRow:
    return users_pb2.ImportUsersRow(username=username, password=password, **fields)


async def imported(server: Running, rows: list[users_pb2.ImportUsersRow]) -> Results:
    request = users_pb2.ImportUsersRequest(rows=rows)
    return list((await server.users().ImportUsers(request)).results)


def said(results: Results) -> list[str]:
    """Of each row: created, there, or the reason of its refusal, whose code fits."""
    found = []
    for result in results:
        if result.HasField("user"):
            found.append("created" if result.created else "there")
            continue
        told = AuthError(Reason(result.error.reason))
        assert result.error.code == told.rule.code.value
        assert result.error.message
        assert not result.created
        found.append(told.reason.name)
    return found


# --- made and read ---


async def test_user_is_made_and_read(server: Running) -> None:
    user = await create(
        server, "Zo\u00eb", display_name="Zo\u00eb M.", email="z@x.test", password=GOOD
    )
    assert await get(server, user.user_id) == user
    assert (user.username, user.display_name, user.email) == ("Zo\u00eb", "Zo\u00eb M.", "z@x.test")
    assert user.state == users_pb2.USER_STATE_ACTIVE
    assert (user.etag, len(user.user_id)) == ("1", 32)
    assert user.create_time.seconds == user.update_time.seconds == user.password_set_time.seconds
    assert user.create_time.seconds > 1_600_000_000
    bare = await create(server, "bare")
    assert not bare.HasField("password_set_time")
    absent = users_pb2.GetUserRequest(user_id="0" * 32)
    assert await reason(server.users().GetUser(absent)) == "USER_NOT_FOUND"


async def test_what_is_output_only_is_not_read(server: Running) -> None:
    given: dict[str, Any] = {
        "user_id": "mine",
        "state": users_pb2.USER_STATE_DISABLED,
        "etag": "77",
        "create_time": {"seconds": 1},
        "password_set_time": {"seconds": 1},
    }
    user = await create(server, "output-only", **given)
    assert user.user_id != "mine"
    assert (user.state, user.etag) == (users_pb2.USER_STATE_ACTIVE, "1")
    assert user.create_time.seconds > 1
    assert not user.HasField("password_set_time")


@pytest.mark.parametrize(
    ("username", "password", "told"),
    [
        ("", "", "FIELD_INVALID"),
        (" bad", "", "FIELD_INVALID"),
        ("bad\n", "", "FIELD_INVALID"),
        ("b\u200bad", "", "FIELD_INVALID"),
        ("refused", "short", "PASSWORD_NOT_ACCEPTED"),
        ("refused", "control\x01character", "PASSWORD_NOT_ACCEPTED"),
        ("refused@example.test", "Refused@example.TEST", "PASSWORD_NOT_ACCEPTED"),
    ],
)
async def test_user_is_refused(server: Running, username: str, password: str, told: str) -> None:
    refused = await failure(create(server, username, password=password))
    assert refused.reason == told
    assert refused.fields == (("user.username",) if told == "FIELD_INVALID" else ())
    assert not password or password not in refused.text
    if username == username.strip() and username.isascii():
        assert not username or await listed(server, username=username) == []


async def test_name_is_taken_in_any_case(server: Running) -> None:
    await create(server, "Taken")
    refused = await failure(create(server, "tAKEN"))
    assert (refused.reason, refused.metadata) == ("ALREADY_EXISTS", {"field": "username"})
    other = await create(server, "taking")
    call = update(server, ["username"], user_id=other.user_id, username="TAKEN")
    assert await reason(call) == "ALREADY_EXISTS"
    assert await get(server, other.user_id) == other


async def test_of_two_that_take_one_name_at_once_one_wins(tmp_path: Path, url: str) -> None:
    async with running(tmp_path, url=url) as server:
        for number in range(5):
            calls = [create(server, name, password=GOOD) for name in (f"n{number}", f"N{number}")]
            found = sorted(await asyncio.gather(*map(outcome, calls)))
            assert found == ["ALREADY_EXISTS", "OK"]
        assert len(await listed(server)) == 5


async def test_request_may_be_sent_again(server: Running) -> None:
    given: dict[str, Any] = {"email": "r@x.test", "password": GOOD, "request_id": "request-1"}
    user = await create(server, "repeated", **given)
    again = await asyncio.gather(*(create(server, "repeated", **given) for _ in range(4)))
    assert again == [user] * 4
    for changed in (
        {"email": "other@x.test"},
        {"display_name": "x"},
        {"password": ""},
        {"password": GOOD + "x"},
    ):
        call = create(server, "repeated", **{**given, **changed})
        assert await reason(call) == "REQUEST_ID_REUSED"
    call = create(server, "Repeated", **given)
    assert await reason(call) == "REQUEST_ID_REUSED"
    assert await reason(create(server, "repeated", request_id="request-2")) == "ALREADY_EXISTS"
    for malformed in ("short", "has space", "\u00fc" * 8):
        refused = await failure(create(server, "other", request_id=malformed))
        assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("request_id",))
    assert await get(server, user.user_id) == user


async def test_request_id_of_a_client_is_no_users(server: Running) -> None:
    """Both are kept in one table."""
    metadata = clients_pb2.ClientMetadata(client_name="same id")
    request = auth_pb2.RegisterClientRequest(metadata=metadata, request_id="same-request")
    await server.auth(ADMIN).RegisterClient(request)
    assert (await create(server, "twin", request_id="same-request")).username == "twin"


async def test_list_is_in_order_filtered_and_paged(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        made = [
            await create(server, f"User-{number}", email="Team@x.test" if number % 2 else "")
            for number in range(7)
        ]
        made.sort(key=lambda user: user.user_id)
        stopped = (await disable(server, made[2].user_id)).user
        made[2] = stopped
        assert await listed(server) == made
        assert await listed(server, 3) == made
        assert await listed(server, 7) == made
        team = [user for user in made if user.email]
        assert await listed(server, 1, email="tEAM@X.test") == team
        assert await listed(server, username="user-3") == [
            user for user in made if user.username == "User-3"
        ]
        disabled = users_pb2.USER_STATE_DISABLED
        assert await listed(server, state=disabled) == [stopped]
        assert await listed(server, state=disabled, username="nobody") == []
        first = await server.users().ListUsers(users_pb2.ListUsersRequest(page_size=2))
        for wrong in (
            {"page_token": first.next_page_token, "email": "team@x.test"},
            {"page_token": first.next_page_token, "state": disabled},
            {"page_token": first.next_page_token[:-1]},
            {"page_token": "x"},
        ):
            call = server.users().ListUsers(users_pb2.ListUsersRequest(**wrong))
            assert await reason(call) == "PAGE_TOKEN_INVALID"


# --- changed ---


async def test_fields_of_the_mask_are_changed(server: Running) -> None:
    user = await create(server, "mask", display_name="Old", email="old@x.test")
    changed = await update(
        server,
        ["display_name"],
        user_id=user.user_id,
        username="not-asked",
        display_name="New",
        email="not@x.test",
        etag=user.etag,
    )
    assert changed.revision <= server.app.state.revision  # this worker knows it already
    now = await get(server, user.user_id)
    assert changed.user == now
    assert (now.username, now.display_name, now.email) == ("mask", "New", "old@x.test")
    assert (now.etag, now.create_time) == ("2", user.create_time)
    everything = ["username", "display_name", "email"]
    emptied = await update(server, everything, user_id=user.user_id, username="Mask")
    assert (emptied.user.username, emptied.user.email) == ("Mask", "")
    assert emptied.revision > changed.revision


async def test_change_is_refused(server: Running) -> None:
    user = await create(server, "refuse-change")
    mine: dict[str, Any] = {"user_id": user.user_id, "display_name": "x"}
    for mask, fields, told in (
        ([], mine, "FIELD_INVALID"),
        (["state"], mine, "FIELD_INVALID"),
        (["display_name", "password"], mine, "FIELD_INVALID"),
        (["username"], mine, "FIELD_INVALID"),
        (["display_name"], {"display_name": "x"}, "FIELD_INVALID"),
        (["display_name"], {**mine, "etag": "2"}, "ETAG_MISMATCH"),
        (["display_name"], {**mine, "etag": "x"}, "ETAG_MISMATCH"),
        (["display_name"], {**mine, "user_id": "0"}, "USER_NOT_FOUND"),
    ):
        assert await reason(update(server, mask, **fields)) == told
    assert await get(server, user.user_id) == user


async def test_of_those_who_read_one_etag_one_changes_it(tmp_path: Path, url: str) -> None:
    async with running(tmp_path, url=url) as server:
        user = await create(server, "etag")
        mine = {"user_id": user.user_id, "etag": user.etag}
        found = await asyncio.gather(
            outcome(update(server, ["display_name"], display_name="a", **mine)),
            outcome(update(server, ["email"], email="a@x.test", **mine)),
            outcome(disable(server, **mine)),
            outcome(delete(server, **mine)),
        )
        assert found.count("OK") == 1
        assert set(found) <= {"OK", "ETAG_MISMATCH", "USER_NOT_FOUND"}


async def test_user_is_disabled_and_enabled(server: Running) -> None:
    user = await create(server, "stopped")
    stopped = await disable(server, user.user_id, user.etag)
    assert stopped.user == await get(server, user.user_id)
    assert stopped.user.state == users_pb2.USER_STATE_DISABLED
    assert stopped.revision <= server.app.state.revision
    refused = await failure(disable(server, user.user_id))
    assert (refused.reason, refused.metadata) == ("USER_STATE_CONFLICT", {"state": "DISABLED"})
    assert await reason(enable(server, user.user_id, user.etag)) == "ETAG_MISMATCH"
    back = await enable(server, user.user_id, stopped.user.etag)
    assert back.user.state == users_pb2.USER_STATE_ACTIVE
    assert back.revision > stopped.revision
    refused = await failure(enable(server, user.user_id))
    assert (refused.reason, refused.metadata) == ("USER_STATE_CONFLICT", {"state": "ACTIVE"})
    for call in (disable(server, "0"), enable(server, "0")):
        assert await reason(call) == "USER_NOT_FOUND"


async def test_deleted_user_is_gone_for_good(server: Running) -> None:
    user = await create(server, "gone", request_id="gone-request")
    assert await reason(delete(server, user.user_id, "2")) == "ETAG_MISMATCH"
    assert await delete(server, user.user_id, "1") <= server.app.state.revision
    for call in (get(server, user.user_id), delete(server, user.user_id)):
        assert await reason(call) == "USER_NOT_FOUND"
    again = await create(server, "gone", request_id="gone-request")
    assert again.user_id != user.user_id


# --- the import ---


async def test_bad_rows_spoil_no_other(server: Running) -> None:
    await create(server, "there", email="there@x.test")
    rows = [row(f"import-{number}", display_name=f"N {number}") for number in range(100)]
    bad = {
        3: (row("there", email="other@x.test"), "ALREADY_EXISTS"),
        10: (row("there", email="there@x.test"), "there"),
        17: (row("THERE", email="there@x.test"), "ALREADY_EXISTS"),
        20: (row(""), "FIELD_INVALID"),
        21: (row("x" * 255), "FIELD_INVALID"),
        22: (row("nul\0"), "FIELD_INVALID"),
        23: (row(" space"), "FIELD_INVALID"),
        24: (row("long", display_name="x" * 129), "FIELD_INVALID"),
        30: (row("weak", password="short"), "PASSWORD_NOT_ACCEPTED"),
        40: (row("strong", password=GOOD), "created"),
        99: (row("import-0", display_name="N 0"), "there"),
        98: (row("IMPORT-0", display_name="N 0"), "ALREADY_EXISTS"),
    }
    for at, (each, _) in bad.items():
        rows[at] = each
    results = await imported(server, rows)
    told = [bad[at][1] if at in bad else "created" for at in range(100)]
    assert said(results) == told
    for each, result in zip(rows, results, strict=True):
        if result.HasField("user"):
            assert (result.user.username, result.user.display_name) == (
                each.username,
                each.display_name,
            )
            assert result.user == await get(server, result.user.user_id)
    assert results[40].user.HasField("password_set_time")
    assert "short" not in str(results[30].error)


async def test_user_that_is_there_keeps_its_password(server: Running) -> None:
    first = (await imported(server, [row("keeps", GOOD)]))[0].user
    for password in ("another password", "", "weak"):
        again = await imported(server, [row("keeps", password)])
        assert said(again) == ["there"]
        assert again[0].user == first


async def test_import_that_was_cut_off_may_be_repeated(tmp_path: Path) -> None:
    """The server ends in the midst of it."""
    rows = [row(f"half-{number}", GOOD) for number in range(100)]
    async with running(tmp_path, drain_s=0.0) as server:
        task = asyncio.create_task(imported(server, rows))
        created = 0
        while created < 10:
            created = len(await listed(server))
        assert not task.done()
    [ended] = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError | grpc.aio.AioRpcError)
    async with running(tmp_path) as server:
        before = {user.username: user for user in await listed(server)}
        assert 10 <= len(before) < 100
        results = await imported(server, rows)
        assert said(results) == ["there"] * len(before) + ["created"] * (100 - len(before))
        assert {r.user.username: r.user for r in results} | before == {
            user.username: user for user in await listed(server)
        }
        assert said(await imported(server, rows)) == ["there"] * 100


async def test_same_import_twice_at_once_makes_each_user_once(tmp_path: Path, url: str) -> None:
    rows = [row(f"twice-{number}", GOOD) for number in range(15)]
    async with running(tmp_path, url=url) as server:
        one, two = await asyncio.gather(imported(server, rows), imported(server, rows))
        assert [r.user.user_id for r in one] == [r.user.user_id for r in two]
        for pair in zip(said(one), said(two), strict=True):
            assert sorted(pair) == ["created", "there"]
        assert len(await listed(server)) == 15


async def test_import_is_refused_whole_for_its_size_alone(server: Running) -> None:
    for rows in ([], [row(f"many-{number}") for number in range(101)]):
        refused = await failure(imported(server, rows))
        assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("rows",))


async def test_rows_that_come_too_late_say_so(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMPORT_S_MAX", -1.0)
    assert said(await imported(server, [row("late"), row("later")])) == ["DEADLINE_EXCEEDED"] * 2
    assert await listed(server, username="late") == []


async def test_rows_without_room_or_store_say_so(tmp_path: Path) -> None:
    class Broken:
        def __init__(self, users: Any) -> None:
            self._users = users

        def __getattr__(self, name: str) -> Any:
            return getattr(self._users, name)

        async def add(self, user: Any, *given: Any) -> Any:
            if user.username.startswith("store"):
                raise AuthError(Reason.STORE_UNAVAILABLE, cause="secret cause")
            if user.username.startswith("bug"):
                raise LookupError("secret cause")
            return await self._users.add(user, *given)

    def wrap(store: Store) -> Store:
        broken: Any = Broken(store.users)
        return replace(store, users=broken)

    tight = Passwords(memory_kib=64, passes=1, threads=1, queue=0)
    async with running(tmp_path, wrap=wrap, passwords=tight) as server:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(server.app._passwords._room, "acquire", lambda **_: False)
            rows = [row("full", GOOD), row("store"), row("bug"), row("good")]
            results = await imported(server, rows)
        assert said(results) == ["RATE_LIMITED", "STORE_UNAVAILABLE", "INTERNAL", "created"]
        assert "secret cause" not in str(results)
        assert [user.username for user in await listed(server)] == ["good"]
