"""The command line, as people and programs meet it: real processes and a real server."""

import fcntl
import json
import os
import pty
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc.jwk import ECKey

from authsvc.cli import output, tokens
from authsvc.cli.calls import Session
from authsvc.cli.output import EXIT_OF_CODE, EXITS, HINTS, Exit, Output, shown
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import clients_pb2

START_S: Final = 60.0
ANY_PORTS: Final = ("--port", "0", "--metrics-port", "0", "--health-port", "0")
RESOURCE: Final = "https://billing.internal"


@dataclass
class Shell:
    """A home of its own, and all that was ever printed there."""

    home: Path
    address: str = ""
    printed: list[str] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)

    @property
    def state_dir(self) -> Path:
        return self.home / "state" / "authsvc"

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        base = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        base["XDG_STATE_HOME"] = str(self.home / "state")
        if self.address:
            base["AUTHSVC_ADDRESS"] = self.address
        return base | dict(more or {})

    def __call__(
        self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None, code: int = 0
    ) -> str:
        """Standard output of a command that ends with `code`; standard error for any other."""
        self.argv += arguments
        done = subprocess.run(
            [sys.executable, "-m", "authsvc", *arguments],
            env=self.environment(env),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        self.printed += [done.stdout, done.stderr]
        assert done.returncode == code, (arguments, done)
        assert "Traceback" not in done.stderr
        return done.stderr if code not in (Exit.OK, Exit.NOT_ACTIVE) else done.stdout

    def json(self, *arguments: str, stdin: str = "", code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", stdin=stdin, code=code))


@dataclass
class Running:
    """A server, and where it says that it is."""

    process: "subprocess.Popen[str]"
    ready_file: Path
    log: Path

    def ready(self) -> Any:
        deadline = time.monotonic() + START_S
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return json.loads(self.ready_file.read_text())


@contextmanager
def serving(shell: Shell, *arguments: str) -> Iterator[Running]:
    """`authsvc serve` in a process group of its own, which does not outlive the test."""
    ready_file, log = shell.home / "ready.json", shell.home / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "authsvc", "serve", *arguments, "--ready-file", str(ready_file)],
            env=shell.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        try:
            yield Running(process, ready_file, log)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Running]]:
    """A server without configuration, and a person beside it."""
    shell = Shell(tmp_path_factory.mktemp("newcomer"))
    with serving(shell, *ANY_PORTS) as running:
        shell.address = running.ready()["address"]
        yield shell, running


@pytest.fixture
def shell(server: tuple[Shell, Running]) -> Shell:
    return server[0]


@pytest.fixture
def alone(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def orders(server: tuple[Shell, Running]) -> str:
    """An approved client that may read bills, with a certificate of its own."""
    shell = server[0]
    billing = _admit(shell, "billing", "validate")
    shell.json("resource", "create", RESOURCE, "--owner", billing, "--scope", "bills.read=Reads")
    return _admit(shell, "orders", "bills.read")


def _admit(shell: Shell, name: str, scope: str, *more: str) -> str:
    shell("pki", "issue", name)
    uri = f"spiffe://authsvc.local/{name}"
    register = ("client", "register", "--name", name, "--san-uri", uri, "--scope", scope)
    client_id = shell(*register, *more, "--quiet").strip()
    shell("client", "approve", client_id)
    return client_id


# --- people ---


def test_newcomer_gets_from_nothing_to_a_revoked_token(
    server: tuple[Shell, Running], orders: str
) -> None:
    shell, running = server
    where = running.ready()
    told = running.log.read_text()
    assert where["address"] in told
    assert f"export AUTHSVC_ADDRESS={where['address']}" in told
    assert "authsvc pki issue orders" in told
    assert Path(where["admin_certificate"]).exists()

    token = shell("token", "issue", "--as", "orders", "--client-id", orders, "--quiet").strip()
    presenter = ("--presenter-cert", str(shell.state_dir / "pki" / "orders.pem"))
    asked = ("token", "validate", "--as", "billing", "--scope", "bills.read", *presenter)
    text = shell(*asked, "--claims", stdin=token)
    assert text.startswith("active\n")
    assert orders in text
    assert shell("token", "revoke", "--as", "orders", stdin=token).startswith("revoked\n")
    text = shell(*asked, stdin=token, code=Exit.NOT_ACTIVE)
    assert text.startswith("not active: it was revoked\n")
    assert shell.json(*asked, stdin=token, code=Exit.NOT_ACTIVE)["active"] is False


def test_first_commands_that_serve_prints_work_in_a_shell(server: tuple[Shell, Running]) -> None:
    shell, running = server
    lines = running.log.read_text().split("Next, in another terminal:\n")[1].splitlines()
    script = "\n".join(line for line in lines if line.startswith("  "))
    tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", script.replace("orders", "newcomer")],
        env=shell.environment(tools),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    assert "\nactive\n" in done.stdout
    assert "spiffe://authsvc.local/newcomer" in done.stdout


def test_texts_are_plain_and_ids_whole_where_there_is_no_terminal(
    shell: Shell, orders: str
) -> None:
    text = shell("client", "list", env={"COLUMNS": "20"})
    (line,) = (line for line in text.splitlines() if line.startswith(orders))
    assert line.split() == [
        *(orders, "orders", "approved"),
        *("spiffe://authsvc.local/orders", "bills.read"),
        *("scope", "bills.read"),  # beyond the policy
    ]
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert RESOURCE in shell("resource", "list")
    assert "Reads" in shell("resource", "show", RESOURCE)


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_ids_are_whole_on_a_terminal_of_any_width(shell: Shell, orders: str, columns: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "authsvc", "client", "list"],
            env=shell.environment({"TERM": "xterm"}),
            stdout=theirs,
            check=False,
        )
        text = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert orders in text
    assert "spiffe://authsvc.local/orders" in text
    assert "\x1b[32mapproved" in text


