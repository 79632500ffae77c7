"""Several workers under one supervisor: replaced, reloaded and drained, as real processes."""

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest

from authsvc.http.scrapes import Scrapes
from authsvc.supervise import BACKOFF_S_MAX, DEATHS_MAX, UNREADY_MAX, _Deaths
from authsvc_client.v1 import auth_pb2, clients_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
from tests.harness import TIMEOUT_S, outcome, until
from tests.test_server import Process

CHANNELS, CALLERS = 16, 64
START_S = 60.0
LOCAL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
BACKOFF_S = 0.05
"""As the client's retry policy: gRPC may put a call that is repeated at once on the very connection
that is about to be given up."""


@dataclass
class Workers(Process):
    """`authsvc serve --workers 2`."""

    @property
    def ready(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "run" / "ready.json").read_text())
        return found

    @property
    def pids(self) -> list[int]:
        found: list[int] = self.ready["workers"]
        return found

    def events(self) -> list[dict[str, Any]]:
        lines = (self.root / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def open(self, name: str = "admin") -> grpc.aio.Channel:
        """A channel with a connection of its own."""
        certificate, key = self.certificate(name)
        credentials = grpc.ssl_channel_credentials(
            Path(self.where["ca"]).read_bytes(), key.read_bytes(), certificate.read_bytes()
        )
        return grpc.aio.secure_channel(f"localhost:{self.where['port']}", credentials, LOCAL)

    async def scrape(self, path: str = "/metrics") -> str:
        url = self.where["metrics_url"].replace("/metrics", path)

        def read() -> str:
            with urlopen(url, timeout=TIMEOUT_S) as answer:
                return str(answer.read().decode())

        return await asyncio.to_thread(read)

    async def counted(self, sample: str) -> float:
        [value] = re.findall(f"^{re.escape(sample)} (.*)$", await self.scrape(), re.MULTILINE)
        return float(value)

    async def roll(self) -> None:
        """SIGHUP, until every worker is another."""
        before = set(self.pids)
        self.process.send_signal(signal.SIGHUP)
        await until(lambda: not before & set(self.pids), START_S)

    async def kill(self) -> None:
        await super().kill()
        self.channels.clear()


class Load:
    """Callers over many connections; a call that is UNAVAILABLE is made once more, soon or when
    there is a connection.
    """

    def __init__(self, server: Workers, *, waits: bool = False) -> None:
        self._waits = waits
        self._channels = [server.open() for _ in range(CHANNELS)]
        self._over = False
        self.ended = Counter[str]()
        self.repeated = 0

    async def __aenter__(self) -> "Load":
        self._tasks = [
            asyncio.create_task(self._call(AuthServiceStub(self._channels[n % CHANNELS])))
            for n in range(CALLERS)
        ]
        await until(lambda: self.ended["OK"] > CALLERS)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)
        for channel in self._channels:
            await channel.close()

    async def _call(self, stub: Any) -> None:
        while not self._over:
            code = await self._once(stub)
            if code == "UNAVAILABLE":
                self.repeated += 1
                await asyncio.sleep(BACKOFF_S)
                code = await self._once(stub, wait_for_ready=self._waits)
            self.ended[code] += 1
            await asyncio.sleep(0.01)  # the machine is for others too

    async def _once(self, stub: Any, **options: Any) -> str:
        try:
            await stub.GetKeys(auth_pb2.GetKeysRequest(), timeout=TIMEOUT_S, **options)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@asynccontextmanager
