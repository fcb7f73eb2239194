"""socket(2), answered with a socket of the host's stack: transport born, and UDP sockets of transport swap.

Where a policy leaves nothing to the container's own stack, there is nothing to decide when a socket is bound or
connected: the hooks decide it then. So the filter traps socket(2) alone (graft/kernel/seccomp_filter.py), and the
answer is one step of the kernel's: a socket that was made and tagged ahead of time becomes a descriptor of the caller.

In transport swap a UDP socket is born so where the policy grants anything for UDP. A bind or connect that the policy
keeps inside takes it home (graft/swap/supervisor.py); what it sends inside without these goes by the container's ferry
(graft/swap/ferry.py), which is started before the first such socket is there.

This process's copy is closed before the program goes on: its close() must be the last one, or its peer sees no end.
That takes two steps, the descriptor and the answer. Where the program's own signals can end its wait between them (a
kernel before 5.19, a profile without the flag) it would keep a descriptor that it does not know of: there the two are
one step, and the copy is closed right after.

Where Graft was compiled, the plain calls of threads of transport born that were served here once do not come here
(graft/swap/fast_calls.py).
"""

from __future__ import annotations

import contextlib
import socket as names
from _socket import socket as Socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graft.kernel.seccomp import Listener, Notification
from graft.kernel.seccomp_filter import IPPROTO_MPTCP, PING_PROTOCOLS, Protocols, can_be_born
from graft.swap.desk import Desk
from graft.swap.ferry_client import FerryClient
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

    ``protocols``: of which sockets are born. ``ferry``: what its datagram sockets need; None in transport born.
    ``may_ping``: whether its policy now has a rule for ICMP. ``killable``: only a signal that kills ends a caller's
    wait. ``fast``, where it is there, gets to know the threads that are served; it is for such callers only, and for
    transport born.
    """

    def __init__(
        self,
        desk: Desk,
        pool: SocketPool,
        listener: Listener,
        processes: Processes,
        netns: str,
        protocols: Protocols,
        ferry: FerryClient | None,
        may_ping: Callable[[], bool],
        log: Callable[[BirthEntry], None] | None = None,
        killable: bool = False,
        fast: FastCalls | None = None,
    ) -> None:
        self._desk, self._pool, self._listener, self._processes = desk, pool, listener, processes
        self._netns, self._protocols, self._ferry, self._log = netns, protocols, ferry, log
        self._may_ping, self._killable, self._fast = may_ping, killable, fast
        self._has_mptcp: bool | None = None

    def serve(self, notification: Notification) -> None:
        """Answer one call. Raises OSError with the errno that it is to fail with.

        A caller in a namespace that it has entered since it started gets a socket there, as in transport swap.
        """
        family, protocol, flags = notification.fd, notification.size, notification.address & _UINT
        caller = self._processes.caller(notification.pid)
        if not self._listener.is_valid(notification.id):
            return  # it may be another program's id by now: the ferry must not know that one's user
        at_home = (
            caller.netns != self._netns
            or not self._can_serve(family, flags, protocol)
            or not (self._ferry is None or self._ferry.is_there_for(caller.owner))
        )
        if self._log is not None:
            self._log(BirthEntry(family, flags, protocol, at_home))
        if at_home:
            self._listener.resume(notification.id)
            return
        born = self._get(notification.pid, SocketKind(family, flags & ~_CLOEXEC, protocol, caller.owner))
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

    def _get(self, tid: int, kind: SocketKind) -> Socket:
        if kind.protocol in PING_PROTOCOLS:
            return self._pool.make_ping(kind, *self._processes.groups(tid))
        return self._pool.get_for_host(kind)

    def _can_serve(self, family: int, kind: int, protocol: int) -> bool:
        """Whether such a socket can be born. (A container's own profile notifies all of both families.)"""
        if protocol in PING_PROTOCOLS and not self._may_ping():
            return False
        return can_be_born(family, kind, protocol, self._protocols) and (
            protocol != IPPROTO_MPTCP or self._can_serve_mptcp()
        )

    def _can_serve_mptcp(self) -> bool:
        """Whether the hooks find the tag of an MPTCP socket (bpf/desk.bpf.c, is_swappable): asked once."""
        if self._has_mptcp is None:
            kind = SocketKind(int(names.AF_INET), int(names.SOCK_STREAM), IPPROTO_MPTCP)
            probe = self._pool.get_for_host(kind)
            self._has_mptcp = self._desk.knows(probe.fileno())
            probe.close()
        return self._has_mptcp
