"""Connections whose peer outside of the container makes graftd's calls slow.

A client on the same machine (a server, for what goes out) can have millions of waiters at its own socket, and what
graftd sends it wakes them in graftd's own call (event_loop.py). That is not the container's doing: it has not to wait,
nor have its other clients. So such a connection gets out of the container's turns and into those of another owner, one
for all of these connections of a container together, which waits as a container with slow calls does (slow_calls.py):

    container's turns ── a call was slow ──▶ turns of outside_owner() ── the third very slow one in a minute ──▶ reset

Slow is what takes 2 ms. In a call of its own the kernel handles what the network has brought meanwhile, for whomever,
and a hypervisor takes time as it likes: so calls of a busy connection are slow now and then, which is to blame for
nothing, and it is not reset for that. Very slow is what only waiters by the hundred thousand explain.

For a minute all new connections from the same address are there from the beginning: else each could be slow once. Who
uses another address while these connections wait gets the container itself held, as for calls that are slow on its own
side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from graft.splice.resources import ContainerResources, outside_owner

_FORGET_SECONDS = 60.0
_RESET_AFTER = 3  # very slow calls within that time
VERY_SLOW_SECONDS = 0.05
"""Longer than the kernel goes on with packets in one call: 2 ms in softirqs, to which a driver adds 20 at the most
(kernel/softirq.c, MAX_SOFTIRQ_TIME; net.core.netdev_budget_usecs).
"""


class OutsidePeer:
    """The peer of one connection outside of its container, at ``address``."""

    __slots__ = ("_address", "_move", "_resources", "_very_slow", "owner")

    def __init__(self, resources: ContainerResources, address: str) -> None:
        self._resources, self._address = resources, _grouped(address)
        self._very_slow: deque[float] = deque(maxlen=_RESET_AFTER)
        self._move: Callable[[bool], None] = _ignore
        self.owner = outside_owner(resources.number) if self._is_known(time.monotonic()) else resources.number
        """In whose turns the connection is served."""

    def _is_known(self, now: float) -> bool:
        return self._resources.slow_peers.get(self._address, 0.0) > now

    def on_slow(self, move: Callable[[bool], None]) -> None:
        """Have ``move`` called when ``owner`` has changed, or the connection is to be reset (True)."""
        self._move = move

    def count(self, seconds: float) -> int:
        """A call was slow on this side. Gives the owner that is to wait for it."""
        now = time.monotonic()
        if seconds > VERY_SLOW_SECONDS:
            self._very_slow.append(now)
        is_last = len(self._very_slow) == _RESET_AFTER and now - self._very_slow[0] < _FORGET_SECONDS
        return self._charge(now, is_last)

    def charge(self, _seconds: float) -> int:
        """The same of one that takes bytes out of a long queue: a sender of very many small segments has it take long
        too, without meaning to, and is not reset for that.
        """
        return self._charge(time.monotonic(), False)

    def _charge(self, now: float, is_last: bool) -> int:
        resources = self._resources
        outside = outside_owner(resources.number)
        is_new, self.owner = self.owner != outside and not self._is_known(now), outside
        resources.note_slow_peer(self._address, now + _FORGET_SECONDS)
        self._move(is_last)
        return resources.number if is_new and resources.loop.waits(outside) else outside

    def close(self) -> None:
        """The connection is closed; its sockets still have to be, which may be slow too."""
        self._move = _ignore


def _ignore(_is_last: bool) -> None:
    pass


def _grouped(address: str) -> str:
    """Anybody has all of 127.0.0.0/8."""
    address = address.removeprefix("::ffff:")
    return "127.0.0.1" if address.startswith("127.") else address
