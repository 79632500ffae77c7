"""After a restore: `authsvc fence`."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from authsvc.cli.output import Failure, Output, command, reporting
from authsvc.cli.serve import ConfigFile, StateDir, settings_of

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from authsvc.app import Fence


def register(app: typer.Typer) -> None:
    """Adds the command to the root."""
    command(app, reporting)(fence)


def fence(
    out: Output,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    comment: Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the audit.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would die; change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Fence without asking.")] = False,
) -> None:
    """Kill everything that was issued, after a backup of the database was restored.

    A restored database has forgotten what was revoked since its backup. This opens an epoch above
    all that was lost, with a cutoff for everything; secrets, passwords and signing keys stay. It
    works on the database of the settings, as serve does; servers may run meanwhile.
    """
    import asyncio

    if out.json and not (yes or dry_run):
        raise Failure("--json asks nobody", "add --yes, or --dry-run")
    settings = settings_of(config, state_dir=state_dir)
    from authsvc import app

    found = asyncio.run(app.fence(settings, comment=comment, dry=True))
    if not out.json:
        _tell(out, found)
    if dry_run:
        return out.document(_document(found)) if out.json else out.note("Nothing was changed.")
    if not yes:
        if not sys.stdin.isatty():
            raise Failure("nobody is there to be asked", "--yes fences without asking")
        typer.confirm("Kill everything that was issued?", abort=True, err=True)
    done = asyncio.run(app.fence(settings, comment=comment, dry=False))
    if out.json:
        return out.document(_document(done))
    out.pairs((("revision", done.revision),))
    return out.note("All that was issued before is dead, access tokens too.", "green")


def _tell(out: Output, found: "Fence") -> None:
    out.pairs(
        (
            ("database", found.database),
            ("sessions", found.impact.sessions),
            ("grants", found.impact.grants),
            ("api keys", found.impact.api_keys),
            ("head", found.head),
        )
    )


def _document(found: "Fence") -> dict[str, object]:
    impact = found.impact
    return {
        "database": found.database,
        "impact": {
            "sessions": impact.sessions,
            "grants": impact.grants,
            "api_keys": impact.api_keys,
        },
        "head": found.head,
        "revision": found.revision,
    }
