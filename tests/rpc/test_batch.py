"""BatchValidateTokens over the wire: many questions, each answered as if it came alone."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from authsvc.errors import AuthError, Reason
from authsvc.rpc.answers import ITEMS_MAX
from authsvc.store.port import Store, StoredToken, TokenStore
from authsvc_client.core.judge import Judge
from authsvc_client.v1 import auth_pb2, error_reason_pb2, resources_pb2
from tests.harness import (
    Member,
    Running,
    build,
    failure,
    hand_clock,
    read_failure,
    running,
    thumbprint,
    until,
)

SIGNED, OPAQUE = "https://signed.test", "https://opaque.test"


@dataclass
class Tokens:
    """Stored tokens whose reads can be held up, or fail."""

    tokens: TokenStore
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    reads: int = 0

    async def add(self, token: StoredToken) -> None:
        await self.tokens.add(token)

    async def find(self, digest: bytes) -> StoredToken | None:
        self.reads += 1
        await self.gate.wait()
        if self.gone:
            raise AuthError(Reason.STORE_UNAVAILABLE)
        return await self.tokens.find(digest)


@dataclass
class Scene:
    """`client` has tokens of SIGNED and OPAQUE, which `owner` owns."""

    server: Running
    client: Member
    owner: Member
    nobody: Member
    tokens: Tokens

    async def token(self, audience: str = SIGNED) -> str:
        return (await self.server.token(self.client, resources=[audience])).access_token

    def asked(self, token: str, **more: Any) -> auth_pb2.ValidateTokenRequest:
        more.setdefault("presenter", {"certificate_thumbprint": thumbprint(self.client.who)})
        return build(auth_pb2.ValidateTokenRequest, token=token, **more)

    async def alone(
        self, request: auth_pb2.ValidateTokenRequest, asker: Member | None = None
    ) -> auth_pb2.BatchValidateTokensResult:
        """What ValidateToken says, as an item of a batch."""
        stub = self.server.auth((asker or self.owner).who)
        try:
            return auth_pb2.BatchValidateTokensResult(verdict=await stub.ValidateToken(request))
        except grpc.aio.AioRpcError as error:
            told = read_failure(error)
            return build(
                auth_pb2.BatchValidateTokensResult,
                error={
                    "code": error.code().value[0],
                    "reason": error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{told.reason}"),
                    "message": error.details() or "",
                },
            )

    async def batch(
        self, *requests: auth_pb2.ValidateTokenRequest, asker: Member | None = None
    ) -> list[auth_pb2.BatchValidateTokensResult]:
        stub = self.server.auth((asker or self.owner).who)
        request = auth_pb2.BatchValidateTokensRequest(requests=requests)
        return list((await stub.BatchValidateTokens(request)).results)


async def _scene(server: Running, tokens: Tokens) -> Scene:
    owner = await server.member("owner", "validate")
    owned: dict[str, Any] = {"owner": owner.client_id, "token_lifetime": {"seconds": 3600}}
    await server.resource(SIGNED, "signed.read", **owned)
    form = resources_pb2.TOKEN_FORMAT_OPAQUE
    await server.resource(OPAQUE, "opaque.read", token_format=form, **owned)
    client = await server.member("client", "signed.read", "opaque.read")
    tokens.gate.set()
    return Scene(server, client, owner, await server.member("nobody", "validate"), tokens)


def _counted(kept: list[Tokens]) -> Any:
    def wrap(store: Store) -> Store:
        kept.append(Tokens(store.tokens))
        return replace(store, tokens=kept[-1])

    return wrap


@pytest_asyncio.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    kept: list[Tokens] = []
    async with running(tmp_path, wrap=_counted(kept), clock=hand_clock()) as server:
        yield await _scene(server, kept[0])


def _told(result: auth_pb2.BatchValidateTokensResult) -> str:
    """OK for an active token, else the reason."""
    if result.WhichOneof("result") == "error":
        return error_reason_pb2.ErrorReason.Name(result.error.reason)
    reason = error_reason_pb2.ErrorReason.Name(result.verdict.reason)
    return "OK" if result.verdict.active else reason


async def _questions(scene: Scene) -> list[auth_pb2.ValidateTokenRequest]:
    """One of each kind that takes another way through the server."""
    signed, opaque, dead = await scene.token(), await scene.token(OPAQUE), await scene.token()
    await scene.server.auth(scene.client.who).RevokeToken(
        auth_pb2.RevokeTokenRequest(token=dead, client_id=scene.client.client_id)
    )
    head = await scene.server.head()
    head_alg, _, rest = signed.partition(".")
    foreign = await scene.server.token(scene.owner, "validate")
    return [
        scene.asked(signed),
        scene.asked(signed, view=auth_pb2.TOKEN_VIEW_CLAIMS),
        scene.asked(signed, view=auth_pb2.TOKEN_VIEW_FULL, audience=SIGNED),
        scene.asked(signed, required_scopes=["signed.write"]),
        scene.asked(signed, required_permissions=["sell"], audience=SIGNED),
        scene.asked(signed, acr_values=["mfa"]),
        scene.asked(signed, presenter={"certificate_thumbprint": "x"}),
        scene.asked(signed, consistency={"strong": {}}),
        scene.asked(signed, consistency={"at_least": head}),
        scene.asked(signed, consistency={"at_least": head + 2**40}),
        scene.asked(signed, audience=OPAQUE),
        scene.asked(opaque),
        scene.asked(opaque, audience=SIGNED),
        scene.asked(dead),
        scene.asked(f"{head_alg}x.{rest}"),
        scene.asked("garbage"),
        scene.asked("x" * 20_000),
        scene.asked(foreign.access_token),
        scene.asked(""),
        scene.asked(signed, required_scopes=["twice", "twice"]),
        scene.asked(signed, acr_values=['"']),
        scene.asked(signed, presenter={"dpop": {"proof": "x"}}),
    ]


@pytest.mark.parametrize("who", ["owner", "nobody"])
async def test_each_is_answered_as_if_it_came_alone(scene: Scene, who: str) -> None:
    asker: Member = getattr(scene, who)
    questions = await _questions(scene)
    alone = [await scene.alone(request, asker) for request in questions]
    if who == "owner":
        assert {_told(result).removeprefix("ERROR_REASON_") for result in alone} >= {
            "OK",
            "INSUFFICIENT_SCOPE",
            "INSUFFICIENT_PERMISSIONS",
            "INSUFFICIENT_USER_AUTHENTICATION",
            "REVISION_UNKNOWN",
            "TOKEN_REVOKED",
            "TOKEN_MALFORMED",
            "FIELD_INVALID",
            "NOT_IMPLEMENTED",
        }
    assert await scene.batch(*questions, asker=asker) == alone
    order = random.Random(7)
    for _ in range(5):
        pairs = order.choices(list(zip(questions, alone, strict=True)), k=100)
        answers = await scene.batch(*(request for request, _ in pairs), asker=asker)
        assert answers == [answer for _, answer in pairs]


async def test_who_asks_for_too_many_or_none_is_refused(scene: Scene) -> None:
    asked = scene.asked(await scene.token())
    assert [_told(one) for one in await scene.batch(*[asked] * ITEMS_MAX)] == ["OK"] * ITEMS_MAX
    for wrong in ([], [asked] * (ITEMS_MAX + 1)):
        refused = await failure(scene.batch(*wrong))
        assert refused.reason == "FIELD_INVALID"
        assert refused.fields == ("requests",)


async def test_field_of_a_newer_contract_is_refused(scene: Scene) -> None:
    stub = scene.server.auth(scene.owner.who)
    newer = auth_pb2.BatchValidateTokensRequest.FromString(
        auth_pb2.BatchValidateTokensRequest(
            requests=[scene.asked(await scene.token())]
        ).SerializeToString()
        + b"\x98\x06\x01"
    )
    assert (await failure(stub.BatchValidateTokens(newer))).reason == "NOT_IMPLEMENTED"


async def test_revocation_is_seen_by_a_batch_that_was_asked_before(scene: Scene) -> None:
    tokens = [await scene.token() for _ in range(10)]
    asked = [scene.asked(token) for token in tokens]
    assert [_told(one) for one in await scene.batch(*asked)] == ["OK"] * 10
    await scene.server.auth(scene.client.who).RevokeToken(
        auth_pb2.RevokeTokenRequest(token=tokens[3], client_id=scene.client.client_id)
    )
    told = [_told(one) for one in await scene.batch(*asked)]
    assert told == ["OK"] * 3 + ["ERROR_REASON_TOKEN_REVOKED"] + ["OK"] * 6


async def test_what_one_waits_for_is_shared_and_its_failure_is_its_own(scene: Scene) -> None:
    signed, opaque, lost = await scene.token(), await scene.token(OPAQUE), await scene.token(OPAQUE)
    scene.tokens.gate.clear()
    batch = asyncio.create_task(
        scene.batch(*[scene.asked(token) for token in (opaque, signed, lost, opaque)])
    )
    await until(lambda: scene.tokens.reads == 2)  # of all that wait, at once, and of each once
    assert _told(await scene.alone(scene.asked(signed))) == "OK"
    scene.tokens.gone = True
    scene.tokens.gate.set()
    told = [_told(one) for one in await batch]
    unavailable = "ERROR_REASON_STORE_UNAVAILABLE"
    assert told == [unavailable, "OK", unavailable, unavailable]
    scene.tokens.gone = False
    assert _told((await scene.batch(scene.asked(lost)))[0]) == "OK"


async def test_stale_state_is_told_of_each(scene: Scene) -> None:
    asked = scene.asked(await scene.token())
    scene.server.app.state.confirmed = -1e9
    for one in await scene.batch(asked, asked):
        assert _told(one) == "ERROR_REASON_STATE_STALE"
        assert one.error.code == grpc.StatusCode.UNAVAILABLE.value[0]


async def test_fault_of_one_is_an_incident_of_its_own(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = await scene.token(), await scene.token()
    judge = Judge.__call__

    def fail(self: Judge, token: str, *more: Any) -> Any:
        if token == bad:
            raise RuntimeError("secret text")
        return judge(self, token, *more)

    monkeypatch.setattr(Judge, "__call__", fail)
    first, second = await scene.batch(scene.asked(good), scene.asked(bad))
    assert _told(first) == "OK"
    assert _told(second) == "ERROR_REASON_INTERNAL"
    assert "secret" not in str(second)
