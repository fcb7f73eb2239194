"""Whether a dialled connection came to a listener of the container, and to nobody else in its network namespace.

A network namespace may be shared, as in a pod. When the container's listener closes, anybody there can take its port,
and it takes a moment until the endpoint is withdrawn. So before the first byte is relayed:

    the arrival (bpf/splice.bpf.c) is marked as taken by the container's hook       its socket has the connection
    it is not: a full backlog, TCP_DEFER_ACCEPT, or somebody else's listener        the kernel is asked who has it, or
                                                                                    who may get it: all who listen there
    there is none: others have pushed it out of the map                             nobody knows: reset
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
from collections.abc import Collection, Iterable, Sequence

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
        return self._is_containers(sock)

    def _key(self, sock: socket.socket) -> layout.ArrivalKey:
        local, remote = sock.getsockname(), sock.getpeername()
        key = layout.ArrivalKey(netns=self._netns.cookie, port=local[1], to_port=remote[1])
        key.family = 4 if sock.family == socket.AF_INET else 6
        for field, (text, *_) in ((key.addr, local), (key.to, remote)):
            packed = socket.inet_pton(sock.family, text)
            field[: len(packed)] = packed
        return key

    def _is_containers(self, sock: socket.socket) -> bool:
        """Whether the container has the other end; if nobody has yet, whether nobody else can get it."""
        try:
            far = self._asked().far_end(sock)
            if far is not None:
                return far.cgroup in self.cgroups
            return self._listens_alone(sock.family, *sock.getpeername()[:2])
        except OSError:
            self.close()
            raise

    def _asked(self) -> Diagnostics:
        if self._diagnostics is None:
            self._diagnostics = self._netns.run(Diagnostics)
        return self._diagnostics

    def _listens_alone(self, family: int, address: str, port: int) -> bool:
        """Whether the container listens at an address, and nobody else there. Raises OSError."""
        try:
            return self._has_all(self._asked().listeners_at(family, address, port))
        except OSError as error:
            if error.errno != errno.EMSGSIZE or family != socket.AF_INET:
                raise
        # Anybody may have any number of listeners at [::] that take IPv6 only. Another user's that takes IPv4 too is
        # beside the container's only at other interfaces: none of them counts if the kernel chooses one not at [::].
        self.close()
        chosen = self._asked().chosen_at(family, address, port)
        if chosen is None or (chosen.identity.family == socket.AF_INET6 and not any(chosen.local[0])):
            return False
        return self._has_all(self._asked().listeners_at(family, address, port, every=False))

    def _has_all(self, listeners: Iterable[Sequence[ListeningSocket]]) -> bool:
        """Whether there are listeners, and each is the container's. Raises OSError."""
        found = False
        for one in itertools.chain.from_iterable(listeners):
            found = True
            if one.cgroup and one.cgroup not in self.cgroups:
                self.close()  # the others are not read
                return False
        return found

    def close(self) -> None:
        """Close what is open. Safe to repeat."""
        if self._diagnostics is not None:
            with contextlib.suppress(OSError):
                self._diagnostics.close()
            self._diagnostics = None
