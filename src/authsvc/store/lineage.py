"""Whose a SQLite file is: two servers that each take it for theirs would cut each other off."""

import fcntl
import os


def hold(file: str, lineage: str) -> int | None:
    """A descriptor that keeps other lineages away from a file while it is open.

    None where another one holds it. Raises OSError.
    """
    descriptor = os.open(f"{file}.lineage", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # somebody is there, and said whose it is
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, lineage.encode(), 0)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.pread(descriptor, 4096, 0) == lineage.encode():
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
