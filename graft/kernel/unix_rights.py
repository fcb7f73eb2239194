"""Descriptors that a peer sends over a unix socket (SCM_RIGHTS): refused, and not closed by who serves others.

Who closes the last descriptor of a file waits for what its release waits for. That may be for ever: a TCP socket with
SO_LINGER and unsent data, say. A descriptor in a message is closed by whoever takes the message out of the queue and
not the descriptor (recv(2), splice(2)), or closes the socket with the message in its queue.

A kernel from 6.16 on refuses such messages to a socket that does not want them. On an older one, a look at the queue
(MSG_PEEK) says whether a message has descriptors, and leaves the last one of each in the queue.

Sources: unix(7), recv(2), asm-generic/socket.h; unix_stream_sendmsg, unix_stream_read_generic and unix_release_sock in
net/unix/af_unix.c, scm_recv in net/core/scm.c of the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import socket
import termios

_SO_PASSRIGHTS = 83  # asm-generic/socket.h


@functools.cache
def refused_by_kernel() -> bool:
    """Whether this kernel can refuse descriptors."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True


def refuse(sock: socket.socket) -> None:
    """Have the kernel refuse descriptors for ``sock``, and for what it accepts: their sender gets EPERM. Does nothing
    on a kernel that cannot. To be called before anybody can send to it. Raises OSError.
    """
    if refused_by_kernel():
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def peek(sock: socket.socket, buffer: memoryview) -> int:
    """Copy what ``sock`` received into ``buffer``, and leave it in the queue. Raises OSError(EPERM) where a descriptor
    came with it: that must not be received then, nor the socket closed here.

    (Without a buffer for them, the kernel says only that there are some. They get no numbers here: to close a number
    calls the file's flush operation, which waits for its server where that is one of FUSE.)
    """
    count, _, flags, _ = sock.recvmsg_into([buffer], 0, socket.MSG_PEEK)
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EPERM, "a descriptor was sent")
    return count


def stop_receiving(sock: socket.socket) -> bool:
    """Let nothing more come into the queue of ``sock``. Whether there may be descriptors in it.

    (A message has at least one byte. A listener's queue has the connections that were not accepted, with theirs.)
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)
    try:
        return any(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    except OSError:  # it listens
        return True
