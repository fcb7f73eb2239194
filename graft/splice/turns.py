"""Which of the waiting calls is made next: one of the owner that has used the least time so far. Pure.

An owner's calls are made in the order in which they came. An owner that had nothing to do for a while starts level with
the others: time that it did not use is not saved up. An owner that is held waits, whatever it has used.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

Work = Callable[[], None]


class Turns:
    """Waiting calls, of owners known by number. One is popped at a time, and its time charged before the next.

    It is true while there is a call to pop.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Work]] = {}
        self._used: dict[int, float] = {}
        self._next: list[tuple[float, int]] = []
        self._removed: set[int] = set()
        self._level = 0.0
        self.held: dict[int, float] = {}
        """The owners that are held, and until when."""

    def __bool__(self) -> bool:
        return bool(self._next)

    def put(self, owner: int, call: Work) -> None:
        """Add a call of ``owner``."""
        waiting = self._waiting.get(owner)
        if waiting is not None:
            waiting.append(call)
            return
        self._waiting[owner] = deque((call,))
        self._used[owner] = max(self._used.get(owner, 0.0), self._level)
        self._queue(owner)

    def _queue(self, owner: int) -> None:
        if owner not in self.held:
            heapq.heappush(self._next, (self._used[owner], owner))

    def pop(self) -> tuple[int, Work]:
        """The next call, with its owner. There has to be one."""
        while self._used[self._next[0][1]] > self._next[0][0]:  # charged while it waited
            owner = self._next[0][1]
            heapq.heapreplace(self._next, (self._used[owner], owner))
        self._level, owner = heapq.heappop(self._next)
        return owner, self._waiting[owner].popleft()

    def charge(self, owner: int, seconds: float) -> None:
        """Note how long the call took that was popped last, one of ``owner``."""
        self._used[owner] += seconds
        if self._waiting[owner]:
            self._queue(owner)
            return
        del self._waiting[owner]
        if owner in self._removed:
            self.forget(owner)

    def charge_other(self, owner: int, seconds: float) -> None:
        """Note how long something else took that was done for ``owner``."""
        used = self._used.get(owner, 0.0)
        self._used[owner] = (used if used > self._level else self._level) + seconds  # max() takes thrice as long

    def hold(self, owner: int, until: float) -> None:
        """Pop no call of ``owner`` until `release` at that time."""
        self.held[owner] = until
        self._next = [entry for entry in self._next if entry[1] != owner]
        heapq.heapify(self._next)

    def release(self, now: float) -> None:
        """Hold no owner longer whose time has come."""
        for owner in [owner for owner, until in self.held.items() if until <= now]:
            del self.held[owner]
            if owner in self._waiting:
                self._queue(owner)

    def forget(self, owner: int) -> None:
        """Remove an owner: the time that it has used does not count any more. Its waiting calls are still made."""
        if owner in self._waiting:
            self._removed.add(owner)
        else:
            self._removed.discard(owner)
            self._used.pop(owner, None)
