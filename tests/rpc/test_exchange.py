"""Token exchange over a real server (RFC 8693): chains, what shrinks, and what kills them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from authsvc.store.sql_grants import GRANTS_OF_A_TOKEN_MAX
from authsvc_client.core.claims import ACTORS_MAX
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    ADMIN,
    Member,
    Running,
    failure,
    hand_clock,
    identity,
    reason,
    running,
)

ACCESS = "urn:ietf:params:oauth:token-type:access_token"
REFRESH = "urn:ietf:params:oauth:token-type:refresh_token"
CC = clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS
EXCHANGE = clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE
ORDERS, BILLING, LEDGER = (f"https://{name}.test" for name in ("orders", "billing", "ledger"))
ALL = [ORDERS, BILLING, LEDGER]


@dataclass
class Chain:
    """The shop calls orders, orders calls billing, billing calls the ledger."""

    server: Running
    shop: Member
    orders: Member
    billing: Member
    ledger: Member

    async def start(self, *scopes: str) -> auth_pb2.IssuedToken:
        """The shop's token, for the whole chain, or where its scopes are."""
        owners = {scope.partition(".")[0] for scope in scopes}
        resources = [f"https://{owner}.test" for owner in sorted(owners)] or ALL
        return await self.server.token(self.shop, *scopes, resources=resources)

    async def exchange(
        self, by: Member, subject: str, *resources: str, **more: Any
    ) -> auth_pb2.IssuedToken:
        """A client exchanges a token that was sent to it."""
        grant = {"subject_token": subject, "subject_token_type": ACCESS}
        grant |= more.pop("grant", {})
        request = auth_pb2.IssueTokenRequest(
            token_exchange=auth_pb2.TokenExchangeGrant(**grant),
            client_id=by.client_id,
            resources=resources,
            **more,
        )
        return (await self.server.auth(by.who).IssueToken(request)).token

    async def claims(self, token: auth_pb2.IssuedToken, of: Member) -> auth_pb2.TokenClaims:
        """What a token says."""
        verdict = await self.server.verdict(
            ADMIN, token.access_token, of=of.who, view=auth_pb2.TOKEN_VIEW_CLAIMS
        )
        assert verdict.active, verdict
        return verdict.claims

    async def judged(self, token: auth_pb2.IssuedToken, of: Member) -> str:
        return await self.server.judged(ADMIN, token.access_token, of=of.who)


async def made(server: Running) -> Chain:
    ledger = await server.member("ledger", "validate")
    await server.resource(LEDGER, "ledger.post", owner=ledger.client_id)
    billing = await server.member("billing", "ledger.post", grant_types=[CC, EXCHANGE])
    await server.resource(BILLING, "billing.charge", "billing.refund", owner=billing.client_id)
    orders = await server.member(
        "orders", "billing.charge", "ledger.post", grant_types=[CC, EXCHANGE]
    )
    await server.resource(ORDERS, "orders.place", owner=orders.client_id)
    scopes = ("orders.place", "billing.charge", "billing.refund", "ledger.post")
    shop = await server.member("shop", *scopes, grant_types=[CC, EXCHANGE])
    return Chain(server, shop, orders, billing, ledger)


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Chain]:
    async with running(tmp_path) as server:
        yield await made(server)


def actors(claims: auth_pb2.TokenClaims) -> list[str]:
    """`act` and what is nested in it, outermost first."""
    found, actor = [], claims.actor
    while actor.subject:
        found.append(actor.subject)
        actor = actor.actor
    return found


