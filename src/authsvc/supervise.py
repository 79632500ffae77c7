"""Several workers on the same ports, and one process that keeps them running.

A worker is `authsvc serve --worker N`: it reads its Orders from standard input, whose end tells it
that the supervisor is gone, and writes a line to standard output once it serves.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from authsvc.app import address, cannot_listen, prepare_workers
from authsvc.clock import SystemClock
from authsvc.config import Settings
from authsvc.http.probes import HttpServer, listen_tcp, probes_by
from authsvc.http.scrapes import Scrapes

PROGRAM = (sys.executable, "-m", "authsvc")
READY_S_MAX = 60.0
"""A worker that does not serve by then will not."""
KILL_AFTER_S = 10.0
"""How long after the time to drain a worker is killed."""
DEATHS_MAX, DEATHS_S = 5, 60.0
"""Deaths of one worker within so many seconds that end everything."""
UNREADY_MAX = 3
"""Deaths of one worker before it served, in a row, that end everything."""
BACKOFF_S, BACKOFF_S_MAX = 0.1, 5.0
SCRAPE_S_MAX = 2.0
REST_S = 1.0
"""Between two replacements: who was turned away by one worker shall not meet the next one's end."""

log = structlog.get_logger()


class CrashLoopError(Exception):
    """Workers die again and again; the text tells how."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told beside what its environment and its file of settings say."""

    flags: dict[str, Any]
    """Settings from the command line, with the ports that are shared."""
    probes: str


def take_orders() -> Orders:
    """In a worker: reads its orders, and from then on ends the process with the supervisor."""
    line = b""
    while not line.endswith(b"\n"):
        if not (read := os.read(0, 65536)):
            raise SystemExit(0)
        line += read
    threading.Thread(target=_end_with_supervisor, name="supervisor", daemon=True).start()
    return Orders(**json.loads(line))


def tell_ready() -> None:
    """In a worker: it serves."""
    os.write(1, b"ready\n")


