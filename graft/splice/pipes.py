"""Pipes to splice through, lent to a connection while it has data in flight: an idle connection has none.

Sources: pipe(7), fcntl(2) for F_SETPIPE_SZ, splice(2). How many slots a pipe has, not its size in bytes, is what a
splice runs out of: each slot holds one piece of a packet, be it one byte.

Which pipe it is, its inode says: a number of 32 bits (get_next_ino of fs/inode.c), never 0, the same for both ends in
all processes. What was in a pipe of a connection that failed is thrown away at once (null(4)), and not only when its
last end is closed: another process may have it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sys
import termios
from collections.abc import Callable

PIPE_BYTES = 1 << 20
SLOW_BYTES = 1 << 16
"""To move in one call where calls are slow: one or two packets over loopback."""


NOT_KEPT = (1 << 16) - 2
"""The number of a pipe that the keeper does not have."""


def inode(fd: int) -> int:
    """That of a pipe, by one of its ends."""
    return os.fstat(fd).st_ino & 0xFFFFFFFF


@functools.cache
def _null() -> int:
    return os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)


def throw_away(read: int) -> None:
    """Throw away what is in a pipe."""
    with contextlib.suppress(OSError):  # BlockingIOError: it is empty
        while os.splice(read, _null(), PIPE_BYTES, flags=os.SPLICE_F_NONBLOCK):
            pass


class Pipe:
    """One pipe: splice into ``write``, out of ``read``. Both descriptors never block. ``number``: by which the keeper
    knows it (kept.py); ``inode``: by which it is known from all others.
    """

    __slots__ = ("inode", "number", "read", "slots", "write")

    def __init__(self, ends: tuple[int, int] | None = None, number: int = NOT_KEPT) -> None:
        """``ends``: those of one that is there already, to read and to write."""
        self.number = number
        self.read, self.write = ends or os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.inode = inode(self.read)
        try:
            self.slots = fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, PIPE_BYTES) // os.sysconf("SC_PAGE_SIZE")
        except OSError:  # more than this user may have: a smaller one works too
            self.slots = fcntl.fcntl(self.write, fcntl.F_GETPIPE_SZ) // os.sysconf("SC_PAGE_SIZE")

    @property
    def filled(self) -> int:
        """How many bytes are in it."""
        return int.from_bytes(fcntl.ioctl(self.read, termios.FIONREAD, bytes(4)), sys.byteorder)

    def close(self) -> None:
        """Close both descriptors; data in the pipe is lost."""
        os.close(self.read)
        os.close(self.write)


def _ignore(_pipe: Pipe) -> None:
    pass


class PipePool:
    """Keeps up to ``kept`` pipes that are not in use. ``made`` and ``closing`` are called for each that is made, and
    before it is closed.
    """

    def __init__(
        self, kept: int = 32, made: Callable[[Pipe], None] = _ignore, closing: Callable[[Pipe], None] = _ignore
    ) -> None:
        self._kept, self._made, self._closing = kept, made, closing
        self._free: list[Pipe] = []

    def get(self) -> Pipe | None:
        """An empty pipe; None where the kernel gives none."""
        if self._free:
            return self._free.pop()
        try:
            pipe = Pipe()
        except OSError:
            return None
        self._made(pipe)
        return pipe

    def put(self, pipe: Pipe) -> None:
        """Keep an empty pipe for its next use, or close it."""
        if len(self._free) < self._kept:
            self._free.append(pipe)
        else:
            self.discard(pipe)

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe; data in it is lost."""
        throw_away(pipe.read)
        self._closing(pipe)
        pipe.close()

    def close(self) -> None:
        """Close the pipes that are not in use."""
        for pipe in self._free:
            pipe.close()
        self._free.clear()
