"""Of calls that need the same at once one reads it: counted in statements of a real database."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.util import await_only

from authsvc.store.reads import Reads
from authsvc_client.core.jws import Verifier
from authsvc_client.v1 import clients_pb2, resources_pb2
from tests.harness import Member, Running, by_hand, outcome, running, until

CALLS = 64
API, OPAQUE = "https://api.test", "https://opaque.test"
METHODS = [
    clients_pb2.CLIENT_AUTH_METHOD_TLS_CLIENT_AUTH,
    clients_pb2.CLIENT_AUTH_METHOD_API_KEY,
]


class Selects:
    """SELECTs of one table: counts them, and holds up the next one, with its rows or before."""

    def __init__(self, table: str) -> None:
        self._of_table = re.compile(rf"SELECT .*\bFROM {table}\b(?!.* FOR UPDATE)", re.DOTALL)
        self.count = 0
        self.asked = 0
        """How often anything was to be read, by one for all or not."""
        self._held: tuple[str, asyncio.Event] | None = None

    def hold(self, when: str) -> asyncio.Event:
        """Until the event is set; `when` is "before" it is sent or "after" its rows came."""
        self._held = (when, asyncio.Event())
        return self._held[1]

    def before(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if self._of_table.match(statement):
            self.count += 1
            self._wait("before")

    def after(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if self._of_table.match(statement):
            self._wait("after")

    def _wait(self, when: str) -> None:
        held = self._held
        if held is not None and held[0] == when:
            self._held = None
            await_only(held[1].wait())


@contextmanager
def selects(table: str) -> Iterator[Selects]:
    made, real = Selects(table), Reads.__call__

    def ask(self: Reads[Any, Any], *of: Any) -> Any:
        made.asked += 1
        return real(self, *of)

    hooks = {"before_cursor_execute": made.before, "after_cursor_execute": made.after}
    for name, hook in hooks.items():
        event.listen(Engine, name, hook)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reads, "__call__", ask)
            yield made
    finally:
        for name, hook in hooks.items():
            event.remove(Engine, name, hook)


@dataclass(frozen=True)
class Cast:
    """`client` has tokens and API keys, which `owner` validates."""

    server: Running
    owner: Member
    client: Member
    sql: Callable[[str], Awaitable[object]]

    async def opaque(self) -> str:
        return (await self.server.token(self.client, resources=[OPAQUE])).access_token

    async def jwt(self) -> str:
        return (await self.server.token(self.client, resources=[API])).access_token

    async def api_key(self) -> str:
        request = clients_pb2.CreateApiKeyRequest(api_key=clients_pb2.ApiKey(scopes=["read"]))
        return (await self.server.clients(self.client.who).CreateApiKey(request)).value

    async def judged(self, token: str) -> str:
        return await self.server.judged(self.owner.who, token, of=self.client.who)

    async def ask(self, token: str, number: int) -> tuple[bool, bool]:
        """Each fourth asks the same: whether it is active, and lacks a scope."""
        asked: dict[str, Any] = {"required_scopes": ["x"]} if number % 2 else {}
        of = self.client if number % 4 < 2 else self.owner
        verdict = await self.server.verdict(self.owner.who, token, of=of.who, **asked)
        return verdict.active, bool(verdict.missing_scopes)

    async def all_at_once(self, token: str) -> Counter[tuple[bool, bool]]:
        return Counter(await asyncio.gather(*(self.ask(token, n) for n in range(CALLS))))


@asynccontextmanager
async def made(directory: Path, url: str) -> AsyncIterator[Cast]:
    async def sql(statement: str) -> object:
        if not url:
            return await by_hand(directory / "authsvc.db", statement)
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            return await connection.execute(statement)
        finally:
            await connection.close()

    async with running(directory, url=url) as server:
        owner = await server.member("owner", "validate")
        await server.resource(API, "read", owner=owner.client_id)
        opaque = resources_pb2.TOKEN_FORMAT_OPAQUE
        await server.resource(OPAQUE, "read.it", owner=owner.client_id, token_format=opaque)
        client = await server.member(
            "client", "read", "read.it", token_endpoint_auth_methods=METHODS
        )
        cast = Cast(server, owner, client, sql)
        await cast.judged(await cast.jwt())  # rows that every call needs are at hand
        yield cast


@pytest.fixture
async def cast(url: str, tmp_path: Path) -> AsyncIterator[Cast]:
    async with made(tmp_path, url) as cast:
        yield cast


# --- tokens ---


async def _read_at_once(cast: Cast, kind: str, table: str) -> int:
    """How many statements look for a token that nobody knows yet."""
    token = await getattr(cast, kind)()
    with selects(table) as read:
        gate = read.hold("before")
        asked = asyncio.ensure_future(cast.all_at_once(token))
        await until(lambda: read.asked >= CALLS or read.count > 1)
        gate.set()
        told = await asked
        quarter = CALLS // 4
        assert told[True, False] == (2 * quarter if kind == "api_key" else quarter)
        assert told[False, True] == (2 * quarter if kind == "api_key" else quarter)
        count = read.count
        assert await cast.all_at_once(token) == told
        assert read.count == count
        return count


KINDS = [("opaque", "access_token"), ("api_key", "api_key")]


@pytest.mark.parametrize(("kind", "table"), KINDS)
async def test_cold_token_is_read_by_one_statement(cast: Cast, kind: str, table: str) -> None:
    assert await _read_at_once(cast, kind, table) == 1


async def _each_for_itself(_self: Any, _key: Any, read: Any, keep: Any, _name: str = "") -> Any:
    found = await read()
    keep(found)
    return found


@pytest.mark.parametrize(("kind", "table"), KINDS)
async def test_statements_tell_where_each_reads_for_itself(
    cast: Cast, kind: str, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reads, "__call__", _each_for_itself)
    assert await _read_at_once(cast, kind, table) > 1


async def test_caller_that_goes_away_leaves_the_read_to_the_others(cast: Cast) -> None:
    token = await cast.opaque()
    with selects("access_token") as read:
        gate = read.hold("before")
        first = asyncio.ensure_future(cast.judged(token))
        await until(lambda: read.count)
        others = asyncio.gather(*(cast.judged(token) for _ in range(CALLS)))
        await until(lambda: read.asked > CALLS)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set()
        assert await others == ["OK"] * CALLS
        assert read.count == 1


async def test_read_that_fails_is_told_to_all_and_not_remembered(cast: Cast) -> None:
    token = await cast.opaque()
    with selects("access_token") as read:
        gate = read.hold("before")
        asked = [asyncio.ensure_future(outcome(cast.judged(token))) for _ in range(CALLS)]
        await until(lambda: read.asked >= CALLS)
        await cast.sql("ALTER TABLE access_token RENAME TO away")
        gate.set()
        assert await asyncio.gather(*asked) == ["STORE_UNAVAILABLE"] * CALLS
        assert read.count == 1
        await cast.sql("ALTER TABLE away RENAME TO access_token")
        assert await cast.judged(token) == "OK"
        assert read.count == 2


async def test_signature_of_a_cold_jwt_is_verified_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = list[bytes]()
    real = Verifier.verify

    def verify(self: Verifier, signing_input: bytes, signature: bytes) -> None:
        verified.append(signing_input)
        real(self, signing_input, signature)

    async with made(tmp_path, "") as cast:
        token = await cast.jwt()
        monkeypatch.setattr(Verifier, "verify", verify)
        quarter = CALLS // 4
        for _ in ("cold", "warm"):
            told = await cast.all_at_once(token)
            assert (told[True, False], told[False, True]) == (quarter, quarter)
        assert verified == [token.rpartition(".")[0].encode()]


# --- rows of clients, and the catalog ---


async def _touch(cast: Cast) -> None:
    """Changes the row of the owner, and nothing for those who read it."""
    client = clients_pb2.Client(client_id=cast.owner.client_id)
    request = clients_pb2.UpdateClientRequest(client=client)
    request.update_mask.paths.append("metadata.client_uri")
    await cast.server.clients().UpdateClient(request)


async def test_client_that_changed_is_read_by_one_statement(cast: Cast) -> None:
    token = await cast.jwt()
    await _touch(cast)
    with selects("client") as read:
        gate = read.hold("before")
        asked = asyncio.ensure_future(cast.all_at_once(token))
        await until(lambda: read.asked >= CALLS)
        gate.set()
        await asked
        assert read.count == 1


async def test_catalog_that_changed_is_read_by_one_statement(cast: Cast) -> None:
    token = await cast.jwt()
    with selects("resource") as read:
        gate = read.hold("before")
        change = asyncio.ensure_future(cast.server.resource("urn:more", "more"))
        await until(lambda: read.count)  # by what follows the feed
        asked = asyncio.ensure_future(cast.all_at_once(token))
        await until(lambda: read.asked > CALLS)
        gate.set()
        await asyncio.gather(change, asked)
        assert read.count == 1


async def _suspended_while_it_is_read(cast: Cast) -> list[str]:
    """What the owner is told who asks before it, after it, and when the read is over."""
    token = await cast.jwt()
    await _touch(cast)
    with selects("client") as read:
        gate = read.hold("after")
        first = asyncio.ensure_future(outcome(cast.judged(token)))
        await until(lambda: read.count)
        await cast.server.suspend(cast.owner.client_id)
        asked = read.asked
        second = asyncio.ensure_future(outcome(cast.judged(token)))
        await until(lambda: read.asked > asked)
        gate.set()
        return [await first, await second, await outcome(cast.judged(token))]


async def test_who_asks_after_a_change_gets_no_read_from_before_it(cast: Cast) -> None:
    told = await _suspended_while_it_is_read(cast)
    assert told == ["OK", "CLIENT_SUSPENDED", "CLIENT_SUSPENDED"]


async def test_a_change_that_overtakes_no_read_is_noticed(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reads, "overtake", lambda _self, _key: None)
    assert await _suspended_while_it_is_read(cast) == ["OK", "OK", "OK"]
