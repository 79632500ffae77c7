"""The commands about people: users, roles, sessions and the audit, against a real server."""

import csv
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from authsvc.cli import app
from authsvc.cli.output import Exit
from tests.test_cli import ANY_PORTS, RESOURCE, START_S, Shell, serving

PASSWORD: Final = "  correct horse battery "  # spaces belong to it
OTHER: Final = "another staple, and longer"
ISSUER: Final = "https://authsvc.local"
READ, PAY = f"bills.read@{RESOURCE}", f"bills.pay@{RESOURCE}"


class Inside(Shell):
    """Commands in this process, which takes a tenth of the time; the server is real."""

    def __call__(
        self, *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None, code: int = 0
    ) -> str:
        self.argv += arguments
        done = CliRunner().invoke(app, arguments, stdin, self.environment(env))
        self.printed += [done.stdout, done.stderr]
        assert done.exit_code == code, (arguments, done.stdout, done.stderr, done.exception)
        return done.stderr if code not in (Exit.OK, Exit.NOT_ACTIVE) else done.stdout


@dataclass(frozen=True)
class People:
    """A server that takes passwords, one at a time; a first party, and an owner of a resource."""

    shell: Shell
    web: str
    billing: str

    def token(self, username: str, password: str = PASSWORD, *more: str) -> Any:
        """Of a person, by its password."""
        issue = ("token", "issue", "--as", "web", "--client-id", self.web, "--user", username)
        return self.shell.json(*issue, *more, stdin=password + "\n")["token"]

    def validate(self, token: str, *more: str, code: int = 0) -> Any:
        return self.shell.json(
            *("token", "validate", "--as", "billing", *more), stdin=token, code=code
        )

    def create(self, username: str, *more: str) -> str:
        return self.shell("user", "create", username, "-q", *more).strip()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    shell = Inside(tmp_path_factory.mktemp("people"))
    config = shell.home / "authsvc.toml"
    config.write_text("[grants]\npassword = true\n[passwords]\nthreads = 1\nqueue = 0\n")
    with serving(shell, "--config", str(config), *ANY_PORTS) as running:
        shell.address = running.ready()["address"]
        billing = _admit(shell, "billing", "validate")
        shell("resource", "create", RESOURCE, "--owner", billing, "--scope", "bills.read")
        grants = ("--grant", "password", "--grant", "refresh_token", "--first-party", "--unbound")
        web = _admit(shell, "web", "bills.read validate", *grants)
        yield People(shell, web, billing)


def _admit(shell: Shell, name: str, scope: str, *more: str) -> str:
    shell("pki", "issue", name)
    uri = f"spiffe://authsvc.local/{name}"
    register = ("client", "register", "--name", name, "--san-uri", uri, "--scope", scope)
    client_id = shell(*register, *more, "--quiet").strip()
    shell("client", "approve", client_id)
    return client_id


def file(shell: Shell, name: str, text: str) -> str:
    path = shell.home / name
    path.write_text(text)
    return str(path)


# --- users ---


def test_user_from_its_making_to_its_end(people: People) -> None:
    shell = people.shell
    given = ("--display-name", "Ada Lovelace", "--email", "Ada@x.test", "--request-id", "cli-ada-1")
    made = shell.json("user", "create", "ada", *given)["user"]
    assert shell.json("user", "create", "ada", *given)["user"] == made
    user_id = made["user_id"]
    assert made["state"] == "USER_STATE_ACTIVE"
    assert "never" in shell("user", "show", user_id)
    assert "(ALREADY_EXISTS)" in shell("user", "create", "ADA", code=Exit.CONFLICT)

    changed = shell.json("user", "update", user_id, "--display-name", "Ada", "--etag", "1")
    assert int(changed["revision"]) > 0
    kept = ("username", "email", "create_time")
    assert [changed["user"][field] for field in kept] == [made[field] for field in kept]
    shell("user", "update", user_id, "--email", "x@x.test", "--etag", "1", code=Exit.CONFLICT)
    assert shell.json("user", "update", user_id, "--email", "")["user"]["email"] == ""
    assert "nothing to change" in shell("user", "update", user_id, code=Exit.USAGE)

    disabled = shell.json("user", "disable", user_id, "--comment", "left")
    assert disabled["user"]["state"] == "USER_STATE_DISABLED"
    assert "(USER_STATE_CONFLICT)" in shell("user", "disable", user_id, code=Exit.CONFLICT)
    assert user_id in shell("user", "list", "--state", "disabled", "--username", "Ada")
    assert user_id not in shell("user", "list", "--state", "active")
    assert "active" in shell("user", "enable", user_id)

    assert "--yes" in shell("user", "delete", user_id, stdin="y\n", code=Exit.USAGE)
    assert int(shell.json("user", "delete", user_id, "--yes")["revision"]) > 0
    assert "(USER_NOT_FOUND)" in shell("user", "show", user_id, code=Exit.NOT_FOUND)


