"""Owners whose calls are slow wait for ten times as long as these took, while others have something to do.

One system call cannot be interrupted. What can be done about one that takes long is not to make the next one too soon:
all owners that wait in this way have a tenth of the time together, and the others the rest, however long one call was.
Nobody waits for owners that have nothing to do, so one that is busy alone has all the time.

Time in which the thread was ready and another process had the processor does not count: proc(5), schedstat.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from graft.splice.turns import Turns

SLOW_SECONDS = 0.002
"""A call that takes longer is slow: moving a full pipe takes a fraction of that."""
_PAUSE_FACTOR = 10
_ACTIVE_SECONDS = 1.0  # an owner without events for so long has nothing to do
_SLOW_AGAIN_SECONDS = 10.0


Blamed = Callable[[float], int]
"""Whom a call of so many seconds is blamed on: gives the owner that waits for it, 0 for none."""


class SlowCalls:
    """Holds owners in ``turns`` whose calls are slow. An owner is a number; 0 is never held."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.active: dict[int, float] = {}
        """When each owner had an event last."""
        self.owners: dict[int, float] = {}
        """Those with a slow call lately, and how long they count as such."""
        try:
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # a kernel without it
            self._schedstat = -1
        self._delayed = 0.0
        self._delay()

    def _delay(self) -> float:
        """For how long since the last call the thread waited for a processor."""
        if self._schedstat < 0:
            return 0.0
        before, self._delayed = self._delayed, int(os.pread(self._schedstat, 100, 0).split()[1]) / 1e9
        return self._delayed - before

    def tick(self, now: float) -> None:
        """To be called now and then."""
        self._delay()
        for owner in [owner for owner, until in self.owners.items() if until <= now]:
            if owner not in self._turns.held:
                del self.owners[owner]

    def note(self, owner: int, seconds: float, now: float, blamed: Blamed | None = None) -> None:
        """A call for ``owner`` took more than SLOW_SECONDS. ``blamed`` gives the owner that waits for it instead, 0 for
        none.
        """
        for other in self.active:  # while the call was made, nobody else could have an event
            if other != owner:
                self.active[other] += seconds
        seconds -= self._delay()
        if not owner or seconds <= SLOW_SECONDS:
            return
        if blamed is not None:
            owner = blamed(seconds)
            if not owner:
                return
        self.owners[owner] = now + _SLOW_AGAIN_SECONDS
        held = len(self._turns.held) + (owner not in self._turns.held)
        self._turns.hold(owner, now + _PAUSE_FACTOR * seconds * held)

    def turn(self, now: float) -> None:
        """A turn begins. Release the owners that have waited for long enough; all where no other owner is active."""
        self._delay()
        held = self._turns.held
        if not held:
            return
        since = now - _ACTIVE_SECONDS
        others = any(owner and owner not in held and last > since for owner, last in self.active.items())
        self._turns.release(now if others else max(held.values()))

    def forget(self, owner: int) -> None:
        """``owner`` has no more work."""
        self.active.pop(owner, None)
        if owner not in self._turns.held:
            self.owners.pop(owner, None)

    def close(self) -> None:
        """Close what is open."""
        if self._schedstat >= 0:
            os.close(self._schedstat)
