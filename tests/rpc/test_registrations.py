"""Registrations: held to the policy, repeated, and by initial access tokens."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from authsvc.config import Registration
from authsvc.model import ClientState
from authsvc_client.v1 import auth_pb2, clients_pb2, revocations_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.certs import Issued
from tests.harness import (
    ADMIN,
    CA,
    SECOND_CA,
    Member,
    Running,
    connect,
    failure,
    hand_clock,
    identity,
    outcome,
    reason,
    running,
    spiffe,
)
from tests.rpc.conftest import API
from tests.rpc.test_clients import (
    APPROVED,
    BASIC,
    PENDING,
    POST,
    Own,
    by_secret,
    client,
    rotate,
    stamp,
)


async def test_the_diff_says_what_goes_beyond_the_policy(tmp_path: Path) -> None:
    given = Registration(scopes=("read", "admin"), auth_methods=("tls_client_auth",), approve=True)
    async with running(tmp_path, registration=given) as server:
        await server.resource(API, "read", "write")
        within = await server.member("within", "read", approve=False)
        shown = await client(server, within.client_id)
        assert (shown.state, shown.reviewer, list(shown.policy_diff)) == (APPROVED, "policy", [])
        await server.token(within)
        beyond = await server.register(
            identity("beyond"),
            scopes=["read", "write", "admin", "register"],
            grant_types=[clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE],
            token_endpoint_auth_methods=[POST],
            validates=[API],
        )
        assert beyond.client.state == PENDING
        assert beyond.client.policy_diff == [
            "authentication client_secret_post",
            "grant token_exchange",
            "scope admin",
            "scope register",
            "scope write",
            f"validates {API}",
        ]


async def test_a_peer_cannot_fill_the_reviewers_desk(tmp_path: Path) -> None:
    given = Registration(pending_per_registrant=2)
    async with running(tmp_path, registration=given) as server:
        peer = identity("peer", dns=("a.test", "b.test"))
        stub = server.auth(peer)
        for name in ("a.test", "b.test"):
            await stub.RegisterClient(_request(tls_client_auth_san_dns=name))
        third = stub.RegisterClient(_request(tls_client_auth_san_uri=spiffe("peer")))
        found = await failure(third)
        assert (found.reason, found.metadata) == ("RATE_LIMITED", {"limit": "2"})
        other = identity("other")
        await server.auth(other).RegisterClient(_request(tls_client_auth_san_uri=spiffe("other")))


# --- registrations that are repeated, and those that bring a token ---


def _request(
    request_id: str = "", token: str = "", **metadata: Any
) -> auth_pb2.RegisterClientRequest:
    metadata.setdefault("client_name", "test")
    return auth_pb2.RegisterClientRequest(
        metadata=clients_pb2.ClientMetadata(**metadata),
        request_id=request_id,
        initial_access_token=token,
    )


async def test_the_same_request_id_answers_the_same_client(at: Running) -> None:
    """AIP-155; the secret of the answer that was lost is replaced."""
    stub = at.auth(ADMIN)
    request = _request("request-1", token_endpoint_auth_methods=[POST, BASIC], scopes=["read"])
    one, two = [await stub.RegisterClient(request) for _ in range(2)]
    assert one.client.client_id == two.client.client_id
    member = Member(ADMIN, two.client.client_id)
    await at.approve(member.client_id)
    refused = "CLIENT_AUTHENTICATION_FAILED"
    assert await reason(by_secret(at, member, one.client_secret)) == refused
    await by_secret(at, member, two.client_secret)
    three = await stub.RegisterClient(request)
    assert (three.client.client_id, three.client_secret) == (member.client_id, "")
    await by_secret(at, member, two.client_secret)
    old = clients_pb2.GetOwnClientRequest(registration_access_token=two.registration_access_token)
    assert await reason(at.clients().GetOwnClient(old)) == "REGISTRATION_TOKEN_INVALID"
    other = _request("request-1", scopes=["write"])
    assert await reason(stub.RegisterClient(other)) == "REQUEST_ID_REUSED"
    peer = identity("someone")
    mine = _request("request-1", tls_client_auth_san_uri=spiffe("someone"))
    another = await at.auth(peer).RegisterClient(mine)
    assert another.client.client_id != member.client_id


async def test_the_same_request_id_at_once_makes_one_client(at: Running) -> None:
    peer = identity("racer")
    request = _request("request-2", tls_client_auth_san_uri=spiffe("racer"))
    answers = await asyncio.gather(*(at.auth(peer).RegisterClient(request) for _ in range(16)))
    assert len({answer.client.client_id for answer in answers}) == 1


async def test_a_request_id_is_free_after_ten_minutes(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        request = _request("request-3")
        one = await server.auth(ADMIN).RegisterClient(request)
        await server.advance(599)
        again = await server.auth(ADMIN).RegisterClient(request)
        await server.advance(2)
        two = await server.auth(ADMIN).RegisterClient(request)
        assert one.client.client_id == again.client.client_id != two.client.client_id


async def initial(
    server: Running, uses: int = 1, seconds: float = 3600
) -> clients_pb2.CreateInitialAccessTokenResponse:
    expires = stamp(server.clock.wall() + seconds)
    token = clients_pb2.InitialAccessToken(uses_left=uses, expire_time=expires, display_name="ci")
    request = clients_pb2.CreateInitialAccessTokenRequest(initial_access_token=token)
    return await server.clients().CreateInitialAccessToken(request)


async def test_the_bearer_of_an_initial_access_token_registers_as_often_as_it_says(
    at: Running,
) -> None:
    """RFC 7591 section 3."""
    made = await initial(at, uses=5)
    nobody = identity("nobody")
    requests = [_request(token=made.value, client_name=f"c{n}", scopes=["read"]) for n in range(32)]
    found = await asyncio.gather(
        *(outcome(at.auth(nobody).RegisterClient(request)) for request in requests)
    )
    assert sorted(found) == ["OK"] * 5 + ["REGISTRATION_TOKEN_INVALID"] * 27
    listed = await at.clients().ListInitialAccessTokens(
        clients_pb2.ListInitialAccessTokensRequest()
    )
    (left,) = listed.initial_access_tokens
    assert (left.uses_left, left.display_name) == (0, "ci")
    assert made.value not in str(listed)


async def test_a_refused_registration_takes_no_use(at: Running) -> None:
    made = await initial(at)
    stub = at.auth(identity("nobody"))
    await at.member("taken", "read")
    for wrong in (
        _request(token=made.value, scopes=["nothing"]),
        _request(token=made.value, validates=[API]),
        _request(token=made.value, tls_client_auth_san_uri=spiffe("taken")),
    ):
        assert await outcome(stub.RegisterClient(wrong)) != "OK"
    dry = _request(token=made.value)
    dry.validate_only = True
    await stub.RegisterClient(dry)
    answer = await stub.RegisterClient(_request(token=made.value, scopes=["admin"]))
    assert answer.client.state == PENDING
    assert answer.client.registrant == (
        f"initial access token {made.initial_access_token.initial_access_token_id}"
    )


@pytest.mark.parametrize("value", ["x", "asvc_it_", "flip", "cut", "long", "deleted", "cut off"])
async def test_an_initial_access_token_that_is_none(at: Running, value: str) -> None:
    made = await initial(at)
    wrong = {"flip": made.value.swapcase(), "cut": made.value[:-1], "long": made.value + "0"}
    if value == "deleted":
        token_id = made.initial_access_token.initial_access_token_id
        request = clients_pb2.DeleteInitialAccessTokenRequest(initial_access_token_id=token_id)
        await at.clients().DeleteInitialAccessToken(request)
        again = at.clients().DeleteInitialAccessToken(request)
        assert await reason(again) == "INITIAL_ACCESS_TOKEN_NOT_FOUND"
    if value == "cut off":
        stub = RevocationServiceStub(at.channel(ADMIN))
        await stub.RevokeEverything(revocations_pb2.RevokeEverythingRequest())
    shown = made.value if value in ("deleted", "cut off") else wrong.get(value, value)
    call = at.auth(identity("nobody")).RegisterClient(_request(token=shown))
    assert await reason(call) == "REGISTRATION_TOKEN_INVALID"


async def test_an_initial_access_token_ends(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock()) as server:
        made = await initial(server, uses=2, seconds=100)
        await server.auth(ADMIN).RegisterClient(_request(token=made.value))
        await server.advance(101)
        call = server.auth(ADMIN).RegisterClient(_request(token=made.value))
        assert await reason(call) == "REGISTRATION_TOKEN_INVALID"
        assert await reason(initial(server, seconds=-1)) == "FIELD_INVALID"


async def test_used_up_an_initial_access_token_still_repeats_its_request(at: Running) -> None:
    """The reply may have been lost."""
    made, stub = await initial(at), at.auth(identity("nobody"))
    request = _request("request-4", made.value, scopes=["read"])
    one, two = [await stub.RegisterClient(request) for _ in range(2)]
    assert one.client.client_id == two.client.client_id
    assert one.client_secret != two.client_secret
    other = _request("request-5", made.value, scopes=["read"])
    assert await reason(stub.RegisterClient(other)) == "REGISTRATION_TOKEN_INVALID"
    request.ClearField("request_id")
    assert await reason(stub.RegisterClient(request)) == "REGISTRATION_TOKEN_INVALID"
    request.validate_only = True
    assert await reason(stub.RegisterClient(request)) == "REGISTRATION_TOKEN_INVALID"


async def test_what_died_is_not_got_again_by_a_repeated_request(at: Running) -> None:
    peer = identity("again")
    request = _request("request-6", tls_client_auth_san_uri=spiffe("again"))
    one = await at.auth(peer).RegisterClient(request)
    revoke = revocations_pb2.RevokeClientRequest(client_id=one.client.client_id)
    await RevocationServiceStub(at.channel(ADMIN)).RevokeClient(revoke)
    two = await at.auth(peer).RegisterClient(request)
    assert two.client.client_id == one.client.client_id
    for made in (one, two):
        assert await reason(Own(at, peer, made).get()) == "REGISTRATION_TOKEN_INVALID"


async def test_a_rotated_secret_is_not_replaced_by_a_repeated_request(at: Running) -> None:
    request = _request("request-7", token_endpoint_auth_methods=[POST], scopes=["read"])
    one = await at.auth(ADMIN).RegisterClient(request)
    member = Member(ADMIN, one.client.client_id)
    await at.approve(member.client_id)
    secret = await rotate(at, member.client_id)
    assert (await at.auth(ADMIN).RegisterClient(request)).client_secret == ""
    await by_secret(at, member, secret)


async def test_repeated_at_once_one_secret_is_left(at: Running) -> None:
    request = _request("request-8", token_endpoint_auth_methods=[POST], scopes=["read"])
    answers = await asyncio.gather(*(at.auth(ADMIN).RegisterClient(request) for _ in range(16)))
    (client_id,) = {answer.client.client_id for answer in answers}
    await at.approve(client_id)
    member = Member(ADMIN, client_id)
    found = [await outcome(by_secret(at, member, answer.client_secret)) for answer in answers]
    assert found.count("OK") == 1


async def test_a_request_id_is_one_registrants_by_one_ca(tmp_path: Path) -> None:
    """Else a CA that vouches for the same name would get at the client (decision 0004)."""
    async with running(tmp_path, client_cas=(CA, SECOND_CA), admin_ca=CA.pin) as server:
        request = _request("request-9", tls_client_auth_san_uri=spiffe("twin"))
        mine = await server.auth(identity("twin")).RegisterClient(request)
        other = server.auth(identity("twin", ca=SECOND_CA))
        assert await reason(other.RegisterClient(request)) == "REQUEST_ID_REUSED"
        assert (await Own(server, ADMIN, mine).get()).client_id == mine.client.client_id


async def test_at_once_no_more_wait_than_may(tmp_path: Path, url: str) -> None:
    given = Registration(pending_per_registrant=3)
    async with running(tmp_path, url=url, registration=given) as server:
        stub = server.auth(identity("many", dns=[f"d{n}.test" for n in range(16)]))
        found = await asyncio.gather(
            *(
                outcome(stub.RegisterClient(_request(tls_client_auth_san_dns=f"d{n}.test")))
                for n in range(16)
            )
        )
        assert sorted(found) == ["OK"] * 3 + ["RATE_LIMITED"] * 13
        pending = await server.store.clients.page(ClientState.PENDING, "", 100)
        assert len(pending) == 3
        await server.store.clients.expire(-1)
        again = _request(tls_client_auth_san_dns="d0.test")
        await stub.RegisterClient(again)  # what expired waits no more


async def test_without_a_certificate_the_bearer_of_an_initial_access_token_registers(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, tls_only=True) as server:
        await server.resource(API, "read")
        made = await initial(server)
        async with connect(server.app.tls_port, None) as channel:
            stub = AuthServiceStub(channel)
            bare = _request(scopes=["read"])
            assert await reason(stub.RegisterClient(bare)) == "REGISTRATION_NOT_ALLOWED"
            bare.initial_access_token = made.value
            answer = await stub.RegisterClient(bare)
        await server.approve(answer.client.client_id)
        await by_secret(server, Member(ADMIN, answer.client.client_id), answer.client_secret)


async def test_an_initial_access_token_gives_no_rights_of_its_bearer(at: Running) -> None:
    """Nor does the certificate beside it: an administrator with one is its bearer."""
    made = await initial(at)
    request = _request(token=made.value, validates=[API])
    assert await reason(at.auth(ADMIN).RegisterClient(request)) == "REGISTRATION_NOT_ALLOWED"
    made_by = identity("peer")
    named = _request(token=made.value, tls_client_auth_san_uri=spiffe("someone.else"))
    answer = await at.auth(made_by).RegisterClient(named)  # any name, unlike the peer itself
    assert answer.client.metadata.tls_client_auth_san_uri == spiffe("someone.else")


@pytest.mark.parametrize("uses", [-1, 1001])
async def test_an_initial_access_token_has_a_number_of_uses(server: Running, uses: int) -> None:
    assert await reason(initial(server, uses)) == "FIELD_INVALID"


async def test_pages_of_initial_access_tokens(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        made = {(await initial(server)).initial_access_token.initial_access_token_id for _ in "abc"}
        seen: list[str] = []
        request = clients_pb2.ListInitialAccessTokensRequest(page_size=2)
        while not seen or request.page_token:
            page = await server.clients().ListInitialAccessTokens(request)
            seen += [token.initial_access_token_id for token in page.initial_access_tokens]
            request.page_token = page.next_page_token
        assert seen == sorted(made)
        plain = await server.member("plain", "watch")
        for call in (
            server.clients(plain.who).ListInitialAccessTokens(request),
            server.clients(plain.who).CreateInitialAccessToken(
                clients_pb2.CreateInitialAccessTokenRequest(
                    initial_access_token=clients_pb2.InitialAccessToken(expire_time=stamp(9e9))
                )
            ),
        ):
            assert await reason(call) == "INSUFFICIENT_SCOPE"


async def test_secrets_are_in_no_answer_but_the_first_in_no_log_and_in_no_table(
    tmp_path: Path,
) -> None:
    with capture_logs() as logs:
        async with running(tmp_path) as server:
            await server.resource(API, "read")
            initial_token = await initial(server, uses=2)
            request = _request("request-10", initial_token.value, scopes=["read"])
            made = [await server.auth(ADMIN).RegisterClient(request) for _ in range(2)]
            client_id = made[0].client.client_id
            await server.approve(client_id)
            own = Own(server, ADMIN, made[1])
            rotated = [await rotate(server, client_id, server.clock.wall() + 60) for _ in range(2)]
            answers = [
                await by_secret(server, Member(ADMIN, client_id), rotated[1]),
                await own.get(),
                await own.update(scopes=["read"], token_endpoint_auth_methods=[POST]),
                await client(server, client_id),
                await server.clients().ListClients(clients_pb2.ListClientsRequest()),
                await server.clients().ListInitialAccessTokens(
                    clients_pb2.ListInitialAccessTokensRequest()
                ),
                await server.auth(ADMIN).RegisterClient(request),
            ]
            own.token = own.token[:-1]
            assert await reason(own.get()) == "REGISTRATION_TOKEN_INVALID"
            stored = repr(await server.store.clients.get(client_id))
            token = answers[0].token.access_token
        secrets = [initial_token.value, *rotated, token]
        secrets += [s for one in made for s in (one.client_secret, one.registration_access_token)]
        assert len(set(secrets)) == 8
        assert all(secrets)
    for secret in secrets:
        assert not [answer for answer in answers[1:] if secret in str(answer)]
        assert not [line for line in logs if secret in str(line)]
        assert secret not in stored
        written = [file for file in tmp_path.rglob("*") if file.is_file()]  # noqa: ASYNC240
        assert [file for file in written if file.suffix == ".db"]
        for file in written:
            assert secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("who", ["registrar", "peer"])
async def test_the_policy_lets_nobody_in_who_asks_for_more(tmp_path: Path, who: str) -> None:
    """`approve` lets in at once what asks for nothing beyond; the name is the peer's own all the
    same, and `admin` and `register` are never within.
    """
    given = Registration(scopes=("read", "admin"), approve=True)
    async with running(tmp_path, registration=given) as server:
        await server.resource(API, "read", "write")
        by: Issued = identity("peer")
        if who == "registrar":
            by = (await server.member("registrar", "register")).who
        for scopes, state in ((["read"], APPROVED), (["write"], PENDING), (["admin"], PENDING)):
            name = "peer" if who == "peer" else f"new.{scopes[0]}"
            made = await server.register(
                by, by=by, scopes=scopes, tls_client_auth_san_uri=spiffe(name)
            )
            assert made.client.state == state
            delete = clients_pb2.DeleteClientRequest(client_id=made.client.client_id)
            await server.clients().DeleteClient(delete)
