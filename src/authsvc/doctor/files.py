"""The state directory, and every file that holds a secret: who may read it?"""

import os
import shlex
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from authsvc.config import CONFIG_VARIABLE, SECRET_VARIABLES, Settings
from authsvc.doctor.finding import Report


def look(settings: Settings, report: Report) -> None:
    """The state directory, the configuration, and the files of both."""
    directory = settings.state_dir
    owners = {0, os.geteuid()}
    with report.running("state_dir", directory):
        try:
            status = directory.stat()
        except FileNotFoundError:
            report.skipped("state_dir", directory, "not there yet: authsvc serve makes it")
        else:
            owners.add(status.st_uid)
            _directory(directory, status, report)
    for check, path, required in _secret_files(settings):
        with report.running(check, path):
            _private(check, path, owners, report, required=required)
    if file := os.environ.get(CONFIG_VARIABLE):
        with report.running("config", file):
            _config(Path(file), owners, report)


def _directory(path: Path, status: os.stat_result, report: Report) -> None:
    quoted = shlex.quote(str(path))
    if not stat.S_ISDIR(status.st_mode):
        report.problem("state_dir", path, "no directory", "name another: AUTHSVC_STATE_DIR")
    elif status.st_mode & 0o022:
        found = f"others may put files there (mode {_mode(status)})"
        report.problem("state_dir", path, found, f"chmod 700 {quoted}")
    elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        advice = f"run as its owner (uid {status.st_uid}), or: chown -R $(id -u) {quoted}"
        report.problem("state_dir", path, "this user may not write there", advice)
    elif status.st_mode & 0o055:
        found = f"others may look into it (mode {_mode(status)})"
        report.warning("state_dir", path, found, f"chmod 700 {quoted}")
    else:
        report.ok("state_dir", path, f"mode {_mode(status)}")


def _secret_files(settings: Settings) -> Iterator[tuple[str, Path, bool]]:
    """Check, path, and whether it must be there."""
    directory = settings.state_dir
    if settings.seal_keys is None:
        yield "seal.key", directory / "seal.key", False
    if settings.refresh_keys is None:
        yield "refresh.key", directory / "refresh.key", False
    if settings.tls.key is not None:
        yield "tls.key", settings.tls.key, True
    else:
        found = sorted((directory / "pki").glob("*-key.pem"))
        for path in found or [directory / "pki" / "server-key.pem"]:
            yield "pki", path, False
    if settings.database.url is None:
        for name in ("authsvc.db", "authsvc.db-wal", "authsvc.db-shm"):
            if name == "authsvc.db" or (directory / name).exists():
                yield name, directory / name, False
    if settings.redis.password_file is not None:
        yield "redis.password_file", settings.redis.password_file, True
    if settings.redis.key is not None:
        yield "redis.key", settings.redis.key, True
    for variable in SECRET_VARIABLES:
        if file := os.environ.get(f"{variable}_FILE"):
            yield f"{variable}_FILE", Path(file), True


def _private(
    check: str, path: Path, owners: set[int], report: Report, *, required: bool, secret: bool = True
) -> None:
    """A file of one of the owners that nobody else can read or, where no secret, change.

    Its group may read one of root's, as that is how secrets are mounted.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if required:
            report.problem(check, path, "there is no such file", "write it, or name another")
        else:
            report.skipped(check, path, "not there yet: authsvc serve makes it")
        return
    quoted = shlex.quote(str(path))
    open_to = status.st_mode & (0o077 if secret else 0o022)
    if status.st_uid == 0 and not status.st_mode & 0o030:
        open_to &= 0o007
    if not stat.S_ISREG(status.st_mode):
        report.problem(check, path, "no regular file", "name a regular file")
    elif open_to:
        does = "read" if open_to & 0o044 else "change" if open_to & 0o022 else "run"
        found = f"others may {does} it (mode {_mode(status)})"
        report.problem(check, path, found, f"chmod {600 if secret else 'go-w'} {quoted}")
    elif status.st_uid not in owners:
        found = f"belongs to another user (uid {status.st_uid})"
        report.problem(check, path, found, f"chown {min(owners - {0}, default=0)} {quoted}")
    elif not os.access(path, os.R_OK):
        advice = f"run as its owner (uid {status.st_uid}), or change the owner"
        report.problem(check, path, "this user may not read it", advice)
    else:
        report.ok(check, path, f"mode {_mode(status)}")


def _config(path: Path, owners: set[int], report: Report) -> None:
    secrets = list(_secrets(Settings, tomllib.loads(path.read_text(encoding="utf-8"))))
    _private("config", path, owners, report, required=True, secret=bool(secrets))


def _secrets(model: type[BaseModel], given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Secret settings that a file gives."""
    for name, field in model.model_fields.items():
        value, kind = given.get(name), field.annotation
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _secrets(kind, value, f"{prefix}{name}.")
        elif value is not None and SecretStr in (kind, *getattr(kind, "__args__", ())):
            yield prefix + name


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"
