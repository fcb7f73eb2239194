"""Pipes to splice through, lent to a connection while it has data in flight: an idle connection has none.

Sources: pipe(7), fcntl(2) for F_SETPIPE_SZ, splice(2). How many slots a pipe has, not its size in bytes, is what a
splice runs out of: each slot holds one piece of a packet, be it one byte.
"""

from __future__ import annotations

import fcntl
import os

PIPE_BYTES = 1 << 20
SLOW_BYTES = 1 << 16
"""To move in one call where calls are slow: one or two packets over loopback."""


class Pipe:
    """One pipe: splice into ``write``, out of ``read``. Both descriptors never block."""

    __slots__ = ("read", "slots", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.slots = fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, PIPE_BYTES) // os.sysconf("SC_PAGE_SIZE")
        except OSError:  # more than this user may have: a smaller one works too
            self.slots = fcntl.fcntl(self.write, fcntl.F_GETPIPE_SZ) // os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Close both descriptors; data in the pipe is lost."""
        os.close(self.read)
        os.close(self.write)


class PipePool:
    """Keeps up to ``kept`` pipes that are not in use."""

    def __init__(self, kept: int = 32) -> None:
        self._kept = kept
        self._free: list[Pipe] = []

    def get(self) -> Pipe | None:
        """An empty pipe; None where the kernel gives none."""
        if self._free:
            return self._free.pop()
        try:
            return Pipe()
        except OSError:
            return None

    def put(self, pipe: Pipe) -> None:
        """Keep an empty pipe for its next use, or close it."""
        if len(self._free) < self._kept:
            self._free.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Close the pipes that are not in use."""
        for pipe in self._free:
            pipe.close()
        self._free.clear()