def test_text_of_others_cannot_move_the_cursor() -> None:
    assert shown("a\x1b[2J\n\u202eb") == "a\\x1b[2J\\n\\u202eb"
    assert shown("Größe 日本") == "Größe 日本"


def test_inspect_says_that_nothing_is_verified(shell: Shell) -> None:
    forged = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJcdTAwMWJbMkoiLCJleHAiOjF9.x"
    text = shell("token", "inspect", stdin=forged)
    assert text.startswith("NOT VERIFIED")
    assert "\\x1b[2J" in text
    assert "1970-01-01 00:00:01 UTC" in text
    found = shell.json("token", "inspect", forged)
    assert found == {
        "verified": False,
        "header": {"alg": "none"},
        "claims": {"sub": "\x1b[2J", "exp": 1},
    }


# --- programs ---


def test_json_holds_the_ids(shell: Shell, orders: str) -> None:
    assert shell.json("client", "show", orders)["client"]["client_id"] == orders
    everybody = shell.json("client", "list")["clients"]
    assert orders in {client["client_id"] for client in everybody}
    some = shell.json("client", "list", "--limit", "1")
    assert len(some["clients"]) == 1
    assert some["next_page_token"]
    assert shell.json("resource", "show", RESOURCE)["resource"]["resource_id"] == RESOURCE
    ids = [resource["resource_id"] for resource in shell.json("resource", "list")["resources"]]
    assert ids == sorted(["https://authsvc.local", RESOURCE])
    token = shell.json("token", "issue", "--as", "orders", "--client-id", orders)["token"]
    inspected = shell.json("token", "inspect", stdin=token["access_token"])
    assert inspected["claims"]["jti"] == token["jti"]
    dry = shell.json("token", "revoke", "--jti", token["jti"], "--dry-run")
    assert dry["revoked"][0]["id"] == token["jti"]
    assert dry["revision"] == "0"
    dead = shell.json("token", "revoke", "--jti", token["jti"])
    assert int(dead["revision"]) > 0


