"""Whether two processes are in the same place: what one does for the other happens as if the other had done it itself.

Compared are ids, capabilities, namespaces, the root folder, hard limits, and what confines a process besides (seccomp,
a security module). A process must not have another one do what itself it could not; one with another view of files,
processes or cgroups would mean others by the same names; one with lower limits could not do as much.

Sources: namespaces(7), capabilities(7), proc(5), unix(7) (SO_PEERCRED), proc_pid_limits() in fs/proc/base.c.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import zlib
from typing import NamedTuple

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_NAMESPACES = ("mnt", "pid", "user", "cgroup", "net", "ipc", "uts", "time")
_LOOKED_UP = (
    *("status", "attr/current", "root", "limits", "mountinfo", "fd", "oom_score_adj", "task/{pid}/ns/cgroup", "stat"),
    *(f"ns/{name}" for name in _NAMESPACES),
)
_PROTOCOL = 2  # raised with what is said before the first message (fork_messages.py)
_HARD = slice(47, 67)  # the third column, "%-25s %-20s %-20s %-10s\n"
_RIGHTS = (b"Uid", b"CapEff", b"CapPrm", b"CapBnd", b"NoNewPrivs", b"Seccomp")


class Surroundings(NamedTuple):
    """Of one process: lines of its status, inodes of the namespaces that the kernel has, its root, its label, and the
    hard limits of its resources.
    """

    rights: tuple[bytes, ...]
    namespaces: tuple[int, ...]
    root: tuple[int, int]
    label: bytes
    limits: tuple[bytes, ...]

    @property
    def is_filtered(self) -> bool:
        """Whether a seccomp filter judges its calls. Two processes under one may be under different ones."""
        return self.rights[_RIGHTS.index(b"Seccomp") :] not in ((b"\t0",), (b"",), ())

    @property
    def name(self) -> str:
        """A short name; two that have the same one may still differ. Servers that do not speak the same have others."""
        return f"{zlib.crc32(repr((_PROTOCOL, *self)).encode()):08x}"


def of(process: int | str = "self") -> Surroundings:
    """Those of a process. Raises OSError where it has ended, or is out of reach."""
    folder = f"/proc/{process}"
    with open(f"{folder}/status", "rb") as file:
        status = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
    label = b""
    with contextlib.suppress(OSError), open(f"{folder}/attr/current", "rb") as file:
        label = file.read()
    inodes = []
    for name in _NAMESPACES:
        with contextlib.suppress(FileNotFoundError):
            inodes.append(os.stat(f"{folder}/ns/{name}").st_ino)
    root = os.stat(f"{folder}/root/")
    rights = tuple(status.get(name, b"") for name in _RIGHTS)
    return Surroundings(rights, tuple(inodes), (root.st_dev, root.st_ino), label, _hard_limits(folder))


def pin_own() -> list[int]:
    """Descriptors that keep what is looked up in /proc/self in the kernel's cache: each user may list that folder, and
    so hold it, and whoever looks up there what is not in the cache waits for him. To be called first of all, by a child
    that nobody has seen yet. They are of the names themselves, not of what the links lead to (a namespace, the root).
    """
    pinned, pid = [], os.getpid()
    for name in _LOOKED_UP:
        with contextlib.suppress(OSError):
            pinned.append(os.open(f"/proc/self/{name.format(pid=pid)}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
    return pinned


def _hard_limits(folder: str) -> tuple[bytes, ...]:
    with open(f"{folder}/limits", "rb") as file:
        return tuple(line[_HARD].strip() for line in file.read().splitlines()[1:])


def peer_pid(connection: socket.socket) -> int:
    """The number of the process that connected, or listened: another process may have it by now (peers.py)."""
    return int(_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
