"""What each container uses of the daemon: its turns in the event loop, and its share of descriptors and pipes.

shares.py decides how much a container may have. A connection beyond that is not accepted: it waits in the kernel's
queue of its listener, like one that a busy program has not accepted yet, until there is room.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from typing import Protocol

from graft.datapath import layout
from graft.splice.datagram_places import ClientPlaces
from graft.splice.event_loop import EventLoop
from graft.splice.kept import Kept
from graft.splice.pipes import Pipe, PipePool
from graft.splice.shares import Share, Shares
from graft.splice.slow_calls import Blamed

_RESERVED_DESCRIPTORS = 512  # for the daemon itself
_CONTAINER_DESCRIPTORS = 7
"""Without connections: its cgroup, its namespace, two netlink sockets, two listeners, datagrams."""
_CONNECTION_DESCRIPTORS = 2
_MAX_LISTENERS = 1024


_MAX_SLOW_PEERS = 1024


def outside_owner(number: int) -> int:
    """The owner, in the event loop, of those connections of a container that are slow outside of it (outside.py)."""
    return -number


class Resettable(Protocol):
    """A connection (connection.Connection)."""

    def reset(self) -> None:
        """Close it now, and release its resources."""


class Traffic:
    """What was relayed for one container since this graftd serves it: "in" is to the container, "out" from it.

    ``bytes_in`` and ``bytes_out`` are of connections, and count what the receiving side's socket took.
    """

    def __init__(self) -> None:
        self.connections_in = self.connections_out = self.bytes_in = self.bytes_out = 0

    def add_connection(self, is_out: bool) -> None:
        """Count a connection. ``is_out``: the container made it."""
        if is_out:
            self.connections_out += 1
        else:
            self.connections_in += 1

    def add_bytes(self, is_out: bool, count: int) -> None:
        """Count what was moved."""
        if is_out:
            self.bytes_out += count
        else:
            self.bytes_in += count


Accept = Callable[[], None]
"""Accepts connections of one listener, as many as there is room for."""


class ContainerResources:
    """What one container uses of the daemon; ``number`` is the container's id."""

    def __init__(self, daemon: DaemonResources, number: int) -> None:
        self.daemon, self.number, self.loop = daemon, number, daemon.loop
        self.descriptors, self.pipes = daemon.descriptors.join(), daemon.pipes.join()
        self.connections: dict[Resettable, None] = {}
        """All its relayed connections, oldest first."""
        self.slow_peers: dict[str, float] = {}
        """Addresses outside for which a call was slow, and until when that counts."""
        self.traffic = Traffic()
        self._waiting_listeners: dict[Accept, None] = {}

    def note_slow_peer(self, address: str, until: float) -> None:
        """Note that a call was slow for a peer there; the oldest notes make room."""
        self.slow_peers.pop(address, None)
        while len(self.slow_peers) >= _MAX_SLOW_PEERS:
            del self.slow_peers[next(iter(self.slow_peers))]
        self.slow_peers[address] = until

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """`EventLoop.watch`, in this container's turns."""
        self.loop.watch(fd, events, handler, self.number)

    def later(self, call: Callable[[], None]) -> None:
        """`EventLoop.later`, in this container's turns."""
        self.loop.later(call, self.number)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """`EventLoop.after`, in this container's turns."""
        self.loop.after(seconds, call, self.number)

    def close_socket(self, sock: socket.socket, blamed: Blamed | None = None, ends: bool = False) -> None:
        """`EventLoop.close`, in this container's turns."""
        self.loop.close(sock, self.number, blamed, ends)

    def reserve_connection(self) -> bool:
        """Reserve descriptors for one more connection. False where the container may not have one now."""
        if not self._can_connect():
            return False
        self.descriptors.take(_CONNECTION_DESCRIPTORS)
        return True

    def _can_connect(self) -> bool:
        if not self.descriptors.can_take(_CONNECTION_DESCRIPTORS):
            if not self.descriptors.within_part(_CONNECTION_DESCRIPTORS):
                return False
            self.daemon.reclaim(_CONNECTION_DESCRIPTORS)
        return self.descriptors.can_take(_CONNECTION_DESCRIPTORS)

    def release_connection(self) -> None:
        """Release what `reserve_connection` reserved."""
        self.descriptors.give_back(_CONNECTION_DESCRIPTORS)
        if self.daemon.waiting:
            self.daemon.resume_listeners_later()

    def wait_for_room(self, accept: Accept) -> None:
        """Have ``accept`` called when there is room for a connection."""
        self._waiting_listeners[accept] = None
        self.daemon.waiting[self] = None

    def stop_waiting(self, accept: Accept) -> None:
        """Undo `wait_for_room`. Safe to repeat."""
        self._waiting_listeners.pop(accept, None)
        if not self._waiting_listeners:
            self.daemon.waiting.pop(self, None)

    def resume_listeners(self) -> None:
        """Let waiting listeners accept again, as many as there is room for."""
        if self.descriptors.can_take(_CONNECTION_DESCRIPTORS):
            room = self.daemon.descriptors.free // _CONNECTION_DESCRIPTORS
            for accept in list(itertools.islice(self._waiting_listeners, room)):
                self.stop_waiting(accept)
                self.later(accept)

    @property
    def is_slow(self) -> bool:
        """Whether a call for this container was slow lately."""
        return self.number in self.loop.slow_owners

    @property
    def max_listeners(self) -> int:
        """How many endpoints may be listened on for this container: at most half of its part is for listeners."""
        return min(_MAX_LISTENERS, self.daemon.descriptors.part // 2)

    def take_pipe(self) -> Pipe | None:
        """A pipe; None where the container has its share already, or the kernel gives none."""
        if not self.pipes.can_take():
            return None
        pipe = self.daemon.pipe_pool.get()
        if pipe is not None:
            self.pipes.take()
        return pipe

    def return_pipe(self, pipe: Pipe) -> None:
        """Return an empty pipe."""
        self.pipes.give_back()
        self.daemon.pipe_pool.put(pipe)

    def discard_pipe(self, pipe: Pipe) -> None:
        """Return a pipe with data of a connection that was reset."""
        self.pipes.give_back()
        self.daemon.pipe_pool.discard(pipe)

    def close(self) -> None:
        """The container is not served any more; its connections and listeners are closed."""
        self.daemon.remove_container(self)


class DaemonResources:
    """The descriptors and pipes of the daemon: ``descriptors`` in all, of which ``pipes`` pipes use two each.

    ``kept``: what outlives it.
    """

    def __init__(self, loop: EventLoop, descriptors: int, pipes: int | None = None, kept: Kept | None = None) -> None:
        self.kept = kept or Kept(loop)
        max_pipes = max(8, min(1024, descriptors // 16)) if pipes is None else pipes
        for_connections = descriptors - min(_RESERVED_DESCRIPTORS, descriptors // 2) - 2 * max_pipes
        self.loop = loop
        self.descriptors = Shares(for_connections, _CONTAINER_DESCRIPTORS, _CONNECTION_DESCRIPTORS)
        self.pipes = Shares(max_pipes)
        self.client_places = ClientPlaces()
        self.stand_ins = Shares(layout.MAX_STAND_INS)
        """Entries of the maps for exchanges over IPv6 (bpf/stand_in.bpf.c)."""
        self.pipe_pool = PipePool(made=self.kept.add_pipe, closing=self.kept.drop_pipe)
        self.waiting: dict[ContainerResources, None] = {}
        """Containers with listeners that wait for room."""
        self._containers: dict[Share, ContainerResources] = {}

    @property
    def container_count(self) -> int:
        """How many containers there are."""
        return len(self._containers)

    def add_container(self, number: int) -> ContainerResources:
        """The resources of a new container, until `ContainerResources.close`."""
        added = ContainerResources(self, number)
        self._containers[added.descriptors] = added
        return added

    def remove_container(self, container: ContainerResources) -> None:
        """Divide what a container had among the others."""
        self.waiting.pop(container, None)
        del self._containers[container.descriptors]
        self.descriptors.leave(container.descriptors)
        self.pipes.leave(container.pipes)
        self.loop.forget(container.number)
        self.loop.forget(outside_owner(container.number))
        self.resume_listeners_later()

    def reclaim(self, count: int) -> None:
        """Get ``count`` lent descriptors back, if there are any: the newest connections are reset."""
        while self.descriptors.free < count:
            borrower = Shares.largest_borrower(
                share for share, container in self._containers.items() if container.connections
            )
            if borrower is None:
                return
            next(reversed(self._containers[borrower].connections)).reset()

    def resume_listeners_later(self) -> None:
        """Something was released: let waiting listeners accept again, in the daemon's own turn."""
        self.loop.later(self._resume_listeners)

    def _resume_listeners(self) -> None:
        for container in list(self.waiting):
            container.resume_listeners()

    def close(self) -> None:
        """Close the pipes that are not in use."""
        self.pipe_pool.close()