def test_resources_and_api_keys_are_made_changed_and_deleted(shell: Shell, orders: str) -> None:
    jwk = shell.home / "resource.jwk"
    public = ECKey.import_key(ec.generate_private_key(ec.SECP256R1())).as_dict(private=False)
    jwk.write_text(json.dumps(public))
    name = "urn:cli"
    made = shell.json("resource", "create", name, "--format", "opaque", "--scope", "cli.read=Reads")
    assert made["resource"]["token_format"] == "TOKEN_FORMAT_OPAQUE"
    assert "OPAQUE" in shell("resource", "show", name)
    assert "nothing to change" in shell("resource", "update", name, code=Exit.USAGE)
    given = ("--name", "Command line", "--clear", "name")
    assert "given too" in shell("resource", "update", name, *given, code=Exit.USAGE)
    missing = ("--encryption-jwk", str(shell.home / "nothing"))
    assert "cannot be read" in shell("resource", "update", name, *missing, code=Exit.USAGE)
    change = ("--format", "jwe", "--encryption-jwk", str(jwk), "--owner", orders, "--etag", "1")
    changed = shell.json("resource", "update", name, *change)["resource"]
    assert json.loads(changed["encryption_jwk"]) == public
    assert (changed["owner_client_id"], changed["etag"]) == (orders, "2")
    assert [scope["name"] for scope in changed["scopes"]] == ["cli.read"]
    back = ("--clear", "owner", "--clear", "format", "--clear", "encryption-jwk")
    bare = shell.json("resource", "update", name, *back, "--clear", "scopes")["resource"]
    assert bare["token_format"] == "TOKEN_FORMAT_JWT"
    assert not bare.get("owner_client_id")
    shell("resource", "delete", name, "--etag", "2", code=Exit.CONFLICT)
    assert "dead" in _notes(shell, "resource", "delete", name)
    shell("resource", "show", name, code=Exit.NOT_FOUND)

    batch = _admit(shell, "batch", "bills.read", "--auth-method", "api_key")
    asked = ("api-key", "create", "--client-id", batch, "--scope", "bills.read")
    key_id, value = shell(*asked, "--expires-in", "12h", "-q").split()
    listed = shell("api-key", "list", "--client-id", batch)
    assert key_id in listed
    assert value not in listed
    assert shell.json("token", "validate", "-", stdin=value)["active"]
    shell("api-key", "delete", key_id)
    shell("token", "validate", "-", stdin=value, code=Exit.NOT_ACTIVE)
    shell("api-key", "delete", key_id, code=Exit.NOT_FOUND)


def test_review_goes_through_its_states(shell: Shell) -> None:
    register = ("client", "register", "--name", "reviewed")
    asked = shell.json(*register, "--san-uri", "spiffe://authsvc.local/reviewed")
    client_id, etag = asked["client"]["client_id"], asked["client"]["etag"]
    assert f"approve {client_id} --etag {etag}" in _notes(shell, "client", "show", client_id)
    approve = ("client", "approve", client_id, "--etag", etag, "--expires-in", "90d")
    approved = shell.json(*approve, "--comment", "known")["client"]
    assert approved["state"] == "CLIENT_STATE_APPROVED"
    assert approved["review_comment"] == "known"
    assert approved["approval_expire_time"]
    for step, state in (("suspend", "SUSPENDED"), ("resume", "APPROVED")):
        found = shell.json("client", step, client_id)["client"]
        assert found["state"] == f"CLIENT_STATE_{state}"
    failure = shell.json("client", "reject", client_id, code=Exit.CONFLICT)
    assert failure["reason"] == "CLIENT_STATE_CONFLICT"
    assert client_id in shell("client", "list", "--state", "approved")


def test_clients_are_changed_rotated_and_deleted(shell: Shell, orders: str) -> None:
    register = ("client", "register", "--name", "cli", "--scope", "bills.read")
    made = shell.json(*register, "--contact", "a@b.test", "--may-act", orders)
    client_id = made["client"]["client_id"]
    assert made["client"]["policy_diff"]
    for list_or_step in (("client", "list"), ("client", "approve", client_id)):
        assert "authentication client_secret_post" in shell(*list_or_step)
    update = ("client", "update", client_id)
    assert "nothing to change" in shell(*update, code=Exit.USAGE)
    given = ("--client-uri", "https://x.test", "--contact", "", "--expires-in", "1h", "--etag", "2")
    changed = shell.json(*update, *given)["client"]
    metadata = changed["metadata"]
    assert (metadata["client_uri"], metadata["contacts"]) == ("https://x.test", [])
    assert (metadata["client_name"], metadata["may_act"]) == ("cli", orders)
    assert changed["approval_expire_time"]
    shell(*update, "--name", "x", "--etag", "2", code=Exit.CONFLICT)
    never = shell.json(*update, "--expires-in", "never")["client"]
    assert not never.get("approval_expire_time")
    jwks = shell.home / "client.jwks"
    key = ECKey.generate_key("P-256", {"kid": "k", "alg": "ES256", "use": "sig"})
    jwks.write_text(json.dumps({"keys": [key.as_dict(private=False)]}))
    methods = ("--auth-method", "private_key_jwt", "--auth-method", "client_secret_basic")
    shell(*update, "--jwks", str(jwks), *methods)
    shown = shell("client", "show", client_id)
    assert "private_key_jwt" in shown
    assert "no such file" in shell(*update, "--jwks", str(jwks) + "x", code=Exit.NOT_FOUND)
    secret = shell("client", "rotate-secret", client_id, "--overlap", "1h", "--quiet").strip()
    assert secret.startswith("asvc_cs_")
    assert secret not in shell("client", "show", client_id)
    shell("client", "rotate-secret", client_id, "--overlap", "31d", code=Exit.USAGE)
    assert "dead" in _notes(shell, "client", "delete", client_id)
    shell("client", "show", client_id, code=Exit.NOT_FOUND)


