"""The child process: authsvc itself, or the floor. Serves until its standard input ends."""

import asyncio
import base64
import json
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import Message
from pydantic import SecretStr
from sqlalchemy import Engine, event

from authsvc.acting import act
from authsvc.app import open_app, settle
from authsvc.config import Database, Grants, Listen, Passwords, Redis, load
from authsvc.rpc.server import OPTIONS
from authsvc.rpc.tls import ServerTls
from authsvc.telemetry import configure_logs
from authsvc_client.v1 import auth_pb2

from .processes import pin

SERVICE = "authsvc.v1.AuthService"
BARE_OPERATIONS = 200

_ecdsa = ec.ECDSA(hashes.SHA256())
_private = ec.generate_private_key(ec.SECP256R1())
_public = _private.public_key()
_message = bytes(400)  # as long as a token
_signature = _private.sign(_message, _ecdsa)

BARE: dict[str, Callable[[], object]] = {
    "sign": lambda: _private.sign(_message, _ecdsa),
    "verify": lambda: _public.verify(_signature, _message, _ecdsa),
}


class Statements:
    """Counts those that run for calls that change nothing: what changes something says so for the
    audit, and what authsvc does by itself runs in tasks that have names."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        """One is about to run."""
        task = asyncio.current_task()
        is_nameless = task is None or task.get_name().startswith("Task-")
        self.count += is_nameless and not act().action


_statements = Statements()


class Pauses:
    """The longest that the loop was held up at a time, in CPU seconds, from the first question."""

    def __init__(self) -> None:
        self._run: Callable[[asyncio.Handle], None] | None = None
        self._longest_s = 0.0

    def __call__(self) -> float:
        """Since the question before it."""
        if self._run is None:
            self._run = run = asyncio.Handle._run  # noqa: SLF001 - what the loop does passes there

            def timed(handle: asyncio.Handle) -> None:
                started = time.thread_time()
                run(handle)
                self._longest_s = max(self._longest_s, time.thread_time() - started)

            asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]  # noqa: SLF001
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s


_pauses = Pauses()


def answer(question: str) -> float:
    """What the parent asks over standard input."""
    started = time.process_time()
    if question == "cpu":
        return started
    if question == "statements":
        return _statements.count
    if question == "pause":
        return _pauses()
    if question == "rss":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if question == "peak":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(BARE_OPERATIONS):
        BARE[question]()
    return (time.process_time() - started) / BARE_OPERATIONS


async def until_told(port: int) -> None:
    """Says where it serves, answers, and returns when the parent is gone."""
    settle()
    print(port, flush=True)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(repr(answer(line.decode().strip())), flush=True)


async def authsvc(state_dir: str, database: str, redis: str, *, cheap_passwords: bool) -> None:
    """The whole server, on SQLite where no database is given, with a PKI of its own."""
    configure_logs("error", once=True)  # that the password grant is on is a warning
    event.listen(Engine, "before_cursor_execute", _statements)
    given: dict[str, Any] = {
        "listen": Listen(port=0, metrics_port=0, health_port=0),
        "grants": Grants(password=True),
    }
    if cheap_passwords:
        given["passwords"] = Passwords(memory_kib=64, passes=1)
    if database:
        given["database"] = Database(url=SecretStr(database))
    if redis:
        given["redis"] = Redis(url=SecretStr(redis))
    app = await open_app(load(state_dir=Path(state_dir), **given))
    settle()
    await app.start()
    try:
        await until_told(app.port)
    finally:
        await app.stop()


async def floor(pki: str, answers: dict[str, dict[str, Any]]) -> None:
    """Empty handlers: the same messages, options and TLS."""
    directory = Path(pki)
    tls = ServerTls(directory / "server.pem", directory / "server-key.pem", directory / "ca.pem")
    server = grpc.aio.server(options=OPTIONS)
    handlers = {method: empty_handler(**settings) for method, settings in answers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", tls.credentials())
    await server.start()
    try:
        await until_told(port)
    finally:
        await server.stop(None)


def empty_handler(request: str, response: str, *, signs: bool) -> "grpc.RpcMethodHandler[Any, Any]":
    """Decodes the request, encodes a fixed answer; in between nothing, or one signature."""
    decode = getattr(auth_pb2, request)
    kind = getattr(auth_pb2, request.removesuffix("Request") + "Response")
    fixed: Message = kind.FromString(base64.b64decode(response))

    async def empty(_request: Message, _context: object) -> Message:
        return fixed

    async def signing(_request: Message, _context: object) -> Message:
        BARE["sign"]()
        return fixed

    behaviour: Callable[[Message, object], Awaitable[Message]] = signing if signs else empty
    return grpc.unary_unary_rpc_method_handler(behaviour, decode.FromString, kind.SerializeToString)


def main(kind: str, settings: str) -> None:
    """Runs one of the two."""
    given = json.loads(settings)
    pin(given.pop("core"))
    asyncio.run(authsvc(**given) if kind == "authsvc" else floor(**given))


if __name__ == "__main__":
    main(*sys.argv[1:])
