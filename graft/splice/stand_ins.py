"""Datagrams over IPv6, relayed both ways for one container: bpf/stand_in.bpf.c has the picture.

A stand-in is a socket of the relay's at a port of ::1 in the container's namespace, and stands for one remote end at a
time: so here a client costs a descriptor, and a destination two. It is free again when what was sent to it has been
read, and no socket of the container is connected to it:

    spare ──▶ of a client ──▶ spare           or   ──▶ retired, while a socket is connected to it ──▶ spare
    offered ──▶ taken by a hook ──▶ offered

Connected sockets keep theirs until they are closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from functools import partial

from graft.datapath import layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.errors import GraftError
from graft.splice.datagram_clients import Client, Clients, Server
from graft.splice.datagram_destinations import DESTINATION_SECONDS, Destinations
from graft.splice.datagram_sockets import (
    Address,
    Datagram,
    bound_by_number,
    plain_datagram_socket,
    receive_each,
)
from graft.splice.jobs import Stepwise
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.resources import ContainerResources
from graft.splice.shares import Share

MAX_CLIENTS = 128
"""Clients of a container over IPv6 that it has answered, and as many that it has not."""
MAX_STAND_INS = 2 * MAX_CLIENTS + 32
"""For clients: also those that are retired, and spare ones."""
SPARE = 16
FIRST_OFFERED = 16
_LOOPBACK = "::1"
_DRAINED = 4096
_NOBODY = (1 << 64) - 1  # no socket's cookie


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
        self.retired = 0.0
        """When it stood for a client last, to whom a socket may be connected still."""


class StandIns:
    """Those of one container. Where its namespace has no ::1 there are none."""

    def __init__(
        self, resources: ContainerResources, maps: Maps, container_netns: NamespaceSockets, destinations: Destinations
    ) -> None:
        self._resources, self._maps, self._netns, self._destinations = resources, maps, container_netns, destinations
        self._container = resources.number
        self.clients = Clients(MAX_CLIENTS, self.remove_client)
        self._offered: list[StandIn] = []
        self._taken: OrderedDict[int, StandIn] = OrderedDict()
        self._for_clients: dict[int, StandIn] = {}
        self._spare: deque[StandIn] = deque()
        self._retired: dict[int, StandIn] = {}
        self._peers: Collection[int] = ()
        self._listed = 0.0
        self._share: Share | None = resources.daemon.stand_ins.join()
        try:
            with contextlib.suppress(OSError):
                self._offer(FIRST_OFFERED)
        except BaseException:
            for _ in self.stop():
                pass
            raise

    # ---- sockets

    def _make(self) -> StandIn:
        """A new one. Raises OSError: the container has no ::1, or its share of descriptors already."""
        descriptors = self._resources.descriptors
        if not descriptors.within_part() or not descriptors.can_take():  # what is lent can be reclaimed, these cannot
            raise OSError(errno.ENOBUFS, "the container has as many descriptors as it may have")
        if self._share is None or not self._share.within_part():
            raise OSError(errno.ENOBUFS, "the container has as many stand-ins as it may have")
        new = partial(plain_datagram_socket, socket.AF_INET6)
        sock = self._netns.run(partial(bound_by_number, new, _LOOPBACK))
        try:
            # The hooks send to a socket that has this mark, and to no other.
            mark = layout.CrossingValue(role=Crossing.LISTENER, container=self._container)
            self._maps.crossings.put(ctypes.c_int32(sock.fileno()), mark)
            made = StandIn(int(sock.getsockname()[1]), sock)
            self._resources.watch(sock.fileno(), select.EPOLLIN, partial(self._on_event, made))
        except BaseException:
            self._resources.loop.close_listener(sock)
            raise
        descriptors.take()
        self._share.take()
        return made

    def _close(self, gone: StandIn) -> None:
        self._resources.loop.close_listener(gone.sock)
        self._resources.descriptors.give_back()
        if self._share is not None:
            self._share.give_back()

    def _on_event(self, one: StandIn, _mask: int) -> None:
        receive_each(one.sock, partial(self._on_datagram, one), self._resources.loop)

    def _on_datagram(self, one: StandIn, datagram: Datagram) -> None:
        if one.client is not None:
            self._answer(one.client, datagram)
        elif one.port not in self._for_clients:
            self._send_out(one, datagram)

    def _key(self, one: StandIn) -> layout.StandInKey:
        return layout.StandInKey(container=self._container, port=one.port)

    @staticmethod
    def _drain(one: StandIn) -> None:
        """Read what was sent to the remote end that it stood for, so that it does not reach the next one."""
        for _ in range(_DRAINED):
            try:
                one.sock.recv_into(bytearray(1))
            except BlockingIOError:
                return
            except OSError:  # an ICMP error
                continue

    # ---- from clients of the host's, and back

    def add_client(self, server: Server, datagram: Datagram) -> Client:
        """Give a client a stand-in, that of the longest unanswered one where there are too many. Raises OSError."""
        self.clients.make_room()
        one = self._spare_one()
        client = Client(self, one.port, 0, server, datagram)
        place = self._client_place(client)
        if self._is_anothers(place, client):
            self._spare.append(one)
            raise OSError(errno.EADDRINUSE, "a client of another link has this link-local address")
        value = layout.StandInValue(addr=place.addr, port=place.port, local_port=place.local_port)
        try:
            self._maps.stand_ins.put(self._key(one), value)
            self._maps.stand_in_ports.put(place, ctypes.c_uint32(one.port))
        except OSError:
            self._maps.stand_ins.delete(self._key(one))
            self._spare.append(one)
            raise
        one.client = client
        self.clients.add(client)
        return client

    def _is_anothers(self, place: layout.StandInPlace, client: Client) -> bool:
        """Whether a client of another link is there: to the container, which sees no link, the two would be one."""
        placed = self._maps.stand_in_ports.peek(place)
        there = None if placed is None else self._for_clients.get(placed.value)
        return there is not None and there.client is not None and there.client.address != client.address

    def _remove_place(self, place: layout.StandInPlace, port: int) -> None:
        """If it is still this port's."""
        placed = self._maps.stand_in_ports.peek(place)
        if placed is not None and placed.value == port:
            self._maps.stand_in_ports.delete(place)

    def _spare_one(self) -> StandIn:
        """One that stands for nothing: of those that were used, the one that has rested longest. Raises OSError."""
        if len(self._spare) < SPARE and len(self._for_clients) < MAX_STAND_INS:
            with contextlib.suppress(OSError):
                made = self._make()
                self._for_clients[made.port] = made
                return made
        while not self._spare and self.clients.remove_longest_unanswered():
            pass
        if not self._spare:
            raise OSError(errno.ENOBUFS, "no stand-in is free")
        return self._spare.popleft()

    def remove_client(self, client: Client) -> None:
        """Forget a client. Its next datagram begins a new exchange."""
        one = self._for_clients[client.number]
        self.clients.discard(client)
        one.client = None
        self._remove_place(self._client_place(client), one.port)
        noted = self._maps.stand_ins.get(self._key(one))
        self._maps.stand_ins.delete(self._key(one))  # nothing more gets there
        self._drain(one)
        if noted is not None and self._may_be_connected(one, noted):
            one.retired = time.monotonic()
            self._retired[one.port] = one
        else:
            self._spare.append(one)

    def hand_over(self, client: Client, data: bytes) -> None:
        """Send the container's socket what the client sent."""
        self.clients.touch(client)
        target = client.server.target6
        if target is not None:
            self._send(self._for_clients[client.number], data, (target.address, target.port))

    @staticmethod
    def _send(one: StandIn, data: bytes, to: Address) -> None:
        with contextlib.suppress(OSError):
            one.sock.sendto(data, to)

    def _answer(self, client: Client, datagram: Datagram) -> None:
        target = client.server.target6
        if target is None or datagram.sender[1] != target.port:
            return
        self.clients.note_answer(client)
        client.answer(datagram.data)

    def _client_place(self, client: Client) -> layout.StandInPlace:
        target = client.server.target6
        place = layout.StandInPlace(container=self._container, port=client.address[1])
        place.local_port = 0 if target is None else target.port
        place.addr[:] = client.packed
        return place

    # ---- from the container to destinations, and back

    def _offer(self, count: int) -> None:
        """Let the hooks have so many. Raises OSError."""
        made: list[StandIn] = []
        try:
            while len(self._offered) + len(made) < count:
                made.append(self._make())
            offered = [*self._offered, *made]
            value = layout.Offer(count=count)
            value.ports[:count] = [one.port for one in offered]
            self._maps.offers.put(ctypes.c_uint32(self._container), value)
        except BaseException:
            for one in made:
                self._close(one)
            raise
        self._offered = offered

    def _send_out(self, one: StandIn, datagram: Datagram) -> None:
        if one.taken is None and not self._note_taken(one):
            return  # somebody sent there by himself
        assert one.taken is not None
        if one.program is None and one.taken.local_port in (0, datagram.sender[1]):  # 0: it had none yet
            one.program = datagram.sender
        if one.program != datagram.sender:
            return
        one.used = time.monotonic()
        self._taken.move_to_end(one.port)
        found = self._destinations.get((6, one.port))
        if found is None:
            remote = 6, bytes(one.taken.addr), one.taken.port
            try:
                found = self._destinations.open((6, one.port), 0, remote, one.program, partial(self._send, one))
            except (OSError, GraftError):
                return
        if found is not None:
            found.send(datagram.data)

    def _note_taken(self, one: StandIn) -> bool:
        """Whether a hook has taken it."""
        one.taken = self._maps.stand_ins.get(self._key(one))
        if one.taken is None:
            return False
        one.used = time.monotonic()
        self._taken[one.port] = one
        self._keep_some_free()
        return True

    def _keep_some_free(self) -> None:
        """A quarter of those that are offered, so that a new destination finds one: more are made, up to a limit; then
        the longest unused one to which no socket is connected is free.
        """
        count = len(self._offered)
        if len(self._taken) <= count * 3 // 4:
            return
        if count < layout.MAX_OFFERED and self._resources.descriptors.within_part(count):
            with contextlib.suppress(OSError):
                self._offer(2 * count)
                return
        unused = next((one for one in self._taken.values() if not self._is_connected(one)), None)
        if unused is not None:
            self._free(unused)

    def _is_connected(self, one: StandIn) -> bool:
        noted = self._maps.stand_ins.peek(self._key(one))
        return noted is not None and self._may_be_connected(one, noted)

    def _may_be_connected(self, one: StandIn, noted: layout.StandInValue) -> bool:
        """Whether a socket may be connected to it: one was when they were listed last, or was connected since."""
        return bool(noted.connected) and (one.port in self._peers or noted.connected / 1e9 >= self._listed)

    def _free(self, one: StandIn) -> None:
        """A hook may take it again."""
        assert one.taken is not None
        destination = self._destinations.get((6, one.port))
        if destination is not None:
            destination.reset()
        taken = one.taken
        place = layout.StandInPlace(addr=taken.addr, cookie=taken.cookie, container=self._container, port=taken.port)
        self._remove_place(place, one.port)
        self._maps.stand_ins.put(self._key(one), layout.StandInValue(cookie=_NOBODY))  # nothing more gets there
        self._drain(one)
        del self._taken[one.port]
        one.taken = one.program = None
        self._maps.stand_ins.delete(self._key(one))

    # ---- aging

    def keep_programs(self, ports: Collection[int], peers: Collection[int], since: float) -> Stepwise[None]:
        """Free what belongs to sockets that are gone: all of the namespace's ports were listed, after ``since``, and to
        which ports of ::1 a socket is connected.
        """
        loop = self._resources.loop
        self._peers, self._listed = peers, since
        for one in list(self._offered):
            if one.taken is None:
                self._note_taken(one)  # by a socket that was connected, and has sent nothing
            if loop.turn_is_over():
                yield
        for one in list(self._taken.values()):
            if one.taken is None:  # freed meanwhile
                continue
            port = one.program[1] if one.program else one.taken.local_port
            is_there = port in ports if port else one.port in peers
            if not is_there and one.taken.begun / 1e9 < since:
                self._free(one)
            if loop.turn_is_over():
                yield
        for one in [one for one in self._retired.values() if one.retired < since and one.port not in peers]:
            del self._retired[one.port]
            self._drain(one)
            self._spare.append(one)
            if loop.turn_is_over():
                yield

    def age(self, now: float) -> Stepwise[None]:
        """Forget what was not used for too long."""
        loop = self._resources.loop
        yield from self.clients.age(now, loop)
        if not self._offered:
            with contextlib.suppress(OSError):
                self._offer(FIRST_OFFERED)
        for one in [one for one in self._taken.values() if now - one.used > DESTINATION_SECONDS]:
            if one.taken is not None and now - one.used > DESTINATION_SECONDS and not self._is_connected(one):
                self._free(one)
            if loop.turn_is_over():
                yield
        while len(self._spare) > SPARE:
            gone = self._spare.pop()
            del self._for_clients[gone.port]
            self._close(gone)
            if loop.turn_is_over():
                yield

    def stop(self) -> Stepwise[None]:
        """Close them all, and remove what is in the maps: no hook takes one any more."""
        loop = self._resources.loop
        share, self._share = self._share, None  # so that none is made any more
        self._maps.offers.delete(ctypes.c_uint32(self._container))
        for client in self.clients:
            if self.clients.get(client.number) is client:
                self.remove_client(client)
            if loop.turn_is_over():
                yield
        for one in self._offered:
            if one.taken is not None or self._note_taken(one):
                self._free(one)
            if loop.turn_is_over():
                yield
        for one in (*self._offered, *self._for_clients.values()):
            self._close(one)
            if loop.turn_is_over():
                yield
        if share is not None:
            self._resources.daemon.stand_ins.leave(share)
