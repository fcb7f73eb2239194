"""The processes of a container, by the thread ids in notifications, with a cache of their pidfds.

A cached pidfd refers to one thread for ever: when its id is given to another thread, the cached pidfd fails with
ESRCH, and a new one is opened. Kernels before 6.9 have pidfds of processes only, where a dead thread's id could be
given to a thread in another process of the same container; there nothing is cached.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from graft.kernel.pidfd import file_ids, pidfd_getfd, pidfd_open_thread, threads_have_pidfds
from graft.kernel.tasks import parse_file_ids, parse_groups

_CACHE_SIZE = 256
_GONE = (errno.ESRCH, errno.ENOENT)
_Result = TypeVar("_Result")


class Caller(NamedTuple):
    """Of a thread: its network namespace as /proc/TID/ns/net names it, and the owner of the files that it makes."""

    netns: str
    owner: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Process:
    """A process: its pidfd and its open /proc/PID/fdinfo. Both keep referring to it when its id is given to another."""

    pidfd: int
    fdinfo: int

    def duplicate_fd(self, fd: int) -> int:
        """A duplicate of its descriptor ``fd``. Raises OSError (EBADF, ESRCH)."""
        return pidfd_getfd(self.pidfd, fd)

    def caller(self) -> Caller:
        """Who its thread is now. Raises OSError (ESRCH, ENOENT)."""
        return Caller(os.readlink("../ns/net", dir_fd=self.fdinfo), self.file_owner())

    def file_owner(self) -> tuple[int, int]:
        """Who owns the files that its thread makes now. Raises OSError (ESRCH, ENOENT)."""
        return file_ids(self.pidfd) or parse_file_ids(self._status())

    def groups(self) -> tuple[int, tuple[int, ...]]:
        """Effective and supplementary groups of its thread. Raises OSError (ESRCH, ENOENT)."""
        return parse_groups(self._status())

    def _status(self) -> bytes:
        with open(os.open("../status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fdinfo), "rb") as status:
            return status.read()

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
        return self._ask(tid, lambda process: (process, process.duplicate_fd(fd)))

    def caller(self, tid: int) -> Caller:
        """Who thread ``tid`` is now. Raises OSError (ESRCH, ENOENT)."""
        return self._ask(tid, Process.caller)

    def groups(self, tid: int) -> tuple[int, tuple[int, ...]]:
        """Effective and supplementary groups of thread ``tid``. Raises OSError (ESRCH, ENOENT)."""
        return self._ask(tid, Process.groups)

    def show(self, tid: int, to: Callable[[int, int, int], None]) -> None:
        """Call ``to`` with a thread's id, its pidfd and its /proc/TID/fdinfo, where it was asked about before."""
        process = self._cache.get(tid)
        if process is not None:
            to(tid, process.pidfd, process.fdinfo)

    def close(self) -> None:
        """Close what is cached. Safe to repeat."""
        while self._cache:
            self._cache.popitem()[1].close()

    def _ask(self, tid: int, question: Callable[[Process], _Result]) -> _Result:
        """The answer of the thread's process; a cached one may be of a thread that has ended."""
        process = self._cache.get(tid) if self._cache_size > 1 else None
        if process is not None:
            try:
                return question(process)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                self._cache.pop(tid).close()
        return question(self._open(tid))

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
