"""Stubs for other languages, and their examples run against a live server.

What a run makes is in a temporary directory, a cache of the language, or ignored by git.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
BUF = str(ROOT / ".cache/buf/node_modules/.bin/buf")
START_S = 60.0
RUN_S = 120.0
BUILD_S = 900.0
LATENCY_S = 0.3
"""Longer than it takes to see a line of the program and to kill the server."""

Command = tuple[str, ...]
Act = Callable[[], Awaitable[None]]


class Failed(Exception):
    """What was promised did not happen."""


@dataclass(frozen=True)
class Language:
    """How a language makes its stubs and its example, and runs it."""

    needs: tuple[tuple[str, str], ...]
    """Programs on the PATH, and what to install where one is missing."""
    stubs: tuple[Command, ...]
    build: tuple[Command, ...]
    silent: tuple[Command, ...]
    """Checks whose output must be empty."""
    run: Command
    packages: Command = ()
    """Installs what its lock file names, where that is not done by the rest."""


GO = "Go 1.26 or newer"
JAVA = "a JDK, 17 or newer, and Maven, 3.8 or newer (Debian: default-jdk-headless maven)"
NODE = "Node.js 20 or newer (Debian: nodejs npm)"
MAVEN = ("mvn", "-q", "-B")
LANGUAGES = {
    "go": Language(
        needs=(("go", GO),),
        stubs=((BUF, "generate"),),
        build=(("go", "build", "-o", "bin/reports", "."), ("go", "vet", ".")),
        silent=(("gofmt", "-l", "main.go"),),
        run=("bin/reports",),
    ),
    "java": Language(
        needs=(("javac", JAVA), ("mvn", JAVA)),
        stubs=((*MAVEN, "generate-sources"),),
        build=((*MAVEN, "compile"),),
        silent=(),
        run=("java", "-cp", "target/classes:target/lib/*", "example.Reports"),
    ),
    "typescript": Language(
        needs=(("node", NODE), ("npm", NODE)),
        stubs=((BUF, "generate"),),
        build=(("npm", "run", "--silent", "build"),),
        silent=(),
        run=("node", "dist/src/main.js"),
        packages=("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"),
    ),
}


def make(name: str, commands: Sequence[Command]) -> str:
    """Runs commands in the folder of an example; answers what they printed."""
    printed = ""
    for command in commands:
        done = subprocess.run(  # noqa: S603
            command,
            cwd=EXAMPLES / name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
        if done.returncode:
            what = LANGUAGES[name].needs[0][1]
            raise Failed(f"{' '.join(command)} (needs {what}):\n{done.stdout}")
        printed += done.stdout
    return printed


def make_stubs(name: str) -> None:
    """The stubs of a language, in the folder of its example."""
    for program, what in LANGUAGES[name].needs:
        if shutil.which(program) is None:
            raise Failed(f"{program} is not on the PATH: install {what}")
    if LANGUAGES[name].packages and not _installed(EXAMPLES / name):
        make(name, (LANGUAGES[name].packages,))
    make(name, LANGUAGES[name].stubs)


def _installed(folder: Path) -> bool:
    """npm leaves there what it installed, newer than the lock file that it came from."""
    made = folder / "node_modules/.package-lock.json"
    lock = folder / "package-lock.json"
    return made.exists() and made.stat().st_mtime >= lock.stat().st_mtime


class Server:
    """A server with the embedded defaults, on the port of its first start."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.pki = home / "pki"
        self._home = home
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith("AUTHSVC_")
            },
            "AUTHSVC_STATE_DIR": str(home),
        }
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        stack.callback(self.stop, signal.SIGTERM)

    def start(self) -> None:
        """Starts it and waits until it serves."""
        ready = self._home / "ready.json"
        ready.unlink(missing_ok=True)
        ports = ("--port", str(self.port), "--metrics-port", "0", "--health-port", "0")
        with (self._home / "authsvc.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "authsvc", "serve", *ports, "--ready-file", str(ready)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.perf_counter() + START_S
        while not (ready.exists() and (text := ready.read_text())):
            if time.perf_counter() > deadline or self._process.poll() is not None:
                raise Failed(f"authsvc did not start\n{self.log()}")
            time.sleep(0.02)
        self.port = json.loads(text)["port"]
        self.environment["AUTHSVC_ADDRESS"] = f"localhost:{self.port}"

    def stop(self, how: signal.Signals) -> None:
        """Ends it, if it runs."""
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log(self) -> str:
        """The end of what it logged."""
        return (self._home / "authsvc.log").read_text()[-2000:]

    def cli(self, *arguments: str) -> str:
        """What a person would type; answers its JSON."""
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "authsvc", *arguments, "--json"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Failed(f"authsvc {' '.join(arguments)}: {done.stderr}")
        return done.stdout


class Wire:
    """A way to the server that keeps each of its answers for a moment."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.port = 0

    async def __aenter__(self) -> Wire:
        """Opens it."""
        self._listener = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes it, and whatever is still carried."""
        self._listener.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _carry(self, near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        try:
            far, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
        except OSError:
            out.close()
            return
        ways = [
            asyncio.create_task(_copy(near, to_server, 0)),
            asyncio.create_task(_copy(far, out, LATENCY_S)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            to_server.close()
            out.close()


async def _copy(read: asyncio.StreamReader, write: asyncio.StreamWriter, keep_s: float) -> None:
    try:
        while data := await read.read(65536):
            await asyncio.sleep(keep_s)
            write.write(data)
            await write.drain()
    except OSError:
        return


class Scene:
    """A live server with the client of the examples, and what each example must do with it."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.server = Server(home, stack)
        self.server.start()
        for name in ("reports", "stranger"):
            self.server.cli("pki", "issue", name)
        self.server.cli("apply", "-f", str(EXAMPLES / "reports.yaml"), "--yes")
        found = json.loads(self.server.cli("client", "list"))["clients"]
        self._client_id = found[0]["client_id"]

    async def check(self, name: str) -> None:
        """Runs an example in every way."""
        await self._told(name, self.server.port)
        await self._refused(name)
        await self._over_a_restart(name)

    async def _refused(self, name: str) -> None:
        code, printed, errors = await self._play(name, self.server.port, "stranger")
        wanted = "authsvc CLIENT_AUTHENTICATION_FAILED"
        if code == 0 or printed or wanted not in errors:
            raise Failed(f"a stranger was not told {wanted}: exit code {code}\n{printed}{errors}")

    async def _over_a_restart(self, name: str) -> None:
        async with Wire(self.server) as wire:
            await self._told(name, wire.port, self._restart)

    async def _restart(self) -> None:
        await asyncio.to_thread(self.server.stop, signal.SIGKILL)
        await asyncio.to_thread(self.server.start)

    async def _told(self, name: str, port: int, after_first_line: Act | None = None) -> None:
        code, printed, errors = await self._play(name, port, "reports", after_first_line)
        wanted = [
            r"issued: reports\.read for https://reports\.example, .+",
            rf"active: {self._client_id}, until 2\S+Z",
            "inactive: TOKEN_REVOKED",
            r"refused: \w+ authsvc SCOPE_NOT_ALLOWED scope=admin",
        ]
        if code or not re.fullmatch("\n".join(wanted) + "\n", printed):
            raise Failed(f"exit code {code}, and it printed\n{printed}{errors}")

    async def _play(
        self, name: str, port: int, who: str, after_first_line: Act | None = None
    ) -> tuple[int, str, str]:
        """Runs an example; answers its exit code, what it printed, and its errors."""
        language = LANGUAGES[name]
        process = await asyncio.create_subprocess_exec(
            *language.run,
            cwd=EXAMPLES / name,
            env=self.server.environment
            | {
                "AUTHSVC_ADDRESS": f"localhost:{port}",
                "AUTHSVC_CA": str(self.server.pki / "ca.pem"),
                "AUTHSVC_CERT": str(self.server.pki / f"{who}.pem"),
                "AUTHSVC_KEY": str(self.server.pki / f"{who}-key.pem"),
                "AUTHSVC_CLIENT_ID": self._client_id,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(RUN_S):
                assert process.stdout
                first = await process.stdout.readline()
                if after_first_line:
                    await after_first_line()
                rest, errors = await process.communicate()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return process.returncode or 0, (first + rest).decode(), errors.decode()


async def interop(names: Sequence[str]) -> bool:
    """Makes and checks the examples; one line each. Answers whether all are well."""
    well = True
    with tempfile.TemporaryDirectory(prefix="authsvc-interop-") as home, ExitStack() as stack:
        scene: Scene | None = None
        for name in names:
            started = time.perf_counter()
            try:
                make_stubs(name)
                make(name, LANGUAGES[name].build)
                if found := make(name, LANGUAGES[name].silent):
                    raise Failed(f"not formatted: {found}")
                built = time.perf_counter()
                scene = scene or Scene(Path(home), stack)
                await scene.check(name)
            except (Failed, TimeoutError, subprocess.TimeoutExpired) as error:
                well = False
                sys.stdout.write(f"FAIL  {name}: {str(error) or 'it took too long'}\n")
                continue
            build_s, run_s = built - started, time.perf_counter() - built
            sys.stdout.write(
                f"ok    {name:<10} validated, revoked, told why; a stranger refused; the server "
                f"killed and back  (built in {build_s:.0f} s, run in {run_s:.0f} s)\n"
            )
            sys.stdout.flush()
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="LANGUAGE", help=", ".join(LANGUAGES))
    parser.add_argument("--stubs", action="store_true", help="only make the stubs")
    arguments = parser.parse_args()
    names: list[str] = arguments.names or list(LANGUAGES)
    if unknown := set(names) - LANGUAGES.keys():
        parser.error(f"no such language: {', '.join(unknown)} (there are {', '.join(LANGUAGES)})")
    if not arguments.stubs:
        sys.exit(not asyncio.run(interop(names)))
    try:
        for name in names:
            make_stubs(name)
    except Failed as error:
        sys.exit(f"stubs: {error}")


if __name__ == "__main__":
    main()
