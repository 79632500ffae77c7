"""RefreshToken over a real server: rotation, lost replies, reuse, and what bounds a grant."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import SecretStr

from authsvc.config import Grants
from authsvc.keys.refresh import RefreshKeys
from authsvc_client.v1 import auth_pb2, clients_pb2
from tests.harness import (
    Member,
    Running,
    failure,
    hand_clock,
    issue_request,
    read_failure,
    reason,
    running,
)

ACCESS = "urn:ietf:params:oauth:token-type:access_token"
REFRESH = "urn:ietf:params:oauth:token-type:refresh_token"
GRANTS = [
    clients_pb2.GRANT_TYPE_CLIENT_CREDENTIALS,
    clients_pb2.GRANT_TYPE_TOKEN_EXCHANGE,
    clients_pb2.GRANT_TYPE_REFRESH_TOKEN,
]
API = "https://api.test"
OTHER = "https://other.test"
DAY = 24 * 3600.0
KEY, NEXT_KEY = "11" * 32, "22" * 32


@dataclass
class Scene:
    """A client with a refresh token, and the owner of what its tokens are for."""

    server: Running
    member: Member
    owner: Member

    async def open(self, **more: Any) -> str:
        """A new grant's first refresh token."""
        subject = await self.server.token(self.member, resources=[API, OTHER])
        return (
            await exchange(self.server, self.member, subject.access_token, **more)
        ).refresh_token

    async def use(self, token: str, by: Member | None = None, **more: Any) -> auth_pb2.IssuedToken:
        """Uses a refresh token."""
        by = by or self.member
        request = auth_pb2.RefreshTokenRequest(
            refresh_token=token, client_id=more.pop("client_id", by.client_id), **more
        )
        return (await self.server.auth(by.who).RefreshToken(request)).token

    async def judged(self, token: auth_pb2.IssuedToken) -> str:
        """How an access token of the client's is judged for its audience."""
        return await self.server.judged(self.owner.who, token.access_token, of=self.member.who)


async def exchange(
    server: Running, member: Member, subject: str, wanted: str = REFRESH, **more: Any
) -> auth_pb2.IssuedToken:
    """Exchanges a token of the client's own."""
    request = auth_pb2.IssueTokenRequest(
        token_exchange=auth_pb2.TokenExchangeGrant(
            subject_token=subject, subject_token_type=ACCESS, requested_token_type=wanted
        ),
        client_id=member.client_id,
        resources=more.pop("resources", [API, OTHER]),
        **more,
    )
    return (await server.auth(member.who).IssueToken(request)).token


async def scene(server: Running) -> Scene:
    owner = await server.member("owner", "validate")
    await server.resource(API, "read", "write", owner=owner.client_id)
    await server.resource(OTHER, "other", owner=owner.client_id)
    member = await server.member("app", "read", "write", "other", grant_types=GRANTS)
    return Scene(server, member, owner)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """A PostgreSQL database; none for a SQLite file."""
    return str(request.getfixturevalue("migrated_url")) if request.param == "postgres" else ""


@pytest.fixture
async def at(url: str, tmp_path: Path) -> AsyncIterator[Scene]:
    """A scene on each kind of database."""
    async with running(tmp_path, url=url) as server:
        yield await scene(server)


async def test_each_use_gives_an_access_token_and_the_next_refresh_token(at: Scene) -> None:
    token, seen = await at.open(), set()
    for _ in range(3):
        answer = await at.use(token)
        assert answer.token_type == "Bearer"
        assert await at.judged(answer) == "OK"
        assert answer.scopes == ["other", "read", "write"]
        assert answer.audiences == [API, OTHER]
        seen |= {token, answer.refresh_token, answer.access_token, answer.jti}
        token = answer.refresh_token
    assert len(seen) == 1 + 3 * 3


async def test_a_lost_reply_is_given_again_until_its_token_is_used(at: Scene) -> None:
    """RFC 9700 section 4.14.2: reuse is detected; design: not by the client's own retry."""
    first = await at.open()
    answers = [await at.use(first) for _ in range(3)]
    assert len({answer.refresh_token for answer in answers}) == 1
    assert len({answer.jti for answer in answers}) == 3
    second = answers[0].refresh_token
    third = (await at.use(second)).refresh_token
    assert (await at.use(second)).refresh_token == third
    assert await reason(at.use(first)) == "REFRESH_TOKEN_REUSED"
    for token in (first, second, third):
        assert await reason(at.use(token)) == "INVALID_GRANT"
    for answer in answers:
        assert await at.judged(answer) == "GRANT_REVOKED"


