"""The processes of a container, by the thread ids in notifications, with a cache of their pidfds.

A cached pidfd refers to one thread for ever: when its id is given to another thread, the cached pidfd fails with
ESRCH, and a new one is opened. Kernels before 6.9 have pidfds of processes only, where a dead thread's id could be
given to a thread in another process of the same container; there nothing is cached.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from dataclasses import dataclass

from graft.kernel.pidfd import pidfd_getfd, pidfd_open_thread, threads_have_pidfds

_CACHE_SIZE = 256


@dataclass(frozen=True, slots=True)
class Process:
    """A process: its pidfd and its open /proc/PID/fdinfo. Both keep referring to it when its id is given to another."""

    pidfd: int
    fdinfo: int

    def duplicate_fd(self, fd: int) -> int:
        """A duplicate of its descriptor ``fd``. Raises OSError (EBADF, ESRCH)."""
        return pidfd_getfd(self.pidfd, fd)

    def close(self) -> None:
        """Close both descriptors."""
        os.close(self.pidfd)
        os.close(self.fdinfo)


class Processes:
    """The processes of the last notifications."""

    def __init__(self) -> None:
        self._cache: OrderedDict[int, Process] = OrderedDict()
        self._cache_size = _CACHE_SIZE if threads_have_pidfds() else 1

    def duplicate_fd(self, tid: int, fd: int) -> tuple[Process, int]:
        """The process of thread ``tid``, and a duplicate of its descriptor ``fd``. Raises OSError (EBADF, ESRCH).

        The process may be closed by the next call.
        """
        process = self._cache.get(tid) if self._cache_size > 1 else None
        if process is not None:
            try:
                return process, pidfd_getfd(process.pidfd, fd)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
                self._cache.pop(tid).close()
        process = self._open(tid)
        return process, process.duplicate_fd(fd)

    def _open(self, tid: int) -> Process:
        pidfd = pidfd_open_thread(tid)
        try:
            folder = os.open(f"/proc/{tid}/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            os.close(pidfd)
            raise
        while len(self._cache) >= self._cache_size:
            self._cache.popitem(last=False)[1].close()
        process = self._cache[tid] = Process(pidfd, folder)
        return process
