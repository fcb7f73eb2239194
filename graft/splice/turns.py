"""Whose turn it is: of all who have work waiting, the one that has used the least time goes first. Pure.

Each member's work is done in the order in which it came. A member that had nothing to do for a while starts level with
the others: time that it did not use is not saved up.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

Work = Callable[[], None]


class Turns:
    """Calls that wait, of members known by number. One is taken at a time, and charged before the next."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Work]] = {}
        self._used: dict[int, float] = {}
        self._next: list[tuple[float, int]] = []
        self._gone: set[int] = set()
        self._level = 0.0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, who: int, call: Work) -> None:
        """Add one to a member's work."""
        waiting = self._waiting.get(who)
        if waiting is not None:
            waiting.append(call)
            return
        self._waiting[who] = deque((call,))
        used = self._used[who] = max(self._used.get(who, 0.0), self._level)
        heapq.heappush(self._next, (used, who))

    def take(self) -> tuple[int, Work]:
        """The next call, with whose it is. There has to be one."""
        self._level, who = heapq.heappop(self._next)
        return who, self._waiting[who].popleft()

    def charge(self, who: int, seconds: float) -> None:
        """Note how long the call took that was taken last, of ``who``."""
        used = self._used[who] = self._used[who] + seconds
        if self._waiting[who]:
            heapq.heappush(self._next, (used, who))
            return
        del self._waiting[who]
        if who in self._gone:
            self.forget(who)

    def forget(self, who: int) -> None:
        """A member that is gone: what it has used counts no more. Calls that wait are still made."""
        if who in self._waiting:
            self._gone.add(who)
        else:
            self._gone.discard(who)
            self._used.pop(who, None)
