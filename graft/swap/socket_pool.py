"""Replacement sockets: made in the namespace where they will live, tagged, and some of them ahead of time.

To the hooks a supervisor's socket belongs to no container until it has a tag, so every socket is tagged here. Several
at once cost a third of what they cost one by one: between two calls the program evicts this code from the CPU's caches.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from _socket import socket as Socket
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.datapath import layout
from graft.kernel import netns
from graft.kernel.bpf import Map
from graft.model.transport import Home
from graft.swap.desk import Desk
from graft.swap.socket_copy import AF_INET, AF_INET6, SOCK_STREAM

_SPARES = 8


class NamespaceSwitch:
    """Moves the calling thread between namespaces. Outside of `inside` it is in the host's."""

    def __init__(self, host: Path, paths: Callable[[int], Path | None]) -> None:
        self._host = os.open(host, os.O_RDONLY | os.O_CLOEXEC)
        netns.setns(self._host)
        self.host_cookie = netns.cookie()
        self._paths = paths

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        """In the namespace of that cookie. Raises OSError(ENONET) where it is not found."""
        if cookie == self.host_cookie:
            yield
            return
        path = self._paths(cookie)
        if path is None:
            raise OSError(errno.ENONET, os.strerror(errno.ENONET))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.setns(fd)
        finally:
            os.close(fd)
        try:
            if netns.cookie() != cookie:
                raise OSError(errno.ENONET, os.strerror(errno.ENONET))
            yield
        finally:
            netns.setns(self._host)


class SocketPool:
    """Makes the replacement sockets of one container."""

    def __init__(
        self, tags: Map[ctypes.c_int32, layout.Tag], desk: Desk, container: int, namespaces: NamespaceSwitch
    ) -> None:
        self._tags, self._next_home, self._container, self._namespaces = tags, desk.next_home, container, namespaces
        self._spares: dict[tuple[int, int], list[Socket]] = {}
        self._missing: tuple[int, int] | None = None

    def get(self, home: Home, cookie: int, family: int, protocol: int) -> Socket:
        """A new socket in the namespace of that cookie. Raises OSError."""
        if home is not Home.HOST or cookie != self._namespaces.host_cookie:
            with self._namespaces.inside(cookie):
                return self._make(home, family, protocol)
        spares = self._spares.get((family, protocol))
        if spares:
            return spares.pop()
        self._missing = (family, protocol)
        return self._make(home, family, protocol)

    def refill(self) -> None:
        """Make spare sockets of the kind of which `get` found none. To be called when the program does not wait."""
        if self._missing is not None:
            spares = self._spares.setdefault(self._missing, [])
            with contextlib.suppress(OSError):
                while len(spares) < _SPARES:
                    spares.append(self._make(Home.HOST, *self._missing))
            self._missing = None

    def _make(self, home: Home, family: int, protocol: int) -> Socket:
        next_home = self._next_home
        next_home[0] = home + 1
        try:
            new = Socket(AF_INET if family == 4 else AF_INET6, SOCK_STREAM, protocol)
        except OSError:
            next_home[0] = 0
            raise
        if next_home[0]:  # the hook did not run
            next_home[0] = 0
            try:
                self._tags.put(ctypes.c_int32(new.fileno()), layout.Tag(container=self._container, home=home))
            except OSError:
                new.close()
                raise
        return new
