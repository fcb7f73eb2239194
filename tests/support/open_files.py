"""Who has a file open: so a test knows that a process waits for the file's lock."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def open_in(pid: int, path: Path) -> int:
    """How many descriptors of a process are of the file at ``path``."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it was closed just now
            found += os.readlink(f"/proc/{pid}/fd/{name}") == str(path)
    return found
