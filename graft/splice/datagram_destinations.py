"""Destinations of a container's UDP sockets: each has a socket of its own, because its source is an endpoint."""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Collection

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.model.transport import Home
from graft.policy.model import Verdict
from graft.splice.datagram_sockets import Address, Datagram, Receiver, plain_datagram_socket
from graft.splice.jobs import Stepwise
from graft.splice.namespaces import Namespaces
from graft.splice.resources import ContainerResources

MAX_DESTINATIONS = 256
DESTINATION_SECONDS = 60.0

Key = tuple[int, int]
"""Which exchange: the family of its stand-in, and the slot or the port of that."""


class Destination:
    """An exchange that a socket of the container began. Its own socket is connected to the destination.

    ``program`` is the container's socket, ``answer`` sends to it; ``generation`` is the slot's.
    """

    def __init__(
        self,
        table: Destinations,
        key: Key,
        generation: int,
        sock: socket.socket,
        program: Address,
        answer: Callable[[bytes, Address], None],
    ) -> None:
        self._table, self.key, self.generation, self.sock = table, key, generation, sock
        self.program, self._answer = program, answer
        self.begun = self.used = time.monotonic()
        receiver = Receiver(sock, self._on_datagram, table.resources.loop)
        table.resources.watch(sock.fileno(), select.EPOLLIN, receiver)

    def _on_datagram(self, datagram: Datagram) -> None:
        self.used = time.monotonic()
        self._answer(datagram.data, self.program)

    def send(self, data: bytes) -> None:
        """Send what the program sent."""
        self._table.touch(self)
        with contextlib.suppress(OSError):
            self.sock.send(data)

    def reset(self) -> None:
        """Close it, and release its descriptor. Safe to repeat."""
        if self._table.forget(self):
            self._table.resources.close_socket(self.sock)


class Destinations:
    """Of one container, of both families; the longest unused goes first."""

    def __init__(self, resources: ContainerResources, maps: Maps, namespaces: Namespaces) -> None:
        self.resources, self._maps, self._namespaces = resources, maps, namespaces
        self._lookup = Lookup(maps)
        self._open: OrderedDict[Key, Destination] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: Key) -> Destination | None:
        """The one of an exchange."""
        return self._open.get(key)

    def open(
        self,
        key: Key,
        generation: int,
        remote: tuple[int, bytes, int],
        program: Address,
        answer: Callable[[bytes, Address], None],
    ) -> Destination | None:
        """Connect to ``remote``: family, address and port; None where it is not granted, or there is no room.

        Raises OSError, GraftError.
        """
        family, address, port = remote
        container = self._maps.containers.peek(ctypes.c_uint32(self.resources.number))
        if container is None:
            return None
        verdict, endpoint_id = self._lookup.egress(container.ruleset, socket.IPPROTO_UDP, family, address, port)
        endpoint = self._maps.endpoints.peek(ctypes.c_uint32(endpoint_id)) if verdict == Verdict.GRANT else None
        if endpoint is None or not self._make_room():
            return None
        netns, kind = endpoint.netns, socket.AF_INET if family == 4 else socket.AF_INET6
        sock = self._namespaces.of_endpoint(netns).run(lambda: plain_datagram_socket(kind))
        try:
            tag = layout.Tag(container=self.resources.number, endpoint=endpoint_id, home=Home.HOST)
            self._maps.tags.put(ctypes.c_int32(sock.fileno()), tag)
            # The connect hook decides again, and binds the socket to the endpoint.
            sock.connect((socket.inet_ntop(kind, address[: 4 if family == 4 else 16]), port))
            made = Destination(self, key, generation, sock, program, answer)
        except BaseException:
            self.resources.loop.close_listener(sock)
            raise
        self._open[key] = made
        self.resources.descriptors.take()
        self.resources.connections[made] = None
        return made

    def _make_room(self) -> bool:
        while self._open and (len(self._open) >= MAX_DESTINATIONS or not self.resources.descriptors.can_take()):
            next(iter(self._open.values())).reset()
        return self.resources.descriptors.can_take()

    def touch(self, used: Destination) -> None:
        """Note that its program sent to it."""
        used.used = time.monotonic()
        self._open.move_to_end(used.key)

    def forget(self, gone: Destination) -> bool:
        """It is closed; False where it was before. (What the hooks have noted stays: the program's next datagram opens
        it again.)
        """
        if self._open.get(gone.key) is not gone:
            return False
        del self._open[gone.key]
        del self.resources.connections[gone]
        self.resources.descriptors.give_back()
        return True

    def of_closed_sockets(self, ports: Collection[int], since: float) -> list[Destination]:
        """Those of sockets that are gone: all of the namespace's ports were listed, after ``since``."""
        return [one for one in self._open.values() if one.begun < since and one.program[1] not in ports]

    def age(self, now: float) -> Stepwise[None]:
        """Close what was not used for too long."""
        return self._reset_each([one for one in self._open.values() if now - one.used > DESTINATION_SECONDS])

    def stop(self) -> Stepwise[None]:
        """Close them all."""
        return self._reset_each(list(self._open.values()))

    def _reset_each(self, gone: Collection[Destination]) -> Stepwise[None]:
        for one in gone:
            one.reset()
            if self.resources.loop.turn_is_over():
                yield
