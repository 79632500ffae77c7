"""The database: there, the primary, durable, current, and with room?"""

import asyncio
import contextlib
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from authsvc.app import database_url, open_database
from authsvc.clock import Clock
from authsvc.config import Settings
from authsvc.doctor.finding import Report, cause, root
from authsvc.doctor.threads import in_thread
from authsvc.errors import AuthError
from authsvc.store.examine import (
    CONNECTIONS,
    FEED_COUNT_MAX,
    Feed,
    PostgresServer,
    look_into,
)
from authsvc.store.migrate import Schema
from authsvc.store.sql import shown

VERSION = 15
CLOSE_S = 1.0
SQLITE_S = 3.0
FEED_MANY = 1_000_000
BEAT_OLD_S = 30.0
FREE_LITTLE, FREE_TOO_LITTLE = 2**30, 64 * 2**20
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 1.0, 30.0
MOUNTS = Path("/proc/self/mounts")
NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "gluster", "fuse.", "lustre", "afs", "beegfs")
ADVICE = {
    "InvalidPasswordError": "check the user and the password in database.url",
    "InvalidAuthorizationSpecificationError": "check the user in database.url, and pg_hba.conf",
    "InvalidCatalogNameError": "create it (CREATE DATABASE), or name another in database.url",
    "TooManyConnectionsError": "end other connections, or raise max_connections",
    "gaierror": "check the host in database.url",
    "TimeoutError": "may this machine reach it? check host and port in database.url, and firewalls",
}
"""What to do, by the type of the cause."""
AWAY = "is it running there? check host and port in database.url"
MIGRATE = "authsvc migrate"
KINDS = "write it as postgresql+asyncpg://… or sqlite+aiosqlite:///…"


async def look(settings: Settings, report: Report, clock: Clock) -> None:
    """The database of the settings."""
    try:
        url = make_url(database_url(settings))
    except ArgumentError:
        report.problem("url", "database.url", "is no URL", KINDS)
        return
    if url.drivername not in ("sqlite+aiosqlite", "postgresql+asyncpg"):
        report.problem("url", "database.url", "of a database that authsvc does not know", KINDS)
    elif url.get_backend_name() == "sqlite":
        await in_thread(_sqlite, settings, Path(url.database or ""), report, clock.wall())
    else:
        await _postgres(settings, url, report, clock)


async def _postgres(settings: Settings, url: URL, report: Report, clock: Clock) -> None:
    where = shown(url)
    database = open_database(database_url(settings), clock, "")
    postgres = PostgresServer(database)
    try:
        try:
            await postgres.server()  # connects, so that the next one measures a round trip alone
            before = clock.boot()
            server = await postgres.server()
            took = clock.boot() - before
        except AuthError as error:
            told = cause(error)
            advice = ADVICE.get(type(root(error)).__name__, AWAY)
            report.problem("reachable", where, f"no answer ({told})", advice)
            return
        report.ok("reachable", where, f"answers in {took * 1000:.1f} ms")
        _version(server, where, report)
        _role(server, where, report)
        _durability(server, where, report)
        _clock(server.time - (clock.wall() - took / 2), took, where, report)
        _connections(settings, server, where, report)
        with report.running("synchronous", where):
            _synchronous(settings, server, await postgres.standbys(), where, report)
        await _contents(postgres, server, where, report)
    finally:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await database.close()


def _version(server: Any, where: str, report: Report) -> None:
    if server.version < VERSION * 10_000:
        found = f"PostgreSQL {server.version_text}"
        report.problem("version", where, found, f"take PostgreSQL {VERSION} or newer")
    else:
        report.ok("version", where, f"PostgreSQL {server.version_text}")


def _role(server: Any, where: str, report: Report) -> None:
    if server.is_standby:
        advice = "name the primary in database.url: authsvc reads and writes there alone"
        report.problem("primary", where, "a standby: nothing can be written", advice)
    elif server.is_read_only:
        advice = "ALTER ROLE … or ALTER DATABASE … RESET default_transaction_read_only"
        report.problem("primary", where, "transactions are read-only", advice)
    else:
        report.ok("primary", where, "takes changes")


