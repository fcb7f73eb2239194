"""A lock between processes: flock(2) of a file, which the kernel releases however its holder ends.

Who waits for it is told who has it, after a time: a process that was stopped would block all others. And nobody is to
wait for others while he has it, in the kernel, for his own folder in /proc: so that is looked up before.

The kernel gives the lock on a file system too that is read-only by now, as one with errors is made: who only reads what
the lock is for still has to keep others away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from graft.errors import KernelError
from graft.kernel import unix_files

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01  # most have it for milliseconds


@contextlib.contextmanager
def locked_file(path: Path, seconds: float, reads: bool = False) -> Iterator[None]:
    """Hold the lock of the file at ``path`` until the block ends, waiting for it at most so many ``seconds``.

    ``reads``: a file system that is read-only will do for the block. Raises KernelError, which names the process that
    holds it, and OSError if the file cannot be made, or only read without ``reads``.
    """
    fd = open_locked(path, time.monotonic() + seconds, reads)
    try:
        yield
    finally:
        os.close(fd)


def open_locked(path: Path, deadline: float, reads: bool = False) -> int:
    """A descriptor of the file at ``path``, which has its lock. Raises what `locked_file` raises."""
    unix_files.pin_own_descriptors()
    fd = _open(path, reads)
    try:
        _lock(fd, path, deadline)
        with contextlib.suppress(OSError):  # a full disk, or one that is read-only: it is for a message only
            os.pwrite(fd, b"%-8d\n" % os.getpid(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(path: Path, reads: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    except OSError as error:
        if not reads or error.errno != errno.EROFS:
            raise
    try:
        return os.open(path, os.O_RDONLY | flags)
    except FileNotFoundError:  # and nobody can make it: its folder has the lock
        return os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


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
            raise KernelError(f"{_holder(fd)} holds {path}", "is it stopped? end it, or let it continue")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _holder(fd: int) -> str:
    """Who has the lock, as it has noted; where the file can only be read, the note is of one before."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return "another process"
    return f"process {os.pread(fd, 16, 0).decode(errors='replace').strip()}"
