"""Completion of the shell, in a real bash: without a server, and without what is slow."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from authsvc import cli
from tests.test_cli import Shell

HEAVY = "grpc cryptography sqlalchemy alembic uvicorn pydantic_settings redis authsvc.app"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def completed(shell: Shell, *lines: str, **more: str) -> list[list[str]]:
    """What bash offers at the end of each line."""
    script = """
        eval "$(authsvc --show-completion bash)"
        while IFS= read -r line; do
            read -ra COMP_WORDS <<< "$line"
            [[ $line == *" " ]] && COMP_WORDS+=("")
            COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
            COMPREPLY=()
            $(complete -p authsvc | sed 's/.*-F \\([^ ]*\\) .*/\\1/') authsvc
            echo "${COMPREPLY[*]}"
        done
    """
    tools = {"PATH": f"{Path(sys.executable).parent}:{shell.environment()['PATH']}"}
    done = subprocess.run(
        ["bash", "-uc", script],
        env=shell.environment(tools | more),
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    assert not done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_completes_commands_options_and_values(shell: Shell) -> None:
    commands, groups, options, alg, level, state = completed(
        shell,
        "authsvc do",
        "authsvc revoke ",
        "authsvc revoke client --dry",
        "authsvc key prepare --alg ",
        "authsvc serve --log-level w",
        "authsvc client list --state ",
    )
    assert commands == ["doctor"]
    assert groups == [
        *("everything", "client", "subject", "subject-client"),
        *("session", "grant", "token", "signing-key"),
    ]
    assert options == ["--dry-run"]
    assert alg == ["ES256", "RS256", "PS256", "EdDSA"]
    assert level == ["warning"]
    assert state == ["pending", "approved", "rejected", "expired", "suspended"]


def test_names_of_certificates_are_those_of_the_pki(shell: Shell) -> None:
    elsewhere = shell.home / "elsewhere"
    for directory, names in ((shell.state_dir, ("ca", "admin", "orders")), (elsewhere, ("other",))):
        (directory / "pki").mkdir(parents=True)
        for name in names:
            (directory / "pki" / f"{name}-key.pem").touch()
            (directory / "pki" / f"{name}.pem").touch()
    asked = (
        "authsvc client list --as ",
        "authsvc client list --as o",
        f"authsvc client list --state-dir {elsewhere} --as ",
    )
    assert completed(shell, *asked) == [["admin", "orders"], ["orders"], ["other"]]
    variable = {"AUTHSVC_STATE_DIR": str(elsewhere)}
    assert completed(shell, asked[0], **variable) == [["other"]]
    nowhere = {"AUTHSVC_STATE_DIR": "/nowhere"}
    assert completed(shell, asked[0], **nowhere) == [[]]


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: Shell, name: str) -> None:
    """As packages want it; --show-completion finds out by itself which shell asks."""
    assert f"complete_{name}" in shell(env={"_AUTHSVC_COMPLETE": f"source_{name}"})


def test_zsh_and_fish_get_help_beside_the_names(shell: Shell) -> None:
    for name, variables in {
        "zsh": {"_TYPER_COMPLETE_ARGS": "authsvc do"},
        "fish": {
            "_TYPER_COMPLETE_ARGS": "authsvc do",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
    }.items():
        text = shell(env={"_AUTHSVC_COMPLETE": f"complete_{name}", **variables})
        assert "doctor" in text
        assert "Look for what is wrong" in text


def test_completion_loads_nothing_heavy(shell: Shell) -> None:
    program = (
        "import sys, authsvc.cli, atexit\n"
        "names = sys.argv.pop().split()\n"
        "atexit.register(lambda: print('LOADED', *[m for m in names if m in sys.modules]))\n"
        "authsvc.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, HEAVY],
        env=shell.environment(
            {
                "_AUTHSVC_COMPLETE": "complete_bash",
                "COMP_WORDS": "authsvc client list --as ",
                "COMP_CWORD": "4",
            }
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "LOADED", done


def test_every_command_tells_a_stranger_what_it_takes() -> None:
    def walk(command: Any, path: tuple[str, ...]) -> Iterator[str]:
        assert command.help, path
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, (*path, name))
        for each in command.params:
            if not getattr(each, "hidden", False):
                assert each.help, (path, each.name)
                assert each.metavar or getattr(each, "is_flag", False) or not path, (
                    path,
                    each.name,
                )
        yield " ".join(path)

    assert len(list(walk(typer.main.get_command(cli.app), ()))) > 80