def test_lists_of_users_are_filtered_and_limited(people: People) -> None:
    shell = people.shell
    ids = {people.create(f"listed{number}", "--email", "list@x.test") for number in range(3)}
    asked = ("user", "list", "--email", "LIST@x.test")
    assert {user["user_id"] for user in shell.json(*asked)["users"]} == ids
    some = shell.json(*asked, "--limit", "2")
    assert len(some["users"]) == 2
    assert some["next_page_token"]
    shell("user", "list", "--username", "nobody")
    assert "no users" in shell.printed[-1]


def test_password_comes_by_any_way_but_an_argument_and_is_never_shown(people: People) -> None:
    shell = people.shell
    code_file = str(shell.home / "code")
    mine = file(shell, "mine", PASSWORD + "\n")
    before = len(shell.printed)
    user_id = people.create("by-file", "--password-file", mine)
    piped = shell("user", "create", "by-pipe", "--password", "-q", stdin=PASSWORD + "\r\n").strip()
    assert people.token("by-file")["access_token"]
    assert people.token("by-pipe")["access_token"]
    stripped = ("--user", "by-file", "--password-file", file(shell, "bad", PASSWORD.strip()))
    issue = ("token", "issue", "--as", "web", "--client-id", people.web)
    assert "(INVALID_GRANT)" in shell(*issue, *stripped, code=Exit.REFUSED)

    shell("user", "set-password", piped, stdin=OTHER + "\n")
    assert people.token("by-pipe", OTHER)["access_token"]
    code = shell("user", "reset-code", user_id, "--lifetime", "5m", "-q").strip()
    told = shell.json("user", "reset-code", user_id)
    shell("user", "reset-password", stdin=f"{code}\n{OTHER}\n", code=Exit.REFUSED)
    Path(code_file).write_text(told["code"])
    by_file = ("--code-file", code_file, "--password-file", file(shell, "new", OTHER))
    assert int(shell.json("user", "reset-password", *by_file)["revision"]) > 0
    shell("user", "reset-password", *by_file, code=Exit.REFUSED)
    fresh = shell.json("user", "reset-code", user_id)["code"]
    short = shell("user", "reset-password", stdin=f"{fresh}\nshort\n", code=Exit.USAGE)
    assert "(PASSWORD_NOT_ACCEPTED)" in short
    shell("user", "reset-password", stdin=f"{fresh}\n{PASSWORD}\n")
    assert people.token("by-file")["access_token"]

    shell("user", "create", "x", "--password", "secret", code=Exit.USAGE)
    for wrong in ("", "two\nlines"):
        both = ("user", "create", "x", "--password-file", file(shell, "wrong", wrong))
        assert "one line" in shell(*both, code=Exit.USAGE)
    printed = "".join(shell.printed[before:])
    for secret in (PASSWORD.strip(), OTHER):
        assert secret not in printed + " ".join(shell.argv)


def test_user_sets_its_own_password_and_keeps_its_session(people: People) -> None:
    shell = people.shell
    user_id = people.create("own", "--password-file", file(shell, "own", PASSWORD))
    other = people.token("own")["access_token"]
    token = people.token("own", PASSWORD, "--resource", ISSUER)["access_token"]
    mine = ("user", "set-password", "--token", file(shell, "token", token), "--keep-session")
    wrong = shell(*mine, stdin=f"{OTHER}\n{OTHER}\n", code=Exit.REFUSED)
    assert "(INVALID_GRANT)" in wrong
    shell(*mine, stdin=f"{PASSWORD}\n{OTHER}\n")
    assert "other sessions" in shell.printed[-1]
    people.validate(other, code=Exit.NOT_ACTIVE)
    (session,) = shell.json("session", "list", "--user", user_id)["sessions"]
    assert session["session_id"] == shell.json("token", "inspect", stdin=token)["claims"]["sid"]
    assert "--token" in shell("user", "set-password", user_id, "--keep-session", code=Exit.USAGE)
    assert "USER_ID" in shell("user", "set-password", code=Exit.USAGE)


