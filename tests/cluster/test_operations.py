"""docs/operations.md: its commands set up a cluster of two, from nothing."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from asyncio import run
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.redis_servers import Redis
from tests.servers import Postgres, launcher

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
ANY_PORT = {"AUTHSVC_LISTEN__PORT": "0", "AUTHSVC_LISTEN__METRICS_PORT": "0"}
ANY_PORT |= {"AUTHSVC_LISTEN__HEALTH_PORT": "0"}


def blocks() -> list[str]:
    """The commands of the set-up, in their order, after the values."""
    section = DOCUMENT.read_text().partition("## Set it up\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1:]


class Machine:
    """Where a replica runs: a home of its own, and ports that no other one has."""

    def __init__(self, home: Path, values: dict[str, str]) -> None:
        home.mkdir()
        self.home = home
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "HOME": str(home), **values}

    def run(self, script: str, code: int = 0) -> str:
        """What the commands print; AssertionError where they do not end so."""
        done = subprocess.run(
            ["bash", "-euc", script],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.home,
            env=self.environment,
        )
        assert done.returncode == code, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def serve(self, script: str) -> "subprocess.Popen[bytes]":
        """Runs on."""
        with (self.home / "log").open("wb") as log:
            return subprocess.Popen(
                [*launcher(), shutil.which("bash") or "bash", "-euc", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=self.environment | ANY_PORT,
            )

    def ports(self, process: "subprocess.Popen[bytes]") -> dict[str, str]:
        """Those of gRPC and of the metrics, as the server told them."""
        give_up = monotonic() + 60
        while not re.search(r"metrics +http\S+", log := (self.home / "log").read_text()):
            assert process.poll() is None, log
            assert monotonic() < give_up, log
            sleep(0.02)
        found = re.findall(r"(?:serves on |metrics +http://)\S+?:(\d+)", log)
        return dict(zip(("7443", "7490"), found, strict=True))


@pytest.fixture
def values(postgres: Postgres, redis: Redis, tmp_path: Path) -> dict[str, str]:
    """What the document leaves to its reader."""
    return {
        "DIR": str(tmp_path / "etc"),
        "DATABASE": run(postgres.database()),
        "REDIS": redis.url,
        "MACHINE": "127.0.0.1",
    }


@pytest.fixture
def machines(tmp_path: Path, values: dict[str, str]) -> list[Machine]:
    return [Machine(tmp_path / name, values) for name in ("one", "two")]


def test_the_documented_commands_make_a_cluster_of_two(machines: list[Machine]) -> None:
    *prepared, examine, serve, use = blocks()
    machines[0].run("\n".join(prepared))
    found = machines[1].run(examine, code=9)
    # The database of the tests does without fsync.
    problems = set(re.findall(r"^ *✗ (\S+)", found, re.MULTILINE))
    assert problems == {"database.durable"}
    with ExitStack() as stack:
        running = [machine.serve(serve) for machine in machines]
        for process in running:
            stack.callback(process.wait, 30)
            stack.callback(process.send_signal, signal.SIGTERM)
        for machine, process in zip(machines, running, strict=True):
            asked = use.replace("billing", machine.home.name)
            for documented, port in machine.ports(process).items():
                asked = asked.replace(documented, port)
            listed = machine.run(asked)
            assert "ready" in listed or "ok" in listed
            assert "RegisterClient" in listed
        # The last one to list saw what was done at both.
        assert listed.count("RegisterClient") == 2
    assert [process.returncode for process in running] == [0, 0]
    for machine in machines:
        assert not list((machine.home / ".local").rglob("*.key"))  # all keys are the shared ones


def test_its_values_are_the_only_thing_that_is_not_run() -> None:
    text = DOCUMENT.read_text()
    first = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    assert [shlex.split(line)[0].partition("=")[0] for line in first.splitlines()] == [
        "DIR",
        "DATABASE",
        "REDIS",
    ]
