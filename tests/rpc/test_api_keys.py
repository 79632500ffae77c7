"""API keys: who makes them, what they may, and everything that ends them."""

import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest_asyncio

from authsvc.api_keys import KEYS_MAX
from authsvc.identify import HELD_S
from authsvc.keys.secrets import API_KEY_PREFIX, new_secret
from authsvc.model import ApiKey
from authsvc.store.port import ApiKeyStore, Store
from authsvc_client.v1 import auth_pb2, clients_pb2, resources_pb2
from tests.clocks import HandClock
from tests.harness import (
    ADMIN,
    Member,
    Running,
    by_hand,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    reason,
    running,
    thumbprint,
)

A, B = "https://a.test", "https://b.test"
CERTIFICATE, API_KEY = (
    clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
    clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
)
KEY = [CERTIFICATE, API_KEY]


@dataclass(frozen=True)
class Cast:
    client: Member
    owner: Member
    """Owns A and B."""
    other: Member
    """May have API keys too."""
    plain: Member
    """Did not register for API keys."""


async def _cast(server: Running) -> Cast:
    owner = await server.member("owner", "validate")
    await server.resource(A, "a.read", "a.write", owner=owner.client_id)
    await server.resource(B, "b.read", owner=owner.client_id)
    every = ("a.read", "a.write", "b.read", "validate", "admin", "register")
    return Cast(
        await server.member("client", *every[:4], token_endpoint_auth_methods=KEY),
        owner,
        await server.member("other", "b.read", token_endpoint_auth_methods=KEY),
        await server.member("plain", *every[:4]),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cast(server: Running) -> Cast:
    return await _cast(server)


async def create(
    server: Running, by: Any, *scopes: str, bearer: str = "", **fields: Any
) -> clients_pb2.CreateApiKeyResponse:
    """By a client, or whoever holds a certificate."""
    who = by.who if isinstance(by, Member) else by
    request = clients_pb2.CreateApiKeyRequest(api_key=clients_pb2.ApiKey(scopes=scopes, **fields))
    given = (("authorization", f"Bearer {bearer}"),) if bearer else ()
    return await server.clients(who).CreateApiKey(request, metadata=given)


async def delete(server: Running, by: Any, api_key_id: str) -> int:
    who = by.who if isinstance(by, Member) else by
    request = clients_pb2.DeleteApiKeyRequest(api_key_id=api_key_id)
    return (await server.clients(who).DeleteApiKey(request)).revision


async def listed(server: Running, by: Any, client_id: str = "", size: int = 0) -> list[str]:
    who = by.who if isinstance(by, Member) else by
    found: list[str] = []
    request = clients_pb2.ListApiKeysRequest(client_id=client_id, page_size=size)
    while True:
        page = await server.clients(who).ListApiKeys(request)
        found += [key.api_key_id for key in page.api_keys]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def judged(server: Running, cast: Cast, token: str) -> str:
    return await server.judged(cast.owner.who, token)


# --- made, listed, deleted ---


async def test_key_is_shown_once_and_says_what_it_may(server: Running, cast: Cast) -> None:
    made = await create(
        server, cast.client, "a.read", display_name="Nächtlich", expire_time={"seconds": 2**33}
    )
    key = made.api_key
    assert made.value.startswith(API_KEY_PREFIX)
    assert key.client_id == cast.client.client_id
    assert (key.display_name, list(key.scopes)) == ("Nächtlich", ["a.read"])
    assert key.expire_time.seconds == 2**33
    assert key.create_time.seconds > 0
    page = await server.clients(cast.client.who).ListApiKeys(clients_pb2.ListApiKeysRequest())
    assert key in page.api_keys
    assert made.value.encode() not in page.SerializeToString()
    verdict = await server.verdict(
        cast.owner.who, made.value, view=auth_pb2.TOKEN_VIEW_CLAIMS, audience=A
    )
    assert verdict.active
    claims = verdict.claims
    assert claims.subject == claims.client_id == cast.client.client_id
    assert (list(claims.scopes), list(claims.audiences)) == (["a.read"], [A])
    assert claims.jti == key.api_key_id
    assert claims.expire_time.seconds == 2**33
    assert claims.issue_time.seconds == key.create_time.seconds
    assert not claims.certificate_thumbprint


async def test_key_without_an_end_says_none(server: Running, cast: Cast) -> None:
    made = await create(server, cast.client, "a.read")
    assert not made.api_key.HasField("expire_time")
    verdict = await server.verdict(
        cast.owner.who, made.value, view=auth_pb2.TOKEN_VIEW_CLAIMS, audience=A
    )
    assert verdict.active
    assert not verdict.claims.HasField("expire_time")


async def test_scopes_are_the_clients_and_no_more_than_the_callers(
    server: Running, cast: Cast
) -> None:
    admin = await server.member("admins", "admin", "a.read", token_endpoint_auth_methods=KEY)
    narrow = (await server.token(cast.client, "validate")).access_token
    every = ["a.read", "a.write", "b.read"]
    for by, scopes, more, told in (
        (cast.client, [], {}, every),
        (cast.client, ["b.read", "a.read"], {}, ["a.read", "b.read"]),
        (cast.client, ["validate"], {}, ["validate"]),
        (ADMIN, [], {"client_id": cast.client.client_id}, every),
        (ADMIN, ["a.write"], {"client_id": cast.client.client_id}, ["a.write"]),
        (admin, [], {}, ["a.read"]),
        (admin, ["a.read"], {}, ["a.read"]),
        (cast.client, [], {"bearer": narrow}, ["validate"]),
        (cast.client, ["a.read"], {"bearer": narrow}, "SCOPE_NOT_ALLOWED"),
        (cast.client, ["admin"], {}, "SCOPE_NOT_ALLOWED"),
        (cast.client, ["unknown"], {}, "SCOPE_NOT_ALLOWED"),
        (cast.client, ["a.read", "validate"], {}, "SCOPE_NOT_ALLOWED"),
        (admin, ["admin"], {}, "SCOPE_NOT_ALLOWED"),
        (ADMIN, ["admin"], {"client_id": admin.client_id}, "SCOPE_NOT_ALLOWED"),
        (ADMIN, ["a.write"], {"client_id": cast.other.client_id}, "SCOPE_NOT_ALLOWED"),
        (cast.other, ["a.read"], {}, "SCOPE_NOT_ALLOWED"),
    ):
        call = create(server, by, *scopes, **more)
        if isinstance(told, str):
            assert await reason(call) == told, (scopes, more)
        else:
            made = await call
            assert list(made.api_key.scopes) == told, (scopes, more)


async def test_who_may_not(server: Running, cast: Cast) -> None:
    key = (await create(server, cast.client, "a.read")).api_key
    stranger = identity("stranger")
    pending = await server.member(
        "waiting", "a.read", approve=False, token_endpoint_auth_methods=KEY
    )
    of, nobody = cast.client.client_id, "0" * 32
    past: dict[str, Any] = {"expire_time": {"seconds": 1}}
    clients = server.clients
    remove = clients_pb2.DeleteApiKeyRequest
    pages = clients_pb2.ListApiKeysRequest
    for call, told in (
        (create(server, cast.plain), "AUTH_METHOD_NOT_REGISTERED"),
        (create(server, ADMIN), "FIELD_INVALID"),
        (create(server, ADMIN, client_id=nobody), "CLIENT_NOT_FOUND"),
        (create(server, ADMIN, client_id=pending.client_id), "CLIENT_PENDING"),
        (create(server, cast.other, client_id=of), "CLIENT_NOT_FOUND"),
        (create(server, cast.other, client_id=nobody), "CLIENT_NOT_FOUND"),
        (create(server, cast.client, **past), "FIELD_INVALID"),
        (create(server, stranger), "CALLER_UNKNOWN"),
        (create(server, pending), "CLIENT_PENDING"),
        (clients(ADMIN).ListApiKeys(pages()), "FIELD_INVALID"),
        (clients(ADMIN).ListApiKeys(pages(client_id=nobody)), "CLIENT_NOT_FOUND"),
        (clients(cast.other.who).ListApiKeys(pages(client_id=of)), "CLIENT_NOT_FOUND"),
        (clients(cast.other.who).ListApiKeys(pages(client_id=nobody)), "CLIENT_NOT_FOUND"),
        (clients(stranger).ListApiKeys(pages(client_id=of)), "CALLER_UNKNOWN"),
        (clients(ADMIN).DeleteApiKey(remove(api_key_id=nobody)), "API_KEY_NOT_FOUND"),
        (
            clients(cast.other.who).DeleteApiKey(remove(api_key_id=key.api_key_id)),
            "API_KEY_NOT_FOUND",
        ),
        (clients(cast.other.who).DeleteApiKey(remove(api_key_id=nobody)), "API_KEY_NOT_FOUND"),
        (clients(stranger).DeleteApiKey(remove(api_key_id=key.api_key_id)), "CALLER_UNKNOWN"),
        (clients(cast.client.who).DeleteApiKey(remove()), "FIELD_INVALID"),
    ):
        assert await reason(call) == told
    assert key.api_key_id in await listed(server, cast.client)


async def test_pages_and_their_tokens_are_a_clients_own(server: Running) -> None:
    member = await server.member("lister", "validate", token_endpoint_auth_methods=KEY)
    thief = await server.member("thief", "validate", token_endpoint_auth_methods=KEY)
    made = [(await create(server, member)).api_key.api_key_id for _ in range(5)]
    assert await listed(server, member, size=2) == sorted(made)
    assert await listed(server, ADMIN, member.client_id, size=3) == sorted(made)
    assert await listed(server, thief) == []
    first = await server.clients(member.who).ListApiKeys(
        clients_pb2.ListApiKeysRequest(page_size=2)
    )
    stolen = clients_pb2.ListApiKeysRequest(page_token=first.next_page_token)
    assert await reason(server.clients(thief.who).ListApiKeys(stolen)) == "PAGE_TOKEN_INVALID"


async def test_keys_are_not_too_many(server: Running) -> None:
    member = await server.member("hoarder", "validate", token_endpoint_auth_methods=KEY)
    for _ in range(KEYS_MAX):
        last = await create(server, member)
    refused = await failure(create(server, member))
    assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("api_key",))
    await delete(server, member, last.api_key.api_key_id)
    assert await outcome(create(server, member)) == "OK"


