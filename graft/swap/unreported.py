"""Binds that succeeded, but whose callers did not get the result, because a signal interrupted their calls.

The kernel restarts such a call, and the second bind of the same address must succeed without being made again. Not
every one is restarted (its caller may have died), and a container decides how many there are. So the oldest are
dropped: if one of those is restarted after all, it gets the kernel's own errno. Pure.
"""

from __future__ import annotations

MAX_CALLERS = 256

Caller = tuple[int, int]
"""A thread's id, and the number of the descriptor in its call."""


class UnreportedBinds:
    """The last ``limit`` callers that did not get the result of their bind."""

    def __init__(self, limit: int = MAX_CALLERS) -> None:
        self._callers: dict[Caller, None] = {}
        self._limit = limit

    def __len__(self) -> int:
        return len(self._callers)

    def add(self, thread: int, fd: int) -> None:
        """Add a caller, as the newest."""
        self.remove(thread, fd)
        while len(self._callers) >= self._limit:
            del self._callers[next(iter(self._callers))]
        self._callers[thread, fd] = None

    def remove(self, thread: int, fd: int) -> bool:
        """Remove a caller; whether it was there."""
        if (thread, fd) not in self._callers:
            return False
        del self._callers[thread, fd]
        return True
