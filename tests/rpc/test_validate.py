"""ValidateToken over the wire: every reason, every view, and who is told what."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import Message

from authsvc.errors import AuthError
from authsvc.keys.jwt import Signer
from authsvc.keys.secrets import new_id
from authsvc.store.port import Store
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import auth_pb2
from tests.clocks import HandClock
from tests.harness import (
    ISSUER,
    Member,
    Running,
    build,
    failure,
    hand_clock,
    identity,
    outcome,
    reason,
    running,
    thumbprint,
    to_the_end,
)

ORDERS, BILLING = "https://orders.test", "https://billing.test"
VERDICT, CLAIMS = auth_pb2.TOKEN_VIEW_VERDICT, auth_pb2.TOKEN_VIEW_CLAIMS


@dataclass(frozen=True)
class Cast:
    """Who asks about the tokens of `client`, whose audience is ORDERS unless said otherwise."""

    client: Member
    owner: Member
    """Owns ORDERS."""
    named: Member
    """Has ORDERS in its `validates`."""
    gateway: Member
    """Has `*` in its `validates`."""
    other: Member
    """Owns BILLING."""
    nobody: Member
    """Has the scope `validate`, and nothing to validate."""


async def _cast(server: Running) -> Cast:
    owner = await server.member("owner", "validate")
    other = await server.member("other", "validate")
    await server.resource(ORDERS, "orders.read", "orders.write", owner=owner.client_id)
    await server.resource(BILLING, "billing.read", owner=other.client_id)
    return Cast(
        await server.member("client", "orders.read", "orders.write", "billing.read"),
        owner,
        await server.member("named", "validate", validates=[ORDERS]),
        await server.member("gateway", "validate", validates=["*"]),
        other,
        await server.member("nobody", "validate"),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cast(server: Running) -> AsyncIterator[Cast]:
    yield await _cast(server)


async def _token(server: Running, cast: Cast, *scopes: str, audience: str = ORDERS) -> str:
    return (await server.token(cast.client, *scopes, resources=[audience])).access_token


# --- views ---


async def test_views(server: Running, cast: Cast) -> None:
    issued = await server.token(cast.client, resources=[ORDERS])
    token, of = issued.access_token, cast.client.who
    for view in (auth_pb2.TOKEN_VIEW_UNSPECIFIED, VERDICT):
        bare = await server.verdict(cast.owner.who, token, of=of, view=view)
        assert bare.active
        assert not bare.reason
        assert not bare.HasField("claims")
        assert bare.revision == server.app.state.revision
        span = bare.reusable_until.ToNanoseconds() - bare.check_time.ToNanoseconds()
        assert 0 < span <= 1_000_000_001
    for _ in range(2):  # the second answer takes what the first has encoded
        full = await server.verdict(cast.owner.who, token, of=of, view=CLAIMS)
        said = jwt.decode(token, options={"verify_signature": False})
        assert full.claims == build(
            auth_pb2.TokenClaims,
            issuer=ISSUER,
            subject=cast.client.client_id,
            client_id=cast.client.client_id,
            audiences=[ORDERS],
            expire_time={"seconds": said["exp"]},
            issue_time={"seconds": said["iat"]},
            jti=issued.jti,
            scopes=["orders.read", "orders.write"],
            revision=said["rev"],
            certificate_thumbprint=thumbprint(of),
        )
    refused = await server.verdict(cast.owner.who, token, of=cast.owner.who, view=CLAIMS)
    assert not refused.active
    assert not refused.HasField("claims")


# --- what is not built ---


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"presenter": {"dpop": {"proof": "x"}}}, "presenter dpop"),
        ({"presenter": {"dpop": {}}}, "presenter dpop"),
    ],
    ids=str,
)
async def test_what_is_not_built_is_refused_for_any_token(
    server: Running, cast: Cast, fields: dict[str, Any], feature: str
) -> None:
    token = await _token(server, cast)
    for asker in (cast.owner, cast.nobody):
        for text in (token, "garbage"):
            request = auth_pb2.ValidateTokenRequest(token=text, **fields)
            refused = await failure(server.auth(asker.who).ValidateToken(request))
            assert refused.reason == "NOT_IMPLEMENTED"
            assert refused.metadata == {"feature": feature}


@pytest.mark.parametrize(
    "fields",
    [{}, {"consistency": {}}, {"consistency": {"bounded": {}}}, {"require_bound": True}],
    ids=str,
)
async def test_nearest_that_is_built_is_answered(
    server: Running, cast: Cast, fields: dict[str, Any]
) -> None:
    token = await _token(server, cast)
    verdict = await server.verdict(cast.owner.who, token, of=cast.client.who, **fields)
    assert verdict.active


# --- scopes, audience, presenter ---


async def test_required_scopes(server: Running, cast: Cast) -> None:
    token, of = await _token(server, cast, "orders.read"), cast.client.who
    for scopes, missing in (
        ([], []),
        (["orders.read"], []),
        (["orders.read", "orders.write"], ["orders.write"]),
        (["z", "a", "orders.read"], ["a", "z"]),
        (["Orders.read"], ["Orders.read"]),
    ):
        verdict = await server.verdict(cast.owner.who, token, of=of, required_scopes=scopes)
        assert verdict.active is not bool(missing)
        assert Reason(verdict.reason).name == ("INSUFFICIENT_SCOPE" if missing else "UNSPECIFIED")
        assert list(verdict.missing_scopes) == missing


async def test_expected_audience(server: Running, cast: Cast) -> None:
    both = (await server.token(cast.client, resources=[ORDERS, BILLING])).access_token
    one = await _token(server, cast)
    of = cast.client.who
    table = {
        ("owner", one, ""): "OK",
        ("owner", one, ORDERS): "OK",
        ("owner", both, ORDERS): "OK",
        ("owner", both, ""): "OK",
        ("owner", one, BILLING): "nothing",
        ("owner", both, BILLING): "nothing",
        ("owner", one, ORDERS + "/"): "nothing",
        ("other", both, BILLING): "OK",
        ("other", one, BILLING): "nothing",
        ("gateway", one, ORDERS): "OK",
        ("gateway", one, ""): "OK",
        ("gateway", one, BILLING): "TOKEN_AUDIENCE_WRONG",
        ("gateway", one, "https://nobody.test"): "TOKEN_AUDIENCE_WRONG",
        ("named", one, ORDERS): "OK",
        ("named", both, BILLING): "nothing",
        ("nobody", one, ORDERS): "nothing",
        ("nobody", one, ""): "nothing",
    }
    found = {}
    for name, token, audience in table:
        asker: Member = getattr(cast, name)
        verdict = await server.verdict(asker.who, token, of=of, audience=audience)
        found[name, token, audience] = _told(verdict)
    assert found == table


def _told(verdict: auth_pb2.ValidateTokenResponse) -> str:
    if verdict == auth_pb2.ValidateTokenResponse():
        return "nothing"
    return "OK" if verdict.active else Reason(verdict.reason).name


async def test_presenter(server: Running, cast: Cast) -> None:
    """RFC 8705 section 3: a bound token is worth nothing without its key."""
    free = await server.member(
        "free", "orders.read", tls_client_certificate_bound_access_tokens=False
    )
    tokens = {"bound": await _token(server, cast)}
    tokens["free"] = (await server.token(free)).access_token
    mine, wrong = thumbprint(cast.client.who), thumbprint(free.who)
    table = {
        ("bound", mine, False): "OK",
        ("bound", mine, True): "OK",
        ("bound", wrong, False): "PROOF_MISMATCH",
        ("bound", mine[:-1], False): "PROOF_MISMATCH",
        ("bound", mine.lower(), False): "PROOF_MISMATCH",
        ("bound", "", False): "PROOF_MISSING",
        ("bound", "", True): "PROOF_MISSING",
        ("free", "", False): "OK",
        ("free", wrong, False): "OK",
        ("free", wrong, True): "TOKEN_NOT_BOUND",
        ("free", "", True): "TOKEN_NOT_BOUND",
    }
    found = {}
    for name, proof, bound in table:
        request = auth_pb2.ValidateTokenRequest(
            token=tokens[name],
            require_bound=bound,
            presenter=auth_pb2.Presenter(certificate_thumbprint=proof),
        )
        answer = await server.auth(cast.owner.who).ValidateToken(request)
        found[name, proof, bound] = _told(answer)
    assert found == table
    silent = auth_pb2.ValidateTokenRequest(token=tokens["bound"])
    assert _told(await server.auth(cast.owner.who).ValidateToken(silent)) == "PROOF_MISSING"


# --- entitlement ---


def _set_fields(message: Message) -> list[str]:
    return [field.name for field, _ in message.ListFields()]


@dataclass(frozen=True)
class Case:
    """A token of one of many fates."""

    token: str
    told: str
    of: Any = None


async def _fates(server: Running, cast: Cast, clock: HandClock, signer: Signer) -> dict[str, Case]:
    """A token of every fate that the entitled hear of, the good one first."""
    who, other = cast.client.who, await server.member("cut_off", "orders.read")
    expired = await _token(server, cast)
    await server.advance(331)  # 300 s of life, 30 s of leeway, and one more
    cut_off = (await server.token(other)).access_token
    await server.suspend(other.client_id)
    good = await _token(server, cast)
    revoked = await _token(server, cast)
    await server.auth(who).RevokeToken(auth_pb2.RevokeTokenRequest(token=revoked))
    said = jwt.decode(good, options={"verify_signature": False})
    other_key = ec.generate_private_key(ec.SECP256R1())
    kid = jwt.get_unverified_header(good)["kid"]

    def signed(**changed: Any) -> str:
        claims = {name: value for name, value in (said | changed).items() if value is not None}
        return signer.sign(claims)

    def by_other(kid: str, typ: str = "at+jwt") -> str:
        return jwt.encode(said, other_key, "ES256", headers={"kid": kid, "typ": typ})

    head, _, signature = good.split(".")
    now = int(clock.wall())
    return {
        "good": Case(good, "OK"),
        "expired": Case(expired, "TOKEN_EXPIRED"),
        "revoked": Case(revoked, "TOKEN_REVOKED"),
        "cut off": Case(cut_off, "TOKEN_CUT_OFF", other.who),
        "of the future": Case(signed(iat=now + 31, exp=now + 300), "TOKEN_NOT_YET_VALID"),
        "nbf in the future": Case(signed(nbf=now + 31), "TOKEN_NOT_YET_VALID"),
        "within leeway": Case(signed(nbf=now + 29), "OK"),
        "by another key": Case(by_other(kid), "TOKEN_SIGNATURE_INVALID"),
        "by an unknown key": Case(by_other(new_id()), "TOKEN_KEY_UNKNOWN"),
        "of another type": Case(by_other(kid, "JWT"), "TOKEN_TYPE_WRONG"),
        "of another issuer": Case(signed(iss="https://issuer.test.evil"), "TOKEN_ISSUER_WRONG"),
        "of the issuer with a slash": Case(signed(iss=ISSUER + "/"), "TOKEN_ISSUER_WRONG"),
        "without jti": Case(signed(jti=None), "TOKEN_MALFORMED"),
        "living too long": Case(signed(exp=said["iat"] + 3601), "TOKEN_MALFORMED"),
        "a changed claim": Case(
            ".".join((head, _b64(json.dumps(said | {"scope": "admin"}).encode()), signature)),
            "TOKEN_SIGNATURE_INVALID",
        ),
        "bound to another": Case(signed(cnf={"x5t#S256": "x" * 43}), "PROOF_MISMATCH"),
        "bound by DPoP": Case(signed(cnf={"jkt": "x" * 43}), "PROOF_MISSING"),
        "bound by a way that is not known": Case(signed(cnf={"jwk": {}}), "TOKEN_MALFORMED"),
    }


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


async def test_who_is_entitled_hears_the_reason_and_nobody_else_anything(tmp_path: Path) -> None:
    """CVE-2026-37979 and its neighbours: one answer for whoever may not know."""
    clock = hand_clock()
    async with running(tmp_path, clock=clock) as server:
        cast = await _cast(server)
        signer = server.app._ring.signer
        fates = await _fates(server, cast, clock, signer)
        for name, case in fates.items():
            of = case.of or cast.client.who
            for asker in (cast.owner, cast.named, cast.gateway):
                assert await server.judged(asker.who, case.token, of=of) == case.told, name
            for asker in (cast.nobody, cast.other):
                for view in (VERDICT, CLAIMS):
                    for more in ({}, {"audience": ORDERS}, {"required_scopes": ["orders.read"]}):
                        verdict = await server.verdict(
                            asker.who, case.token, of=of, view=view, **more
                        )
                        assert _set_fields(verdict) == [], (name, asker)
        assert server.app.state.keys.by_header  # the good ones were remembered, and it told nobody


# --- bad input ---


BAD: dict[str, Callable[[str], str]] = {
    "one character too long": lambda token: token + "A" * (8193 - len(token)),
    "a megabyte": lambda token: token + "A" * 2**20,
    "a million dots": lambda token: "." * 10**6,
    "not ASCII": lambda token: token[:-1] + "é",
    "full-width digits": lambda token: token[:-1] + "\uff11",
    "padded": lambda token: token + "==",
    "one pad": lambda token: token + "=",
    "a space before": lambda token: " " + token,
    "a line after": lambda token: token + "\n",
    "CRLF inside": lambda token: token.replace(".", ".\r\n", 1),
    "NUL": lambda token: token + "\0",
    "standard alphabet": lambda token: token.replace("-", "+").replace("_", "/") + "+",
    "four parts": lambda token: token + ".A",
    "five parts": lambda token: token + ".A.A",
    "two parts": lambda token: token.rpartition(".")[0],
    "no signature": lambda token: token.rpartition(".")[0] + ".",
    "scheme left on": lambda token: "Bearer " + token,
    "dots alone": lambda token: "..",
    "one character": lambda token: "A",
}


@pytest.mark.parametrize("how", BAD)
async def test_text_that_is_no_token_is_not_active(server: Running, cast: Cast, how: str) -> None:
    token = await _token(server, cast)
    assert await server.judged(cast.owner.who, token, of=cast.client.who) == "OK"
    bad = BAD[how](token)
    assert await server.judged(cast.owner.who, bad, of=cast.client.who) == "TOKEN_MALFORMED"
    assert _told(await server.verdict(cast.nobody.who, bad)) == "nothing"


async def test_token_as_long_as_it_may_be_is_looked_at(server: Running, cast: Cast) -> None:
    token = await _token(server, cast)
    begins = token.rindex(".") + 1
    fits = next(size for size in (8192, 8191) if (size - begins) % 4 != 1)  # no base64 has that
    for size, told in ((fits, "TOKEN_SIGNATURE_INVALID"), (8193, "TOKEN_MALFORMED")):
        long = token + "A" * (size - len(token))
        assert await server.judged(cast.owner.who, long, of=cast.client.who) == told


async def test_every_trailing_bit_of_a_signature_counts(server: Running, cast: Cast) -> None:
    """`T` has one spelling: bare PyJWT would take all of these for the same token."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    token = await _token(server, cast)
    at = alphabet.index(token[-1])
    same = [alphabet[at - at % 16 + bits] for bits in range(16)]
    found = {
        last: await server.judged(cast.owner.who, token[:-1] + last, of=cast.client.who)
        for last in same
    }
    assert found.pop(token[-1]) == "OK"
    assert set(found.values()) == {"TOKEN_MALFORMED"}


