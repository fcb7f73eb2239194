"""Listeners that take connections as long as there is room for them."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from graft.splice.loop import Loop

_ACCEPTS = 64  # at once, before others have their turn


class Door:
    """``socks`` listen and never block; ``serve`` gets each accepted socket, which never blocks, and its peer."""

    def __init__(
        self, loop: Loop, socks: Sequence[socket.socket], serve: Callable[[socket.socket, tuple[Any, ...]], None]
    ) -> None:
        self._loop, self._socks, self._serve = loop, socks, serve
        self._paused = False
        for sock in socks:
            loop.watch(sock.fileno(), select.EPOLLIN, partial(self._on_event, sock))

    def _on_event(self, sock: socket.socket, _mask: int) -> None:
        for _ in range(_ACCEPTS):
            if self._loop.full:
                self.pause(True)
                return
            try:
                accepted, peer = sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError:  # no descriptor, no memory: until the next look, who connects waits in the kernel's queue
                self.pause(True)
                return
            accepted.setblocking(False)
            self._serve(accepted, peer)

    def pause(self, paused: bool) -> None:
        """Leave new connections in the kernel's queue, or take them again."""
        if paused != self._paused:
            self._paused = paused
            for sock in self._socks:
                self._loop.change(sock.fileno(), 0 if paused else select.EPOLLIN)

    def close(self) -> None:
        """Listen no more. Who waits to be accepted still is."""
        for sock in self._socks:
            self._on_event(sock, select.EPOLLIN)
            self._loop.close_listener(sock)
