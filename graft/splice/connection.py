"""One relayed connection: two sockets, and the bytes between them moved by splice(2), or handed to the kernel.

Theory of operation

    near ══ flow ═▶ pipe ═▶ far          Each direction is a flow of its own:
    near ◀═ pipe ◀═ flow ══ far
                                     ┌────────── data in the pipe, far side full: wait ──────────┐
                                     ▼                                                           │
      OPEN ── source ended (FIN) ─▶ DRAINING ── pipe empty ─▶ shutdown(SHUT_WR) ─▶ SHUT          │
        │                                                                            │           │
        └── error on either socket, anywhere ─▶ both sockets reset          both SHUT: closed ───┘

A flow takes data only when its pipe is empty, so that a slow reader stops its sender: what is held is at most one
pipe. A pipe is lent while it holds data; where there are none left, or for urgent data, which splice(2) does not pass,
bytes are copied instead, and stay in the source's queue until the other side took them.

Sockets are watched edge-triggered, once, for everything: `readable` and `writable` are what the kernel last said, until
a call says otherwise. Every socket has SO_LINGER with no time from the start: if this process is killed, or gives up,
the peers see a reset, never an end of file in the middle. Only a connection that ended well both ways is closed gently.

With the relay in the kernel, a flow is handed over (kernel_flow.py) when it has brought a few small messages and there
is nothing more to read: short connections are not worth it, and splice(2) is better at bulk. One that the kernel does
not take goes on as above. A side is then watched for what still concerns us.
"""

from __future__ import annotations

import os
import select
import socket
import struct

from graft.splice.kernel_flow import KernelFlow
from graft.splice.pipes import PIPE_BYTES, Pipe
from graft.splice.resources import Account
from graft.splice.sockmap import Sockmap

_ENDED = select.EPOLLRDHUP | select.EPOLLHUP
_INPUT = select.EPOLLIN | select.EPOLLPRI | _ENDED
_ALWAYS = select.EPOLLRDHUP | select.EPOLLET
_COMES_IN = select.EPOLLIN | select.EPOLLPRI  # each packet wakes who watches for either

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CLOSE_GENTLY = struct.pack("ii", 0, 0)
_BUDGET = 2  # pipes full, before others have their turn
_LAST_PUMPS = 4  # for what a side sent before its error: more than its queue holds (tcp_rmem)
_COPY_BYTES = 65536
_SMALL = 16384  # bytes at once: no bulk


