"""`authsvc revoke`: every marker, what would die told first, and nobody asked who is not there."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import jwt
import pytest

from authsvc import pki
from authsvc.cli.output import Exit
from authsvc.rpc.peer import x5t_s256
from authsvc_client import Certificates, sync_channel
from authsvc_client.v1 import auth_pb2, revocations_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from tests.test_cli import ANY_PORTS, START_S, Running, Shell, serving

NOBODY: Final = "nobody is there to be asked"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Running]]:
    """A server of its own: the tests of others lose no token."""
    shell = Shell(tmp_path_factory.mktemp("revoke"))
    with serving(shell, *ANY_PORTS) as running:
        shell.address = running.ready()["address"]
        yield shell, running


@pytest.fixture
def shell(server: tuple[Shell, Running]) -> Shell:
    return server[0]


@pytest.fixture(scope="module")
def orders(server: tuple[Shell, Running]) -> str:
    """An approved client, with a certificate."""
    shell = server[0]
    shell("pki", "issue", "orders")
    uri = "spiffe://authsvc.local/orders"
    register = ("client", "register", "--name", "orders", "--san-uri", uri, "--scope", "validate")
    client_id = shell(*register, "--quiet").strip()
    shell("client", "approve", client_id)
    return client_id


def token(shell: Shell, client_id: str) -> str:
    """Not by the command line: a process for each takes long."""
    request = auth_pb2.IssueTokenRequest(client_id=client_id)
    request.client_credentials.SetInParent()
    with calling(shell, "orders") as service:
        return str(service.IssueToken(request, timeout=START_S).token.access_token)


def is_active(shell: Shell, value: str) -> bool:
    certificate = pki.read(shell.state_dir / "pki" / "orders.pem")
    request = auth_pb2.ValidateTokenRequest(token=value)
    request.presenter.certificate_thumbprint = x5t_s256(certificate)
    request.consistency.strong.SetInParent()
    with calling(shell, "admin") as service:
        return bool(service.ValidateToken(request, timeout=START_S).active)


def identity(value: str) -> str:
    return str(jwt.decode(value, options={"verify_signature": False})["jti"])


@contextmanager
def calling(shell: Shell, name: str) -> Iterator[AuthServiceStub]:
    directory = shell.state_dir / "pki"
    files = (directory / each for each in ("ca.pem", f"{name}.pem", f"{name}-key.pem"))
    with sync_channel(shell.address, Certificates.from_files(*files)) as channel:
        yield AuthServiceStub(channel)


def typed(shell: Shell, answer: str, *arguments: str) -> tuple[int, str]:
    """How a command ends that asks on a terminal, and what it printed there."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "authsvc", *arguments],
            env=shell.environment({"TERM": "dumb"}),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        theirs = -1
        printed = ""
        try:
            while "[y/N]:" not in printed:
                printed += os.read(ours, 65536).decode()
            os.write(ours, f"{answer}\n".encode())
            while chunk := os.read(ours, 65536):
                printed += chunk.decode()
        except OSError:  # it has ended: so does a terminal
            pass
        return process.wait(60), printed
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_each_marker_is_rehearsed_and_then_set(shell: Shell, orders: str) -> None:
    kinds = {
        ("everything",): "CUTOFF_EVERYTHING",
        ("client", orders): "CUTOFF_CLIENT",
        ("subject", orders): "CUTOFF_SUBJECT",
        ("subject-client", orders, orders): "CUTOFF_SUBJECT_CLIENT",
        ("session", "lost"): "SESSION_DEAD",
        ("grant", "lost"): "GRANT_DEAD",
    }
    for what, kind in kinds.items():
        alive = token(shell, orders)
        would = shell.json("revoke", *what, "--dry-run")
        assert (would["revision"], would["impact"]["kind"]) == ("0", f"MARKER_KIND_{kind}")
        assert is_active(shell, alive)
        done = shell.json("revoke", *what, "--yes", "--comment", "stolen")
        assert int(done["revision"]) > 0
        assert done["impact"] == would["impact"]
        assert is_active(shell, alive) is (what[1:] == ("lost",)), what
    services = revocations_pb2.DESCRIPTOR.services_by_name
    assert len(kinds) == len(services["RevocationService"].methods)
    assert "dead before" in _notes(shell, "revoke", "grant", "lost", "--yes")
    for name, reason in (("client", "CLIENT_NOT_FOUND"), ("subject", "SUBJECT_NOT_FOUND")):
        failure = shell.json("revoke", name, "nobody", "--dry-run", code=Exit.NOT_FOUND)
        assert failure["reason"] == reason
    rows = shell.json("audit", "list", "--action", "RevokeClient")["audit_events"]
    assert [row["comment"] for row in rows] == ["stolen"]


