"""How many bytes are taken out of a peer's queue in one call, where they are copied.

A call that takes long counts against the peer, who is reset after some (outside.py). Bytes that came one by one take a
thousand times longer than those of full packets, which is no peer's fault: the next call takes fewer.
"""

from __future__ import annotations

from graft.splice.slow_calls import SLOW_SECONDS

_SECONDS = SLOW_SECONDS / 4
_LEAST = 1 << 7


class CopySize:
    """``bytes``: for the next call; at most ``most``."""

    __slots__ = ("_most", "bytes")

    def __init__(self, most: int) -> None:
        self._most = self.bytes = most

    def note(self, count: int, seconds: float) -> None:
        """A call took ``count`` bytes, and so long. (One that took all there was says nothing about more.)"""
        fitting = int(count * _SECONDS / max(seconds, 1e-6))
        if seconds > _SECONDS:
            self.bytes = max(_LEAST, fitting)
        elif count >= self.bytes:
            self.bytes = min(self._most, 2 * self.bytes, max(_LEAST, fitting))
