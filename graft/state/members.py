"""The processes and the cgroups of containers, as the kernel lists them now.

A process of a container can hold the folder of its cgroup, or of one below it, so that whoever lists it waits and
cannot be killed (folder_calls.py). So a child lists them, with a timeout. A folder that is held is not tried again by
the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.errors import KernelError
from graft.kernel import cgroup
from graft.state import helper_process
from graft.state.left_children import LeftChildren

_TIMEOUT = 2.0  # seconds without an answer about any cgroup
_EXIT_TIMEOUT = 0.1

_left = LeftChildren()


@dataclass(frozen=True, slots=True)
class Members:
    """The processes of a cgroup and of those below it, and the ids of all these cgroups."""

    pids: tuple[int, ...]
    cgroups: frozenset[int]


def of_each(paths: Sequence[Path]) -> dict[Path, Members]:
    """What is in each of these cgroups; those of which a folder is held are left out."""
    free = [path for path in paths if not _left.has_one(str(path))]
    found = helper_process.run_each(_list, free, _TIMEOUT, exit_timeout=_EXIT_TIMEOUT)
    for index, path in enumerate(free):
        if index not in found.results:
            _left.leave(str(path), found.helper_pid)
    if len(found.results) == len(free):
        _left.reap_later(found.helper_pid)
    return {path: found.results[index] for index, path in enumerate(free) if index in found.results}


def processes(path: Path) -> tuple[int, ...]:
    """The processes of a cgroup and of those below it. Raises KernelError where a folder is held."""
    found = of_each([path]).get(path)
    if found is None:
        raise held(str(path))
    return found.pids


def held(path: str) -> KernelError:
    """The error where the folder of the cgroup at ``path`` is held."""
    return KernelError(f"somebody holds the directory of the cgroup {path}, or one below it", "end what runs there")


def _list(path: Path) -> Members:
    return Members(tuple(cgroup.processes(path)), cgroup.ids(path))
