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
from graft.datapath.layout import ENDPOINT_UNIX, Crossing
from graft.datapath.maps import Maps
from graft.datapath.rulesets import Lookup
from graft.kernel import netns
from graft.model.settings import Settings
from graft.model.transport import Home
from graft.policy.model import Verdict
from graft.splice import unix_endpoint
from graft.splice.acceptor import Acceptor, PeerAddress
from graft.splice.connection import set_relay_options
from graft.splice.kept import Found
from graft.splice.kept_records import Kind, Record
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.namespaces import Namespaces
from graft.splice.resources import ContainerResources
from graft.splice.sockmap import Sockmap
from graft.state import unix_sockets

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


def _kept_listeners(resources: ContainerResources, container_netns: NamespaceSockets) -> list[Found]:
    """Those of the graftd before, IPv4's first, if they listen still; else none, and what is left of them is closed."""
    kept = resources.daemon.kept

    def is_there(found: Found) -> bool:
        sock = found.socks[0]
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return bool(listens) and netns.socket_cookie(sock) == container_netns.cookie

    taken = kept.take(Kind.OUT, resources.number, is_there)
    kept.close_untaken(lambda found: found.record.kind is Kind.OUT and found.record.container == resources.number)
    taken.sort(key=lambda found: found.socks[0].family != socket.AF_INET)
    families = [found.socks[0].family for found in taken]
    ports = {found.record.port for found in taken}
    if families in ([socket.AF_INET], [socket.AF_INET, socket.AF_INET6]) and len(ports) == 1:
        return taken
    for found in taken:
        kept.close_found(found)
    return []


class OutboundRelay:
    """The relay of one container's outgoing connections."""

    def __init__(
        self,
        settings: Settings,
        resources: ContainerResources,
        maps: Maps,
        container_netns: NamespaceSockets,
        namespaces: Namespaces,
        sockmap: Sockmap | None,
        datagrams: layout.RelayValue | None = None,
    ) -> None:
        """Listens at once, and writes its port to the map `relays`, into what the hooks read there of the relay for
        datagrams. Raises OSError.
        """
        self._settings, self._maps, self._container, self._namespaces = settings, maps, resources.number, namespaces
        self._lookup, self._close = Lookup(maps), resources.close_socket
        self._key = ctypes.c_uint32(resources.number)
        kept = resources.daemon.kept
        slots: dict[socket.socket, int | None] = {
            found.socks[0]: found.slot for found in _kept_listeners(resources, container_netns)
        }
        socks = list(slots) or container_netns.run(make_listeners)
        self.port = int(socks[0].getsockname()[1])
        try:
            for sock in socks:  # the connect hook redirects to a listener that has this mark, and to no other
                mark = layout.CrossingValue(role=Crossing.LISTENER, container=self._container)
                maps.crossings.put(ctypes.c_int32(sock.fileno()), mark)
            for sock in socks:
                if sock not in slots:
                    slots[sock] = kept.add_listener(Kind.OUT, self._container, sock, self.port, b"")
            record = Record(Kind.OUTBOUND, self._container)
            self.acceptors = [
                Acceptor(resources, sock, self._connect_far, sockmap, None, True, slots[sock], record) for sock in socks
            ]
            value = datagrams or layout.RelayValue()
            value.port, value.six = self.port, len(socks) > 1
            maps.relays.put(self._key, value)
        except BaseException:
            for sock in socks:
                kept.end_listener(sock, slots.get(sock))
                resources.loop.close_listener(sock)
            raise

    def _connect_far(self, near: socket.socket, _peer: PeerAddress) -> socket.socket | None:
        """A socket that connects to the program's destination; None where that is not granted. BlockingIOError: the
        unix socket that it leads to has no room.
        """
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
        if endpoint.flags & ENDPOINT_UNIX:
            unix = unix_sockets.load(self._settings, number)
            return None if unix is None else unix_endpoint.connect(unix, asked, self._close)
        for _ in range(_PORT_TRIES if endpoint.last_port else 1):
            far = self._dial(number, endpoint, asked)
            if far is not None:
                return far
        return None

    def _dial(self, number: int, endpoint: layout.EndpointValue, asked: layout.CrossingValue) -> socket.socket | None:
        """A socket that connects from the endpoint; None where the port that it got there has such a connection."""
        family = socket.AF_INET if asked.family == 4 else socket.AF_INET6
        far = self._namespaces.of_endpoint(endpoint.netns).tcp_socket(family)
        try:
            if endpoint.port:
                far.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            tag = layout.Tag(container=self._container, endpoint=number, home=Home.HOST)
            self._maps.tags.put(ctypes.c_int32(far.fileno()), tag)
            text = socket.inet_ntop(family, bytes(asked.addr)[: 4 if asked.family == 4 else 16])
            error = far.connect_ex((text, asked.port))
            if error == errno.EADDRNOTAVAIL:
                far.close()
                return None
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, "connect")
        except BaseException:
            far.close()
            raise
        return far

    @property
    def lost(self) -> bool:
        """Whether somebody in the container's namespace closed a listener."""
        return any(acceptor.lost for acceptor in self.acceptors)

    def stop(self) -> None:
        """Stop listening, and remove the entry in `relays`. Connections stay."""
        self._maps.relays.delete(self._key)
        for acceptor in self.acceptors:
            acceptor.close()
