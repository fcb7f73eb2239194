"""epoll_ctl(2) with the data of the caller's choice, which Python's own epoll does not offer."""

from __future__ import annotations

import ctypes
import os
import platform

_libc = ctypes.CDLL(None, use_errno=True)
_CTL_ADD = 1


class _Event(ctypes.Structure):
    # Packed on x86-64 only (include/uapi/linux/eventpoll.h, EPOLL_PACKED).
    _pack_ = 1 if platform.machine() == "x86_64" else 8
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


def epoll_add(epoll: int, fd: int, events: int, data: int) -> None:
    """Register ``fd`` with the instance ``epoll``. Raises OSError (EEXIST where it is registered already)."""
    event = _Event(events, data)
    if _libc.epoll_ctl(epoll, _CTL_ADD, fd, ctypes.byref(event)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"epoll_ctl: {os.strerror(code)}")
