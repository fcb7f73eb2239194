"""Lines on standard error, which is a log: what cannot be written is lost, and nothing else is.

A log is in run_dir, where the file system may be full by what others write. A line goes to the descriptor at once: what
a buffer keeps after an error, every child writes again, and a process that ends well ends with status 120 for it.
"""

from __future__ import annotations

import os
import time

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
        else:
            self._lost += 1


def write(text: str) -> bool:
    """Write ``text`` as it is. False where that is impossible, or where a part of it is missing."""
    raw = text.encode(errors="backslashreplace")
    try:
        return os.write(_STANDARD_ERROR, raw) == len(raw)
    except OSError:  # no space; a terminal that is gone; a pipe that nobody reads
        return False


write_line = Lines()