async def supervised(
    root: Path, *arguments: str, program: tuple[str, ...] = ("-m", "authsvc")
) -> AsyncIterator[Workers]:
    server = Workers(root, program, ("--workers", "2", *arguments))
    await server.start()
    pids = server.pids
    try:
        yield server
    finally:
        await server.kill()
        await until(lambda: not any(map(alive, pids)))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One for the tests that leave it as it was."""
    root = tmp_path_factory.mktemp("workers")
    config = root / "authsvc.toml"
    config.write_text("[keys]\nmax_age_s = 111\n")
    server = Workers(root, arguments=("--workers", "2", "--config", str(config)))
    asyncio.run(server.start())
    yield server
    pids = server.pids
    asyncio.run(server.kill())
    asyncio.run(until(lambda: not any(map(alive, pids))))


async def calls_of_both(server: Workers) -> int:
    """Makes calls over new connections until both workers refused one; how many."""
    made = 0
    seen: set[int] = set()
    async with asyncio.timeout(TIMEOUT_S):
        while not set(server.pids) <= seen:
            async with server.open("nobody") as channel:
                request = clients_pb2.ListClientsRequest()
                refused = ClientServiceStub(channel).ListClients(request, timeout=TIMEOUT_S)
                assert await outcome(refused) == "CALLER_UNKNOWN"
            made += 1
            seen = {e["pid"] for e in server.events() if e["event"] == "rpc.refused"}
    return made


async def test_all_workers_serve_and_one_scrape_adds_them_up(shared: Workers) -> None:
    assert shared.ready["pid"] == shared.process.pid
    made = await calls_of_both(shared)
    text = await shared.scrape()
    counted = re.findall(r'^authsvc_rpc_calls_total\{.*ListClients"\} (.*)$', text, re.MULTILINE)
    assert sum(map(float, counted)) == made
    took = re.findall(r'^authsvc_rpc_seconds_count\{.*ListClients"\} (.*)$', text, re.MULTILINE)
    assert list(map(float, took)) == [made]
    for worker in "01":
        assert f'authsvc_feed_revision{{worker="{worker}"}}' in text
    assert "authsvc_workers 2.0" in text
    assert await shared.scrape("/readyz") == await shared.scrape("/livez") == "ok\n"
    assert {e["worker"] for e in shared.events() if e["event"] == "rpc.refused"} == {0, 1}


async def test_frozen_worker_neither_stops_a_scrape_nor_is_killed(shared: Workers) -> None:
    before = await shared.scrape()
    frozen = shared.pids[1]
    os.kill(frozen, signal.SIGSTOP)
    try:
        during = await shared.scrape()
        assert await shared.scrape("/readyz") == "ok\n"
    finally:
        os.kill(frozen, signal.SIGCONT)
    calls = re.compile(r"^authsvc_rpc_calls_total.*$", re.MULTILINE)
    assert calls.findall(during) == calls.findall(before)
    assert frozen in shared.pids


async def test_killed_worker_is_replaced_and_what_it_counted_stays(shared: Workers) -> None:
    await calls_of_both(shared)
    text = await shared.scrape()
    restarts = await shared.counted("authsvc_worker_restarts_total")
    killed, kept = shared.pids
    os.kill(killed, signal.SIGKILL)
    async with Load(shared) as load:
        await until(lambda: killed not in shared.pids and len(shared.pids) == 2, START_S)
    assert set(load.ended) <= {"OK", "UNAVAILABLE"}  # who connects to it as it dies waits longer
    assert kept in shared.pids
    assert await shared.counted("authsvc_worker_restarts_total") == restarts + 1
    calls = re.compile(r"^authsvc_rpc_calls_total.*ListClients.*$", re.MULTILINE)
    assert calls.findall(await shared.scrape()) == calls.findall(text)
    [died] = [e for e in shared.events() if e["event"] == "worker.died"][-1:]
    assert (died["worker_pid"], died["how"]) == (killed, "by SIGKILL")


async def test_sighup_reloads_one_by_one_without_a_failed_call(shared: Workers) -> None:
    (shared.root / "authsvc.toml").write_text("[keys]\nmax_age_s = 222\n")
    async with Load(shared, waits=True) as load:
        for _ in range(2):
            await shared.roll()
    assert set(load.ended) == {"OK"}
    assert load.repeated, "no call was ever turned away: nothing was tested"
    async with shared.open() as channel:
        answer = await AuthServiceStub(channel).GetKeys(auth_pb2.GetKeysRequest())
    assert answer.max_age.seconds == 222
    assert not any(e["event"] == "worker.died" for e in shared.events()[-20:])


async def test_replacement_that_does_not_serve_leaves_the_old_in_place(shared: Workers) -> None:
    before = shared.pids
    good = (shared.root / "authsvc.toml").read_text()
    (shared.root / "authsvc.toml").write_text("nonsense = 1\n")
    failed = Counter(e["event"] for e in shared.events())["worker.not_replaced"]
    try:
        shared.process.send_signal(signal.SIGHUP)
        await until(
            lambda: Counter(e["event"] for e in shared.events())["worker.not_replaced"] > failed,
            START_S,
        )
    finally:
        (shared.root / "authsvc.toml").write_text(good)
    assert shared.pids == before
    assert all(map(alive, before))


async def test_taken_port_is_a_clear_error(shared: Workers, tmp_path: Path) -> None:
    for option in ("port", "metrics_port"):
        taken = shared.where[option]
        arguments = (f"--{option.replace('_', '-')}", str(taken))
        other = Workers(tmp_path, arguments=("--workers", "2", *arguments))
        with pytest.raises(AssertionError, match=f"127.0.0.1:{taken}.*is a server running there"):
            await other.start()
        assert await other.ended() == 2


async def test_two_supervisors_and_a_drain_under_load(shared: Workers, tmp_path: Path) -> None:
    """SIGTERM: calls end well or are UNAVAILABLE, nothing is left, and the other goes on."""
    async with supervised(tmp_path) as server:
        assert server.where["port"] != shared.where["port"]
        async with Load(server) as load:
            server.process.send_signal(signal.SIGTERM)
            assert await server.ended() == 0
            await until(lambda: load.ended["UNAVAILABLE"])
        assert set(load.ended) == {"OK", "UNAVAILABLE"}
        pids = [e["worker_pid"] for e in server.events() if e["event"] == "worker.serves"]
        assert len(pids) == 2
        assert not any(map(alive, pids))
        for folder in ("cwd", "home", "tmp", "run"):
            assert not list((tmp_path / folder).rglob("*")), folder
    async with shared.open() as channel:
        await AuthServiceStub(channel).GetKeys(auth_pb2.GetKeysRequest(), timeout=TIMEOUT_S)


async def test_killed_supervisor_takes_its_workers_with_it(
    tmp_path: Path, migrated_url: str
) -> None:
    """And workers share a PostgreSQL."""
    config = tmp_path / "authsvc.toml"
    config.write_text(f'[database]\nurl = "{migrated_url}"\n')
    async with supervised(tmp_path, "--config", str(config)) as server:
        pids = server.pids
        assert all(map(alive, pids))
        for argument in (Path(f"/proc/{pid}/cmdline") for pid in pids):
            assert not argument.exists() or migrated_url.encode() not in argument.read_bytes()
        server.process.send_signal(signal.SIGKILL)
        await until(lambda: not any(map(alive, pids)))


MAIN = "from authsvc.cli import main; main()"


def planted(fault: str) -> tuple[str, str]:
    """authsvc with a fault in its supervisor."""
    return "-c", f"import sys; from authsvc import supervise as s; {fault}; {MAIN}"


async def test_crash_loop_ends_with_a_message(tmp_path: Path) -> None:
    fault = "s.PROGRAM = (sys.executable, '-c', 'raise SystemExit(3)')"
    server = Workers(tmp_path, planted(fault), ("--workers", "2"))
    with pytest.raises(AssertionError, match="dies again and again, the last time before it serv"):
        await server.start()
    assert await server.ended() == 1
    text = (tmp_path / "log").read_text()
    assert "with exit status 3" in text
    assert "Traceback" not in text
    died = [e for e in server.events() if e["event"] == "worker.died"]
    assert max(Counter(e["worker"] for e in died).values()) == UNREADY_MAX


ALL_AT_ONCE = """
async def told(self):
    return True
