"""Sockets for a container: made in the namespace where they will live, tagged, and some of them ahead of time.

To the hooks a supervisor's socket belongs to no container until it has a tag, so every socket is tagged here. It is
made as the program's user: firewalls ask who opened a socket's file (``meta skuid`` of nft(8), ``-m owner`` of
iptables(8)), and nothing changes that afterwards. Several at once cost a third of what they cost one by one: between
two calls the program evicts this code from the CPU's caches.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket as names
from _socket import socket as Socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from graft.datapath import layout
from graft.kernel import netns
from graft.kernel.bpf import Map
from graft.kernel.credentials import in_groups, owning_files_as
from graft.model.transport import Home
from graft.swap.desk import Desk

_SPARES = 8  # of a kind
_MAX_KINDS = 8  # with spares: a container may have any number of users

Owner = tuple[int, int]
"""User and group."""
ROOT: Owner = (0, 0)


class SocketKind(NamedTuple):
    """What a socket is made of: the numbers of socket(2), and its owner. ``type`` may have SOCK_NONBLOCK."""

    family: int
    type: int
    protocol: int
    owner: Owner = ROOT


class NamespaceSwitch:
    """Moves the calling thread between namespaces. Outside of `inside` it is in the host's."""

    def __init__(self, host: Path, paths: Callable[[int], Path | None]) -> None:
        self.host = os.open(host, os.O_RDONLY | os.O_CLOEXEC)
        netns.setns(self.host)
        self.host_cookie = netns.cookie()
        self._paths = paths

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        """In the namespace of that cookie. Raises OSError(ENONET) where it is not found."""
        if cookie == self.host_cookie:
            yield
            return
        fd = self.open(cookie)
        try:
            with self.entered(fd):
                yield
        finally:
            os.close(fd)

    def open(self, cookie: int) -> int:
        """A descriptor of the namespace of that cookie. Raises OSError(ENONET) where it is not found.

        It is compared once more when it is open: its path may have a process id, which another process may have by now.
        """
        path = self._paths(cookie)
        if path is None:
            raise OSError(errno.ENONET, os.strerror(errno.ENONET))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self.entered(fd):
                if netns.cookie() != cookie:
                    raise OSError(errno.ENONET, os.strerror(errno.ENONET))
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextlib.contextmanager
    def entered(self, fd: int) -> Iterator[None]:
        """In the namespace of a descriptor."""
        netns.setns(fd)
        try:
            yield
        finally:
            netns.setns(self.host)


class Stock(Protocol):
    """Where spare sockets wait."""

    def take(self, kind: SocketKind) -> Socket | None:
        """One of that kind, where there is one."""

    def fill(self, kind: SocketKind, make: Callable[[], Socket]) -> None:
        """Have as many of that kind as there should be, and of others as many as there is room for. Raises OSError."""


class PlainStock:
    """Spare sockets of the kinds that were asked for last."""

    def __init__(self) -> None:
        self._spares: dict[SocketKind, list[Socket]] = {}

    def take(self, kind: SocketKind) -> Socket | None:
        """One of that kind, where there is one."""
        spares = self._spares.get(kind)
        return spares.pop() if spares else None

    def fill(self, kind: SocketKind, make: Callable[[], Socket]) -> None:
        """Make what is missing of that kind, and forget the oldest kind where there are too many. Raises OSError."""
        spares = self._spares.pop(kind, [])
        while len(self._spares) >= _MAX_KINDS:
            for oldest in self._spares.pop(next(iter(self._spares))):
                oldest.close()
        self._spares[kind] = spares  # the newest now
        while len(spares) < _SPARES:
            spares.append(make())


class SocketPool:
    """Makes the sockets of one container, and tags them. ``stock`` is where spare ones wait."""

    def __init__(
        self,
        tags: Map[ctypes.c_int32, layout.Tag],
        desk: Desk,
        container: int,
        namespaces: NamespaceSwitch,
        stock: Stock | None = None,
    ) -> None:
        self._tags, self._next_home, self._container, self._namespaces = tags, desk.next_home, container, namespaces
        self._stock = stock or PlainStock()
        self.host_cookie = namespaces.host_cookie
        self._missing: SocketKind | None = None

    def get(self, home: Home, cookie: int, kind: SocketKind) -> Socket:
        """A new socket in the namespace of that cookie. Raises OSError."""
        if home is Home.HOST and cookie == self.host_cookie:
            return self.get_for_host(kind)
        with self._namespaces.inside(cookie), owning_files_as(*kind.owner):
            return self._make(home, kind)

    def get_for_host(self, kind: SocketKind) -> Socket:
        """A new host-homed socket in the host's namespace: a spare one, where there is one. Raises OSError."""
        spare = self._stock.take(kind)
        if spare is not None:
            return spare
        self._missing = kind
        with owning_files_as(*kind.owner):
            return self._make(Home.HOST, kind)

    def make_ping(self, kind: SocketKind, gid: int, groups: Sequence[int]) -> Socket:
        """A new host-homed socket that pings, if the host lets somebody of these groups have one. Raises OSError.

        The kernel compares the caller's groups with net.ipv4.ping_group_range when the socket is made, and never again.
        """
        with in_groups(gid, groups), owning_files_as(*kind.owner):
            return self._make(Home.HOST, kind)

    def refill(self) -> None:
        """Make spare sockets of the kind of which `get` found none. To be called when the program does not wait."""
        if self._missing is not None:
            kind, self._missing = self._missing, None
            with contextlib.suppress(OSError), owning_files_as(*kind.owner):
                self._stock.fill(kind, lambda: self._make(Home.HOST, kind))

    def _make(self, home: Home, kind: SocketKind) -> Socket:
        next_home = self._next_home
        next_home[0] = home + 1
        try:
            new = Socket(kind.family, kind.type, kind.protocol)
        except OSError:
            next_home[0] = 0
            raise
        has_owner = home is Home.HOST and kind.type & ~names.SOCK_NONBLOCK == names.SOCK_DGRAM
        if next_home[0] or has_owner:  # the hook did not run, or does not know all
            next_home[0] = 0
            try:
                self._tags.put(ctypes.c_int32(new.fileno()), self._tag(home, kind.owner if has_owner else None))
            except OSError:
                new.close()
                raise
        return new

    def _tag(self, home: Home, owner: Owner | None) -> layout.Tag:
        """``owner``: of a socket about which the container's ferry may ask."""
        tag = layout.Tag(container=self._container, home=home)
        if owner is not None:
            tag.owned = layout.OWNED_KNOWN
            tag.uid, tag.gid = owner
        return tag
