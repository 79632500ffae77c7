"""The local validators against a real server: what they answer, how soon, and when it is gone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from authsvc_client import (
    CLOSED,
    REMOTE,
    AuthsvcClient,
    LocalValidator,
    Reason,
    SyncAuthsvcClient,
    SyncLocalValidator,
    Unavailable,
    WhenStale,
    open_for,
)
from authsvc_client.clock import boot
from authsvc_client.core.step_up import StepUp
from authsvc_client.v1 import (
    auth_pb2,
    keys_pb2,
    resources_pb2,
    revocations_pb2,
    revocations_pb2_grpc,
)
from authsvc_client.validator import Local
from tests.harness import (
    ADMIN,
    CA,
    ISSUER,
    Member,
    Running,
    connect,
    running,
    start,
    thumbprint,
    until,
)

API, OTHER, OPAQUE = "https://api.test", "https://other.test", "https://opaque.test"


class Shifted:
    """The clock of a validator that can be moved ahead of the server's."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def __call__(self) -> float:
        return boot() + self.by_s


@dataclass
class Scene:
    """`client` has tokens of all resources, `service` owns them and validates."""

    server: Running
    client: Member
    service: Member
    clock: Shifted = field(default_factory=Shifted)

    async def token(self, audience: str = API, *scopes: str) -> str:
        return (await self.server.token(self.client, *scopes, resources=[audience])).access_token

    async def revoke(self, token: str) -> int:
        request = auth_pb2.RevokeTokenRequest(token=token, client_id=self.client.client_id)
        return (await self.server.auth(self.client.who).RevokeToken(request)).revision

    def asked(self, **more: Any) -> dict[str, Any]:
        return {"audience": API, "thumbprint": thumbprint(self.client.who)} | more

    @asynccontextmanager
    async def validator(self, port: int = 0, **settings: Any) -> AsyncIterator[LocalValidator]:
        channel = connect(port or self.server.app.port, self.service.who)
        async with (
            AuthsvcClient(channel) as client,
            LocalValidator(client, issuer=ISSUER, now=self.clock, **settings) as made,
        ):
            await made.ready()
            yield made


async def _scene(server: Running) -> Scene:
    service = await server.member("service", "validate", "watch")
    owned = {"owner": service.client_id}
    await server.resource(API, "read", "write", **owned)
    await server.resource(OTHER, "other.read", **owned)
    form = resources_pb2.TOKEN_FORMAT_OPAQUE
    await server.resource(OPAQUE, "opaque.read", token_format=form, **owned)
    client = await server.member("client", "read", "write", "other.read", "opaque.read")
    return Scene(server, client, service)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with running(tmp_path) as server:
        yield await _scene(server)


async def test_it_answers_as_the_server_does(scene: Scene) -> None:
    live, dead = await scene.token(API, "read"), await scene.token()
    await scene.revoke(dead)
    other, opaque = await scene.token(OTHER), await scene.token(OPAQUE)
    header, payload, signature = live.split(".")
    tokens = [
        live,
        dead,
        other,
        opaque,
        f"{header}.{payload}.{other.rpartition('.')[2]}",
        f"{header}.{payload}x.{signature}",
        live + "==",
        "garbage",
        "a.b.c.d.e",
        "asvc_at_" + "x" * 49,
    ]
    questions: list[dict[str, Any]] = [
        {},
        {"scopes": frozenset({"read"})},
        {"scopes": frozenset({"write"})},
        {"thumbprint": ""},
        {"thumbprint": "x"},
        {"require_bound": True},
        {"audience": OTHER},
        {"audience": OPAQUE},
        {"permissions": frozenset({"sell"})},
        {"step_up": StepUp(("mfa",), 10)},
    ]
    async with (
        AuthsvcClient(connect(scene.server.app.port, scene.service.who)) as client,
        scene.validator() as local,
    ):
        seen = set()
        for token in tokens:
            for question in questions:
                asked = scene.asked(**question)
                there = await client.validate(token, **asked)
                here = await local.validate(token, **asked)
                told = (here.active, here.reason, here.missing_scopes, here.missing_permissions)
                assert told == (
                    there.active,
                    there.reason,
                    there.missing_scopes,
                    there.missing_permissions,
                ), (token, question)
                if there.active:
                    assert here.claims == there.claims
                seen.add(here.reason)
        assert seen >= {
            Reason.UNSPECIFIED,
            Reason.TOKEN_REVOKED,
            Reason.TOKEN_MALFORMED,
            Reason.TOKEN_SIGNATURE_INVALID,
            Reason.TOKEN_AUDIENCE_WRONG,
            Reason.INSUFFICIENT_SCOPE,
            Reason.INSUFFICIENT_PERMISSIONS,
            Reason.INSUFFICIENT_USER_AUTHENTICATION,
            Reason.PROOF_MISSING,
            Reason.PROOF_MISMATCH,
        }