# --- at a terminal ---


# For who opens /dev/tty. A `preexec_fn` is none: see `tests.servers.launcher`.
_AT_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Dialogue:
    """A command at a terminal of its own, and a person who answers."""

    def __init__(self, shell: Shell, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, sys.executable, "-m", "authsvc", *arguments],
            env=shell.environment({"TERM": "xterm"}),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen, self._answered = "", 0

    def answer(self, question: str, text: str) -> None:
        """Waits for a question, with the space that comes once nothing is echoed any more."""
        while (at := self.seen.find(f"{question} ", self._answered)) < 0:
            assert self._read(), self.seen
        self._answered = at + len(question)
        os.write(self._ours, text.encode() + b"\n")

    def end(self) -> int:
        """The exit code; all is seen by then."""
        try:
            while self._read():
                pass
            return self._process.wait(START_S)
        finally:
            self._process.kill()  # one that asks what nobody expects
            self._process.wait()
            os.close(self._ours)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._ours], [], [], START_S)
        try:
            found = os.read(self._ours, 65536) if ready else b""
        except OSError:  # it ended
            found = b""
        self.seen += found.decode()
        return bool(found)


def test_new_password_is_asked_for_twice_and_not_shown(people: People) -> None:
    dialogue = Dialogue(people.shell, "user", "create", "typed", "--password")
    dialogue.answer("Password:", PASSWORD)
    dialogue.answer("Repeat for confirmation:", PASSWORD)
    assert dialogue.end() == Exit.OK
    assert PASSWORD.strip() not in dialogue.seen
    issue = ("token", "issue", "--as", "web", "--client-id", people.web, "--user", "typed")
    dialogue = Dialogue(people.shell, *issue)
    dialogue.answer("Password:", PASSWORD)
    assert dialogue.end() == Exit.OK
    assert PASSWORD.strip() not in dialogue.seen
    assert "first parties only" in dialogue.seen
    assert "RFC 9700" in dialogue.seen


def test_deleting_asks_first(people: People) -> None:
    user_id = people.create("asked")
    for answer, code, left in (("n", Exit.FAILED, 1), ("y", Exit.OK, 0)):
        dialogue = Dialogue(people.shell, "user", "delete", user_id)
        dialogue.answer("for good? [y/N]:", answer)
        assert dialogue.end() == code
        assert "asked" in dialogue.seen
        found = people.shell.json("user", "list", "--username", "asked")["users"]
        assert len(found) == left


# --- imports ---


def rows_of(path: str) -> list[list[str]]:
    with Path(path).open(newline="") as report:
        return list(csv.reader(report))


