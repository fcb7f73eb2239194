"""Which processes have a descriptor of a socket, and copies of it. (A descriptor may be on its way in a unix socket,
where no process has it: which sockets there are, the kernel is asked, graft/state/inventory.py.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graft.kernel import tasks
from graft.kernel.pidfd import pidfd_getfd, pidfd_open_thread

_MOST = 8  # of one socket


@dataclass(frozen=True, slots=True)
class Place:
    """A descriptor of a socket, in the table that thread ``tid`` of process ``pid`` has."""

    pid: int
    tid: int
    fd: int


Places = dict[int, tuple[Place, ...]]
"""Inode of a socket -> where it is."""


def find(pids: Iterable[int], inodes: frozenset[int]) -> Places:
    """Where these processes have the sockets of those inodes."""
    found: dict[int, list[Place]] = {}
    for pid in pids:
        for tid in tasks.descriptor_tables(pid):
            for inode, fd in tasks.open_sockets(tid):
                if inode in inodes and len(found.setdefault(inode, [])) < _MOST:
                    found[inode].append(Place(pid, tid, fd))
    return {inode: tuple(places) for inode, places in found.items()}


@contextlib.contextmanager
def copied(place: Place, inode: int) -> Iterator[int | None]:
    """A copy of a descriptor; None where it is not that socket's any more."""
    copy: int | None = None
    with contextlib.suppress(OSError):
        process = pidfd_open_thread(place.tid)
        try:
            copy = pidfd_getfd(process, place.fd)
        finally:
            os.close(process)
    try:
        yield copy if copy is not None and os.fstat(copy).st_ino == inode else None
    finally:
        if copy is not None:
            os.close(copy)
