"""Clients of a container's UDP sockets, and the relay's sockets at endpoints that hear them.

Those that the container has answered are kept apart from those that it has not: a flood from random ports takes the
places of its own kind, not those of real clients.
"""

from __future__ import annotations

import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import NamedTuple, Protocol

from graft.model.address import unmapped
from graft.splice.datagram_sockets import Address, Datagram, Receiver, send
from graft.splice.event_loop import EventLoop
from graft.splice.jobs import Stepwise
from graft.splice.publication import DialTarget
from graft.splice.resources import ContainerResources

ANSWERED_SECONDS, UNANSWERED_SECONDS = 180.0, 30.0


class Path(Protocol):
    """How the clients of one family reach the container's sockets."""

    def add_client(self, server: Server, datagram: Datagram) -> Client:
        """Begin an exchange with who sent this. Raises OSError where there is no room."""

    def remove_client(self, client: Client) -> None:
        """Forget a client. Its next datagram begins a new exchange."""

    def hand_over(self, client: Client, data: bytes) -> None:
        """Send the container's socket what the client sent."""


class Paths(NamedTuple):
    """By family."""

    four: Path
    six: Path


class Client:
    """A client of one of the container's sockets. ``reached`` is the host's address that it sent to; ``number`` says
    where it is in its path's table, and ``generation`` whether it still is.
    """

    __slots__ = ("address", "answered", "generation", "number", "packed", "path", "reached", "server", "used")

    def __init__(self, path: Path, number: int, generation: int, server: Server, datagram: Datagram) -> None:
        self.path, self.number, self.generation, self.server = path, number, generation, server
        self.address, self.reached = datagram.sender, datagram.to
        self.packed = _packed(self.address)
        self.answered = False
        self.used = time.monotonic()

    def answer(self, data: bytes) -> None:
        """Send it what the container's socket sent."""
        self.used = time.monotonic()
        self.server.served += 1
        send(self.server.sock, data, self.reached, self.address)


def _packed(address: Address) -> bytes:
    """An address of its own family: four bytes for ::ffff:1.2.3.4."""
    return unmapped(ip_address(address[0].partition("%")[0])).packed


class Clients:
    """The clients of one path: ``limit`` that were answered, and as many that were not. ``remove`` removes one."""

    def __init__(self, limit: int, remove: Callable[[Client], None]) -> None:
        self.limit, self._remove = limit, remove
        self._answered: OrderedDict[int, Client] = OrderedDict()
        self._unanswered: OrderedDict[int, Client] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answered) + len(self._unanswered)

    def __iter__(self) -> Iterator[Client]:
        return iter([*self._unanswered.values(), *self._answered.values()])

    def get(self, number: int) -> Client | None:
        """The client at a number."""
        return self._answered.get(number) or self._unanswered.get(number)

    def make_room(self) -> None:
        """Remove the longest unanswered ones where there are too many."""
        while len(self._unanswered) >= self.limit:
            self.remove_longest_unanswered()

    def remove_longest_unanswered(self) -> bool:
        """False where there is none."""
        if not self._unanswered:
            return False
        self._remove(next(iter(self._unanswered.values())))
        return True

    def remove_longest_answered(self) -> bool:
        """False where there is none."""
        if not self._answered:
            return False
        self._remove(next(iter(self._answered.values())))
        return True

    def add(self, client: Client) -> None:
        """Add one, not answered yet, for which there is room; its server has it too."""
        self._unanswered[client.number] = client.server.clients[client.address] = client

    def discard(self, client: Client) -> None:
        """It is no client any more."""
        (self._answered if client.answered else self._unanswered).pop(client.number)
        del client.server.clients[client.address]

    def touch(self, client: Client) -> None:
        """Note that it was heard."""
        client.used = time.monotonic()
        (self._answered if client.answered else self._unanswered).move_to_end(client.number)

    def note_answer(self, client: Client) -> None:
        """Note that the container answers it: the first time, it moves."""
        if client.answered:
            return
        self._unanswered.pop(client.number)
        client.answered = True
        while len(self._answered) >= self.limit:
            self.remove_longest_answered()
        self._answered[client.number] = client

    def age(self, now: float, loop: EventLoop, is_connected: Callable[[Client], bool]) -> Stepwise[None]:
        """Remove what was not used for too long, and no socket of the container is connected to."""
        for client in self:
            limit = ANSWERED_SECONDS if client.answered else UNANSWERED_SECONDS
            if now - client.used > limit and self.get(client.number) is client and not is_connected(client):
                self._remove(client)
                if loop.turn_is_over():
                    yield


class Server:
    """The relay's socket on an endpoint, for one socket of the container at ``target``: that is for IPv4 clients,
    ``target6`` for those of IPv6. ``slot``: that of ``sock``, if it outlives this process (kept.py).
    """

    def __init__(
        self,
        resources: ContainerResources,
        paths: Paths,
        sock: socket.socket,
        target: DialTarget,
        target6: DialTarget | None,
        address: str,
        slot: int | None = None,
    ) -> None:
        self._resources, self._paths, self.sock, self.address = resources, paths, sock, address
        self._slot = slot
        self.target, self.target6 = target, target6
        self.clients: dict[Address, Client] = {}
        self.served = 0
        self.is_lost = False  # it is in the endpoint's namespace, where the container closes nothing
        try:
            resources.watch(sock.fileno(), select.EPOLLIN, Receiver(sock, self._on_datagram, resources.loop))
        except BaseException:
            resources.loop.close_listener(sock)
            raise

    def _on_datagram(self, datagram: Datagram) -> None:
        client = self.clients.get(datagram.sender)
        if client is None:
            path = self._paths.four if len(_packed(datagram.sender)) == 4 else self._paths.six
            try:
                client = path.add_client(self, datagram)
            except OSError:  # there is no room: its next datagram may find some
                return
        client.reached = datagram.to
        client.path.hand_over(client, datagram.data)

    def describe(self) -> dict[str, int]:
        """How many clients there are, and how many answers were sent."""
        return {"connections": len(self.clients), "served": self.served}

    def close(self) -> None:
        """Stop receiving at the endpoint."""
        self._resources.daemon.kept.drop(self._slot)
        self._resources.loop.close_listener(self.sock)
        self._resources.later(self._forget_clients)

    def _forget_clients(self) -> None:
        while self.clients:
            client = next(iter(self.clients.values()))
            client.path.remove_client(client)
            if self._resources.loop.turn_is_over():
                self._resources.later(self._forget_clients)
                return
