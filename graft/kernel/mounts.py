"""bpffs, the one file system that Graft needs: mounted, and root's alone.

The kernel's own mode for it is 1777, as for /tmp. There any user could have made `graft`, or a link of that name,
before Graft does. systemd mounts it 0700, and so does this.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from graft.errors import KernelError, RefusedError
from graft.kernel.ownership import problem_of

BPFFS = Path("/sys/fs/bpf")
MOUNT = f"mount -t bpf -o mode=0700 bpf {BPFFS}"
"""What an operator types."""
PRIVATE = 0o700
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8  # linux/mount.h


def mount_bpffs(path: Path) -> None:
    """Mount bpffs at its usual place, if ``path`` is below it and nothing is mounted yet; and make it root's alone.

    Raises KernelError, and RefusedError for a folder above ``path`` that others can write.
    """
    if path.is_relative_to(BPFFS):
        if not os.path.ismount(BPFFS):
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), b"mode=0700"):
                raise KernelError(f"cannot mount bpffs: {os.strerror(ctypes.get_errno())}", MOUNT)
        elif problem_of(BPFFS.lstat()):
            os.chmod(BPFFS, PRIVATE)
    if path.parent.exists() and (problem := problem_of(path.parent.lstat())):
        raise RefusedError(f"{path.parent}: {problem}; nothing is pinned there", f"chmod go-w {path.parent}")


def check_own(path: Path) -> None:
    """Raises RefusedError for something at ``path`` that is not root's: it was made while others could write there."""
    try:
        problem = problem_of(path.lstat())
    except FileNotFoundError:
        return
    if problem:
        raise RefusedError(f"{path}: {problem}", "look at it, and remove it")
