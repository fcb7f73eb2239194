"""The compiled part of a supervisor: whether it serves here, what it may do as Python did, its stock of spare sockets.

The extension (graft/swap/compiled/) is optional. It is not there where Graft was installed without a compiler, and not
used where the kernel has no pidfds of threads (6.9), or, for transport born, does not tell a thread's ids by its pidfd
(6.13). Plain Python then does all that it does.
"""

from __future__ import annotations

import os
import socket as names
from _socket import socket as Socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from graft.datapath.layout import LAYOUT_VERSION, PROBED, PROBED_EPOLL, PROBED_FLAGS
from graft.kernel.pidfd import file_ids, threads_have_pidfds
from graft.kernel.seccomp_filter import architecture
from graft.model.sockaddr import Sockaddr
from graft.model.transport import Home, Transport
from graft.state.call_times import BOUNDS
from graft.swap.decision import Action, Call, Decision
from graft.swap.desk import Desk, DeskAnswer
from graft.swap.socket_pool import SocketKind

if TYPE_CHECKING:
    from graft.swap._fast_calls import FastCalls

NOT_COMPILED = "GRAFT_NO_COMPILED"
"""In the environment, not empty: plain Python serves, compiled or not."""

_SPARES = {Transport.SWAP: 8, Transport.BORN: 16}  # of a kind; swap has kinds for every user, as PlainStock
_WITHOUT_EFFECT = os.O_NONBLOCK | os.O_CLOEXEC  # flags that are part of giving a descriptor, with nothing to copy


def why_not(transport: Transport) -> str:
    """Why the compiled part does not serve that transport here; empty where it does."""
    if os.environ.get(NOT_COMPILED):
        return f"{NOT_COMPILED} is set"
    try:
        from graft.swap import _fast_calls
    except ImportError:
        return "no compiler, or no python3-dev, when Graft was installed"
    if (_fast_calls.LAYOUT_VERSION, getattr(_fast_calls, "TIME_BOUNDS", 0)) != (LAYOUT_VERSION, len(BOUNDS)):
        return "it was compiled from another version of Graft: install it again"
    if transport is Transport.BORN:
        return "" if threads_have_pidfds() and _tells_ids() else "the kernel is older than 6.13"
    return "" if threads_have_pidfds() else "the kernel is older than 6.9"


def _tells_ids() -> bool:
    """Whether a pidfd tells who owns the files that its thread makes."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        return file_ids(pidfd) is not None
    finally:
        os.close(pidfd)


def open_fast_calls(listener: int, transport: Transport, netns: str, desk: Desk) -> FastCalls | None:
    """What answers the plain calls of a container of that transport; None where Python does.

    ``netns`` is the name of its own namespace, which transport born needs.
    """
    if why_not(transport) or (transport is Transport.BORN and not netns):
        return None
    from graft.swap import _fast_calls

    arch, numbers = architecture()
    fast = _fast_calls.FastCalls(listener, arch, desk.memory)
    fast.make_spares(_SPARES[transport])
    if transport is Transport.BORN:
        fast.answer_births(numbers["socket"], netns)
    else:
        fast.answer_connects(numbers["connect"])
    return fast


def is_plain_connect(call: Call, address: Sockaddr | None, decision: Decision, answer: DeskAnswer) -> bool:
    """Whether nothing but a new socket and its flags was needed where a socket with no other references was replaced.

    Then the same may be done wherever a connect to an address of that kind gets an equal answer. Pure.
    """
    facts, descriptor, _ = answer
    return (
        call is Call.CONNECT
        and decision.action is Action.TO_HOST
        and not decision.v6only  # the compiled part copies what the socket is
        and address is not None
        and not address.mapped
        and facts.home == Home.CONTAINER
        and facts.protocol == names.IPPROTO_TCP
        and not facts.local_port
        and not (descriptor.options or descriptor.overflow)
        and descriptor.probed & (PROBED | PROBED_EPOLL | PROBED_FLAGS) == PROBED | PROBED_FLAGS
        and descriptor.flags & ~_WITHOUT_EFFECT == os.O_RDWR
    )


class CompiledStock:
    """The spare sockets of a `FastCalls`, which hands them out; `SocketPool` makes them, and may take one."""

    def __init__(self, fast: FastCalls, transport: Transport) -> None:
        self._fast, self._spares = fast, _SPARES[transport]

    def take(self, kind: SocketKind) -> Socket | None:
        """One of that kind, where there is one."""
        fd = self._fast.take(*kind[:3], *kind.owner)
        return Socket(kind.family, kind.type, kind.protocol, fd) if fd >= 0 else None

    def fill(self, kind: SocketKind, make: Callable[[], Socket]) -> None:
        """Make what is missing of that kind; where there are too many in all, the oldest are closed. Raises OSError."""
        for _ in range(self._spares - self._fast.count(*kind[:3], *kind.owner)):
            self._fast.add(*kind[:3], *kind.owner, make().detach())
