"""Closes descriptors: unix sockets that may have descriptors in their queues by a process that exits.

Whoever closes the last copy of such a socket closes what is in its queue, and waits for that: for ever, where somebody
sent a TCP socket with SO_LINGER and unsent data (graft/kernel/unix_rights.py). graftd closes its own copies so that it
does not wait (graft/splice/closing.py), but this process may be the last that has one. A process that is exiting waits
for no socket (PF_EXITING), and where it waits for something else (the mutex of an epoll instance that watches what was
in the queue: fs/eventpoll.c of the kernel), nobody waits for it. So the last copies are those of a child:

    keeper ── fork ──▶ child: has everything open too
           closes its own copies, which are not the last
           ── end of the pipe ──▶ exits

What was made so that the kernel refuses descriptors to it (SO_PASSRIGHTS, from 6.16 on) has none in its queue.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from typing import NoReturn

_SO_PASSRIGHTS = 83  # asm-generic/socket.h
_BATCH = 64
_MAX_CHILDREN = 64


class Closer:
    """Closes descriptors of this process, and never waits for what is in the queue of one."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._children: list[int] = []

    def close(self, fds: Sequence[int]) -> None:
        """Close them: at once, or with those of others by the next `finish`."""
        for fd in fds:
            if _may_have_descriptors(fd):
                self._waiting.append(fd)
            else:
                os.close(fd)
        if len(self._waiting) >= _BATCH:
            self.finish()

    def finish(self) -> None:
        """Close what waits, by a child. Where none can be made, that waits for the next call."""
        self._children = [pid for pid in self._children if not _has_ended(pid)]
        if not self._waiting or len(self._children) >= _MAX_CHILDREN:
            return
        try:
            reader, writer = os.pipe()
        except OSError:  # no descriptor is left
            return
        try:
            child = os.fork()
            if child == 0:
                _be_child(reader, writer)
            self._children.append(child)
            waiting, self._waiting = self._waiting, []
            for fd in waiting:
                os.close(fd)
        except OSError:  # no memory, or too many processes
            pass
        finally:
            os.close(reader)
            os.close(writer)


def _may_have_descriptors(fd: int) -> bool:
    """Whether it is a unix socket to which somebody may have sent descriptors."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # it is no socket
        return False
    try:
        return sock.family == socket.AF_UNIX and bool(sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS))
    except OSError:  # the kernel cannot refuse any
        return True
    finally:
        sock.detach()


def _has_ended(child: int) -> bool:
    """Whether it is no more. Reaps it."""
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # SIGCHLD is ignored: the kernel has
        return True


def _be_child(reader: int, writer: int) -> NoReturn:
    """The child's side: wait until the keeper has closed its copies."""
    try:
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # it must not be gone before
        os.close(writer)
        os.read(reader, 1)
    finally:
        os._exit(0)