def _end_with_supervisor() -> None:
    while os.read(0, 65536):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(READY_S_MAX)  # longer than any drain that is worth it; nobody is left to kill it
    os._exit(1)


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(eq=False, slots=True)
class _Worker:
    """One process. It is `wanted` until it is told to end."""

    index: int
    process: asyncio.subprocess.Process
    probes: Path
    wanted: bool = True
    serves: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def told(self) -> bool:
        """Whether it came to serve."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (self.serves, self.ended)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        return self.serves.is_set() and not self.ended.is_set()


class _Deaths:
    """Of the workers of one index, one after another."""

    def __init__(self) -> None:
        self._at: deque[float] = deque(maxlen=DEATHS_MAX)
        self._unready = 0

    def count(self, now: float, *, served: bool) -> float | None:
        """How long to wait before the next one; None: it is a loop."""
        self._unready = 0 if served else self._unready + 1
        self._at.append(now)
        recent = sum(1 for at in self._at if at > now - DEATHS_S)
        if recent >= DEATHS_MAX or self._unready >= UNREADY_MAX:
            return None
        return min(BACKOFF_S_MAX, BACKOFF_S * 4.0 ** (recent - 1))


class Supervisor:
    """Runs workers until SIGTERM or SIGINT, and replaces them one by one at SIGHUP."""

    def __init__(self, settings: Settings, count: int, flags: dict[str, Any]) -> None:
        """`flags`: the settings of the command line, which go before all others."""
        self._settings = settings
        self._count = count
        self._flags = flags
        self._workers: set[_Worker] = set()
        self._deaths = [_Deaths() for _ in range(count)]
        self._restarts = 0
        self._clock = SystemClock()
        self._scrapes = Scrapes()
        self._tasks: set[asyncio.Task[None]] = set()
        self._end: asyncio.Future[None] | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._again = False
        self._folder = Path()
        self._numbers = iter(range(sys.maxsize))
        self.port = self.tls_port = self.health_port = self.metrics_port = 0

    @property
    def pids(self) -> list[int]:
        """Of the workers that serve, by their index."""
        found = [worker for worker in self._workers if worker.wanted and worker.serves.is_set()]
        return [w.process.pid for w in sorted(found, key=lambda worker: worker.index)]

    async def run(self, changed: Callable[[], None]) -> None:
        """Calls `changed` once all serve, and whenever `pids` changed later.

        Raises StartError, or AuthError where the store is away; CrashLoopError.
        """
        loop = asyncio.get_running_loop()
        self._end = loop.create_future()
        self._changed = changed
        await prepare_workers(self._settings)
        with self._ports(), tempfile.TemporaryDirectory(prefix="authsvc-") as folder:
            self._folder = Path(folder)
            listen = self._settings.listen
            try:
                listening = listen_tcp(listen.metrics_host, listen.metrics_port)
            except OSError as error:
                where = address(listen.metrics_host, listen.metrics_port)
                raise cannot_listen(where, error) from error
            http = HttpServer(probes_by(self._scrape, self._is_ready), listening)
            self.metrics_port = http.port
            http.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._ended)
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            try:
                self._task(self._begin())
                await self._end
            finally:
                loop.remove_signal_handler(signal.SIGINT)  # again: does not want to wait
                log.info("supervisor.ending")
                await self._stop()
                await http.stop()

    # --- ports ---

    @contextlib.contextmanager
    def _ports(self) -> Iterator[None]:
        """Holds the ports, without listening, so that workers come and go and they stay ours."""
        listen = self._settings.listen
        wanted = {"port": (listen.host, listen.port)}
        wanted["health_port"] = (listen.health_host, listen.health_port)
        if listen.tls_only:
            wanted["tls_port"] = (listen.tls_host, listen.tls_port)
        with contextlib.ExitStack() as held:
            for name, (host, port) in wanted.items():
                try:
                    holder = held.enter_context(_hold(host, port))
                except OSError as error:
                    raise cannot_listen(address(host, port), error) from error
                setattr(self, name, holder.getsockname()[1])
            yield

    # --- workers ---

    async def _begin(self) -> None:
        started = [await self._spawn(index) for index in range(self._count)]
        if all([await worker.told() for worker in started]):
            self._changed()
        # Who died is counted and replaced; `changed` comes with the one that serves.

    async def _spawn(self, index: int) -> _Worker:
        assert self._end is not None
        if self._end.done():
            raise asyncio.CancelledError
        probes = self._folder / f"{next(self._numbers)}.sock"
        process = await asyncio.create_subprocess_exec(
            *(*PROGRAM, "serve", "--worker", str(index)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,  # Ctrl-C is for the supervisor
        )
        worker = _Worker(index, process, probes)
        self._workers.add(worker)
        self._task(self._watch(worker))
        ports = {"port": self.port, "health_port": self.health_port}
        if self.tls_port:
            ports["tls_port"] = self.tls_port
        flags = self._flags | {"listen": (self._flags.get("listen") or {}) | ports}
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(Orders(flags, str(probes)))).encode() + b"\n")
        return worker

    async def _watch(self, worker: _Worker) -> None:
        """Hears that a worker serves, and follows up its end."""
        process = worker.process
        assert process.stdout is not None
        try:
            async with asyncio.timeout(READY_S_MAX):
                if await process.stdout.readline():
                    worker.serves.set()
                    log.info("worker.serves", worker=worker.index, worker_pid=process.pid)
        except TimeoutError:
            worker.signal(signal.SIGKILL)
        status = await process.wait()
        worker.ended.set()
        self._workers.discard(worker)
        self._scrapes.end(worker.process.pid)
        worker.probes.unlink(missing_ok=True)
        if not worker.wanted:
            log.info("worker.ended", worker=worker.index, worker_pid=process.pid, status=status)
            return
        served = worker.serves.is_set()
        log.error("worker.died", worker=worker.index, worker_pid=process.pid, how=_how(status))
        pause_s = self._deaths[worker.index].count(self._clock.boot(), served=served)
        if pause_s is None:
            self._fail(
                CrashLoopError(
                    f"worker {worker.index} dies again and again, the last time"
                    f" {'' if served else 'before it served, '}{_how(status)}"
                )
            )
            return
        self._restarts += 1
        await asyncio.sleep(pause_s)
        replacement = await self._spawn(worker.index)
        if await replacement.told() and len(self.pids) == self._count:
            self._changed()

    # --- reload ---

    def _reload(self) -> None:
        """One at a time; who asks meanwhile gets one more round."""
        if self._reloading is not None and not self._reloading.done():
            self._again = True
            return
        self._reloading = self._task(self._roll())

    async def _roll(self) -> None:
        log.info("supervisor.reloading")
        for old in sorted(self._workers, key=lambda worker: worker.index):
            if not old.wanted or old.ended.is_set():
                continue
            new = await self._spawn(old.index)
            new.wanted = False  # its death is no crash of the service
            if not await new.told():
                log.error("worker.not_replaced", worker=old.index, worker_pid=new.process.pid)
                return
            if old.ended.is_set():  # it died meanwhile, and has another replacement
                await self._retire(new)
                continue
            new.wanted = True
            await self._retire(old)
            self._changed()
            await asyncio.sleep(REST_S)
        log.info("supervisor.reloaded")
        if self._again:
            self._again = False
            await self._roll()

    async def _retire(self, worker: _Worker) -> None:
        """Ends a worker, in time or by force; what it counted stays counted."""
        worker.wanted = False
        with contextlib.suppress(OSError, TimeoutError):
            await self._scraped(worker)
        worker.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._settings.drain_s + KILL_AFTER_S):
                await worker.ended.wait()
        except TimeoutError:
            log.error("worker.killed", worker=worker.index, worker_pid=worker.process.pid)
            worker.signal(signal.SIGKILL)
            await worker.ended.wait()

    # --- the end ---

    def _ended(self) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)

    async def _stop(self) -> None:
        while self._workers:  # one may just have been started
            await asyncio.gather(*map(self._retire, self._workers))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _task(self, work: Any) -> "asyncio.Task[None]":
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, Exception)
            self._fail(error)

    # --- metrics and probes of all ---

    async def _scrape(self) -> bytes:
        async def one(worker: _Worker) -> None:
            with contextlib.suppress(OSError, TimeoutError):  # a frozen one is as it was
                await self._scraped(worker)

        serving = [worker for worker in self._workers if worker.serves.is_set()]
        await asyncio.gather(*map(one, serving))
        return self._scrapes.text(
            ("authsvc_workers", "gauge", "Workers that serve", len(self.pids)),
            ("authsvc_worker_restarts", "counter", "Workers that died", self._restarts),
        )

    async def _scraped(self, worker: _Worker) -> None:
        status, body = await _get(worker.probes, "/metrics")
        if status == 200 and not worker.ended.is_set():
            self._scrapes.add(worker.process.pid, worker.index, body)

    async def _is_ready(self) -> bool:
        async def one(worker: _Worker) -> bool:
            try:
                return (await _get(worker.probes, "/readyz"))[0] == 200
            except (OSError, TimeoutError):
                return False

        serving = [w for w in self._workers if w.wanted and w.serves.is_set()]
        return any(await asyncio.gather(*map(one, serving)))


def _hold(host: str, port: int) -> socket.socket:
    """A socket bound to the address, shared with the workers. OSError where another listens."""
    [(family, kind, protocol, _, where), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    if port:  # the kernel would let anybody of this user share it: ask as one who does not
        with socket.socket(family, kind, protocol) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(where)
            alone.listen()
    holder = socket.socket(family, kind, protocol)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # past connections do not count
        holder.bind(where)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        holder.close()
        raise
    return holder


def _how(status: int) -> str:
    if status >= 0:
        return f"with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(-status).name}"
    return f"by signal {-status}"


async def _get(path: Path, target: str) -> tuple[int, str]:
    """Status and body; OSError or TimeoutError where there is no answer."""
    async with asyncio.timeout(SCRAPE_S_MAX):
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(f"GET {target} HTTP/1.0\r\n\r\n".encode())
            answer = (await reader.read()).decode()
        finally:
            writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    status = head.split(" ", 2)
    if len(status) < 2:
        raise OSError("no answer")
    return int(status[1]), body
