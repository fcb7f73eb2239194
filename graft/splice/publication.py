"""Which listeners of a container are published, and which address is dialled for each. Pure.

A rule names what a program binds, so the listener's own address is looked up, as the bind hook would have done if the
program had started under Graft. A listener on 127.0.0.1 is published by a rule that names 127.0.0.1 (or "*"), not by
one for 0.0.0.0: a program that binds the loopback address is not meant to be reached from outside.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from graft.kernel.sockdiag import ListeningSocket
from graft.model.address import unmapped_bytes
from graft.model.unix_socket import UnixSocket

MAX_UNPUBLISHED = 64
_ANY = bytes(16)
_LOOPBACK4, _LOOPBACK_NET = "127.0.0.1", 127
_LOOPBACK6 = bytes(15) + b"\1"


@dataclass(frozen=True, slots=True)
class DialTarget:
    """Where to dial. ``source`` is the address to dial from, None to leave it to the kernel."""

    family: socket.AddressFamily
    address: str
    port: int
    source: str | None = None


@dataclass(frozen=True, slots=True)
class ResolvedEndpoint:
    """An endpoint with what it has now: where something of this changes, its listener is replaced. Of a range, ``port``
    is the one that the container's listener becomes.
    """

    id: int
    family: int
    address: bytes
    port: int
    netns: int
    dual_stack: bool = False
    unix: UnixSocket | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """A listener to make on an endpoint; all but ``endpoint`` is of the container's own listener."""

    endpoint: ResolvedEndpoint
    family: int
    address: bytes
    port: int
    v6only: bool
    dialled: tuple[int, bytes, int] | None = None
    """(family, address, port) of the listener, where those are not what its program bound."""
    protocol: int = socket.IPPROTO_TCP

    @property
    def takes_no_ipv4(self) -> bool:
        """Whether the listener on the endpoint is for IPv6 only: if the endpoint is, or the container's listener. (A
        datagram's IPv4 client needs one at an address of IPv4.)
        """
        if self.v6only or (self.endpoint.family == 6 and not self.endpoint.dual_stack):
            return True
        return self.protocol == socket.IPPROTO_UDP and self.target.family == socket.AF_INET6

    @property
    def target(self) -> DialTarget:
        """The container's listener, to dial for each connection."""
        return target(*(self.dialled or (self.family, self.address, self.port)), self.v6only)

    @property
    def target6(self) -> DialTarget | None:
        """The same for datagrams of IPv6 clients; None where there are none."""
        if self.endpoint.family == 4:
            return None
        return target(self.family, self.address, self.port, v6only=True)


def target(family: int, address: bytes, port: int, v6only: bool) -> DialTarget:
    """Where to dial for a listener. The container's own addresses are dialled from 127.0.0.1 too: a closed connection
    then blocks its port for a second at most (tcp_tw_reuse, by default for loopback only), not for a minute.
    """
    if family == 6:
        family, address = unmapped_bytes(address)
    if address == _ANY:
        if family == 6 and v6only:
            return DialTarget(socket.AF_INET6, "::1", port)
        return DialTarget(socket.AF_INET, _LOOPBACK4, port)
    if family == 4:
        text = socket.inet_ntop(socket.AF_INET, address[:4])
        return DialTarget(socket.AF_INET, text, port, None if address[0] == 127 else _LOOPBACK4)
    text = socket.inet_ntop(socket.AF_INET6, address)
    return DialTarget(socket.AF_INET6, text, port, None if text == "::1" else "::1")


class Peers(NamedTuple):
    """What UDP sockets of the namespace are connected to, of that which may be the relay's."""

    four: set[int]
    """Addresses of IPv4's loopback network."""
    six: set[int]
    """Ports, of the sockets that are of IPv6, and not known to be somebody else's than the container's."""


