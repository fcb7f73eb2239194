"""A lock between processes: flock(2) of a file, which the kernel releases however its holder ends.

Who waits for it is told who has it, after a time: a process that was stopped would block all others. And nobody is to
wait for others while he has it, in the kernel, for his own folder in /proc: so that is looked up before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from graft.errors import KernelError
from graft.kernel import unix_files

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01  # most have it for milliseconds


@contextlib.contextmanager
def locked_file(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of the file at ``path`` until the block ends, waiting for it at most so many ``seconds``.

    Raises KernelError, which names the process that holds it, and OSError if the file cannot be made.
    """
    fd = open_locked(path, time.monotonic() + seconds)
    try:
        yield
    finally:
        os.close(fd)


def open_locked(path: Path, deadline: float) -> int:
    """A descriptor of the file at ``path``, which has its lock. Raises what `locked_file` raises."""
    unix_files.pin_own_descriptors()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _lock(fd, path, deadline)
        with contextlib.suppress(OSError):  # a full disk: it is for a message only
            os.pwrite(fd, b"%-8d\n" % os.getpid(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


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


def is_at(fd: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``. Where its file was removed since, the lock is one that the next who
    opens that does not see.
    """
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, path: Path, deadline: float) -> None:
    pause = _FIRST_PAUSE
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > deadline:
            holder = os.pread(fd, 16, 0).decode(errors="replace").strip()
            raise KernelError(f"process {holder} holds {path}", "is it stopped? end it, or let it continue")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
