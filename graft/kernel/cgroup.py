"""cgroup v2: found where it is mounted, made, entered, emptied and removed.

Sources: Documentation/admin-guide/cgroup-v2.rst, proc_pid_mountinfo(5). The mount may stand alone at
/sys/fs/cgroup or beside v1 at another place; its path is never assumed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from graft.errors import KernelError

_PATH_MAX = 4096  # bytes, with the one behind it (linux/limits.h)
_MOUNT_POINT = 4  # which field of a line of mountinfo
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")  # how the kernel writes blanks, newlines and backslashes there


def v2_mount() -> Path:
    """Where cgroup v2 is mounted. Raises KernelError where it is not."""
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def parse_mounts(mountinfo: bytes) -> Path:
    """The mount point of cgroup v2 by proc_pid_mountinfo(5). Raises KernelError where there is none.

    Bytes, and a line ends at a newline only: a user's own mounts (FUSE) are in there, with any name that is no newline.
    """
    for line in mountinfo.split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        places = fields.split(b" ")
        if rest.split(b" ", 1)[0] == b"cgroup2" and len(places) > _MOUNT_POINT:
            return Path(os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), places[_MOUNT_POINT])))
    raise KernelError("cgroup v2 is not mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup")


def cgroup_id(path: Path) -> int:
    """The kernel's id of a cgroup: the inode number of its folder (bpf_get_current_cgroup_id(2))."""
    return path.stat().st_ino


def ids(path: Path) -> frozenset[int]:
    """The kernel's ids of a cgroup and of all below it; empty where it is gone."""
    found: set[int] = set()
    for folder in tree(path):
        with contextlib.suppress(OSError):
            found.add(os.stat(folder).st_ino)
    return frozenset(found)


def of_process(pid: int) -> Path:
    """The v2 cgroup of a process, as a path. Raises FileNotFoundError if the process is gone."""
    found = parse_membership(Path(f"/proc/{pid}/cgroup").read_bytes())
    if found is None:
        raise KernelError(f"process {pid} has no cgroup of version 2")
    return v2_mount() / found


def parse_membership(text: bytes) -> str | None:
    """The v2 cgroup in /proc/PID/cgroup, as a path below the mount; None where there is none.

    Who may make cgroups (v1's too) may give them any name that has no slash and no newline. So a line ends at a newline
    and nowhere else, and no part of a name is taken off.
    """
    for line in text.split(b"\n"):
        if line.startswith(b"0::"):
            return os.fsdecode(line[3:].lstrip(b"/"))
    return None


def enable_controllers(path: Path, names: Iterable[str]) -> None:
    """Give the cgroups below ``path`` the controllers ``names``, those of them that its parent has."""
    for folder in (path.parent, path):
        available = (folder / "cgroup.controllers").read_text().split()
        for name in names:
            if name in available:
                with contextlib.suppress(OSError):  # EBUSY: a process is in the cgroup itself
                    (folder / "cgroup.subtree_control").write_text(f"+{name}")


def enter(path: Path) -> None:
    """Move the calling process into a cgroup."""
    (path / "cgroup.procs").write_text("0")


def tree(path: Path) -> Iterator[Path]:
    """A cgroup and all below it, each before those below it, looked for as they are asked for; none where it is gone.

    With a list of what is left to do, and no function that calls itself (as os.walk() does): a container that may make
    cgroups may make them a thousand deep. Those that are too deep for a path to lead there are left out.
    """
    if not os.path.exists(path):
        return
    yield path
    folders = deque([path])
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and len(os.fsencode(entry.path)) < _PATH_MAX:
                    yield Path(entry.path)
                    folders.append(Path(entry.path))


def each_process(path: Path) -> Iterator[int]:
    """The processes of a cgroup and of all below it, one after the other."""
    for folder in tree(path):
        with contextlib.suppress(OSError), (folder / "cgroup.procs").open("rb") as listed:
            for line in listed:
                yield int(line)


def processes(path: Path) -> list[int]:
    """The processes of a cgroup and of all below it; empty where it is gone."""
    return list(each_process(path))


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
            for folder in reversed(list(tree(path))):
                os.rmdir(folder)
            return
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise KernelError(f"cannot remove the cgroup {path}: {error.strerror}") from error
            time.sleep(0.005)