async def test_a_chain_of_two_services(chain: Chain) -> None:
    """RFC 8693 section 4.1: the outermost actor is the current one."""
    first = await chain.start()
    second = await chain.exchange(chain.orders, first.access_token, BILLING, LEDGER)
    assert second.issued_token_type == ACCESS
    assert second.token_type == "Bearer"
    assert second.scopes == ["billing.charge", "ledger.post"]
    third = await chain.exchange(chain.billing, second.access_token, LEDGER)
    one, two, three = (
        await chain.claims(first, chain.shop),
        await chain.claims(second, chain.orders),
        await chain.claims(third, chain.billing),
    )
    assert {c.subject for c in (one, two, three)} == {chain.shop.client_id}
    assert [c.client_id for c in (two, three)] == [
        chain.orders.client_id,
        chain.billing.client_id,
    ]
    assert actors(one) == []
    assert actors(two) == [chain.orders.client_id]
    assert actors(three) == [chain.billing.client_id, chain.orders.client_id]
    assert {c.root_jti for c in (two, three)} == {one.jti}
    assert three.expire_time.seconds <= two.expire_time.seconds <= one.expire_time.seconds
    assert [*three.audiences, *three.scopes] == [LEDGER, "ledger.post"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"subject_token": "x"}, "INVALID_GRANT"),
        ({"subject_token_type": "urn:ietf:params:oauth:token-type:id_token"}, "FIELD_INVALID"),
        ({"subject_token_type": ""}, "FIELD_INVALID"),
        ({"actor_token_type": ACCESS}, "FIELD_INVALID"),
        ({"actor_token": "x"}, "FIELD_INVALID"),
        ({"actor_token": "x", "actor_token_type": ACCESS}, "INVALID_GRANT"),
        ({"requested_token_type": "urn:ietf:params:oauth:token-type:saml2"}, "FIELD_INVALID"),
        ({"requested_token_type": REFRESH}, "GRANT_TYPE_NOT_ALLOWED"),
    ],
)
async def test_parameters_that_do_not_fit_are_refused(
    chain: Chain, wrong: dict[str, str], told: str
) -> None:
    """RFC 8693 section 2.1, 2.2.2."""
    token = await chain.start()
    asked = chain.exchange(chain.orders, token.access_token, BILLING, grant=wrong)
    assert await reason(asked) == told


async def test_only_its_audience_or_its_owner_may_exchange_a_token(chain: Chain) -> None:
    for_orders = await chain.server.token(chain.shop, "orders.place", resources=[ORDERS])
    stolen = chain.exchange(chain.billing, for_orders.access_token, ORDERS)
    assert await reason(stolen) == "INVALID_GRANT"
    own = await chain.exchange(chain.shop, for_orders.access_token, ORDERS)
    assert actors(await chain.claims(own, chain.shop)) == []
    # Its own token, bound to another certificate of its own name.
    elsewhere = Member(identity("shop"), chain.shop.client_id)
    asked = chain.exchange(elsewhere, for_orders.access_token, ORDERS)
    assert await reason(asked) == "INVALID_GRANT"


async def test_scopes_only_shrink(chain: Chain) -> None:
    token = await chain.start("orders.place", "billing.charge")
    child = await chain.exchange(chain.orders, token.access_token, BILLING)
    assert child.scopes == ["billing.charge"]
    beyond = chain.exchange(chain.orders, token.access_token, LEDGER, scopes=["ledger.post"])
    assert await reason(beyond) == "SCOPE_NOT_ALLOWED"  # orders has it, the shop's token has not
    beyond = chain.exchange(chain.orders, token.access_token, LEDGER)
    assert (await failure(beyond)).metadata == {"resource": LEDGER}
    refund = await chain.start("billing.refund", "orders.place")
    beyond = chain.exchange(chain.orders, refund.access_token, BILLING, scopes=["billing.refund"])
    assert await reason(beyond) == "SCOPE_NOT_ALLOWED"  # the shop's token has it, orders has not


async def test_a_child_never_outlives_its_subject_token(tmp_path: Path) -> None:
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        chain = await made(server)
        first = await chain.start()
        await server.advance(250)
        second = await chain.exchange(chain.orders, first.access_token, BILLING)
        assert 0 < second.expires_in.seconds <= 50
        assert second.expire_time.seconds == first.expire_time.seconds
        await server.advance(55)  # within the leeway of the subject token, past its end
        late = chain.exchange(chain.orders, first.access_token, BILLING)
        assert await reason(late) == "INVALID_GRANT"


