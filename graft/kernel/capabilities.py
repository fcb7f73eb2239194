"""Capabilities of the calling thread: read, set, and dropped permanently.

Sources: capabilities(7), capget(2), prctl(2). After execve(2) a program of root's has what is in the
bounding set or the inheritable one, whatever was permitted before: to drop a capability it must be removed from
every set.
"""

from __future__ import annotations

import ctypes

from graft.kernel.syscalls import syscall

_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 3, 4
CAP_NET_ADMIN = 12


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    """The lower or the upper 32 capabilities."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


Halves = ctypes.Array[_Sets]


def current() -> Halves:
    """The thread's three sets. Raises OSError."""
    halves = (_Sets * 2)()
    syscall("capget", ctypes.byref(_Header(_VERSION_3, 0)), halves)
    return halves


def set_current(halves: Halves) -> None:
    """Set the thread's three sets. Raises OSError (EPERM for more than is permitted)."""
    syscall("capset", ctypes.byref(_Header(_VERSION_3, 0)), halves)


def drop(capability: int) -> None:
    """Make sure that no program executed from here, not even one of root's, has ``capability`` again.

    Raises OSError (EPERM without CAP_SETPCAP).
    """
    syscall("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, capability, 0, 0)
    halves = current()
    half, bit = halves[capability // 32], 1 << capability % 32
    half.effective &= ~bit
    half.permitted &= ~bit
    half.inheritable &= ~bit
    set_current(halves)


def drop_all() -> None:
    """Drop all, and pass none on. The bounding set stays: a set-user-id program gets its capabilities as before."""
    syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    set_current((_Sets * 2)())
