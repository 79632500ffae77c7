"""`authsvc apply` and `authsvc export`: what files may say, and what a real server makes of it."""

import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import ECKey

from authsvc.apply import FIELDS, Declared, Kind, Refused, Type
from authsvc.cli import apply, calls
from authsvc.cli.calls import Session
from authsvc.cli.declared import ENUMS, choices, dump, read
from authsvc.cli.output import Exit
from authsvc_client.v1 import clients_pb2, resources_pb2, roles_pb2
from tests.test_cli import ANY_PORTS, START_S, Shell, serving
from tests.test_cli_people import Inside

CHANGES: Final = 2
SECRET_HEAD: Final = "asvc_cs_"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A server, and a person beside it."""
    shell = Inside(tmp_path_factory.mktemp("declared"))
    with serving(shell, *ANY_PORTS) as running:
        shell.address = running.ready()["address"]
        yield shell


@pytest.fixture
def shell(server: Shell) -> Shell:
    server.printed.clear()
    return server


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory of declarations."""

    def make(**texts: str) -> Path:
        directory = tmp_path / "declared"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name, text in texts.items():
            (directory / f"{name}.yaml").write_text(text)
        return directory

    return make


def dry(shell: Shell, directory: Path, code: int = 0) -> str:
    """The difference, as a person reads it."""
    shell("apply", "-f", str(directory), "--dry-run", code=code)
    return shell.printed[-2]


def differences(told: str) -> list[str]:
    return [line for line in told.splitlines() if line.startswith(("+", "~", "!"))]


def applied(shell: Shell, directory: Path, *more: str) -> str:
    return shell("apply", "-f", str(directory), "--yes", *more)


def exported(shell: Shell) -> Any:
    return yaml.safe_load(shell("export"))


def client_of(shell: Shell, name: str) -> Any:
    (found,) = (
        each
        for each in shell.json("client", "list")["clients"]
        if each["metadata"]["client_name"] == name
    )
    return found


# --- the whole way ---


def whole() -> str:
    """Every field that this version of the server takes."""
    key = ECKey.generate_key("P-256", {"kid": "k", "alg": "ES256", "use": "sig"})
    jwks = json.dumps({"keys": [key.as_dict(private=False)]})
    jwk = json.dumps(
        ECKey.import_key(ec.generate_private_key(ec.SECP256R1())).as_dict(private=False)
    )
    return f"""
resources:
- resource_id: https://billing.test
  display_name: 'yes'
  owner: billing
  scopes:
  - {{name: bills.read, description: "Reads: bills"}}
  - name: bills.write
  token_format: opaque
  token_lifetime: 600s
  staleness_max: 1m
  freeze_permissions: true
  permissions:
  - {{name: bills.pay, description: Pays}}
  - name: bills.void
- resource_id: urn:sealed
  token_format: jwe
  token_lifetime: 1h
  encryption_jwk: '{jwk}'
permissions:
- {{resource_id: 'https://authsvc.local', name: look}}
clients:
- client_name: billing
  tls_client_auth_san_uri: spiffe://authsvc.local/billing
  scopes: [validate]
  may_act: spiffe://authsvc.local/orders
- client_name: orders
  tls_client_auth_san_uri: spiffe://authsvc.local/orders
  tls_client_certificate_bound_access_tokens: false
  grant_types: [token_exchange, client_credentials]
  scopes: [bills.write, bills.read]
  validates: ['*', urn:sealed]
  may_act: billing
  contacts: [z@test, a@test]
  client_uri: https://orders.test
  logo_uri: https://orders.test/logo
  policy_uri: https://orders.test/policy
  tos_uri: https://orders.test/terms
  software_id: "null"
  software_version: 1.10
  first_party: true
  approval_expire_time: 2126-01-01T00:00:00Z
- client_name: signer
  token_endpoint_auth_methods: [private_key_jwt, client_secret_basic]
  jwks: '{jwks}'
- client_name: named
  tls_client_auth_san_dns: Named.Test
  approval_expire_time: 2127-01-01T00:00:00Z
- client_name: subject
  tls_client_auth_subject_dn: O=test,CN=subject
  token_endpoint_auth_methods: [tls_client_auth, api_key]
roles:
- role_id: payer
  display_name: Payer
  description: Pays bills
  permissions:
  - {{resource_id: 'https://billing.test', name: bills.void}}
  - {{resource_id: 'https://billing.test', name: bills.pay}}
- role_id: nothing
assignments:
- {{role_id: payer, client: orders, resource_id: 'https://billing.test'}}
- {{role_id: payer, client: signer}}
- {{role_id: payer, user: Ada}}
- {{role_id: nothing, user: ada, resource_id: 'https://billing.test'}}
"""


