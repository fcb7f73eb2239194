"""The processes of a container, by the thread ids that notifications name, each asked for once.

A kept pidfd names one thread for ever: when its number is given to another, the kept one answers ESRCH, and
the number is looked up anew. Kernels before 6.9 have pidfds of processes only, where a dead thread's number
could come back in another process of the same container; there nothing is kept.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from dataclasses import dataclass

from graft.kernel.pidfd import pidfd_getfd, pidfd_open_thread, threads_have_pidfds

_KEPT = 256


@dataclass(frozen=True, slots=True)
class Process:
    """A process as a notification found it: its pidfd, and its /proc/PID/fdinfo, which is as steadfast."""

    pidfd: int
    fdinfo: int

    def get_fd(self, fd: int) -> int:
        """A copy of its descriptor ``fd``. Raises OSError (EBADF, ESRCH)."""
        return pidfd_getfd(self.pidfd, fd)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.pidfd)
        os.close(self.fdinfo)


class Processes:
    """The processes that were met, the last ones kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Process] = OrderedDict()
        self._most = _KEPT if threads_have_pidfds() else 1

    def copy_of(self, tid: int, fd: int) -> tuple[Process, int]:
        """The process of thread ``tid``, and a copy of its descriptor ``fd``. Raises OSError (EBADF, ESRCH).

        The process is good until the next call.
        """
        process = self._kept.get(tid) if self._most > 1 else None
        if process is not None:
            try:
                return process, pidfd_getfd(process.pidfd, fd)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
                self._kept.pop(tid).close()
        process = self._open(tid)
        return process, process.get_fd(fd)

    def _open(self, tid: int) -> Process:
        pidfd = pidfd_open_thread(tid)
        try:
            folder = os.open(f"/proc/{tid}/fdinfo", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            os.close(pidfd)
            raise
        while len(self._kept) >= self._most:
            self._kept.popitem(last=False)[1].close()
        process = self._kept[tid] = Process(pidfd, folder)
        return process
