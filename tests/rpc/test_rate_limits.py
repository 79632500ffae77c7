"""How often one caller may call, over a real server."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from authsvc.config import Limits
from authsvc.rpc.rates import Limit, limit_of
from authsvc.rpc.server import SERVICES
from authsvc.store.port import Store
from authsvc_client.v1 import auth_pb2, clients_pb2
from authsvc_client.v1 import revocations_pb2 as pb
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.revocations_pb2_grpc import RevocationServiceStub
from tests.cache.links import pair
from tests.certs import Issued
from tests.harness import (
    ADMIN,
    TIMEOUT_S,
    Member,
    Running,
    connect,
    failure,
    hand_clock,
    identity,
    issue_request,
    outcome,
    running,
    spiffe,
)
from tests.redis_servers import Redis

METHODS = [method for service in SERVICES for method in service.methods]
API = "https://api.test"
NONE = {"tokens": 0, "revocations": 0, "registrations": 0, "administration": 0, "refused": 0}
REFRESHING = [
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
]
SECRET = clients_pb2.CLIENT_AUTH_METHOD_CLIENT_SECRET_POST
GATEWAY = identity("gateway")
OTHER_ADMIN = identity("other-admin")
ADMINS = (spiffe("admin"), spiffe("other-admin"))


def limits(**given: int) -> Limits:
    """Those given and no others; a minute's worth at once."""
    return Limits(**{**NONE, **given})


async def _with_secret(server: Running) -> Member:
    """A client that authenticates by a secret, over whatever connection."""
    return await server.member(
        "", "read", who=GATEWAY, secret=True, token_endpoint_auth_methods=[SECRET]
    )


def _counting(reads: list[str]) -> Callable[[Store], Store]:
    """Notes each read of a client."""

    class Counting:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            reads.append(name)
            return getattr(self._inner, name)

    def wrap(store: Store) -> Store:
        clients: Any = Counting(store.clients)
        return replace(store, clients=clients)

    return wrap


async def told(*asks: Callable[[], Awaitable[Any]]) -> list[str]:
    """How calls end, each begun after the one before."""
    return [await outcome(ask()) for ask in asks]


# --- which method has which limit ---


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_method_has_a_limit_or_is_named_as_one_without(method: Any) -> None:
    limit = limit_of(method)
    if limit is None:
        assert method.name in {
            "ValidateToken",
            "BatchValidateTokens",
            "WatchChanges",
            "GetKeys",
        }
    else:
        assert not method.server_streaming, "a stream is admitted again and again"


def test_method_that_nobody_thought_of_is_an_error() -> None:
    class Service:
        name = "AuthService"

    class Method:
        name = "NewMethod"
        containing_service = Service

    with pytest.raises(KeyError):
        limit_of(Method())  # type: ignore[arg-type]


# --- each limit ---

Ask = Callable[[Running, Member], Callable[[], Awaitable[Any]]]


def _issue(server: Running, member: Member) -> Callable[[], Awaitable[Any]]:
    return lambda: server.token(member, resources=[API])


def _revoke(server: Running, member: Member) -> Callable[[], Awaitable[Any]]:
    request = auth_pb2.RevokeTokenRequest(token="not-a-token")
    return lambda: server.auth(member.who).RevokeToken(request)


def _register(server: Running, member: Member) -> Callable[[], Awaitable[Any]]:
    metadata = clients_pb2.ClientMetadata(client_name="x", token_endpoint_auth_methods=[SECRET])
    request = auth_pb2.RegisterClientRequest(metadata=metadata, validate_only=True)
    return lambda: server.auth(member.who).RegisterClient(request)


def _list(server: Running, who: Issued) -> Callable[[], Awaitable[Any]]:
    return lambda: server.clients(who).ListClients(clients_pb2.ListClientsRequest())


def _administer(server: Running, member: Member) -> Callable[[], Awaitable[Any]]:
    return _list(server, member.who)


def _cut_off(server: Running, member: Member) -> Callable[[], Awaitable[Any]]:
    request = pb.RevokeClientRequest(client_id=member.client_id, validate_only=True)
    return lambda: RevocationServiceStub(server.channel(member.who)).RevokeClient(request)


def _by_secret(
    server: Running, client_id: str, secret: str, who: Issued | None = None
) -> Callable[[], Awaitable[Any]]:
    """Over the one connection of a gateway, or another."""
    ask = issue_request(client_id, secret=secret)
    return lambda: server.auth(who or GATEWAY).IssueToken(ask)


