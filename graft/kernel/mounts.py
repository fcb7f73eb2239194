"""mount(2), for the one file system that Graft needs: bpffs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from graft.errors import KernelError

BPFFS = Path("/sys/fs/bpf")
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8  # linux/mount.h


def mount_bpffs(path: Path) -> None:
    """Mount bpffs at its usual place, if ``path`` is below it and nothing is mounted yet. Raises KernelError."""
    if not path.is_relative_to(BPFFS) or os.path.ismount(BPFFS):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), b"mode=0700") != 0:
        raise KernelError(f"cannot mount bpffs: {os.strerror(ctypes.get_errno())}", f"mount -t bpf bpf {BPFFS}")
