"""UDP sockets that tell where a datagram was sent to, and send from any address of their namespace."""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from graft.splice.event_loop import EventLoop

_DATAGRAMS = 32  # in one turn
_SINGLE = 32  # turns
_SOURCES = 4096
_LONGEST = 65536
_PKTINFO4 = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, local address, destination of the header
_PKTINFO6 = struct.Struct("=16si")  # struct in6_pktinfo: address, interface
_IP_PKTINFO = 8
_BUFFER_BYTES = 1 << 20
_BIND_TRIES = 16

Address = tuple[Any, ...]
"""As recvfrom() returns it: of IPv6 with flow information and scope."""


class Datagram(NamedTuple):
    """What such a socket receives: ``to`` is the address that it was sent to, packed."""

    data: bytes
    sender: Address
    to: bytes


def datagram_socket(family: int = socket.AF_INET) -> socket.socket:
    """A socket in this namespace that tells where its datagrams were sent to. Raises OSError."""
    sock = plain_datagram_socket(family)
    try:
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    except OSError:
        sock.close()
        raise
    return sock


def plain_datagram_socket(family: int) -> socket.socket:
    """A socket in this namespace that does not. Raises OSError."""
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def bound_by_number(
    make: Callable[[], socket.socket], address: str, is_late: Callable[[], bool] = lambda: False
) -> socket.socket:
    """At a free port that is bound by its number: the kernel leaves it to a socket that root of the namespace destroys.

    (udp_abort, net/ipv4/udp.c: then the socket goes on, with one error. Otherwise it has no port any more.) Where
    somebody else was quicker another port is tried, unless it ``is_late``. Raises OSError.
    """
    for left in reversed(range(_BIND_TRIES)):
        with make() as asked:
            asked.bind((address, 0))
            place = asked.getsockname()
        sock = make()
        try:
            sock.bind(place)
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE or not left or is_late():
                raise
            continue
        return sock
    raise AssertionError("a try is left")


def receive(sock: socket.socket) -> Datagram | None:
    """The next datagram, or None. Raises OSError: what the last one that was sent has caused (ICMP)."""
    try:
        data, control, _, sender = sock.recvmsg(_LONGEST, socket.CMSG_SPACE(_PKTINFO6.size))
    except BlockingIOError:
        return None
    to = b""
    for level, kind, value in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            to = _PKTINFO4.unpack(value[: _PKTINFO4.size])[2]
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            to = _PKTINFO6.unpack(value[: _PKTINFO6.size])[0]
    return Datagram(data, sender, to)


class Receiver:
    """Serves what a socket has received: to be called for its events.

    As much as fits into a turn; its event comes again for the rest. (To send one of them can take long: the kernel
    wakes whoever waits at the other end.) A socket that had only one is asked for one at a time for a while: to be told
    that there is no other one takes as long as to receive it.
    """

    def __init__(self, sock: socket.socket, serve: Callable[[Datagram], None], loop: EventLoop) -> None:
        self._sock, self._serve, self._loop = sock, serve, loop
        self._single = 0

    def __call__(self, _mask: int) -> None:
        """Serve what is there, or a part of it."""
        limit = 1 if self._single else _DATAGRAMS
        self._single = max(0, self._single - 1)
        for count in range(limit):
            try:
                found = receive(self._sock)
            except OSError:  # an ICMP error of an earlier datagram
                continue
            if found is None:
                if count == 1:
                    self._single = _SINGLE
                return
            self._serve(found)
            if self._loop.turn_is_over():
                return


def send(sock: socket.socket, data: bytes, source: bytes, to: Address) -> None:
    """Send from one of the socket's addresses. What cannot be sent is lost, as any datagram may be."""
    with contextlib.suppress(OSError):
        sock.sendmsg([data], [_from(source, to[3] if len(source) == 16 else 0)], 0, to)


@functools.lru_cache(_SOURCES)
def _from(source: bytes, scope: int) -> tuple[int, int, bytes]:
    """The control message that names a source."""
    if len(source) == 4:
        return socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO4.pack(0, source, bytes(4))
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _PKTINFO6.pack(source, scope)
