"""Opaque and encrypted access tokens, which are found and not read."""

import asyncio
import json
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jwt

from authsvc.errors import AuthError, Reason
from authsvc.identify import HELD_S
from authsvc.keys.secrets import ACCESS_TOKEN_PREFIX, digest, new_id, new_secret
from authsvc.store.port import Store, StoredToken, TokenStore, change
from authsvc.store.reads import READS_MAX
from authsvc_client.core.markers import MarkerKind
from authsvc_client.v1 import auth_pb2, resources_pb2
from tests.harness import (
    ADMIN,
    Member,
    Running,
    by_hand,
    hand_clock,
    outcome,
    reason,
    running,
)

OPAQUE, SIGNED, OTHER = "https://opaque.test", "https://signed.test", "https://other.test"
FORMAT = resources_pb2.TOKEN_FORMAT_OPAQUE
HOUR = {"seconds": 3600}


@dataclass(frozen=True)
class Cast:
    """`client` has tokens of OPAQUE and SIGNED, which `owner` owns."""

    client: Member
    owner: Member
    other: Member
    nobody: Member


async def _cast(server: Running) -> Cast:
    owner, other = [await server.member(name, "validate") for name in ("owner", "other")]
    owned: dict[str, Any] = {"owner": owner.client_id, "token_lifetime": HOUR}
    await server.resource(OPAQUE, "opaque.read", "opaque.write", token_format=FORMAT, **owned)
    await server.resource(SIGNED, "signed.read", **owned)
    await server.resource(OTHER, "other.read", owner=other.client_id)
    client = await server.member("client", "opaque.read", "opaque.write", "signed.read")
    return Cast(client, owner, other, await server.member("nobody", "validate"))


async def _opaque(server: Running, member: Member, **more: Any) -> str:
    return (await server.token(member, resources=[OPAQUE], **more)).access_token


@dataclass
class Tokens:
    """Stored tokens that count their reads, and can be gone or held up."""

    tokens: TokenStore
    reads: int = 0
    gone: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def add(self, token: StoredToken) -> None:
        await self.tokens.add(token)

    async def find(self, digest: bytes) -> StoredToken | None:
        self.reads += 1
        if self.gone:
            raise AuthError(Reason.STORE_UNAVAILABLE)
        await self.gate.wait()
        return await self.tokens.find(digest)


def _wrapping(found: list[Tokens]) -> Callable[[Store], Store]:
    def wrap(store: Store) -> Store:
        found.append(Tokens(store.tokens))
        found[0].gate.set()
        return replace(store, tokens=found[0])

    return wrap


