"""The blocking client against the server itself: a real process, real certificates, threads."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import pytest
from cryptography import x509
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.wrappers_pb2 import StringValue

from authsvc.rpc.peer import x5t_s256
from authsvc_client import (
    AuthsvcError,
    Certificates,
    PermissionDenied,
    Reason,
    SyncAuthsvcClient,
    SyncRequireInterceptor,
    SyncTokenSource,
    TokenUnavailable,
    Unavailable,
    caller,
    sync_channel,
)
from authsvc_client.v1.annotations_pb2 import require
from tests.clocks import HandClock
from tests.test_cli import ANY_PORTS, RESOURCE, Running, Shell, serving

THREADS: Final = 16
WAIT_S: Final = 30.0
SCOPE: Final = "bills.read"
KINDS: Final = {
    "Get": ("unary_unary", grpc.unary_unary_rpc_method_handler),
    "List": ("unary_stream", grpc.unary_stream_rpc_method_handler),
    "Put": ("stream_unary", grpc.stream_unary_rpc_method_handler),
    "Chat": ("stream_stream", grpc.stream_stream_rpc_method_handler),
}
T = TypeVar("T")


# --- a service of the kind that people write, and its caller ---


def _bills() -> ServiceDescriptor:
    """As if it had been compiled."""
    file = descriptor_pb2.FileDescriptorProto(
        name="test_sync_client/bills.proto",
        package="test_sync_client",
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto", "authsvc/v1/annotations.proto"],
    )
    service = file.service.add(name="Bills")
    for name, (kind, _) in KINDS.items():
        method = service.method.add(
            name=name,
            input_type=".google.protobuf.StringValue",
            output_type=".google.protobuf.StringValue",
            client_streaming=kind.startswith("stream"),
            server_streaming=kind.endswith("stream"),
        )
        rule = method.options.Extensions[require]
        rule.scopes.append(SCOPE)
        rule.mtls = True
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    found: ServiceDescriptor = pool.FindServiceByName("test_sync_client.Bills")
    return found


BILLS: Final = _bills()


def _told() -> StringValue:
    return StringValue(value=f"{caller().client_id} {caller().jti}")


def _one(request: Any, _: Any) -> StringValue:
    if not isinstance(request, StringValue):
        assert [item.value for item in request] == ["a", "b"]
    return _told()


def _many(request: Any, context: Any) -> Iterator[StringValue]:
    yield _one(request, context)
    yield _told()


@contextmanager
def _billing(interceptor: SyncRequireInterceptor, certificates: Certificates) -> Iterator[str]:
    behaviours = {"Get": _one, "List": _many, "Put": _one, "Chat": _many}
    handlers = {
        name: make(
            behaviours[name],
            request_deserializer=StringValue.FromString,
            response_serializer=StringValue.SerializeToString,
        )
        for name, (_, make) in KINDS.items()
    }
    generic = grpc.method_handlers_generic_handler(BILLS.full_name, handlers)
    with ThreadPoolExecutor(THREADS) as pool:
        server = grpc.server(pool, [generic], [interceptor])
        port = server.add_secure_port("localhost:0", certificates.server_credentials())
        server.start()
        try:
            yield f"localhost:{port}"
        finally:
            server.stop(None).wait()


def _ask(opened: grpc.Channel, name: str) -> set[str]:
    """What a method answers: who called, with which token."""
    kind, _ = KINDS[name]
    method = getattr(opened, kind)(
        f"/{BILLS.full_name}/{name}",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )
    streams = kind.startswith("stream")
    sent = iter([StringValue(value="a"), StringValue(value="b")]) if streams else StringValue()
    answer = method(sent, timeout=WAIT_S)
    return {it.value for it in (answer if kind.endswith("stream") else [answer])}


def _at_once(work: Callable[[int], T]) -> list[T]:
    barrier = threading.Barrier(THREADS, timeout=WAIT_S)

    def begin(number: int) -> T:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


# --- the server, and two clients of it ---


@dataclass(frozen=True)
class Site:
    """A server, and two clients of it with certificates of their own."""

    shell: Shell
    running: Running
    orders_id: str
    orders: Certificates
    billing: Certificates

    def client(self, who: Certificates) -> SyncAuthsvcClient:
        return SyncAuthsvcClient(sync_channel(self.shell.address, who))

    @contextmanager
    def source(self, **settings: Any) -> Iterator[SyncTokenSource]:
        with (
            self.client(self.orders) as client,
            client.token_source(self.orders_id, [SCOPE], [RESOURCE], **settings) as source,
        ):
            yield source
        assert [it.name for it in threading.enumerate() if it.name.startswith("authsvc-")] == []

    @contextmanager
    def opened(self, source: SyncTokenSource) -> Iterator[grpc.Channel]:
        """A channel of orders to a billing that asks this server about its callers."""
        with self.client(self.billing) as validator:
            guard = SyncRequireInterceptor(validator, audience=RESOURCE, services=[BILLS])
            with (
                _billing(guard, self.billing) as target,
                sync_channel(
                    target, self.orders, token_source=source, server_name="billing.test"
                ) as opened,
            ):
                yield opened


@contextmanager
def _site(home: Path) -> Iterator[Site]:
    shell = Shell(home)
    with serving(shell, *ANY_PORTS) as running:
        shell.address = running.ready()["address"]
        billing = _admit(shell, "billing", "validate", "--server", "--dns", "billing.test")
        shell.json("resource", "create", RESOURCE, "--owner", billing, "--scope", f"{SCOPE}=Reads")
        orders = _admit(shell, "orders", SCOPE)
        yield Site(shell, running, orders, _read(shell, "orders"), _read(shell, "billing"))


def _admit(shell: Shell, name: str, scope: str, *more: str) -> str:
    shell("pki", "issue", name, *more)
    uri = f"spiffe://authsvc.local/{name}"
    register = ("client", "register", "--name", name, "--san-uri", uri, "--scope", scope)
    client_id = shell(*register, "--quiet").strip()
    shell("client", "approve", client_id)
    return client_id


def _read(shell: Shell, name: str) -> Certificates:
    pki = shell.state_dir / "pki"
    return Certificates.from_files(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}-key.pem")


def _life_s(source: SyncTokenSource) -> float:
    token = source._plan.token
    assert token is not None
    return token.lifetime_s


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with _site(tmp_path_factory.mktemp("blocking")) as made:
        yield made


def test_token_is_issued_judged_and_revoked(site: Site) -> None:
    with site.client(site.orders) as orders, site.client(site.billing) as billing:
        token = orders.issue_client_credentials(site.orders_id, [SCOPE], [RESOURCE])
        assert (token.scopes, token.audiences) == ((SCOPE,), (RESOURCE,))
        presented = x5t_s256(x509.load_pem_x509_certificate(site.orders.certificate))
        asked: Any = {"audience": RESOURCE, "thumbprint": presented, "require_bound": True}
        found = billing.validate(token.value, scopes=[SCOPE], **asked)
        assert found.active
        assert found.claims is not None
        assert (found.claims.client_id, found.claims.jti) == (site.orders_id, token.jti)
        missing = billing.validate(token.value, scopes=["bills.pay"], **asked)
        assert missing.reason is Reason.INSUFFICIENT_SCOPE
        assert orders.revoke(token.value) > 0
        assert billing.validate(token.value, **asked).reason is Reason.TOKEN_REVOKED
        assert {key["kty"] for key in billing.keys().keys} <= {"EC", "OKP", "RSA"}


def test_refusals_are_typed(site: Site) -> None:
    with site.client(site.orders) as orders:
        with pytest.raises(PermissionDenied):
            orders.revoke_jti("x" * 22)
        refusals: tuple[Callable[[], object], ...] = (
            lambda: orders.issue_client_credentials("nobody"),
            lambda: orders.exchange(site.orders_id, "no token", [SCOPE], [RESOURCE]),
            lambda: orders.refresh(site.orders_id, "no refresh token"),
        )
        for refused in refusals:
            with pytest.raises(AuthsvcError) as caught:
                refused()
            assert caught.value.reason is not Reason.UNSPECIFIED
            assert caught.value.request_id


@pytest.mark.parametrize("name", KINDS)
def test_threads_share_a_token_through_both_interceptors(site: Site, name: str) -> None:
    with site.source() as source, site.opened(source) as opened:
        answers = _at_once(lambda _: _ask(opened, name))
    (who,) = set.union(*answers)
    assert who.startswith(f"{site.orders_id} ")


def test_revoked_token_is_replaced_and_the_call_sent_once_more(site: Site) -> None:
    with (
        site.client(site.orders) as orders,
        site.source() as source,
        site.opened(source) as opened,
    ):
        first = _ask(opened, "Get")
        orders.revoke(source.token())
        answers = _at_once(lambda _: _ask(opened, "Get"))
        (second,) = set.union(*answers)
        assert {second} != first


@pytest.mark.parametrize("name", ["List", "Put", "Chat"])
def test_stream_of_a_revoked_token_fails_and_the_next_one_passes(site: Site, name: str) -> None:
    with (
        site.client(site.orders) as orders,
        site.source() as source,
        site.opened(source) as opened,
    ):
        _ask(opened, name)
        token = source.token()
        orders.revoke(token)
        with pytest.raises(grpc.RpcError) as caught:
            _ask(opened, name)
        if AuthsvcError.from_rpc_error(caught.value).reason is not Reason.TOKEN_REVOKED:
            assert name != "List"
            source.invalidate(token)  # grpc#36066: the refusal of who still writes may be lost
        assert len(_ask(opened, name)) == 1


def test_token_is_renewed_ahead_of_its_end(site: Site) -> None:
    clock = HandClock()
    with site.source(now=clock.boot, draw=lambda: 0.0) as source, site.opened(source) as opened:
        first = source.token()
        clock.advance(_life_s(source) * 0.6)
        assert source.token() == first
        flight = source._flight
        assert flight is not None
        flight.join(WAIT_S)
        assert source.token() != first
        assert len(_ask(opened, "Get")) == 1


def test_server_that_went_away_ends_no_live_token_and_lets_nobody_in(tmp_path: Path) -> None:
    clock = HandClock()
    with (
        _site(tmp_path) as site,
        site.source(now=clock.boot, draw=lambda: 0.0) as source,
        site.opened(source) as opened,
    ):
        _ask(opened, "Get")
        first = source.token()
        site.running.process.kill()
        site.running.process.wait()
        clock.advance(_life_s(source) * 0.6)
        assert source.token() == first
        with pytest.raises(grpc.RpcError) as caught:
            _ask(opened, "Get")
        error = AuthsvcError.from_rpc_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.STATE_STALE)
        assert isinstance(error, Unavailable)
        clock.advance(_life_s(source))
        with pytest.raises(TokenUnavailable):
            source.token()
