"""Whose sockets a ferry stands in for: what it makes inside is to be that user's, and not root's.

A firewall inside asks who opened a socket's file. A supervisor notes in the tag of a datagram socket for whom it made
it. The ferry asks the hooks for the tag of the socket that receives at an address (bpf/ferry.bpf.c): one call, however
many sockets others of the host have. (A list of them all, as in /proc/net/udp or by sock_diag, takes as long as
strangers like.)
"""

from __future__ import annotations

import contextlib
import ctypes
import socket

from graft.datapath import layout
from graft.kernel.bpf import Map
from graft.swap.socket_pool import Owner

NOBODY: Owner = (65534, 65534)
_MAX_OWNERS = 1024


class HostSockets:
    """The sockets that a container has on the host's stack, as its ferry finds them.

    ``asking`` are sockets of the ferry's, by family (4, 6), which have its tag and are used for nothing else.
    """

    def __init__(self, tags: Map[ctypes.c_int32, layout.Tag], asking: dict[int, socket.socket]) -> None:
        self._tags, self._asking = tags, asking

    @property
    def descriptors(self) -> set[int]:
        """What is needed to ask."""
        return {self._tags.fd, *(one.fileno() for one in self._asking.values())}

    def owner_at(self, family: int, address: str, port: int) -> Owner | None:
        """Whose the container's socket is that receives there what the ferry sends; None where it has none.

        `NOBODY` where it is not known.
        """
        asking = self._asking.get(family)
        if asking is None:
            return None
        with contextlib.suppress(OSError):
            try:
                asking.connect((address, port))
            except PermissionError:  # the hook has answered
                answer = self._tags.peek(ctypes.c_int32(asking.fileno()))
                if answer is not None and answer.owned:
                    return (answer.uid, answer.gid) if answer.owned == layout.OWNED_KNOWN else NOBODY
        return None


class FerryOwners:
    """For whom sockets of one container were made."""

    def __init__(self, sockets: HostSockets) -> None:
        self._sockets = sockets
        self._known: dict[Owner, None] = {}

    def note(self, owner: Owner) -> None:
        """A supervisor makes sockets for that user and group."""
        self._known.pop(owner, None)
        while len(self._known) >= _MAX_OWNERS:
            del self._known[next(iter(self._known))]
        self._known[owner] = None

    def of(self, family: int, address: str, port: int) -> Owner:
        """Who has the socket on the host's stack at that address and port.

        Of one that has been closed since, or receives nothing from the ferry: the only one that there is, else nobody.
        """
        found = self._sockets.owner_at(family, address, port)
        if found is None and len(self._known) == 1:
            return next(iter(self._known))
        return found or NOBODY
