"""The servers under load, each a process of its own that ends with the one that started it."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

START_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Cores:
    """Where to run: servers on one core, the load generator on another."""

    servers: int | None
    load: int | None

    @classmethod
    def here(cls) -> "Cores":
        """Two cores that this process may use, or none where it cannot choose."""
        if not hasattr(os, "sched_getaffinity"):  # macOS
            return cls(None, None)
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[1]) if len(usable) > 1 else cls(None, None)

    @property
    def pinned(self) -> bool:
        """Whether the processes keep to their cores."""
        return self.servers is not None


def pin(core: int | None, pid: int = 0) -> None:
    """Keeps a process, this one by default, to a core."""
    if core is not None:
        os.sched_setaffinity(pid, {core})


@dataclass(frozen=True, slots=True)
class Answer:
    """What the floor does for a method: nothing, or one bare signature, and a fixed answer."""

    request: str
    """Name of the request message; that of the response ends otherwise."""
    response: str
    """The response, serialised, in base64."""
    signs: bool = False

    @classmethod
    def of(cls, request: str, response: bytes, *, signs: bool = False) -> "Answer":
        """From the bytes of a real response."""
        return cls(request, base64.b64encode(response).decode(), signs)


class Server:
    """A child process that serves on `port` and answers questions about itself."""

    def __init__(self, kind: str, **settings: object) -> None:
        """Waits until it serves; RuntimeError where it does not."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benches.serve", kind, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=own_environment(),
        )
        self.port = int(self._read())

    def cpu(self) -> float:
        """CPU seconds of the process so far, all its threads."""
        return self._ask("cpu")

    def statements(self) -> int:
        """How many statements ran so far for calls that change nothing, ValidateToken above all."""
        return int(self._ask("statements"))

    def pause_s(self) -> float:
        """The longest that its loop was held up since the question before; 0 to the first one."""
        return self._ask("pause")

    def rss(self, *, peak: bool = False) -> int:
        """Bytes that it holds in memory, or the most that it ever held."""
        return int(self._ask("peak" if peak else "rss"))

    def bare(self, what: str) -> float:
        """CPU seconds of one bare signature (`sign`) or its verification (`verify`), there."""
        return self._ask(what)

    def _ask(self, what: str) -> float:
        _stream(self._process.stdin).write(what + "\n")
        _stream(self._process.stdin).flush()
        return float(self._read())

    def _read(self) -> str:
        line = _stream(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"a server ended ({self._process.wait()})")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        _stream(self._process.stdin).close()  # which ends it
        try:
            self._process.wait(START_S_MAX)
        finally:
            self._process.kill()
            self._process.wait()
            _stream(self._process.stdout).close()


def own_environment() -> dict[str, str]:
    """Without what would set up another authsvc."""
    return {k: v for k, v in os.environ.items() if not k.startswith("AUTHSVC_")}


def cpu_s(*pids: int) -> float:
    """CPU seconds of these processes so far, all their threads."""
    threads = [each for pid in pids for each in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((each / "schedstat").read_text().split()[0]) for each in threads) / 1e9


async def until_ready(process: "subprocess.Popen[bytes]", ready: Path) -> None:
    """Waits for the file of a command that was told to write one; RuntimeError where it ends."""
    async with asyncio.timeout(START_S_MAX):
        while not ready.exists():  # noqa: ASYNC240 - a look at a local file
            if process.poll() is not None:
                raise RuntimeError(f"authsvc ended ({process.returncode})")
            await asyncio.sleep(0.05)


def floor(pki: Path, answers: Mapping[str, Answer], core: int | None) -> Server:
    """The empty handlers behind the same TLS."""
    return Server(
        "floor",
        pki=str(pki),
        answers={method: asdict(answer) for method, answer in answers.items()},
        core=core,
    )


def authsvc(
    state_dir: Path,
    core: int | None,
    database: str = "",
    *,
    redis: str = "",
    cheap_passwords: bool = False,
) -> Server:
    """The real thing on free ports, with the embedded defaults but for a migrated database, a
    Redis, the password grant, and passwords that cost next to nothing where they are not what is
    measured."""
    return Server(
        "authsvc",
        state_dir=str(state_dir),
        core=core,
        database=database,
        redis=redis,
        cheap_passwords=cheap_passwords,
    )


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