async def test_empty_token_is_a_fault_of_the_request(server: Running, cast: Cast) -> None:
    refused = await failure(
        server.auth(cast.owner.who).ValidateToken(auth_pb2.ValidateTokenRequest())
    )
    assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("token",))


# --- the caller ---


async def test_bearer_of_a_token_validates_what_its_client_may(server: Running) -> None:
    gateway = await server.member("bearer_gateway", "validate", "watch", validates=["*"])
    token = (await server.token(gateway, "validate")).access_token
    given = (("authorization", f"Bearer {token}"),)
    request = build(
        auth_pb2.ValidateTokenRequest,
        token=token,
        presenter={"certificate_thumbprint": thumbprint(gateway.who)},
    )
    answer = await server.auth(gateway.who).ValidateToken(request, metadata=given)
    assert answer.active
    await server.auth(gateway.who).RevokeToken(auth_pb2.RevokeTokenRequest(token=token))
    call = server.auth(gateway.who).ValidateToken(request, metadata=given)
    refused = await failure(call)
    assert refused.metadata == {"verdict": "TOKEN_REVOKED"}


async def test_entitlement_follows_a_new_owner_at_once(server: Running) -> None:
    member = await server.member("late_owner", "validate")
    await server.resource("https://late.test", "late.read", owner=member.client_id)
    client = await server.member("late_client", "late.read")
    token = (await server.token(client)).access_token
    assert await server.judged(member.who, token, of=client.who) == "OK"


