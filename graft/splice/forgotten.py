"""What stood for remote ends that are forgotten, and is not given to others yet: slots, and ports. Pure.

Who sent a datagram is looked up when a program reads it, which may be long after graftd has forgotten the client: a
queue keeps its oldest datagrams. So what stood for one remote end stands for no other one before a listing, begun a
moment after that was forgotten, has shown that the sockets at the port of the container's have nothing to read, and
that none is connected there:

    in use ──▶ forgotten ──▶ (the queue is seen empty) ──▶ free
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection
from typing import NamedTuple

_ON_THE_WAY_SECONDS = 0.1
"""For so long, at the most, a datagram is in neither of the two: sent, and in no socket's queue, where it counts."""


class _Wait(NamedTuple):
    local_port: int
    since: float


class Forgotten:
    """Those of one container and one family, by their numbers."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, _Wait] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, number: int) -> bool:
        return number in self._waiting

    def add(self, number: int, local_port: int) -> None:
        """One that is not used from now on; datagrams from there went to the container's sockets at ``local_port``."""
        self._waiting[number] = _Wait(local_port, time.monotonic())

    def read(self, unread: Collection[int], listed: float, connected: Collection[int] = ()) -> list[int]:
        """Those from which nothing is left to read: the sockets of the ports ``unread`` have something, as was listed
        after ``listed``. Nor those to which a socket is ``connected``: it would hear nobody else who comes from there.
        """
        before = listed - _ON_THE_WAY_SECONDS
        return [
            number
            for number, one in self._waiting.items()
            if one.since < before and one.local_port not in unread and number not in connected
        ]

    def remove(self, number: int) -> bool:
        """It is free; False where it was before."""
        return self._waiting.pop(number, None) is not None

    def oldest(self) -> int | None:
        """The one that waits longest."""
        return next(iter(self._waiting), None)

    def numbers(self) -> list[int]:
        """All of them."""
        return list(self._waiting)
