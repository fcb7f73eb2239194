"""How long the keeper waits before it starts graftd again. Pure.

Not at all, unless graftd dies at once again and again: from the fourth time in a row on it waits, 0.1 seconds at first,
each time twice as long as before, up to five seconds.
"""

from __future__ import annotations

_AT_ONCE_SECONDS = 1.0
_FREE, _FIRST_SECONDS, _LONGEST_SECONDS = 3, 0.1, 5.0


class Restarts:
    """Counts how often in a row graftd has died at once."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def pause(self, ready_for: float) -> float:
        """How many seconds to wait, after a graftd that was ready for so many."""
        self._in_a_row = 0 if ready_for >= _AT_ONCE_SECONDS else self._in_a_row + 1
        if self._in_a_row <= _FREE:
            return 0.0
        return min(_LONGEST_SECONDS, _FIRST_SECONDS * 2.0 ** min(self._in_a_row - _FREE - 1, 30))