def _durability(server: Any, where: str, report: Report) -> None:
    off = [name for name in ("fsync", "full_page_writes") if not getattr(server, name)]
    if server.synchronous_commit == "off":
        off.append("synchronous_commit")
    if off:
        found = f"{', '.join(off)} off: a crash loses revocations that were confirmed"
        commands = "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off)
        report.problem("durable", where, found, f"{commands}; SELECT pg_reload_conf()")
    else:
        report.ok("durable", where, "fsync, full_page_writes and synchronous_commit are on")


def _clock(ahead: float, took: float, where: str, report: Report) -> None:
    """`ahead` is exact but for half of the round trip."""
    off = max(0.0, abs(ahead) - took / 2)
    way = "ahead of" if ahead > 0 else "behind"
    found = f"{abs(ahead):.1f} s {way} this machine's"
    advice = "let NTP set the clocks of both machines (timedatectl)"
    if off > CLOCK_PROBLEM_S:
        report.problem("clock", where, found, advice)
    elif off > CLOCK_WARNING_S:
        report.warning("clock", where, found, advice)
    else:
        report.ok("clock", where, "within a second of this machine's")


def _connections(settings: Settings, server: Any, where: str, report: Report) -> None:
    wanted = (settings.workers or os.cpu_count() or 1) * CONNECTIONS
    found = f"{server.free} free, {server.own} used by authsvc"
    advice = f"raise max_connections: the workers of this machine take up to {wanted}"
    if server.free + server.own <= 0:
        report.problem("connections", where, found, advice)
    elif server.free + server.own < wanted:
        report.warning("connections", where, found, advice)
    else:
        report.ok("connections", where, found)


def _synchronous(
    settings: Settings,
    server: Any,
    standbys: dict[str | None, int],
    where: str,
    report: Report,
) -> None:
    waits = server.synchronous_commit in ("on", "remote_apply", "remote_write")
    synchronous = standbys.get("sync", 0) + standbys.get("quorum", 0)
    told = ", ".join(f"{count} {state or 'hidden'}" for state, count in standbys.items()) or "none"
    found = f"synchronous_commit {server.synchronous_commit}, standbys: {told}"
    if not settings.database.synchronous:
        report.ok("synchronous", where, f"{found}; not vouched for: a failover ends all tokens")
    elif None in standbys:
        advice = "let this user see them: GRANT pg_read_all_stats TO …"
        report.warning("synchronous", where, f"{found}; cannot tell which are synchronous", advice)
    elif not waits or not synchronous or not server.synchronous_standby_names:
        advice = (
            "set synchronous_standby_names and synchronous_commit = on, and connect such a standby;"
            " or AUTHSVC_DATABASE__SYNCHRONOUS=false"
        )
        told = "database.synchronous vouches that a failover loses no commit, and it may"
        report.problem("synchronous", where, f"{found}; {told}", advice)
    else:
        report.ok("synchronous", where, found)


async def _contents(postgres: PostgresServer, server: Any, where: str, report: Report) -> None:
    fingerprint = ""
    if not server.is_standby:
        advice = (
            "GRANT EXECUTE ON FUNCTION pg_control_system, pg_walfile_name, pg_current_wal_lsn TO …"
        )
        with report.running("fingerprint", where, advice):
            fingerprint = await postgres.fingerprint()
            report.ok("fingerprint", where, fingerprint)
    with report.running("schema", where, "may this user read the tables?"):
        schema = await postgres.schema()
        _schema(schema, where, report, embedded=False)
        if schema is not Schema.CURRENT:
            return
    with report.running("privileges", where):
        if denied := await postgres.denied():
            report.problem("privileges", where, f"lacks {', '.join(denied)}", "GRANT them to it")
        else:
            report.ok("privileges", where, "may read and write all tables")
    with report.running("feed", where, "may this user read the tables?"):
        feed = await postgres.feed()
        _feed(feed, fingerprint, where, report)
        _beat(server.time - feed.beat, feed, where, report, workers=bool(server.own))


