"""Whether others than root and the caller may change a file or a folder: what is read there would be theirs."""

from __future__ import annotations

import os
import stat

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def problem_of(found: os.stat_result) -> str | None:
    """Why it is not root's and the caller's alone, in a few words; None if it is."""
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link"
    if found.st_uid not in (0, os.geteuid()):
        return f"user {found.st_uid} owns it"
    return "others can write it" if found.st_mode & _OTHERS_WRITE else None
