"""What is attached to a cgroup, asked of the kernel."""

from __future__ import annotations

import os
from pathlib import Path

from graft.datapath.programs import PROGRAMS
from graft.kernel import bpf


def attach_points(cgroup: Path) -> set[str]:
    """The attach points of Graft's programs at which anything is attached to ``cgroup``."""
    fd = os.open(cgroup, os.O_RDONLY)
    try:
        return {program.attach for program in PROGRAMS if bpf.prog_ids(fd, bpf.ATTACH_TYPES[program.attach])}
    finally:
        os.close(fd)