def _notes(shell: Shell, *arguments: str) -> str:
    shell(*arguments)
    return shell.printed[-1]


def test_one_token_is_revoked_by_itself_and_by_its_identity(shell: Shell, orders: str) -> None:
    value = token(shell, orders)
    jti = identity(value)
    text = shell("revoke", "token", "--as", "orders", "--dry-run", stdin=value)
    assert text.split() == ["would", "die", "token", jti]
    assert is_active(shell, value)
    assert NOBODY in shell("revoke", "token", "--as", "orders", stdin=value, code=Exit.USAGE)
    assert is_active(shell, value)
    done = shell.json("revoke", "token", "--as", "orders", "--yes", stdin=value)
    assert done["revoked"][0]["id"] == jti
    assert not is_active(shell, value)
    assert "nothing to revoke" in shell("revoke", "token", "--yes", stdin="unknown")
    other = token(shell, orders)
    jti = identity(other)
    shell("revoke", "token", "--jti", jti, "--as", "orders", "--yes", code=Exit.REFUSED)
    assert shell("revoke", "token", "--jti", jti, "--yes").startswith("dead\n")
    assert not is_active(shell, other)


def test_tokens_of_a_signing_key_die_and_another_one_signs(shell: Shell, orders: str) -> None:
    def current() -> str:
        keys: Any = shell.json("key", "list")["signing_keys"]
        return str(next(k["kid"] for k in keys if k["state"] == "SIGNING_KEY_STATE_CURRENT"))

    for command in (("revoke", "signing-key"), ("key", "taint")):
        kid, value = current(), token(shell, orders)
        assert "would sign" in shell(*command, kid, "--dry-run")
        assert shell("key", "show", kid).split()[:4] == ["kid", kid, "state", "current"]
        assert NOBODY in shell(*command, kid, code=Exit.USAGE)
        assert is_active(shell, value)
        done = shell.json(*command, kid, "--yes", "--comment", "found in a log")
        assert done["current_signing_key"]["kid"] == current() != kid
        assert not is_active(shell, value)
        shown = shell.json("key", "show", kid)["signing_key"]
        assert shown["state"] == "SIGNING_KEY_STATE_TAINTED"
    failure = shell.json("key", "show", "nobody", code=Exit.NOT_FOUND)
    assert failure["reason"] == "SIGNING_KEY_NOT_FOUND"


def test_nobody_is_asked_who_is_not_there(shell: Shell, orders: str) -> None:
    alive = token(shell, orders)
    head = shell.json("revoke", "grant", "another", "--yes")["revision"]
    for arguments in (("everything",), ("client", orders)):
        text = shell("revoke", *arguments, stdin="y\n", code=Exit.USAGE)
        assert NOBODY in text
        assert "--dry-run" in text
        assert "--yes" in text
    failure = shell.json("revoke", "everything", code=Exit.USAGE)
    assert failure["message"] == NOBODY
    assert is_active(shell, alive)
    after = shell.json("revoke", "grant", "yet another", "--yes")["revision"]
    assert int(after) == int(head) + 1


def test_person_sees_what_would_die_and_is_asked(shell: Shell, orders: str) -> None:
    alive = token(shell, orders)
    for answer in ("", "nonsense\nn"):
        code, printed = typed(shell, answer, "revoke", "client", orders)
        assert code == Exit.FAILED
        told = printed.index("would die")
        assert told < printed.index("api keys") < printed.index(f"issued to client {orders}? [y/N]")
        assert "Nothing was changed." in printed
        assert is_active(shell, alive)
    code, printed = typed(shell, "y", "revoke", "client", orders)
    assert code == Exit.OK
    assert printed.index("[y/N]") < printed.index("dead\r\n") < printed.index("revision")
    assert not is_active(shell, alive)


def test_programs_never_wait_for_an_answer(shell: Shell, orders: str) -> None:
    """--json on a terminal asks nobody either."""
    ours, theirs = pty.openpty()
    try:
        done: Any = subprocess.run(
            [sys.executable, "-m", "authsvc", "revoke", "client", orders, "--json"],
            env=shell.environment(),
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == Exit.USAGE
    assert json.loads(done.stderr)["message"] == NOBODY