@pytest.mark.parametrize(
    ("limit", "asks"),
    [
        (Limit.TOKENS, _issue),
        (Limit.REVOCATIONS, _revoke),
        (Limit.REVOCATIONS, _cut_off),
        (Limit.REGISTRATIONS, _register),
        (Limit.ADMINISTRATION, _administer),
    ],
)
async def test_caller_is_held_up_and_no_other(tmp_path: Path, limit: Limit, asks: Ask) -> None:
    given = limits(**{limit: 3})
    async with running(tmp_path, clock=hand_clock(), limits=given) as server:
        await server.resource(API, "read")
        one, two = [await server.member(name, "admin", "read") for name in ("one", "two")]
        ask, other = asks(server, one), asks(server, two)
        assert await told(*[ask] * 3) == ["OK"] * 3
        refused = await failure(ask())
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
        assert refused.retry_after_s == 20.0
        assert refused.metadata == {"limit": "3"}
        assert await told(other) == ["OK"]
        _, metrics = await server.http("/metrics")
        assert f'authsvc_rate_limited_total{{limit="{limit}"}} 1.0' in metrics
        await server.advance(20.0)
        assert await told(ask, ask) == ["OK", "RATE_LIMITED"]


# --- who is counted ---


async def test_clients_behind_one_certificate_are_counted_each_for_itself(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock(), limits=limits(tokens=2)) as server:
        await server.resource(API, "read")
        one, two = [await _with_secret(server) for _ in range(2)]
        ask = _by_secret(server, one.client_id, one.secret)
        assert await told(ask, ask, ask) == ["OK", "OK", "RATE_LIMITED"]
        assert await told(_by_secret(server, two.client_id, two.secret)) == ["OK"]


async def test_nobody_uses_up_the_limit_of_a_client_elsewhere(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock(), limits=limits(tokens=2)) as server:
        await server.resource(API, "read")
        one = await server.member("one", "read")
        lie = _by_secret(server, one.client_id, "", identity("liar"))
        found = Counter(await told(*[lie] * 4))
        assert found == {"CLIENT_AUTHENTICATION_FAILED": 2, "RATE_LIMITED": 2}
        assert await told(*[_issue(server, one)] * 2) == ["OK", "OK"]


async def test_caller_without_a_certificate_is_counted_by_its_address(tmp_path: Path) -> None:
    given = limits(tokens=2)
    async with running(tmp_path, clock=hand_clock(), limits=given, tls_only=True) as server:
        await server.resource(API, "read")
        one = await _with_secret(server)
        request = issue_request(one.client_id, secret=one.secret)
        async with (
            connect(server.app.tls_port, None) as first,
            connect(server.app.tls_port, None) as second,
        ):
            stubs = [AuthServiceStub(each) for each in (first, second, first)]
            found = await told(*(partial(stub.IssueToken, request) for stub in stubs))
            assert found == ["OK", "OK", "RATE_LIMITED"]
        assert await told(_by_secret(server, one.client_id, one.secret)) == ["OK"]


async def test_administrators_are_counted_by_name(tmp_path: Path) -> None:
    given = limits(administration=2)
    async with running(tmp_path, clock=hand_clock(), limits=given, admins=ADMINS) as server:
        renewed = identity("admin")  # another certificate of the same administrator
        asks = [_list(server, who) for who in (ADMIN, renewed, ADMIN)]
        assert await told(*asks) == ["OK", "OK", "RATE_LIMITED"]
        assert await told(_list(server, OTHER_ADMIN)) == ["OK"]


# --- who is refused again and again ---


async def test_stranger_is_turned_away_before_the_database_is_read(tmp_path: Path) -> None:
    reads: list[str] = []
    options: dict[str, Any] = {"clock": hand_clock(), "limits": limits(refused=3)}
    async with running(tmp_path, wrap=_counting(reads), **options) as server:
        ask = _list(server, identity("stranger"))
        # That the fourth is one too many is known once it was refused.
        assert await told(*[ask] * 4) == ["CALLER_UNKNOWN"] * 4
        known = len(reads)
        refused = await failure(ask())
        assert (refused.reason, refused.retry_after_s) == ("RATE_LIMITED", 20.0)
        assert len(reads) == known > 0
        others = [_list(server, ADMIN), _list(server, identity("other"))]
        assert await told(*others) == ["OK", "CALLER_UNKNOWN"]
        await server.advance(20.0)
        found = await told(ask, ask, ask)
        assert found == ["CALLER_UNKNOWN", "CALLER_UNKNOWN", "RATE_LIMITED"]


async def test_wrong_secrets_are_turned_away_and_others_of_the_gateway_are_not(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, clock=hand_clock(), limits=limits(refused=3)) as server:
        await server.resource(API, "read")
        one, two = [await _with_secret(server) for _ in range(2)]
        wrong = _by_secret(server, one.client_id, two.secret)
        right = _by_secret(server, one.client_id, one.secret)
        found = await told(*[wrong] * 5)
        assert found == ["CLIENT_AUTHENTICATION_FAILED"] * 4 + ["RATE_LIMITED"]
        assert await told(right) == ["RATE_LIMITED"]
        assert await told(_by_secret(server, two.client_id, two.secret)) == ["OK"]
        await server.advance(20.0)
        assert await told(right) == ["OK"]


