"""Limits of one supervisor's memory and CPU time: a container decides how much work its supervisor has.

Each supervisor has a cgroup of its own below Graft's cgroup of supervisors, with the limits of its container. The
buffers of the container's replacement sockets are charged there too. Where the memory and cpu controllers are not in
cgroup v2, only the address space is limited (setrlimit(2)).

Sources: Documentation/admin-guide/cgroup-v2.rst (memory.max, cpu.max, "No Internal Process Constraint").
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Collection
from pathlib import Path

from graft.datapath.dataplane import own_cgroup as own_cgroup
from graft.datapath.dataplane import supervisors_cgroup
from graft.kernel import cgroup
from graft.model.settings import Settings

MIN_BYTES = 128 << 20
"""Five times what a supervisor itself needs (docs/performance.md), also where its container has a lower limit."""

MAX_BYTES = 1 << 30
"""The limit where the container has none, or a higher one."""

ADDRESS_SPACE_BYTES = 2 << 30
"""Python and its libraries map much more than they use."""


def enter_own_cgroup(settings: Settings, container: int, path: Path, containers: Collection[int]) -> None:
    """Move the calling process, the supervisor of ``container`` at ``path``, to a cgroup of its own, with its limits.

    Cgroups of supervisors whose containers are not among ``containers`` are removed. Raises OSError.
    """
    parent = supervisors_cgroup(settings)
    _remove_others(parent, {f"container-{number}" for number in {container, *containers}})
    own = own_cgroup(settings, container)
    cgroup.make(own)
    _limit(own / "memory.max", str(memory_limit(path)))
    _limit(own / "memory.swap.max", "0")
    _limit(own / "cpu.max", cpu_limit(path))
    cgroup.enter(own)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))


def cpu_limit(path: Path) -> str:
    """The lowest CPU limit of the cgroup at ``path`` and those above it, in the format of cpu.max."""
    found = "max"
    share = float("inf")
    for folder in (path, *path.parents):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(quota) / int(period) < share:
            found, share = f"{quota} {period}", int(quota) / int(period)
    return found


def memory_limit(path: Path) -> int:
    """The lowest memory.max of the cgroup at ``path`` and those above it, in bytes, from MIN_BYTES to MAX_BYTES."""
    found = [_text(folder / "memory.max") for folder in (path, *path.parents)]
    return max(MIN_BYTES, min([MAX_BYTES, *(int(text) for text in found if text.isdecimal())]))


def _remove_others(parent: Path, kept: Collection[str]) -> None:
    for folder in parent.glob("container-*"):
        if folder.name not in kept:
            with contextlib.suppress(OSError):  # a supervisor is still there, and about to end
                folder.rmdir()


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return ""


def _limit(file: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # the cgroup does not have that controller (graft/datapath/dataplane.py)
        file.write_text(text)
