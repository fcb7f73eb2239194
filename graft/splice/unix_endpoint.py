"""Endpoints that are unix sockets of the host: listened on for a container, and connected to for one.

No hook sees the address of a unix socket. So what is listened on and connected to here is only what the maps lead to:
the path is that of an endpoint, from Graft's own files, and never comes from the container
(graft/state/unix_sockets.py). The client's side of a connection has no IP address to show to the program.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable
from dataclasses import replace

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.kernel import unix_files, unix_rights
from graft.kernel.credentials import connecting_as
from graft.kernel.sockdiag import ListeningSocket
from graft.kernel.unix_files import FileId
from graft.model.settings import Settings
from graft.model.transport import Home
from graft.model.unix_socket import UnixSocket
from graft.splice.acceptor import Acceptor, PeerAddress
from graft.splice.far_check import FarCheck
from graft.splice.inbound import ListenerRelay, crossing, record_of
from graft.splice.namespace_sockets import NamespaceSockets
from graft.splice.publication import Publication
from graft.splice.resources import ContainerResources
from graft.state import bound_sockets
from graft.state.folder_calls import in_folder_of

_BACKLOG = 4096
_KIND = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

Close = Callable[[socket.socket], None]


def _new_socket() -> socket.socket:
    """A socket that takes no descriptors, where the kernel can refuse them."""
    sock = socket.socket(socket.AF_UNIX, _KIND)
    unix_rights.refuse(sock)
    return sock


def listen(
    settings: Settings, maps: Maps, container: int, wanted: Publication, close: Close
) -> tuple[socket.socket, FileId]:
    """A socket that listens at the endpoint's path, and its file. Where that fails, ``close`` closes it.

    Raises UnixPathError, NotFoundError, OSError.
    """

    def is_there() -> bool:  # whether a rule names it, graftd finds out by itself when that changes
        keys = ctypes.c_uint32(container), ctypes.c_uint32(wanted.endpoint.id)
        return maps.containers.get(keys[0]) is not None and maps.endpoints.get(keys[1]) is not None

    unix = wanted.endpoint.unix
    assert unix is not None
    sock = _new_socket()
    try:
        # Before it has its place: whoever finds it there can connect.
        shown = unix.path.encode()
        file = bound_sockets.bind(
            settings, container, wanted.endpoint.id, sock, unix, shown, is_there, backlog=_BACKLOG
        )
    except BaseException:
        close(sock)
        raise
    return sock, file


def withdraw(settings: Settings, container: int, endpoint: int) -> None:
    """Remove the socket's file from the host."""
    bound_sockets.release(settings, lambda one, other: (one, other) == (container, endpoint))
    bound_sockets.remove_released(settings)


def connect(unix: UnixSocket, asked: layout.CrossingValue, close: Close) -> socket.socket:
    """A socket that is connected to ``unix``, for the program whose connection was redirected. Where that fails,
    ``close`` closes it.

    BlockingIOError: its server has no room now. Raises OSError, UnixPathError.
    """
    sock = _new_socket()
    try:
        with connecting_as(asked.uid, asked.gid):
            if not unix_files.connect(sock, unix.path, cached=True):
                in_folder_of(unix.path, lambda: unix_files.connect(sock, unix.path), keep={sock.fileno()})
    except BaseException:
        close(sock)
        raise
    return sock


def read_asked(listener: ListeningSocket, container: int) -> ListeningSocket:
    """A listener of a container that shares the host's namespace, with the address that its program bound."""
    if listener.stored is None:
        return listener
    tag = layout.Tag.from_buffer_copy(listener.stored)
    if tag.container != container or tag.home != Home.HOST or not tag.endpoint or tag.bound_port != listener.port:
        return listener
    return replace(listener, asked=(tag.family, bytes(tag.addr), tag.port))


class UnixInboundRelay(ListenerRelay):
    """The relay of one listener of a container, at one unix socket of the host."""

    def __init__(
        self,
        resources: ContainerResources,
        maps: Maps,
        wanted: Publication,
        sock: socket.socket,
        container_netns: NamespaceSockets,
        check_far: FarCheck,
    ) -> None:
        """``sock`` listens already; ``container_netns`` is the container's namespace."""
        assert wanted.endpoint.unix is not None
        self._target = wanted.target
        self._crossings, self._container, self._container_netns = maps.crossings, resources.number, container_netns
        self.address = wanted.endpoint.unix.spec
        self.acceptor = Acceptor(
            resources, sock, self._connect_far, None, check_far, record=record_of(resources, wanted)
        )

    def _connect_far(self, _near: socket.socket, _peer: PeerAddress) -> socket.socket:
        """A socket that connects to the container's listener."""
        target = self._target
        far = self._container_netns.tcp_socket(target.family)
        try:
            far.bind((target.source or target.address, 0))
            self._announce(far)
            far.connect_ex((target.address, target.port))  # its result comes as an event
        except BaseException:
            far.close()
            raise
        return far

    def _announce(self, far: socket.socket) -> None:
        """Have the hooks note this connection, and show the program the peer that it would see without that.

        A listener in the host's namespace accepts no other (ingress.bpf.c), and the check of who has the connection
        looks for what they noted (graft/splice/far_check.py).
        """
        self._crossings.put(ctypes.c_int32(far.fileno()), crossing(self._container, far.getsockname()))
