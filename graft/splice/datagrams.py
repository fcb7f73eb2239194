"""Datagrams, relayed both ways for one container: bpf/exchange.bpf.c and bpf/stand_in.bpf.c have the picture.

Over IPv4 one socket in the container's namespace serves all exchanges: each remote end is an address of its own in
127.0.0.0/8, a slot. A client costs an entry of a table, no descriptor; a destination costs a socket, because its source
is an endpoint. IPv6 is in stand_ins.py.

All tables are bounded and age.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import random
import select
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

from graft.datapath import exchanges, layout
from graft.datapath.layout import Crossing, ExchangeSlot
from graft.datapath.maps import Maps
from graft.errors import GraftError
from graft.kernel import netns
from graft.splice.datagram_clients import Client, Clients, Paths, Server
from graft.splice.datagram_destinations import DESTINATION_SECONDS, Destination, Destinations
from graft.splice.datagram_sockets import Address, Datagram, Receiver, bound_by_number, datagram_socket, send
from graft.splice.forgotten import Forgotten
from graft.splice.jobs import Job, Stepwise
from graft.splice.kept import Found
from graft.splice.kept_records import Kind
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.publication import Peers, Publication
from graft.splice.resources import ContainerResources
from graft.splice.stand_ins import StandIns

MAX_CLIENTS = 1024
"""Clients of a container over IPv4 that it has answered, and as many that it has not."""
AGING_SECONDS = 5.0
_AGED_SLOTS = 32  # each time, of those of destinations


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
        self._places = resources.daemon.client_places
        self._free_slots = deque(range(layout.EXCHANGE_SLOTS))
        self._forgotten = Forgotten()
        self._noted: OrderedDict[int, int] = OrderedDict()
        """The forgotten slots of which the map still says whose they were, each with the address that it had."""
        self._next_aged = itertools.cycle(range(layout.EXCHANGE_OUT_SLOTS))
        self._peers: Collection[int] = ()
        self._listed = 0.0
        self._share = self._places.join(self)
        try:
            self._inner = self._make_socket(container_netns)
        except BaseException:
            self._places.leave(self._share)
            raise
        self.port = int(self._inner.getsockname()[1])

    def _make_socket(self, container_netns: NamespaceSockets) -> socket.socket:
        kept, slot = self._resources.daemon.kept, None
        found = kept.take(Kind.INNER, self._container, partial(_is_inner, container_netns.cookie))[:1]
        if found:  # what the container has begun goes on
            sock, slot = found[0].socks[0], found[0].slot
        else:
            exchanges.erase_begun(self._maps, self._container)
            sock = container_netns.run(partial(bound_by_number, datagram_socket, "0.0.0.0"))
        try:
            # The hooks send to a socket that has this mark, and to no other.
            mark = layout.CrossingValue(role=Crossing.LISTENER, container=self._container)
            self._maps.crossings.put(ctypes.c_int32(sock.fileno()), mark)
            receiver = Receiver(sock, self._on_datagram, self._resources.loop)
            self._resources.watch(sock.fileno(), select.EPOLLIN, receiver)
        except BaseException:
            kept.drop(slot)
            self._resources.loop.close_listener(sock)
            raise
        self._kept_slot = slot
        if slot is None:
            self._kept_slot = kept.add_listener(Kind.INNER, self._container, sock, sock.getsockname()[1], b"")
        return sock

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
        """Give a client a slot; of too many, the longest unanswered one is forgotten. Raises OSError."""
        if not self._free_slots:
            raise OSError(errno.ENOBUFS, "the container has not read yet what forgotten clients have sent")
        self.clients.make_room()
        self._places.make_room(self._share)
        client = Client(self, self._free_slots[0], random.randint(1, layout.EXCHANGE_GENERATIONS), server, datagram)
        value = self._value(client)
        number = _number_of(client)
        self._maps.exchanges.put(self._slot(number), value)
        try:
            self._maps.exchange_clients.put(self._client_key(client), ctypes.c_uint32(number.number))
        except OSError:
            self._maps.exchanges.delete(self._slot(number))
            raise
        self._free_slots.popleft()
        self._share.take()
        self.clients.add(client)
        return client

    def remove_client(self, client: Client) -> None:
        """Forget a client. Its next datagram begins a new exchange. The map still says whose the slot was."""
        self.clients.discard(client)
        number, key = _number_of(client), self._client_key(client)
        value = self._value(client)
        value.local_port = 0
        with contextlib.suppress(OSError):  # else its entry stays as it was
            self._maps.exchanges.put(self._slot(number), value)
        self._forgotten.add(client.number, client.server.target.port)
        self._noted[client.number] = number.number
        noted = self._maps.exchange_clients.peek(key)
        if noted is not None and noted.value == number.number:  # not that of the same client with a newer server
            self._maps.exchange_clients.delete(key)

    def remove_unanswered(self) -> bool:
        """Make room in the map: of a forgotten client, else the longest unanswered one. False where there is none."""
        return self._erase_oldest() or (self.clients.remove_longest_unanswered() and self._erase_oldest())

    def remove_any(self) -> bool:
        """The same, or else of one that was answered."""
        return self.remove_unanswered() or (self.clients.remove_longest_answered() and self._erase_oldest())

    def _erase_oldest(self) -> bool:
        """What the map says of the slot that was forgotten first: what is read from there now is nobody's."""
        if not self._noted:
            return False
        self._erase(next(iter(self._noted)))
        return True

    def _erase(self, slot: int) -> None:
        if slot in self._noted:
            del self._noted[slot]
            self._maps.exchanges.delete(ExchangeSlot(container=self._container, slot=slot))
            self._share.give_back()

    def free_read(self, unread: Collection[int], listed: float) -> Stepwise[None]:
        """Free the slots from which nothing is left to read: see `Forgotten.read`."""
        connected = {slot for slot, address in self._noted.items() if address in self._peers}
        for slot in self._forgotten.read(unread, listed, connected):
            self._erase(slot)
            if self._forgotten.remove(slot):
                self._free_slots.append(slot)
            if self._resources.loop.turn_is_over():
                yield

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

    @staticmethod
    def _value(client: Client) -> layout.ExchangeValue:
        value = layout.ExchangeValue(port=client.address[1], family=4, generation=client.generation)
        value.local_port = client.server.target.port
        ctypes.memmove(value.addr, client.packed, 4)
        return value

    def _client_key(self, client: Client) -> layout.ExchangeClient:
        return exchanges.client_key(self._container, self._value(client))

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
        if found is not None:
            found.program = datagram.sender  # the hooks let one socket send here: it is connected anew
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

    def _slot(self, number: ExchangeId) -> ExchangeSlot:
        return ExchangeSlot(container=self._container, slot=number.slot, out=number.out)

    # ---- aging

    def keep_peers(self, peers: Collection[int], since: float) -> None:
        """Note to which addresses of exchanges a socket is connected, listed after ``since``."""
        self._peers, self._listed = peers, since

    def give_up(self, gone: Destination) -> None:
        """The program has closed its socket: its slot is the next one to be taken, unless a hook has found it since the
        sockets were listed.
        """
        slot = ExchangeSlot(container=self._container, slot=gone.key[1], out=True)
        noted = self._maps.exchanges.peek(slot)
        if noted is not None and noted.generation == gone.generation and noted.used / 1e9 < self._listed:
            self._mark_unused(slot, noted)

    def _mark_unused(self, slot: ExchangeSlot, noted: layout.ExchangeValue) -> None:
        """It stays until another takes it: the kernel does not list all sockets at one moment, so one may be there that
        was missing, and it has its slot again when it sends.
        """
        noted.used = 0
        self._maps.exchanges.put(slot, noted)

    def age(self, now: float) -> Stepwise[None]:
        """Forget what was not used for too long."""
        yield from self.clients.age(now, self._resources.loop, lambda one: _number_of(one).number in self._peers)
        for number in itertools.islice(self._next_aged, _AGED_SLOTS):
            self._age_slot(number, min(now - DESTINATION_SECONDS, self._listed))
            if self._resources.loop.turn_is_over():
                yield

    def _age_slot(self, number: int, before: float) -> None:
        """The slot of a destination that was not used since is the next one to be taken, if no socket is connected
        there.
        """
        slot = ExchangeSlot(container=self._container, slot=number, out=True)
        noted = self._maps.exchanges.peek(slot)
        if noted is None or not noted.used or noted.used / 1e9 >= before or self._destinations.get((4, number)):
            return
        if ExchangeId(True, noted.generation, number).number not in self._peers:
            self._mark_unused(slot, noted)

    def stop(self) -> Stepwise[None]:
        """Close its own socket, and remove its exchanges: no hook begins one any more."""
        loop = self._resources.loop
        self._resources.daemon.kept.drop(self._kept_slot)
        loop.close_listener(self._inner)
        for client in self.clients:
            if self.clients.get(client.number) is client:
                self.remove_client(client)
            if loop.turn_is_over():
                yield
        while self._erase_oldest():
            if loop.turn_is_over():
                yield
        for number in range(layout.EXCHANGE_OUT_SLOTS):
            self._maps.exchanges.delete(ExchangeSlot(container=self._container, slot=number, out=True))
            if loop.turn_is_over():
                yield
        self._places.leave(self._share)


