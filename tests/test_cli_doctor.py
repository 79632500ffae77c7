"""`authsvc doctor`: each finding is provoked, on real files, ports, databases and a real Redis."""

import asyncio
import errno
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from uuid import uuid4

import asyncpg
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import SecretStr

from authsvc.app import migrate, prepare
from authsvc.clock import Clock, SystemClock
from authsvc.config import Database, Grants, Listen, Settings, Tls
from authsvc.config import Redis as RedisSettings
from authsvc.doctor import Finding, Outcome, Report, examine
from authsvc.doctor import database as database_module
from authsvc.doctor import ports as ports_module
from authsvc.doctor import redis as redis_module
from tests import certs
from tests.certs import DAY, HOUR, Issued
from tests.clocks import HandClock
from tests.harness import TIMEOUT_S
from tests.redis_servers import Redis, free_port
from tests.servers import SUPERUSER, Postgres

NOW: Final = SystemClock().wall()
PROBLEMS: Final = 9
ANY: Final = Listen(port=0, metrics_port=0, health_port=0)
LIFE: Final = (NOW - HOUR, NOW + 80 * DAY)
CA: Final = certs.ca("Clients", span=LIFE)
SECOND: Final = certs.ca("More clients", span=LIFE)


def found(findings: list[Finding], check: str) -> tuple[str, str, str]:
    """Outcome, text and advice of a check; of many the worst."""
    order = [*Outcome].index
    named = [each for each in findings if each.check == check]
    assert named, (check, findings)
    worst = max(named, key=lambda each: order(each.outcome) % 3)
    assert bool(worst.advice) is (worst.outcome in ("warning", "problem")), worst
    return worst.outcome.value, worst.found, worst.advice


async def everything(settings: Settings, clock: Clock = SystemClock()) -> list[Finding]:  # noqa: B008
    return await examine(settings, clock, budget_s=60)


async def looked(settings: Settings, check: str, **more: Any) -> tuple[str, str, str]:
    return found(await everything(settings, **more), check)


