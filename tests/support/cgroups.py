"""cgroups of tests: made, entered, removed again; and what is attached to them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft.datapath.programs import PROGRAMS
from graft.kernel import bpf, cgroup

_numbers = itertools.count(1)


@contextmanager
def new_cgroup(role: str, parent: Path | None = None) -> Iterator[Path]:
    """A cgroup outside Graft's own, as an engine would make one; removed afterwards with its processes."""
    path = (parent or cgroup.v2_mount()) / f"graft-test-{os.getpid()}-{role}-{next(_numbers)}"
    path.mkdir()
    try:
        yield path
    finally:
        if path.exists():  # a test may have removed it
            cgroup.kill(path)
            cgroup.remove(path)


def in_cgroup(path: Path) -> list[str]:
    """The words to put before a command that is to run in a cgroup."""
    return ["sh", "-c", f'echo 0 >{path}/cgroup.procs && exec "$@"', "sh"]


def attach_points(path: Path) -> set[str]:
    """The attach points of Graft's programs at which the kernel has anything attached to a cgroup."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return {program.attach for program in PROGRAMS if bpf.prog_ids(fd, bpf.ATTACH_TYPES[program.attach])}
    finally:
        os.close(fd)