async def test_deleted_key_is_dead_at_the_answer(server: Running, cast: Cast) -> None:
    for by in (cast.client, ADMIN):
        made = await create(server, cast.client, "a.read")
        assert await judged(server, cast, made.value) == "OK"
        revision = await delete(server, by, made.api_key.api_key_id)
        assert server.app.state.revision >= revision
        assert await judged(server, cast, made.value) == "TOKEN_REVOKED"
        call = delete(server, cast.client, made.api_key.api_key_id)
        assert await reason(call) == "API_KEY_NOT_FOUND"
        assert made.api_key.api_key_id not in await listed(server, cast.client)


# --- as an access token ---


async def test_every_prefix_extension_and_case_flip_is_refused(server: Running, cast: Cast) -> None:
    value = (await create(server, cast.client, "a.read")).value
    mutated = [value[:length] for length in range(1, len(value))]
    mutated += [value + more for more in (*string.ascii_letters, *string.digits, *"-_.= \n\0é")]
    mutated += [value[:at] + value[at].swapcase() + value[at + 1 :] for at in range(len(value))]
    mutated += [new_secret(API_KEY_PREFIX), value.replace("asvc_ak_", "asvc_at_")]
    found = {text: await judged(server, cast, text) for text in mutated if text != value}
    assert len(found) > 150
    assert set(found.values()) == {"TOKEN_MALFORMED"}
    assert await judged(server, cast, value) == "OK"