def test_initial_access_tokens_and_clients_by_themselves(shell: Shell, orders: str) -> None:
    create = ("registration-token", "create", "--expires-in", "1h", "--uses", "1", "--name", "ci")
    token_id, value = shell(*create, "-q").split()
    spare = shell(*create, "-q").split()[0]
    listed = shell("registration-token", "list")
    assert token_id in listed
    assert value not in listed
    shell("registration-token", "delete", spare)
    shell("registration-token", "delete", spare, code=Exit.NOT_FOUND)
    register = ("client", "register", "--as", "orders", "--name", "own")
    bearing = (*register, "--initial-access-token", "-", "--request-id", "cli-own-1")
    made = shell.json(*bearing, stdin=value)
    again = shell.json(*bearing, stdin=value)  # the reply may have been lost
    client_id = made["client"]["client_id"]
    assert again["client"]["client_id"] == client_id
    shell(*bearing, "--scope", "bills.read", stdin=value, code=Exit.CONFLICT)
    shell(*bearing[:-2], stdin=value, code=Exit.REFUSED)
    token = again["registration_access_token"]
    file = shell.home / "own.token"
    file.write_text(token + "\n")
    assert client_id in shell("own-client", "show", stdin=token)
    old = made["registration_access_token"]
    assert "REGISTRATION_TOKEN_INVALID" in shell("own-client", "show", stdin=old, code=Exit.REFUSED)
    update = ("own-client", "update", client_id, "--token", str(file))
    assert "--name" in shell(*update, code=Exit.USAGE)
    changed = shell.json(*update, "--name", "renamed", "--client-uri", "https://x.test")["client"]
    assert changed["metadata"]["client_name"] == "renamed"
    assert token not in " ".join(shell.argv) + " ".join(shell.printed[-4:])
    assert "dead" in _notes(shell, "own-client", "delete", "--token", str(file))
    shell("own-client", "show", "--token", str(file), code=Exit.REFUSED)
    file.unlink()


def _notes(shell: Shell, *arguments: str) -> str:
    shell(*arguments)
    return shell.printed[-1]


def test_errors_are_json_for_programs(shell: Shell) -> None:
    failure = shell.json("resource", "create", "no-uri", code=Exit.USAGE)
    assert failure["code"] == "INVALID_ARGUMENT"
    assert failure["reason"] == "FIELD_INVALID"
    assert failure["violations"][0]["field"] == "resource.resource_id"
    register = ("client", "register", "--name", "x", "--scope", "nobody.has")
    failure = shell.json(*register, code=Exit.USAGE)
    assert failure["reason"] == "INVALID_CLIENT_METADATA"
    assert failure["metadata"] == {"field": "scopes"}


def test_lists_go_through_all_pages() -> None:
    ids = [f"c{number:03}" for number in range(450)]
    sizes = []

    def method(request: clients_pb2.ListClientsRequest, timeout: float) -> Any:
        sizes.append(request.page_size)
        start = int(request.page_token or 0)
        end = min(start + request.page_size, len(ids))
        return clients_pb2.ListClientsResponse(
            clients=[clients_pb2.Client(client_id=each) for each in ids[start:end]],
            next_page_token=str(end) if end < len(ids) else "",
        )

    channel: Any = None
    session = Session(Output(as_json=True), channel, "", 1.0, 0.0)
    for limit, told, asked in ((10**9, 450, [200, 200, 200]), (250, 250, [200, 50])):
        sizes.clear()
        found = session.pages(method, clients_pb2.ListClientsRequest(), "clients", limit)
        assert [client.client_id for client in found.clients] == ids[:told]
        assert bool(found.next_page_token) is (told < 450)
        assert sizes == asked