def test_import_reports_refused_lines_and_imports_the_rest(people: People) -> None:
    shell = people.shell
    taken = people.create("Taken")
    users = file(
        shell,
        "users.csv",
        "\ufeffusername,email,password,display_name\n"
        f'imp1,imp@x.test,{PASSWORD},"Größe, and\nmore"\n'
        "imp2,imp@x.test,,\n"
        "IMP1,imp@x.test,,twice\n"
        f"imp3,imp@x.test,{OTHER[:5]},short\n"
        "taken,imp@x.test,,other\n"
        ",imp@x.test,,nameless\n"
        "imp4,imp@x.test\n",
    )
    report = str(shell.home / "report.csv")
    before = len(shell.printed)
    shell("user", "import", users, "--report", report, code=Exit.FAILED)
    table = shell.printed[-2].splitlines()
    assert [line.split() for line in table[-3:]] == [
        ["created", "2"],
        ["there", "already", "0"],
        ["refused", "5"],
    ]
    expected = [
        ["5", "IMP1", "ALREADY_EXISTS"],
        ["6", "imp3", "PASSWORD_NOT_ACCEPTED"],
        ["7", "taken", "ALREADY_EXISTS"],
        ["8", "", "FIELD_INVALID"],
        ["9", "imp4", "FIELD_INVALID"],
    ]
    assert rows_of(report)[0] == ["line", "username", "reason", "message"]
    assert [row[:3] for row in rows_of(report)[1:]] == expected
    assert [line.split()[0] for line in table[1:-3]] == [row[0] for row in expected]
    told = "".join(shell.printed[before:]) + Path(report).read_text()
    assert PASSWORD.strip() not in told
    assert OTHER[:5] not in told

    found = shell.json("user", "list", "--email", "imp@x.test")["users"]
    names = {user["username"]: user["display_name"] for user in found}
    assert names == {"imp1": "Größe, and\nmore", "imp2": ""}
    assert people.token("imp1")["access_token"]
    assert shell.json("user", "show", taken)["user"]["etag"] == "1"
    shell("user", "import", users, "--json", code=Exit.FAILED)
    again = json.loads(shell.printed[-2])
    assert (again["created"], again["existing"], again["refused"]) == (0, 2, 5)
    assert [[str(r["line"]), r["username"], r["reason"]] for r in again["refusals"]] == expected


def test_import_with_a_wrong_head_sends_nothing(people: People) -> None:
    shell = people.shell
    users = file(shell, "head.csv", "username,role\nheadless,admin\n")
    text = shell("user", "import", users, code=Exit.USAGE)
    assert "unknown column: role" in text
    assert not shell.json("user", "list", "--username", "headless")["users"]
    shell("user", "import", users, "--report", users, code=Exit.USAGE)
    assert "headless" in Path(users).read_text()
    assert "no such file" in shell("user", "import", users + "x", code=Exit.NOT_FOUND)


def test_import_that_was_killed_is_finished_by_the_next(people: People) -> None:
    shell = people.shell
    lines = [f"killed{number},killed@x.test,{PASSWORD}{number}" for number in range(45)]
    users = file(shell, "killed.csv", "\n".join(("username,email,password", *lines)))
    done = 0
    with subprocess.Popen(
        [sys.executable, "-m", "authsvc", "user", "import", users],
        env=shell.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + START_S
        while not done:
            assert time.monotonic() < deadline
            done = len(shell.json("user", "list", "--email", "killed@x.test")["users"])
        process.kill()
    assert done < len(lines)
    ended = shell.json("user", "import", users)
    assert ended["existing"] >= done
    assert (ended["created"] + ended["existing"], ended["refused"]) == (len(lines), 0)
    found = shell.json("user", "list", "--email", "killed@x.test")["users"]
    assert sorted(user["username"] for user in found) == sorted(
        line.split(",")[0] for line in lines
    )
    assert people.token("killed44", f"{PASSWORD}44")["access_token"]


def test_rows_that_a_busy_server_refused_are_sent_again(people: People) -> None:
    shell = people.shell
    apart = Shell(shell.home, shell.address)
    names = [f"busy{number}" for number in range(8)]
    text = "\n".join(("username,password", *(f"{name},{PASSWORD}" for name in names)))
    users = [file(shell, f"busy{at}.csv", text.replace("busy", f"busy{at}-")) for at in range(3)]
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda each: apart.json("user", "import", each), users))
    assert [(each["created"], each["refused"]) for each in ended] == [(len(names), 0)] * 3


def test_import_shows_a_bar_at_a_terminal(people: People) -> None:
    users = file(people.shell, "bar.csv", "username\nbar1\nbar2\n")
    dialogue = Dialogue(people.shell, "user", "import", users)
    assert dialogue.end() == Exit.OK
    assert "line 3" in dialogue.seen
    assert "100%" in dialogue.seen
    people.shell("user", "import", users)
    assert "%" not in people.shell.printed[-1]


# --- roles ---


