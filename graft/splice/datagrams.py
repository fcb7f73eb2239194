"""Datagrams over IPv4, relayed both ways for one container: bpf/exchange.bpf.c has the picture.

In the container's namespace one socket serves all exchanges: each remote end is an address of its own in 127.0.0.0/8.
A client costs an entry of a table, no descriptor; a destination costs a socket, because its source is an endpoint.

Both tables are bounded and age. Clients that the container has answered are kept apart from those that it has not:
a flood from random ports takes the places of its own kind, not those of real clients.
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
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import NamedTuple

from graft.datapath import exchanges, layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.errors import GraftError
from graft.model.transport import Home
from graft.policy.model import Verdict
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.publication import DialTarget
from graft.splice.resources import ContainerResources

MAX_CLIENTS = 1024
"""Clients of a container that it has answered, and as many that it has not."""
MAX_DESTINATIONS = 256
ANSWERED_SECONDS, UNANSWERED_SECONDS, DESTINATION_SECONDS = 180.0, 30.0, 60.0
AGING_SECONDS = 5.0
_DATAGRAMS = 32  # in one turn
_LONGEST = 65536
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, local address, destination of the header
_IP_PKTINFO = 8
_BUFFER_BYTES = 1 << 20
_BIND_TRIES = 16

Address = tuple[str, int]


class Datagram(NamedTuple):
    """What a socket with IP_PKTINFO receives: ``to`` is the address that it was sent to, packed."""

    data: bytes
    sender: Address
    to: bytes


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


def datagram_socket() -> socket.socket:
    """A socket in this namespace that tells where its datagrams were sent to. Raises OSError."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    except OSError:
        sock.close()
        raise
    return sock


def receive(sock: socket.socket) -> Datagram | None:
    """The next datagram, or None. Raises OSError: what the last one that was sent has caused (ICMP)."""
    try:
        data, control, _, sender = sock.recvmsg(_LONGEST, socket.CMSG_SPACE(_PKTINFO.size))
    except BlockingIOError:
        return None
    to = b""
    for level, kind, value in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            to = _PKTINFO.unpack(value[: _PKTINFO.size])[2]
    return Datagram(data, sender, to)


def send(sock: socket.socket, data: bytes, source: bytes, to: Address) -> None:
    """Send from one of the socket's addresses. What cannot be sent is lost, as any datagram may be."""
    control = [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(0, source, bytes(4)))]
    with contextlib.suppress(OSError):
        sock.sendmsg([data], control, 0, to)


class Client:
    """A client of one of the container's sockets. ``reached`` is the host's address that it sent to."""

    __slots__ = ("address", "answered", "id", "reached", "server", "used")

    def __init__(self, number: ExchangeId, server: Server, address: Address, reached: bytes) -> None:
        self.id, self.server, self.address, self.reached = number, server, address, reached
        self.answered = False
        self.used = time.monotonic()


class Server:
    """The relay's socket on an endpoint, for one socket of the container at ``target``."""

    def __init__(self, relay: DatagramRelay, sock: socket.socket, target: DialTarget, address: str) -> None:
        self._relay, self.sock, self.target, self.address = relay, sock, target, address
        self.clients: dict[Address, Client] = {}
        self.served = 0
        self.is_lost = False  # it is in the endpoint's namespace, where the container closes nothing
        relay.resources.watch(sock.fileno(), select.EPOLLIN, self._on_event)

    def _on_event(self, _mask: int) -> None:
        self._relay.each_datagram(self.sock, self._on_datagram)

    def _on_datagram(self, datagram: Datagram) -> None:
        try:
            client = self.clients.get(datagram.sender) or self._relay.add_client(self, datagram)
        except OSError:  # the kernel has no room: its next datagram may find some
            return
        client.used, client.reached = time.monotonic(), datagram.to
        self._relay.touch(client)
        send(self._relay.inner, datagram.data, client.id.packed, (self.target.address, self.target.port))

    def describe(self) -> dict[str, int]:
        """How many clients there are, and how many answers were sent."""
        return {"connections": len(self.clients), "served": self.served}

    def close(self) -> None:
        """Stop receiving at the endpoint."""
        for client in list(self.clients.values()):
            self._relay.remove_client(client)
        self._relay.resources.loop.close_listener(self.sock)


