"""Which processes have a descriptor of a socket, and copies of it.

A descriptor may be in a message of a unix socket, where no process has it. So this does not tell which sockets exist:
graft/state/inventory.py does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graft.kernel import tasks
from graft.kernel.pidfd import pidfd_getfd, pidfd_open_thread

_MAX_PER_SOCKET = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A descriptor, in the descriptor table of thread ``tid`` of process ``pid``."""

    pid: int
    tid: int
    fd: int


Places = dict[int, tuple[Place, ...]]
"""Inode of a socket -> its descriptors."""


def find(pids: Iterable[int], inodes: frozenset[int]) -> Places:
    """The descriptors that these processes have of the sockets of those inodes."""
    found: dict[int, list[Place]] = {}
    for pid in pids:
        for tid in tasks.descriptor_tables(pid):
            for inode, fd in tasks.open_sockets(tid):
                if inode in inodes and len(found.setdefault(inode, [])) < _MAX_PER_SOCKET:
                    found[inode].append(Place(pid, tid, fd))
    return {inode: tuple(places) for inode, places in found.items()}


@contextlib.contextmanager
def copied(place: Place, inode: int) -> Iterator[int | None]:
    """A copy of a descriptor; None if it is not a descriptor of that socket any more."""
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
