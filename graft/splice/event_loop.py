"""The event loop of the relays: one epoll instance, and what is done between its events.

Every call has an owner: a container, by its number, or the daemon itself. While little happens, events are served in
the order in which they come. What has not been served within a slice of time waits in turns.py, where the owner that
has used the least time goes first, and epoll is asked again after each slice. So an event of an owner that has little
to do waits for a slice or two, however much others have to do. For that no call may take long: longer work is a job, in
steps (jobs.py), and what makes several system calls asks `turn_is_over` after each.

A system call can take long though: the kernel delivers what is sent over loopback at once, and wakes whoever waits at
the other end, which may be millions of waiters. So each call is charged to its owner, and one that is slow makes its
owner wait (slow_calls.py), while others have something to do.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

from graft.kernel import socket_calls
from graft.splice.closing import Closer
from graft.splice.log import log_failure
from graft.splice.slow_calls import SLOW_SECONDS, Blamed, SlowCalls
from graft.splice.turns import Turns, Work

EventHandler = Callable[[int], None]
DAEMON = 0
"""The owner of work that is not for a container."""


def nobody(_seconds: float) -> int:
    """For `EventLoop.blame`: no container made this call slow."""
    return DAEMON


_BATCH, _LARGE_BATCH = 256, 4096
_SLICE_SECONDS = 0.0005
_BUSY_POLL_SECONDS = 0.0001
_CLOSE_AGAIN_SECONDS = 0.02


class EventLoop:
    """Calls a handler for each event of a descriptor, and ``tick``, which must not take long, every ``interval``."""

    def __init__(self, tick: Callable[[], None], interval: float = 0.2) -> None:
        self.buffer = memoryview(bytearray(65536))
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[EventHandler, int]] = {}
        self._events: dict[int, int] = {}
        self._turns = Turns()
        self._slow_calls = SlowCalls(self._turns)
        self.slow_owners = self._slow_calls.owners
        """Owners for which a call was slow lately."""
        self._call_started = 0.0
        self._blamed: Blamed | None = None
        self._has_blamed = False
        self._waiting: set[Work] = set()
        self._timers: list[tuple[float, int, Work, int]] = []
        self._sequence = itertools.count()
        self._closer = Closer()
        self._to_close: set[socket.socket] = set()
        self._tick, self._interval = tick, interval
        self._due = 0.0
        self.ticked = time.monotonic()
        """When ``tick`` was called last."""
        self._busy_polling = False
        self.bulk = False
        """Set by a connection that moved a lot in this turn: then the processor is not used for busy polling."""
        self.shares_sockets = False
        """Set where another process has sockets open too: then epoll does not forget one when it is closed."""
        self._several_processors = len(os.sched_getaffinity(0)) > 1
        self.stopping = False

    def watch(self, fd: int, events: int, handler: EventHandler, owner: int = DAEMON) -> None:
        """Call ``handler`` with the mask of each event, in the turns of ``owner``, until `close` or `unwatch`."""
        self._handlers[fd] = handler, owner
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Watch ``fd`` for other events."""
        self._epoll.modify(fd, events)

    def set_owner(self, fd: int, owner: int) -> None:
        """Serve the events of ``fd`` in the turns of another owner."""
        self._handlers[fd] = self._handlers[fd][0], owner

    def blame(self, started: float, blamed: Blamed | None) -> None:
        """If a system call of the call that is being made, which began at ``started``, was slow: ``blamed`` gives the
        owner that waits for it (None: the one whose turn it is, whoever else was slow in this turn).
        """
        if time.monotonic() - started > SLOW_SECONDS:
            self._blamed = None if self._has_blamed else blamed
            self._has_blamed = blamed is None

    def unwatch(self, fd: int) -> None:
        """Stop watching a descriptor that stays open."""
        self._forget(fd)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def close(self, sock: socket.socket, owner: int, blamed: Blamed | None = None, ends: bool = False) -> None:
        """Close a socket in the turns of ``owner``, and not before the fetched events are served: else its descriptor
        number could be used again. ``blamed`` as for `blame`. ``ends``: end its connection, which another process has
        too. (The daemon is never held. So what others can make slow has another owner, whether it was watched or not.)
        """
        self._forget_socket(sock)
        self._to_close.add(sock)
        self._turns.put(owner, partial(self._close, sock, owner, blamed, ends))

    def _close(self, sock: socket.socket, owner: int, blamed: Blamed | None = None, ends: bool = False) -> None:
        started = time.monotonic()
        if ends:
            socket_calls.end(sock)
        if self._closer.close(sock):
            self._to_close.discard(sock)
        else:
            self._to_close.add(sock)
            self.after(_CLOSE_AGAIN_SECONDS, partial(self._close, sock, owner, blamed), owner)
        self.blame(started, blamed)

    def close_listener(self, sock: socket.socket) -> None:
        """Close at once: its address is free when this returns. A fetched event for it may still be served to the
        next socket with its descriptor number; it says "readable", which does no harm. (A unix socket's file is gone
        already; it takes no more clients.)
        """
        _, owner = self._handlers.get(sock.fileno(), (None, DAEMON))
        self._forget_socket(sock)
        self._close(sock, owner)

    def _forget_socket(self, sock: socket.socket) -> None:
        self._forget(sock.fileno())
        if self.shares_sockets:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(sock)

    def _forget(self, fd: int) -> None:
        self._handlers.pop(fd, None)
        self._events.pop(fd, None)

    def later(self, call: Work, owner: int = DAEMON) -> None:
        """Make ``call`` in the turns of ``owner``, once, however often it is asked for before that."""
        if call not in self._waiting:
            self._waiting.add(call)
            self._turns.put(owner, call)

    def after(self, seconds: float, call: Work, owner: int = DAEMON) -> None:
        """Make ``call`` after that time, in the turns of ``owner``."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), call, owner))

    def forget(self, owner: int) -> None:
        """``owner`` has no more work."""
        self._turns.forget(owner)
        self._slow_calls.forget(owner)

    def waits(self, owner: int) -> int:
        """For how many seconds nothing is done for ``owner``, because a call of its own took long (at the most)."""
        return math.ceil(max(0.0, self._turns.held.get(owner, 0.0) - time.monotonic()))

    def turn_is_over(self) -> bool:
        """Whether the call that is being made has had its slice of time: what is left is for a later turn."""
        return time.monotonic() > self._call_started + _SLICE_SECONDS

    def tick_soon(self) -> None:
        """Make the call of ``tick`` the next one."""
        self._due = 0.0

    def run(self) -> None:
        """Serve events until ``stopping`` is set."""
        while not self.stopping:
            self.turn()

    def turn(self) -> None:
        """Wait for events and serve them, or make waiting calls for a slice of time."""
        now = time.monotonic()
        if now >= self._due:
            self._guarded(self._tick)
            now = self.ticked = time.monotonic()
            self._due = now + self._interval
            self._slow_calls.tick(now)
        if self._slow_calls.owners:
            self._slow_calls.turn(now)
        if self._turns:
            self._defer(self._epoll.poll(0, _LARGE_BATCH))
        else:
            self._serve(self._wait(max(0.0, self._next_deadline() - now)))
        if self._timers:
            self._defer_due_timers()
        if self._turns:
            self._work()

    def _next_deadline(self) -> float:
        deadline = min(self._due, self._timers[0][0]) if self._timers else self._due
        return min(deadline, *self._turns.held.values()) if self._turns.held else deadline

    def _wait(self, seconds: float) -> list[tuple[int, int]]:
        """The events that are there, or come within that time.

        While events follow each other closely, this polls for a while before it sleeps: to be woken takes longer than
        to relay a message, above all where the processor went idle meanwhile.
        """
        poll, start = self._epoll.poll, time.monotonic()
        if self._busy_polling and seconds and not self.bulk:
            until = start + _BUSY_POLL_SECONDS
            while time.monotonic() < until:
                events = poll(0, _BATCH)
                if events:
                    return events
                os.sched_yield()  # a process that waits for this processor goes first
        events = poll(seconds, _BATCH)
        self.bulk = False
        self._busy_polling = self._several_processors and time.monotonic() - start < 2 * _BUSY_POLL_SECONDS
        return events

    def _serve(self, fetched: Sequence[tuple[int, int]]) -> None:
        """Serve events in order; those that are left when the slice is over wait for their owners' turns."""
        handlers, held, active = self._handlers, self._turns.held, self._slow_calls.active
        charge = self._turns.charge_other
        start = time.monotonic()
        until = start + _SLICE_SECONDS
        for number, (fd, mask) in enumerate(fetched):
            found = handlers.get(fd)
            if found is None:
                continue
            handler, owner = found
            if held and owner in held:
                self._defer(fetched[number : number + 1])
                continue
            self._call_started = start
            try:
                handler(mask)
            except Exception:  # a failure of one connection must not end the others
                log_failure()
            active[owner] = end = time.monotonic()
            charge(owner, end - start)
            if end - start > SLOW_SECONDS:
                self._note_slow(owner, end - start, end)
            if end > until:
                self._defer(fetched[number + 1 :])
                return
            start = end

    def _defer(self, fetched: Sequence[tuple[int, int]]) -> None:
        events = self._events
        for fd, mask in fetched:
            if fd in events:
                events[fd] |= mask
                continue
            found = self._handlers.get(fd)
            if found is not None:
                events[fd] = mask
                self._slow_calls.active[found[1]] = time.monotonic()
                self._turns.put(found[1], partial(self._serve_deferred, fd))

    def _serve_deferred(self, fd: int) -> None:
        mask = self._events.pop(fd, None)
        if mask is not None:
            self._handlers[fd][0](mask)

    def _defer_due_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, call, owner = heapq.heappop(self._timers)
            self.later(call, owner)

    def _work(self) -> None:
        """Make waiting calls, at least one, for a slice of time."""
        turns, start = self._turns, time.monotonic()
        until = start + _SLICE_SECONDS
        while turns:
            owner, call = turns.pop()
            self._waiting.discard(call)
            self._call_started = start
            self._guarded(call)
            end = time.monotonic()
            if end - start > SLOW_SECONDS:
                self._note_slow(owner, end - start, end)
            turns.charge(owner, end - start)
            if end > until:
                return
            start = end

    def _note_slow(self, owner: int, seconds: float, now: float) -> None:
        blamed, self._blamed, self._has_blamed = self._blamed, None, False
        self._slow_calls.note(owner, seconds, now, blamed)

    @staticmethod
    def _guarded(call: Work) -> None:
        try:
            call()
        except Exception:
            log_failure()

    def shut_down(self) -> None:
        """Close what the loop itself has open."""
        for sock in self._to_close:
            self._closer.close_at_exit(sock)
        self._to_close.clear()
        self._closer.stop()
        self._slow_calls.close()
        self._epoll.close()
