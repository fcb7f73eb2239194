"""Whose sockets a ferry stands in for: what it makes inside is to be that user's, and not root's.

A firewall inside asks who opened a socket's file. The kernel's list of datagram sockets says the user of each; the
group is what the supervisors have said of that user when they made sockets for him.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from graft.swap.socket_pool import Owner

NOBODY: Owner = (65534, 65534)
_MAX_USERS = 1024
_ANY = ("0.0.0.0", "::")


class HostSocket(NamedTuple):
    """A datagram socket of the calling thread's namespace. An IPv4-mapped address is one of IPv4."""

    address: str
    port: int
    uid: int


class FerryOwners:
    """The users of one container, and their groups."""

    def __init__(self) -> None:
        self._groups: dict[int, int] = {}

    def note(self, uid: int, gid: int) -> None:
        """A supervisor makes sockets for that user and group."""
        self._groups.pop(uid, None)
        while len(self._groups) >= _MAX_USERS:
            del self._groups[next(iter(self._groups))]
        self._groups[uid] = gid

    def of(self, address: str, port: int) -> Owner:
        """Who has the socket on the host's stack with that address, or all, and that port.

        Of one that has been closed since, or that several could have: the only user that there is, else nobody.
        """
        if len(self._groups) == 1:
            return next(iter(self._groups.items()))
        for at in ((address,), _ANY):
            users = {one.uid for one in host_sockets() if one.port == port and one.address in at} & self._groups.keys()
            if len(users) == 1:
                (uid,) = users
                return uid, self._groups[uid]
        return NOBODY


def host_sockets() -> Iterator[HostSocket]:
    """The datagram sockets with a port that the calling thread's namespace has (/proc/net/udp, proc_net_udp(5))."""
    for name in ("udp", "udp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/thread-self/net", name).read_bytes().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].decode().partition(":")
                yield HostSocket(_text_of(address), int(port, 16), int(fields[7]))


def _text_of(address: str) -> str:
    """The kernel prints words of 32 bits as this machine stores them."""
    words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
    packed = b"".join(socket.htonl(word).to_bytes(4, "big") for word in words)
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    return socket.inet_ntop(socket.AF_INET6, packed).removeprefix("::ffff:")