async def test_a_jwt_costs_no_call(scene: Scene) -> None:
    token = await scene.token()
    async with scene.validator() as local:
        before = scene.server.app.metrics.calls.labels("authsvc.v1.AuthService.ValidateToken", "OK")
        count = before.value
        for _ in range(100):
            assert (await local.validate(token, **scene.asked())).active
        assert not (await local.validate("garbage", **scene.asked())).active
        assert before.value == count
        assert (local.counts.local, local.counts.remote) == (101, 0)
        assert (
            await local.validate(await scene.token(OPAQUE), **scene.asked(audience=OPAQUE))
        ).active
        assert local.counts.remote == 1


async def test_audience_is_required(scene: Scene) -> None:
    async with scene.validator() as local:
        with pytest.raises(ValueError, match="audience"):
            await local.validate(await scene.token(), audience="")
        with pytest.raises(ValueError, match="audience"):
            await local.validate(await scene.token(OPAQUE), audience="")
        for bound in (4.0, 601.0):
            with pytest.raises(ValueError, match="staleness_max_s"):
                LocalValidator(local._client, issuer=ISSUER, staleness_max_s=bound)


async def _every_revocation(scene: Scene, token: str) -> None:
    channel = scene.server.channel(ADMIN)
    stub = revocations_pb2_grpc.RevocationServiceStub(channel)
    await stub.RevokeClient(revocations_pb2.RevokeClientRequest(client_id=scene.client.client_id))


async def _suspend(scene: Scene, token: str) -> None:
    await scene.server.suspend(scene.client.client_id)


async def _revoke(scene: Scene, token: str) -> None:
    await scene.revoke(token)


async def _everything(scene: Scene, token: str) -> None:
    stub = revocations_pb2_grpc.RevocationServiceStub(scene.server.channel(ADMIN))
    await stub.RevokeEverything(revocations_pb2.RevokeEverythingRequest())


