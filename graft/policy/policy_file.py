"""A policy file as it was when it was read, to be looked at again when its rules are in force.

What reads a policy may wait for long until that is in force: a container can be held in its start, and prolong a look
at it. The operator may narrow the file meanwhile, and apply it to those that are attached. So the file is looked at
once more when the container is attached, and applying can find it: if it is another one by then, its rules are no
policy any more. Without a lock, because whoever holds a folder on the way keeps the look waiting.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple


class PolicyFile(NamedTuple):
    """``stamp``: device, inode, size, and the times of its last changes in nanoseconds. ``passed``: paths that would
    have come first, where there was no file.
    """

    path: Path
    stamp: tuple[int, ...]
    passed: tuple[Path, ...] = ()

    @classmethod
    def of(cls, path: Path, passed: tuple[Path, ...] = ()) -> PolicyFile:
        """The file as it is now, before it is read; without a stamp where it is none, or a pipe."""
        try:
            found = path.stat()
        except (OSError, ValueError):
            return cls(path, (), passed)
        if not stat.S_ISREG(found.st_mode):
            return cls(path, (), passed)
        stamp = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        return cls(path, stamp, passed)

    @property
    def is_unchanged(self) -> bool:
        """Whether it is the same one now, and still the first. Waits for whoever holds a folder on the way."""
        is_same = bool(self.stamp) and PolicyFile.of(self.path).stamp == self.stamp
        return is_same and not any(map(Path.exists, self.passed))
