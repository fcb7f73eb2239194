"""Changes to the calling process, most of them before it executes a program: ids, signals, limits, its name.

Sources: prctl(2), execve(2), signal(7). Capabilities: graft/kernel/capabilities.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import resource
import signal
from collections.abc import Iterable
from typing import NamedTuple

from graft.errors import NotFoundError, UsageError
from graft.kernel.syscalls import syscall

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_MAX_ID = (1 << 32) - 2  # the one above it is -1, by which setresuid(2) and setresgid(2) leave an id as it is


class User(NamedTuple):
    """The ids that a program runs with."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def parse_user(text: str, field: str = "--user") -> User:
    """``NAME``, ``UID``, or either with ``:GROUP`` or ``:GID``. Raises NotFoundError, UsageError, naming ``field``."""
    name, _, group = text.partition(":")
    try:
        if (number := _parse_id(name, field)) is not None:
            uid = gid = number
            groups: tuple[int, ...] = ()
            with contextlib.suppress(KeyError):
                gid = pwd.getpwuid(uid).pw_gid
        else:
            entry = pwd.getpwnam(name)
            uid, gid = entry.pw_uid, entry.pw_gid
            groups = tuple(os.getgrouplist(name, gid))
        if group:
            number = _parse_id(group, field)
            gid = grp.getgrnam(group).gr_gid if number is None else number
    except KeyError:
        raise NotFoundError(f"{field}: {text!r} not found", "a name or a number, with :GROUP if wanted") from None
    return User(uid, gid, groups or (gid,))


def _parse_id(text: str, field: str) -> int | None:
    """The id in ``text``, None where that is a name. Raises UsageError for a number that is no id."""
    if not (text.isascii() and text.isdigit()):
        return None
    if len(text) > len(str(_MAX_ID)) or int(text) > _MAX_ID:
        from graft.model.address import shown

        raise UsageError(f"{field}: {shown(text)} is not an id", f"0 to {_MAX_ID}")
    return int(text)


def switch_user(user: User) -> None:
    """Switch to the ids of ``user``, permanently. Raises ValueError for an id that the kernel would leave as it is."""
    if not (0 <= user.uid <= _MAX_ID and 0 <= user.gid <= _MAX_ID):
        raise ValueError(f"not an id: {user}")
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def restore_signals(mask: Iterable[signal.Signals]) -> None:
    """Undo what Python changed about signals when it started, and set the signal mask ``mask``."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def die_by_signal(signum: int) -> None:
    """End the calling process by a signal, so that its parent sees the status of the program that the signal ended."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    os.kill(os.getpid(), signum)


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_descriptor_limit() -> None:
    """Raise the limit of open descriptors to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def oom_score(pid: int) -> bytes:
    """How likely the kernel kills a process when there is no memory: its oom_score_adj (proc(5)). Raises OSError."""
    with open(f"/proc/{pid}/oom_score_adj", "rb") as file:
        return file.read()


def set_oom_score(score: bytes) -> None:
    """Give the calling process what `oom_score` gave, if it may have that (lower: by CAP_SYS_RESOURCE only)."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)  # O_CREAT would wait for the folder's lock
        try:
            os.write(fd, score)
        finally:
            os.close(fd)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep``. For a new child that shares nothing with its parent."""
    first = 3
    for fd in sorted(set(keep)):
        os.closerange(first, fd)
        first = max(first, fd + 1)
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def die_with(parent: int) -> None:
    """Have this process killed when the thread that started it ends, or end it now where ``parent`` has ended already.

    By the time that the parent's own parent knows of the end, the signal is there: nothing but a system call that has
    begun is completed (PR_SET_PDEATHSIG of prctl(2); forget_original_parent, kernel/exit.c).
    """
    syscall("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def end_after(seconds: int) -> None:
    """Have the process end when so many seconds are over (alarm(2)), unless it handles SIGALRM; 0: not any more."""
    signal.alarm(seconds)


def set_process_name(name: str) -> None:
    """Set the calling process's name as `ps -o comm` shows it, up to 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    syscall("prctl", _PR_SET_NAME, ctypes.byref(buffer), 0, 0, 0)
