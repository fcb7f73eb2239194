"""A child that has looked up its own names in /proc before it is given anything.

    keeper ── fork ──▶ child: closes what it inherited, and looks its names up (own_names.py)
           ◀── one byte ──
           ── the descriptors, SCM_RIGHTS ──▶ and goes on

Until that byte everybody can see the child, and whoever holds its folder in time has it wait in the kernel, where no
signal ends it. So it is left behind then, and another one is forked. It has nothing open that anybody waits for, such
as a connection or the keeper's lock. How long it may take is doubled each time, for a machine that is only slow.

Source: unix(7), fork(2).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import NoReturn

from graft.keeper import own_names, protocol
from graft.keeper.lines import write_line

Work = Callable[[Sequence[int]], object]
"""What the child does with its descriptors."""

MAX_LEFT = 64
"""How many children may wait in the kernel at a time."""
_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 16.0


class Forks:
    """Forks children, and remembers those that it has left behind until they can be reaped."""

    def __init__(self, seconds: float = _FIRST_SECONDS) -> None:
        self._first = self._seconds = seconds
        self._left: list[int] = []

    def start(self, fds: Sequence[int], work: Work) -> int:
        """Fork a child that does ``work`` with copies of ``fds``, and exits. Gives its process id.

        Raises OSError where that is impossible now; TimeoutError where this child was left behind, and another one may
        do better at once.
        """
        self._reap()
        if len(self._left) >= MAX_LEFT:
            raise OSError(errno.EAGAIN, f"{len(self._left)} children before it wait in the kernel")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                _be_child(theirs, len(fds), work)
            theirs.close()  # else its end would not be noticed
            try:
                _hand_over(ours, fds, self._seconds)
            except TimeoutError:
                self.leave(pid)
                self._seconds = min(2 * self._seconds, _LONGEST_SECONDS)
                raise TimeoutError(errno.ETIMEDOUT, f"process {pid} waits in the kernel for its own folder") from None
            except OSError:
                self.leave(pid)
                raise
        self._seconds = self._first
        return pid

    def leave(self, pid: int) -> None:
        """Kill a child, and reap it when it has ended."""
        os.kill(pid, signal.SIGKILL)
        self._left.append(pid)

    def _reap(self) -> None:
        self._left = [pid for pid in self._left if os.waitpid(pid, os.WNOHANG)[0] == 0]


def _hand_over(child: socket.socket, fds: Sequence[int], seconds: float) -> None:
    """Wait for the child's byte, and send it the descriptors. Raises OSError, TimeoutError."""
    child.settimeout(seconds)
    if not child.recv(1):
        raise ChildProcessError(errno.ECHILD, "its process has ended")
    for index in range(0, len(fds), protocol.MAX_DESCRIPTORS):
        socket.send_fds(child, [b"."], fds[index : index + protocol.MAX_DESCRIPTORS])


def _be_child(keeper: socket.socket, count: int, work: Work) -> NoReturn:
    """The child's side."""
    try:
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        _close_others(keeper.fileno())
        own_names.pin()
        keeper.send(b".")
        work(_receive(keeper, count))
    except BaseException as error:
        write_line(f"keeper: graftd cannot be started: {error}")
    os._exit(1)


def _close_others(kept: int) -> None:
    """All descriptors but standard input and output, and ``kept``: no object that has one of them is used any more."""
    first = protocol.FIRST_DESCRIPTOR
    os.closerange(first, kept)
    os.closerange(max(first, kept + 1), os.sysconf("SC_OPEN_MAX"))


def _receive(keeper: socket.socket, count: int) -> list[int]:
    """So many descriptors, in the order in which they were sent; the socket is closed. Raises OSError."""
    found: list[int] = []
    while len(found) < count:
        data, fds, flags, _ = socket.recv_fds(keeper, 1, protocol.MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data or flags & socket.MSG_CTRUNC:
            raise ConnectionError(errno.ECONNABORTED, f"only {len(found)} of {count} descriptors arrived")
        found += fds
    keeper.close()
    return found