def test_permission_comes_and_goes_with_the_role(people: People) -> None:
    shell = people.shell
    user_id = people.create("clerk", "--password-file", file(shell, "clerk", PASSWORD))
    token = people.token("clerk")["access_token"]
    shell("permission", "create", READ, "--description", "Reads bills")
    shell("permission", "create", PAY)
    assert "(ALREADY_EXISTS)" in shell("permission", "create", PAY, code=Exit.CONFLICT)
    create = ("role", "create", "clerk", "--permission", READ, "--permission", PAY)
    made = shell.json(*create, "--display-name", "Clerk")["role"]
    assert [each["name"] for each in made["permissions"]] == ["bills.pay", "bills.read"]
    shell("role", "assign", "clerk", "--user", user_id, "--resource", RESOURCE)
    shell("role", "assign", "clerk", "--client", people.billing)
    again = shell.json("role", "assign", "clerk", "--client", people.billing)
    assert again["revision"] == "0"

    full = people.validate(token, "--view", "full")
    assert full["permissions"] == ["bills.pay", "bills.read"]
    ask = ("--audience", RESOURCE, "--permission", "bills.pay")
    assert people.validate(token, *ask)["active"]
    asked = ("token", "validate", "--as", "billing", "--view", "full")
    assert "permissions now  bills.pay\n" in shell(*asked, stdin=token)
    update = ("role", "update", "clerk", "--etag", "1")
    assert int(shell.json(*update, "--permission", READ)["revision"]) > 0
    shell(*update, "--permission", PAY, code=Exit.CONFLICT)
    lacks = people.validate(token, *ask, code=Exit.NOT_ACTIVE)
    assert lacks["missing_permissions"] == ["bills.pay"]
    text = shell("token", "validate", "--as", "billing", *ask, stdin=token, code=Exit.NOT_ACTIVE)
    assert "missing permissions  bills.pay" in text

    rows = [line.split()[:4] for line in shell("role", "holders", "clerk").splitlines()[1:]]
    assert sorted(rows) == sorted(
        [[people.billing, "client", "clerk", "all"], [user_id, "user", "clerk", RESOURCE]]
    )
    assert people.billing not in shell("role", "holders", "--user", user_id)
    assert user_id not in shell("role", "holders", "--client", people.billing)
    assert shell.json("role", "unassign", "clerk", "--user", user_id)["revision"] == "0"
    shell("role", "unassign", "clerk", "--user", user_id, "--resource", RESOURCE)
    assert not people.validate(token, "--view", "full")["permissions"]
    assert shell.json("role", "update", "clerk", "--permission", "")["role"]["permissions"] == []
    assert "none" in shell("role", "show", "clerk")
    assert "Reads bills" in shell("permission", "list", "--resource", RESOURCE)
    shell("permission", "delete", PAY)
    assert "(PERMISSION_NOT_FOUND)" in shell(*create, code=Exit.NOT_FOUND)
    shell("role", "delete", "clerk")
    assert "(ROLE_NOT_FOUND)" in shell("role", "show", "clerk", code=Exit.NOT_FOUND)


# --- sessions, grants and the password grant ---


def test_sessions_and_grants_are_listed_and_ended(people: People) -> None:
    shell = people.shell
    user_id = people.create("sess", "--password-file", file(shell, "sess", PASSWORD))
    tokens = [people.token("sess") for _ in range(3)]
    claims = [
        shell.json("token", "inspect", stdin=token["access_token"])["claims"] for token in tokens
    ]
    listed = shell("session", "list", "--user", user_id)
    assert all(each["sid"] in listed for each in claims)
    assert "127.0.0.1" in listed
    row = shell("grant", "list", "--session", claims[0]["sid"]).splitlines()[1]
    for text in (claims[0]["gid"], user_id, people.web, "password", "127.0.0.1", "bills.read"):
        assert text in row
    assert len(shell.json("grant", "list", "--user", user_id)["grants"]) == 3
    shell("grant", "list", "--client", people.billing)
    assert "no grants" in shell.printed[-1]

    shell("session", "end", claims[0]["sid"])
    shell("grant", "end", claims[1]["gid"])
    for token in tokens[:2]:
        people.validate(token["access_token"], code=Exit.NOT_ACTIVE)
    assert people.validate(tokens[2]["access_token"])["active"]
    shell("session", "sign-out", user_id)
    people.validate(tokens[2]["access_token"], code=Exit.NOT_ACTIVE)
    shell("session", "list", "--user", user_id)
    assert "no sessions" in shell.printed[-1]
    for what in ("session", "grant"):
        assert "_NOT_FOUND)" in shell(what, "end", "nothing", code=Exit.NOT_FOUND)
    assert "(USER_NOT_FOUND)" in shell("session", "sign-out", "nobody", code=Exit.NOT_FOUND)


