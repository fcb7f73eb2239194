"""The event loop of the relays: one epoll instance, and what is done between its events."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable

from graft.splice.pipes import Pipes

Handler = Callable[[int], None]
_BATCH = 256
_LEISURE = 10
_WAKEFUL_SECONDS = 0.0001


class Loop:
    """Calls a handler for each event of a descriptor, and `tick` every ``interval`` seconds.

    ``most`` is how many connections there may be at once.
    """

    def __init__(self, pipes: Pipes, tick: Callable[[], None], interval: float = 0.2, most: int = sys.maxsize) -> None:
        self.pipes = pipes
        self.most = most
        self.carried = 0
        self.buffer = memoryview(bytearray(65536))
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._later: list[Callable[[], None]] = []
        self._timed: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._dying: list[socket.socket] = []
        self._tick, self._interval = tick, interval
        self._due = 0.0
        self._brisk = False
        self.bulk = False
        """Set by who moved a lot in this turn: then there is better use for the processor than to wait with it."""
        self._spares_a_processor = len(os.sched_getaffinity(0)) > 1
        self.stopping = False

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call ``handler`` with each event's mask, until `close` or `unwatch`."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Watch ``fd`` for other events."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor that stays open."""
        self._handlers.pop(fd, None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def close(self, sock: socket.socket) -> None:
        """Close a socket, after the events that have been fetched: no other gets its number before."""
        self._handlers.pop(sock.fileno(), None)
        self._dying.append(sock)

    def close_listener(self, sock: socket.socket) -> None:
        """Close at once: its address is free when this returns. All that may be late for it says "readable",
        which does no harm to whoever gets its number.
        """
        self._handlers.pop(sock.fileno(), None)
        sock.close()

    @property
    def full(self) -> bool:
        """Whether a new connection has to wait until another one ends."""
        return self.carried >= self.most

    def later(self, call: Callable[[], None]) -> None:
        """Call it when the others have had their turn."""
        self._later.append(call)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it that much later."""
        heapq.heappush(self._timed, (time.monotonic() + seconds, next(self._numbers), call))

    def look_soon(self) -> None:
        """Let `tick` come next."""
        self._due = 0.0

    def run(self) -> None:
        """Until ``stopping`` is set."""
        while not self.stopping:
            self.turn()

    def turn(self) -> None:
        """Wait for events and serve them, once."""
        now = time.monotonic()
        if now >= self._due:
            try:
                self._tick()
            except Exception:
                traceback.print_exc()
            after = time.monotonic()
            # However much there is to look at, that is a small part of the time.
            self._due = after + max(self._interval, _LEISURE * (after - now))
            now = after
        due = min(self._due, self._timed[0][0]) if self._timed else self._due
        wait = 0.0 if self._later else max(0.0, due - now)
        handlers = self._handlers
        for fd, mask in self._events(wait):
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(mask)
                except Exception:  # one connection must not end all others
                    traceback.print_exc()
        if self._timed:
            self._call_timed()
        if self._later:
            calls, self._later = self._later, []
            for call in calls:
                call()
        if self._dying:
            self.bury()

    def _events(self, wait: float) -> list[tuple[int, int]]:
        """What epoll has, or gets within ``wait`` seconds.

        While one event follows the other closely, it is looked for again and again before this process sleeps: to be
        woken takes longer than to relay a message, above all where the processor went idle meanwhile.
        """
        poll, start = self._epoll.poll, time.monotonic()
        if self._brisk and wait and not self.bulk:
            until = start + _WAKEFUL_SECONDS
            while time.monotonic() < until:
                events = poll(0, _BATCH)
                if events:
                    return events
                os.sched_yield()  # whoever waits for this processor goes first
        events = poll(wait, _BATCH)
        self.bulk = False
        self._brisk = self._spares_a_processor and time.monotonic() - start < 2 * _WAKEFUL_SECONDS
        return events

    def _call_timed(self) -> None:
        now = time.monotonic()
        while self._timed and self._timed[0][0] <= now:
            heapq.heappop(self._timed)[2]()

    def bury(self) -> None:
        """Close what `close` was asked to."""
        dying, self._dying = self._dying, []
        for sock in dying:
            sock.close()

    def shut_down(self) -> None:
        """Give back what the loop itself has."""
        self.bury()
        self.pipes.close()
        self._epoll.close()
