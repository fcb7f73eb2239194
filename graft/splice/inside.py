"""Sockets made in another network namespace, by threads that live no longer than that.

A socket stays in the namespace where it was made, whoever uses it. So the daemon itself never leaves the host's: a
thread enters the other one, makes what is wanted, and ends. What a connection needs is made in advance, by the batch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from graft.errors import NotFoundError
from graft.kernel import netns
from graft.splice.connection import prepare

T = TypeVar("T")
_MOST = 64
_IDLE_SECONDS = 5.0


class Inside:
    """A namespace, held open. Raises NotFoundError where it is not the one of that cookie."""

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
        self._spares = {family: _Spares() for family in (socket.AF_INET, socket.AF_INET6)}

    def do(self, call: Callable[[], T]) -> T:
        """The result of ``call``, made in the namespace. What it raises is raised here."""
        results: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                netns.setns(self._fd)
                results.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # what threading makes of EAGAIN
            raise OSError(errno.EAGAIN, str(error)) from error
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def take(self, family: socket.AddressFamily) -> socket.socket:
        """A TCP socket made there: prepared, never blocking, neither bound nor connected. Raises OSError."""
        spares = self._spares[family]
        if not spares.ready:
            spares.ready = self.do(lambda: _make(family, spares.batch, self._unpaced))
            spares.batch = min(_MOST, spares.batch * 2)
        spares.used = time.monotonic()
        return spares.ready.pop()

    def trim(self) -> None:
        """Close the sockets in stock that nobody has asked for in a while."""
        limit = time.monotonic() - _IDLE_SECONDS
        for spares in self._spares.values():
            if spares.used < limit:
                spares.clear()

    def close(self) -> None:
        """Let go of the namespace."""
        for spares in self._spares.values():
            spares.clear()
        with contextlib.suppress(OSError):
            os.close(self._fd)


class _Spares:
    """Sockets in stock. The more are asked for, the more are made at once."""

    def __init__(self) -> None:
        self.ready: list[socket.socket] = []
        self.batch = 1
        self.used = 0.0

    def clear(self) -> None:
        for sock in self.ready:
            sock.close()
        self.ready.clear()
        self.batch = 1


def _paces() -> bool:
    """Whether sockets made here send by a timer: that costs a relay a sixth of its throughput over lo."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").startswith(b"bbr")


def _make(family: socket.AddressFamily, count: int, unpaced: bool) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            made.append(sock)
            prepare(sock)
            if unpaced:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    except OSError:
        if not made:
            raise
    return made
