"""Looks for containers in the cgroup tree, where somebody may hold a folder: in a child, for a limited time."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from graft.kernel import cgroup
from graft.state import helper_process
from graft.state.engines import CGROUP_WITH_ID
from graft.state.left_children import LeftChildren

T = TypeVar("T")

_FOLDER_SECONDS = 2.0

_left, _left_searching = LeftChildren(), LeftChildren()
"""The watcher asks again and again: by the path that was asked about, or below which containers were searched for."""


def ask_of_each(look: Callable[[Path], T], paths: Sequence[Path], left: LeftChildren = _left) -> dict[Path, T]:
    """What a child sees at each of these paths. Left out are those on whose way somebody holds a folder: they are not
    asked about again before the child that waits there has gone.
    """
    free = [path for path in dict.fromkeys(paths) if not left.has_one(str(path))]
    asked = helper_process.run_each(look, free, _FOLDER_SECONDS)
    if asked.helper_pid:  # else it was slow, or somebody let go: the next try may succeed
        left.note([str(path) for path in free], asked.results, asked.helper_pid)
    return {path: asked.results[index] for index, path in enumerate(free) if index in asked.results}


def container_folders(top: Path) -> tuple[list[str], list[str]]:
    """The names of the cgroups of containers, wherever their engines have made them; and which of the folders in
    ``top`` could not be searched, because somebody holds one there.
    """
    inside = ask_of_each(_folders_in, [top], _left_searching).get(top)
    if inside is None:
        return [], ["."]
    folders = [top / name for name in inside]
    searched = ask_of_each(_containers_below, folders, _left_searching)
    held = [folder.name for folder in folders if searched.get(folder) is None]
    names = [*inside, *(name for names in searched.values() for name in names or ())]
    return [name for name in names if CGROUP_WITH_ID.search(name)], held


def cgroup_id_at(path: Path) -> int:
    """Of the cgroup at ``path``; 0 where there is none."""
    if os.path.isdir(path):
        with contextlib.suppress(OSError):  # it was removed just now
            return cgroup.cgroup_id(path)
    return 0


def _folders_in(folder: Path | str) -> list[str] | None:
    """None: it is there, and cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return [one.name for one in entries if one.is_dir(follow_symlinks=False)]
    except OSError as error:  # it was removed just now, or lies too deep for a path: no engine makes that
        return [] if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENAMETOOLONG) else None


def _containers_below(folder: Path) -> list[str] | None:
    """None: what is there cannot be listed."""
    found, folders = list[str](), [str(folder)]
    while folders:
        above = folders.pop()
        names = _folders_in(above)
        if names is None:
            return None
        found += [name for name in names if CGROUP_WITH_ID.search(name)]
        folders += [f"{above}/{name}" for name in names]
    return found