class Destination:
    """An exchange that a socket of the container began. Its own socket is connected to the destination."""

    def __init__(self, relay: DatagramRelay, number: ExchangeId, sock: socket.socket, program: Address) -> None:
        self._relay, self.id, self.sock, self.program = relay, number, sock, program
        self.begun = self.used = time.monotonic()
        relay.resources.watch(sock.fileno(), select.EPOLLIN, self._on_event)

    def _on_event(self, _mask: int) -> None:
        self._relay.each_datagram(self.sock, self._on_datagram)

    def _on_datagram(self, datagram: Datagram) -> None:
        self.used = time.monotonic()
        send(self._relay.inner, datagram.data, self.id.packed, self.program)

    def reset(self) -> None:
        """Close it, and release its descriptor."""
        self._relay.forget_destination(self)
        self._relay.resources.loop.close(self.sock)


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
        self._cgroup, self._mark = cgroup, int.from_bytes(os.urandom(4), "little") | 1
        self.resources, self._maps, self._namespaces = resources, maps, namespaces
        self._container = resources.number
        self._lookup = Lookup(maps)
        self._answered: OrderedDict[int, Client] = OrderedDict()
        self._unanswered: OrderedDict[int, Client] = OrderedDict()
        self._destinations: OrderedDict[int, Destination] = OrderedDict()
        self._next_slot = itertools.cycle(range(layout.EXCHANGE_SLOTS))
        self._stopped = False
        exchanges.erase(maps, self._container)  # of a daemon that was killed
        self.inner = container_netns.run(_inner_socket)
        self.port = int(self.inner.getsockname()[1])
        # The hooks send to a socket that has this mark, and to no other.
        mark = layout.CrossingValue(role=Crossing.LISTENER, container=self._container)
        maps.crossings.put(ctypes.c_int32(self.inner.fileno()), mark)
        resources.watch(self.inner.fileno(), select.EPOLLIN, self._on_event)
        resources.after(AGING_SECONDS, self._age)

    def value(self) -> layout.RelayValue:
        """What the hooks read of it, for the map `relays`."""
        return layout.RelayValue(datagram_port=self.port, cgroup=self._cgroup, mark=self._mark)

    def each_datagram(self, sock: socket.socket, serve: Callable[[Datagram], None]) -> None:
        """Serve what a socket has received, as much as fits into a turn; its event comes again for the rest."""
        for _ in range(_DATAGRAMS):
            try:
                found = receive(sock)
            except OSError:  # an ICMP error of an earlier datagram
                continue
            if found is None:
                return
            serve(found)

    def _on_event(self, _mask: int) -> None:
        self.each_datagram(self.inner, self._on_inner)

    def _on_inner(self, datagram: Datagram) -> None:
        number = ExchangeId.parse(datagram.to)
        if number is None:
            return
        if number.out:
            self._send_out(number, datagram)
        else:
            self._answer(number, datagram)

    # ---- from clients of the host's, and back

    def add_client(self, server: Server, datagram: Datagram) -> Client:
        """Give a client a slot, which the longest unanswered one loses where there are too many."""
        while len(self._unanswered) >= MAX_CLIENTS:
            self.remove_client(next(iter(self._unanswered.values())))
        slot = next(slot for slot in self._next_slot if slot not in self._answered and slot not in self._unanswered)
        number = ExchangeId(False, random.randint(1, layout.EXCHANGE_GENERATIONS), slot)
        client = Client(number, server, datagram.sender, datagram.to)
        value = layout.ExchangeValue(port=client.address[1], family=4, generation=number.generation)
        ctypes.memmove(value.addr, socket.inet_aton(client.address[0]), 4)
        self._maps.exchanges.put(self._slot(number), value)
        self._maps.exchange_clients.put(self._client_key(client), ctypes.c_uint32(number.number))
        self._unanswered[slot] = server.clients[client.address] = client
        return client

    def touch(self, client: Client) -> None:
        """Note that it was heard."""
        (self._answered if client.answered else self._unanswered).move_to_end(client.id.slot)

    def remove_client(self, client: Client) -> None:
        """Forget a client. Its next datagram begins a new exchange."""
        (self._answered if client.answered else self._unanswered).pop(client.id.slot)
        del client.server.clients[client.address]
        self._maps.exchanges.delete(self._slot(client.id))
        self._maps.exchange_clients.delete(self._client_key(client))

    def _answer(self, number: ExchangeId, datagram: Datagram) -> None:
        client = self._answered.get(number.slot) or self._unanswered.get(number.slot)
        if client is None or client.id != number or datagram.sender[1] != client.server.target.port:
            return
        if not client.answered:
            self._unanswered.pop(number.slot)
            client.answered = True
            while len(self._answered) >= MAX_CLIENTS:
                self.remove_client(next(iter(self._answered.values())))
            self._answered[number.slot] = client
        client.used = time.monotonic()
        client.server.served += 1
        send(client.server.sock, datagram.data, client.reached, client.address)

    def _client_key(self, client: Client) -> layout.ExchangeClient:
        key = layout.ExchangeClient(
            container=self._container, local_port=client.server.target.port, port=client.address[1]
        )
        key.addr[:] = socket.inet_aton(client.address[0])
        return key

    # ---- from the container to destinations, and back

    def _send_out(self, number: ExchangeId, datagram: Datagram) -> None:
        found = self._destinations.get(number.slot)
        if found is not None and found.id != number:
            found.reset()
            found = None
        if found is None:
            try:
                found = self._open(number, datagram.sender)
            except (OSError, GraftError):
                return
        if found is None or found.program != datagram.sender:
            return
        found.used = time.monotonic()
        self._destinations.move_to_end(number.slot)
        with contextlib.suppress(OSError):
            found.sock.send(datagram.data)

    def _open(self, number: ExchangeId, program: Address) -> Destination | None:
        """A new exchange, as the hooks have noted it; None where it is not granted, or there is no room."""
        asked = self._maps.exchanges.get(self._slot(number))
        container = self._maps.containers.peek(ctypes.c_uint32(self._container))
        if asked is None or asked.generation != number.generation or container is None:
            return None
        address = bytes(asked.addr)
        verdict, endpoint_id = self._lookup.egress(
            container.ruleset, socket.IPPROTO_UDP, asked.family, address, asked.port
        )
        endpoint = self._maps.endpoints.peek(ctypes.c_uint32(endpoint_id)) if verdict == Verdict.GRANT else None
        if endpoint is None or not self._make_room():
            return None
        netns, family = endpoint.netns, socket.AF_INET if asked.family == 4 else socket.AF_INET6
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = self._namespaces.of_endpoint(netns).run(lambda: socket.socket(family, kind))
        try:
            tag = layout.Tag(container=self._container, endpoint=endpoint_id, home=Home.HOST)
            self._maps.tags.put(ctypes.c_int32(sock.fileno()), tag)
            # The connect hook decides again, and binds the socket to the endpoint.
            sock.connect((socket.inet_ntop(family, address[: 4 if asked.family == 4 else 16]), asked.port))
        except BaseException:
            sock.close()
            raise
        made = self._destinations[number.slot] = Destination(self, number, sock, program)
        self.resources.descriptors.take()
        self.resources.connections[made] = None
        return made

    def _make_room(self) -> bool:
        while self._destinations and (
            len(self._destinations) >= MAX_DESTINATIONS or not self.resources.descriptors.can_take()
        ):
            next(iter(self._destinations.values())).reset()
        return self.resources.descriptors.can_take()

    def forget_destination(self, gone: Destination) -> None:
        """It is closed. (What the hooks have noted stays: the program's next datagram opens it again.)"""
        if self._destinations.get(gone.id.slot) is gone:
            del self._destinations[gone.id.slot]
            del self.resources.connections[gone]
            self.resources.descriptors.give_back()

    def keep_programs(self, ports: Collection[int], since: float) -> None:
        """Close what belongs to sockets that are gone: all of the namespace's ports were listed, after ``since``."""
        for one in list(self._destinations.values()):
            if one.begun < since and one.program[1] not in ports:
                one.reset()

    # ---- aging

    def _age(self) -> None:
        if self._stopped:
            return
        now = time.monotonic()
        for clients, limit in ((self._unanswered, UNANSWERED_SECONDS), (self._answered, ANSWERED_SECONDS)):
            for client in [client for client in clients.values() if now - client.used > limit]:
                self.remove_client(client)
        for one in [one for one in self._destinations.values() if now - one.used > DESTINATION_SECONDS]:
            one.reset()
        self.resources.after(AGING_SECONDS, self._age)

    def _slot(self, number: ExchangeId) -> layout.ExchangeSlot:
        return layout.ExchangeSlot(container=self._container, slot=number.slot, out=number.out)

    def describe(self) -> dict[str, int]:
        """How many exchanges there are."""
        return {"clients": len(self._answered) + len(self._unanswered), "destinations": len(self._destinations)}

    def stop(self) -> None:
        """Close its own socket. Servers are closed before, destinations as connections."""
        self._stopped = True
        for one in list(self._destinations.values()):
            one.reset()
        self.resources.loop.close_listener(self.inner)


def _inner_socket() -> socket.socket:
    """At a port that is bound by its number: the kernel leaves it to a socket that root of the namespace destroys.

    (udp_abort, net/ipv4/udp.c: then the socket goes on, with one error. Otherwise it has no port any more.)
    """
    for left in reversed(range(_BIND_TRIES)):
        with datagram_socket() as asked:
            asked.bind(("0.0.0.0", 0))
            place = asked.getsockname()
        sock = datagram_socket()
        try:
            sock.bind(place)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or not left:  # somebody was quicker
                raise
            continue
        return sock
    raise AssertionError("a try is left")