def test_what_is_exported_makes_an_empty_server_the_same(
    shell: Shell, files: Callable[..., Path], tmp_path: Path
) -> None:
    directory, secrets = files(all=whole()), tmp_path / "secrets"
    shell("user", "create", "ada")
    told = applied(shell, directory, "--secrets-dir", str(secrets))
    assert "+ client      orders (spiffe://authsvc.local/orders)" in told
    assert "nothing to do" not in shell.printed[-1]
    assert not differences(dry(shell, directory))  # the second run finds nothing
    assert "nothing to do" in shell.printed[-1]

    once = tmp_path / "once"
    shell("export", "-o", str(once))
    assert not differences(dry(shell, once))
    sections = ("assignments", "clients", "permissions", "resources", "roles")
    assert sorted(file.stem for file in once.iterdir()) == list(sections)
    text = shell("export")
    assert yaml.safe_load(text) == {
        section: objects
        for file in once.iterdir()
        for section, objects in yaml.safe_load(file.read_text()).items()
    }
    assert json.loads(shell("export", "--json")) == yaml.safe_load(text)
    for word in (
        SECRET_HEAD,
        "etag",
        "client_id",
        "create_time",
        "user_id",
        "token_lifetime: 300s",
    ):
        assert word not in text

    other = Inside(tmp_path / "other")
    (other.state_dir / "pki").parent.mkdir(parents=True)
    shutil.copytree(shell.state_dir / "pki", other.state_dir / "pki")
    config = other.home / "authsvc.toml"
    config.write_text("[registration]\napprove = true\n")  # some of them, at once
    with serving(other, "--config", str(config), *ANY_PORTS) as running:
        other.address = running.ready()["address"]
        other("user", "create", "ADA")
        applied(other, once, "--secrets-dir", str(tmp_path / "others"))
        assert other("export") == text.replace("user: ada", "user: ADA")
        assert dry(other, once) == ""


# --- the difference ---

SMALL: Final = """
resources:
- {resource_id: 'https://small.test', scopes: [{name: small.read}]}
clients:
- {client_name: small, tls_client_auth_san_uri: spiffe://authsvc.local/small, scopes: [small.read]}
roles:
- {role_id: small}
assignments:
- {role_id: small, client: small}
"""


def test_difference_is_told_field_by_field_and_exit_codes_say_whether_there_is_one(
    shell: Shell, files: Callable[..., Path]
) -> None:
    directory = files(small=SMALL)
    before = exported(shell)
    told = dry(shell, directory, CHANGES)
    assert exported(shell) == before
    assert "+ client      small (spiffe://authsvc.local/small)\n" in told
    document = shell.json("apply", "-f", str(directory), "--yes")
    assert (document["applied"], len(document["changes"])) == (5, 4)
    dry(shell, directory)

    changed = SMALL.replace("{role_id: small}", "{role_id: small, description: Little}")
    changed = changed.replace("scopes: [small.read]}", "scopes: [small.write]}")
    changed = changed.replace("[{name: small.read}]", "[{name: small.write}], owner: small")
    told = dry(shell, files(small=changed.partition("assignments")[0]), CHANGES)
    for line in (
        "~ resource    https://small.test\n",
        "      owner: (none) -> small (spiffe://authsvc.local/small)\n",
        "      scopes: + small.write, - small.read\n",
        "~ client      small (spiffe://authsvc.local/small)  (its tokens are cut off)\n",
        "~ role        small\n",
        "      description: (none) -> Little\n",
        "not listed, left alone:\n",
        "  assignment  small to client small (spiffe://authsvc.local/small)\n",
    ):
        assert line in told
    file = directory / "small.yaml"
    applied(shell, file)
    client = client_of(shell, "small")
    assert client["metadata"]["scopes"] == ["small.write"]
    shell("client", "suspend", client["client_id"])
    told = "! client      small (spiffe://authsvc.local/small): it is suspended, and left as it is"
    assert differences(dry(shell, file)) == [told]
    assert "but for what is told with !" in shell.printed[-1]
    shell("client", "resume", client["client_id"])
    assert {"role_id": "small", "client": "small"} in exported(shell)["assignments"]


