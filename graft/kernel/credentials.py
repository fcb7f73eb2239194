"""The calling thread with fewer rights than root's, for a moment: user ids, capabilities.

What a supervisor repeats for a program must not be done with root's rights where the kernel asks, or remembers, who
did it. The system calls are made directly: they change the one thread that makes them, while libc's functions of the
same names change every thread of the process (setresuid(2), "C library/kernel differences").

The saved user id stays root's, which is the way back, and keeps other users' hands off: ptrace and /proc ask for all
three ids. One thing another user's process may do meanwhile is to send a signal to this thread (kill(2) asks for the
real or the saved id). A supervisor that is killed so is started again by its holder.

Sources: setresuid(2), capset(2), credentials(7); kernel/sys.c, kernel/signal.c (kill_ok_by_cred).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from graft.errors import PrivilegeError
from graft.kernel import capabilities
from graft.kernel.syscalls import syscall

_ROOT = 0
_UNMAPPED = 0xFFFFFFFF  # (uid_t) -1: an id that this user namespace has no number for; setresuid: "leave it as it is"


def require_root() -> None:
    """Raises PrivilegeError, at once, for anybody but root."""
    if os.geteuid() != 0:
        raise PrivilegeError("this needs root", "run it with sudo")


@contextlib.contextmanager
def as_user(uid: int, euid: int) -> Iterator[None]:
    """The calling thread, root's, with the real id ``uid`` and the effective one ``euid``, then root's again.

    Unless ``euid`` is root's too it has no effective capability meanwhile. Raises OSError: EPERM for an id of another
    user namespace that this one has no number for.
    """
    if _UNMAPPED in (uid, euid):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    syscall("setresuid", uid, euid, _ROOT)
    try:
        yield
    finally:
        with _or_end():
            syscall("setresuid", _ROOT, _ROOT, _ROOT)


@contextlib.contextmanager
def with_capabilities(*wanted: int) -> Iterator[None]:
    """The calling thread with no effective capabilities but ``wanted``, of those it is permitted, then as it was.

    Its user ids stay. Raises OSError.
    """
    had = capabilities.current()
    fewer = type(had).from_buffer_copy(had)
    mask = sum(1 << one for one in wanted)
    for half, allowed in zip(fewer, (mask & 0xFFFFFFFF, mask >> 32), strict=True):
        half.effective = half.permitted & allowed
    capabilities.set_current(fewer)
    try:
        yield
    finally:
        with _or_end():
            capabilities.set_current(had)


@contextlib.contextmanager
def _or_end() -> Iterator[None]:
    """A way back that fails ends the process: one with the wrong rights must not go on."""
    try:
        yield
    except BaseException:
        os._exit(1)