# --- exit codes ---

EXIT_CASES: Final = (
    (Exit.FAILED, ("pki", "init", "--dir", "/dev/null/pki"), "Not a directory"),
    (Exit.USAGE, ("client", "register", "--name", "x", "--san-uri", "a", "--san-dns", "b"), "excl"),
    (Exit.USAGE, ("client", "register"), "--name"),
    (Exit.USAGE, ("client", "shwo"), "shwo"),
    (Exit.USAGE, ("client", "list", "--limit", "0"), "--limit"),
    (Exit.USAGE, ("client", "list", "--as", "nobody"), "nobody.pem"),
    (Exit.USAGE, ("client", "list", "--cert", "/dev/null"), "--key"),
    (Exit.USAGE, ("client", "approve", "x", "--expires-in", "soon"), "--expires-in"),
    (Exit.USAGE, ("token", "issue", "--client-id", "x", "--client-secret", "s"), "No such option"),
    (Exit.USAGE, ("token", "inspect", "nonsense"), "no JWT"),
    (Exit.USAGE, ("token", "validate"), "standard input"),
    (Exit.USAGE, ("pki", "issue", "server"), "server"),
    (Exit.USAGE, ("serve", "--port", "x"), "--port"),
    (Exit.REFUSED, ("client", "list", "--as", "orders"), "INSUFFICIENT_SCOPE"),
    (Exit.REFUSED, ("token", "issue", "--client-id", "x"), "CLIENT_AUTHENTICATION_FAILED"),
    (Exit.NOT_FOUND, ("client", "show", "nobody"), "CLIENT_NOT_FOUND"),
    (Exit.NOT_FOUND, ("client", "show", "nobody"), "CLIENT_NOT_FOUND"),
    (Exit.NOT_FOUND, ("resource", "show", "https://nobody"), "RESOURCE_NOT_FOUND"),
    (Exit.NOT_FOUND, ("pki", "issue", "x", "--dir", "/nowhere"), "pki init"),
    (Exit.CONFLICT, ("resource", "create", RESOURCE), "ALREADY_EXISTS"),
    (Exit.CONFLICT, ("pki", "init"), "has a CA already"),
    (Exit.UNAVAILABLE, ("client", "list", "--address", "127.0.0.1:1"), "is it running there"),
    (Exit.UNAVAILABLE, ("client", "list", "--server-name", "other"), "--server-name"),
    (Exit.PROBLEMS, ("doctor", "--config", "/nowhere"), "1 problem"),
    (Exit.NOT_IMPLEMENTED, ("client", "register", "--name", "x", "--grant", "device_code"), "yet"),
)


@pytest.mark.parametrize(
    ("code", "arguments", "text"), EXIT_CASES, ids=[f"{c}-{' '.join(a)}" for c, a, _ in EXIT_CASES]
)
def test_each_exit_code(
    shell: Shell, orders: str, code: Exit, arguments: tuple[str, ...], text: str
) -> None:
    assert text in shell(*arguments, code=code)


def test_tables_of_exits_and_hints_are_whole() -> None:
    assert set(EXITS) == set(Exit)
    assert {case[0] for case in EXIT_CASES} | {Exit.OK, Exit.NOT_ACTIVE} == set(Exit)
    assert set(EXIT_OF_CODE) <= set(grpc.StatusCode.__members__)
    assert set(HINTS) <= set(Reason.__members__)
    assert set(tokens.WHY) <= set(Reason.__members__)


def test_help_tells_the_exit_codes_and_loads_nothing_heavy(alone: Shell) -> None:
    text = alone("--help")
    for code, meaning in EXITS.items():
        assert f"{code.value}  {meaning}" in text
    heavy = "grpc cryptography sqlalchemy alembic uvicorn pydantic_settings google.protobuf"
    program = "import sys, authsvc.cli; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program, *heavy.split()], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_unexpected_error_shows_no_text_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with output.reporting():
            raise RuntimeError("asvc_cs_secret")

    with pytest.raises(Exception, match="1") as raised:
        fails()
    assert getattr(raised.value, "exit_code", None) == Exit.FAILED
    told = capsys.readouterr()
    assert "unexpected RuntimeError" in told.err
    assert "asvc_cs_secret" not in told.err + told.out


# --- secrets ---