def test_nothing_is_changed_where_anything_is_wrong(
    shell: Shell, files: Callable[..., Path]
) -> None:
    directory = files(
        a="roles: [{role_id: fine}]",
        b="assignments:\n- {role_id: fine, user: nobody}\n- {role_id: nope, client: nobody}\n",
    )
    before = exported(shell)
    apply_it = ("apply", "-f", str(directory), "--yes")
    failure = shell.json(*apply_it, code=Exit.FAILED)
    assert failure["violations"] == [
        {"field": "b.yaml:2", "description": "no such user: nobody"},
        {"field": "b.yaml:3", "description": "no such role: nope"},
        {"field": "b.yaml:3", "description": "client: no such client: nobody"},
    ]
    assert "3 problems, nothing was changed" in shell(*apply_it, code=Exit.FAILED)
    assert exported(shell) == before
    empty = files()
    assert "has no *.yaml" in shell("apply", "-f", str(empty), code=Exit.NOT_FOUND)
    shell("apply", "-f", str(empty / "none.yaml"), code=Exit.NOT_FOUND)
    shell.json("apply", "-f", str(directory), code=Exit.USAGE)  # --json asks nobody


# --- secrets ---

SECRET: Final = "clients:\n- {client_name: %s, scopes: [validate]}\n"


def test_secrets_go_to_files_of_their_own_and_nowhere_else(
    shell: Shell, files: Callable[..., Path], tmp_path: Path
) -> None:
    directory, secrets = files(a=SECRET % "backup"), tmp_path / "new" / "secrets"
    assert "a secret" in shell("apply", "-f", str(directory), "--yes", code=Exit.FAILED)
    assert not any(each["client_name"] == "backup" for each in exported(shell)["clients"])
    dry(shell, directory, CHANGES)
    assert "--secrets-dir" in shell.printed[-1]
    applied(shell, directory, "--secrets-dir", str(secrets))
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    client_id = client_of(shell, "backup")["client_id"]
    found = {file.name: file.read_text() for file in secrets.iterdir()}
    assert sorted(found) == [f"backup-{client_id}.secret", f"backup-{client_id}.token"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o600}
    printed = "".join(shell.printed)
    assert not any(text.strip() in printed for text in found.values())
    given_file = {"AUTHSVC_CLIENT_SECRET_FILE": str(secrets / f"backup-{client_id}.secret")}
    shell("token", "issue", "--client-id", client_id, env=given_file)
    shell("own-client", "show", "--token", str(secrets / f"backup-{client_id}.token"))

    shell("client", "delete", client_id)
    applied(shell, directory, "--secrets-dir", str(secrets))
    assert {name: (secrets / name).read_text() for name in found} == found


