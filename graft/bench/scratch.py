"""What a run of the benchmark makes on the machine: a folder, a cgroup, pins and namespaces, all under one name.

A run removes them when it ends, by a signal too. One that was killed cannot: so the next run removes what is there of
runs whose lock nobody holds any more, before it makes its own.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from graft.bench.process import run
from graft.kernel import cgroup
from graft.kernel.file_lock import is_locked, locked_file, open_locked

RUNS = Path("/run/graft-bench")
BPFFS = Path("/sys/fs/bpf")
NETNS_DIR = Path("/run/netns")
_LOCK_TIMEOUT = 60.0  # seconds: another run may be removing what is left of a third one
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Scratch:
    """The places of one run, by its name."""

    name: str

    @property
    def folder(self) -> Path:
        """For files, root's only; its lock is held as long as the run is alive."""
        return RUNS / self.name

    @property
    def cgroup(self) -> Path:
        """Everything that is started is in it or below."""
        return cgroup.v2_mount() / self.name

    @property
    def pins(self) -> Path:
        """For the pins of the Graft that is measured."""
        return BPFFS / self.name

    def netns(self, role: str) -> str:
        """The name of a network namespace."""
        return f"{self.name}-{role}"

    def remove(self) -> None:
        """Kill what was started and remove all that was made; safe to repeat. Raises KernelError, OSError."""
        if self.cgroup.exists():
            cgroup.kill(self.cgroup)
            cgroup.remove(self.cgroup)
        for path in (self.pins, *BPFFS.glob(f"{self.name}-*")):  # those that were being made aside
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
        for path in NETNS_DIR.glob(f"{self.name}-*"):
            run(["ip", "netns", "del", path.name])
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)


@contextmanager
def scratch() -> Iterator[Scratch]:
    """The places of this run, made after what killed runs have left is removed. Removed when the block ends."""
    RUNS.mkdir(mode=0o700, exist_ok=True)
    own = Scratch(f"graft-bench-{os.getpid()}")
    with locked_file(RUNS / _LOCK, _LOCK_TIMEOUT):
        for left in abandoned():
            left.remove()
        own.folder.mkdir(mode=0o700)
        lock = open_locked(own.folder / _LOCK, time.monotonic())
    try:
        cgroup.make(own.cgroup)
        yield own
    finally:
        try:
            own.remove()
        finally:
            os.close(lock)


def abandoned() -> list[Scratch]:
    """The runs of which something is left, though they have ended."""
    names = {path.name for path in RUNS.iterdir() if path.is_dir()} if RUNS.exists() else set()
    return [Scratch(name) for name in sorted(names) if not is_locked(RUNS / name / _LOCK)]
