"""One listener: accepts while its container may have connections, and joins each with a socket to where it leads."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from graft.errors import GraftError
from graft.splice.connection import Connection
from graft.splice.resources import Account
from graft.splice.sockmap import Sockmap

_ACCEPTS = 8  # at once, before others have their turn
_LAST_ACCEPTS = 64  # of a listener that goes
_RETRY_SECONDS = 0.2

Peer = tuple[Any, ...]
Reach = Callable[[socket.socket, Peer], socket.socket | None]


class Acceptor:
    """``sock`` listens and never blocks.

    ``reach`` makes, for an accepted socket and its peer, one on its way to the far end; None, OSError or GraftError
    where there is none: the accepted connection is reset then. ``sockmap`` is the relay in the kernel, None to have
    splice(2).
    """

    def __init__(self, account: Account, sock: socket.socket, reach: Reach, sockmap: Sockmap | None) -> None:
        self._account, self._sock, self._reach = account, sock, reach
        self.sockmap = sockmap
        self.connections: set[Connection] = set()
        self.served = 0
        self._waits = self._closed = False
        # Edge-triggered: one that waits for room costs nothing, however many knock.
        account.watch(sock.fileno(), select.EPOLLIN | select.EPOLLET, self._on_event)

    def _on_event(self, _mask: int) -> None:
        if not self._waits:
            self.accept()

    def accept(self) -> None:
        """Take connections until there are no more, or no room, or others should have their turn."""
        self._waits = False
        for _ in range(_ACCEPTS):
            if self._closed:
                return
            if not self._account.admit():
                self._waits = True
                self._account.wait(self.accept)
                return
            try:
                near, peer = self._sock.accept()
            except ConnectionAbortedError:
                self._account.dismiss()
                continue
            except OSError as error:
                self._account.dismiss()
                self._pause(error)
                return
            self._join(near, peer)
        self._account.later(self.accept)

    def _pause(self, error: OSError) -> None:
        """Nobody is there to accept; or there is no descriptor, or no memory, and who is there waits."""
        if not isinstance(error, BlockingIOError):
            self._waits = True
            self._account.after(_RETRY_SECONDS, self.accept)

    def _join(self, near: socket.socket, peer: Peer) -> None:
        near.setblocking(False)
        try:
            far = self._reach(near, peer)
        except (OSError, GraftError):
            far = None
        if far is None:
            near.close()
            self._account.dismiss()
            return
        self.served += 1
        Connection(self._account, self.connections, near, far, self.sockmap)

    def close(self) -> None:
        """Listen no more: the address is free when this returns. Who waits to be accepted still is."""
        for _ in range(_LAST_ACCEPTS):
            if not self._account.admit():
                break
            try:
                near, peer = self._sock.accept()
            except OSError:
                self._account.dismiss()
                break
            self._account.later(partial(self._join, near, peer))
        self._closed = True
        self._account.leave(self.accept)
        self._account.loop.close_listener(self._sock)