def _is_inner(cookie: int, found: Found) -> bool:
    """Whether the socket of the graftd before has its port still, in the namespace with that cookie."""
    sock = found.socks[0]
    return netns.socket_cookie(sock) == cookie and sock.getsockname()[1] == found.record.port != 0


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
        self._destinations = Destinations(resources, maps, namespaces)
        self._slots = Slots(resources, maps, container_netns, self._destinations)
        try:
            self._stand_ins = StandIns(resources, maps, container_netns, self._destinations)
        except BaseException:
            for _ in self._slots.stop():
                pass
            raise
        self._aging: Job | None = None
        self._stopped = False
        resources.after(AGING_SECONDS, self._age)

    @property
    def port(self) -> int:
        """The port of the slots' addresses."""
        return self._slots.port

    @property
    def stand_in_ports(self) -> set[int]:
        """The ports of ::1 at which it has sockets."""
        return self._stand_ins.ports

    def value(self) -> layout.RelayValue:
        """What the hooks read of it, for the map `relays`."""
        mark, answer_mark = self._marks
        return layout.RelayValue(datagram_port=self.port, cgroup=self._cgroup, mark=mark, answer_mark=answer_mark)

    def serve(self, wanted: Publication, sock: socket.socket, address: str, slot: int | None = None) -> Server:
        """Relay what a socket on an endpoint receives to the container's. ``slot``: that of ``sock`` (kept.py)."""
        paths = Paths(self._slots, self._stand_ins)
        return Server(self._resources, paths, sock, wanted.target, wanted.target6, address, slot)

    def keep_programs(
        self, ports: Collection[int], peers: Peers, unread: Collection[int], since: float
    ) -> Stepwise[None]:
        """Close what belongs to sockets that are gone: all of the namespace's ports were listed, after ``since``, to
        which addresses of the relay's a socket is connected, and at which ports there is something to read.
        """
        if self.port not in ports:  # the kernel does not list them
            return
        self._slots.keep_peers(peers.four, since)
        yield from self._slots.free_read(unread, since)
        for gone in self._destinations.of_closed_sockets(ports, since):
            gone.reset()
            if gone.key[0] == 4:
                self._slots.give_up(gone)
            if self._resources.loop.turn_is_over():
                yield
        yield from self._stand_ins.keep_programs(ports, peers.six, unread, since)

    def _age(self) -> None:
        if not self._stopped:
            self._aging = Job(self._resources.loop, self._resources.number, self._age_each(), self._aged)

    def _age_each(self) -> Stepwise[None]:
        now = time.monotonic()
        yield from self._slots.age(now)
        yield from self._destinations.age(now)
        yield from self._stand_ins.age(now)

    def _aged(self, _error: BaseException | None) -> None:
        self._resources.after(AGING_SECONDS, self._age)

    def describe(self) -> dict[str, int]:
        """How many exchanges there are."""
        clients = len(self._slots.clients) + len(self._stand_ins.clients)
        return {"clients": clients, "destinations": len(self._destinations)}

    def stop(self) -> Stepwise[None]:
        """Close its own sockets. Servers are closed before, destinations as connections."""
        self._stopped = True
        if self._aging is not None:
            self._aging.stop()
        yield from self._destinations.stop()
        yield from self._slots.stop()
        yield from self._stand_ins.stop()