async def test_it_is_never_bound(server: Running, cast: Cast) -> None:
    value = (await create(server, cast.client, "a.read")).value
    proof = thumbprint(cast.client.who)
    presenter = auth_pb2.Presenter(certificate_thumbprint=proof)
    for more, told in (
        ({}, True),
        ({"presenter": presenter}, True),
        ({"require_bound": True}, False),
        ({"require_bound": True, "presenter": presenter}, False),
    ):
        assert (await server.verdict(cast.owner.who, value, **more)).active is told


async def test_scopes_and_audiences_are_those_that_are_left(server: Running) -> None:
    owner = await server.member("left-owner", "validate")
    for name in ("one", "two"):
        await server.resource(f"urn:{name}", f"{name}.read", owner=owner.client_id)
    client = await server.member("left", "one.read", "two.read", token_endpoint_auth_methods=KEY)
    value = (await create(server, client)).value
    view = auth_pb2.TOKEN_VIEW_CLAIMS

    async def said() -> tuple[list[str], list[str]]:
        claims = (await server.verdict(owner.who, value, view=view)).claims
        return list(claims.scopes), list(claims.audiences)

    assert await said() == (["one.read", "two.read"], ["urn:one", "urn:two"])
    for scopes, told in (
        ([], (["two.read"], ["urn:two"])),
        ([{"name": "one.read"}], (["one.read", "two.read"], ["urn:one", "urn:two"])),
    ):
        resource = resources_pb2.Resource(
            resource_id="urn:one", scopes=[resources_pb2.Scope(**scope) for scope in scopes]
        )
        request = resources_pb2.UpdateResourceRequest(resource=resource)
        request.update_mask.paths.append("scopes")
        await server.resources().UpdateResource(request)
        assert await said() == told
    for name in ("one", "two"):
        request = resources_pb2.UpdateResourceRequest(
            resource=resources_pb2.Resource(resource_id=f"urn:{name}")
        )
        request.update_mask.paths.append("scopes")
        await server.resources().UpdateResource(request)
    gateway = await server.member("left-gateway", "validate", validates=["*"])
    assert await server.judged(gateway.who, value) == "TOKEN_CUT_OFF"  # for nothing that is left
    assert await said() == ([], [])


