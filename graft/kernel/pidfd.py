"""Other processes by descriptor: pidfd_open(2) of threads, pidfd_getfd(2), their ids, process_vm_readv(2).

A pidfd always refers to the same process, so nothing here can affect another one that got its id. For a process
os.pidfd_open() is used directly.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct

from graft.kernel.syscalls import number
from graft.kernel.tasks import parse_thread_group

_libc = ctypes.CDLL(None, use_errno=True)
PIDFD_THREAD = os.O_EXCL  # since 6.9, include/uapi/linux/pidfd.h
MAX_PID = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h


def pidfd_open_thread(tid: int) -> int:
    """A descriptor of thread ``tid``, or of its process where the kernel has none for threads."""
    try:
        return os.pidfd_open(tid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.pidfd_open(thread_group(tid))


def thread_group(tid: int) -> int:
    """The id of the process of thread ``tid``. Raises ProcessLookupError."""
    try:
        with open(f"/proc/{tid}/status", "rb") as status:
            found = parse_thread_group(status.read())
    except FileNotFoundError:
        found = 0
    if not found:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} not found")
    return found


_process_vm_readv = _libc.process_vm_readv  # in glibc and musl
_getfd_number = ctypes.c_long(number("pidfd_getfd"))
_zero = ctypes.c_uint(0)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of descriptor ``fd`` of that process, close-on-exec. Raises OSError (EBADF, ESRCH)."""
    copy = int(_libc.syscall(_getfd_number, pidfd, fd, _zero))
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
    return copy


def has_ended(pidfd: int) -> bool:
    """Whether that process has ended, even if its parent has not waited for it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


# PIDFD_GET_INFO (6.13) and struct pidfd_info, include/uapi/linux/pidfd.h: mask, cgroupid, then pid, tgid, ppid, ruid,
# rgid, euid, egid, suid, sgid, fsuid, fsgid, exit_code.
_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_INFO_CREDS = 1 << 1
_INFO_QUESTION = struct.pack("=Q56x", _INFO_CREDS)
_INFO_FILE_IDS = struct.Struct("=Q44x2I")
_NOT_SUPPORTED = (errno.ENOTTY, errno.EINVAL)


def file_ids(pidfd: int) -> tuple[int, int] | None:
    """User and group of the files that a thread makes (fsuid and fsgid of setfsuid(2)), by its pidfd.

    None where the kernel does not tell them so. Raises OSError (ESRCH).
    """
    try:
        mask, uid, gid = _INFO_FILE_IDS.unpack_from(fcntl.ioctl(pidfd, _GET_INFO, _INFO_QUESTION))
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return None
    return (uid, gid) if mask & _INFO_CREDS else None


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("len", ctypes.c_size_t))


class MemoryReader:
    """Reads up to ``size`` bytes of another process's memory, with one system call and no allocation.

    What is read is only a hint: the process may change it at any time.
    """

    def __init__(self, size: int = 128) -> None:
        self._buffer = ctypes.create_string_buffer(size)
        self._local = _Iovec(ctypes.addressof(self._buffer), size)
        self._remote = _Iovec(0, size)
        self._tail = (
            ctypes.byref(self._local),
            ctypes.c_ulong(1),
            ctypes.byref(self._remote),
            ctypes.c_ulong(1),
            ctypes.c_ulong(0),
        )
        self._size = size

    def read(self, pid: int, address: int, size: int) -> bytes:
        """``size`` bytes at ``address`` (at most the reader's own size). Raises OSError (EFAULT, ESRCH)."""
        size = min(size, self._size)
        if size != self._local.len:
            self._local.len = self._remote.len = size
        self._remote.base = address
        got = int(_process_vm_readv(pid, *self._tail))
        if got < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"process_vm_readv: {os.strerror(code)}")
        return self._buffer.raw[:got]


def threads_have_pidfds() -> bool:
    """Whether this kernel has pidfds of single threads (6.9)."""
    try:
        os.close(os.pidfd_open(os.getpid(), PIDFD_THREAD))
    except OSError:
        return False
    return True
