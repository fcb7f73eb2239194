"""In: a listener on an endpoint, and behind it the container's own.

The listener is a socket like the container's own, made in the endpoint's namespace, tagged as the container's, and
bound to what the container bound: the bind hook makes the endpoint of it, or refuses. So what may be listened on is
decided where it always is, and the daemon cannot get it wrong.
"""

from __future__ import annotations

import ctypes
import errno
import socket
from ipaddress import ip_address

from graft.datapath import layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.model.address import SocketAddress, unmapped
from graft.model.transport import Home
from graft.splice.acceptor import Acceptor, Peer
from graft.splice.connection import prepare
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.publication import Publication
from graft.splice.resources import Account
from graft.splice.sockmap import Sockmap

_BACKLOG = 4096
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h
_KEEPALIVE_SECONDS = 600


def listen(maps: Maps, container: int, wanted: Publication, where: NamespaceSockets) -> tuple[socket.socket, int]:
    """A listening socket on the endpoint, and its port. Raises OSError: the kernel's, or the hook's refusal."""
    family = socket.AF_INET if wanted.family == 4 else socket.AF_INET6

    def make() -> tuple[socket.socket, int]:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            prepare(sock)
            # A client that vanished must not hold its connection for ever: the program cannot see it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, wanted.takes_no_ipv4)
            maps.tags.put(ctypes.c_int32(sock.fileno()), layout.Tag(container=container, home=Home.HOST))
            size = 4 if wanted.family == 4 else 16
            sock.bind((socket.inet_ntop(family, wanted.address[:size]), wanted.port))
            port = wanted.endpoint.port or _true_port(maps, sock)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock, port

    return where.do(make)


def _true_port(maps: Maps, sock: socket.socket) -> int:
    """The port of a bound socket. With its tag, getsockname() would tell what the container asked for."""
    key = ctypes.c_int32(sock.fileno())
    tag = maps.tags.get(key)
    if tag is None:
        raise OSError(errno.ENOENT, "a listener has no tag")
    maps.tags.delete(key)
    port = int(sock.getsockname()[1])
    maps.tags.put(key, tag)
    return port


def crossing(container: int, peer: Peer) -> layout.CrossingValue:
    """What the container's accepted socket is to be told of its client."""
    text = peer[0]
    if ":" in text:
        ip = unmapped(ip_address(text.partition("%")[0]))
        family, packed = ip.version, ip.packed
    else:
        family, packed = 4, socket.inet_aton(text)
    value = layout.CrossingValue(port=peer[1], family=family, role=Crossing.DIALING, container=container)
    ctypes.memmove(value.addr, packed, len(packed))
    return value


class InboundRelay:
    """One endpoint that is listened on for a container."""

    def __init__(
        self,
        account: Account,
        maps: Maps,
        wanted: Publication,
        sock: socket.socket,
        port: int,
        inside: NamespaceSockets,
        sockmap: Sockmap | None,
    ) -> None:
        """``sock`` listens on ``port`` already; ``inside`` is where the container is."""
        endpoint = wanted.endpoint
        packed = endpoint.address[: 4 if endpoint.family == 4 else 16]
        self._target = wanted.target
        self._destination = (self._target.address, self._target.port)
        self._crossings, self._container, self._inside = maps.crossings, account.number, inside
        self.address = str(SocketAddress(ip_address(packed), port))
        self.acceptor = Acceptor(account, sock, self._dial, sockmap)

    def _dial(self, _near: socket.socket, peer: Peer) -> socket.socket:
        """A socket on its way to the container's listener."""
        target = self._target
        far = self._inside.take(target.family)
        try:
            if target.source is not None:
                if target.family == socket.AF_INET:
                    far.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                far.bind((target.source, 0))
            self._crossings.put(ctypes.c_int32(far.fileno()), crossing(self._container, peer))
            far.connect_ex(self._destination)  # what becomes of it comes as an event
        except BaseException:
            far.close()
            raise
        return far
