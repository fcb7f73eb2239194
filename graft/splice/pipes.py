"""Pipes to splice through, lent while data is in flight, so that an idle connection has none.

Sources: pipe(7), fcntl(2) for F_SETPIPE_SZ, splice(2). How many slots a pipe has, not its size in bytes, is what a
splice runs out of: each slot holds one piece of a packet, be it one byte.
"""

from __future__ import annotations

import fcntl
import os

PIPE_BYTES = 1 << 20
SLOTS = PIPE_BYTES // os.sysconf("SC_PAGE_SIZE")


class Pipe:
    """One pipe: splice into ``write``, out of ``read``. Both descriptors never block."""

    __slots__ = ("read", "slots", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.slots = fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, PIPE_BYTES) // os.sysconf("SC_PAGE_SIZE")
        except OSError:  # beyond what this user may have: a small one works too
            self.slots = fcntl.fcntl(self.write, fcntl.F_GETPIPE_SZ) // os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Give both descriptors back, with whatever is in it."""
        os.close(self.read)
        os.close(self.write)


class Pipes:
    """Pipes, of which up to ``kept`` wait for their next use."""

    def __init__(self, kept: int = 32) -> None:
        self._kept = kept
        self._free: list[Pipe] = []

    def take(self) -> Pipe | None:
        """An empty pipe; None where the kernel has none."""
        if self._free:
            return self._free.pop()
        try:
            return Pipe()
        except OSError:
            return None

    def give(self, pipe: Pipe) -> None:
        """Take back an empty pipe."""
        if len(self._free) < self._kept:
            self._free.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close the pipes that wait."""
        for pipe in self._free:
            pipe.close()
        self._free.clear()