def test_secret_is_shown_once_and_is_nowhere_else(server: tuple[Shell, Running]) -> None:
    shell, running = server
    register = ("client", "register", "--name", "backup", "--scope", "validate")
    answer = shell.json(*register)
    secret, client_id = answer["client_secret"], answer["client"]["client_id"]
    assert secret.startswith("asvc_cs_")
    printed = len(shell.printed)
    shell("client", "approve", client_id)
    issue = ("token", "issue", "--client-id", client_id)
    shell(*issue, "--client-secret-stdin", stdin=secret + "\n")
    token = shell(*issue, "--quiet", env={"AUTHSVC_CLIENT_SECRET": secret}).strip()
    file = shell.home / "backup.secret"
    file.write_text(secret + "\n")
    shell(*issue, env={"AUTHSVC_CLIENT_SECRET_FILE": str(file)})
    file.unlink()
    shell(*issue, "--client-secret-stdin", stdin=secret[:-1] + "?", code=Exit.REFUSED)
    shell("client", "show", client_id)
    shell("client", "list", "--json")
    revoke = ("token", "revoke", "--client-id", client_id)
    shell(*revoke, stdin=token, env={"AUTHSVC_CLIENT_SECRET": secret})
    shell("token", "validate", stdin=token, code=Exit.NOT_ACTIVE)

    assert secret not in "".join(shell.printed[printed:])
    assert secret not in " ".join(shell.argv)
    assert secret not in Path(f"/proc/{running.process.pid}/cmdline").read_text()
    for path in shell.home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content, path
            assert token.encode() not in content, path


# --- the server ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_server_with_0_and_leaves_nothing(
    alone: Shell, number: signal.Signals
) -> None:
    (alone.home / "ready.json").write_text("of a server that was killed")
    with serving(alone, *ANY_PORTS) as running:
        while running.ready_file.exists() and running.process.poll() is None:
            if running.ready_file.read_text().startswith("{"):
                break
            time.sleep(0.02)
        assert running.ready()["pid"] == running.process.pid
        running.process.send_signal(number)
        assert running.process.wait(START_S) == 0, running.log.read_text()
        with pytest.raises(ProcessLookupError):
            os.killpg(running.process.pid, 0)
    assert not running.ready_file.exists()
    assert "Traceback" not in running.log.read_text()


def test_second_server_on_the_same_ports_says_so(server: tuple[Shell, Running]) -> None:
    shell, running = server
    where = running.ready()
    text = shell("serve", "--metrics-port", str(where["metrics_port"]), code=Exit.USAGE)
    assert f"cannot listen on 127.0.0.1:{where['metrics_port']}" in text
    assert "--metrics-port" in text
    again = ("serve", "--metrics-port", "0", "--health-port", "0", "--port", str(where["port"]))
    assert f"cannot listen on {where['address']}" in shell(*again, code=Exit.USAGE)


def test_broken_settings_are_named_and_their_secrets_not(alone: Shell) -> None:
    file = alone.home / "authsvc.toml"
    file.write_text(
        'issuer = "http://plain"\nseal_keys = "0123secret"\ncolour = 1\n[listen]\nport = 70000\n'
        '[database]\nurl = ["postgresql+asyncpg://u:hunter2@db/x"]\n'
    )
    text = alone("serve", "--config", str(file), code=Exit.USAGE)
    for key in ("issuer", "seal_keys", "colour", "listen.port", "database.url", str(file)):
        assert key in text
    assert "0123secret" not in text
    assert "hunter2" not in text
    text = alone("migrate", env={"AUTHSVC_SEAL_KEYS": "hunter2"}, code=Exit.USAGE)
    assert "AUTHSVC_SEAL_KEYS" in text
    assert "hunter2" not in text
    file.write_text("issuer = [")
    assert str(file) in alone("serve", "--config", str(file), code=Exit.USAGE)
    missing = {"AUTHSVC_CONFIG": str(alone.home / "none.toml")}
    assert "none.toml: cannot be read" in alone("migrate", env=missing, code=Exit.USAGE)
    url = {"AUTHSVC_DATABASE__URL": "mysql://u:hunter2@db/x"}
    text = alone("migrate", env=url, code=Exit.USAGE)
    assert "database.url" in text
    assert "hunter2" not in text


