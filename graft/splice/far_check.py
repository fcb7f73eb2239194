"""Whether a dialled connection came to a listener of the container, and to nobody else in its network namespace.

A network namespace may be shared, as in a pod. When the container's listener closes, anybody there can take its port,
and it takes a moment until the endpoint is withdrawn. So before the first byte is relayed:

    the arrival (bpf/splice.bpf.c) is marked as taken by the container's hook       its socket has the connection
    it is not: a full backlog, TCP_DEFER_ACCEPT, or somebody else's listener        the kernel is asked who listens
    there is none: others have pushed it out of the map                             nobody knows: reset
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection

from graft.datapath import layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.kernel.sockdiag import Diagnostics, ListeningSocket
from graft.splice.namespace_sockets import NamespaceSockets


class FarCheck:
    """For one container, in the namespace ``container_netns``."""

    def __init__(self, maps: Maps, container_netns: NamespaceSockets) -> None:
        self._arrivals, self._netns = maps.arrivals, container_netns
        self._diagnostics: Diagnostics | None = None
        self.cgroups: Collection[int] = ()
        """The container's cgroups, by id."""

    def __call__(self, sock: socket.socket) -> bool:
        """Whether ``sock``, which is connected, is connected to the container. Raises OSError."""
        key = self._key(sock)
        arrival = self._arrivals.peek(key)
        if arrival is None:
            return False
        if arrival.role == Crossing.ACCEPTED:
            self._arrivals.delete(key)
            return True
        address, port = sock.getpeername()[:2]
        listener = self._listener_at(sock.family, address, port)
        return listener is not None and (not listener.cgroup or listener.cgroup in self.cgroups)

    def _key(self, sock: socket.socket) -> layout.ArrivalKey:
        local, remote = sock.getsockname(), sock.getpeername()
        key = layout.ArrivalKey(netns=self._netns.cookie, port=local[1], to_port=remote[1])
        key.family = 4 if sock.family == socket.AF_INET else 6
        for field, (text, *_) in ((key.addr, local), (key.to, remote)):
            packed = socket.inet_pton(sock.family, text)
            field[: len(packed)] = packed
        return key

    def _listener_at(self, family: int, address: str, port: int) -> ListeningSocket | None:
        if self._diagnostics is None:
            self._diagnostics = self._netns.run(Diagnostics)
        try:
            return self._diagnostics.listener_at(socket.AddressFamily(family), address, port)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open. Safe to repeat."""
        if self._diagnostics is not None:
            with contextlib.suppress(OSError):
                self._diagnostics.close()
            self._diagnostics = None