async def test_what_kills_a_chain(chain: Chain) -> None:
    """Revoked in the middle a token ends itself alone; the root ends all."""
    admin = chain.server.auth(ADMIN)

    async def three() -> list[auth_pb2.IssuedToken]:
        first = await chain.start()
        second = await chain.exchange(chain.orders, first.access_token, BILLING, LEDGER)
        return [first, second, await chain.exchange(chain.billing, second.access_token, LEDGER)]

    async def judged(tokens: list[auth_pb2.IssuedToken]) -> list[str]:
        holders = (chain.shop, chain.orders, chain.billing)
        return [await chain.judged(t, of) for t, of in zip(tokens, holders, strict=True)]

    tokens = await three()
    await admin.RevokeToken(auth_pb2.RevokeTokenRequest(jti=tokens[1].jti))
    assert await judged(tokens) == ["OK", "TOKEN_REVOKED", "OK"]
    await admin.RevokeToken(auth_pb2.RevokeTokenRequest(jti=tokens[0].jti))
    assert await judged(tokens) == ["TOKEN_REVOKED"] * 3
    dead = chain.exchange(chain.orders, tokens[0].access_token, BILLING)
    assert await reason(dead) == "INVALID_GRANT"

    for member, alive in ((chain.billing, 2), (chain.orders, 1), (chain.shop, 0)):
        tokens = await three()
        await chain.server.suspend(member.client_id)
        assert await judged(tokens) == ["OK"] * alive + ["TOKEN_CUT_OFF"] * (3 - alive)
        await chain.server.clients().ResumeClient(
            clients_pb2.ResumeClientRequest(client_id=member.client_id)
        )
        assert await judged(tokens) == ["OK"] * alive + ["TOKEN_CUT_OFF"] * (3 - alive)


async def test_the_chain_is_capped(chain: Chain) -> None:
    """Design section 5: every `act.sub` is checked, so there are not endlessly many."""
    parties = [
        await chain.server.member(
            f"hop{n}", "ledger.post", grant_types=[CC, EXCHANGE], validates=[LEDGER]
        )
        for n in range(ACTORS_MAX + 1)
    ]
    token = await chain.start("ledger.post", "orders.place", "billing.charge")
    for hop in parties[:ACTORS_MAX]:
        token = await chain.exchange(hop, token.access_token, LEDGER)
    assert len(actors(await chain.claims(token, parties[ACTORS_MAX - 1]))) == ACTORS_MAX
    beyond = chain.exchange(parties[ACTORS_MAX], token.access_token, LEDGER)
    assert await reason(beyond) == "INVALID_GRANT"


async def test_an_actor_token_names_who_acts(chain: Chain) -> None:
    """RFC 8693 section 2.1: the actor token's subject acts; it is the client's own token."""
    token = await chain.start()
    shops = await chain.server.token(chain.shop, resources=[ORDERS])
    own = await chain.server.token(chain.orders, resources=[BILLING])
    foreign = {"actor_token": shops.access_token, "actor_token_type": ACCESS}
    asked = chain.exchange(chain.orders, token.access_token, BILLING, grant=foreign)
    assert await reason(asked) == "INVALID_GRANT"
    mine = {"actor_token": own.access_token, "actor_token_type": ACCESS}
    child = await chain.exchange(chain.orders, token.access_token, BILLING, grant=mine)
    assert actors(await chain.claims(child, chain.orders)) == [chain.orders.client_id]


async def test_grants_from_one_token_are_capped(chain: Chain) -> None:
    """Whoever revokes the token ends them all in one transaction."""
    grants = [CC, EXCHANGE, clients_pb2.GRANT_TYPE_REFRESH_TOKEN]
    app = await chain.server.member("app", "ledger.post", grant_types=grants)
    own = await chain.server.token(app)
    wanted = {"requested_token_type": REFRESH}
    for _ in range(GRANTS_OF_A_TOKEN_MAX):
        await chain.exchange(app, own.access_token, LEDGER, grant=wanted)
    found = await failure(chain.exchange(app, own.access_token, LEDGER, grant=wanted))
    assert (found.reason, found.metadata) == ("RATE_LIMITED", {"limit": "100"})
