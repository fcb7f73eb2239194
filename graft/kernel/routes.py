"""The addresses of a network namespace's own, and the broadcast addresses of its links, as the kernel routes them.

Sources: rtnetlink(7); include/uapi/linux/rtnetlink.h; net/ipv4/fib_frontend.c (inet_dump_fib, NETLINK_GET_STRICT_CHK:
4.20). The table `local` has a route of type local for each address, and of type broadcast for each broadcast address.

pyroute2 is not used: to import it takes longer than a container may take to start.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import islice

from graft.model.address import IPAddress

_NETLINK_ROUTE, _SOL_NETLINK, _STRICT_CHECK = 0, 270, 12
_GET_ROUTE, _NEW_ROUTE, _ERROR, _DONE = 26, 24, 2, 3
_DUMP = 0x1 | 0x300  # NLM_F_REQUEST | NLM_F_DUMP
_TABLE_LOCAL = 255
_LOCAL, _BROADCAST = 2, 3  # RTN_*
_DESTINATION = 1  # RTA_DST
_HEADER = struct.Struct("=IHHII")
# struct rtmsg: family, bits of the destination and the source, TOS, table, protocol, scope, type, flags
_ROUTE = struct.Struct("=8BI")
_ATTRIBUTE = struct.Struct("=HH")
_PIECE_BYTES = 1 << 16
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class LocalRoutes:
    """Single addresses only: not those of a network that is local as a whole, such as 127.0.0.0/8."""

    addresses: frozenset[IPAddress]
    broadcasts: frozenset[IPv4Address]


def local_routes(most: int | None = None) -> LocalRoutes:
    """Of the calling thread's namespace; no more than the first ``most`` routes of each kind and family are read, of
    whatever length. Raises OSError.
    """
    ipv4, broadcasts, ipv6 = (
        frozenset(one for one in islice(_listed(family, kind), most) if one is not None)
        for family, kind in ((socket.AF_INET, _LOCAL), (socket.AF_INET, _BROADCAST), (socket.AF_INET6, _LOCAL))
    )
    return LocalRoutes(ipv4 | ipv6, frozenset(one for one in broadcasts if isinstance(one, IPv4Address)))


def _listed(family: int, kind: int) -> Iterator[IPAddress | None]:
    """What each route leads to, None where that is no single address. As far as the caller reads: the kernel lists a
    piece for each call.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as sock:
        sock.settimeout(_TIMEOUT)
        sock.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
        body = _ROUTE.pack(family, 0, 0, 0, _TABLE_LOCAL, 0, 0, kind, 0)
        sock.send(_HEADER.pack(_HEADER.size + len(body), _GET_ROUTE, _DUMP, 0, 0) + body)
        yield from _destinations(sock)


def _destinations(sock: socket.socket) -> Iterator[IPAddress | None]:
    while True:
        data = sock.recv(_PIECE_BYTES)
        while len(data) >= _HEADER.size:
            length, kind, _, _, _ = _HEADER.unpack_from(data)
            if kind in (_DONE, _ERROR):  # both have a number of an error
                code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                if code not in (0, errno.ENOENT):  # no such table: lo has never been up
                    raise OSError(code, "cannot list the kernel's routes")
                return
            if kind == _NEW_ROUTE:
                yield _destination(data[_HEADER.size : length])
            data = data[max(_aligned(length), _HEADER.size) :]


def _destination(message: bytes) -> IPAddress | None:
    """The address that a route leads to, if it is one only."""
    family, bits = message[0], message[1]
    size = 4 if family == socket.AF_INET else 16
    rest = message[_ROUTE.size :]
    while len(rest) >= _ATTRIBUTE.size and bits == 8 * size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        if kind == _DESTINATION and length >= _ATTRIBUTE.size + size:
            packed = rest[_ATTRIBUTE.size : _ATTRIBUTE.size + size]
            return IPv4Address(packed) if size == 4 else IPv6Address(packed)
        rest = rest[max(_aligned(length), _ATTRIBUTE.size) :]
    return None


def _aligned(length: int) -> int:
    return (length + 3) & ~3
