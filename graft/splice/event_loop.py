"""The event loop of the relays: one epoll instance, and what is done between its events.

Whatever is done is done for somebody: a container, by its number, or the daemon itself. While little happens, events
are served in the order in which they come. What has not been served within a slice of time waits in turns.py, where
who has used the least time goes first, and epoll is asked again after each slice. So an event of somebody who has
little to do waits for a slice or two, however much others have to do; for that, no call may take long, and longer work
is a job, in steps (jobs.py).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from graft.splice.turns import Turns, Work

Handler = Callable[[int], None]
DAEMON = 0
"""Whose the work is that is no container's."""
_BATCH, _LARGE_BATCH = 256, 4096
_SLICE_SECONDS = 0.0005
_WAKEFUL_SECONDS = 0.0001


class EventLoop:
    """Calls a handler for each event of a descriptor, and ``tick``, which must not take long, every ``interval``."""

    def __init__(self, tick: Callable[[], None], interval: float = 0.2) -> None:
        self.buffer = memoryview(bytearray(65536))
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[Handler, int]] = {}
        self._events: dict[int, int] = {}
        self._turns = Turns()
        self._waiting: set[Work] = set()
        self._timed: list[tuple[float, int, Work, int]] = []
        self._numbers = itertools.count()
        self._dying: list[socket.socket] = []
        self._tick, self._interval = tick, interval
        self._due = 0.0
        self._brisk = False
        self.bulk = False
        """Set by who moved a lot in this turn: then there is better use for the processor than to wait with it."""
        self._spares_a_processor = len(os.sched_getaffinity(0)) > 1
        self.stopping = False

    def watch(self, fd: int, events: int, handler: Handler, who: int = DAEMON) -> None:
        """Call ``handler`` with the mask of what happens, in the turns of ``who``, until `close` or `unwatch`."""
        self._handlers[fd] = handler, who
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Watch ``fd`` for other events."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor that stays open."""
        self._forget(fd)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def close(self, sock: socket.socket) -> None:
        """Close a socket, after the events that have been fetched: no other gets its number before."""
        self._forget(sock.fileno())
        self._dying.append(sock)

    def close_listener(self, sock: socket.socket) -> None:
        """Close at once: its address is free when this returns. All that may be late for it says "readable",
        which does no harm to whoever gets its number.
        """
        self._forget(sock.fileno())
        sock.close()

    def _forget(self, fd: int) -> None:
        self._handlers.pop(fd, None)
        self._events.pop(fd, None)

    def later(self, call: Work, who: int = DAEMON) -> None:
        """Call it in the turns of ``who``, once, however often this is asked before."""
        if call not in self._waiting:
            self._waiting.add(call)
            self._turns.put(who, call)

    def after(self, seconds: float, call: Work, who: int = DAEMON) -> None:
        """Call it that much later, in the turns of ``who``."""
        heapq.heappush(self._timed, (time.monotonic() + seconds, next(self._numbers), call, who))

    def forget(self, who: int) -> None:
        """Nobody of that number comes any more."""
        self._turns.forget(who)

    def look_soon(self) -> None:
        """Let `tick` come next."""
        self._due = 0.0

    def run(self) -> None:
        """Until ``stopping`` is set."""
        while not self.stopping:
            self.turn()

    def turn(self) -> None:
        """Wait for events and serve them, or as much of what waits as a slice of time allows."""
        now = time.monotonic()
        if now >= self._due:
            self._guarded(self._tick)
            now = time.monotonic()
            self._due = now + self._interval
        if self._turns:
            self._put_off(self._epoll.poll(0, _LARGE_BATCH))
        else:
            self._serve(self._wait(max(0.0, self._next_date() - now)))
        if self._timed:
            self._put_off_timed()
        if self._turns:
            self._work()
        if self._dying:
            self.bury()

    def _next_date(self) -> float:
        return min(self._due, self._timed[0][0]) if self._timed else self._due

    def _wait(self, seconds: float) -> list[tuple[int, int]]:
        """What epoll has, or gets within that time.

        While one event follows the other closely, it is looked for again and again before this process sleeps: to be
        woken takes longer than to relay a message, above all where the processor went idle meanwhile.
        """
        poll, start = self._epoll.poll, time.monotonic()
        if self._brisk and seconds and not self.bulk:
            until = start + _WAKEFUL_SECONDS
            while time.monotonic() < until:
                events = poll(0, _BATCH)
                if events:
                    return events
                os.sched_yield()  # whoever waits for this processor goes first
        events = poll(seconds, _BATCH)
        self.bulk = False
        self._brisk = self._spares_a_processor and time.monotonic() - start < 2 * _WAKEFUL_SECONDS
        return events

    def _serve(self, fetched: Sequence[tuple[int, int]]) -> None:
        """Serve events as they came; those that are left when the slice is over wait for their owners' turns."""
        handlers = self._handlers
        until = time.monotonic() + _SLICE_SECONDS if len(fetched) > 1 else 0.0
        for number, (fd, mask) in enumerate(fetched, 1):
            found = handlers.get(fd)
            if found is None:
                continue
            try:
                found[0](mask)
            except Exception:  # one connection must not end all others
                traceback.print_exc()
            if until and time.monotonic() > until:
                self._put_off(fetched[number:])
                return

    def _put_off(self, fetched: Sequence[tuple[int, int]]) -> None:
        events = self._events
        for fd, mask in fetched:
            if fd in events:
                events[fd] |= mask
                continue
            found = self._handlers.get(fd)
            if found is not None:
                events[fd] = mask
                self._turns.put(found[1], partial(self._serve_late, fd))

    def _serve_late(self, fd: int) -> None:
        mask = self._events.pop(fd, None)
        if mask is not None:
            self._handlers[fd][0](mask)

    def _put_off_timed(self) -> None:
        now = time.monotonic()
        while self._timed and self._timed[0][0] <= now:
            _, _, call, who = heapq.heappop(self._timed)
            self.later(call, who)

    def _work(self) -> None:
        """Make calls that wait, at least one, for a slice of time."""
        turns, start = self._turns, time.monotonic()
        until = start + _SLICE_SECONDS
        while turns:
            who, call = turns.take()
            self._waiting.discard(call)
            self._guarded(call)
            end = time.monotonic()
            turns.charge(who, end - start)
            if end > until:
                return
            start = end

    @staticmethod
    def _guarded(call: Work) -> None:
        try:
            call()
        except Exception:
            traceback.print_exc()

    def bury(self) -> None:
        """Close what `close` was asked to."""
        dying, self._dying = self._dying, []
        for sock in dying:
            sock.close()

    def shut_down(self) -> None:
        """Give back what the loop itself has."""
        self.bury()
        self._epoll.close()
