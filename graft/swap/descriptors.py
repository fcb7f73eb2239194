"""What else hangs on a descriptor when its socket is replaced: dup'ed copies and epoll registrations.

ADDFD puts the twin at one number. Another number of the same process that meant the old socket has to be
given the twin too, and an epoll instance that watched the old one has to watch the twin with the same events
and the same data. Both are rare before a bind or connect, and finding them costs a walk through
/proc/PID/fd, so the caller asks the kernel first whether there can be any (`must_look`).

Sources: proc_pid_fd(5), proc_pid_fdinfo(5), epoll_ctl(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from graft.datapath.layout import PROBED, PROBED_EPOLL
from graft.kernel.epoll import epoll_add

_EPOLL_LINE = re.compile(
    rb"^tfd: *([0-9]{1,10}) +events: *([0-9a-f]{1,8}) +data: *([0-9a-f]{1,16})"
    rb"(?: +pos: *-?[0-9]{1,20} +ino: *([0-9a-f]{1,16}))?\b",
    re.M,
)
_FLAGS_LINE = re.compile(rb"^flags:\t([0-7]{1,12})$", re.M)


def descriptor_flags(folder: int, fd: int) -> int:
    """The open flags of descriptor ``fd``, O_CLOEXEC among them. ``folder``: its process's /proc/PID/fdinfo, open.

    Raises OSError where it is gone.
    """
    info = os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = parse_flags(os.read(info, 256))
    finally:
        os.close(info)
    if found is None:
        raise FileNotFoundError(2, f"no flags of descriptor {fd}")
    return found


def parse_flags(fdinfo: bytes) -> int | None:
    """The open flags in a descriptor's fdinfo; None where they are not there."""
    found = _FLAGS_LINE.search(fdinfo)
    return int(found[1], 8) if found else None


def must_look(probed: int, references: int, expected_references: int) -> bool:
    """Whether the kernel's probe leaves room for a copy or a registration. Without a probe: always."""
    return probed & (PROBED | PROBED_EPOLL) != PROBED or references > expected_references


@dataclass(frozen=True, slots=True)
class Registration:
    """One registration: epoll descriptor, the number it is registered under, events and data."""

    epoll: int
    fd: int
    events: int
    data: int


@dataclass(frozen=True, slots=True)
class SocketReferences:
    """What hangs on a socket in one process."""

    copies: tuple[int, ...]
    watches: tuple[Registration, ...]


def parse_registrations(epoll: int, fdinfo: bytes, numbers: frozenset[int], inode: int) -> list[Registration]:
    """The registrations of the socket ``inode`` (under any of ``numbers``) in an epoll descriptor's fdinfo."""
    found = []
    for fd, events, data, ino in _EPOLL_LINE.findall(fdinfo):
        if int(fd) in numbers and (not ino or int(ino, 16) == inode):
            found.append(Registration(epoll, int(fd), int(events, 16), int(data, 16)))
    return found


def find(tid: int, inode: int, fd: int) -> SocketReferences:
    """All that hangs on the socket ``inode``, which the process knows as ``fd``, in the process of ``tid``."""
    numbers, epolls = {fd}, []
    folder = f"/proc/{tid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            target = os.readlink(f"{folder}/{name}")
            if target == f"socket:[{inode}]":
                numbers.add(int(name))
            elif target == "anon_inode:[eventpoll]":
                epolls.append(int(name))
    watches: list[Registration] = []
    for epoll in epolls:
        with contextlib.suppress(OSError), open(f"/proc/{tid}/fdinfo/{epoll}", "rb") as info:
            for line in info:  # a program may watch a million descriptors
                watches += parse_registrations(epoll, line, frozenset(numbers), inode)
    return SocketReferences(tuple(sorted(numbers - {fd})), tuple(watches))


def register_again(watches: tuple[Registration, ...], twin: int, get_fd: Callable[[int], int]) -> None:
    """Register ``twin`` with every epoll instance that watched the old socket.

    An epoll instance knows a registration by (file, number), and the program will change it by its own
    number: so the twin stands at that number of ours for the time of the call. ``get_fd`` gives a copy of a
    descriptor of the program. Not for a process with several threads.
    """
    for watch in watches:
        with contextlib.suppress(OSError):
            held = get_fd(watch.epoll)
            try:
                epoll = fcntl.fcntl(held, fcntl.F_DUPFD_CLOEXEC, watch.fd + 1)
            finally:
                os.close(held)
            try:
                with _standing_at(twin, watch.fd):
                    epoll_add(epoll, watch.fd, watch.events, watch.data)
            finally:
                os.close(epoll)


@contextlib.contextmanager
def _standing_at(fd: int, number: int):  # type: ignore[no-untyped-def]
    """``fd`` also at ``number``, whatever of ours was there put aside."""
    aside = None
    try:
        aside = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, number + 1)
    except OSError as error:
        if error.errno != errno.EBADF:  # it is in use, and cannot be put aside
            raise
    if fd != number:
        os.dup2(fd, number, inheritable=False)
    try:
        yield
    finally:
        if aside is None:
            os.close(number)
        else:
            os.dup2(aside, number, inheritable=False)
            os.close(aside)
