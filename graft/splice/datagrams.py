"""Datagrams, relayed both ways for one container: bpf/exchange.bpf.c and bpf/stand_in.bpf.c have the picture.

Over IPv4 one socket in the container's namespace serves all exchanges: each remote end is an address of its own in
127.0.0.0/8, a slot. A client costs an entry of a table, no descriptor; a destination costs a socket, because its source
is an endpoint. IPv6 is in stand_ins.py.

All tables are bounded and age.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import select
import socket
import time
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

from graft.datapath import exchanges, layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.errors import GraftError
from graft.splice.datagram_clients import Client, Clients, Paths, Server
from graft.splice.datagram_destinations import Destination, Destinations
from graft.splice.datagram_sockets import Address, Datagram, bound_by_number, datagram_socket, receive_each, send
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.publication import Publication
from graft.splice.resources import ContainerResources
from graft.splice.stand_ins import StandIns

MAX_CLIENTS = 1024
"""Clients of a container over IPv4 that it has answered, and as many that it has not."""
AGING_SECONDS = 5.0


class ExchangeId(NamedTuple):
    """An address of the relay's in the container's namespace, read."""

    out: bool
    generation: int
    slot: int

    @property
    def number(self) -> int:
        """As a number: `exchange_address` of bpf/exchange.bpf.c."""
        return 127 << 24 | self.out << 23 | self.generation << layout.EXCHANGE_SLOT_BITS | self.slot

    @property
    def packed(self) -> bytes:
        """In network order."""
        return self.number.to_bytes(4, "big")

    @classmethod
    def parse(cls, packed: bytes) -> ExchangeId | None:
        """None for an address that is not 127.x.y.z."""
        number = int.from_bytes(packed, "big")
        if number >> 24 != 127:
            return None
        generations = (1 << 23 - layout.EXCHANGE_SLOT_BITS) - 1
        return cls(
            bool(number >> 23 & 1),
            number >> layout.EXCHANGE_SLOT_BITS & generations,
            number % layout.EXCHANGE_SLOTS,
        )


class Slots:
    """The exchanges of one container over IPv4."""

    def __init__(
        self, resources: ContainerResources, maps: Maps, container_netns: NamespaceSockets, destinations: Destinations
    ) -> None:
        """Raises OSError."""
        self._resources, self._maps, self._destinations = resources, maps, destinations
        self._container = resources.number
        self.clients = Clients(MAX_CLIENTS, self.remove_client)
        self._next_slot = itertools.cycle(range(layout.EXCHANGE_SLOTS))
        self._inner = container_netns.run(partial(bound_by_number, datagram_socket, "0.0.0.0"))
        self.port = int(self._inner.getsockname()[1])
        # The hooks send to a socket that has this mark, and to no other.
        mark = layout.CrossingValue(role=Crossing.LISTENER, container=self._container)
        maps.crossings.put(ctypes.c_int32(self._inner.fileno()), mark)
        resources.watch(self._inner.fileno(), select.EPOLLIN, self._on_event)

    def _on_event(self, _mask: int) -> None:
        receive_each(self._inner, self._on_datagram)

    def _on_datagram(self, datagram: Datagram) -> None:
        number = ExchangeId.parse(datagram.to)
        if number is None:
            return
        if number.out:
            self._send_out(number, datagram)
        else:
            self._answer(number, datagram)

    # ---- from clients of the host's, and back

    def add_client(self, server: Server, datagram: Datagram) -> Client:
        """Give a client a slot, which the longest unanswered one loses where there are too many. Raises OSError."""
        self.clients.make_room()
        slot = next(slot for slot in self._next_slot if self.clients.get(slot) is None)
        client = Client(self, slot, random.randint(1, layout.EXCHANGE_GENERATIONS), server, datagram)
        value = layout.ExchangeValue(port=client.address[1], family=4, generation=client.generation)
        ctypes.memmove(value.addr, client.packed, 4)
        number = _number_of(client)
        self._maps.exchanges.put(self._slot(number), value)
        self._maps.exchange_clients.put(self._client_key(client), ctypes.c_uint32(number.number))
        self.clients.add(client)
        return client

    def remove_client(self, client: Client) -> None:
        """Forget a client. Its next datagram begins a new exchange."""
        self.clients.discard(client)
        self._maps.exchanges.delete(self._slot(_number_of(client)))
        self._maps.exchange_clients.delete(self._client_key(client))

    def hand_over(self, client: Client, data: bytes) -> None:
        """Send the container's socket what the client sent."""
        self.clients.touch(client)
        target = client.server.target
        send(self._inner, data, _number_of(client).packed, (target.address, target.port))

    def _answer(self, number: ExchangeId, datagram: Datagram) -> None:
        client = self.clients.get(number.slot)
        if client is None or _number_of(client) != number or datagram.sender[1] != client.server.target.port:
            return
        self.clients.note_answer(client)
        client.answer(datagram.data)

    def _client_key(self, client: Client) -> layout.ExchangeClient:
        key = layout.ExchangeClient(
            container=self._container, local_port=client.server.target.port, port=client.address[1]
        )
        key.addr[:] = client.packed
        return key

    # ---- from the container to destinations, and back

    def _send_out(self, number: ExchangeId, datagram: Datagram) -> None:
        found = self._destinations.get((4, number.slot))
        if found is not None and found.generation != number.generation:
            found.reset()
            found = None
        if found is None:
            try:
                found = self._open(number, datagram.sender)
            except (OSError, GraftError):
                return
        if found is not None and found.program == datagram.sender:
            found.send(datagram.data)

    def _open(self, number: ExchangeId, program: Address) -> Destination | None:
        """A new exchange, as the hooks have noted it; None where it is not granted, or there is no room."""
        asked = self._maps.exchanges.get(self._slot(number))
        if asked is None or asked.generation != number.generation:
            return None
        remote = asked.family, bytes(asked.addr), asked.port
        answer = partial(self._answer_program, number)
        return self._destinations.open((4, number.slot), number.generation, remote, program, answer)

    def _answer_program(self, number: ExchangeId, data: bytes, program: Address) -> None:
        send(self._inner, data, number.packed, program)

    def _slot(self, number: ExchangeId) -> layout.ExchangeSlot:
        return layout.ExchangeSlot(container=self._container, slot=number.slot, out=number.out)

    def stop(self) -> None:
        """Close its own socket."""
        self._resources.loop.close_listener(self._inner)