async def test_bearer_of_a_key_for_authsvc_itself(server: Running, cast: Cast) -> None:
    gateway = await server.member(
        "key-gateway", "validate", validates=[A], token_endpoint_auth_methods=KEY
    )
    value = (await create(server, gateway)).value
    token = (await create(server, cast.client, "a.read")).value
    given = (("authorization", f"Bearer {value}"),)
    anybody = server.auth(identity("anybody"))
    request = auth_pb2.ValidateTokenRequest(token=token)
    assert (await anybody.ValidateToken(request, metadata=given)).active
    watch = anybody.WatchChanges(auth_pb2.WatchChangesRequest(), metadata=given)
    assert await reason(watch.read()) == "INSUFFICIENT_SCOPE"
    page = clients_pb2.ListClientsRequest()
    call = server.clients(identity("anybody")).ListClients(page, metadata=given)
    assert await reason(call) == "INSUFFICIENT_SCOPE"
    foreign = (("authorization", f"Bearer {token}"),)
    refused = await failure(anybody.ValidateToken(request, metadata=foreign))
    assert (refused.reason, refused.metadata) == (
        "CALLER_TOKEN_INVALID",
        {"verdict": "TOKEN_INACTIVE"},
    )
    await server.suspend(gateway.client_id)
    refused = await failure(anybody.ValidateToken(request, metadata=given))
    assert (refused.reason, refused.metadata) == (
        "CALLER_TOKEN_INVALID",
        {"verdict": "TOKEN_CUT_OFF"},
    )