def test_token_of_a_person_can_be_asked_for_its_level(people: People) -> None:
    shell = people.shell
    people.create("level", "--password-file", file(shell, "level", PASSWORD))
    issued = people.token("level")
    assert issued["refresh_token"]
    token = issued["access_token"]
    assert people.validate(token, "--max-age", "1h")["active"]
    acr = people.validate(token, "--view", "claims")["claims"]["acr"]
    assert people.validate(token, "--acr", "urn:x", "--acr", acr)["active"]
    text = shell(
        *("token", "validate", "--as", "billing", "--acr", "urn:x", "--max-age", "5m"),
        stdin=token,
        code=Exit.NOT_ACTIVE,
    )
    assert "INSUFFICIENT_USER_AUTHENTICATION" in text
    assert 'acr_values="urn:x", max_age="300"' in text
    shell("client", "show", people.web)
    assert "first party" in shell.printed[-2]
    shell("client", "update", people.web, "--third-party", "--expires-in", "never")
    assert "first party" not in shell.printed[-2]
    shell("client", "update", people.web, "--first-party")


def test_issue_warns_of_the_grant_password_and_keeps_inputs_apart(people: People) -> None:
    shell = people.shell
    issue = ("token", "issue", "--client-id", people.web)
    both = (*issue, "--user", "ada", "--client-secret-stdin")
    assert "cannot hold both" in shell(*both, stdin="a\nb\n", code=Exit.USAGE)
    assert "--user" in shell(*issue, "--password-file", "-", stdin="a\n", code=Exit.USAGE)
    wrong = (*issue, "--as", "web", "--user", "nobody")
    text = shell(*wrong, stdin=f"{PASSWORD}\n", code=Exit.REFUSED)
    assert text.startswith("The grant password is for first parties only")
    assert "(INVALID_GRANT)" in text


# --- explaining ---


def test_token_is_explained_with_what_killed_it(people: People) -> None:
    shell = people.shell
    user_id = people.create("told", "--password-file", file(shell, "told", PASSWORD))
    issued = people.token("told")
    token = issued["access_token"]
    explain = ("token", "explain", file(shell, "told.token", token + "\n"))
    text = shell(*explain)
    lines = text.splitlines()
    assert lines[0].split() == ["kind", "access", "token"]
    assert lines[-1] == "active"
    assert "✓  signature" in text
    assert issued["jti"] in text
    assert "refresh token" in shell("token", "explain", stdin=issued["refresh_token"])

    ask = ("--permission", "bills.fly", "--audience", RESOURCE, "--as-client", people.billing)
    text = shell(*explain, *ask, code=Exit.NOT_ACTIVE)
    assert "✗  permissions" in text
    assert text.splitlines()[-1].startswith("not active: INSUFFICIENT_PERMISSIONS")

    shell("user", "disable", user_id, "--comment", "left the company")
    text = shell(*explain, code=Exit.NOT_ACTIVE)
    lines = text.splitlines()
    assert lines[-1].startswith("not active: TOKEN_CUT_OFF")
    killed = [line.split() for line in lines[lines.index("killed by CUTOFF_SUBJECT") + 1 : -1]]
    told = {line[0]: line[-1] for line in killed}
    assert (told["of"], told["by"]) == (user_id, "spiffe://authsvc.local/admin")
    assert (told["action"], told["why"]) == ("DisableUser", "company")
    found = shell.json(*explain, code=Exit.NOT_ACTIVE)
    assert found["markers"][0]["audit_event"]["comment"] == "left the company"
    assert token not in "".join(shell.printed[-8:])


def test_forged_token_is_explained_as_such(people: People) -> None:
    forged = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJcdTAwMWJbMkoiLCJhdWQiOiJ4IiwiZXhwIjoxfQ.eA"
    text = people.shell("token", "explain", "-", stdin=forged, code=Exit.NOT_ACTIVE)
    assert text.splitlines()[-1].startswith("not active: TOKEN_")
    assert "\x1b" not in text
    assert "claims, NOT VERIFIED: anyone can write these" in text
    nothing = people.shell("token", "explain", stdin="garbage", code=Exit.NOT_ACTIVE)
    assert "none of authsvc's" in nothing
    argument = people.shell("token", "explain", forged, code=Exit.NOT_FOUND)
    assert forged not in argument
    assert "no argument" in argument