def _number_of(client: Client) -> ExchangeId:
    return ExchangeId(False, client.generation, client.number)


class DatagramRelay:
    """Relays the datagrams of one container until `stop`."""

    def __init__(
        self,
        resources: ContainerResources,
        maps: Maps,
        container_netns: NamespaceSockets,
        namespaces: Namespaces,
        cgroup: int = 0,
    ) -> None:
        """``cgroup`` is the id of the container's. Raises OSError."""
        self._cgroup, self._marks = cgroup, [int.from_bytes(os.urandom(4), "little") | 1 for _ in range(2)]
        self._resources = resources
        exchanges.erase(maps, resources.number)  # of a daemon that was killed
        self._destinations = Destinations(resources, maps, namespaces)
        self._slots = Slots(resources, maps, container_netns, self._destinations)
        self._stand_ins = StandIns(resources, maps, container_netns, self._destinations)
        self._stopped = False
        resources.after(AGING_SECONDS, self._age)

    @property
    def port(self) -> int:
        """The port of the slots' addresses."""
        return self._slots.port

    def value(self) -> layout.RelayValue:
        """What the hooks read of it, for the map `relays`."""
        mark, answer_mark = self._marks
        return layout.RelayValue(datagram_port=self.port, cgroup=self._cgroup, mark=mark, answer_mark=answer_mark)

    def serve(self, wanted: Publication, sock: socket.socket, address: str) -> Server:
        """Relay what a socket on an endpoint receives to the container's."""
        paths = Paths(self._slots, self._stand_ins)
        return Server(self._resources, paths, sock, wanted.target, wanted.target6, address)

    def keep_programs(self, ports: Collection[int], peers: Collection[int], since: float) -> None:
        """Close what belongs to sockets that are gone: all of the namespace's ports were listed, after ``since``, and
        to which ports of ::1 a socket is connected.
        """
        self._destinations.keep_programs(ports, since)
        if self.port in ports:  # the kernel lists them
            self._stand_ins.keep_programs(ports, peers, since)

    def _age(self) -> None:
        if self._stopped:
            return
        now = time.monotonic()
        self._slots.clients.age(now)
        self._destinations.age(now)
        self._stand_ins.age(now)
        self._resources.after(AGING_SECONDS, self._age)

    def describe(self) -> dict[str, int]:
        """How many exchanges there are."""
        clients = len(self._slots.clients) + len(self._stand_ins.clients)
        return {"clients": clients, "destinations": len(self._destinations)}

    def stop(self) -> None:
        """Close its own sockets. Servers are closed before, destinations as connections."""
        self._stopped = True
        self._destinations.stop()
        self._slots.stop()
        self._stand_ins.stop()
