"""The sockets of stand_ins.py: made, closed, and what is left of one that is closed.

A port stands for one remote end and no other. What was sent from there may be read long after its socket is closed. So
the map's entry stays, without a socket, and the port is not used again, until the queue of the container's socket was
seen empty (forgotten.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import time
from collections.abc import Callable, Collection
from functools import partial

from graft.datapath import layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.splice.datagram_clients import Client
from graft.splice.datagram_sockets import Address, Datagram, Receiver, bound_by_number, plain_datagram_socket
from graft.splice.forgotten import Forgotten
from graft.splice.jobs import Stepwise
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.resources import ContainerResources
from graft.splice.shares import Share

MAX_FORGOTTEN = 4096
"""Ports that wait: beyond that no stand-in is made."""
_PORT_TRIES = 4
_NO_PORT_SECONDS = 2.0
"""For so long nobody asks again for a port in a namespace that had none."""
_LOOPBACK = "::1"


class StandIn:
    """One socket, what it stands for, and the map's entry that says so."""

    def __init__(self, port: int, sock: socket.socket) -> None:
        self.port, self.sock = port, sock
        self.client: Client | None = None
        self.taken: layout.StandInValue | None = None
        """Of an offered one: what the hook that took it has noted."""
        self.program: Address | None = None
        """Where that one's datagrams come from."""
        self.used = 0.0


class StandInSockets:
    """Those of one container. ``serve`` is called for each datagram that one has received."""

    def __init__(
        self,
        resources: ContainerResources,
        maps: Maps,
        container_netns: NamespaceSockets,
        serve: Callable[[StandIn, Datagram], None],
    ) -> None:
        self._resources, self._maps, self._netns, self._serve = resources, maps, container_netns, serve
        self._share: Share = resources.daemon.stand_ins.join()
        self._forgotten = Forgotten()
        self._has_listing = self._is_stopped = False
        self._no_port_until = 0.0

    def key(self, port: int) -> layout.StandInKey:
        """Of the map's entry for a port."""
        return layout.StandInKey(container=self._resources.number, port=port)

    def make(self) -> StandIn:
        """A new one. Raises OSError: ENOBUFS where the container has too many, and with one fewer there is room;
        another where there is none for now (or the container has no ::1).
        """
        self._check_room()
        sock = self._netns.run(self._bound)
        try:
            # The hooks send to a socket that has this mark, and to no other.
            mark = layout.CrossingValue(role=Crossing.LISTENER, container=self._resources.number)
            self._maps.crossings.put(ctypes.c_int32(sock.fileno()), mark)
            made = StandIn(int(sock.getsockname()[1]), sock)
            receiver = Receiver(sock, partial(self._serve, made), self._resources.loop)
            self._resources.watch(sock.fileno(), select.EPOLLIN, receiver)
        except BaseException:
            self._resources.loop.close_listener(sock)
            raise
        self._resources.descriptors.take()
        self._share.take()
        return made

    def _check_room(self) -> None:
        if self._is_stopped:
            raise OSError(errno.EAGAIN, "the container is served no more")
        if not self._has_listing and len(self._forgotten) >= MAX_FORGOTTEN:
            self._free_oldest()
        if time.monotonic() < self._no_port_until or len(self._forgotten) >= MAX_FORGOTTEN:
            raise OSError(errno.EAGAIN, "the container's namespace has too few ports for its clients")
        descriptors = self._resources.descriptors
        if not descriptors.within_part() or not descriptors.can_take():  # what is lent can be reclaimed, these cannot
            raise OSError(errno.ENOBUFS, "the container has as many descriptors as it may have")
        if not self._share.within_part():
            number = errno.EAGAIN if self._forgotten else errno.ENOBUFS  # of those, some will be free
            raise OSError(number, "the container has as many stand-ins as it may have")

    def _bound(self) -> socket.socket:
        """At a port that stands for nothing. Where there is none, or not quickly, nobody asks again for a while: the
        kernel looks at each port of the namespace, and at each socket there.
        """
        new = partial(plain_datagram_socket, socket.AF_INET6)
        try:
            for _ in range(_PORT_TRIES):
                sock = bound_by_number(new, _LOOPBACK, self._resources.loop.turn_is_over)
                if sock.getsockname()[1] not in self._forgotten:
                    return sock
                sock.close()
                if self._resources.loop.turn_is_over():
                    raise OSError(errno.EAGAIN, "the kernel's search for a port took too long")
            raise OSError(errno.EADDRINUSE, "the container's namespace has too few ports for its clients")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                self._no_port_until = time.monotonic() + _NO_PORT_SECONDS
            raise

    def close(self, gone: StandIn) -> None:
        """One from which nothing was sent to a socket of the container's."""
        self._maps.stand_ins.delete(self.key(gone.port))
        self._close_socket(gone)
        self._share.give_back()

    def forget(self, gone: StandIn, address: bytes, port: int, local_port: int) -> None:
        """One that stood for that remote end, for the container's socket at ``local_port``; nothing leads there now."""
        if self._is_stopped:
            self.close(gone)
            return
        value = layout.StandInValue(port=port)
        value.addr[:] = address
        with contextlib.suppress(OSError):  # else its entry stays as it was
            self._maps.stand_ins.put(self.key(gone.port), value)
        self._forgotten.add(gone.port, local_port)
        self._close_socket(gone)

    def _close_socket(self, gone: StandIn) -> None:
        self._resources.loop.close_listener(gone.sock)
        self._resources.descriptors.give_back()

    def _free(self, port: int) -> None:
        if self._forgotten.remove(port):
            self._maps.stand_ins.delete(self.key(port))
            self._share.give_back()

    def _free_oldest(self) -> None:
        """Where the kernel lists no UDP sockets: when so many others were used since."""
        oldest = self._forgotten.oldest()
        if oldest is not None:
            self._free(oldest)

    def free_read(self, unread: Collection[int], listed: float, connected: Collection[int]) -> Stepwise[None]:
        """Free the ports from which nothing is left to read, and to which no socket is: see `Forgotten.read`."""
        self._has_listing = True
        yield from self._free_each(self._forgotten.read(unread, listed, connected))

    def _free_each(self, ports: Collection[int]) -> Stepwise[None]:
        for port in ports:
            self._free(port)
            if self._resources.loop.turn_is_over():
                yield

    def refuse(self) -> None:
        """Make none any more."""
        self._is_stopped = True

    def stop(self) -> Stepwise[None]:
        """Remove what is left of those that are closed. Once, and when all of them are."""
        yield from self._free_each(self._forgotten.numbers())
        self._resources.daemon.stand_ins.leave(self._share)