def with_(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


@pytest.fixture
def fresh(tmp_path: Path) -> Settings:
    """Of a server that never ran."""
    return Settings(state_dir=tmp_path / "state", listen=ANY)


@pytest.fixture
async def settings(fresh: Settings) -> Settings:
    """Of a server that ran: all that it makes is there."""
    mask = os.umask(0o077)
    try:
        prepare(fresh, SystemClock())
        await migrate(fresh, check=False)
    finally:
        os.umask(mask)
    return fresh


# --- the whole ---


async def test_nothing_is_wrong_before_and_after_the_first_start(
    fresh: Settings, settings: Settings
) -> None:
    never = Settings(state_dir=fresh.state_dir / "never", listen=ANY)
    for each in (never, settings):
        bad = [f for f in await everything(each) if f.outcome in ("warning", "problem")]
        assert not bad
    assert not never.state_dir.exists()


def doctor(
    environment: Mapping[str, str], *arguments: str, code: int = 0
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "authsvc", "doctor", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done


PORTS: Final = {f"AUTHSVC_LISTEN__{n}PORT": "0" for n in ("", "METRICS_", "HEALTH_")}


async def test_command_tells_people_what_to_do_and_programs_all(settings: Settings) -> None:
    base = {"AUTHSVC_STATE_DIR": str(settings.state_dir), **PORTS}
    text = doctor(base)
    assert "✓ database.schema" in text.stdout
    assert "0 problem" in text.stderr
    key = settings.state_dir / "seal.key"
    key.chmod(0o644)
    text = doctor(base, code=PROBLEMS)
    lines = text.stdout.splitlines()
    (at,) = (at for at, line in enumerate(lines) if line.startswith("✗ files.seal.key"))
    assert lines[at + 1].strip() == f"do: chmod 600 {key}"
    told = json.loads(doctor(base, "--json", code=PROBLEMS).stdout)
    assert (told["problems"], told["warnings"]) == (1, 0)
    (problem,) = (each for each in told["findings"] if each["outcome"] == "problem")
    assert problem == {
        "check": "files.seal.key",
        "outcome": "problem",
        "looked_at": str(key),
        "found": "others may read it (mode 0644)",
        "advice": f"chmod 600 {key}",
    }


def test_each_broken_setting_is_a_finding(tmp_path: Path) -> None:
    file = tmp_path / "authsvc.toml"
    file.write_text('issuer = "http://plain"\ncolour = 1\n[listen]\nport = 70000\n')
    told = json.loads(doctor({}, "--config", str(file), "--json", code=PROBLEMS).stdout)
    assert {each["check"] for each in told["findings"]} == {
        *("config.issuer", "config.colour", "config.listen.port")
    }
    file.write_text("issuer = [")
    assert "✗ config.file" in doctor({}, "--config", str(file), code=PROBLEMS).stdout
    missing = {"AUTHSVC_CONFIG": str(tmp_path / "none.toml")}
    assert "cannot be read" in doctor(missing, code=PROBLEMS).stdout


def test_no_secret_is_told(tmp_path: Path) -> None:
    secret = "5ec2e7" * 10
    key = f"{secret}0000"
    port = free_port()
    settings = {
        "AUTHSVC_STATE_DIR": str(tmp_path),
        "AUTHSVC_SEAL_KEYS": key,
        "AUTHSVC_REFRESH_KEYS": key,
        "AUTHSVC_DATABASE__URL": f"postgresql+asyncpg://u:{secret}@127.0.0.1:{port}/x",
        "AUTHSVC_REDIS__URL": f"redis://u:{secret}@127.0.0.1:{port}/0",
        "AUTHSVC_REDIS__SENTINEL_PASSWORD": secret,
        **PORTS,
    }
    query = f"postgresql+asyncpg:///x?host=127.0.0.1&port={port}&password={secret}"
    file = tmp_path / "authsvc.toml"
    file.write_text(f'seal_keys = "{key}"\n[redis]\npassword = "{secret}"\n')
    bad = f"redis://u:{secret}@[:{port}/0"
    broken = [
        {},
        {"AUTHSVC_DATABASE__URL": query, "AUTHSVC_REDIS__URL": bad},
        {"AUTHSVC_DATABASE__URL": f"postgresql+asyncpg://u:{secret}@[/x"},
        {"AUTHSVC_DATABASE__URL": f"sqlite+aiosqlite:///{tmp_path}/x?password={secret}"},
        {
            "AUTHSVC_SEAL_KEYS": f"{key},{secret}",
            "AUTHSVC_REFRESH_KEYS": f"no key {secret}",
            "AUTHSVC_REDIS__URL": f"{secret}://u:{secret}@x",
        },
        {"AUTHSVC_CONFIG": str(file), "AUTHSVC_LISTEN": f'{{"{secret}"}}'},
        {"AUTHSVC_CONFIG": str(file), "AUTHSVC_REDIS__URL": "redis://127.0.0.1:1"},
    ]
    for at, change in enumerate(broken):
        as_json = ("--json",) if at % 2 else ()
        done = doctor(settings | change, *as_json, code=PROBLEMS)
        assert secret not in done.stdout + done.stderr, change


async def test_what_hangs_is_a_problem_and_holds_up_nothing_else(
    settings: Settings, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = SecretStr(f"postgresql+asyncpg://u@127.0.0.1:{silent.getsockname()[1]}/x")
        tls = Tls(certificate=pipe, key=pipe, client_ca=pipe)
        hanging = with_(settings, tls=tls, database=Database(url=url))
        findings = await examine(hanging, SystemClock(), budget_s=0.5)
    for target in ("tls", "database"):
        assert found(findings, f"{target}.all")[:2] == ("problem", "not done within 0.5 s")
    assert found(findings, "files.seal.key")[0] == "ok"
    assert found(findings, "files.tls.key")[:2] == ("problem", "no regular file")
    os.close(os.open(pipe, os.O_WRONLY))  # its reader ends


# --- files ---


async def test_secret_files_are_nobody_elses(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = settings.state_dir
    for name, check in {
        "seal.key": "seal.key",
        "refresh.key": "refresh.key",
        "pki/ca-key.pem": "pki",
        "authsvc.db": "authsvc.db",
    }.items():
        for mode, does in ((0o604, "read"), (0o602, "change"), (0o620, "change"), (0o601, "run")):
            (directory / name).chmod(mode)
            outcome, text, advice = await looked(settings, f"files.{check}")
            assert (outcome, text) == ("problem", f"others may {does} it (mode {mode:04o})")
            assert advice == f"chmod 600 {directory / name}"
        (directory / name).chmod(0o640)  # as a secret of root's that is mounted for a group
        outcome, _, _ = await looked(settings, f"files.{check}")
        assert outcome == ("ok" if os.geteuid() == 0 else "problem")
        (directory / name).chmod(0o600)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "may not read" in (await looked(settings, "files.seal.key"))[1]
    assert "may not write" in (await looked(settings, "files.state_dir"))[1]


async def test_key_of_another_user_is_a_problem(
    fresh: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key.pem"
    key.touch(0o600)
    if os.geteuid() == 0:
        os.chown(key, 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    tls = Tls(certificate=key, key=key, client_ca=key)
    _, text, advice = await looked(with_(fresh, tls=tls), "files.tls.key")
    assert text.startswith("belongs to another user")
    assert advice == f"chown 54321 {key}"


async def test_state_directory_is_nobody_elses(settings: Settings, tmp_path: Path) -> None:
    directory = settings.state_dir
    for mode, outcome in ((0o755, "warning"), (0o777, "problem"), (0o700, "ok")):
        directory.chmod(mode)
        assert (await looked(settings, "files.state_dir"))[0] == outcome
    file = tmp_path / "file"
    file.touch()
    assert "no directory" in (await looked(with_(settings, state_dir=file), "files.state_dir"))[1]


async def test_named_files_must_be_there(
    fresh: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "seal"
    monkeypatch.setenv("AUTHSVC_SEAL_KEYS_FILE", str(secret))
    redis = RedisSettings(password_file=tmp_path / "none", key=tmp_path / "x", certificate=secret)
    findings = await everything(with_(fresh, redis=redis))
    for check in ("AUTHSVC_SEAL_KEYS_FILE", "redis.password_file", "redis.key"):
        assert found(findings, f"files.{check}")[:2] == ("problem", "there is no such file")
    secret.touch()
    secret.chmod(0o644)
    assert (await looked(fresh, "files.AUTHSVC_SEAL_KEYS_FILE"))[0] == "problem"


async def test_configuration_with_secrets_is_a_secret(
    fresh: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "authsvc.toml"
    monkeypatch.setenv("AUTHSVC_CONFIG", str(file))
    for text, mode, outcome in (
        ('log_level = "info"', 0o644, "ok"),
        ('log_level = "info"', 0o666, "problem"),
        (f'seal_keys = "{"0" * 64}"', 0o644, "problem"),
        ('[database]\nurl = "sqlite+aiosqlite:///x"', 0o644, "problem"),
        ('[redis]\npassword = "x"', 0o600, "ok"),
    ):
        file.write_text(text)
        file.chmod(mode)
        assert (await looked(fresh, "files.config"))[0] == outcome, (text, mode)


# --- certificates ---


@pytest.fixture
def tls(tmp_path: Path, fresh: Settings) -> Callable[..., Settings]:
    """Settings with files of these contents; good ones where none is given."""
    server = server_leaf()

    def make(
        certificate: bytes | None = None,
        key: bytes | None = None,
        client_ca: bytes = CA.pem,
        bundles: Mapping[str, bytes] | None = None,
        **more: Any,
    ) -> Settings:
        contents = {
            "server": certificate if certificate is not None else server.pem,
            "key": key if key is not None else server.key_pem,
            "ca": client_ca,
            **(bundles or {}),
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            (tmp_path / name).chmod(0o600)
        files = [tmp_path / name for name in ("server", "key", "ca")]
        given = Tls(
            certificate=files[0],
            key=files[1],
            client_ca=files[2],
            bundles={name: tmp_path / name for name in bundles or {}},
        )
        return with_(fresh, tls=given, admins=("spiffe://authsvc.local/me",), **more)

    return make


def server_leaf(issuer: Issued = CA, **changes: Any) -> Issued:
    given = {"uris": (), "dns": ("localhost",), "span": LIFE}
    return certs.leaf(issuer, extended=(ExtendedKeyUsageOID.SERVER_AUTH,), **given | changes)


def pair(issued: Issued) -> dict[str, bytes]:
    return {"certificate": issued.pem, "key": issued.key_pem}


async def test_certificates_that_fit_are_ok(tls: Callable[..., Settings]) -> None:
    findings = await everything(tls(bundles={"partner.test": SECOND.pem}))
    mine = [each for each in findings if each.check.startswith("tls.")]
    assert {each.outcome.value for each in mine} == {"ok"}
    assert "tls.together" in {each.check for each in mine}


async def test_server_certificate_is_read_whole(tls: Callable[..., Settings]) -> None:
    above = certs.ca("Above", span=LIFE)
    between = certs.ca("Between", issuer=above, span=LIFE)
    server = server_leaf(between)
    key = server.key_pem
    whole = server.pem + between.pem + above.pem
    assert (await looked(tls(whole, key), "tls.certificate"))[:2] == ("ok", "a chain of 3")
    _, text, _ = await looked(tls(server.pem + above.pem, key), "tls.certificate")
    assert "the chain is broken" in text
    assert (await looked(tls(b"nothing", key), "tls.certificate"))[0] == "problem"
    client = certs.leaf(CA, span=LIFE)
    _, text, _ = await looked(tls(**pair(client)), "tls.certificate")
    assert "serverAuth" in text
    _, text, _ = await looked(tls(key=client.key_pem), "tls.key")
    assert "not the one of the certificate" in text
    settings = tls()
    settings.tls.key.unlink()  # type: ignore[union-attr]
    _, text, _ = await looked(settings, "tls.key")
    assert text == "could not be looked at (FileNotFoundError: No such file or directory)"


@pytest.mark.parametrize(
    ("span", "outcome", "text"),
    [
        ((NOW - DAY, NOW - HOUR), "problem", "ended at"),
        ((NOW + HOUR, NOW + DAY), "problem", "not valid before"),
        ((NOW - 300 * DAY, NOW + 29 * DAY), "warning", "ends at"),
        ((NOW - 300 * DAY, NOW + 31 * DAY), "ok", "ends at"),
        ((NOW - HOUR, NOW + HOUR), "ok", "ends at"),  # one that lives an hour is renewed often
        ((NOW - HOUR, NOW + 0.4 * HOUR), "warning", "ends at"),
    ],
)
async def test_end_of_a_certificate_is_told_in_time(
    tls: Callable[..., Settings], span: tuple[float, float], outcome: str, text: str
) -> None:
    server, ca = server_leaf(span=span), certs.ca("Old", span=span)
    settings = tls(**pair(server), client_ca=ca.pem, bundles={"partner.test": ca.pem})
    findings = await everything(settings)
    for check in ("certificate_end", "client_ca_end", "bundle partner.test end"):
        told = found(findings, f"tls.{check}")
        assert told[0] == outcome
        assert text in told[1]


async def test_names_of_the_server_are_those_that_clients_look_for(
    tls: Callable[..., Settings],
) -> None:
    public = {"listen": ANY.model_copy(update={"host": "0.0.0.0"})}
    for changes, more, outcome in (
        ({"dns": (), "subject": "localhost"}, {}, "problem"),
        ({"dns": (), "uris": ("spiffe://a.test/b",)}, {}, "warning"),
        ({}, public, "warning"),
        ({"dns": ("tokens.internal",)}, public, "ok"),
    ):
        settings = tls(**pair(server_leaf(**changes)), **more)
        assert (await looked(settings, "tls.names"))[0] == outcome, changes


async def test_client_cas_are_cas_and_one_is_the_administrators(
    tls: Callable[..., Settings],
) -> None:
    leaf = certs.leaf(CA, span=LIFE)
    assert (await looked(tls(client_ca=leaf.pem), "tls.client_ca"))[0] == "problem"
    assert (await looked(tls(client_ca=b""), "tls.client_ca"))[0] == "problem"
    both = CA.pem + SECOND.pem
    _, text, advice = await looked(tls(client_ca=both), "tls.admin_ca")
    assert "2 client CAs" in text
    assert CA.pin in advice
    assert (await looked(tls(client_ca=both, admin_ca=CA.pin), "tls.admin_ca"))[0] == "ok"
    _, text, _ = await looked(tls(admin_ca=SECOND.pin), "tls.admin_ca")
    assert "none of the client CAs" in text


async def test_bundles_can_be_read_and_share_no_ca(tls: Callable[..., Settings]) -> None:
    check = "tls.bundle partner.test"
    assert (await looked(tls(bundles={"partner.test": b"{}"}), check))[0] == "problem"
    empty = certs.bundle()
    assert (await looked(tls(bundles={"partner.test": empty}), check))[0] == "warning"
    _, text, _ = await looked(tls(bundles={"partner.test": CA.pem}), "tls.together")
    assert "as well" in text


async def test_what_the_own_pki_issued_ends_in_time(settings: Settings) -> None:
    old = certs.leaf(CA, span=(NOW - 300 * DAY, NOW + DAY))
    for name in ("orders", "admin"):
        (settings.state_dir / "pki" / f"{name}.pem").write_bytes(old.pem)
    findings = await everything(settings)
    outcome, _, advice = found(findings, "tls.pki orders")
    assert (outcome, advice) == ("warning", "authsvc pki issue orders")
    assert "authsvc serve" in found(findings, "tls.pki admin")[2]
    (settings.state_dir / "pki" / "orders.pem").write_text("nonsense")
    assert "could not be looked at" in (await looked(settings, "tls.pki orders"))[1]


# --- addresses ---


@pytest.fixture
def taken() -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


async def test_ports_are_free_or_it_is_told_whose_they_are(
    fresh: Settings, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_port()
    listen = Listen(port=taken, metrics_port=free, health_port=free, tls_only=True, tls_port=0)
    findings = await everything(with_(fresh, listen=listen))
    outcome, text, advice = found(findings, "listen.port")
    assert (outcome, f"process {os.getpid()}" in text) == ("problem", True)
    assert "AUTHSVC_LISTEN__PORT" in advice
    assert found(findings, "listen.metrics_port")[:2] == ("ok", "free")
    assert found(findings, "listen.health_port")[:2] == (
        "problem",
        "is listen.metrics_port as well",
    )
    assert found(findings, "listen.tls_port")[0] == "not applicable"
    monkeypatch.setattr(ports_module, "_owner", lambda _port: None)
    assert (await looked(with_(fresh, listen=listen), "listen.port"))[0] == "warning"
    report = Report("listen")
    for number in (errno.EACCES, errno.ENOBUFS):
        ports_module._taken("port", "127.0.0.1:80", 80, number, report)
    assert [each.outcome.value for each in report.findings] == ["problem", "problem"]
    assert "AUTHSVC_LISTEN__PORT" in report.findings[0].advice


async def test_addresses_are_those_of_this_machine(fresh: Settings) -> None:
    port = free_port()
    listen = Listen(
        port=port, host="192.0.2.1", metrics_port=0, health_port=port, health_host="a..b"
    )
    findings = await everything(with_(fresh, listen=listen))
    outcome, text, advice = found(findings, "listen.port")
    assert (outcome, text) == ("problem", "this machine does not have this address")
    assert "AUTHSVC_LISTEN__HOST" in advice
    assert found(findings, "listen.health_port")[0] == "problem"


async def test_port_of_authsvc_itself_is_no_problem(settings: Settings) -> None:
    """The doctor looks at a server that runs."""
    ready = settings.state_dir / "ready.json"
    with subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [sys.executable, "-m", "authsvc", "serve", "--ready-file", str(ready)],
        env={"PATH": os.environ["PATH"], "AUTHSVC_STATE_DIR": str(settings.state_dir), **PORTS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            while not ready.exists():
                assert server.poll() is None
                await asyncio.sleep(0.02)
            port = json.loads(ready.read_text())["port"]
            listen = ANY.model_copy(update={"port": port})
            findings = await everything(with_(settings, listen=listen))
        finally:
            server.terminate()
    assert found(findings, "listen.port")[:2] == ("ok", f"in use by authsvc (process {server.pid})")
    assert found(findings, "database.reachable")[0] == "ok"


# --- settings ---


async def test_settings_that_are_valid_and_not_wanted(fresh: Settings) -> None:
    public = ANY.model_copy(update={"host": "0.0.0.0"})
    postgres = Database(url=SecretStr("postgresql+asyncpg://127.0.0.1:1/x"))
    files = Tls(certificate=Path("/x"), key=Path("/x"), client_ca=Path("/x"))
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "issuer": ("warning", {"listen": public}),
        "trust_domain": ("warning", {"listen": public}),
        "admins": ("problem", {"tls": files}),
        "grants.password": ("warning", {"grants": Grants(password=True)}),
        "seal_keys": ("warning", {"database": postgres}),
        "refresh_keys": ("warning", {"database": postgres}),
    }
    before = await everything(fresh)
    for check, (outcome, change) in cases.items():
        assert found(before, f"settings.{check}")[0] == "ok"
        assert (await looked(with_(fresh, **change), f"settings.{check}"))[0] == outcome, check
    for issuer, outcome in (("https:///x", "problem"), ("https://a.test/", "warning")):
        assert (await looked(with_(fresh, issuer=issuer), "settings.issuer"))[0] == outcome


# --- SQLite ---


def run(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


async def test_sqlite_file_that_is_not_right(settings: Settings, tmp_path: Path) -> None:
    embedded = settings.state_dir / "authsvc.db"
    other = tmp_path / "other.db"
    elsewhere = Database(url=SecretStr(f"sqlite+aiosqlite:///{other}"))
    named = with_(settings, database=elsewhere)
    assert (await looked(named, "database.reachable"))[:2] == ("problem", "there is no such file")
    other.touch(0o600)
    assert (await looked(named, "database.schema"))[1:] == ("empty", "authsvc migrate")
    run(other, "CREATE TABLE theirs (x)")
    outcome, text, _ = await looked(named, "database.schema")
    assert (outcome, "not one that" in text) == ("problem", True)
    assert (await looked(named, "database.journal"))[0] == "warning"
    other.write_text("no database at all " * 100)
    outcome, text, _ = await looked(named, "database.reachable")
    assert (outcome, text) == ("problem", "could not be looked at (DatabaseError)")
    run(embedded, "UPDATE alembic_version SET version_num = '0001'")
    outcome, text, advice = await looked(settings, "database.schema")
    assert (outcome, text, advice) == ("problem", "of an older version", "authsvc migrate")
    embedded.write_bytes(b"")
    assert (await looked(settings, "database.schema"))[0] == "not applicable"
    vouched = with_(settings, database=Database(synchronous=True))
    assert (await looked(vouched, "database.synchronous"))[0] == "warning"


async def test_feed_of_a_sqlite_file(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = settings.state_dir / "authsvc.db"
    assert (await looked(settings, "database.beat"))[0] == "not applicable"
    run(embedded, f"UPDATE beat SET time = {SystemClock().wall()}")
    assert (await looked(settings, "database.beat"))[0] == "ok"
    monkeypatch.setattr(database_module, "FEED_MANY", 0)
    assert "authsvc revoke" in (await looked(settings, "database.feed"))[2]
    run(embedded, "UPDATE feed_head SET fingerprint = 'another'")
    outcome, text, _ = await looked(settings, "database.feed")
    assert (outcome, "restored" in text) == ("warning", True)


async def test_room_and_filesystem_of_a_sqlite_file(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(database_module, "MOUNTS", mounts)
    assert (await looked(settings, "database.filesystem"))[0] == "not applicable"
    where = str(settings.state_dir).replace("/", "/", 1)
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {where} nfs4 rw 0 0\n")
    outcome, text, _ = await looked(settings, "database.filesystem")
    assert (outcome, text.split(":")[0]) == ("problem", "nfs4")
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x /elsewhere nfs4 rw 0 0\n")
    assert (await looked(settings, "database.filesystem"))[1] == "ext4"
    for free, outcome in ((2**30 - 1, "warning"), (2**20, "problem")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, u=usage: u)
        assert (await looked(settings, "database.disk"))[0] == outcome


# --- PostgreSQL ---


@pytest.fixture
async def on_postgres(fresh: Settings, postgres: Postgres) -> Settings:
    url = await postgres.database()
    settings = with_(fresh, database=Database(url=SecretStr(url)))
    await migrate(settings, check=False)
    return settings


def url_of(settings: Settings) -> str:
    assert settings.database.url is not None
    return settings.database.url.get_secret_value()


async def sql(settings: Settings, *statements: str) -> None:
    connection = await asyncpg.connect(url_of(settings).replace("+asyncpg", ""))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def name_of(settings: Settings) -> str:
    return url_of(settings).partition("?")[0].rpartition("/")[2]


async def test_postgres_that_is_ready(on_postgres: Settings) -> None:
    async with asyncio.timeout(TIMEOUT_S):  # those of the migration are still being closed
        while "0 used" not in found(await everything(on_postgres), "database.connections")[1]:
            pass
    findings = await everything(on_postgres)
    checks = ("reachable", "version", "primary", "clock", "connections", "synchronous")
    for check in (*checks, "fingerprint", "schema", "privileges", "feed"):
        assert found(findings, f"database.{check}")[0] == "ok", check
    assert found(findings, "database.beat")[0] == "not applicable"
    # Those of the tests' own server are off, for speed.
    outcome, text, advice = found(findings, "database.durable")
    assert (outcome, text.split(":")[0]) == ("problem", "fsync, full_page_writes off")
    assert "ALTER SYSTEM SET fsync = on" in advice


async def test_postgres_that_does_not_answer(
    fresh: Settings, postgres: Postgres, on_postgres: Settings
) -> None:
    for url, cause, advice in (
        (f"postgresql+asyncpg://u@127.0.0.1:{free_port()}/x", "ConnectionRefused", "running"),
        (postgres.url("nowhere"), "InvalidCatalogName", "create it"),
        (
            postgres.url("x").replace(f"user={SUPERUSER}", "user=nobody"),
            "InvalidAuthorization",
            "user",
        ),
    ):
        settings = with_(fresh, database=Database(url=SecretStr(url)))
        outcome, text, told = await looked(settings, "database.reachable")
        assert outcome == "problem"
        assert cause in text
        assert advice in told
    for url in ("mysql://u:x@h/x", "nonsense", "postgresql://u@h/x"):
        wrong = with_(fresh, database=Database(url=SecretStr(url)))
        assert "postgresql+asyncpg" in (await looked(wrong, "database.url"))[2]
    empty = with_(fresh, database=Database(url=SecretStr(await postgres.database())))
    assert (await looked(empty, "database.schema"))[1:] == ("empty", "authsvc migrate")


async def test_postgres_settings_that_lose_or_refuse_changes(on_postgres: Settings) -> None:
    name = name_of(on_postgres)
    await sql(
        on_postgres,
        f"ALTER DATABASE {name} SET default_transaction_read_only = on",
        f"ALTER DATABASE {name} SET synchronous_commit = off",
    )
    findings = await everything(on_postgres)
    assert found(findings, "database.primary")[:2] == ("problem", "transactions are read-only")
    assert "synchronous_commit" in found(findings, "database.durable")[1]
    vouched = on_postgres.database.model_copy(update={"synchronous": True})
    outcome, text, advice = await looked(
        with_(on_postgres, database=vouched), "database.synchronous"
    )
    assert (outcome, "standbys: none" in text) == ("problem", True)
    assert "synchronous_standby_names" in advice


async def test_privileges_that_the_user_lacks(on_postgres: Settings) -> None:
    role = f"role_{uuid4().hex[:8]}"
    tables = "cutoff, alembic_version, feed_head, feed, beat"
    await sql(
        on_postgres,
        f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 3",
        f"GRANT SELECT ON {tables} TO {role}",
        "REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC",
    )
    try:
        url = url_of(on_postgres).replace(f"user={SUPERUSER}", f"user={role}")
        theirs = with_(on_postgres, database=Database(url=SecretStr(url)))
        findings = await everything(theirs)
        outcome, text, advice = found(findings, "database.fingerprint")
        assert (outcome, "InsufficientPrivilege" in text) == ("problem", True)
        assert "pg_control_system" in advice
        outcome, text, _ = found(findings, "database.privileges")
        assert outcome == "problem"
        assert "DELETE on feed," in text
        assert "SELECT on feed," not in text
        assert found(findings, "database.connections")[0] == "warning"
        await sql(on_postgres, f"REVOKE SELECT ON {tables} FROM {role}")
        await sql(on_postgres, f"ALTER ROLE {role} CONNECTION LIMIT 1")
        findings = await everything(theirs)
        assert "could not be looked at" in found(findings, "database.schema")[1]
        assert found(findings, "database.connections")[0] == "problem"
    finally:
        await sql(on_postgres, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_feed_of_postgres(on_postgres: Settings) -> None:
    await sql(on_postgres, "UPDATE feed_head SET fingerprint = '1:2'")
    outcome, text, _ = await looked(on_postgres, "database.feed")
    assert (outcome, "restored" in text) == ("warning", True)
    url = url_of(on_postgres).replace("+asyncpg", "") + "&application_name=authsvc"
    worker = await asyncpg.connect(url)  # as one that hangs
    try:
        outcome, text, _ = await looked(on_postgres, "database.beat")
        assert (outcome, "some are connected" in text) == ("problem", True)
    finally:
        await worker.close()


async def test_clock_of_postgres_is_that_of_this_machine(on_postgres: Settings) -> None:
    for ahead, outcome, way in (
        (0.0, "ok", "within"),
        (-20.0, "warning", "behind"),
        (60.0, "problem", "ahead of"),
        (-3600.0, "problem", "behind"),
    ):
        clock = HandClock(wall=SystemClock().wall() - ahead)
        told = await looked(on_postgres, "database.clock", clock=clock)
        assert told[0] == outcome, told
        assert way in told[1]


@pytest.mark.parametrize(
    ("standbys", "changes", "outcome"),
    [
        ({"sync": 1}, {}, "ok"),
        ({"quorum": 2, "async": 1}, {"synchronous_commit": "remote_apply"}, "ok"),
        ({"async": 2}, {}, "problem"),
        ({}, {}, "problem"),
        ({"sync": 1}, {"synchronous_commit": "local"}, "problem"),
        ({"sync": 1}, {"synchronous_standby_names": ""}, "problem"),
        ({None: 1}, {}, "warning"),
    ],
)
def test_who_vouches_has_a_synchronous_standby(
    fresh: Settings, standbys: dict[str | None, int], changes: dict[str, str], outcome: str
) -> None:
    server = {"synchronous_commit": "on", "synchronous_standby_names": "*"} | changes
    vouched = with_(fresh, database=Database(synchronous=True))
    report = Report("database")
    database_module._synchronous(vouched, SimpleNamespace(**server), standbys, "there", report)
    assert [each.outcome.value for each in report.findings] == [outcome]


def test_version_role_and_durability_of_other_servers() -> None:
    report = Report("database")
    on = {"fsync": True, "full_page_writes": True, "synchronous_commit": "on"}
    database_module._durability(SimpleNamespace(**on), "there", report)
    old = SimpleNamespace(version=140012, version_text="14.12", is_standby=True, is_read_only=True)
    database_module._version(old, "there", report)
    database_module._role(old, "there", report)
    assert [each.outcome.value for each in report.findings] == ["ok", "problem", "problem"]
    assert "PostgreSQL 15" in report.findings[1].advice
    assert "a standby" in report.findings[2].found


# --- Redis ---


async def redis_says(url: str, check: str, **more: Any) -> tuple[str, str, str]:
    report = Report("redis")
    await redis_module.look(RedisSettings(url=SecretStr(url), **more), report, SystemClock())
    return found(report.findings, f"redis.{check}")


async def test_redis_that_is_ready(
    redis: Redis, fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await looked(fresh, "redis.reachable"))[0] == "not applicable"
    settings = with_(fresh, redis=RedisSettings(url=SecretStr(redis.url), budget_ms=5000))
    findings = await everything(settings)
    for check in ("reachable", "version", "protection", "maxmemory-policy"):
        assert found(findings, f"redis.{check}")[0] == "ok", check
    assert (await redis_says(redis.socket_url, "protection"))[0] == "ok"
    assert (await redis_says(redis.url, "reachable", budget_ms=0.0001))[0] == "problem"
    monkeypatch.setattr(redis_module, "OLDEST", (99,))
    assert (await redis_says(redis.url, "version"))[0] == "problem"


async def test_redis_that_does_not_answer(redis: Redis) -> None:
    outcome, text, _ = await redis_says(f"redis://127.0.0.1:{free_port()}", "reachable")
    assert (outcome, "Connect" in text) == ("problem", True)
    assert (await redis_says(f"rediss://127.0.0.1:{redis.port}", "reachable"))[0] == "problem"
    assert (await redis_says("redis://[", "url"))[0] == "problem"


async def test_redis_that_is_not_safe_to_use(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    with Redis("maxmemory 100mb", password="x") as small:
        assert (await redis_says(small.url, "maxmemory-policy"))[0] == "warning"
        wrong = f"redis://:wrong@127.0.0.1:{small.port}"
        assert "password" in (await redis_says(wrong, "reachable"))[2]
        small.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        assert (await redis_says(small.url, "maxmemory-policy"))[:2] == ("ok", "allkeys-lru")
        small.ask("REPLICAOF", "127.0.0.1", redis.port)
        assert "a replica" in (await redis_says(small.url, "version"))[1]
    monkeypatch.setattr(redis_module, "is_loopback", lambda _host: False)
    _, text, _ = await redis_says(redis.url, "protection")
    assert text == "over the network without password and TLS"
    _, text, _ = await redis_says(f"rediss://127.0.0.1:{redis.port}", "protection")
    assert text == "over the network without password"
    _, text, _ = await redis_says(f"rediss://u:x@127.0.0.1:{redis.port}", "protection")
    assert text == "TLS and a password"