def _schema(schema: Schema, where: object, report: Report, *, embedded: bool) -> None:
    if schema is Schema.CURRENT:
        report.ok("schema", where, "current")
    elif schema is Schema.UNKNOWN:
        advice = "is it the right database, and this version not an older one? nothing touches it"
        report.problem("schema", where, "not one that this version knows", advice)
    elif embedded and schema is Schema.EMPTY:
        report.skipped("schema", where, "empty: authsvc serve makes it")
    else:
        found = "empty" if schema is Schema.EMPTY else "of an older version"
        report.problem("schema", where, found, MIGRATE)


def _feed(feed: Feed, fingerprint: str, where: object, report: Report) -> None:
    rows = f"{feed.size} or more" if feed.size >= FEED_COUNT_MAX else str(feed.size)
    found = f"revision {feed.revision}, rows: {rows}"
    if feed.fingerprint and fingerprint and feed.fingerprint != fingerprint:
        found += "; the database was restored, copied or promoted since authsvc last ran on it"
        advice = "start authsvc serve: it opens another epoch, and all tokens are cut off"
        report.warning("feed", where, found, advice)
    elif feed.size >= FEED_MANY:
        advice = "each worker holds them in memory: end many tokens at once with authsvc revoke"
        report.warning("feed", where, found, advice)
    else:
        report.ok("feed", where, found)


def _beat(age_s: float, feed: Feed, where: object, report: Report, *, workers: bool) -> None:
    """`workers` is whether any are connected."""
    found = f"a worker wrote {age_s:.0f} s ago" if feed.beat else "no worker ever wrote"
    if age_s < BEAT_OLD_S:
        report.ok("beat", where, found)
    elif workers:
        advice = "look at the log of authsvc serve; who holds locks? SELECT * FROM pg_stat_activity"
        report.problem("beat", where, f"{found}, and some are connected", advice)
    else:
        report.skipped("beat", where, f"{found}: no authsvc serves on it")


def _sqlite(settings: Settings, file: Path, report: Report, now: float) -> None:
    embedded = settings.database.url is None
    _disk(file, report)
    if settings.database.synchronous:
        advice = "leave it away: AUTHSVC_DATABASE__SYNCHRONOUS=false"
        found = "SQLite has no failover: the setting vouches for nothing but backups"
        report.warning("synchronous", file, found, advice)
    if not file.exists():
        told = "not there yet: authsvc serve makes it" if embedded else "there is no such file"
        if embedded:
            report.skipped("reachable", file, told)
        else:
            report.problem("reachable", file, told, MIGRATE)
        return
    advice = f"is it a SQLite file of authsvc's, and may this user read {shlex.quote(str(file))}?"
    with report.running("reachable", file, advice):
        held = look_into(file, SQLITE_S)
        report.ok("reachable", file, "SQLite")
        if held.is_wal:
            report.ok("journal", file, "WAL")
        else:
            report.warning("journal", file, "no WAL", "authsvc serve and migrate switch to it")
        _schema(held.schema, file, report, embedded=embedded)
        if held.feed is not None:
            identity = settings.state_dir / "database.id"
            ours = identity.read_text(encoding="ascii").strip() if identity.exists() else ""
            _feed(held.feed, ours, file, report)
            _beat(now - held.feed.beat, held.feed, file, report, workers=False)


def _disk(file: Path, report: Report) -> None:
    folder = file.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with report.running("disk", folder):
        free = shutil.disk_usage(folder).free
        found, advice = f"{free / 2**20:.0f} MiB free", "make room, or move the database"
        if free < FREE_TOO_LITTLE:
            report.problem("disk", folder, found, advice)
        elif free < FREE_LITTLE:
            report.warning("disk", folder, found, advice)
        else:
            report.ok("disk", folder, found)
    with report.running("filesystem", folder):
        kind = filesystem(folder)
        if not kind:
            report.skipped("filesystem", folder, "this system does not tell")
        elif kind.startswith(NETWORK):
            found = f"{kind}: SQLite's locks do not hold over a network"
            report.problem("filesystem", folder, found, "move it to a local disk, or PostgreSQL")
        else:
            report.ok("filesystem", folder, kind)


def filesystem(folder: Path) -> str:
    """Its kind, as Linux names it; empty where it cannot be told."""
    if not MOUNTS.exists():
        return ""
    path, best = folder.resolve(), ("", "")
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.encode().decode("unicode_escape")  # \\040 is a space
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]
