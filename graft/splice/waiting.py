"""An accepted connection whose far end has no room for it now: a unix socket with a full backlog.

No event says when there is room, so the connect is tried again after a while, and again after twice that. The accepted
connection counts as one of its container's meanwhile: it has its descriptors, and is reset like any other.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from graft.splice.resources import ContainerResources

_FIRST_SECONDS, _LONGEST_SECONDS, _GIVE_UP_SECONDS = 0.02, 1.0, 20.0


class WaitingConnection:
    """``near`` waits; ``attempt`` is called again and again, until it returns True: it has what `reset` would close.
    ``slot``: that of ``near``, if it outlives this process (kept.py).
    """

    def __init__(
        self, resources: ContainerResources, near: socket.socket, attempt: Callable[[], bool], slot: int | None = None
    ) -> None:
        self._resources, self._near, self._attempt, self._slot = resources, near, attempt, slot
        self._pause, self._waited = _FIRST_SECONDS, 0.0
        self._closed = False
        resources.connections[self] = None
        self._try_later()

    def _try_later(self) -> None:
        self._waited += self._pause
        self._resources.after(self._pause, self._try)
        self._pause = min(2 * self._pause, _LONGEST_SECONDS)

    def _try(self) -> None:
        if self._closed:
            return
        if self._waited > _GIVE_UP_SECONDS:
            self.reset()
            return
        try:
            done = self._attempt()
        except BlockingIOError:
            self._try_later()
            return
        if done:
            self._closed = True
            del self._resources.connections[self]
        else:
            self.reset()

    def reset(self) -> None:
        """Close it now, and release its resources. Safe to repeat."""
        if not self._closed:
            self._closed = True
            del self._resources.connections[self]
            self._resources.release_connection()
            self._resources.daemon.kept.drop(self._slot)
            self._resources.close_socket(self._near, ends=self._slot is not None)
