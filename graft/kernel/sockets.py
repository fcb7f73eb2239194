"""The TCP and UDP sockets of a network namespace, for people, with what says whose they are; and their end.

Sources: sock_diag(7), through graft/kernel/sockdiag.py; socket(7), shutdown(2). The inode of a socket is what
/proc/PID/fd names it by.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from contextlib import closing
from dataclasses import dataclass, replace
from ipaddress import ip_address

from graft.kernel.sockdiag import IPPROTO_MPTCP, Diagnostics, FoundSocket, Identity
from graft.model.address import format_ip, unmapped

# include/net/tcp_states.h; a UDP socket is CLOSE until it is connected. One of TCP that is listed as CLOSE (6.8) is
# bound, and does nothing.
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
_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K of linux/filter.h: keep 0 bytes
_libc = ctypes.CDLL(None, use_errno=True)

PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
WITHOUT_PEER = ("listening", "unconnected", "bound")
"""States of sockets that are no connections."""


@dataclass(frozen=True, slots=True)
class ListedSocket:
    """One socket; addresses as ``1.2.3.4:80`` or ``[::1]:80``.

    ``cgroup`` is the id of the one that it was born in, ``stored`` its value in the socket storage that was asked for
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
        """Whether it has somebody at its other end."""
        return self.state not in WITHOUT_PEER


def list_sockets(storage: int) -> list[ListedSocket]:
    """Every TCP and UDP socket of the calling thread's namespace that has an address, and that some program has.

    ``storage`` is a descriptor of a socket storage map. An MPTCP socket is listed as the TCP socket that it listens or
    connects by. Takes no socket's lock. Raises OSError.
    """
    with closing(Diagnostics()) as diagnostics:
        parents = {one.inode: one.stored for one in diagnostics.sockets(IPPROTO_MPTCP, storage)}
        found = [
            _read(protocol, one)
            for protocol, number in PROTOCOLS.items()
            for one in diagnostics.sockets(number, storage)
            if one.inode
        ]
    return [_with_parent(one, parents) for one in found]


def _with_parent(one: ListedSocket, parents: dict[int, bytes | None]) -> ListedSocket:
    """What an MPTCP socket stores is its own; to its program it is one with the TCP sockets below it."""
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
    """An IPv4-mapped address is the IPv4 address that the network sees."""
    return f"{format_ip(unmapped(ip_address(address)))}:{port}"


def destroy(one: ListedSocket) -> None:
    """End a socket of the calling thread's namespace, wherever its descriptor is. Raises OSError (sockdiag.destroy).

    Of an MPTCP socket it ends the connections below it only, and no listener (EINVAL). Waits for who holds its lock.
    """
    with closing(Diagnostics()) as diagnostics:
        diagnostics.destroy(one.identity, shared=not one.is_connection)


# Of a socket that may be locked no socket.socket is made: that asks for its name, and sets an option, while no other
# thread of the interpreter can run.


def shut_down(fd: int) -> None:
    """Shut a socket down, connected or not: who waits in it wakes. Waits for whoever holds its lock."""
    _libc.shutdown(fd, socket.SHUT_RDWR)  # ENOTCONN where it is not connected, done all the same


def drop_incoming(fd: int) -> None:
    """Let nothing reach a socket any more: a filter that drops all, and that cannot be taken off (socket(7)).

    Waits for whoever holds its lock.
    """
    instructions = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    program = struct.pack("@HP", len(_DROP_ALL) // 8, ctypes.addressof(instructions))
    _libc.setsockopt(fd, socket.SOL_SOCKET, _SO_ATTACH_FILTER, program, len(program))
    _libc.setsockopt(fd, socket.SOL_SOCKET, _SO_LOCK_FILTER, ctypes.byref(ctypes.c_int(1)), 4)


def can_destroy(release: str | None = None) -> bool:
    """Whether a socket may be ended so without harm to others, on this kernel or that of ``release``.

    Up to 6.8 a request that waits for a socket's lock holds mutexes that every request of the machine needs
    (sock_diag_mutex, inet_diag_table_mutex): whoever keeps one socket locked would keep all of them waiting, `ss` too.
    """
    version = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return version is not None and (int(version[1]), int(version[2])) >= (6, 9)