s._Worker.told = told
"""
"""The old worker ends before the new one serves."""

NOT_HELD = """
async def stop(self, grace_s):
    await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
    await self._plain.stop(0)
r.RpcServer.stop = stop
"""
"""gRPC's own end of a server."""


async def test_load_notices_workers_that_end_before_others_serve(tmp_path: Path) -> None:
    """Plants the fault that the reload under load is there to find."""
    program = planted(f"exec({ALL_AT_ONCE!r})")
    async with supervised(tmp_path, program=program) as server, Load(server) as load:
        server.process.send_signal(signal.SIGHUP)
        await until(lambda: set(load.ended) > {"OK"}, START_S)


async def test_load_notices_a_drain_that_does_not_hold_calls(tmp_path: Path) -> None:
    """As above, for the end of one worker."""
    worker = f"import asyncio; from authsvc.rpc import server as r; exec({NOT_HELD!r}); {MAIN}"
    program = planted(f"s.PROGRAM = (sys.executable, '-c', {worker!r})")
    config = tmp_path / "authsvc.toml"
    config.write_text("drain_s = 1\n")
    more = ("--config", str(config))
    async with supervised(tmp_path, *more, program=program) as server, Load(server) as load:
        async with asyncio.timeout(START_S):
            while "CANCELLED" not in load.ended:
                await server.roll()


