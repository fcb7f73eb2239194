"""What one supervisor may take of the machine: a container decides how much work it makes its supervisor do.

Each supervisor has a cgroup of its own below that of all of them, with the limits of its container: the buffers of
twins that the container's programs connect are charged there too. Where these controllers belong to cgroup
v1, or are disabled, only the address space is limited (setrlimit(2)).

Sources: Documentation/admin-guide/cgroup-v2.rst (memory.max, cpu.max, "No Internal Process Constraint").
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Collection
from pathlib import Path

from graft.datapath.dataplane import supervisors_cgroup
from graft.kernel import cgroup
from graft.model.settings import Settings

LEAST_BYTES = 128 << 20
"""Five times what a supervisor itself needs (docs/performance.md), however little its container may have."""

MOST_BYTES = 1 << 30
"""Where the container has no limit."""

ADDRESS_SPACE_BYTES = 2 << 30
"""Python and its libraries map much that they never touch."""


def enter_own_cgroup(settings: Settings, container: int, path: Path, living: Collection[int]) -> None:
    """Move the calling process, the supervisor of ``container`` at ``path``, to a cgroup of its own, with its limits.

    Those of containers that are not among the ``living`` go. Raises OSError.
    """
    above = supervisors_cgroup(settings)
    _forget_others(above, {container, *living})
    own = _own(above, container)
    own.mkdir(exist_ok=True)
    _limit(own / "memory.max", str(memory_limit(path)))
    _limit(own / "memory.swap.max", "0")
    _limit(own / "cpu.max", cpu_limit(path))
    cgroup.enter(own)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))


def cpu_limit(path: Path) -> str:
    """The tightest CPU limit of the cgroup at ``path`` and those above it, in the words of cpu.max."""
    found = "max"
    share = float("inf")
    for folder in (path, *path.parents):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(quota) / int(period) < share:
            found, share = f"{quota} {period}", int(quota) / int(period)
    return found


def memory_limit(path: Path) -> int:
    """Bytes: the smallest memory.max of the cgroup at ``path`` and those above it, within reason."""
    found = [_text(folder / "memory.max") for folder in (path, *path.parents)]
    return max(LEAST_BYTES, min([MOST_BYTES, *(int(text) for text in found if text.isdecimal())]))


def _own(above: Path, container: int) -> Path:
    return above / f"container-{container}"


def _forget_others(above: Path, living: Collection[int]) -> None:
    for folder in set(above.glob("container-*")) - {_own(above, container) for container in living}:
        with contextlib.suppress(OSError):  # a supervisor is at its end there
            folder.rmdir()


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return ""


def _limit(file: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # the cgroup does not have that controller (graft/datapath/dataplane.py)
        file.write_text(text)
