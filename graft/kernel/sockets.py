"""The TCP and UDP sockets of a network namespace: listed in readable form, with their owners' tags, and closed.

Netlink is graft/kernel/sockdiag.py's. Sources: socket(7), shutdown(2). /proc/PID/fd names a socket by its inode.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from enum import Enum
from ipaddress import ip_address

from graft.kernel.netns import SO_NETNS_COOKIE
from graft.kernel.sockdiag import (
    BOUND_STATE,
    IPPROTO_MPTCP,
    OPEN_STATES,
    Diagnostics,
    FoundSocket,
    Identity,
    parse_socket,
    seen,
)
from graft.kernel.socket_calls import attach_filter, lock_filter, option, peer_of, place_of, set_number
from graft.model.address import format_ip, unmapped

# include/net/tcp_states.h; a UDP socket is CLOSE until it is connected. A TCP socket that is listed as CLOSE (6.8) is
# bound, and neither listens nor connects.
STATES = {
    1: "established",
    2: "syn-sent",
    3: "syn-recv",
    4: "fin-wait-1",
    5: "fin-wait-2",
    6: "time-wait",
    7: "unconnected",
    8: "close-wait",
    9: "last-ack",
    10: "listening",
    11: "closing",
    12: "syn-recv",
}
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K of linux/filter.h: keep 0 bytes
_libc = ctypes.CDLL(None, use_errno=True)

PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
WITHOUT_PEER = ("listening", "unconnected", "bound")
"""States of sockets that are not connections."""


@dataclass(frozen=True, slots=True)
class ListedSocket:
    """One socket; addresses as ``1.2.3.4:80`` or ``[::1]:80``.

    ``cgroup`` is the id of the cgroup that it was created in, ``stored`` its value in the requested socket storage
    (TCP only).
    """

    inode: int
    protocol: str
    state: str
    local: str
    remote: str
    identity: Identity
    cgroup: int = 0
    stored: bytes | None = None
    is_mptcp: bool = False

    @property
    def is_connection(self) -> bool:
        """Whether it has a remote end."""
        return self.state not in WITHOUT_PEER


@dataclass(frozen=True, slots=True)
class SeenSocket:
    """A socket at first sight, as it comes from the kernel: most of very many are nobody's, and are never read.

    ``is_stored``: it has a value in the requested socket storage, or is of MPTCP. ``cookie`` and ``cgroup`` as in
    `Identity` and `ListedSocket`.
    """

    inode: int
    protocol: str
    state: str
    cookie: bytes
    cgroup: int
    is_stored: bool
    message: bytes
    parents: Mapping[int, bytes | None]

    def read(self) -> ListedSocket:
        """All of it. An MPTCP socket is read as the TCP socket that it listens or connects with."""
        return _with_parent(_read(self.protocol, parse_socket(PROTOCOLS[self.protocol], self.message)), self.parents)


@dataclass(frozen=True, slots=True)
class Listing:
    """The sockets of a namespace as the kernel lists them: messages by protocol; and the values of MPTCP sockets."""

    messages: Mapping[str, list[bytes]]
    parents: Mapping[int, bytes | None]

    def __iter__(self) -> Iterator[SeenSocket]:
        """Every socket that a program has open. Raises ValueError where one is malformed."""
        for protocol, messages in self.messages.items():
            for message in messages:
                one = seen(message)
                if one.inode:
                    is_stored = one.is_stored or one.inode in self.parents
                    state = _state(protocol, one.state)
                    yield SeenSocket(
                        one.inode, protocol, state, one.cookie, one.cgroup, is_stored, message, self.parents
                    )


class Kind(Enum):
    """What is listed in one go. Of each anybody has so many that the kernel takes too long for a listing
    (graft/kernel/sockdiag.py), of the last two most easily.
    """

    TCP = "tcp"
    BOUND = "bound"
    UDP = "udp"


def list_sockets(
    storage: int, kinds: tuple[Kind, ...] = tuple(Kind), cgroups: Collection[int] | None = None
) -> Listing:
    """Every TCP and UDP socket of the calling thread's namespace that has an address, of those kinds.

    ``storage`` is a descriptor of a socket storage map. With ``cgroups`` only those that were made in one of these,
    which is quick whatever others have. Takes no socket's lock. Raises OSError.
    """
    messages: dict[str, list[bytes]] = {}
    with closing(Diagnostics()) as diagnostics:
        subflows = [] if kinds == (Kind.UDP,) else diagnostics.sockets(IPPROTO_MPTCP, storage, cgroups=cgroups)
        parents = {one.inode: one.stored for one in subflows}
        for kind in kinds:
            protocol = "udp" if kind is Kind.UDP else "tcp"
            states = BOUND_STATE if kind is Kind.BOUND else OPEN_STATES
            found = diagnostics.messages(PROTOCOLS[protocol], storage, states, cgroups)
            messages[protocol] = [*messages.get(protocol, ()), *found]
    return Listing(messages, parents)


def list_tcp(
    storage: int, prefix: bytes = b"", cgroups: Collection[int] | None = None, seconds: float | None = None
) -> list[ListedSocket]:
    """The TCP sockets whose value in ``storage`` begins with ``prefix``, as `list_sockets` lists them.

    Not those that have their value with an MPTCP socket. Raises OSError, TimeoutError where it takes longer.
    """
    with closing(Diagnostics()) as diagnostics:
        found = diagnostics.sockets(PROTOCOLS["tcp"], storage, prefix, cgroups, seconds)
    return [_read("tcp", one) for one in found if one.inode and one.stored is not None]


def _with_parent(one: ListedSocket, parents: Mapping[int, bytes | None]) -> ListedSocket:
    """A subflow of an MPTCP socket with the storage of that socket, which is the one that the program has."""
    if one.protocol != "tcp" or one.inode not in parents:
        return one
    return replace(one, stored=parents[one.inode] or one.stored, is_mptcp=True)


def _read(protocol: str, found: FoundSocket) -> ListedSocket:
    return ListedSocket(
        inode=found.inode,
        protocol=protocol,
        state=_state(protocol, found.state),
        local=_format(*found.local),
        remote=_format(*found.remote),
        identity=found.identity,
        cgroup=found.cgroup,
        stored=found.stored,
    )


def _state(protocol: str, number: int) -> str:
    state = STATES.get(number, str(number))
    return "bound" if (protocol, state) == ("tcp", "unconnected") else state


def _format(address: bytes, port: int) -> str:
    """Address and port as text, an IPv4-mapped address as IPv4."""
    return f"{format_ip(unmapped(ip_address(address)))}:{port}"


def destroy(one: ListedSocket) -> None:
    """Close a socket of the calling thread's namespace, in all processes that have it. Raises OSError.

    Of an MPTCP socket it resets the subflows only, and closes no listener (EINVAL). Waits for the socket's lock.
    """
    with closing(Diagnostics()) as diagnostics:
        diagnostics.destroy(one.identity, shared=not one.is_connection)


_UNCONNECTED, _CONNECTED = 7, 1
_TCP_INFO = 11  # linux/tcp.h; its first byte is the state
_SO_COOKIE, _SO_BINDTOIFINDEX = 57, 62  # asm-generic/socket.h
_NO_INTERFACE = 0x7FFFFFFF


def socket_of(fd: int, inode: int, protocols: Collection[str]) -> tuple[int, ListedSocket] | None:
    """A socket of one of these protocols that has a port, by a descriptor of it, as `list_sockets` has it but for
    cgroup and tag; and the cookie of its namespace (5.14). None for any other socket, as one of MPTCP. Waits for the
    socket's lock. Raises OSError.
    """
    family, number = (
        int.from_bytes(option(fd, one, 4), sys.byteorder) for one in (socket.SO_DOMAIN, socket.SO_PROTOCOL)
    )
    protocol = next((name for name in protocols if PROTOCOLS[name] == number), None)
    if family not in (socket.AF_INET, socket.AF_INET6) or protocol is None:
        return None
    cookie, namespace = (int.from_bytes(option(fd, one, 8), sys.byteorder) for one in (_SO_COOKIE, SO_NETNS_COOKIE))
    local, peer = place_of(fd), peer_of(fd)
    if not local[1]:
        return None
    remote = peer or (bytes(len(local[0])), 0)
    ends = local[0].ljust(16, b"\0") + remote[0].ljust(16, b"\0") + option(fd, _SO_BINDTOIFINDEX, 4)
    # The kernel writes the cookie as two numbers, the lower one first (sock_diag_save_cookie).
    sockid = struct.pack("!HH", local[1], remote[1]) + ends + struct.pack("=II", cookie & 0xFFFFFFFF, cookie >> 32)
    if protocol == "tcp":
        state = option(fd, _TCP_INFO, 1, socket.IPPROTO_TCP)[0]
    else:
        state = _CONNECTED if peer else _UNCONNECTED
    found = FoundSocket(Identity(family, number, sockid), state, local, remote, inode, 0, None)
    return namespace, _read(protocol, found)


# For a socket that may be locked no socket.socket is made: that calls getsockname() and sets an option while no other
# thread of the interpreter can run.


def shut_down(fd: int) -> None:
    """Shut a socket down, connected or not: blocked calls on it return. Waits for the socket's lock."""
    _libc.shutdown(fd, socket.SHUT_RDWR)  # ENOTCONN where it is not connected, done all the same


def drop_incoming(fd: int) -> None:
    """Drop everything that arrives at a socket, by a filter that cannot be removed (socket(7)).

    Waits for the socket's lock.
    """
    with suppress(OSError):
        attach_filter(fd, _DROP_ALL)
    with suppress(OSError):
        lock_filter(fd)


def tie_to_no_interface(fd: int) -> None:
    """Bind a socket to the highest number of an interface, which none has: it is of no group with SO_REUSEPORT then,
    and the kernel finds it for no packet. (A UDP socket that its program has bound can be taken away in no other way.)

    Waits for the socket's lock.
    """
    with suppress(OSError):
        set_number(fd, _SO_BINDTOIFINDEX, _NO_INTERFACE)


def can_destroy(release: str | None = None) -> bool:
    """Whether `destroy` cannot block other requests, on this kernel or that of ``release``.

    Up to 6.8 a request that waits for a socket's lock holds mutexes that every request of the machine needs
    (sock_diag_mutex, inet_diag_table_mutex): a program that keeps one socket locked would block them all, `ss` too.
    """
    version = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return version is not None and (int(version[1]), int(version[2])) >= (6, 9)