async def test_opaque_token_says_nothing_and_is_judged_like_a_jwt(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        cast = await _cast(server)
        issued = await server.token(cast.client, resources=[OPAQUE])
        assert issued.access_token.startswith(ACCESS_TOKEN_PREFIX)
        assert issued.access_token != await _opaque(server, cast.client)
        answers = [
            await server.verdict(
                cast.owner.who,
                issued.access_token,
                of=cast.client.who,
                view=auth_pb2.TOKEN_VIEW_CLAIMS,
            )
            for _ in ("read", "held")
        ]
        signed = await server.token(cast.client, resources=[SIGNED])
        said = jwt.decode(signed.access_token, options={"verify_signature": False})
        for answer in answers:
            assert answer.active
            assert answer.claims.jti == issued.jti
            assert answer.claims.subject == answer.claims.client_id == cast.client.client_id
            assert list(answer.claims.audiences) == [OPAQUE]
            assert list(answer.claims.scopes) == ["opaque.read", "opaque.write"]
            assert answer.claims.expire_time == issued.expire_time
            assert answer.claims.certificate_thumbprint == said["cnf"]["x5t#S256"]
        short = await server.verdict(
            cast.owner.who, issued.access_token, of=cast.client.who, required_scopes=["x"]
        )
        assert list(short.missing_scopes) == ["x"]


async def test_every_prefix_extension_and_case_flip_is_refused(tmp_path: Path) -> None:
    found: list[Tokens] = []
    async with running(tmp_path, wrap=_wrapping(found)) as server:
        cast = await _cast(server)
        token = await _opaque(server, cast.client)
        assert await server.judged(cast.owner.who, token, of=cast.client.who) == "OK"
        reads = found[0].reads
        mutated = [token[:length] for length in range(1, len(token))]
        mutated += [token + more for more in (*string.ascii_letters, *string.digits, "-_.= \n\0é")]
        mutated += [token[:at] + token[at].swapcase() + token[at + 1 :] for at in range(len(token))]
        mutated += [token.upper(), token.lower(), " " + token, "Bearer " + token, token * 2]
        judged = {
            text: await server.judged(cast.owner.who, text, of=cast.client.who)
            for text in mutated
            if text != token
        }
        assert len(judged) > 150
        assert set(judged.values()) == {"TOKEN_MALFORMED"}
        assert found[0].reads == reads  # the checksum refuses before any I/O
        unknown = new_secret(ACCESS_TOKEN_PREFIX)
        assert await server.judged(cast.owner.who, unknown) == "TOKEN_MALFORMED"
        assert found[0].reads == reads + 1
        assert await server.judged(cast.owner.who, token, of=cast.client.who) == "OK"


async def test_dots_are_cheap(tmp_path: Path) -> None:
    found: list[Tokens] = []
    async with running(tmp_path, wrap=_wrapping(found)) as server:
        cast = await _cast(server)
        for text in ("." * 10**6, "." * 8193, "a." * 10**5, "." * 3, "." * 5, "a" * 8190 + "...."):
            assert await server.judged(cast.owner.who, text) == "TOKEN_MALFORMED"
        assert found[0].reads == 0


async def test_who_is_not_entitled_is_told_the_same_nothing_as_of_a_jwt(tmp_path: Path) -> None:
    """CVE-2026-37979 and its neighbours: whoever may not know learns nothing, in any form."""
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        cast = await _cast(server)
        gone = await server.member("gone", "opaque.read", "signed.read")

        async def fates(resource: str) -> dict[str, tuple[str, Member]]:
            async def token(member: Member) -> str:
                return (await server.token(member, resources=[resource])).access_token

            made = {name: (await token(cast.client), cast.client) for name in ("good", "revoked")}
            made["expired"] = (await token(cast.client), cast.client)
            made["cut off"] = (await token(gone), gone)
            made["bound to another"] = (await token(cast.client), gone)
            return made

        both = [await fates(OPAQUE), await fates(SIGNED)]
        await server.suspend(gone.client_id)
        for made in both:
            revoke = auth_pb2.RevokeTokenRequest(token=made["revoked"][0])
            await server.auth(cast.client.who).RevokeToken(revoke)
        told = {
            "good": "OK",
            "revoked": "TOKEN_REVOKED",
            "cut off": "TOKEN_CUT_OFF",
            "bound to another": "PROOF_MISMATCH",
        }

        async def compare(name: str, expected: str) -> None:
            for text, of in (made[name] for made in both):
                assert await server.judged(cast.owner.who, text, of=of.who) == expected, name
                for asker in (cast.other, cast.nobody):
                    for more in ({}, {"audience": OPAQUE}, {"required_scopes": ["x"]}):
                        answer = await server.verdict(asker.who, text, of=of.who, **more)
                        assert answer.SerializeToString() == b"", (name, more)
                wrong = await server.verdict(cast.owner.who, text, of=of.who, audience=OTHER)
                assert wrong.SerializeToString() == b""
            opaque, signed = [
                (await server.verdict(cast.owner.who, text, of=of.who)).SerializeToString()
                for text, of in (made[name] for made in both)
            ]
            assert opaque == signed, name

        for name, expected in told.items():
            await compare(name, expected)
        await server.advance(3631)  # an hour, the leeway, and one more
        await compare("expired", "TOKEN_EXPIRED")
        for text in (new_secret(ACCESS_TOKEN_PREFIX), "a.b.c.d.e", "garbage"):
            answer = await server.verdict(cast.nobody.who, text)
            assert answer.SerializeToString() == b""


async def test_held_token_is_read_again_before_its_markers_are_gone(tmp_path: Path) -> None:
    clock, found = hand_clock(), list[Tokens]()
    async with running(tmp_path, clock=clock, wrap=_wrapping(found)) as server:
        cast = await _cast(server)
        token = await _opaque(server, cast.client)
        assert await server.judged(cast.owner.who, token, of=cast.client.who) == "OK"
        await _sql(tmp_path, "DELETE FROM access_token")
        await server.advance(HELD_S)
        assert await server.judged(cast.owner.who, token, of=cast.client.who) == "OK"
        await server.advance(1)
        assert await server.judged(cast.owner.who, token, of=cast.client.who) == "TOKEN_MALFORMED"
        assert found[0].reads == 2


async def _sql(directory: Path, statement: str, *values: Any) -> list[Any]:
    return await by_hand(directory / "authsvc.db", statement, *values)


async def test_cut_off_token_outlives_the_compaction_of_its_marker(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        cast = await _cast(server)
        token = await _opaque(server, cast.client)
        other = await server.member("other-client", "opaque.read")
        good = await _opaque(server, other)
        await server.suspend(cast.client.client_id)
    await _sql(tmp_path, "DELETE FROM feed")
    await _sql(tmp_path, "UPDATE feed_head SET compacted_to = revision")
    async with running(tmp_path) as server:
        assert await server.judged(cast.owner.who, token, of=cast.client.who) == "TOKEN_CUT_OFF"
        assert await server.judged(cast.owner.who, good, of=other.who) == "OK"


async def test_without_the_database_only_what_is_held_is_judged(tmp_path: Path) -> None:
    found: list[Tokens] = []
    async with running(tmp_path, wrap=_wrapping(found)) as server:
        cast = await _cast(server)
        held, unread = [await _opaque(server, cast.client) for _ in range(2)]
        signed = (await server.token(cast.client, resources=[SIGNED])).access_token
        assert await server.judged(cast.owner.who, held, of=cast.client.who) == "OK"
        found[0].gone = True
        for text in (held, signed):
            assert await server.judged(cast.owner.who, text, of=cast.client.who) == "OK"
        for text in (unread, new_secret(ACCESS_TOKEN_PREFIX)):
            call = server.verdict(cast.owner.who, text, of=cast.client.who)
            assert await reason(call) == "STORE_UNAVAILABLE"
        found[0].gone = False
        assert await server.judged(cast.owner.who, unread, of=cast.client.who) == "OK"


async def test_reads_are_shared_and_bounded(tmp_path: Path) -> None:
    found: list[Tokens] = []
    async with running(tmp_path, wrap=_wrapping(found)) as server:
        cast = await _cast(server)
        token = await _opaque(server, cast.client)
        unknown = [new_secret(ACCESS_TOKEN_PREFIX) for _ in range(READS_MAX)]
        found[0].gate.clear()
        waiting = [
            asyncio.ensure_future(_judged(server, cast, text))
            for text in [*unknown[:-1], *([token] * 20)]
        ]
        async with asyncio.timeout(20):
            while found[0].reads < READS_MAX:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        assert await reason(server.verdict(cast.owner.who, unknown[-1])) == "STORE_UNAVAILABLE"
        found[0].gate.set()
        answers = await asyncio.gather(*waiting)
        assert answers == ["TOKEN_MALFORMED"] * (READS_MAX - 1) + ["OK"] * 20
        assert found[0].reads == READS_MAX
        assert await _judged(server, cast, unknown[-1]) == "TOKEN_MALFORMED"


async def _judged(server: Running, cast: Cast, token: str) -> str:
    return await server.judged(cast.owner.who, token, of=cast.client.who)


async def test_state_that_is_too_old_is_no_answer(tmp_path: Path) -> None:
    """Neither what is held nor what would be read; and past a resource's own lower bound."""
    clock, feeds = hand_clock(), list[Gone]()

    def wrap(store: Store) -> Store:
        feeds.append(Gone(store.feed))
        feed: Any = feeds[0]
        return replace(store, feed=feed)

    async with running(tmp_path, clock=clock, wrap=wrap) as server:
        cast = await _cast(server)
        await server.resource(
            "urn:quick",
            "quick.read",
            owner=cast.owner.client_id,
            token_format=FORMAT,
            staleness_max={"seconds": 10},
        )
        hasty = await server.member("hasty", "quick.read")
        quick = (await server.token(hasty)).access_token
        held, unread = [await _opaque(server, cast.client) for _ in range(2)]
        assert await server.judged(cast.owner.who, quick, of=hasty.who) == "OK"
        assert await _judged(server, cast, held) == "OK"
        feeds[0].gone = True
        for seconds, told in ((11, ("STATE_STALE", "OK", "OK")), (110, ("STATE_STALE",) * 3)):
            clock.advance(seconds)
            calls = [
                server.verdict(cast.owner.who, quick, of=hasty.who),
                server.verdict(cast.owner.who, held, of=cast.client.who),
                server.verdict(cast.owner.who, unread, of=cast.client.who),
            ]
            assert tuple([await outcome(call) for call in calls]) == told


class Gone:
    """A feed that can be made to fail."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        if self.gone and name != "close":
            raise AuthError(Reason.STORE_UNAVAILABLE)
        return getattr(self._feed, name)


async def test_encrypted_token_dies_with_the_key_that_signed_it(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        cast = await _cast(server)
        signed = (await server.token(cast.client, resources=[SIGNED])).access_token
        said = jwt.decode(signed, options={"verify_signature": False}) | {"jti": new_id()}
        token = "eyJhbGciOiJFQ0RILUVTIn0.a.b.c.d"  # what only its resource could read
        row = StoredToken(digest(token), "kid-of-old", said, float(said["exp"]))
        await server.store.tokens.add(row)
        assert await _judged(server, cast, token) == "OK"
        assert await _judged(server, cast, token + "d") == "TOKEN_MALFORMED"
        tainted = await server.store.feed.append([change(MarkerKind.KEY_TAINTED, "kid-of-old")])
        await server.app.follow.reach(tainted)
        assert await _judged(server, cast, token) == "TOKEN_KEY_TAINTED"
        assert await _judged(server, cast, signed) == "OK"


async def test_claims_that_no_token_of_ours_has_are_not_taken(tmp_path: Path) -> None:
    """What the table says is judged as strictly as what a signature says."""
    async with running(tmp_path) as server:
        cast = await _cast(server)
        token = await _opaque(server, cast.client)
        ((text,),) = await _sql(tmp_path, "SELECT claims FROM access_token")
        changes: tuple[dict[str, Any], ...] = (
            {"iss": "https://evil.test"},
            {"exp": 2**40},
            {"aud": []},
            {"rev": "1"},
        )
        for changed in changes:
            details = json.loads(text)
            details["claims"] |= changed
            await _sql(tmp_path, "UPDATE access_token SET claims = ?", json.dumps(details))
            assert await _judged(server, cast, token) == "TOKEN_MALFORMED", changed
        await _sql(tmp_path, "UPDATE access_token SET claims = ?", text)
        assert await _judged(server, cast, token) == "OK"


async def test_revoked_by_its_client_and_by_jti(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        cast = await _cast(server)
        for by_jti in (False, True):
            issued = await server.token(cast.client, resources=[OPAQUE])
            assert await _judged(server, cast, issued.access_token) == "OK"
            if by_jti:
                request = auth_pb2.RevokeTokenRequest(jti=issued.jti)
                await server.auth(ADMIN).RevokeToken(request)
            else:
                request = auth_pb2.RevokeTokenRequest(token=issued.access_token)
                assert await reason(server.auth(cast.owner.who).RevokeToken(request)) == (
                    "TOKEN_NOT_OWNED"
                )
                await server.auth(cast.client.who).RevokeToken(request)
            assert await _judged(server, cast, issued.access_token) == "TOKEN_REVOKED"
