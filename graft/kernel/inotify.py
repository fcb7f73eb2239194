"""Changes of folders, as the kernel reports them: inotify(7).

A folder of the cgroup tree reports the cgroups that are made and removed in it, whoever does it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)

# include/uapi/linux/inotify.h
MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x40, 0x80, 0x100, 0x200
DELETE_SELF, OVERFLOW, IGNORED = 0x400, 0x4000, 0x8000
ONLYDIR = 0x01000000
CHANGES = CREATE | DELETE | MOVED_FROM | MOVED_TO | DELETE_SELF
_EVENT = struct.Struct("=iIII")
_READ_SIZE = 64 << 10


class Event(NamedTuple):
    """A change: which watch saw it, what it is, and the name in the folder."""

    watch: int
    mask: int
    name: str


def open_inotify() -> int:
    """A descriptor that events are read from; it does not block. Raises OSError."""
    return _checked("inotify_init1", _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def watch_folder(fd: int, path: str) -> int:
    """Watch the names in a folder. Returns the watch's number, the same if it is watched already. Raises OSError."""
    return _checked("inotify_add_watch", _libc.inotify_add_watch(fd, os.fsencode(path), CHANGES | ONLYDIR))


def _checked(name: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def read_events(fd: int) -> list[Event]:
    """What has changed since the last call. Raises OSError."""
    try:
        return [*parse_events(os.read(fd, _READ_SIZE))]
    except BlockingIOError:
        return []


def parse_events(raw: bytes) -> Iterator[Event]:
    """The events in what was read: struct inotify_event, each with a name that NULs make longer."""
    at = 0
    while at + _EVENT.size <= len(raw):
        watch, mask, _cookie, length = _EVENT.unpack_from(raw, at)
        at += _EVENT.size
        yield Event(watch, mask, os.fsdecode(raw[at : at + length].rstrip(b"\0")))
        at += length