async def test_key_authenticates_its_client_alone(server: Running, cast: Cast) -> None:
    free = await server.member(
        "free",
        "a.read",
        token_endpoint_auth_methods=KEY,
        tls_client_certificate_bound_access_tokens=False,
    )
    made = await create(server, free, "a.read")
    given = (("authorization", f"Bearer {made.value}"),)
    auth = server.auth(identity("anybody"))
    issued = (await auth.IssueToken(issue_request(free.client_id), metadata=given)).token
    assert await judged(server, cast, issued.access_token) == "OK"
    stolen = auth.IssueToken(issue_request(cast.client.client_id), metadata=given)
    assert await reason(stolen) == "CLIENT_AUTHENTICATION_FAILED"
    await delete(server, free, made.api_key.api_key_id)
    call = auth.IssueToken(issue_request(free.client_id), metadata=given)
    assert await reason(call) == "CLIENT_AUTHENTICATION_FAILED"


# --- what ends it ---


async def _sql(directory: Path, *statements: str) -> None:
    for statement in statements:
        await by_hand(directory / "authsvc.db", statement)


COMPACTED = ("DELETE FROM feed", "UPDATE feed_head SET compacted_to = revision")


async def test_nothing_revives_it_when_the_markers_are_compacted(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        cast = await _cast(server)
        values = {}

        async def client(name: str) -> Member:
            made = await server.member(name, "a.read", "b.read", token_endpoint_auth_methods=KEY)
            values[name] = await create(server, made)
            assert await judged(server, cast, values[name].value) == "OK"
            return made

        suspended, resumed = await client("suspended"), await client("resumed")
        deleted, revoked, renamed = (
            await client("deleted"),
            await client("revoked"),
            await client("gone"),
        )
        good = await client("good")
        for one in (suspended, resumed):
            await server.suspend(one.client_id)
            assert await judged(server, cast, values["suspended"].value) == "TOKEN_CUT_OFF"
        resume = clients_pb2.ResumeClientRequest(client_id=resumed.client_id)
        await server.clients().ResumeClient(resume)
        assert await judged(server, cast, values["resumed"].value) == "TOKEN_CUT_OFF"
        values["made after"] = await create(server, resumed)
        await delete(server, deleted, values["deleted"].api_key.api_key_id)
        request = auth_pb2.RevokeTokenRequest(token=values["revoked"].value)
        await server.auth(revoked.who).RevokeToken(request)
        assert await judged(server, cast, values["revoked"].value) == "TOKEN_REVOKED"
    await _sql(tmp_path, *COMPACTED, f"DELETE FROM client WHERE client_id = '{renamed.client_id}'")
    async with running(tmp_path) as server:
        found = {name: await judged(server, cast, made.value) for name, made in values.items()}
        given = {
            name: (("authorization", f"Bearer {made.value}"),) for name, made in values.items()
        }
        for member in (resumed, good):
            name = "resumed" if member is resumed else "good"
            call = server.auth(member.who).IssueToken(
                issue_request(member.client_id, scopes=["a.read"]), metadata=given[name]
            )
            told = "CLIENT_AUTHENTICATION_FAILED" if member is resumed else "OK"
            assert await outcome(call) == told
    assert found == {
        "suspended": "TOKEN_CUT_OFF",
        "resumed": "TOKEN_CUT_OFF",
        "made after": "OK",
        "deleted": "TOKEN_MALFORMED",
        "revoked": "TOKEN_MALFORMED",
        "gone": "TOKEN_MALFORMED",
        "good": "OK",
    }


async def test_resource_made_anew_by_another_owner_gets_none_of_the_old_keys(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as server:
        cast = await _cast(server)
        value = (await create(server, cast.client, "a.read", "b.read")).value
        assert await judged(server, cast, value) == "OK"
        await server.resources().DeleteResource(resources_pb2.DeleteResourceRequest(resource_id=A))
        robber = await server.member("robber", "validate")
        await server.resource(A, "a.read", owner=robber.client_id)
        assert await server.judged(robber.who, value) == "TOKEN_CUT_OFF"
    await _sql(tmp_path, *COMPACTED)
    async with running(tmp_path) as server:
        assert await server.judged(robber.who, value) == "TOKEN_CUT_OFF"
        assert await server.judged(cast.owner.who, value) == "TOKEN_CUT_OFF"
        new = (await create(server, cast.client, "a.read")).value
        assert await server.judged(robber.who, new) == "OK"


async def test_it_ends_with_its_own_end_and_with_the_approval(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        cast = await _cast(server)
        brief = await server.member(
            "brief", "a.read", approve=False, token_endpoint_auth_methods=KEY
        )
        now = int(clock.wall())
        await server.approve(brief.client_id, approval_expire_time={"seconds": now + 100})
        by_approval = (await create(server, brief)).value
        until = {"seconds": now + 60}
        by_end = (await create(server, cast.client, "a.read", expire_time=until)).value
        view = auth_pb2.TOKEN_VIEW_CLAIMS
        verdict = await server.verdict(cast.owner.who, by_approval, view=view)
        assert verdict.claims.expire_time.seconds == now + 100
        for seconds, told in (
            (0, ("OK", "OK")),
            (89, ("OK", "OK")),  # leeway of an end
            (91, ("TOKEN_EXPIRED", "OK")),
            (101, ("TOKEN_EXPIRED", "TOKEN_CUT_OFF")),  # none of an approval
            (131, ("TOKEN_EXPIRED", "TOKEN_EXPIRED")),
        ):
            await server.advance(now + seconds - clock.wall())
            found = [await judged(server, cast, value) for value in (by_end, by_approval)]
            assert tuple(found) == told, seconds


async def test_row_that_is_gone_is_noticed_before_markers_are(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        cast = await _cast(server)
        value = (await create(server, cast.client, "a.read")).value
        assert await judged(server, cast, value) == "OK"
        await _sql(tmp_path, "DELETE FROM api_key")
        await server.advance(HELD_S)
        assert await judged(server, cast, value) == "OK"
        await server.advance(1)
        assert await judged(server, cast, value) == "TOKEN_MALFORMED"


async def test_key_that_is_made_while_its_client_is_cut_off_is_dead(tmp_path: Path) -> None:
    """Its `rev` is taken before the caller is known: no cutoff falls between."""
    servers: list[Running] = []

    @dataclass
    class Late:
        keys: ApiKeyStore
        armed: bool = False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.keys, name)

        async def add(self, key: ApiKey, most: int) -> None:
            if self.armed:
                server = servers[0]
                await server.suspend(key.client_id)
                resume = clients_pb2.ResumeClientRequest(client_id=key.client_id)
                await server.clients().ResumeClient(resume)
            await self.keys.add(key, most)

    late: list[Late] = []

    def wrap(store: Store) -> Store:
        late.append(Late(store.api_keys))
        keys: Any = late[0]
        return replace(store, api_keys=keys)

    async with running(tmp_path, wrap=wrap) as server:
        servers.append(server)
        cast = await _cast(server)
        late[0].armed = True
        value = (await create(server, cast.client, "a.read")).value
        assert await judged(server, cast, value) == "TOKEN_CUT_OFF"
        late[0].armed = False
        value = (await create(server, cast.client, "a.read")).value
        assert await judged(server, cast, value) == "OK"


async def test_who_is_not_entitled_is_told_nothing(tmp_path: Path) -> None:
    clock: HandClock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        cast = await _cast(server)
        outsider = await server.member("outsider", "validate")
        await server.resource("urn:theirs", "theirs.read", owner=outsider.client_id)
        good, dead = [await create(server, cast.client, "a.read") for _ in range(2)]
        assert await judged(server, cast, dead.value) == "OK"  # held: else it is none of ours
        await delete(server, cast.client, dead.api_key.api_key_id)
        lost = await create(server, cast.other)
        await server.suspend(cast.other.client_id)
        for made, told in ((good, "OK"), (dead, "TOKEN_REVOKED"), (lost, "TOKEN_CUT_OFF")):
            assert await judged(server, cast, made.value) == told
            for more in ({}, {"audience": A}, {"required_scopes": ["x"]}):
                answer = await server.verdict(outsider.who, made.value, **more)
                assert answer.SerializeToString() == b""
