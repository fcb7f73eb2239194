"""cgroup v2: its mount, its folders, their controllers and processes.

Sources: Documentation/admin-guide/cgroup-v2.rst, proc_pid_mountinfo(5), cgroup_namespaces(7), open_by_handle_at(2)
with FILEID_KERNFS of include/linux/exportfs.h (5.5). The mount may stand alone at /sys/fs/cgroup or beside v1 at
another place; its path is never assumed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import signal
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from graft.errors import KernelError
from graft.kernel.syscalls import syscall

_FILEID_KERNFS = 0xFE
_CLONE_NEWCGROUP = 0x02000000
_PATH_MAX = 4096  # bytes, with the one behind it (linux/limits.h)
_SEARCH_ONLY = 0o711
_MOUNT_POINT = 4  # which field of a line of mountinfo
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")  # how the kernel writes blanks, newlines and backslashes there


@functools.cache
def v2_mount() -> Path:
    """Where cgroup v2 is mounted. Read once: others can hold the folder in /proc. Raises KernelError where it is not
    mounted.
    """
    return parse_mounts(Path("/proc/self/mountinfo").read_bytes())


def parse_mounts(mountinfo: bytes) -> Path:
    """The mount point of cgroup v2 in proc_pid_mountinfo(5). Raises KernelError where there is none.

    Bytes, and a line ends at a newline only: users' own mounts (FUSE) are listed too, with any name without a newline.
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


def dying_below(path: Path) -> int:
    """How many cgroups below this one were removed and are still there for the kernel: among them is each in which a
    socket was made that is open (cgroup_sk_alloc() of kernel/cgroup/cgroup.c). One where the kernel does not say.
    """
    with contextlib.suppress(OSError):
        for line in (path / "cgroup.stat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "nr_dying_descendants":
                return int(count)
    return 1


def has_id(number: int) -> bool:
    """Whether there is a cgroup of that id. May never return: where its name is not in the kernel's cache, the folder
    above is listed (reconnect_path() of fs/exportfs/expfs.c), which others may hold.

    Raises OSError where the kernel does not say (without CAP_DAC_READ_SEARCH).
    """
    try:
        os.close(_open_id(number, os.O_PATH))
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return False
    return True


def _open_id(number: int, flags: int) -> int:
    """The folder of the cgroup of that id. May never return, as `has_id`. Raises OSError (ESTALE: there is none)."""
    handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, _FILEID_KERNFS, number))
    return syscall("open_by_handle_at", _top(os.getpid()), handle, flags | os.O_CLOEXEC)


def open_events(path: Path, number: int) -> int:
    """The file cgroup.events of the cgroup at ``path``, whose id is ``number`` (0: any): `is_removed` asks it.

    While it is open, the names of the cgroup and of those above it stay in the kernel's cache. May never return, as
    `has_id`. Raises FileNotFoundError where there is no such cgroup.
    """
    try:
        folder = _open_id(number, os.O_PATH) if number else os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)  # without CAP_DAC_READ_SEARCH
    try:
        if number not in (0, os.fstat(folder).st_ino):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


def is_removed(events: int) -> bool:
    """Whether the cgroup of that cgroup.events was removed (kernfs refuses the read then, kernfs_seq_start()). Waits
    for nobody.
    """
    try:
        os.pread(events, 1, 0)
    except OSError as error:
        return error.errno == errno.ENODEV
    return False


