"""System calls that Python has no function for.

Numbers differ between architectures below 424 and are the same from there on (include/uapi/asm-generic/
unistd.h, arch/x86/entry/syscalls/syscall_64.tbl).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# This process's architecture. A 32-bit Python under a 64-bit kernel gets the kernel's name, but has other numbers
# and layouts, which Graft does not know.
MACHINE = platform.machine() if sys.maxsize > 1 << 32 else f"32-bit {platform.machine()}"

_TABLES: dict[str, dict[str, int]] = {
    "x86_64": {"bpf": 321, "seccomp": 317, "process_vm_readv": 310, "setns": 308, "unshare": 272, "prctl": 157}
    | {"setresuid": 117, "capget": 125, "capset": 126, "keyctl": 250, "kcmp": 312}
    | {"setfsuid": 122, "setfsgid": 123, "setresgid": 119, "setgroups": 116, "renameat2": 316}
    | {"open_by_handle_at": 304},
    "aarch64": {"bpf": 280, "seccomp": 277, "process_vm_readv": 270, "setns": 268, "unshare": 97, "prctl": 167}
    | {"setresuid": 147, "capget": 90, "capset": 91, "keyctl": 219, "kcmp": 272}
    | {"setfsuid": 151, "setfsgid": 152, "setresgid": 149, "setgroups": 159, "renameat2": 276}
    | {"open_by_handle_at": 265},
}
_COMMON = {"openat2": 437, "pidfd_getfd": 438}
_NUMBERS = _TABLES.get(MACHINE, {}) | _COMMON


def number(name: str) -> int:
    """The number of system call ``name`` on this machine. Raises OSError(ENOSYS) where Graft does not know it."""
    try:
        return _NUMBERS[name]
    except KeyError:
        raise OSError(errno.ENOSYS, f"{name}: number not known for {MACHINE}") from None


def syscall(name: str, *arguments: object) -> int:
    """Call ``name`` with ``arguments`` (integers, ctypes objects, bytes). Raises OSError with the call's name."""
    result = int(_syscall(number(name), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