async def test_caller_without_the_scope_is_turned_away_and_its_own_calls_are_not(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, clock=hand_clock(), limits=limits(refused=2)) as server:
        await server.resource(API, "read")
        one = await server.member("one", "read")
        found = await told(*[_administer(server, one)] * 4)
        assert found == ["INSUFFICIENT_SCOPE"] * 3 + ["RATE_LIMITED"]
        assert await told(_issue(server, one)) == ["OK"]


async def test_wrong_refresh_tokens_say_nothing_against_who_brings_them(tmp_path: Path) -> None:
    async with running(tmp_path, clock=hand_clock(), limits=limits(refused=2)) as server:
        await server.resource(API, "read")
        one = await server.member("one", "read", grant_types=REFRESHING)
        request = auth_pb2.RefreshTokenRequest(
            refresh_token="wrong",
            client_id=one.client_id,
        )
        found = await told(*[partial(server.auth(one.who).RefreshToken, request)] * 6)
        assert found == ["INVALID_GRANT"] * 6


async def test_without_limits_nothing_is_counted(tmp_path: Path) -> None:
    async with running(tmp_path, limits=limits()) as server:
        assert await told(*[_list(server, ADMIN)] * 50) == ["OK"] * 50
        assert await told(*[_list(server, identity("x"))] * 50) == ["CALLER_UNKNOWN"] * 50


# --- several workers ---


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    with Redis() as server:
        yield server


async def test_workers_share_a_limit_by_redis(
    tmp_path: Path, migrated_url: str, own_redis: Redis
) -> None:
    given = limits(administration=8)
    async with pair(tmp_path, migrated_url, own_redis, limits=given, admins=ADMINS) as workers:
        calls = [_list(worker, OTHER_ADMIN)() for _ in range(8) for worker in workers]
        found = Counter(await asyncio.gather(*map(outcome, calls)))
        assert found == {"OK": 8, "RATE_LIMITED": 8}
        assert await told(*(_list(worker, ADMIN) for worker in workers)) == ["OK", "OK"]
        own_redis.flush()  # counting begins anew
        assert await told(*(_list(worker, OTHER_ADMIN) for worker in workers)) == ["OK", "OK"]


async def test_workers_share_what_they_know_of_a_stranger(
    tmp_path: Path, migrated_url: str, own_redis: Redis
) -> None:
    given = limits(refused=4)
    async with pair(tmp_path, migrated_url, own_redis, limits=given) as (one, two):
        stranger = identity("stranger")
        assert await told(*[_list(one, stranger)] * 4) == ["CALLER_UNKNOWN"] * 4
        assert await told(*[_list(two, stranger)] * 2) == ["CALLER_UNKNOWN", "RATE_LIMITED"]


async def test_where_redis_is_frozen_each_worker_decides_by_itself(
    tmp_path: Path, migrated_url: str, own_redis: Redis
) -> None:
    given = {"limits": limits(administration=4), "admins": ADMINS, "budget_ms": 50}
    async with pair(tmp_path, migrated_url, own_redis, **given) as workers:
        own_redis.freeze()
        async with asyncio.timeout(TIMEOUT_S):
            for worker in workers:
                found = await told(*[_list(worker, OTHER_ADMIN)] * 6)
                assert found == ["OK"] * 4 + ["RATE_LIMITED"] * 2
        own_redis.thaw()


async def test_validating_never_asks_redis(
    tmp_path: Path, migrated_url: str, own_redis: Redis
) -> None:
    async with pair(tmp_path, migrated_url, own_redis) as (one, _two):
        api = await one.member("api", "validate")
        await one.resource(API, "read", owner=api.client_id)
        app = await one.member("app", "read")
        token = (await one.token(app)).access_token
        assert await one.judged(api.who, token, of=app.who) == "OK"
        before = _commands(own_redis)
        assert before.keys() == {"cmdstat_get", "cmdstat_set", "cmdstat_eval"}
        for _ in range(20):
            assert await one.judged(api.who, token, of=app.who) == "OK"
        assert _commands(own_redis) - before == {}


def _commands(redis: Redis) -> Counter[str]:
    """How often each command was given that reads or counts."""
    said = redis.ask("INFO", "commandstats")
    wanted = {"cmdstat_get", "cmdstat_set", "cmdstat_eval"}
    return Counter({name: int(said[name]["calls"]) for name in wanted & said.keys()})