def test_names_of_clients_are_safe_as_names_of_files(
    shell: Shell, files: Callable[..., Path], tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    names = ("../evil", "a/b", "a b", ".hidden", "日本")
    text = "clients:\n" + "".join(f"- client_name: '{name}'\n" for name in names)
    applied(shell, files(a=text), "--secrets-dir", str(secrets))
    found = [file.name for file in secrets.iterdir()]
    assert len(found) == 2 * len(names)
    assert not any(name.startswith(".") for name in found)
    assert not list(tmp_path.glob("evil*"))


def test_a_client_that_waits_gets_a_secret_unless_a_stopped_run_kept_one(
    shell: Shell, files: Callable[..., Path], tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    register = ("client", "register", "--name", "waits", "--scope", "validate")
    lost = shell.json(*register)["client_secret"]
    directory = files(a=SECRET % "waits")
    shell("apply", "-f", str(directory), "--yes", code=Exit.FAILED)
    applied(shell, directory, "--secrets-dir", str(secrets))
    client = client_of(shell, "waits")
    assert client["state"] == "CLIENT_STATE_APPROVED"
    issue = ("token", "issue", "--client-id", client["client_id"], "--client-secret-stdin")
    shell(*issue, stdin=lost, code=Exit.REFUSED)
    kept = (secrets / f"waits-{client['client_id']}.secret").read_text()
    shell(*issue, stdin=kept)

    shell("client", "delete", client["client_id"])
    registered = shell.json(*register)
    kept, client_id = registered["client_secret"], registered["client"]["client_id"]
    (secrets / f"waits-{client_id}.secret").write_text(kept)
    applied(shell, directory, "--secrets-dir", str(secrets))
    shell("token", "issue", "--client-id", client_id, "--client-secret-stdin", stdin=kept)


def test_nobody_gets_an_approval_by_registering_first_under_a_name(
    shell: Shell, files: Callable[..., Path], tmp_path: Path
) -> None:
    create = ("registration-token", "create", "--expires-in", "1h", "-q")
    token = shell(*create).split()[1]
    register = ("client", "register", "--name", "coveted", "--initial-access-token", "-")
    shell(*register, stdin=token)
    asked = ("apply", "-f", str(files(a=SECRET % "coveted")), "--yes")
    failure = shell.json(*asked, "--secrets-dir", str(tmp_path / "s"), code=Exit.FAILED)
    assert "was registered by initial access token" in failure["violations"][0]["description"]
    assert client_of(shell, "coveted")["state"] == "CLIENT_STATE_PENDING"


# --- what goes wrong half-way ---


def test_who_is_asked_may_refuse(shell: Shell, files: Callable[..., Path]) -> None:
    directory = files(a="roles: [{role_id: asked}]")
    code, told = _answered(shell, directory, "n")
    assert code == Exit.FAILED
    assert "nothing was changed" in told
    dry(shell, directory, CHANGES)
    assert _answered(shell, directory, "y")[0] == Exit.OK
    dry(shell, directory)
    nobody = shell("apply", "-f", str(files(a="roles: [{role_id: other}]")), code=Exit.FAILED)
    assert "--yes" in nobody


RACED: Final = "{client_name: raced, tls_client_auth_san_uri: 'spiffe://authsvc.local/raced'"


@pytest.mark.parametrize(
    ("kind", "text", "field"),
    [
        ("resource", "resources: [{resource_id: 'urn:raced', display_name: %s}]", "--name"),
        ("role", "roles: [{role_id: raced, display_name: %s}]", "--display-name"),
        (
            "client",
            f"clients: [{RACED}, client_uri: %s}}]",
            "--client-uri",
        ),
    ],
)
def test_what_changed_since_it_was_told_is_not_overwritten(
    shell: Shell, files: Callable[..., Path], kind: str, text: str, field: str
) -> None:
    applied(shell, files(a=text % "one"))
    directory = files(a=text % "two")

    def meanwhile() -> None:
        id_ = {"resource": "urn:raced", "role": "raced"}.get(kind)
        id_ = id_ or client_of(shell, "raced")["client_id"]
        shell(kind, "update", id_, field, "three")

    code, told = _answered(shell, directory, "y", meanwhile)
    assert code == Exit.CONFLICT
    for part in (f"{kind} ", "ETAG_MISMATCH", "0 of 1 steps were done", "run again"):
        assert part in told
    assert "three -> two" in dry(shell, directory, CHANGES)


def _answered(
    shell: Shell, directory: Path, answer: str, meanwhile: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """On a terminal: how it ends, and all that it tells."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "authsvc", "apply", "-f", str(directory)]
    process = subprocess.Popen(
        command, env=shell.environment(), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    told = b""
    try:
        while b"[y/N]" not in told:
            told += os.read(ours, 65536)
        meanwhile()
        os.write(ours, answer.encode() + b"\n")
        code = process.wait(START_S)
        told += os.read(ours, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return code, told.decode()


def test_what_the_server_refuses_ends_the_run_and_the_next_one_finishes_it(
    shell: Shell, files: Callable[..., Path]
) -> None:
    text = "resources:\n- resource_id: urn:before\n- resource_id: urn:then\n  token_lifetime: %s\n"
    failure = shell.json("apply", "-f", str(files(a=text % "1s")), "--yes", code=Exit.USAGE)
    assert failure["reason"] == "FIELD_INVALID"
    assert "resource urn:then" in failure["message"]
    assert "1 of 2 steps were done" in failure["message"]
    assert "+ resource    urn:then\n" in applied(shell, files(a=text % "1m"))
    assert not differences(dry(shell, files(a=text % "1m")))


def test_a_run_that_is_killed_is_finished_by_the_next_without_doing_anything_twice(
    shell: Shell, files: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of clients, and each kind of list read once a run."""
    number = 60
    monkeypatch.setattr(calls, "PAGE_SIZE_MAX", number // 3)
    text = "clients:\n" + "".join(
        f"- client_name: many{at}\n"
        f"  tls_client_auth_san_uri: spiffe://authsvc.local/many{at}\n"
        + (f"  may_act: many{(at + 1) % 5}\n" if at < 5 else "")
        for at in range(number)
    )
    directory, secrets = files(many=text), tmp_path / "secrets"
    command = [sys.executable, "-m", "authsvc", "apply", "--yes", "-f", str(directory)]
    process = subprocess.Popen(
        [*command, "--secrets-dir", str(secrets)],
        env=shell.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_S
    while not secrets.exists() or len(list(secrets.iterdir())) < number // 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert client_of(shell, "many0")["state"] == "CLIENT_STATE_PENDING"

    read: list[str] = []
    pages = Session.pages

    def counted(self: Session, method: Any, request: Any, field: str, limit: int) -> Any:
        read.append(field)
        return pages(self, method, request, field, limit)

    monkeypatch.setattr(Session, "pages", counted)
    applied(shell, directory)
    assert sorted(read) == ["clients", "permissions", "resources", "role_assignments", "roles"]
    dry(shell, directory)
    there = shell.json("client", "list")["clients"]
    many = [each for each in there if each["metadata"]["client_name"].startswith("many")]
    assert len(many) == number
    assert {each["state"] for each in many} == {"CLIENT_STATE_APPROVED"}
    assert sum(bool(each["metadata"]["may_act"]) for each in many) == 5
    told = dry(shell, files(none="roles: []"))
    assert f"and {len(there) - apply.SHOWN} more" in told


# --- what is exported ---


def test_who_is_not_let_in_is_left_out_and_who_cannot_be_told_apart_is_told(
    shell: Shell, tmp_path: Path
) -> None:
    register = ("client", "register", "--scope", "validate", "-q", "--name")
    waiting = shell(*register, "waiting").split()[0]
    shell("role", "create", "awaited")
    shell("role", "assign", "awaited", "--client", waiting)
    twins = [shell(*register, "twin").split()[0] for _ in range(2)]
    for client_id in twins:
        shell("client", "approve", client_id)
    found = exported(shell)
    assert "not let in, left out: " in shell.printed[-1]
    assert "2 clients are called twin: apply cannot tell them apart" in shell.printed[-1]
    assert not any(each["client_name"] == "waiting" for each in found["clients"])
    assert not any(each["role_id"] == "awaited" for each in found["assignments"])
    shell("export", "-o", str(tmp_path))
    failure = shell.json("apply", "-f", str(tmp_path), "--dry-run", code=Exit.FAILED)
    assert {each["field"].partition(":")[0] for each in failure["violations"]} == {"clients.yaml"}
    for client_id in twins:
        shell("client", "delete", client_id)


# --- YAML ---


@pytest.fixture(params=["C", "Python"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's: one of them is missing where it was built without libyaml."""
    if request.param == "Python":
        monkeypatch.delattr(yaml, "CSafeLoader")
        monkeypatch.delattr(yaml, "CSafeDumper")
    assert hasattr(yaml, "CSafeLoader") is (request.param == "C")


def declared_in(text: str | bytes, directory: Path) -> list[Declared]:
    file = directory / "a.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(file)


def clients(fields: str) -> str:
    return f"clients:\n- client_name: a\n  {fields}\n"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("resources:\n- {a: b\n", 3, "is no YAML: "),
        ("a: b: c", 1, "is no YAML: mapping values are not allowed"),
        ("resources: []\n---\nroles: []\n", 3, "a second document"),
        ("- a", 1, "a file must have fields"),
        ("just text", 1, "a file must have fields"),
        ("users: []", 1, "a file has no field users"),
        ("roles: {}", 1, "roles: must be a list"),
        ("roles: []\nroles: []", 2, "roles is there twice"),
        ("roles:\n- a", 2, "a role must have fields"),
        ("roles:\n- display_name: a", 2, "a role needs role_id"),
        ("roles:\n- {role_id: ''}", 2, "a role needs role_id"),
        ("? [a]\n: b", 1, "a key must be a text"),
        (clients("colour: red"), 3, "a client has no field colour; there are: "),
        (clients("client_id: x"), 3, "a client has no field client_id"),
        (clients("client_name: b"), 3, "client_name is there twice"),
        (clients("contacts: &x [a]"), 3, "anchors"),
        (clients("contacts: *x"), 3, "a"),
        (clients("jwks: !!python/object:os.system {}"), 3, "tags are not read"),
        (clients("jwks: !!str a"), 3, "tags are not read"),
        (clients("jwks: [a]"), 3, "jwks: must be a text"),
        (clients("jwks: {a: b}"), 3, "jwks: must be a text"),
        (clients("jwks:"), 3, "jwks: has no value"),
        (clients("jwks: ~"), 3, "jwks: has no value"),
        (clients("jwks: null"), 3, "jwks: has no value"),
        (clients("contacts: a"), 3, "contacts: must be a list"),
        (clients("contacts: [a, a]"), 3, "contacts: has an item twice"),
        (clients("scopes: [[a]]"), 3, "scopes: must be a text"),
        (clients("first_party: yes"), 3, "first_party: must be true or false"),
        (clients("first_party: 'true'"), 3, "first_party: must be true or false"),
        (clients("grant_types: [PASSWORD]"), 3, "grant_types: is none of client_credentials, "),
        (clients("token_endpoint_auth_methods: [unspecified]"), 3, "is none of none, "),
        (clients("state: pending"), 3, "a client has no field state"),
        (clients("approval_expire_time: 2030"), 3, "approval_expire_time: "),
        (clients("tls_client_auth_subject_dn: none"), 3, "tls_client_auth_subject_dn: "),
        ("resources:\n- resource_id: x\n  token_lifetime: 5 m", 3, "not a span of time: 5 m"),
        ("resources:\n- resource_id: x\n  token_format: JWT", 3, "is none of jwt, "),
        ("resources:\n- resource_id: x\n  scopes: [a]", 3, "scopes must have fields"),
        ("resources:\n- resource_id: x\n  scopes: [{}]", 3, "scopes: an item needs name"),
        ("resources:\n- resource_id: x\n  scopes: [{nam: a}]", 3, "scopes has no field nam"),
        (
            "resources:\n- resource_id: x\n  scopes:\n  - {name: a}\n  - {name: a, description: b}",
            5,
            "scopes: has an item twice",
        ),
        ("resources:\n- resource_id: x\n  permissions:\n  - {nam: a}", 4, "no field nam"),
        ("resources:\n- resource_id: x\n  permissions:\n  - {}", 4, "a permission needs name"),
        (
            "resources:\n- resource_id: x\n  permissions:\n  - {name: a, resource_id: y}",
            4,
            "a permission has no field resource_id",
        ),
        ("roles:\n- role_id: x\n  permissions: [{name: a}]", 3, "an item needs resource_id"),
        (clients("jwks: " + "[" * 5000 + "]" * 5000), 3, "is nested too deeply"),
        ("roles: [{role_id: \0}]", 0, "characters are not allowed"),
        (b"roles: [{role_id: \xff}]", 0, "is not in UTF-8"),
    ],
)
@pytest.mark.usefixtures("loader")
def test_what_is_no_declaration_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, line: int, problem: str
) -> None:
    with pytest.raises(Refused) as refused:
        declared_in(text, tmp_path)
    found = refused.value.problems[0]
    assert problem in found.text
    if line:
        assert found.place == f"a.yaml:{line}"


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("roles:\n- {role_id: a, b: c}\n- a\nclients: [{}]\n")
    (tmp_path / "b.yml").write_text("roles: [\n")
    (tmp_path / ".c.yaml").write_text("roles: [")
    (tmp_path / "d.txt").write_text("roles: [")
    with pytest.raises(Refused) as refused:
        read(tmp_path)
    places = sorted(problem.place for problem in refused.value.problems)
    assert places == ["a.yaml:2", "a.yaml:3", "a.yaml:4", "b.yml:2"]


@pytest.mark.usefixtures("loader")
def test_a_scalar_is_its_text_and_the_field_says_what_it_is(tmp_path: Path) -> None:
    text = clients("software_version: 1.10\n  software_id: on\n  first_party: true")
    (found,) = declared_in(text, tmp_path)
    assert found.fields == {
        "client_name": "a",
        "software_version": "1.10",
        "software_id": "on",
        "first_party": True,
    }
    assert declared_in("", tmp_path) == declared_in("# nothing\n", tmp_path) == []


def test_identities_are_compared_as_the_server_keeps_them(tmp_path: Path) -> None:
    (dns,) = declared_in(clients("tls_client_auth_san_dns: A.Test"), tmp_path)
    assert dns.fields["tls_client_auth_san_dns"] == "a.test"
    (dn,) = declared_in(clients(r"tls_client_auth_subject_dn: 'O=b,CN=\61'"), tmp_path)
    assert dn.fields["tls_client_auth_subject_dn"] == "O=b,CN=a"


def test_moments_and_spans_are_whole_seconds(tmp_path: Path) -> None:
    for span, seconds in (("90s", "90s"), ("5m", "300s"), ("1h", "3600s"), ("7", "7s")):
        text = f"resources: [{{resource_id: x, token_lifetime: {span}}}]"
        (found,) = declared_in(text, tmp_path)
        assert found.fields["token_lifetime"] == seconds
    for moment in ("2030-01-01T00:00:00Z", "2030-01-01T01:00:00.75+01:00"):
        (found,) = declared_in(clients(f"approval_expire_time: {moment}"), tmp_path)
        assert found.fields["approval_expire_time"] == "2030-01-01T00:00:00Z"


TEXTS: Final = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(name=TEXTS, contacts=st.lists(TEXTS, unique=True), scope=TEXTS)
def test_any_text_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, contacts: list[str], scope: str
) -> None:
    directory = tmp_path_factory.getbasetemp()
    asked = {"client_name": name, "contacts": contacts, "scopes": [scope]}
    defines = {"resource_id": name, "scopes": [{"name": scope, "description": name}]}
    text = dump({"clients": [asked], "resources": [defines]})
    client, resource = declared_in(text, directory)
    assert client.fields == {
        "client_name": name,
        "contacts": tuple(sorted(contacts)),
        "scopes": (scope,),
    }
    assert resource.fields["scopes"] == ((scope, name),)


# --- the contract ---

_OUTPUT_ONLY: Final = {"etag", "create_time", "update_time"}


@pytest.mark.parametrize(
    ("kind", "message", "ids"),
    [
        (Kind.RESOURCE, resources_pb2.Resource, {"resource_id"}),
        (Kind.PERMISSION, roles_pb2.Permission, {"ref"}),
        (Kind.CLIENT, clients_pb2.ClientMetadata, set[str]()),
        (Kind.ROLE, roles_pb2.Role, {"role_id"}),
    ],
)
def test_what_can_be_declared_is_what_the_contract_has(
    kind: Kind, message: Any, ids: set[str]
) -> None:
    ours = set(FIELDS[kind]) - {"owner", "approval_expire_time"}
    ours |= {"owner_client_id"} if "owner" in FIELDS[kind] else set()
    theirs = {field.name for field in message.DESCRIPTOR.fields}
    assert ours == theirs - ids - _OUTPUT_ONLY


def test_names_of_enums_are_the_contracts() -> None:
    assert {type_: len(choices(type_)) for type_ in ENUMS} == {
        Type.TOKEN_FORMAT: len(resources_pb2.TokenFormat.values()) - 1,
        Type.GRANT_TYPES: len(clients_pb2.GrantType.values()) - 1,
        Type.AUTH_METHODS: len(clients_pb2.ClientAuthMethod.values()) - 1,
    }


# --- the example ---


def test_example_can_be_applied(shell: Shell) -> None:
    example = Path(__file__).parents[1] / "examples" / "declared"
    shell("user", "create", "alice")
    applied(shell, example)
    assert not differences(dry(shell, example))
