"""Outgoing connections: a listener in the container's namespace, to which the connect hook redirects granted ones.

The hooks store the destination that the program asked for with the accepted socket. A connection without one was not
redirected by them, and is reset. The connection to the destination is made by a socket that is tagged as the
container's: the connect hook decides again, on the kernel's own copy of the address, and binds it to the endpoint.
"""

from __future__ import annotations

import ctypes
import errno
import socket

from graft.datapath import layout
from graft.datapath.layout import Crossing
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.model.transport import Home
from graft.policy.model import Verdict
from graft.splice.acceptor import Acceptor, PeerAddress
from graft.splice.connection import set_relay_options
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.resources import ContainerResources
from graft.splice.sockmap import Sockmap

_BACKLOG = 4096
_PORT_TRIES = 16


def _listener(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        set_relay_options(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def make_listeners() -> list[socket.socket]:
    """Listeners in this namespace on 127.0.0.1 and, where there is IPv6, on ::1, at the same port. Raises OSError."""
    for attempt in range(_PORT_TRIES):
        four = _listener(socket.AF_INET, "127.0.0.1", 0)
        try:
            return [four, _listener(socket.AF_INET6, "::1", four.getsockname()[1])]
        except OSError as error:
            if error.errno != errno.EADDRINUSE or attempt == _PORT_TRIES - 1:
                return [four]  # there is no IPv6
            four.close()
    raise AssertionError("not reached")


class OutboundRelay:
    """The relay of one container's outgoing connections."""

    def __init__(
        self,
        resources: ContainerResources,
        maps: Maps,
        container_netns: NamespaceSockets,
        namespaces: Namespaces,
        sockmap: Sockmap | None,
        datagram_port: int = 0,
    ) -> None:
        """Listens at once, and writes its port to the map `relays`, with that for datagrams. Raises OSError."""
        self._maps, self._container, self._namespaces = maps, resources.number, namespaces
        self._lookup = Lookup(maps)
        self._key = ctypes.c_uint32(resources.number)
        socks = container_netns.run(make_listeners)
        self.port = int(socks[0].getsockname()[1])
        self.acceptors = [Acceptor(resources, sock, self._connect_far, sockmap) for sock in socks]
        maps.relays.put(self._key, layout.RelayValue(port=self.port, six=len(socks) > 1, datagram_port=datagram_port))

    def _connect_far(self, near: socket.socket, _peer: PeerAddress) -> socket.socket | None:
        """A socket that connects to the program's destination; None where that is not granted."""
        asked = self._maps.crossings.get(ctypes.c_int32(near.fileno()))
        if asked is None or asked.role != Crossing.RELAYED or asked.container != self._container:
            return None
        container = self._maps.containers.peek(self._key)
        if container is None:
            return None
        address = bytes(asked.addr)
        verdict, number = self._lookup.egress(container.ruleset, socket.IPPROTO_TCP, asked.family, address, asked.port)
        endpoint = self._maps.endpoints.peek(ctypes.c_uint32(number)) if verdict == Verdict.GRANT else None
        if endpoint is None:
            return None
        port = endpoint.port
        family = socket.AF_INET if asked.family == 4 else socket.AF_INET6
        far = self._namespaces.of_endpoint(endpoint.netns).tcp_socket(family)
        try:
            if port:
                far.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            tag = layout.Tag(container=self._container, endpoint=number, home=Home.HOST)
            self._maps.tags.put(ctypes.c_int32(far.fileno()), tag)
            text = socket.inet_ntop(family, address[: 4 if asked.family == 4 else 16])
            error = far.connect_ex((text, asked.port))
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, "connect")
        except BaseException:
            far.close()
            raise
        return far

    def stop(self) -> None:
        """Stop listening, and remove the entry in `relays`. Connections stay."""
        self._maps.relays.delete(self._key)
        for acceptor in self.acceptors:
            acceptor.close()
