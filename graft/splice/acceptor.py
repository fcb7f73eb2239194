"""One listener: accepts connections while its container may have more, and relays each to the far end."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from graft.errors import GraftError
from graft.splice.connection import Connection
from graft.splice.kept_records import Record
from graft.splice.outside import OutsidePeer
from graft.splice.resources import ContainerResources
from graft.splice.sockmap import Sockmap
from graft.splice.waiting import WaitingConnection

_ACCEPTS = 8  # in one turn
_LAST_ACCEPTS = 64  # when the listener is closed
_RETRY_SECONDS = 0.2
OUT = "out"  # in place of the addresses of all servers outside, which the container chooses

PeerAddress = tuple[Any, ...] | str
"""As accept(2) gives it: text of a unix socket."""

ConnectFar = Callable[[socket.socket, PeerAddress], socket.socket | None]


class Acceptor:
    """``sock`` listens and never blocks; it is closed where it cannot be watched (OSError).

    ``connect_far`` makes a socket that connects to the far end, for an accepted socket and its peer's address. Where
    it returns None, or raises OSError or GraftError, the accepted connection is reset; BlockingIOError: the far end has
    no room now. ``sockmap`` is the relay in the kernel, for TCP, None to relay by splice(2). ``check_far`` as for a
    Connection. ``far_is_outside``: the far end is outside of the container, not the near one. ``slot``: of ``sock``, if
    that outlives this process (kept.py). ``record``: what the next graftd has to know of each connection that it is to
    take over; None: it takes over none.
    """

    def __init__(
        self,
        resources: ContainerResources,
        sock: socket.socket,
        connect_far: ConnectFar,
        sockmap: Sockmap | None,
        check_far: Callable[[socket.socket], bool] | None = None,
        far_is_outside: bool = False,
        slot: int | None = None,
        record: Record | None = None,
    ) -> None:
        self._slot, self._record = slot, record
        self._resources, self._sock, self._connect_far = resources, sock, connect_far
        self._check_far, self._far_is_outside = check_far, far_is_outside
        self.lost = False
        """Whether somebody else closed it: a user with CAP_NET_ADMIN over its network namespace can."""
        self.sockmap = sockmap
        self.connections: set[Connection] = set()
        self.served = 0
        self._waiting = self._closed = False
        # Edge-triggered: a listener that waits for room costs nothing, however many clients connect.
        try:
            resources.watch(sock.fileno(), select.EPOLLIN | select.EPOLLET, self._on_event)
        except BaseException:
            resources.loop.close_listener(sock)
            raise

    def _on_event(self, _mask: int) -> None:
        if not self._waiting:
            self.accept()

    def accept(self) -> None:
        """Accept connections until there are no more, or no room, or the turn is over."""
        self._waiting = False
        for _ in range(_ACCEPTS):
            if self._closed:
                return
            if not self._resources.reserve_connection():
                self._waiting = True
                self._resources.wait_for_room(self.accept)
                return
            try:
                near, peer = self._sock.accept()
            except ConnectionAbortedError:
                self._resources.release_connection()
                continue
            except BlockingIOError:
                self._resources.release_connection()
                return
            except OSError as error:
                self._resources.release_connection()
                if error.errno == errno.EINVAL:  # it does not listen (any more)
                    self.lost = True
                    return
                # no descriptor, or no memory
                self._waiting = True
                self._resources.after(_RETRY_SECONDS, self.accept)
                return
            self._relay(near, peer)
            if self._resources.loop.turn_is_over():
                break
        self._resources.later(self.accept)

    def take_over(self, near: socket.socket, slot: int) -> bool:
        """Relay what the graftd before has accepted, and no more. False where there is no room."""
        if not self._resources.reserve_connection():
            return False
        self._relay(near, near.getpeername(), slot)
        return True

    def _relay(self, near: socket.socket, peer: PeerAddress, slot: int | None = None) -> None:
        near.setblocking(False)
        kept = self._resources.daemon.kept
        if slot is None and self._record is not None:
            slot = kept.add_accepted(self._record, near)
        attempt = partial(self._connect, near, peer, slot)
        try:
            done = attempt()
        except BlockingIOError:
            WaitingConnection(self._resources, near, attempt, slot)
            return
        if not done:
            kept.drop(slot)
            self._refuse(near, peer, ends=slot is not None)

    def _refuse(self, near: socket.socket, peer: PeerAddress, ends: bool) -> None:
        """Close what has no far end. The container waits for it where its peer outside is known to be slow already: it
        would be accepted and closed again and again in the container's turns, and only others would wait.
        """
        outside = OutsidePeer(self._resources, self._address(near, peer))
        is_known = outside.owner != self._resources.number
        self._resources.close_socket(near, None if self._far_is_outside or is_known else outside.count, ends)
        self._resources.release_connection()

    def _address(self, near: socket.socket, peer: PeerAddress) -> str:
        """That of the peer outside."""
        if self._far_is_outside:
            return OUT
        return "" if near.family == socket.AF_UNIX else str(peer[0])

    def _connect(self, near: socket.socket, peer: PeerAddress, slot: int | None) -> bool:
        """Relay an accepted connection; whether its far end could be reached. Raises BlockingIOError."""
        try:
            far = self._connect_far(near, peer)
        except BlockingIOError:
            raise
        except (OSError, GraftError):
            far = None
        if far is None:
            return False
        self.served += 1
        self._resources.traffic.add_connection(self._far_is_outside)
        sockmap = None if socket.AF_UNIX in (near.family, far.family) else self.sockmap
        if self._record is not None:
            self._resources.daemon.kept.complete(slot, self._record.kind, far)
        outside = OutsidePeer(self._resources, self._address(near, peer))
        Connection(
            self._resources, self.connections, near, far, sockmap, self._check_far, outside, self._far_is_outside, slot
        )
        return True

    def close(self) -> None:
        """Stop listening: the address is free when this returns. Connections in the backlog are still relayed, unless
        that would take long.
        """
        resources = self._resources
        for _ in range(0 if resources.is_slow or resources.loop.stopping else _LAST_ACCEPTS):
            if not self._resources.reserve_connection():
                break
            try:
                near, peer = self._sock.accept()
            except OSError:
                self._resources.release_connection()
                break
            self._resources.later(partial(self._relay, near, peer))
        self._closed = True
        self._resources.stop_waiting(self.accept)
        self._resources.daemon.kept.end_listener(self._sock, self._slot)
        self._resources.loop.close_listener(self._sock)