# --- in this process ---


def test_deaths_are_answered_by_longer_pauses_until_they_are_a_loop() -> None:
    deaths = _Deaths()
    pauses = [deaths.count(1000.0 + n, served=True) for n in range(DEATHS_MAX)]
    assert pauses[-1] is None
    told = [pause for pause in pauses[:-1] if pause is not None]
    assert len(told) == DEATHS_MAX - 1
    assert told == sorted(set(told))
    assert told[-1] <= BACKOFF_S_MAX


def test_deaths_far_apart_are_no_loop() -> None:
    deaths = _Deaths()
    assert all(deaths.count(1000.0 * n, served=True) for n in range(1, 3 * DEATHS_MAX))


def test_deaths_before_serving_are_a_loop_sooner_and_only_in_a_row() -> None:
    deaths = _Deaths()
    for n in range(1, UNREADY_MAX):
        assert deaths.count(1000.0 * n, served=False) is not None
    assert deaths.count(9000.0, served=True) is not None
    for n in range(1, UNREADY_MAX):
        assert deaths.count(10_000.0 * (n + 1), served=False) is not None
    assert deaths.count(90_000.0, served=False) is None


SCRAPED = """\
# HELP calls_total Calls
# TYPE calls_total counter
calls_total{code="OK"} %d
# HELP took Time
# TYPE took histogram
took_bucket{le="1.0"} %d
took_bucket{le="+Inf"} %d
took_count %d
took_sum 1.5
# HELP age Age
# TYPE age gauge
age %d
"""


def test_scrapes_add_up_and_never_fall() -> None:
    scrapes = Scrapes()
    scrapes.add(11, 0, SCRAPED % (3, 1, 3, 3, 7))
    scrapes.add(12, 1, SCRAPED % (4, 2, 4, 4, 8))
    both = scrapes.text(("own", "gauge", "Own", 2)).decode()
    for line in ('calls_total{code="OK"} 7.0', 'took_bucket{le="+Inf"} 7.0', "took_sum 3.0"):
        assert line in both
    for line in ('age{worker="0"} 7.0', 'age{worker="1"} 8.0', "own 2.0"):
        assert line in both
    scrapes.end(11)
    scrapes.add(13, 0, SCRAPED % (1, 1, 1, 1, 9))
    after = scrapes.text().decode()
    assert 'calls_total{code="OK"} 8.0' in after
    assert [line for line in after.splitlines() if line.startswith("age{")] == [
        'age{worker="1"} 8.0',
        'age{worker="0"} 9.0',
    ]
