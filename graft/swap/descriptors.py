"""What else refers to a socket that is replaced: duplicates of its descriptor, and epoll registrations.

ADDFD puts the replacement socket at one descriptor number. Other numbers of the same process that refer to the old
socket need the replacement too, and an epoll instance in which the old socket is registered needs a registration of
the replacement, with the same events and data. Both are rare before a bind or connect, and to find them is a walk
through /proc/PID/fd, so the caller asks the kernel first whether there can be any (`needs_search`).

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
    """The open flags of descriptor ``fd``, with O_CLOEXEC. ``folder``: its process's open /proc/PID/fdinfo.

    Raises OSError where the descriptor is closed.
    """
    info = os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = parse_flags(os.read(info, 256))
    finally:
        os.close(info)
    if found is None:
        raise FileNotFoundError(2, f"flags of descriptor {fd} not found")
    return found


def parse_flags(fdinfo: bytes) -> int | None:
    """The open flags in a descriptor's fdinfo; None where there are none."""
    found = _FLAGS_LINE.search(fdinfo)
    return int(found[1], 8) if found else None


def needs_search(probed: int, references: int, expected_references: int) -> bool:
    """Whether a socket can have duplicates or registrations. Always true where the hook could not see its file."""
    return probed & (PROBED | PROBED_EPOLL) != PROBED or references > expected_references


@dataclass(frozen=True, slots=True)
class Registration:
    """A registration: the epoll descriptor, the number that the socket is registered under, events and data."""

    epoll: int
    fd: int
    events: int
    data: int


@dataclass(frozen=True, slots=True)
class SocketReferences:
    """What else refers to a socket in one process."""

    duplicates: tuple[int, ...]
    registrations: tuple[Registration, ...]


def parse_registrations(epoll: int, fdinfo: bytes, numbers: frozenset[int], inode: int) -> list[Registration]:
    """The registrations of the socket ``inode`` (under any of ``numbers``) in an epoll descriptor's fdinfo."""
    found = []
    for fd, events, data, ino in _EPOLL_LINE.findall(fdinfo):
        if int(fd) in numbers and (not ino or int(ino, 16) == inode):
            found.append(Registration(epoll, int(fd), int(events, 16), int(data, 16)))
    return found


def find_references(tid: int, inode: int, fd: int) -> SocketReferences:
    """What else refers to the socket ``inode``, which is descriptor ``fd``, in the process of thread ``tid``."""
    numbers, epolls = {fd}, []
    folder = f"/proc/{tid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            target = os.readlink(f"{folder}/{name}")
            if target == f"socket:[{inode}]":
                numbers.add(int(name))
            elif target == "anon_inode:[eventpoll]":
                epolls.append(int(name))
    registrations: list[Registration] = []
    for epoll in epolls:
        with contextlib.suppress(OSError), open(f"/proc/{tid}/fdinfo/{epoll}", "rb") as info:
            for line in info:  # one epoll instance may have a million registrations
                registrations += parse_registrations(epoll, line, frozenset(numbers), inode)
    return SocketReferences(tuple(sorted(numbers - {fd})), tuple(registrations))


def copy_registrations(
    registrations: tuple[Registration, ...], replacement: int, duplicate_fd: Callable[[int], int]
) -> None:
    """Register ``replacement`` with every epoll instance in which the old socket is registered.

    An epoll instance identifies a registration by (file, number), and the program uses its own number to change it:
    so ``replacement`` is duplicated to that number in this process during the call. ``duplicate_fd`` duplicates a
    descriptor of the program. Not for a process with several threads.
    """
    for registration in registrations:
        with contextlib.suppress(OSError):
            duplicate = duplicate_fd(registration.epoll)
            try:
                epoll = fcntl.fcntl(duplicate, fcntl.F_DUPFD_CLOEXEC, registration.fd + 1)
            finally:
                os.close(duplicate)
            try:
                with _duplicated_to(replacement, registration.fd):
                    epoll_add(epoll, registration.fd, registration.events, registration.data)
            finally:
                os.close(epoll)


@contextlib.contextmanager
def _duplicated_to(fd: int, number: int):  # type: ignore[no-untyped-def]
    """A duplicate of ``fd`` at ``number``; what this process has at that number is moved, and moved back."""
    moved = None
    try:
        moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, number + 1)
    except OSError as error:
        if error.errno != errno.EBADF:  # it is in use, and cannot be moved
            raise
    if fd != number:
        os.dup2(fd, number, inheritable=False)
    try:
        yield
    finally:
        if moved is None:
            os.close(number)
        else:
            os.dup2(moved, number, inheritable=False)
            os.close(moved)
