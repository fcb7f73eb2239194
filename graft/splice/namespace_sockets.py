"""Sockets made in another network namespace.

A socket stays in the namespace where it was made, whichever process uses it. So the daemon enters a namespace only to
make a socket, and returns before it does anything else. (A thread for that would cost more, and on a busy processor the
event loop would wait until the thread is scheduled.)
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from graft.errors import NotFoundError
from graft.kernel import netns
from graft.splice.connection import set_relay_options
from graft.splice.log import warn

T = TypeVar("T")


class NamespaceSockets:
    """An open namespace. For one thread only."""

    def __init__(self, place: Path | int | socket.socket, cookie: int, loopback_only: bool = False) -> None:
        """The namespace at a path, of a process, or of a socket. Raises NotFoundError where it is gone, or has another
        cookie.

        ``loopback_only``: its sockets have peers in the same namespace only, so pacing does not help them.
        """
        name = f"the network namespace of process {place}" if isinstance(place, int) else f"network namespace {place}"
        try:
            self._fd = _open(place)
        except OSError as error:
            raise NotFoundError(f"{name} is gone: {error.strerror}") from error
        self.cookie = cookie
        try:
            found = self.run(netns.cookie)
        except OSError as error:
            os.close(self._fd)
            raise NotFoundError(f"{name} cannot be entered: {error.strerror}") from error
        if found != cookie:
            os.close(self._fd)
            raise NotFoundError(f"{name} is another one now")
        try:
            self._turn_off_pacing = loopback_only and self.run(_uses_bbr)
        except OSError:
            os.close(self._fd)
            raise

    def run(self, call: Callable[[], T]) -> T:
        """Make ``call`` in the namespace; returns its result, and raises what it raises."""
        return _run_in(self._fd, call)

    def tcp_socket(self, family: socket.AddressFamily) -> socket.socket:
        """A TCP socket made there: non-blocking, with the options of relayed sockets, not bound. Raises OSError."""
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        sock = self.run(lambda: socket.socket(family, kind))
        try:
            set_relay_options(sock)
            if self._turn_off_pacing:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Close the namespace's descriptor."""
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _open(place: Path | int | socket.socket) -> int:
    """A descriptor of the namespace at a path, of a process, or of a socket. Raises OSError."""
    fd = netns.open_place(place)
    try:
        return _run_in(fd, netns.open_own)  # a pidfd enters it only while the process is there
    finally:
        os.close(fd)


def _run_in(fd: int, call: Callable[[], T]) -> T:
    original = _daemon_netns()
    netns.setns(fd)
    try:
        return call()
    finally:
        _return_to(original)


@functools.cache
def _daemon_netns() -> int:
    return netns.open_own()


def _return_to(original: int) -> None:
    """Return to the daemon's namespace. Where that fails (no memory), exit: the next call would be made in the wrong
    namespace.
    """
    try:
        netns.setns(original)
    except OSError as error:
        warn(f"cannot leave a container's network namespace: {error}")
        os._exit(1)


def _uses_bbr() -> bool:
    """Whether sockets made here use BBR, which paces: over lo that costs a relay a sixth of its throughput."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").startswith(b"bbr")
