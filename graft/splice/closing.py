"""Closes sockets: a unix socket that may have descriptors in its queue by a process that exits.

To close such a socket can take for ever (graft/kernel/unix_rights.py). But a process that is exiting waits for no
socket (PF_EXITING, in the release functions of the kernel's protocols). It may wait for ever for something else: for
the mutex of an epoll instance that watches what was in the queue (eventpoll_release_file in the kernel's
fs/eventpoll.c). Then nobody waits for that process. So where the kernel cannot refuse descriptors, graftd sends these
sockets to a helper:

    graftd ── SCM_RIGHTS ──▶ helper ── fork ──▶ child: receives up to 64 sockets, and exits when graftd
      │                        ▲                 │▲         has closed its own copies: the child's are the last
      │                        └─ is about to ───┘│
      └─────── has closed one (a pipe) ───────────┘     The helper waits for no child's exit, and ends with graftd.

Nothing of that is needed when graftd itself ends: what it has open then, the kernel closes as it exits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import NoReturn

from graft.kernel import process, unix_rights

_BATCH = 64
_ROOM = socket.CMSG_SPACE(4)  # for one descriptor
_FORK_AGAIN_SECONDS = 0.1
_EXIT_SECONDS = 1.0


def _may_wait(sock: socket.socket) -> bool:
    """Whether to close ``sock`` may take long. Nothing more comes into its queue then."""
    if (
        sock.fileno() < 0 or sock.family != socket.AF_UNIX or unix_rights.refused_by_kernel()
    ):  # (closed already, perhaps)
        return False
    return unix_rights.stop_receiving(sock)


class Closer:
    """Closes sockets of this process. The helper is started when it is needed."""

    def __init__(self) -> None:
        self._outbox: socket.socket | None = None
        self._closed = -1
        """The pipe to which it writes a byte for each socket that it has sent, and closed. It is never full: it has
        room for more of them than the helper's queue has for sockets.
        """
        self._helper = 0

    def close(self, sock: socket.socket) -> bool:
        """Close ``sock``, at once or very soon. False: that cannot be done now, and is to be tried again."""
        if not _may_wait(sock):
            sock.close()
            return True
        if not self._send(sock):
            return False
        sock.close()
        with contextlib.suppress(OSError):  # the helper was killed
            os.write(self._closed, b".")
        return True

    def _send(self, sock: socket.socket) -> bool:
        """Whether the helper has a copy of it, or will have."""
        try:
            socket.send_fds(self._start(), [b"."], [sock.fileno()])
        except BlockingIOError:  # the helper has enough to do
            return False
        except OSError:  # it was killed, or cannot be started
            self.stop()
            return False
        return True

    @staticmethod
    def close_at_exit(sock: socket.socket) -> None:
        """Close ``sock``, or leave that to the exit of this process, which comes next."""
        if _may_wait(sock):
            sock.detach()
        else:
            sock.close()

    def _start(self) -> socket.socket:
        if self._outbox is None:
            with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
                outbox, inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.callback(outbox.close)
                theirs.callback(inbox.close)
                reader, writer = os.pipe()
                ours.callback(os.close, writer)
                theirs.callback(os.close, reader)
                outbox.setblocking(False)
                os.set_blocking(writer, False)
                self._helper = os.fork()
                if self._helper == 0:
                    _run_helper(inbox, reader)
                ours.pop_all()
                self._outbox, self._closed = outbox, writer
        return self._outbox

    def stop(self) -> None:
        """End the helper, when it has closed what it was sent. Safe to repeat."""
        if self._outbox is None:
            return
        self._outbox.close()
        self._outbox = None
        os.close(self._closed)
        deadline = time.monotonic() + _EXIT_SECONDS
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self._helper, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.002)


def _run_helper(inbox: socket.socket, closed: int) -> NoReturn:
    """The helper's side. ``closed``: graftd writes a byte there for each socket that it has closed."""
    with contextlib.suppress(BaseException):
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_IGN)  # it ends with graftd, and waits for no child
        os.setsid()
        process.close_all_but({inbox.fileno(), closed})
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        process.set_process_name("graft-closes")
        while inbox.recv(1, socket.MSG_PEEK):
            _close_batch(inbox, closed)
    os._exit(0)


def _close_batch(inbox: socket.socket, closed: int) -> None:
    """Start a child that receives what has been sent, and exits. Returns when it is about to.

    (Before it is, no other child reads from ``closed``: the bytes there are in the order of the sockets.)
    """
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no memory, or too many processes
        time.sleep(_FORK_AGAIN_SECONDS)
        child = -1
    if child == 0:
        with contextlib.suppress(BaseException):
            _wait_until_closed(closed, _receive(inbox))
        with contextlib.suppress(BaseException):
            os.close(writer)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)


def _receive(inbox: socket.socket) -> int:
    """Take what has been sent, which this process has open from then on; gives how many sockets that are."""
    for received in range(_BATCH):
        try:
            if not inbox.recvmsg(1, _ROOM, socket.MSG_DONTWAIT)[0]:
                return received
        except OSError:
            return received
    return _BATCH


def _wait_until_closed(closed: int, count: int) -> None:
    """Wait until graftd has closed so many, or has ended."""
    while count > 0:
        told = len(os.read(closed, count))
        count = count - told if told else 0
