"""socket(2), answered with a socket of the host's stack: transport born.

Where a policy leaves nothing to the container's own stack, there is nothing to decide when a socket is bound or
connected: the hooks decide it then. So the filter traps socket(2) alone (graft/kernel/seccomp_filter.py), and the
answer is one step of the kernel's: a socket that was made and tagged ahead of time becomes a descriptor of the caller.

This process's copy is closed before the program goes on: its close() must be the last one, or its peer sees no end.
That takes two steps, the descriptor and the answer. Where the program's own signals can end its wait between them (a
kernel before 5.19, a profile without the flag) it would keep a descriptor that it does not know of: there the two are
one step, and the copy is closed right after.

Where Graft was compiled, the plain calls of threads that were served here once do not come here
(graft/swap/fast_calls.py).
"""

from __future__ import annotations

import contextlib
import socket as names
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graft.kernel.seccomp import Listener, Notification
from graft.kernel.seccomp_filter import IPPROTO_MPTCP, can_be_born
from graft.swap.desk import Desk
from graft.swap.processes import Processes
from graft.swap.socket_pool import SocketKind, SocketPool

if TYPE_CHECKING:
    from graft.swap._fast_calls import FastCalls

_CLOEXEC = int(names.SOCK_CLOEXEC)
_UINT = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class BirthEntry:
    """A served socket(2), for `graft run -v`. ``at_home``: it was left to the kernel, in the caller's namespace."""

    family: int
    type: int
    protocol: int
    at_home: bool = False


class SocketBirth:
    """Answers socket(2) for one container. ``netns`` is its own network namespace (`Processes.caller`).

    ``killable``: only a signal that kills ends a caller's wait. ``fast``, where it is there, gets to know the threads
    that are served; it is for such callers only.
    """

    def __init__(
        self,
        desk: Desk,
        pool: SocketPool,
        listener: Listener,
        processes: Processes,
        netns: str,
        log: Callable[[BirthEntry], None] | None = None,
        killable: bool = False,
        fast: FastCalls | None = None,
    ) -> None:
        self._desk, self._pool, self._listener, self._processes = desk, pool, listener, processes
        self._netns, self._log, self._killable, self._fast = netns, log, killable, fast
        self._has_mptcp: bool | None = None

    def serve(self, notification: Notification) -> None:
        """Answer one call. Raises OSError with the errno that it is to fail with.

        A caller in a namespace that it has entered since it started gets a socket there, as in transport swap.
        """
        family, protocol, flags = notification.fd, notification.size, notification.address & _UINT
        caller = self._processes.caller(notification.pid)
        at_home = caller.netns != self._netns or not self._can_serve(family, flags, protocol)
        if self._log is not None:
            self._log(BirthEntry(family, flags, protocol, at_home))
        if at_home:
            self._listener.resume(notification.id)
            return
        born = self._pool.get_for_host(SocketKind(family, flags & ~_CLOEXEC, protocol, caller.owner))
        try:
            if self._killable:
                number = self._listener.add(notification.id, born.fileno(), bool(flags & _CLOEXEC))
                born.close()
                self._listener.answer_value(notification.id, number)
            else:
                self._listener.answer_with(notification.id, born.fileno(), bool(flags & _CLOEXEC))
        finally:
            born.close()
        if self._fast is not None:
            with contextlib.suppress(OSError):  # it has ended, or there is no descriptor left: plain Python goes on
                self._processes.show(notification.pid, self._fast.know)

    def _can_serve(self, family: int, kind: int, protocol: int) -> bool:
        """Whether such a socket can be born. (A container's own profile notifies all of both families.)"""
        return can_be_born(family, kind, protocol) and (protocol != IPPROTO_MPTCP or self._can_serve_mptcp())

    def _can_serve_mptcp(self) -> bool:
        """Whether the hooks find the tag of an MPTCP socket (bpf/desk.bpf.c, is_swappable): asked once."""
        if self._has_mptcp is None:
            kind = SocketKind(int(names.AF_INET), int(names.SOCK_STREAM), IPPROTO_MPTCP)
            probe = self._pool.get_for_host(kind)
            self._has_mptcp = self._desk.knows(probe.fileno())
            probe.close()
        return self._has_mptcp