# --- audit ---


def test_audit_is_filtered(people: People) -> None:
    shell = people.shell
    user_id = people.create("audited")
    shell("user", "disable", user_id, "--comment", "for the audit")
    shell("user", "disable", user_id, code=Exit.CONFLICT)
    asked = ("audit", "list", "--subject", user_id)

    def actions(*more: str) -> list[str]:
        return [event["action"] for event in shell.json(*asked, *more)["audit_events"]]

    whole = shell.json(*asked, "--outcome", "succeeded")["audit_events"]
    assert [event["action"] for event in whole] == ["DisableUser", "CreateUser"]
    disabled = whole[0]
    assert disabled["comment"] == "for the audit"
    assert disabled["actor"] == "spiffe://authsvc.local/admin"
    assert actions("--action", "CreateUser", "--since", "1h") == ["CreateUser"]
    assert actions("--until", "1h") == []
    assert actions("--since", disabled["create_time"], "--outcome", "succeeded") == ["DisableUser"]
    assert actions("--until", disabled["create_time"]) == ["CreateUser"]
    assert actions("--actor", "nobody") == []
    assert "DisableUser" not in actions("--client", people.web)
    lines = shell(*asked, "--action", "DisableUser", "--outcome", "succeeded").splitlines()
    assert lines[0].split() == [
        "TIME",
        "(UTC)",
        "ACTION",
        "OUTCOME",
        "ACTOR",
        "TOUCHED",
        "REVISION",
    ]
    assert lines[1].split()[2:] == [
        *("DisableUser", "succeeded", "spiffe://authsvc.local/admin", user_id),
        disabled["revision"],
    ]
    shell(*asked, "--limit", "1")
    assert "there are more" in shell.printed[-1]


# --- exit codes ---

EXIT_CASES: Final = (
    (Exit.USAGE, ("user", "list", "--state", "gone"), "--state"),
    (Exit.USAGE, ("user", "reset-code", "x", "--lifetime", "soon"), "--lifetime"),
    (Exit.USAGE, ("user", "reset-code", "x", "--lifetime", "25h"), "lifetime"),
    (Exit.USAGE, ("permission", "create", "bills.read"), "NAME@RESOURCE_ID"),
    (Exit.USAGE, ("role", "create", "x", "--permission", "@y"), "NAME@RESOURCE_ID"),
    (Exit.USAGE, ("role", "update", "x"), "nothing to change"),
    (Exit.USAGE, ("role", "assign", "x"), "--user"),
    (Exit.USAGE, ("role", "assign", "x", "--user", "a", "--client", "b"), "exclude"),
    (Exit.USAGE, ("role", "holders", "--user", "a", "--client", "b"), "exclude"),
    (Exit.USAGE, ("audit", "list", "--since", "yesterday"), "--since"),
    (Exit.USAGE, ("audit", "list", "--until", "99999999999d"), "--until"),
    (Exit.USAGE, ("token", "validate", "--max-age", "x"), "--max-age"),
    (Exit.REFUSED, ("token", "explain", "--as", "billing"), "INSUFFICIENT_SCOPE"),
    (Exit.NOT_FOUND, ("token", "explain", "--as-client", "nobody"), "CLIENT_NOT_FOUND"),
    (Exit.REFUSED, ("user", "list", "--as", "billing"), "INSUFFICIENT_SCOPE"),
    (Exit.NOT_FOUND, ("role", "assign", "nothing", "--user", "nobody"), "_NOT_FOUND"),
    (Exit.NOT_FOUND, ("user", "reset-code", "nobody"), "USER_NOT_FOUND"),
)


@pytest.mark.parametrize(
    ("code", "arguments", "text"), EXIT_CASES, ids=[f"{c}-{' '.join(a)}" for c, a, _ in EXIT_CASES]
)
def test_each_exit_code(people: People, code: Exit, arguments: tuple[str, ...], text: str) -> None:
    assert text in people.shell(*arguments, stdin="token", code=code)
