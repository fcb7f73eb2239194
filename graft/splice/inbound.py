"""Incoming connections: a listener on an endpoint, whose connections are relayed to the container's own listener.

The listener is made in the endpoint's namespace, tagged as the container's, and bound to the address that the container
bound: the bind hook rewrites that to the endpoint, or refuses. So the hook decides what may be listened on, as for any
other transport, and a mistake of the daemon cannot widen it.
"""

from __future__ import annotations

import ctypes
import errno
import socket
from ipaddress import ip_address

from graft.datapath import layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.model.address import SocketAddress, unmapped, unmapped_bytes
from graft.model.transport import Home
from graft.splice.acceptor import Acceptor, PeerAddress
from graft.splice.connection import set_relay_options
from graft.splice.datagram_sockets import datagram_socket
from graft.splice.far_check import FarCheck
from graft.splice.kept_records import Kind, Record
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.publication import Publication
from graft.splice.resources import ContainerResources
from graft.splice.sockmap import Sockmap

_BACKLOG = 4096
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
_KEEPALIVE_SECONDS = 600


def listen(
    maps: Maps, container: int, wanted: Publication, endpoint_netns: NamespaceSockets
) -> tuple[socket.socket, int]:
    """A listening socket on the endpoint, and its port. Raises OSError where the kernel or the hook refuses."""
    if wanted.protocol == socket.IPPROTO_UDP:
        return endpoint_netns.run(lambda: _bind_datagrams(maps, container, wanted))
    family = socket.AF_INET if wanted.family == 4 else socket.AF_INET6

    def make() -> tuple[socket.socket, int]:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            set_relay_options(sock)
            # A client that vanished must not keep its connection: the program's own keepalive probes end at the relay.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, wanted.takes_no_ipv4)
            maps.tags.put(ctypes.c_int32(sock.fileno()), layout.Tag(container=container, home=Home.HOST))
            size = 4 if wanted.family == 4 else 16
            sock.bind((socket.inet_ntop(family, wanted.address[:size]), wanted.port))
            port = wanted.endpoint.port or _bound_port(maps, sock)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock, port

    return endpoint_netns.run(make)


def _bind_datagrams(maps: Maps, container: int, wanted: Publication) -> tuple[socket.socket, int]:
    """A UDP socket on the endpoint, and its port. Where the container's is for both families, this is for those of the
    endpoint.
    """
    family, address = unmapped_bytes(wanted.address) if wanted.family == 6 else (4, wanted.address)
    if wanted.endpoint.family == 4:
        kind, host = socket.AF_INET, socket.inet_ntoa(address[:4]) if family == 4 else "0.0.0.0"
    else:
        kind, host = socket.AF_INET6, socket.inet_ntop(socket.AF_INET6, wanted.address)
    sock = datagram_socket(kind)
    try:
        if kind == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, wanted.takes_no_ipv4)
        maps.tags.put(ctypes.c_int32(sock.fileno()), layout.Tag(container=container, home=Home.HOST))
        sock.bind((host, wanted.port))
        port = wanted.endpoint.port or _bound_port(maps, sock)
    except BaseException:
        sock.close()
        raise
    return sock, port


def _bound_port(maps: Maps, sock: socket.socket) -> int:
    """The port of a bound socket. While it has its tag, getsockname() returns the port that the container bound."""
    key = ctypes.c_int32(sock.fileno())
    tag = maps.tags.get(key)
    if tag is None:
        raise OSError(errno.ENOENT, "a listener has no tag")
    maps.tags.delete(key)
    port = int(sock.getsockname()[1])
    maps.tags.put(key, tag)
    return port


def crossing(container: int, peer: PeerAddress) -> layout.CrossingValue:
    """The client's address, for getpeername() of the container's accepted socket."""
    text = peer[0]
    if ":" in text:
        ip = unmapped(ip_address(text.partition("%")[0]))
        family, packed = ip.version, ip.packed
    else:
        family, packed = 4, socket.inet_aton(text)
    value = layout.CrossingValue(port=peer[1], family=family, role=Crossing.DIALING, container=container)
    ctypes.memmove(value.addr, packed, len(packed))
    return value


def record_of(resources: ContainerResources, wanted: Publication) -> Record:
    """What the next graftd has to know of the connections of a listener: by which rule they came."""
    return Record(
        Kind.INBOUND,
        resources.number,
        wanted.endpoint.id,
        family=wanted.family,
        v6only=wanted.v6only,
        port=wanted.port,
        address=wanted.address,
    )


class ListenerRelay:
    """What the relay of a listener is, whatever kind of endpoint it listens on. It has an ``acceptor``."""

    acceptor: Acceptor

    @property
    def is_lost(self) -> bool:
        """Whether somebody else closed its listener."""
        return self.acceptor.lost

    def close(self) -> None:
        """Stop listening. Connections stay."""
        self.acceptor.close()

    def describe(self) -> dict[str, int]:
        """How many connections there are, and were."""
        return {"connections": len(self.acceptor.connections), "served": self.acceptor.served}


class InboundRelay(ListenerRelay):
    """The relay of one listener of a container, on one endpoint."""

    def __init__(
        self,
        resources: ContainerResources,
        maps: Maps,
        wanted: Publication,
        sock: socket.socket,
        port: int,
        container_netns: NamespaceSockets,
        sockmap: Sockmap | None,
        check_far: FarCheck,
        slot: int | None = None,
    ) -> None:
        """``sock`` listens on ``port`` already, and has that ``slot`` (kept.py); ``container_netns`` is the container's
        namespace.
        """
        endpoint = wanted.endpoint
        packed = endpoint.address[: 4 if endpoint.family == 4 else 16]
        self._target = wanted.target
        self._destination = (self._target.address, self._target.port)
        self._crossings, self._container, self._container_netns = maps.crossings, resources.number, container_netns
        self.address = str(SocketAddress(ip_address(packed), port))
        record = record_of(resources, wanted)
        self.acceptor = Acceptor(resources, sock, self._connect_far, sockmap, check_far, slot=slot, record=record)

    def _connect_far(self, _near: socket.socket, peer: PeerAddress) -> socket.socket:
        """A socket that connects to the container's listener."""
        target = self._target
        far = self._container_netns.tcp_socket(target.family)
        try:
            if target.source is not None:
                if target.family == socket.AF_INET:
                    far.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                far.bind((target.source, 0))
            self._crossings.put(ctypes.c_int32(far.fileno()), crossing(self._container, peer))
            far.connect_ex(self._destination)  # its result comes as an event
        except BaseException:
            far.close()
            raise
        return far
