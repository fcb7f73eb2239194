"""What a process does to itself before it becomes another program: capabilities, ids, signals, limits. And what /proc
says of another one.

Sources: capabilities(7), prctl(2), execve(2), signal(7), proc_pid_stat(5), proc_pid_status(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import re
import resource
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from graft.errors import NotFoundError
from graft.kernel.syscalls import syscall

_PR_SET_NAME = 15
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER = 47, 3
CAP_NET_ADMIN = 12
_NUMBER = re.compile(rb"[0-9]{1,10}")
_TGID = re.compile(rb"^Tgid:\t([0-9]{1,10})$", re.M)


@dataclass(frozen=True, slots=True)
class User:
    """Whom a program runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def parse_user(text: str) -> User:
    """``NAME``, ``UID``, or either with ``:GROUP`` or ``:GID``. Raises NotFoundError."""
    name, _, group = text.partition(":")
    try:
        if name.isdigit():
            uid = gid = int(name)
            groups: tuple[int, ...] = ()
            with contextlib.suppress(KeyError):
                gid = pwd.getpwuid(uid).pw_gid
        else:
            entry = pwd.getpwnam(name)
            uid, gid = entry.pw_uid, entry.pw_gid
            groups = tuple(os.getgrouplist(name, gid))
        if group:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise NotFoundError(f"--user: there is no {text!r}", "a name or a number, with :GROUP if wanted") from None
    return User(uid, gid, groups or (gid,))


def become(user: User) -> None:
    """Take on the ids of ``user``, for good."""
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def give_up_capability(capability: int) -> None:
    """Make sure that no program executed from here, also one of root's, ever has ``capability`` again."""
    syscall("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    with contextlib.suppress(OSError):
        syscall("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, capability, 0, 0)


def default_signals(mask: Iterable[signal.Signals]) -> None:
    """Undo what Python did to signals at its start, and take back the mask of before."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_by(signum: int) -> None:
    """End the calling process by a signal, so that its parent sees what a program's parent would have seen."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    os.kill(os.getpid(), signum)


def allow_descriptors() -> None:
    """Raise the limit of open descriptors to the most that this process may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep``. For a fresh child that shares nothing with its parent."""
    first = 3
    for fd in sorted(set(keep)):
        os.closerange(first, fd)
        first = max(first, fd + 1)
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def parse_parent(stat: bytes) -> int:
    """The parent in /proc/PID/stat; 0 where that is no such text.

    It is the fourth field, after a name in brackets that may hold anything, brackets and newlines too.
    """
    fields = stat.rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 and _NUMBER.fullmatch(fields[1]) else 0


def parse_thread_group(status: bytes) -> int:
    """The process id of a thread in /proc/TID/status; 0 where it is not there.

    The name, which the program chooses, stands before it; the kernel writes a newline in it as two characters.
    """
    found = _TGID.search(status)
    return int(found[1]) if found else 0


def call_oneself(name: str) -> None:
    """The calling process's name as `ps -o comm` shows it, up to 15 bytes."""
    held = ctypes.create_string_buffer(name.encode()[:15])
    syscall("prctl", _PR_SET_NAME, ctypes.byref(held), 0, 0, 0)
