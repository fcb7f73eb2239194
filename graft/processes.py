"""The processes of a container, by the thread ids that notifications name, each asked for once.

A kept pidfd names one thread for ever: when its number is given to another, the kept one answers ESRCH, and
the number is looked up anew. Kernels before 6.9 have pidfds of processes only, where a dead thread's number
could come back in another process of the same container; there nothing is kept.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict

from graft.kernel.pidfd import pidfd_getfd, pidfd_open_thread, threads_have_pidfds

_KEPT = 256


class Processes:
    """Copies of other processes' descriptors."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._keep = threads_have_pidfds()

    def get_fd(self, tid: int, fd: int) -> int:
        """A copy of descriptor ``fd`` of the thread ``tid``. Raises OSError (EBADF, ESRCH)."""
        pidfd = self._kept.get(tid)
        if pidfd is not None:
            try:
                return pidfd_getfd(pidfd, fd)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
                os.close(self._kept.pop(tid))
        pidfd = pidfd_open_thread(tid)
        if not self._keep:
            try:
                return pidfd_getfd(pidfd, fd)
            finally:
                os.close(pidfd)
        self._kept[tid] = pidfd
        if len(self._kept) > _KEPT:
            os.close(self._kept.popitem(last=False)[1])
        return pidfd_getfd(pidfd, fd)