@functools.cache
def _top(_pid: int) -> int:
    """A descriptor of the mount, of this process's own: it stays open."""
    return os.open(v2_mount(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def ids(path: Path) -> frozenset[int]:
    """The kernel's ids of a cgroup and of all below it; empty where it does not exist."""
    found: set[int] = set()
    for folder in tree(path):
        with contextlib.suppress(OSError):
            found.add(os.stat(folder).st_ino)
    return frozenset(found)


def of_process(pid: int) -> Path:
    """The v2 cgroup of a process, as a path. Raises FileNotFoundError if the process has ended."""
    found = parse_membership(Path(f"/proc/{pid}/cgroup").read_bytes())
    if found is None:
        raise KernelError(f"process {pid} has no v2 cgroup")
    return v2_mount() / found


def parse_membership(text: bytes) -> str | None:
    """The v2 cgroup in /proc/PID/cgroup, as a path below the mount; None where there is none.

    A user who may make cgroups (v1's too) may give them any name without a slash or a newline. So a line ends at a
    newline and nowhere else, and no part of a name is stripped.
    """
    for line in text.split(b"\n"):
        if line.startswith(b"0::"):
            return os.fsdecode(line[3:].lstrip(b"/"))
    return None


def whole_of_process(pid: int) -> Path:
    """The cgroup that a process cannot leave by a mount of its own: the root of its cgroup namespace, where it is in
    one that is not the caller's and at or below that root; else its own cgroup. Raises FileNotFoundError, KernelError.

    The process may move meanwhile, from cgroup to cgroup below that root, so that no two readings of where it is fit
    together. The depth of the root is known all the same, by how the caller's own place is seen from there.
    """
    namespace = f"/proc/{pid}/ns/cgroup"
    if os.stat(namespace).st_ino == os.stat("/proc/thread-self/ns/cgroup").st_ino:
        return of_process(pid)
    here = _levels("thread-self")
    with _in_namespace(namespace):
        here_from_root, place_from_root = _levels("thread-self"), _levels(str(pid))
    path, top = of_process(pid), v2_mount()
    depth = _depth(here) - _depth(here_from_root)
    if ".." in place_from_root or not 0 <= depth <= len(path.relative_to(top).parts):
        return path
    return top.joinpath(*path.relative_to(top).parts[:depth])


@contextlib.contextmanager
def _in_namespace(path: str) -> Iterator[None]:
    """Run the block with the calling thread in the cgroup namespace at ``path``; it stays in its cgroup."""
    with open("/proc/thread-self/ns/cgroup", "rb") as home, open(path, "rb") as namespace:
        syscall("setns", namespace.fileno(), _CLONE_NEWCGROUP)
        try:
            yield
        finally:
            syscall("setns", home.fileno(), _CLONE_NEWCGROUP)


def _levels(process: str) -> tuple[str, ...]:
    """The parts of a process's cgroup, as seen from the caller's cgroup namespace: its root's own are left out, and
    each level above that is "..".
    """
    return Path(parse_membership(Path(f"/proc/{process}/cgroup").read_bytes()) or "").parts


def _depth(levels: tuple[str, ...]) -> int:
    """How far below its namespace's root a cgroup is; less than 0 above it."""
    return sum(-1 if level == ".." else 1 for level in levels)


def enable_controllers(path: Path, names: Iterable[str]) -> None:
    """Give the cgroups below ``path`` the controllers ``names``, those of them that its parent has."""
    for folder in (path.parent, path):
        available = (folder / "cgroup.controllers").read_text().split()
        for name in names:
            if name in available:
                with contextlib.suppress(OSError):  # EBUSY: a process is in the cgroup itself
                    (folder / "cgroup.subtree_control").write_text(f"+{name}")


def make(path: Path) -> None:
    """Make a cgroup of Graft's own, and those above it that are missing. Quick if it is there.

    Only root may list what this makes: whoever may list a folder can hold its lock, and nobody could make a cgroup in
    it then, or look one up. For the same reason the folder above is not touched where the cgroup is there.
    """
    if path.is_dir():
        return
    make(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=_SEARCH_ONLY)
        path.chmod(_SEARCH_ONLY)


def enter(path: Path) -> None:
    """Move the calling process into a cgroup."""
    (path / "cgroup.procs").write_text("0")


def tree(path: Path) -> Iterator[Path]:
    """A cgroup and all below it, parents first, read lazily; nothing where it does not exist.

    With a queue, and not recursive (as os.walk() is): a container that may make cgroups may nest them a thousand deep.
    Those whose path would be too long are left out.
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
    """The processes of a cgroup and of all below it, read lazily."""
    for folder in tree(path):
        with contextlib.suppress(OSError), (folder / "cgroup.procs").open("rb") as listed:
            for line in listed:
                yield int(line)


def processes(path: Path) -> list[int]:
    """The processes of a cgroup and of all below it; empty where it does not exist."""
    return list(each_process(path))


def populated(path: Path) -> bool:
    """Whether any process is in a cgroup or below; False where it does not exist."""
    try:
        return "populated 1" in (path / "cgroup.events").read_text()
    except OSError:
        return False


def kill(path: Path) -> None:
    """Kill every process of a cgroup and below it (by cgroup.kill, or before 5.14 one by one)."""
    try:
        (path / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        for pid in processes(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    except OSError as error:
        if error.errno != errno.ENODEV:  # it was removed just now
            raise


def remove(path: Path, patience: float = 5.0) -> None:
    """Remove a cgroup with those below it, waiting up to ``patience`` seconds for killed processes to end."""
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
