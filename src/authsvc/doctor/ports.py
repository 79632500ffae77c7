"""The addresses to listen on: free, or whose?"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from authsvc.config import Settings
from authsvc.doctor.finding import Report

LISTENING = "0A"  # TCP_LISTEN, as /proc/net/tcp writes it


def look(settings: Settings, report: Report) -> None:
    """Each address of the settings."""
    seen: dict[tuple[str, int], str] = {}
    for name, host, port in _addresses(settings):
        where = f"{host}:{port}"
        if other := seen.get((host, port)) if port else None:
            advice = f"choose another: AUTHSVC_LISTEN__{name.upper()}"
            report.problem(name, where, f"is listen.{other} as well", advice)
            continue
        seen[host, port] = name
        with report.running(name, where, f"choose another: AUTHSVC_LISTEN__{name.upper()}"):
            _address(name, host, port, report)


def _addresses(settings: Settings) -> Iterator[tuple[str, str, int]]:
    listen = settings.listen
    yield "port", listen.host, listen.port
    if listen.tls_only:
        yield "tls_port", listen.tls_host, listen.tls_port
    yield "metrics_port", listen.metrics_host, listen.metrics_port
    yield "health_port", listen.health_host, listen.health_port


def _address(name: str, host: str, port: int, report: Report) -> None:
    where = f"{host}:{port}"
    if not port:
        report.skipped(name, where, "the kernel chooses a port")
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        advice = f"give an address of this machine: AUTHSVC_LISTEN__{_host(name)}"
        report.problem(name, where, "there is no such name", advice)
        return
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            _taken(name, where, port, error.errno, report)
        else:
            report.ok(name, where, "free")


def _taken(name: str, where: str, port: int, number: int | None, report: Report) -> None:
    setting = f"AUTHSVC_LISTEN__{name.upper()}"
    if number == errno.EADDRNOTAVAIL:
        advice = f"give an address of this machine: AUTHSVC_LISTEN__{_host(name)}"
        report.problem(name, where, "this machine does not have this address", advice)
    elif number == errno.EACCES:
        advice = f"choose one above 1023: {setting}; or give CAP_NET_BIND_SERVICE"
        report.problem(name, where, "this user may not listen there", advice)
    elif number != errno.EADDRINUSE:
        report.problem(name, where, os.strerror(number or 0), f"choose another: {setting}")
    elif (owner := _owner(port)) is None:
        advice = f"look whose it is: ss -ltnp sport = :{port}; or choose another: {setting}"
        report.warning(name, where, "in use, by a process that this user may not see", advice)
    elif _is_authsvc(owner):
        report.ok(name, where, f"in use by authsvc (process {owner.name})")
    else:
        found = f"in use by {_name(owner)} (process {owner.name})"
        report.problem(name, where, found, f"end it, or choose another: {setting}")


def _owner(port: int) -> Path | None:
    """The process that listens on a port, as a folder of /proc."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for handle in (process / "fd").iterdir():
                with suppress(OSError):
                    if str(handle.readlink()) in sockets:
                        return process
    return None


def _listening(port: int) -> Iterator[str]:
    """Inodes of the sockets that listen on a port."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _is_authsvc(process: Path) -> bool:
    with suppress(OSError):
        arguments = (process / "cmdline").read_bytes().split(b"\0")[:3]
        return any(Path(os.fsdecode(each)).name == "authsvc" for each in arguments)
    return False


def _name(process: Path) -> str:
    with suppress(OSError):
        return (process / "comm").read_text().strip()
    return "another program"


def _host(name: str) -> str:
    return name.replace("port", "host").upper()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "::1") or host.startswith("127.")
