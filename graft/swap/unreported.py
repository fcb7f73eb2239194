"""Binds that were done, but whose callers a signal kept from hearing so: they come again, and must not be done twice.

Not every one comes again (its caller may have died), and how many there are is up to a container. So the oldest are
forgotten: if one of those comes again after all, it gets the kernel's own errno. Pure.
"""

from __future__ import annotations

MOST = 256

Caller = tuple[int, int]
"""A thread's id, and the number of the descriptor that its call is about."""


class UnreportedBinds:
    """The last ``most`` callers that did not hear."""

    def __init__(self, most: int = MOST) -> None:
        self._callers: dict[Caller, None] = {}
        self._most = most

    def __bool__(self) -> bool:
        return bool(self._callers)

    def __len__(self) -> int:
        return len(self._callers)

    def add(self, thread: int, fd: int) -> None:
        """Remember a caller, the newest now."""
        self.take(thread, fd)
        while len(self._callers) >= self._most:
            del self._callers[next(iter(self._callers))]
        self._callers[thread, fd] = None

    def take(self, thread: int, fd: int) -> bool:
        """Whether that caller is among them. It is not any more then."""
        if (thread, fd) not in self._callers:
            return False
        del self._callers[thread, fd]
        return True
