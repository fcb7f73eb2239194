"""Where twins come from: made in the namespace where they are to live, tagged, and a few of them ahead of time.

A socket that a supervisor makes is nobody's to the hooks until it has its tag, so none leaves here without. It is made
as the program's user: firewalls ask who opened a socket's file (``meta skuid`` of nft(8), ``-m owner`` of iptables(8)),
and nothing changes that afterwards. Several at once cost a third of what they cost one by one: between two calls of a
program the caches are the program's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from _socket import socket as Socket
from collections.abc import Callable, Iterator
from pathlib import Path

from graft import layout
from graft.desk import Desk
from graft.kernel import netns
from graft.kernel.bpf import Map
from graft.kernel.credentials import owning_files_as
from graft.layout import Home
from graft.twin import AF_INET, AF_INET6, SOCK_STREAM

_AHEAD = 8
_MOST_KINDS = 8  # that some are kept of: a container may have any number of users

Owner = tuple[int, int]
"""User and group."""
ROOT: Owner = (0, 0)
_Kind = tuple[int, int, Owner]  # with family and protocol


class Namespaces:
    """Puts the calling thread where a twin is to be made. Its home is the host's namespace."""

    def __init__(self, home: Path, paths: Callable[[int], Path | None]) -> None:
        self._home = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        netns.setns(self._home)
        self.home_cookie = netns.cookie()
        self._paths = paths

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        """In the namespace of that cookie. Raises OSError(ENONET) where it cannot be found any more."""
        if cookie == self.home_cookie:
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
            netns.setns(self._home)


class Births:
    """Makes the twins of one container."""

    def __init__(
        self, tags: Map[ctypes.c_int32, layout.Tag], desk: Desk, container: int, namespaces: Namespaces
    ) -> None:
        self._tags, self._birth, self._container, self._namespaces = tags, desk.birth, container, namespaces
        self._ahead: dict[_Kind, list[Socket]] = {}
        self._taken: _Kind | None = None

    def take(self, home: Home, cookie: int, family: int, protocol: int, owner: Owner = ROOT) -> Socket:
        """A twin of ``owner``'s to live in the namespace of that cookie. Raises OSError."""
        if home is not Home.HOST or cookie != self._namespaces.home_cookie:
            with self._namespaces.inside(cookie), owning_files_as(*owner):
                return self._make(home, family, protocol)
        kind = family, protocol, owner
        spares = self._ahead.get(kind)
        if spares:
            return spares.pop()
        self._taken = kind
        with owning_files_as(*owner):
            return self._make(home, family, protocol)

    def refill(self) -> None:
        """Where there was no spare of the kind that was taken, make some. To be called while the program runs on."""
        if self._taken is not None:
            family, protocol, owner = self._taken
            spares = self._ahead.pop(self._taken, [])
            while len(self._ahead) >= _MOST_KINDS:
                for forgotten in self._ahead.pop(next(iter(self._ahead))):
                    forgotten.close()
            self._ahead[self._taken] = spares  # the newest now
            with contextlib.suppress(OSError), owning_files_as(*owner):
                while len(spares) < _AHEAD:
                    spares.append(self._make(Home.HOST, family, protocol))
            self._taken = None

    def _make(self, home: Home, family: int, protocol: int) -> Socket:
        birth = self._birth
        birth[0] = home + 1
        try:
            new = Socket(AF_INET if family == 4 else AF_INET6, SOCK_STREAM, protocol)
        except OSError:
            birth[0] = 0
            raise
        if birth[0]:  # the hook did not see it
            birth[0] = 0
            try:
                self._tags.put(ctypes.c_int32(new.fileno()), layout.Tag(container=self._container, home=home))
            except OSError:
                new.close()
                raise
        return new
