"""Lines on standard error, which is a log: what cannot be written is lost, and nothing else is.

A log is in run_dir, where the file system may be full by what others write. A line goes to the descriptor at once: what
a buffer keeps after an error, every child writes again, and a process that ends well ends with status 120 for it.

Nor does a log grow without end: a file that was opened as `OPENED` says, as those in run_dir are, keeps its last lines.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

OPENED = os.O_RDWR | os.O_APPEND
"""How a log of Graft's own is opened: no shell opens a file so that a program is to write to (`2>>file`)."""
MAX_BYTES, KEPT_BYTES = 1 << 20, 1 << 18
_STANDARD_ERROR = 2


class Lines:
    """Writes lines. Counts those that were lost, for the next one that is not."""

    def __init__(self) -> None:
        self._lost = 0

    def __call__(self, text: str) -> None:
        """Write ``text``, a line or several, with the time before it."""
        lost = f" ({self._lost} lines before this one could not be written)" if self._lost else ""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}{lost}\n"
        if write(line):
            self._lost = 0
            shorten()  # not where there is no space: its last lines are written anew
        else:
            self._lost += 1


def write(text: str) -> bool:
    """Write ``text`` as it is. False where that is impossible, or where a part of it is missing."""
    return _write(text.encode(errors="backslashreplace"))


def _write(raw: bytes) -> bool:
    try:
        return os.write(_STANDARD_ERROR, raw) == len(raw)
    except OSError:  # no space; a terminal that is gone; a pipe that nobody reads
        return False


def shorten() -> None:
    """Leave only the last lines of a log of Graft's own that is too long. (A line that another process writes at that
    moment may be lost.)
    """
    try:
        found = os.fstat(_STANDARD_ERROR)
        if found.st_size <= MAX_BYTES or not _is_own(found.st_mode):
            return
        last = os.pread(_STANDARD_ERROR, KEPT_BYTES, found.st_size - KEPT_BYTES)
        os.ftruncate(_STANDARD_ERROR, 0)
    except OSError:  # it is closed
        return
    _write(last.partition(b"\n")[2])


def _is_own(mode: int) -> bool:
    flags = fcntl.fcntl(_STANDARD_ERROR, fcntl.F_GETFL)
    return stat.S_ISREG(mode) and flags & (os.O_ACCMODE | os.O_APPEND) == OPENED


write_line = Lines()
