"""Datagrams over IPv6, relayed both ways for one container: bpf/stand_in.bpf.c has the picture.

A stand-in is a socket of the relay's at a port of ::1 in the container's namespace: so here a client costs a
descriptor, and a destination two. A port stands for one remote end and no other. What is queued, on either side, when
that is forgotten could else seem to come from the next one, or go to it. So the socket is closed then, and the next one
has another port, which the kernel picks at random (stand_in_sockets.py):

    made ──▶ of a client ──▶ closed           made ──▶ offered ──▶ taken by a hook ──▶ closed, and another is offered

A destination's is kept while a socket of the container is connected to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from functools import partial

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.errors import GraftError
from graft.splice.datagram_clients import Client, Clients, Server
from graft.splice.datagram_destinations import DESTINATION_SECONDS, Destinations
from graft.splice.datagram_sockets import Address, Datagram
from graft.splice.jobs import Stepwise
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.resources import ContainerResources
from graft.splice.stand_in_sockets import StandIn, StandInSockets

MAX_CLIENTS = 128
"""Clients of a container over IPv6 that it has answered, and as many that it has not."""
FIRST_OFFERED = 16
_STEP_REPLACED = 8


class StandIns:
    """Those of one container. Where its namespace has no ::1 there are none."""

    def __init__(
        self, resources: ContainerResources, maps: Maps, container_netns: NamespaceSockets, destinations: Destinations
    ) -> None:
        self._resources, self._maps, self._destinations = resources, maps, destinations
        self._container = resources.number
        self._sockets = StandInSockets(resources, maps, container_netns, self._on_datagram)
        self.clients = Clients(MAX_CLIENTS, self.remove_client)
        self._offered: list[StandIn | None] = []
        """None: there was no room for one."""
        self._taken: OrderedDict[int, StandIn] = OrderedDict()
        self._for_clients: dict[int, StandIn] = {}
        self._peers: Collection[int] = ()
        self._listed = 0.0
        self._stopped = False
        try:
            self._offer(FIRST_OFFERED)
        except BaseException:
            for _ in self.stop():
                pass
            raise

    def _on_datagram(self, one: StandIn, datagram: Datagram) -> None:
        if one.client is not None:
            self._answer(one.client, datagram)
        else:
            self._send_out(one, datagram)

    # ---- from clients of the host's, and back

    def add_client(self, server: Server, datagram: Datagram) -> Client:
        """Give a client a stand-in; of too many, the longest unanswered one is forgotten. Raises OSError."""
        client = Client(self, 0, 0, server, datagram)
        place = self._client_place(client)
        if self._is_anothers(place, client):
            raise OSError(errno.EADDRINUSE, "a client of another link has this link-local address")
        one = self._make_for_client()
        self.clients.make_room()
        value = layout.StandInValue(addr=place.addr, port=place.port, local_port=place.local_port)
        try:
            self._maps.stand_ins.put(self._sockets.key(one.port), value)
            self._maps.stand_in_ports.put(place, ctypes.c_uint32(one.port))
        except OSError:
            self._sockets.close(one)
            raise
        client.number, one.client = one.port, client
        self._for_clients[one.port] = one
        self.clients.add(client)
        return client

    def _make_for_client(self) -> StandIn:
        """A new one; where there are too many, the longest unanswered client is forgotten. Raises OSError."""
        try:
            return self._sockets.make()
        except OSError as error:
            if error.errno != errno.ENOBUFS or not self.clients.remove_longest_unanswered():
                raise
        return self._sockets.make()

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

    def remove_client(self, client: Client) -> None:
        """Forget a client. Its next datagram begins a new exchange."""
        one, place = self._for_clients.pop(client.number), self._client_place(client)
        self.clients.discard(client)
        self._remove_place(place, one.port)
        self._sockets.forget(one, bytes(place.addr), place.port, place.local_port)

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

    def _offer(self, count: int) -> bool:
        """Let the hooks have so many, if any more can be made; those that this turn has no time for are made later."""
        before = len(self._offered)
        if not self._resources.descriptors.within_part(count - before):
            return False
        self._offered += [None] * (count - before)
        try:
            self._fill()
        finally:
            if not any(self._offered[before:]):
                del self._offered[before:]
        return len(self._offered) > before

    def _write_offer(self) -> None:
        value = layout.Offer(count=len(self._offered))
        value.ports[: value.count] = [0 if one is None else one.port for one in self._offered]
        self._maps.offers.put(ctypes.c_uint32(self._container), value)

    def _fill(self) -> bool:
        """Make those that are missing among the offered ones; whether this turn had no time for all of them."""
        missing, made = [at for at, one in enumerate(self._offered) if one is None], 0
        with contextlib.suppress(OSError):
            for at in missing:
                self._offered[at] = self._sockets.make()
                made += 1
                if self._resources.loop.turn_is_over():
                    break
        if made:
            self._write_offer()
        return 0 < made < len(missing)

    def _fill_all(self) -> Stepwise[None]:
        while None in self._offered and self._fill():
            yield

    def _send_out(self, one: StandIn, datagram: Datagram) -> None:
        if one.taken is None and not self._note_taken(one):
            return  # somebody sent there by himself
        assert one.taken is not None
        one.program = datagram.sender  # of the one socket that the hooks let send here, which may be connected anew
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
            found.program = datagram.sender
            found.send(datagram.data)

    def _note_taken(self, one: StandIn) -> bool:
        """Whether a hook has taken it."""
        one.taken = self._maps.stand_ins.get(self._sockets.key(one.port))
        if one.taken is None:
            return False
        one.used = time.monotonic()
        self._taken[one.port] = one
        self._keep_some_free(one)
        return True

    def _keep_some_free(self, newest: StandIn) -> None:
        """A quarter of those that are offered, so that a new destination finds one: more are made, up to a limit; then
        the longest unused one to which no socket is connected gives way.
        """
        count = len(self._offered)
        if len(self._taken) <= count * 3 // 4:
            return
        if count < layout.MAX_OFFERED and self._offer(2 * count):
            return
        others = (one for one in self._taken.values() if one is not newest)
        unused = next((one for one in others if not self._is_connected(one)), None)
        if unused is not None:
            self._replace([unused])

    def _is_connected(self, one: StandIn) -> bool:
        """Whether a socket may be connected to it: one was when they were listed last, or was connected since."""
        noted = self._maps.stand_ins.peek(self._sockets.key(one.port))
        if noted is None or not noted.connected:
            return False
        return one.port in self._peers or noted.connected / 1e9 >= self._listed

    def _replace(self, old: Collection[StandIn]) -> None:
        """Close them, and offer others to the hooks instead."""
        self._offered = [None if one in old else one for one in self._offered]
        self._write_offer()  # so that no hook takes one of them once more
        for one in old:
            self._forget(one)
        self._fill()

    def _forget(self, one: StandIn) -> None:
        assert one.taken is not None
        destination = self._destinations.get((6, one.port))
        if destination is not None:
            destination.reset()
        taken = one.taken
        place = layout.StandInPlace(addr=taken.addr, cookie=taken.cookie, container=self._container, port=taken.port)
        self._remove_place(place, one.port)
        del self._taken[one.port]
        if one.program is None:
            self._sockets.close(one)  # no answer was ever sent from there
        else:
            self._sockets.forget(one, bytes(taken.addr), taken.port, one.program[1])

    # ---- aging

    @property
    def ports(self) -> set[int]:
        """Those of their sockets."""
        return {one.port for one in self._offered if one is not None}.union(self._taken, self._for_clients)

    def keep_programs(
        self, ports: Collection[int], peers: Collection[int], unread: Collection[int], since: float
    ) -> Stepwise[None]:
        """Close what belongs to sockets that are gone: all ports of the namespace were listed, after ``since``, to
        which ports of ::1 a socket is connected, and at which there is something to read.
        """
        self._peers, self._listed = peers, since
        yield from self._sockets.free_read(unread, since, peers)
        for one in [one for one in self._offered if one is not None and one.taken is None]:
            if one in self._offered:  # still
                self._note_taken(one)  # by a socket that was connected, and has sent nothing
            if self._resources.loop.turn_is_over():
                yield
        yield from self._replace_each(lambda one: self._is_gone(one, ports, since))
        yield from self._fill_all()

    def _is_gone(self, one: StandIn, ports: Collection[int], since: float) -> bool:
        assert one.taken is not None
        port = one.program[1] if one.program else one.taken.local_port
        is_there = (port and port in ports) or one.port in self._peers
        return not is_there and one.taken.begun / 1e9 < since

    def age(self, now: float) -> Stepwise[None]:
        """Forget what was not used for too long."""
        yield from self.clients.age(now, self._resources.loop, lambda one: one.number in self._peers)
        if not self._offered:
            self._offer(FIRST_OFFERED)
        yield from self._replace_each(lambda one: now - one.used > DESTINATION_SECONDS and not self._is_connected(one))
        yield from self._fill_all()

    def _replace_each(self, is_unused: Callable[[StandIn], bool]) -> Stepwise[None]:
        """Replace those that are, some at a time."""
        unused = [one for one in self._taken.values() if is_unused(one)]
        for at in range(0, len(unused), _STEP_REPLACED):
            some = [one for one in unused[at : at + _STEP_REPLACED] if one.port in self._taken and is_unused(one)]
            if some:
                self._replace(some)
                yield

    def stop(self) -> Stepwise[None]:
        """Close them all, and remove what is in the maps: no hook takes one any more."""
        loop = self._resources.loop
        if self._stopped:
            return
        self._stopped = True
        self._sockets.refuse()
        self._maps.offers.delete(ctypes.c_uint32(self._container))
        for client in self.clients:
            if self.clients.get(client.number) is client:
                self.remove_client(client)
            if loop.turn_is_over():
                yield
        offered, self._offered = self._offered, []
        for one in offered:
            if one is None:
                continue
            one.taken = one.taken or self._maps.stand_ins.get(self._sockets.key(one.port))
            if one.taken is None:
                self._sockets.close(one)
            else:
                self._taken[one.port] = one
                self._forget(one)
            if loop.turn_is_over():
                yield
        yield from self._sockets.stop()