@pytest.mark.parametrize(
    ("kill", "reason"),
    [
        (_revoke, Reason.TOKEN_REVOKED),
        (_every_revocation, Reason.TOKEN_CUT_OFF),
        (_suspend, Reason.TOKEN_CUT_OFF),
        (_everything, Reason.TOKEN_CUT_OFF),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_kills_a_token_kills_it_here(
    scene: Scene, kill: Callable[[Scene, str], Any], reason: Reason
) -> None:
    token = await scene.token()
    async with scene.validator() as local:
        assert (await local.validate(token, **scene.asked())).active
        await kill(scene, token)
        head = await scene.server.head()
        await until(lambda: local.revision >= head)
        assert (await local.validate(token, **scene.asked())).reason is reason
    async with scene.validator() as late:  # from the snapshot
        assert (await late.validate(token, **scene.asked())).reason is reason


async def test_token_by_a_new_key_is_taken_at_once(scene: Scene) -> None:
    async with scene.validator() as local:
        keys = scene.server.keys()
        await keys.PrepareSigningKey(keys_pb2.PrepareSigningKeyRequest())
        listed = (await keys.ListSigningKeys(keys_pb2.ListSigningKeysRequest())).signing_keys
        current = next(k.kid for k in listed if k.state == keys_pb2.SIGNING_KEY_STATE_CURRENT)
        old = await scene.token()
        await keys.TaintSigningKey(keys_pb2.TaintSigningKeyRequest(kid=current))
        token = await scene.token()
        assert (await local.validate(token, **scene.asked())).active
        await until(lambda: local.revision >= scene.server.app.state.revision)
        assert (await local.validate(old, **scene.asked())).reason is Reason.TOKEN_KEY_TAINTED


async def test_outage_is_survived_within_the_bound_and_then_by_policy(
    tmp_path: Path, scene: Scene
) -> None:
    live, dead = await scene.token(), await scene.token()
    await scene.revoke(dead)
    settings: dict[str, WhenStale] = {
        "closed": CLOSED,
        "open": open_for(600),
        "short": open_for(130),
        "remote": REMOTE,
    }
    async with scene.validator() as local:
        await until(lambda: local.revision >= scene.server.app.state.revision)
        await scene.server.app._rpc.stop(0)
        scene.clock.by_s = 100.0
        assert (await local.validate(live, **scene.asked())).active
        assert not (await local.validate(dead, **scene.asked())).active
        scene.clock.by_s = 140.0
        for name, then in settings.items():
            if name == "open":
                verdict = await local.validate(live, **scene.asked(when_stale=then))
                assert verdict.active
                verdict = await local.validate(dead, **scene.asked(when_stale=then))
                assert verdict.reason is Reason.TOKEN_REVOKED
            else:
                with pytest.raises(Unavailable):
                    await local.validate(live, **scene.asked(when_stale=then))
        assert local.counts.opened == 2
        assert local.counts.refused == 2
        assert local.counts.remote == 1
        scene.clock.by_s = 340.0  # no open door outlives a token
        verdict = await local.validate(live, **scene.asked(when_stale=open_for(3600)))
        assert verdict.reason is Reason.TOKEN_EXPIRED


async def test_stale_state_is_asked_for_remotely_where_the_policy_says_so(scene: Scene) -> None:
    live, dead = await scene.token(), await scene.token()
    await scene.revoke(dead)
    async with scene.validator(when_stale=REMOTE) as local:
        await local.close()  # the stream is gone, authsvc is not
        scene.clock.by_s = 140.0
        assert (await local.validate(live, **scene.asked())).active
        assert not (await local.validate(dead, **scene.asked())).active
        assert local.counts.remote == 2


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted bug"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_what_authsvc_refused_as_revoked_is_not_accepted_by_an_older_state(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, kind: str, *, planted: bool
) -> None:
    if planted:
        monkeypatch.setattr(Local, "told", lambda _local, _token, reason: reason)
    token = await scene.token()

    async def refused_once(validate: Callable[..., Any]) -> None:
        """By a validator whose stream has ended before the token was revoked."""
        assert (await validate(token)).active
        await scene.revoke(token)
        assert (await validate(token)).active  # as it was told last
        scene.clock.by_s = 140.0
        assert (await validate(token)).reason is Reason.TOKEN_REVOKED
        scene.clock.by_s = 0.0
        assert (await validate(token)).active is planted

    async with scene.validator(when_stale=REMOTE) as local:
        await local.close()
        if kind == "async":
            await refused_once(lambda token: local.validate(token, **scene.asked()))
    if kind == "sync":
        who, port = scene.service.who, scene.server.app.port
        credentials = grpc.ssl_channel_credentials(CA.pem, who.key_pem, who.pem)
        with (
            SyncAuthsvcClient(grpc.secure_channel(f"localhost:{port}", credentials)) as client,
            SyncLocalValidator(
                client, issuer=ISSUER, when_stale=REMOTE, now=scene.clock
            ) as blocking,
        ):
            await asyncio.to_thread(blocking.ready, 30)
            await asyncio.to_thread(blocking.close)
            await refused_once(
                lambda token: asyncio.to_thread(blocking.validate, token, **scene.asked())
            )


async def test_what_only_authsvc_can_tell_it_is_asked_whatever_the_age_of_the_state(
    scene: Scene,
) -> None:
    opaque = await scene.token(OPAQUE)
    async with scene.validator() as local:
        await local.close()
        scene.clock.by_s = 140.0
        assert (await local.validate(opaque, **scene.asked(audience=OPAQUE))).active
        for token in ("a.b.c.d.e", "asvc_at_" + "x" * 49):
            verdict = await local.validate(token, **scene.asked())
            assert verdict.reason is Reason.TOKEN_MALFORMED
        with pytest.raises(Unavailable):
            await local.validate("garbage", **scene.asked())
        assert (local.counts.local, local.counts.remote, local.counts.refused) == (0, 3, 1)


async def test_server_that_comes_back_is_found_and_nothing_dead_comes_alive(
    tmp_path: Path,
) -> None:
    server = await start(tmp_path)
    scene = await _scene(server)
    live, dead = await scene.token(), await scene.token()
    port = server.app.port
    async with scene.validator() as local:
        await scene.revoke(dead)
        head = await server.head()
        await until(lambda: local.revision >= head)
        await server.close()
        assert (await local.validate(live, **scene.asked())).active
        assert not (await local.validate(dead, **scene.asked())).active
        again = await start(tmp_path)
        # A port of its own: the channel goes on asking for the old one, so it is proxied there.
        async with _forwarded(port, again.app.port):
            scene.server = again
            await scene.revoke(live)
            head = await again.head()
            await until(lambda: local.revision >= head)
            assert (await local.validate(live, **scene.asked())).reason is Reason.TOKEN_REVOKED
            assert not (await local.validate(dead, **scene.asked())).active
            assert local.age_s() < 30
        await again.close()


@asynccontextmanager
async def _forwarded(port: int, to: int) -> AsyncIterator[None]:
    """Bytes that come to one port go to another."""
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while raw := await reader.read(65536):
                writer.write(raw)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", to)
        for pair in ((reader, back), (there, writer)):
            task = asyncio.create_task(pump(*pair))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, "127.0.0.1", port)
    try:
        yield
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_sync_validator_judges_for_many_threads(scene: Scene) -> None:
    tokens = [await scene.token() for _ in range(20)]
    dead = tokens[::2]
    who = scene.service.who
    port = scene.server.app.port
    judged: list[tuple[str, bool]] = []
    lock = threading.Lock()
    revoked, done = threading.Event(), threading.Event()
    ready = threading.Event()

    def work(local: SyncLocalValidator) -> None:
        while not done.is_set():
            after = revoked.is_set()
            for token in tokens:
                active = local.validate(token, **scene.asked()).active
                if after:
                    with lock:
                        judged.append((token, active))

    def serve() -> None:
        credentials = grpc.ssl_channel_credentials(CA.pem, who.key_pem, who.pem)
        channel = grpc.secure_channel(f"localhost:{port}", credentials)
        with (
            SyncAuthsvcClient(channel) as client,
            SyncLocalValidator(client, issuer=ISSUER) as local,
        ):
            local.ready(30)
            assert all(local.validate(token, **scene.asked()).active for token in tokens)
            threads = [threading.Thread(target=work, args=(local,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            ready.set()
            while local.revision < head[0]:
                done.wait(0.01)
            revoked.set()
            while True:
                with lock:
                    if len(judged) > 2000:
                        break
                done.wait(0.01)
            done.set()
            for thread in threads:
                thread.join()
            assert local.counts.remote == 0

    head = [2**62]
    served = asyncio.create_task(asyncio.to_thread(serve))
    await until(lambda: ready.is_set() or served.done())
    for token in dead:
        await scene.revoke(token)
    head[0] = await scene.server.head()
    await served
    assert {token for token, active in judged if active} == set(tokens) - set(dead)
    assert not [t for t in threading.enumerate() if t.name.startswith("authsvc-")]