def test_flag_goes_before_environment_before_file(alone: Shell) -> None:
    file = alone.home / "authsvc.toml"
    file.write_text('log_level = "loud"\nstate_dir = "/from/file"\n')
    env = {"AUTHSVC_CONFIG": str(file), "AUTHSVC_LOG_LEVEL": "info"}
    env["AUTHSVC_STATE_DIR"] = str(alone.home / "environment")
    text = alone("migrate", "--check", env=env, code=Exit.REFUSED)
    assert "environment/authsvc.db" in alone.printed[-2]
    flag = ("migrate", "--check", "--state-dir", str(alone.home / "flag"))
    alone(*flag, env=env, code=Exit.REFUSED)
    assert "flag/authsvc.db" in alone.printed[-2]
    assert "authsvc migrate" in text


def test_migrate_tells_what_it_finds_and_does(alone: Shell) -> None:
    file = alone.home / "x.db"
    secret = alone.home / "url"
    secret.write_text(f"sqlite+aiosqlite:///{file}\n")
    env = {"AUTHSVC_DATABASE__URL_FILE": str(secret)}

    def migrate(*arguments: str, code: int = 0) -> Any:
        alone("migrate", "--json", *arguments, env=env, code=code)
        return json.loads(alone.printed[-2])

    assert migrate("--check", code=3)["found"] == "empty"
    assert not file.exists()
    assert migrate() == {
        "database": f"sqlite+aiosqlite:///{file}",
        "found": "empty",
        "done": "migrated",
    }
    assert migrate("--check")["found"] == "current"
    assert migrate()["done"] == "nothing"


def test_unknown_schema_is_refused_and_left_alone(alone: Shell) -> None:
    file = alone.home / "other.db"
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    env = {"AUTHSVC_DATABASE__URL": f"sqlite+aiosqlite:///{file}"}
    assert "nothing was changed" in alone("migrate", env=env, code=Exit.CONFLICT)
    assert "unknown" in alone("serve", *ANY_PORTS, env=env, code=Exit.USAGE)
    connection = sqlite3.connect(file)
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    connection.close()
    assert tables == [("theirs",)]


def test_database_that_is_away_is_unavailable(alone: Shell) -> None:
    env = {"AUTHSVC_DATABASE__URL": "postgresql+asyncpg://u:hunter2@127.0.0.1:1/x"}
    text = alone("serve", *ANY_PORTS, env=env, code=Exit.UNAVAILABLE)
    assert "STORE_UNAVAILABLE" in text
    assert "hunter2" not in text


# Signing keys


def test_key_from_its_making_to_its_taint(shell: Shell) -> None:
    [current] = shell.json("key", "list")["signing_keys"]
    assert current["state"] == "SIGNING_KEY_STATE_CURRENT"
    made = shell.json("key", "prepare", "--alg", "EdDSA")["signing_key"]
    kid = made["kid"]
    assert (made["alg"], made["state"]) == ("EdDSA", "SIGNING_KEY_STATE_NEXT")
    assert "(SIGNING_KEY_STATE_CONFLICT)" in shell("key", "prepare", code=Exit.CONFLICT)
    early = shell.json("key", "activate", kid, code=Exit.CONFLICT)
    assert early["reason"] == "SIGNING_KEY_NOT_READY"
    assert 0 < early["retry_after_seconds"] <= 360
    assert "(SIGNING_KEY_NOT_FOUND)" in shell("key", "retire", "nobody", code=Exit.NOT_FOUND)
    dry = shell.json("key", "taint", current["kid"], "--dry-run")
    assert (dry["revision"], dry["current_signing_key"]["kid"]) == ("0", kid)
    assert shell("key", "taint", kid, "--dry-run").split()[:4] == ["kid", kid, "state", "tainted"]
    assert "tainted" not in shell("key", "list")
    done = shell.json("key", "taint", kid, "--yes", "--comment", "found in a log")
    assert int(done["revision"]) > 0
    assert done["current_signing_key"]["kid"] == current["kid"]
    assert shell.json("key", "taint", kid, "--yes")["revision"] == "0"
    retired = shell.json("key", "prepare")["signing_key"]["kid"]
    assert shell("key", "retire", retired).split()[:4] == ["kid", retired, "state", "retired"]
    rows = [line.split() for line in shell("key", "list").splitlines()]
    assert rows[0] == ["KID", "STATE", "ALG", "MADE", "SINCE"]
    assert [row[:3] for row in rows[1:]] == [
        [retired, "retired", "ES256"],
        [kid, "tainted", "EdDSA"],
        [current["kid"], "current", "ES256"],
    ]
