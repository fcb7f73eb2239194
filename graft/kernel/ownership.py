"""Whether others than root and the caller may change a file or a folder: what is read there would be theirs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def problem_of(found: os.stat_result) -> str | None:
    """Why it is not root's and the caller's alone, in a few words; None if it is."""
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link"
    if found.st_uid not in (0, os.geteuid()):
        return f"user {found.st_uid} owns it"
    return "others can write it" if found.st_mode & _OTHERS_WRITE else None


class NotOwnError(Exception):
    """A file is not to be read. The text says why, in a few words."""


def read_own(path: Path, most: int = -1) -> bytes:
    """The bytes of a regular file that root, or the caller, alone can have written; ``most`` of them, -1 for all.

    Raises OSError, and NotOwnError. Does not wait, whatever the file is.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise NotOwnError("not a regular file")
        if problem := problem_of(found):
            raise NotOwnError(problem)
        return file.read(most)
