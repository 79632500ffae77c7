"""The sockets of gRPC's listeners, which gRPC itself keeps from us.

A server of gRPC's core that is told to stop answers calls that still come in with CANCELLED, which
no client repeats. A connection that ends is UNAVAILABLE to every client, whatever its language.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path


def stop_listening(ports: Collection[int]) -> None:
    """Refuses new connections; the kernel gives them to the others that share the ports."""
    for number, each in _of(ports):
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            # What listens is closed, and its number kept: gRPC says nothing, and closes it later.
            with socket.socket() as idle:
                os.dup2(idle.fileno(), number, inheritable=False)


def hang_up(ports: Collection[int]) -> None:
    """Ends the connections to these ports, at once."""
    for _, each in _of(ports):
        if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            with contextlib.suppress(OSError):  # it may be gone
                each.shutdown(socket.SHUT_RDWR)


def _of(ports: Collection[int]) -> Iterator[tuple[int, socket.socket]]:
    for file in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            number = int(file.name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as each:
                inet = each.family in (socket.AF_INET, socket.AF_INET6)
                if inet and each.getsockname()[1] in ports:
                    yield number, each
