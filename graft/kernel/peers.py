"""Who is at the other end of a unix socket: a process, and not only its number.

The kernel notes the number of who connected, or listened (SO_PEERCRED): another process may have that number by now. So
a process has the other one say something, and looks at it meanwhile:

    open a pidfd of that number ── nothing has been said until now ── "say something" ──>
    <── one byte, with the number of the process that sent it, which the kernel adds (SO_PASSCRED)
    the same number? look at the process in /proc ── it has not ended? then it was this one all the time

A process that has not ended keeps its number, also one that is still in a call that sends. So what comes after the
pidfd was opened, from that number, was sent by that process. To send another number takes CAP_SYS_ADMIN. SO_PEERPIDFD
(6.5) would do for who connected, but not on each kernel that Graft runs on, and not for a child of the process that
listens.

Sources: unix(7), pidfd_open(2), maybe_add_creds() of net/unix/af_unix.c, scm_check_creds() of net/core/scm.c.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from graft.kernel import pidfd, surroundings
from graft.kernel.surroundings import Surroundings

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_SPACE = socket.CMSG_SPACE(_UCRED.size)  # none for descriptors: the kernel drops them then


def name_senders(connection: socket.socket, wanted: bool = True) -> None:
    """Have the kernel say who has sent what arrives. Descriptors may have no room in a message then."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, wanted)


def hear(connection: socket.socket) -> tuple[bytes, int]:
    """One byte, none where it was hung up, and the number of the process that sent it; 0 where nobody names it."""
    said, ancillary, _, _ = connection.recvmsg(1, _SPACE, socket.MSG_CMSG_CLOEXEC)
    found = [
        data
        for level, kind, data in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(data) == _UCRED.size
    ]
    return said, int(_UCRED.unpack(found[0])[0]) if found else 0


class Peer:
    """The process of a number, as far as it speaks at ``connection``, the senders of which are named.

    Raises ProcessLookupError, PermissionError where something was said that may be another one's. To be closed.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._pidfd = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if poll.poll(0):
            self.close()
            raise PermissionError(errno.EPERM, "something was said too early")

    def hear(self) -> bytes:
        """The byte that it says next. Raises PermissionError where another process has said it, or it has ended."""
        said, sender = hear(self._connection)
        if sender != self.pid or pidfd.has_ended(self._pidfd):
            raise PermissionError(errno.EPERM, f"said by process {sender}, not by {self.pid}")
        return said

    def is_like(self, own: Surroundings) -> bool:
        """Whether it is as the calling process is; false where it has ended."""
        try:
            return surroundings.of(self.pid) == own and not pidfd.has_ended(self._pidfd)
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the process."""
        os.close(self._pidfd)
