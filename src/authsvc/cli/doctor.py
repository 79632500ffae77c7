"""What is wrong with a set-up, and what to do: `authsvc doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from authsvc.cli.output import Exit, Failure, Output, command, reporting
from authsvc.cli.serve import ConfigFile, StateDir, settings_of

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from authsvc.doctor import Finding

MARKS = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "problem": ("✗", "bold red"),
    "not applicable": ("-", "dim"),
}


def register(app: typer.Typer) -> None:
    """Adds the command to the root."""
    command(app, reporting)(doctor)


def doctor(out: Output, config: ConfigFile = None, state_dir: StateDir = None) -> None:
    """Look for what is wrong; tell what to do.

    Looks at settings, key files, certificates, ports, database and Redis, as serve would use them;
    needs no server, and changes nothing. Exit code 9 where there are problems; warnings are none.
    """
    findings = _findings(config, state_dir)
    counts = {name: sum(f.outcome == name for f in findings) for name in MARKS}
    if out.json:
        out.document(
            {
                "problems": counts["problem"],
                "warnings": counts["warning"],
                "findings": [
                    {
                        "check": finding.check,
                        "outcome": finding.outcome.value,
                        "looked_at": finding.looked_at,
                        "found": finding.found,
                        "advice": finding.advice,
                    }
                    for finding in findings
                ],
            }
        )
    else:
        _tell(out, findings)
        told = ", ".join(f"{counts[name]} {name}" for name in MARKS)
        out.note(told, "bold red" if counts["problem"] else "bold green")
    if counts["problem"]:
        raise typer.Exit(Exit.PROBLEMS)


def _findings(config: Path | None, state_dir: Path | None) -> "list[Finding]":
    import asyncio
    import os

    from authsvc.clock import SystemClock
    from authsvc.config import CONFIG_VARIABLE
    from authsvc.doctor import Report, examine
    from authsvc.telemetry import configure_logs

    configure_logs("error")
    report = Report("config")
    where = str(config or os.environ.get(CONFIG_VARIABLE) or "environment")
    try:
        settings = settings_of(config, state_dir=state_dir)
    except Failure as failure:
        advice = "correct it, and run doctor again: nothing else was looked at"
        for field, text in failure.violations or [("file", failure.message)]:
            report.problem(field, where, text, advice)
        return report.findings
    report.ok("settings", where, "can be used")
    return report.findings + asyncio.run(examine(settings, SystemClock()))


def _tell(out: Output, findings: "list[Finding]") -> None:
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark, style = MARKS[finding.outcome]
        out.title(f"{mark} {finding.check:<{width}}  {finding.looked_at}: {finding.found}", style)
        if finding.advice:
            out.title(f"  {'':<{width}}  do: {finding.advice}", "cyan")
