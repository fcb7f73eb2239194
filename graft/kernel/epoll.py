"""epoll_ctl(2) with data that the caller chooses, which Python's own epoll does not offer."""

from __future__ import annotations

import ctypes
import os

from graft.kernel.syscalls import MACHINE

_libc = ctypes.CDLL(None, use_errno=True)
_CTL_ADD = 1


def event_type(machine: str) -> type[ctypes.Structure]:
    """struct epoll_event: packed on x86-64 only (include/uapi/linux/eventpoll.h, EPOLL_PACKED)."""

    class Event(ctypes.Structure):
        _pack_ = 1 if machine == "x86_64" else 8
        _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))

    return Event


_Event = event_type(MACHINE)


def epoll_add(epoll: int, fd: int, events: int, data: int) -> None:
    """Register ``fd`` with the instance ``epoll``. Raises OSError (EEXIST where it is registered already)."""
    event = _Event(events, data)
    if _libc.epoll_ctl(epoll, _CTL_ADD, fd, ctypes.byref(event)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"epoll_ctl: {os.strerror(code)}")
