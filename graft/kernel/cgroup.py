"""cgroup v2: found where it is mounted, made, entered, emptied and removed.

Sources: Documentation/admin-guide/cgroup-v2.rst, proc_pid_mountinfo(5). The mount may stand alone at
/sys/fs/cgroup or beside v1 at another place; its path is never assumed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

from graft.errors import KernelError


def v2_mount(mountinfo: str | None = None) -> Path:
    """Where cgroup v2 is mounted. Raises KernelError where it is not."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == "cgroup2":
            return Path(fields.split()[4].encode().decode("unicode_escape"))
    raise KernelError("cgroup v2 is not mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")


def cgroup_id(path: Path) -> int:
    """The kernel's id of a cgroup: the inode number of its folder (bpf_get_current_cgroup_id(2))."""
    return path.stat().st_ino


def ids(path: Path) -> frozenset[int]:
    """The kernel's ids of a cgroup and of all below it; empty where it is gone."""
    found: set[int] = set()
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            found.add(os.stat(folder).st_ino)
    return frozenset(found)


def of_process(pid: int) -> Path:
    """The v2 cgroup of a process, as a path. Raises FileNotFoundError if the process is gone."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return v2_mount() / line[3:].strip().lstrip("/")
    raise KernelError(f"process {pid} has no cgroup of version 2")


def enter(path: Path) -> None:
    """Move the calling process into a cgroup."""
    (path / "cgroup.procs").write_text("0")


def processes(path: Path) -> list[int]:
    """The processes of a cgroup and of all below it; empty where it is gone."""
    pids: list[int] = []
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            pids += [int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split()]
    return pids


def populated(path: Path) -> bool:
    """Whether any process lives in a cgroup or below; False where it is gone."""
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False


def kill(path: Path) -> None:
    """End every process of a cgroup and below it (cgroup.kill is of 5.14; before that, one by one)."""
    try:
        (path / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        for pid in processes(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove(path: Path, patience: float = 5.0) -> None:
    """Remove a cgroup with those below it, waiting up to ``patience`` seconds for killed processes to go."""
    deadline = time.monotonic() + patience
    while True:
        try:
            for folder, _, _ in os.walk(path, topdown=False):
                os.rmdir(folder)
            return
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise KernelError(f"cannot remove the cgroup {path}: {error.strerror}") from error
            time.sleep(0.005)