async def test_many_at_once_get_one_successor(at: Scene) -> None:
    first = await at.open()
    answers = await asyncio.gather(*(at.use(first) for _ in range(32)))
    assert len({answer.refresh_token for answer in answers}) == 1
    for answer in answers:
        assert await at.judged(answer) == "OK"
    await at.use(answers[0].refresh_token)
    assert await reason(at.use(first)) == "REFRESH_TOKEN_REUSED"


async def test_another_client_gets_nothing_and_breaks_nothing(at: Scene) -> None:
    """RFC 6749 section 6: the token is bound to the client that it was issued to."""
    token = await at.open()
    other = await at.server.member("thief", "read", grant_types=GRANTS)
    assert await reason(at.use(token, other)) == "INVALID_GRANT"
    named = at.use(token, other, client_id=at.member.client_id)
    assert await reason(named) == "CLIENT_AUTHENTICATION_FAILED"
    plain = await at.server.member("plain", "read")
    assert await reason(at.use(token, plain)) == "GRANT_TYPE_NOT_ALLOWED"
    successor = (await at.use(token)).refresh_token
    assert await reason(at.use(token, other)) == "INVALID_GRANT"
    await at.use(successor)


@pytest.mark.parametrize("change", ["x", "", "flip", "cut", "longer", "foreign"])
async def test_a_wrong_token_is_refused_and_the_right_one_still_good(
    at: Scene, change: str
) -> None:
    token = await at.open()
    foreign = RefreshKeys((b"k" * 32,)).mint(bytes(16), 1)
    wrong = {
        "x": "asvc_rt_x",
        "": token.removeprefix("asvc_rt_"),
        "flip": token[:-1] + ("A" if token[-1] != "A" else "B"),
        "cut": token[:-1],
        "longer": token + "A",
        "foreign": foreign,
    }[change]
    assert await reason(at.use(wrong)) == "INVALID_GRANT"
    await at.use(token)


async def test_scopes_and_audiences_shrink_for_one_access_token_alone(at: Scene) -> None:
    """RFC 6749 section 6, RFC 8707 section 2.2: fewer at refresh, and the grant keeps its own."""
    token = await at.open()
    narrow = await at.use(token, scopes=["read"])
    assert [*narrow.scopes, *narrow.audiences] == ["read", API]
    only = await at.use(narrow.refresh_token, resources=[OTHER])
    assert [*only.scopes, *only.audiences] == ["other", OTHER]
    whole = await at.use(only.refresh_token)
    assert whole.scopes == ["other", "read", "write"]
    token = whole.refresh_token
    assert await reason(at.use(token, scopes=["nothing"])) == "SCOPE_UNKNOWN"
    assert await reason(at.use(token, scopes=["validate"])) == "SCOPE_NOT_ALLOWED"
    unknown = await failure(at.use(token, resources=["https://nobody.test"]))
    assert (unknown.reason, unknown.metadata["resource"]) == (
        "INVALID_TARGET",
        "https://nobody.test",
    )
    mixed = at.use(token, scopes=["read"], resources=[OTHER])
    assert await reason(mixed) == "INVALID_TARGET"
    assert (await at.use(token)).scopes == ["other", "read", "write"]


async def test_revoked_by_its_owner_it_takes_its_access_tokens_along(at: Scene) -> None:
    """RFC 7009 section 2.1: a refresh token dies with the access tokens of its grant."""
    token = await at.open()
    answer = await at.use(token)
    other = await at.server.member("thief", "read", grant_types=GRANTS)
    request = auth_pb2.RevokeTokenRequest(token=answer.refresh_token)
    stub = at.server.auth
    assert await reason(stub(other.who).RevokeToken(request)) == "TOKEN_NOT_OWNED"
    dry = auth_pb2.RevokeTokenRequest(token=answer.refresh_token, validate_only=True)
    would = await stub(at.member.who).RevokeToken(dry)
    assert (would.revision, [dead.kind for dead in would.revoked]) == (
        0,
        [auth_pb2.MARKER_KIND_GRANT_DEAD],
    )
    assert await at.judged(answer) == "OK"
    done = await stub(at.member.who).RevokeToken(request)
    assert done.revision > 0
    assert done.revoked == would.revoked
    assert await at.judged(answer) == "GRANT_REVOKED"
    assert await reason(at.use(answer.refresh_token)) == "INVALID_GRANT"
    again = await stub(at.member.who).RevokeToken(request)
    assert (again.revision, list(again.revoked)) == (0, [])


