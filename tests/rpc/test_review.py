"""The review of clients over the wire: every state by every step, and what it leaves behind."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from tests.certs import DAY
from tests.harness import (
    ADMIN,
    Running,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    spiffe,
)

STATES = ("PENDING", "APPROVED", "REJECTED", "EXPIRED", "SUSPENDED")
STEPS = ("Approve", "Reject", "Suspend", "Resume")
ALLOWED = {
    ("PENDING", "Approve"): "APPROVED",
    ("PENDING", "Reject"): "REJECTED",
    ("EXPIRED", "Approve"): "APPROVED",
    ("EXPIRED", "Reject"): "REJECTED",
    ("APPROVED", "Suspend"): "SUSPENDED",
    ("SUSPENDED", "Resume"): "APPROVED",
}
PATHS: dict[str, tuple[str, ...]] = {
    "PENDING": (),
    "APPROVED": ("Approve",),
    "REJECTED": ("Reject",),
    "EXPIRED": (),
    "SUSPENDED": ("Approve", "Suspend"),
}


def _step(server: Running, step: str, client_id: str, **more: Any) -> Awaitable[Any]:
    request = getattr(clients_pb2, f"{step}ClientRequest")(client_id=client_id, **more)
    by = server.clients()
    answer: Awaitable[Any] = getattr(by, f"{step}Client")(request)
    return answer


async def _get(server: Running, client_id: str) -> clients_pb2.Client:
    request = clients_pb2.GetClientRequest(client_id=client_id)
    return (await server.clients().GetClient(request)).client


async def _in_state(server: Running, state: str, name: str) -> clients_pb2.Client:
    made = await server.register(identity(name), tls_client_auth_san_uri=spiffe(name))
    for step in PATHS[state]:
        await _step(server, step, made.client.client_id)
    if state == "EXPIRED":
        await server.store.clients.expire(-DAY)  # as if all that wait had done so for long
    return await _get(server, made.client.client_id)


@pytest.mark.parametrize("state", STATES)
async def test_state_machine(server: Running, state: str) -> None:
    for step in STEPS:
        client = await _in_state(server, state, f"{state}_{step}".lower())
        to = ALLOWED.get((state, step))
        head = await server.head()
        if to is None:
            refused = await failure(_step(server, step, client.client_id))
            assert refused.reason == "CLIENT_STATE_CONFLICT"
            assert refused.metadata == {"state": state}
            assert await _get(server, client.client_id) == client
            assert await server.head() == head
            continue
        answer = await _step(server, step, client.client_id, comment="why")
        assert answer.client.state == clients_pb2.ClientState.Value(f"CLIENT_STATE_{to}")
        assert answer.revision == head + 1 == await server.head()
        assert await _get(server, client.client_id) == answer.client


@pytest.mark.parametrize("step", STEPS)
async def test_unknown_client_is_not_found(server: Running, step: str) -> None:
    assert await reason(_step(server, step, "nobody")) == "CLIENT_NOT_FOUND"
    get = clients_pb2.GetClientRequest(client_id="nobody")
    assert await reason(server.clients().GetClient(get)) == "CLIENT_NOT_FOUND"


@pytest.mark.parametrize(("state", "step"), ALLOWED)
async def test_etag_of_another_version_is_refused(server: Running, state: str, step: str) -> None:
    client = await _in_state(server, state, f"etag_{state}_{step}".lower())
    version = int(client.etag)
    for etag in (str(version + 1), str(version - 1), "x", "-1", "\uff11", "9" * 10, f" {version}"):
        found = await outcome(_step(server, step, client.client_id, etag=etag))
        assert found == "ETAG_MISMATCH", etag
    assert await _get(server, client.client_id) == client
    answer = await _step(server, step, client.client_id, etag=client.etag)
    assert answer.client.etag == str(version + 1)


async def test_of_steps_at_once_one_is_taken(at: Running) -> None:
    """Approved and suspended, or rejected: never both, and never twice."""
    client = await _in_state(at, "PENDING", "raced")
    steps = [
        _step(at, step, client.client_id, etag=client.etag)
        for step in ("Approve", "Reject", "Suspend", "Resume") * 8
    ]
    found = await asyncio.gather(*map(outcome, steps))
    assert found.count("OK") == 1
    assert set(found) <= {"OK", "CLIENT_STATE_CONFLICT", "ETAG_MISMATCH"}
    assert (await _get(at, client.client_id)).etag == "2"


async def test_suspended_while_it_is_approved_a_client_ends_suspended(at: Running) -> None:
    client = await _in_state(at, "PENDING", "suspended_at_once")

    async def suspend() -> None:
        while await outcome(_step(at, "Suspend", client.client_id)) == "CLIENT_STATE_CONFLICT":
            pass

    await asyncio.gather(_step(at, "Approve", client.client_id), suspend())
    assert (await _get(at, client.client_id)).state == clients_pb2.CLIENT_STATE_SUSPENDED
    request = issue_request(client.client_id)
    stub = at.auth(identity("suspended_at_once"))
    assert await reason(stub.IssueToken(request)) == "CLIENT_SUSPENDED"


async def test_comment_reviewer_and_time_are_recorded(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        deputy = await server.member("deputy", "admin")
        client = await _in_state(server, "PENDING", "reviewed")
        assert not client.reviewer
        assert not client.HasField("review_time")
        await server.advance(10)
        first = await _step(server, "Approve", client.client_id, comment="Schön ✓\nline two")
        assert first.client.reviewer == spiffe("admin")
        assert first.client.review_comment == "Schön ✓\nline two"
        assert first.client.review_time.seconds == int(clock.wall())
        assert first.client.create_time == client.create_time
        assert first.client.update_time.seconds == int(clock.wall())
        await server.advance(10)
        request = clients_pb2.SuspendClientRequest(client_id=client.client_id, comment="later")
        second = await server.clients(deputy.who).SuspendClient(request)
        assert second.client.reviewer == deputy.client_id
        assert second.client.review_comment == "later"
        assert second.client.review_time.seconds == int(clock.wall())


async def test_approval_expires(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        made = await server.member("ends", "validate", approve=False)
        now = int(clock.wall())
        for seconds in (now, now - 1, 0):
            call = server.approve(made.client_id, approval_expire_time={"seconds": seconds})
            refused = await failure(call)
            assert (refused.reason, refused.fields) == (
                "FIELD_INVALID",
                ("approval_expire_time",),
            )
        answer = await server.approve(made.client_id, approval_expire_time={"seconds": now + 60})
        assert answer.client.approval_expire_time.seconds == now + 60
        validate = auth_pb2.ValidateTokenRequest(token="x")
        await server.token(made)
        assert await outcome(server.auth(made.who).ValidateToken(validate)) == "OK"
        # Suspending and resuming gives no more time.
        await _step(server, "Suspend", made.client_id)
        resumed = await _step(server, "Resume", made.client_id)
        assert resumed.client.approval_expire_time.seconds == now + 60
        await server.advance(59)
        await server.token(made)
        await server.advance(2)
        assert await reason(server.auth(made.who).ValidateToken(validate)) == "CLIENT_EXPIRED"
        assert await reason(server.token(made)) == "CLIENT_EXPIRED"


async def test_scope_must_still_be_there_at_approval(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        await server.resource("https://gone.test", "gone.read")
        made = [
            await server.member(name, scope, approve=False)
            for name, scope in (("gone", "gone.read"), ("there", "validate"))
        ]
        await server.resources().DeleteResource(
            resources_pb2.DeleteResourceRequest(resource_id="https://gone.test")
        )
        refused = await failure(server.approve(made[0].client_id))
        assert (refused.reason, refused.metadata) == (
            "INVALID_CLIENT_METADATA",
            {"field": "scopes"},
        )
        assert await outcome(server.approve(made[1].client_id)) == "OK"


async def test_who_reviews_is_an_administrator(server: Running) -> None:
    client = await _in_state(server, "PENDING", "self_approving")
    own = server.clients(identity("self_approving"))
    request = clients_pb2.ApproveClientRequest(client_id=client.client_id)
    assert await reason(own.ApproveClient(request)) == "CLIENT_PENDING"
    assert (await _get(server, client.client_id)).state == clients_pb2.CLIENT_STATE_PENDING


# --- pages ---


async def test_pages_cover_all_once_in_order(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        made = set()
        for _ in range(7):
            made.add((await server.register(ADMIN, secret=True)).client.client_id)
        clients = server.clients()
        for size in (1, 3, 7, 8, 200, 0):
            seen: list[str] = []
            token = ""
            while True:
                request = clients_pb2.ListClientsRequest(page_size=size, page_token=token)
                page = await clients.ListClients(request)
                assert len(page.clients) <= (size or 50)
                seen += [client.client_id for client in page.clients]
                token = page.next_page_token
                if not token:
                    break
            assert seen == sorted(made), size


async def test_page_holds_what_the_filter_asks_for(server: Running) -> None:
    for state in sorted(STATES, key="EXPIRED".__ne__):  # first: all that wait expire with it
        for number in range(2):
            await _in_state(server, state, f"page_{state}_{number}".lower())
    for state in STATES:
        wanted = clients_pb2.ClientState.Value(f"CLIENT_STATE_{state}")
        found = []
        token = ""
        while True:
            request = clients_pb2.ListClientsRequest(page_size=1, state=wanted, page_token=token)
            page = await server.clients().ListClients(request)
            found += [client.state for client in page.clients]
            token = page.next_page_token
            if not token:
                break
        assert set(found) == {wanted}
        assert len(found) >= 2


async def test_page_token_is_good_for_its_own_list_alone(server: Running, tmp_path: Path) -> None:
    """CVE-2026-33504: a page token is nothing that a caller can write."""
    for number in range(2):
        await server.register(ADMIN, secret=True)
        await server.resource(f"https://page{number}.test", f"page{number}")
    clients, resources = server.clients(), server.resources()
    pending = clients_pb2.CLIENT_STATE_PENDING
    first = await clients.ListClients(clients_pb2.ListClientsRequest(page_size=1))
    filtered = await clients.ListClients(clients_pb2.ListClientsRequest(page_size=1, state=pending))

    listed = await resources.ListResources(resources_pb2.ListResourcesRequest(page_size=1))
    mine, theirs, other = (
        first.next_page_token,
        filtered.next_page_token,
        listed.next_page_token,
    )
    assert mine
    assert theirs
    assert other
    async with running(tmp_path) as elsewhere:
        for _ in range(2):
            await elsewhere.register(ADMIN, secret=True)
        answer = await elsewhere.clients().ListClients(clients_pb2.ListClientsRequest(page_size=1))
        foreign = answer.next_page_token
    flipped = mine[:20] + ("A" if mine[20] != "A" else "B") + mine[21:]
    bad = [theirs, other, foreign, flipped, mine + "=", mine[:-1], mine + "A", "x", "0", "' OR 1=1"]
    bad += ["é", first.clients[0].client_id, mine.swapcase()]
    for token in bad:
        request = clients_pb2.ListClientsRequest(page_size=1, page_token=token)
        assert await reason(clients.ListClients(request)) == "PAGE_TOKEN_INVALID", token
    for token in (mine, other):
        request = clients_pb2.ListClientsRequest(page_size=1, page_token=token, state=pending)
        assert await reason(clients.ListClients(request)) == "PAGE_TOKEN_INVALID"
    for call in (
        clients.ListClients(clients_pb2.ListClientsRequest(page_size=2, page_token=mine)),
        clients.ListClients(
            clients_pb2.ListClientsRequest(page_size=1, page_token=theirs, state=pending)
        ),
        resources.ListResources(resources_pb2.ListResourcesRequest(page_token=other)),
    ):
        assert await outcome(call) == "OK"
    owned = resources_pb2.ListResourcesRequest(page_token=other, owner_client_id="x")
    assert await reason(resources.ListResources(owned)) == "PAGE_TOKEN_INVALID"
