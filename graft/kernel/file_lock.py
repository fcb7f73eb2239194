"""A lock between processes: flock(2) of a file, which the kernel releases however its holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from graft.errors import KernelError

_PAUSE_SECONDS = 0.01


@contextlib.contextmanager
def locked_file(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of the file at ``path`` until the block ends, waiting for it at most so many ``seconds``.

    Raises KernelError, which names the process that holds it (one that was stopped would block all others), and
    OSError if the file cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _lock(fd, path, time.monotonic() + seconds)
        with contextlib.suppress(OSError):  # a full disk: it is for a message only
            os.pwrite(fd, b"%-8d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of the file at ``path``. Raises OSError if the file cannot be opened."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock(fd: int, path: Path, deadline: float) -> None:
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > deadline:
            holder = os.pread(fd, 16, 0).decode(errors="replace").strip()
            raise KernelError(f"process {holder} holds {path}", "is it stopped? end it, or let it continue")
        time.sleep(_PAUSE_SECONDS)