async def test_suspended_its_client_gets_nothing_and_resumed_nothing_comes_back(at: Scene) -> None:
    token = await at.open()
    await at.server.suspend(at.member.client_id)
    assert await reason(at.use(token)) == "CLIENT_SUSPENDED"
    await at.server.clients().ResumeClient(
        clients_pb2.ResumeClientRequest(client_id=at.member.client_id)
    )
    assert await reason(at.use(token)) == "INVALID_GRANT"
    await at.use(await at.open())


async def test_the_root_token_revoked_ends_the_grant(at: Scene) -> None:
    subject = await at.server.token(at.member, resources=[API, OTHER])
    token = (await exchange(at.server, at.member, subject.access_token)).refresh_token
    answer = await at.use(token)
    await at.server.auth(at.member.who).RevokeToken(
        auth_pb2.RevokeTokenRequest(token=subject.access_token)
    )
    assert await at.judged(answer) == "TOKEN_REVOKED"
    assert await reason(at.use(answer.refresh_token)) == "INVALID_GRANT"


async def test_a_grant_ends_when_it_is_not_used_and_at_the_latest_at_its_end(
    tmp_path: Path,
) -> None:
    clock = hand_clock()
    life = Grants(lifetime_days=0.25, idle_days=0.1)
    async with running(tmp_path, clock=clock, grants=life) as server:
        made = await scene(server)
        idle, used = await made.open(), await made.open()
        await server.advance(0.09 * DAY)
        used = (await made.use(used)).refresh_token
        await server.advance(0.09 * DAY)
        assert await reason(made.use(idle)) == "INVALID_GRANT"
        last = await made.use(used)
        await server.advance(0.0698 * DAY)
        capped = await made.use(last.refresh_token)
        assert 0 < capped.expires_in.seconds < 300  # no token outlives its grant
        await server.advance(0.001 * DAY)
        assert await reason(made.use(capped.refresh_token)) == "INVALID_GRANT"


async def test_hmac_keys_are_rotated_and_the_grant_remembers_its_own(tmp_path: Path) -> None:
    async def uses(keys: str, *tokens: str) -> list[str]:
        """What each token becomes on a server with these keys: its successor, or a reason."""
        async with running(tmp_path, refresh_keys=SecretStr(keys)) as server:
            found = []
            for token in tokens:
                request = auth_pb2.RefreshTokenRequest(
                    refresh_token=token, client_id=made.member.client_id
                )
                try:
                    answer = await server.auth(made.member.who).RefreshToken(request)
                    found.append(answer.token.refresh_token)
                except grpc.aio.AioRpcError as error:
                    found.append(read_failure(error).reason)
            return found

    async with running(tmp_path, refresh_keys=SecretStr(KEY)) as server:
        made = await scene(server)
        first, unused = await made.open(), await made.open()
    old_id = first[8:14]
    second, repeated = await uses(f"{NEXT_KEY},{KEY}", first, first)
    assert second == repeated
    assert second[8:14] != old_id
    third, reused = await uses(NEXT_KEY, second, first)
    assert third.startswith("asvc_rt_")
    assert reused == "INVALID_GRANT"  # its key is gone: refused before any I/O
    (dropped,) = await uses(NEXT_KEY, unused)
    assert dropped == "INVALID_GRANT"
    (kept,) = await uses(f"{NEXT_KEY},{KEY}", unused)
    assert kept.startswith("asvc_rt_")


async def test_a_server_that_lacks_the_successors_key_says_so_and_kills_nothing(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, refresh_keys=SecretStr(KEY)) as server:
        made = await scene(server)
        first = await made.open()
    async with running(tmp_path, refresh_keys=SecretStr(f"{NEXT_KEY},{KEY}")) as server:
        second = (await Scene(server, made.member, made.owner).use(first)).refresh_token
    async with running(tmp_path, refresh_keys=SecretStr(KEY)) as server:
        at = Scene(server, made.member, made.owner)
        assert await reason(at.use(first)) == "STORE_UNAVAILABLE"
        assert await reason(at.use(second)) == "INVALID_GRANT"
    async with running(tmp_path, refresh_keys=SecretStr(f"{NEXT_KEY},{KEY}")) as server:
        await Scene(server, made.member, made.owner).use(second)


async def test_client_credentials_never_gives_a_refresh_token(at: Scene) -> None:
    """RFC 6749 section 4.4.3."""
    request = issue_request(at.member.client_id, resources=[API])
    answer = await at.server.auth(at.member.who).IssueToken(request)
    assert answer.token.refresh_token == ""
