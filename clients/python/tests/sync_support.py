"""What the blocking half is tested against: servers with threads, and an authsvc behind one."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import AuthsvcError, Certificates, Reason, SyncAuthsvcClient, sync_channel
from authsvc_client.errors import error_trailers
from authsvc_client.v1 import auth_pb2

from .support import FakeAuthService, stub_of

WAIT_S = 10.0
T = TypeVar("T")
THREADS = 16
KINDS = ("Get", "List", "Put", "Chat")


@contextmanager
def serving(
    certificates: Certificates | None,
    *handlers: grpc.GenericRpcHandler,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    threads: int = THREADS,
) -> Iterator[str]:
    """A server on a port of its own, without TLS where there are no certificates."""
    limit = [("grpc.max_metadata_size", 64 * 1024)]
    with ThreadPoolExecutor(threads) as pool:
        server = grpc.server(pool, [*handlers], [*interceptors], limit)
        if certificates is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", certificates.server_credentials())
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def fail(
    context: Any, code: grpc.StatusCode, reason: Reason, text: str = "no", **metadata: str
) -> None:
    context.set_trailing_metadata(error_trailers(code, text, reason, metadata))
    context.abort(code, text)


# --- an authsvc that answers what a test wants ---------------------------------------------------


class BlockingAuthService:
    """The answers of FakeAuthService, from threads."""

    def __init__(self) -> None:
        self.fake = FakeAuthService()
        self.before: Callable[[Any, Any], None] | None = None
        """Runs before every answer; may abort."""
        self._lock = threading.Lock()

    def handlers(self) -> grpc.GenericRpcHandler:
        service = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]
        made = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(self._serve, name),
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for name, method in service.methods_by_name.items()
        }
        return grpc.method_handlers_generic_handler(service.full_name, made)

    def _serve(self, name: str, request: Any, context: Any) -> Any:
        if self.before is not None:
            self.before(request, context)
        with self._lock, pytest.raises(StopIteration) as done:
            getattr(self.fake, name)(request, context).send(None)  # it awaits nothing
        return done.value.value


@dataclass
class SyncAuthsvc:
    """A running one, and a client of it."""

    service: BlockingAuthService
    target: str
    client: SyncAuthsvcClient
    certificates: Certificates

    @property
    def fake(self) -> FakeAuthService:
        return self.service.fake


@contextmanager
def running_authsvc(server: Certificates, client: Certificates) -> Iterator[SyncAuthsvc]:
    service = BlockingAuthService()
    with (
        serving(server, service.handlers()) as target,
        SyncAuthsvcClient(sync_channel(target, client)) as authsvc,
    ):
        yield SyncAuthsvc(service, target, authsvc, client)


# --- calls ---------------------------------------------------------------------------------------


def one(request: Any, _: Any) -> StringValue:
    if isinstance(request, StringValue):
        return request
    return StringValue(value="".join(item.value for item in request))


def many(request: Any, _: Any) -> Iterator[StringValue]:
    yield from (request,) if isinstance(request, StringValue) else request


BEHAVIOURS: dict[str, Any] = {"Get": one, "List": many, "Put": one, "Chat": many}


def call(opened: Any, service: ServiceDescriptor, name: str, **kw: Any) -> str:
    """Calls a method of any kind with `hello`; what it answered, joined."""
    method = stub_of(opened, service, name)
    streams = name.startswith(("Put", "Chat"))
    sent = iter([StringValue(value="hel"), StringValue(value="lo")])
    answer = method(sent if streams else StringValue(value="hello"), **kw)
    if name.startswith(("Get", "Put")):
        return str(answer.value)
    return "".join(response.value for response in answer)


def refused(opened: Any, service: ServiceDescriptor, name: str, **kw: Any) -> AuthsvcError:
    """The error that a call of any kind fails with. Streams send nothing and stay open, see
    support.refused."""
    method = stub_of(opened, service, name)
    ended = threading.Event()

    def nothing() -> Iterator[StringValue]:
        ended.wait(WAIT_S)
        yield from ()

    sent = nothing() if name.startswith(("Put", "Chat")) else StringValue()
    read = list if name.startswith(("List", "Chat")) else str
    try:
        with pytest.raises(grpc.RpcError) as caught:
            read(method(sent, **kw))
    finally:
        ended.set()
    return AuthsvcError.from_rpc_error(caught.value)


# --- threads -------------------------------------------------------------------------------------


@dataclass
class Gate:
    """Something that waits until a test opens it, and says that it waits."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_S)


def at_once(work: Callable[[int], T], count: int = THREADS) -> list[T]:
    """What `count` threads answer that begin together."""
    barrier = threading.Barrier(count, timeout=WAIT_S)

    def begin(number: int) -> T:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def own_threads() -> list[str]:
    """Those that this package started and that still run."""
    return [it.name for it in threading.enumerate() if it.name.startswith("authsvc-")]


def until(done: Callable[[], object]) -> None:
    """Polls until something holds that says nothing when it comes to."""
    pause, waited = threading.Event(), 0
    while not done():
        waited += 1
        assert waited < WAIT_S / 0.002
        pause.wait(0.002)
