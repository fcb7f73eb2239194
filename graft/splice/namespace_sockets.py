"""Sockets made in another network namespace.

A socket stays in the namespace where it was made, whoever uses it. So the daemon enters a namespace for no longer than
it takes to make one, and is back home before it does anything else. (A thread for it would cost more, and on a busy
processor the event loop would wait for its turn.)
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from graft.errors import NotFoundError
from graft.kernel import netns
from graft.splice.connection import prepare

T = TypeVar("T")


class NamespaceSockets:
    """A namespace, held open. Raises NotFoundError where it is not the one of that cookie. For one thread only."""

    def __init__(self, path: Path, cookie: int, at_home: bool = False) -> None:
        """``at_home``: its sockets talk to no one outside of it, so nothing is gained by pacing what they send."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"the network namespace {path} is gone: {error.strerror}") from error
        self.cookie = cookie
        try:
            found = self.do(netns.cookie)
        except OSError as error:
            os.close(self._fd)
            raise NotFoundError(f"the network namespace {path} cannot be entered: {error.strerror}") from error
        if found != cookie:
            os.close(self._fd)
            raise NotFoundError(f"{path} is another network namespace now")
        self._unpaced = at_home and self.do(_paces)

    def do(self, call: Callable[[], T]) -> T:
        """The result of ``call``, made in the namespace. What it raises is raised here."""
        home = _home()
        netns.setns(self._fd)
        try:
            return call()
        finally:
            _return(home)

    def take(self, family: socket.AddressFamily) -> socket.socket:
        """A TCP socket made there: prepared, never blocking, neither bound nor connected. Raises OSError."""
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = self.do(lambda: socket.socket(family, kind))
        try:
            prepare(sock)
            if self._unpaced:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Let go of the namespace."""
        with contextlib.suppress(OSError):
            os.close(self._fd)


@functools.cache
def _home() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _return(home: int) -> None:
    """Go home. Where that fails (no memory), the process ends: nothing that it did next would be where it belongs."""
    try:
        netns.setns(home)
    except OSError as error:
        print(f"graftd: cannot leave a container's network namespace: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _paces() -> bool:
    """Whether sockets made here send by a timer: that costs a relay a sixth of its throughput over lo."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").startswith(b"bbr")