async def test_unknown_key_waits_for_the_poll_that_is_due_and_no_longer(
    server: Running, cast: Cast
) -> None:
    token = await _token(server, cast)
    claims = jwt.decode(token, options={"verify_signature": False})
    key = ec.generate_private_key(ec.SECP256R1())
    forged = jwt.encode(claims, key, "ES256", headers={"kid": "none", "typ": "at+jwt"})
    loop_time = server.clock.boot()
    assert await server.judged(cast.owner.who, forged) == "TOKEN_KEY_UNKNOWN"
    assert server.clock.boot() - loop_time < 4


# --- freshness ---


class _Gone:
    """A feed that can be made to fail."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        if self.gone:
            raise AuthError(Reason.STORE_UNAVAILABLE)
        return getattr(self._feed, name)


async def test_state_that_is_too_old_is_no_answer(tmp_path: Path) -> None:
    """design section 5: past `staleness_max` UNAVAILABLE and NOT_SERVING, and it heals."""
    clock = hand_clock()
    feeds: list[_Gone] = []

    def wrap(store: Store) -> Store:
        feeds.append(_Gone(store.feed))
        feed: Any = feeds[0]
        return replace(store, feed=feed)

    async with running(tmp_path, clock=clock, wrap=wrap) as server:
        owner = await server.member("owner", "validate", "watch")
        await server.resource(ORDERS, "orders.read", owner=owner.client_id)
        await server.resource(
            BILLING, "billing.read", owner=owner.client_id, staleness_max={"seconds": 10}
        )
        client = await server.member("client", "orders.read", "billing.read")
        slow = (await server.token(client, "orders.read")).access_token
        quick = (await server.token(client, "billing.read")).access_token
        watch = server.auth(owner.who).WatchChanges(auth_pb2.WatchChangesRequest())
        await watch.read()
        feeds[0].gone = True

        async def found() -> list[str]:
            calls: list[Any] = [
                server.verdict(owner.who, quick, of=client.who),
                server.verdict(owner.who, slow, of=client.who),
                server.token(client, "orders.read"),
                server.auth(client.who).RevokeToken(
                    auth_pb2.RevokeTokenRequest(token=slow, validate_only=True)
                ),
            ]
            return [await outcome(call) for call in calls]

        assert await found() == ["OK"] * 4
        clock.advance(11)
        assert await found() == ["STATE_STALE", "OK", "OK", "OK"]
        clock.advance(110)
        assert await found() == ["STATE_STALE"] * 4
        refused = await failure(server.verdict(owner.who, slow, of=client.who))
        assert refused.code == "UNAVAILABLE"
        assert float(refused.metadata["age_seconds"]) > 120
        assert refused.retry_after_s == 1.0
        assert await reason(to_the_end(watch)) == "STATE_STALE"
        names = ("", "authsvc.v1.AuthService", "authsvc.v1.ClientService")
        await _until_health(server, names, 2)
        assert (await server.http("/readyz"))[0] == 503
        assert (await server.http("/livez"))[0] == 200
        feeds[0].gone = False
        await _until_health(server, names, 1)
        assert (await server.http("/readyz"))[0] == 200
        assert await found() == ["OK"] * 4


async def _until_health(server: Running, names: tuple[str, ...], status: int) -> None:
    async with asyncio.timeout(20):
        while {await server.health(name) for name in names} != {status}:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_stranger_and_no_scope_are_told_apart_from_not_entitled(
    server: Running, cast: Cast
) -> None:
    token = await _token(server, cast)
    request = auth_pb2.ValidateTokenRequest(token=token)
    stranger = server.auth(identity("stranger")).ValidateToken(request)
    assert await reason(stranger) == "CALLER_UNKNOWN"
    scopeless = server.auth(cast.client.who).ValidateToken(request)
    assert await reason(scopeless) == "INSUFFICIENT_SCOPE"
