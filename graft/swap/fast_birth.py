"""The compiled part of transport born: whether it serves here, and its stock of spare sockets.

The extension (graft/swap/_fast_birth.c) is optional. It is not there where Graft was installed without a compiler, and
not used where the kernel does not tell a thread's ids by its pidfd (6.13). Plain Python then does all that it does.
"""

from __future__ import annotations

import os
from _socket import socket as Socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from graft.kernel.pidfd import file_ids, threads_have_pidfds
from graft.kernel.seccomp_filter import architecture
from graft.model.transport import Home
from graft.swap.desk import Desk
from graft.swap.socket_pool import SocketKind

if TYPE_CHECKING:
    from graft.swap._fast_birth import FastBirth

NOT_COMPILED = "GRAFT_NO_COMPILED"
"""In the environment, not empty: plain Python serves, compiled or not."""

_SPARES = 16  # of a kind


def why_not() -> str:
    """Why the compiled part does not serve here; empty where it does."""
    if os.environ.get(NOT_COMPILED):
        return f"{NOT_COMPILED} is set"
    try:
        from graft.swap import _fast_birth  # noqa: F401
    except ImportError:
        return "no compiler, or no python3-dev, when Graft was installed"
    return "" if _tells_ids() else "the kernel is older than 6.13"


def _tells_ids() -> bool:
    """Whether a thread has a pidfd, and its pidfd tells who owns the files that it makes."""
    if not threads_have_pidfds():
        return False
    pidfd = os.pidfd_open(os.getpid())
    try:
        return file_ids(pidfd) is not None
    finally:
        os.close(pidfd)


def open_fast_birth(listener: int, netns: str, desk: Desk) -> FastBirth | None:
    """What answers the plain calls of a container whose own namespace has that name; None where Python does."""
    if not netns or why_not():
        return None
    from graft.swap import _fast_birth

    arch, numbers = architecture()
    fast = _fast_birth.FastBirth(listener, netns, arch, numbers["socket"])
    fast.make_spares(desk.next_home, Home.HOST + 1, _SPARES)
    return fast


class CompiledStock:
    """The spare sockets of a `FastBirth`, which hands them out; `SocketPool` makes them, and may take one."""

    def __init__(self, fast: FastBirth) -> None:
        self._fast = fast

    def take(self, kind: SocketKind) -> Socket | None:
        """One of that kind, where there is one."""
        fd = self._fast.take(*kind[:3], *kind.owner)
        return Socket(kind.family, kind.type, kind.protocol, fd) if fd >= 0 else None

    def fill(self, kind: SocketKind, make: Callable[[], Socket]) -> None:
        """Make what is missing of that kind; where there are too many in all, the oldest are closed. Raises OSError."""
        for _ in range(_SPARES - self._fast.count(*kind[:3], *kind.owner)):
            self._fast.add(*kind[:3], *kind.owner, make().detach())
