"""Listening TCP sockets of a network namespace, from the kernel's socket diagnostics.

Sources: sock_diag(7), include/uapi/linux/inet_diag.h, netlink(7). By hand, because this is asked several times a
second for each container: a netlink socket belongs to the namespace that it was made in, and is kept.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_DUMP = 0x1 | 0x300
_TCP_LISTEN = 10
_THE_KERNEL = 0  # its port id (netlink(7))
_SKV6ONLY, _CGROUP_ID = 11, 21  # INET_DIAG_*; the second since 5.9
_PIECE_BYTES = 8192  # the least that holds a message whatever the size of a page (NLMSG_GOODSIZE): 65 listeners

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI48x")
# struct inet_diag_msg: family, state, timer, retrans; ports in network order; addresses; interface; cookie; ...
_MESSAGE = struct.Struct("=BBBB2s2s16s16sIII5I")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Listening:
    """A listening TCP socket. ``address`` as the maps have it; ``cgroup`` 0 where the kernel does not tell."""

    family: int
    address: bytes
    port: int
    v6only: bool
    cgroup: int
    device: int
    inode: int = 0


class Diagnostics:
    """A netlink socket of one namespace; it has to be made there. After an OSError it is of no more use."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._sock.setblocking(False)  # the kernel fetches each piece while the one before it is taken
        # Who has CAP_NET_ADMIN over the namespace, such as a container's root, may send here what looks like an answer.
        # To a socket that is connected to the kernel nobody else can (netlink_getsockbyportid, af_netlink.c).
        self._sock.connect((_THE_KERNEL, 0))

    def close(self) -> None:
        """Give the socket back."""
        self._sock.close()

    def listening(self) -> Iterator[list[Listening]]:
        """Every listening TCP socket of the namespace, some at a time, to be asked for to the end. Raises OSError."""
        for family in (socket.AF_INET, socket.AF_INET6):
            body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _TCP_LISTEN)
            header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 0, 0)
            self._sock.send(header + body)
            is_last = False
            while not is_last:
                found, is_last = _piece(self._sock.recv(_PIECE_BYTES))
                yield found


def _piece(data: bytes) -> tuple[list[Listening], bool]:
    """The listeners of one message, and whether it is the last one. Raises OSError."""
    found: list[Listening] = []
    try:
        for kind, message in split(data):
            if kind == _NLMSG_DONE:
                return found, True
            found.append(parse(message))
    except ValueError as error:
        raise OSError(errno.EBADMSG, f"sock_diag: {error}") from error
    return found, False


def split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The netlink messages in ``data`` (netlink(7)): kind, and what follows the header.

    Raises ValueError for what are none, and the OSError that an error message tells of.
    """
    offset = 0
    while offset + _HEADER.size <= len(data):
        size, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= size <= len(data) - offset:
            raise ValueError(f"a message of {size} bytes where {len(data) - offset} are left")
        message = data[offset + _HEADER.size : offset + size]
        if kind == _NLMSG_ERROR:
            code = int.from_bytes(message[:4], sys.byteorder, signed=True)
            raise OSError(-code, f"sock_diag: {os.strerror(-code)}")
        yield kind, message
        offset += size + 3 & ~3


def parse(message: bytes) -> Listening:
    """From struct inet_diag_msg with its attributes. Raises ValueError for too little of it."""
    if len(message) < _MESSAGE.size:
        raise ValueError(f"a socket in {len(message)} bytes")
    family, _state, _timer, _retrans, port, _peer, source, _target, device, *rest = _MESSAGE.unpack_from(message)
    attributes = dict(_attributes(message, _MESSAGE.size))
    return Listening(
        family=4 if family == socket.AF_INET else 6,
        address=source[:4].ljust(16, b"\0") if family == socket.AF_INET else source,
        port=int.from_bytes(port, "big"),
        v6only=attributes.get(_SKV6ONLY, b"")[:1] not in (b"", b"\0"),
        cgroup=int.from_bytes(attributes.get(_CGROUP_ID, b"")[:8], sys.byteorder),
        device=device,
        inode=rest[-1],
    )


def _attributes(message: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _ATTRIBUTE.size <= len(message):
        size, kind = _ATTRIBUTE.unpack_from(message, offset)
        if size < _ATTRIBUTE.size:
            return
        yield kind, message[offset + _ATTRIBUTE.size : offset + size]
        offset += size + 3 & ~3