def prepare(sock: socket.socket) -> None:
    """What every relayed socket has; an accepted one has it from its listener (tcp(7), socket(7))."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


class Side:
    """One of the two sockets, and what the kernel last said of it."""

    __slots__ = (
        "connection",
        "dialled",
        "ended",
        "established",
        "fd",
        "inward",
        "outward",
        "readable",
        "sock",
        "watched",
        "writable",
    )

    inward: Flow
    outward: Flow

    def __init__(self, connection: Connection, sock: socket.socket, established: bool) -> None:
        self.connection = connection
        self.sock = sock
        self.fd = sock.fileno()
        self.established = self.writable = established
        self.dialled = not established
        self.readable = False
        self.ended = False
        self.watched = _ALWAYS | _COMES_IN | select.EPOLLOUT

    def rewatch(self) -> None:
        """Be told of what concerns us: not of each packet for a target that is full, or that the kernel moves."""
        wanted = _ALWAYS
        if self.outward.takes_input:
            wanted |= _COMES_IN
        if self.inward.is_ours:
            wanted |= select.EPOLLOUT
        if wanted != self.watched:
            self.watched = wanted
            self.connection.loop.change(self.fd, wanted)

    def on_event(self, mask: int) -> None:
        """Take note of what epoll says, and move what can be moved."""
        connection = self.connection
        if connection.closed:
            return
        if mask & select.EPOLLERR:
            connection.fail(self)
            return
        if not self.writable and mask & select.EPOLLOUT:
            self._make_room()
        if mask & _INPUT and not connection.closed:
            self.readable = True
            if mask & _ENDED:
                self.ended = True
            if mask & select.EPOLLPRI:
                self.outward.copies = True
            self.outward.pump()

    def _make_room(self) -> None:
        """There is room in the send queue again, or for the first time: it is connected now."""
        self.writable = True
        self.inward.source.rewatch()
        if not self.established:
            self.established = True
            self.inward.offer()
            self.outward.offer()
        flow = self.inward
        if flow.held or flow.eof or flow.source.readable or flow.handed is not None:
            flow.pump()


class Flow:
    """One direction."""

    __slots__ = (
        "calm",
        "connection",
        "copies",
        "eof",
        "handed",
        "held",
        "passed",
        "pipe",
        "refused",
        "shut",
        "source",
        "target",
    )

    def __init__(self, connection: Connection, source: Side, target: Side) -> None:
        self.connection = connection
        self.source, self.target = source, target
        self.pipe: Pipe | None = None
        self.held = self.passed = self.calm = 0
        self.copies = self.eof = self.shut = self.refused = False
        self.handed: KernelFlow | None = None

    @property
    def is_ours(self) -> bool:
        """Whether bytes are moved by us now, and not by the kernel alone."""
        return self.handed is None or self.handed.by_hand

    @property
    def takes_input(self) -> bool:
        """Whether we want to know what comes in."""
        return self.is_ours and (self.target.writable or not self.target.established)

    def rewatch(self) -> None:
        """Watch the sides for what concerns us now."""
        if not self.connection.closed:
            self.source.rewatch()
            self.target.rewatch()

    def pump(self) -> None:
        """Move bytes until one of the sides has to be waited for, or others should have their turn."""
        if self.shut or self.connection.closed:
            return
        try:
            if self.handed is not None:
                self.handed.advance()
                return
            for _ in range(_BUDGET):
                if not (self._empty() and self._fill()):
                    self.offer()
                    return
            self.connection.account.later(self.pump)
        except OSError:
            self.connection.reset()

    def offer(self) -> None:
        """Hand the flow to the kernel, if that is wanted, worth it and possible now: with nothing half read."""
        sockmap = self.connection.sockmap
        if sockmap is None or self.refused or self.calm < sockmap.after:
            return
        source, target = self.source, self.target
        if self.held or self.eof or self.copies or (self.passed and source.readable):
            return
        if source.ended or not (source.established and target.established):
            return
        self._give_back()
        try:
            self.handed = KernelFlow(sockmap, self)
        except OSError:
            self.refused = True
            return
        self.rewatch()
        self.handed.start()

    def _empty(self) -> bool:
        """Bring what the pipe holds to the target. False where that has to wait."""
        target, pipe = self.target, self.pipe
        while self.held:
            if not target.writable:
                return False
            assert pipe is not None
            try:
                self.held -= os.splice(pipe.read, target.fd, self.held)
            except BlockingIOError:
                self.block()
                return False
        return True

    def block(self) -> None:
        """The target takes no more for now."""
        self.target.writable = False
        self.source.rewatch()

    def _fill(self) -> bool:
        """Take what the source has. False where there is nothing (yet, or any more)."""
        if self.eof:
            self.end()
            return False
        source = self.source
        if not source.readable or not self.target.established:
            self._give_back()
            return False
        pipe = self.pipe
        if pipe is None and not self.copies:
            pipe = self.pipe = self.connection.account.take_pipe()
        if pipe is None or self.copies:
            self._give_back()
            return self._copy()
        try:
            got = os.splice(source.fd, pipe.write, PIPE_BYTES)
        except BlockingIOError:
            source.readable = False
            self._give_back()
            return False
        if got == 0:
            self.eof = True
            return True
        self.held = got
        self.passed += got
        if got <= _SMALL:
            self.calm += 1
        else:
            self.calm = 0
            self.connection.loop.bulk = True
        if got < pipe.slots:
            # Each slot holds a byte or more: the pipe was not full, so the source's queue was emptied. What comes
            # next comes with an event, if anything does. Saves a call for each small message.
            source.readable = False
            self.eof = source.ended
        return True

    def _copy(self) -> bool:
        """Without a pipe: bytes leave the source's queue once the target has them."""
        source, target = self.source, self.target
        if not target.writable:
            return False
        buffer = self.connection.loop.buffer
        try:
            got = source.sock.recv_into(buffer, _COPY_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            source.readable = False
            return False
        if got == 0:
            self.eof = True
            return True
        try:
            sent = target.sock.send(buffer[:got])
        except BlockingIOError:
            self.block()
            return False
        self.passed += sent
        while sent:
            sent -= source.sock.recv_into(buffer, sent)
        return True

    def end(self) -> None:
        """The source ended, and the target has it all: hand the end on, once the target is there to take it."""
        if not self.target.established or self.connection.failing:
            return
        self._give_back()
        self.shut = True
        if not self.target.outward.shut:  # else both are closed now, which tells it too
            self.target.sock.shutdown(socket.SHUT_WR)
        self.connection.finish()

    def _give_back(self) -> None:
        if self.pipe is not None:
            self.connection.account.give_pipe(self.pipe)
            self.pipe = None

    def abandon(self) -> None:
        """Let go of the pipe, with whatever is in it, and of what the kernel was given."""
        if self.handed is not None:
            self.handed.forget()
        if self.pipe is None:
            return
        if self.held:
            self.connection.account.drop_pipe(self.pipe)
            self.pipe = None
        else:
            self._give_back()


class Connection:
    """Two sockets that are one connection to their peers.

    ``owner`` keeps it in ``connections`` while it lives, and ``account``, which admitted it, until it is closed.
    """

    __slots__ = ("account", "closed", "failing", "far", "loop", "near", "owner", "sockmap")

    def __init__(
        self,
        account: Account,
        owner: set[Connection],
        near: socket.socket,
        far: socket.socket,
        sockmap: Sockmap | None = None,
    ) -> None:
        """``near`` is accepted, ``far`` on its way to be connected; both were prepared, and never block.

        ``sockmap`` is the relay in the kernel, None to have splice(2).
        """
        self.account, self.loop, self.owner, self.sockmap = account, account.loop, owner, sockmap
        self.closed = self.failing = False
        self.near, self.far = Side(self, near, True), Side(self, far, False)
        self.near.outward = self.far.inward = Flow(self, self.near, self.far)
        self.far.outward = self.near.inward = Flow(self, self.far, self.near)
        owner.add(self)
        account.connections[self] = None
        try:
            for side in (self.far, self.near):
                account.watch(side.fd, side.watched, side.on_event)
        except OSError:  # more than one user may watch (epoll(7), max_user_watches)
            self.reset()

    def fail(self, side: Side) -> None:
        """``side`` has an error: its peer reset it, or never answered. What it sent before is still brought over."""
        side.readable = self.failing = True  # and no end is handed on any more, only bytes
        flow = side.outward
        if flow.handed is not None and not flow.shut:
            flow.handed.fail()
            return
        for _ in range(_LAST_PUMPS if side.established else 0):
            flow.pump()
        self.reset()

    def finish(self) -> None:
        """Close gently, where both directions have ended."""
        if self.closed or not (self.near.outward.shut and self.near.inward.shut):
            return
        for side in (self.near, self.far):
            side.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_GENTLY)
        self._close()

    def reset(self) -> None:
        """Close so that both peers see a reset. Safe to repeat."""
        if not self.closed:
            self._close()

    def _close(self) -> None:
        self.closed = True
        self.near.outward.abandon()
        self.near.inward.abandon()
        self.owner.discard(self)
        del self.account.connections[self]
        self.account.dismiss()
        for side in (self.near, self.far):
            self.loop.close(side.sock)
            del side.outward, side.inward  # a ring of references would wait for the garbage collector
