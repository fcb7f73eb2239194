"""The event loop of the relays: one epoll instance, and what is done between its events."""

from __future__ import annotations

import contextlib
import select
import socket
import time
import traceback
from collections.abc import Callable

from graft.splice.pipes import Pipes

Handler = Callable[[int], None]
_BATCH = 256


class Loop:
    """Calls a handler for each event of a descriptor, and `tick` every ``interval`` seconds."""

    def __init__(self, pipes: Pipes, tick: Callable[[], None], interval: float = 0.2) -> None:
        self.pipes = pipes
        self.buffer = memoryview(bytearray(65536))
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._later: list[Callable[[], None]] = []
        self._dying: list[socket.socket] = []
        self._tick, self._interval = tick, interval
        self._due = 0.0
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

    def later(self, call: Callable[[], None]) -> None:
        """Call it when the others have had their turn."""
        self._later.append(call)

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
            self._due = now + self._interval
            self._tick()
        wait = 0.0 if self._later else max(0.0, self._due - now)
        handlers = self._handlers
        for fd, mask in self._epoll.poll(wait, _BATCH):
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(mask)
                except Exception:
                    # One connection must not end all others; what raised is not listened to any more.
                    traceback.print_exc()
                    self.unwatch(fd)
        if self._later:
            calls, self._later = self._later, []
            for call in calls:
                call()
        if self._dying:
            self.bury()

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