class PublicationPlan:
    """Which of a namespace's listeners to publish: those of the container's own ``cgroups`` that a rule names.

    ``lookup`` gives the endpoint that a bind of (protocol, family, address, port) becomes. A fixed port of an endpoint
    is for one listener; one with a dynamic port is for any number, each on a port that the kernel picks. At most
    ``limit`` are published, and first those that are already (``published``).
    """

    def __init__(
        self,
        cgroups: Collection[int],
        lookup: Callable[[int, int, bytes, int], ResolvedEndpoint | None],
        limit: int,
        published: Collection[Publication] = (),
        others: Collection[int] = (),
        stand_ins: Collection[int] = (),
    ) -> None:
        """``others``: cgroups that are known not to be the container's; ``stand_ins``: ports of ::1 at which the relay
        of datagrams has sockets, which are no program's.
        """
        self._cgroups, self._lookup, self._others = cgroups, lookup, others
        self._published, self._stand_ins = published, stand_ins
        self._new_left = max(0, limit - len(published))
        self._wanted: dict[tuple[object, ...], Publication] = {}
        self.unpublished: dict[tuple[int, bytes, int], None] = {}
        """(family, address, port) of listeners that are not published: the first `MAX_UNPUBLISHED` of them."""
        self.elsewhere: set[int] = set()
        """Cgroups of listeners that are not among ``cgroups``."""
        self.datagram_ports: set[int] = set()
        """The ports of all UDP sockets of the namespace but the stand-ins, whose ports a program may have had too."""
        self.datagram_peers = Peers(set(), set())
        self.unread_ports: set[int] = set()
        """Those at which a socket has something to read, that is not known to be somebody else's."""
        self.more_unpublished = self.too_many = 0
        """How many more are not published; how many of all these are beyond ``limit``, though a rule names them."""

    def add(self, listener: ListeningSocket) -> None:
        """Add one listener of the namespace."""
        if self._is_elsewhere(listener):
            return
        found = self._publication(listener)
        if found is None and listener.protocol != socket.IPPROTO_TCP:
            return  # any client has such a socket
        if found is None:
            self._note_unpublished((listener.family, listener.address, listener.port))
            return
        before = self._wanted.get(_key(found))
        if before is None:
            self._add_publication(found)
        elif before != found:
            kept, other = sorted((before, found), key=_preference)
            self._wanted[_key(found)] = kept
            self._note_unpublished(_place(other))

    def add_datagram_socket(self, one: ListeningSocket) -> None:
        """Add a UDP socket of the namespace: a server's, if it has no peer and a rule names it."""
        if one.family == 6 and one.address == _LOOPBACK6 and one.port in self._stand_ins:
            return
        self.datagram_ports.add(one.port)
        if one.unread and not (self._is_elsewhere(one) and one.cgroup in self._others):
            self.unread_ports.add(one.port)
        if not one.connected:
            self.add(one)
            return
        if self._is_elsewhere(one) and one.cgroup in self._others:
            return
        family, address = unmapped_bytes(one.peer) if one.family == 6 else (4, one.peer)
        if family == 6:
            self.datagram_peers.six.add(one.peer_port)
        elif address[0] == _LOOPBACK_NET:
            self.datagram_peers.four.add(int.from_bytes(address[:4], "big"))

    def _is_elsewhere(self, one: ListeningSocket) -> bool:
        if not one.cgroup or one.cgroup in self._cgroups:
            return False
        self.elsewhere.add(one.cgroup)
        return True

    def _publication(self, listener: ListeningSocket) -> Publication | None:
        if listener.device:
            return None
        place = listener.family, listener.address, listener.port
        family, address, port = listener.asked or place
        asked = unmapped_bytes(address) if family == 6 else (family, address)
        endpoint = self._lookup(listener.protocol, asked[0], asked[1], port)
        if endpoint is None:
            return None
        if endpoint.unix is None and endpoint.family == 4 and family == 6 and listener.v6only:
            return None
        dialled = place if listener.asked else None
        return Publication(endpoint, family, address, port, listener.v6only, dialled, listener.protocol)

    def _add_publication(self, found: Publication) -> None:
        if found not in self._published:
            if not self._new_left:
                self.too_many += 1
                self._note_unpublished(_place(found))
                return
            self._new_left -= 1
        self._wanted[_key(found)] = found

    def _note_unpublished(self, place: tuple[int, bytes, int]) -> None:
        if len(self.unpublished) < MAX_UNPUBLISHED:
            self.unpublished[place] = None
        elif place not in self.unpublished:
            self.more_unpublished += 1

    @property
    def publications(self) -> list[Publication]:
        """What to publish of the listeners that were added."""
        return list(self._wanted.values())

    def wants(self, published: Publication) -> bool:
        """Whether ``published`` is one of `publications`."""
        return self._wanted.get(_key(published)) == published


def _key(found: Publication) -> tuple[object, ...]:
    if found.endpoint.unix:
        return (found.endpoint.id,)
    return (found.protocol, found.endpoint.id, found.endpoint.port or _place(found))


def _place(found: Publication) -> tuple[int, bytes, int]:
    return found.family, found.address, found.port


def _preference(found: Publication) -> tuple[int, int, int, bytes, bool]:
    """Sort key of listeners for one endpoint: the widest address first, the rest only to be deterministic."""
    scope = 0 if found.address == _ANY else 2 if found.address[0] == 127 else 1
    return scope, found.family, found.port, found.address, found.v6only
