"""One relayed connection: two sockets, and the bytes between them moved by splice(2) or by the kernel.

Theory of operation

    near ══ flow ═▶ pipe ═▶ far          Each direction is a flow of its own:
    near ◀═ pipe ◀═ flow ══ far
                                     ┌────────── data in the pipe, far side full: wait ──────────┐
                                     ▼                                                           │
      OPEN ── source ended (FIN) ─▶ DRAINING ── pipe empty ─▶ shutdown(SHUT_WR) ─▶ SHUT          │
        │                                                                            │           │
        └── error on either socket, anywhere ─▶ both sockets reset          both SHUT: closed ───┘

A flow reads from its source only when its pipe is empty, so that a slow reader stops its sender: a flow never has more
than one pipe of data. A flow has a pipe only while there is data in it. Where no pipe is left, and for urgent data,
which splice(2) does not pass, bytes are copied in user space, and stay in the source's queue until the target has them.

Sockets are watched edge-triggered, once, for everything: `readable` and `writable` are what the kernel reported last,
until a call finds otherwise. Every socket has SO_LINGER with time 0 from the start: if this process is killed, or a
connection fails, the peers see a reset, never an end of file in the middle. Only a connection that ended in both
directions is closed without a reset. Where the keeper has the sockets too (kept.py), closing them ends nothing: the end
is sent in both directions, and what fails is reset, before.

With the relay in the kernel, a flow is handed over (kernel_flow.py) after a few small messages, when there is nothing
more to read: for short connections that costs more than it saves, and splice(2) is better at bulk. If the kernel does
not take a flow, splice(2) continues. A side is then watched only for the events that user space still needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable

from graft.kernel import unix_rights
from graft.splice.copy_size import CopySize
from graft.splice.kept_records import CHECKED, COPYING
from graft.splice.kernel_flow import KernelFlow
from graft.splice.outside import OutsidePeer
from graft.splice.pipes import PIPE_BYTES, SLOW_BYTES, Pipe
from graft.splice.resources import ContainerResources
from graft.splice.slow_calls import Blamed
from graft.splice.sockmap import Sockmap

_END_EVENTS = select.EPOLLRDHUP | select.EPOLLHUP
_INPUT_EVENTS = select.EPOLLIN | select.EPOLLPRI | _END_EVENTS
_BASE_EVENTS = select.EPOLLRDHUP | select.EPOLLET
_DATA_EVENTS = select.EPOLLIN | select.EPOLLPRI  # each packet is an event for a socket that is watched for one of these

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CLOSE_WITHOUT_RESET = struct.pack("ii", 0, 0)
_PIPES_PER_TURN = 2
_ERROR_SECONDS = 0.02  # for what a side sent before its error
_MOVES_AFTER_ERROR = 8  # for what a side sent before its error: together more than its queue can have (tcp_rmem)
_COPY_BYTES = 65536
_SMALL_BYTES = 16384  # a read of no more than this is a small message


def set_relay_options(sock: socket.socket) -> None:
    """Set the options of relayed sockets. An accepted socket inherits them from its listener (tcp(7), socket(7))."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


class Side:
    """One of the two sockets, and its state as the kernel reported it last.

    ``flow_from`` is the flow whose source it is, ``flow_to`` the one whose target it is.
    """

    __slots__ = (
        "blamed",
        "charged",
        "connection",
        "dialled",
        "ended",
        "established",
        "fd",
        "flow_from",
        "flow_to",
        "is_unix",
        "may_get_descriptors",
        "readable",
        "sock",
        "watched_events",
        "writable",
    )

    __deletable__ = ("flow_to", "flow_from")  # mypyc asks for it

    flow_to: Flow
    flow_from: Flow

    def __init__(self, connection: Connection, sock: socket.socket, established: bool) -> None:
        self.connection = connection
        self.blamed: Blamed | None = None
        self.charged: Blamed | None = None
        self.sock = sock
        self.fd = sock.fileno()
        self.is_unix = sock.family == socket.AF_UNIX
        if self.is_unix:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # else a byte is dropped, and what comes with it
        self.may_get_descriptors = self.is_unix and not unix_rights.refused_by_kernel()
        self.established = self.writable = established
        self.dialled = not established
        self.readable = False
        self.ended = False
        self.watched_events = _BASE_EVENTS | _DATA_EVENTS | select.EPOLLOUT

    def update_events(self) -> None:
        """Watch the socket for what is needed: no input while the target is full, or while the kernel moves it."""
        wanted = _BASE_EVENTS
        if self.flow_from.wants_input:
            wanted |= _DATA_EVENTS
        if self.flow_to.in_user_space:
            wanted |= select.EPOLLOUT
        if wanted != self.watched_events:
            self.watched_events = wanted
            self.connection.loop.change(self.fd, wanted)

    def on_event(self, mask: int) -> None:
        """Note what epoll reports, and move what can be moved."""
        connection = self.connection
        if connection.closed:
            return
        if mask & select.EPOLLERR:
            connection.fail(self)
            return
        if not self.writable and mask & select.EPOLLOUT:
            self._on_writable()
        if mask & _INPUT_EVENTS and not connection.closed:
            self.readable = True
            if mask & _END_EVENTS:
                self.ended = True
            if mask & select.EPOLLPRI:
                self.flow_from.urgent = True
            self.flow_from.pump()

    def _on_writable(self) -> None:
        """The send queue has room again; the first time, this means that the socket is connected."""
        self.writable = True
        self.flow_to.source.update_events()
        if not self.established:
            if not self._is_whose_it_should_be():
                self.connection.reset()
                return
            self.established = True
            self.connection.note(CHECKED)
            self.flow_to.try_handover()
            self.flow_from.try_handover()
        flow = self.flow_to
        if flow.in_pipe or flow.eof or flow.source.readable or flow.kernel_flow is not None:
            flow.pump()

    def _is_whose_it_should_be(self) -> bool:
        check = self.connection.check_far
        try:
            return check is None or check(self.sock)
        except OSError:
            return False


class Flow:
    """One direction."""

    __slots__ = (
        "connection",
        "copy_size",
        "eof",
        "in_pipe",
        "is_out",
        "kernel_flow",
        "kernel_refused",
        "moved_before_handover",
        "notes",
        "notes_at",
        "pipe",
        "shut",
        "small_reads",
        "source",
        "target",
        "urgent",
    )

    def __init__(self, connection: Connection, source: Side, target: Side, is_out: bool) -> None:
        """``is_out``: it comes from the container."""
        self.connection, self.is_out = connection, is_out
        self.notes, self.notes_at = connection.pipe_notes(0 if source is connection.near else 1)
        """Where to note which pipe it has."""
        self.source, self.target = source, target
        self.copy_size = CopySize(_COPY_BYTES)
        self.pipe: Pipe | None = None
        self.in_pipe = self.moved_before_handover = self.small_reads = 0
        self.urgent = self.eof = self.shut = self.kernel_refused = False
        self.kernel_flow: KernelFlow | None = None

    @property
    def in_user_space(self) -> bool:
        """Whether bytes are moved by this process now, and not by the kernel alone."""
        return self.kernel_flow is None or self.kernel_flow.copying

    @property
    def wants_input(self) -> bool:
        """Whether events are needed for data at the source."""
        return self.in_user_space and (self.target.writable or not self.target.established)

    def update_events(self) -> None:
        """Watch both sockets for what is needed now."""
        if not self.connection.closed:
            self.source.update_events()
            self.target.update_events()

    def pump(self) -> None:
        """Move bytes until one of the sides has to be waited for, or the turn is over."""
        if self.shut or self.connection.closed:
            return
        try:
            if self.kernel_flow is not None:
                self.kernel_flow.advance()
                return
            for _ in range(_PIPES_PER_TURN):
                if not self._move():
                    self.try_handover()
                    return
                if self.connection.loop.turn_is_over():
                    break
            self.connection.later(self.pump)
        except OSError:
            self.connection.reset()

    def _move(self) -> bool:
        """Move once what is there. False where one of the sides has to be waited for."""
        return self._drain_pipe() and (bool(self.in_pipe) or self._read_source())

    def move_after_error(self) -> None:
        """Move what the source has sent, though it failed."""
        until = time.monotonic() + _ERROR_SECONDS
        for _ in range(_MOVES_AFTER_ERROR):
            if self.shut or self.connection.closed or time.monotonic() > until or not self._move():
                return

    def try_handover(self) -> None:
        """Hand the flow over to the kernel, if that is wanted and worthwhile, and no data is half read."""
        sockmap = self.connection.sockmap
        if sockmap is None or self.kernel_refused or self.small_reads < sockmap.after:
            return
        source, target = self.source, self.target
        if self.in_pipe or self.eof or self.urgent or (self.moved_before_handover and source.readable):
            return
        if source.ended or not (source.established and target.established):
            return
        self._return_pipe()
        if not self.connection.leave_keeper():
            return
        try:
            self.kernel_flow = KernelFlow(sockmap, self)
        except OSError:
            self.kernel_refused = True
            return
        self.update_events()
        self.kernel_flow.start()

    def _drain_pipe(self) -> bool:
        """Move what is in the pipe to the target, or as much as the turn allows. False where the target is full."""
        target, pipe = self.target, self.pipe
        while self.in_pipe:
            if not target.writable:
                return False
            assert pipe is not None
            start = time.monotonic()
            try:
                moved = os.splice(pipe.read, target.fd, self._limit(self.in_pipe))
            except BlockingIOError:
                self.wait_for_target()
                return False
            self.in_pipe -= moved
            self.connection.resources.traffic.add_bytes(self.is_out, moved)
            self.connection.loop.blame(start, target.blamed)
            if self.in_pipe and self.connection.loop.turn_is_over():
                break
        return True

    def _limit(self, count: int) -> int:
        """How many of so many bytes to move in one call."""
        if count > SLOW_BYTES and self.connection.is_slow:
            return SLOW_BYTES
        return count

    def wait_for_target(self) -> None:
        """Note that the target is full, and do not watch the source meanwhile."""
        self.target.writable = False
        self.source.update_events()

    def _read_source(self) -> bool:
        """Move what the source has into the pipe. False where it has nothing now, or has ended."""
        if self.eof:
            self.forward_end()
            return False
        source = self.source
        if not source.readable or not self.target.established:
            self._return_pipe()
            return False
        if source.may_get_descriptors:
            return self._copy()
        pipe = self.pipe
        if pipe is None and not self.urgent:
            pipe = self._take_pipe()
        if pipe is None or self.urgent:
            self._return_pipe()
            return self._copy()
        start = time.monotonic()
        try:
            got = os.splice(
                source.fd, pipe.write, self._limit(PIPE_BYTES) if self.connection.loop.slow_owners else PIPE_BYTES
            )
        except BlockingIOError:
            source.readable = False
            self._return_pipe()
            return False
        self.connection.loop.blame(start, source.blamed)
        if got == 0:
            self.eof = True
            return True
        self.in_pipe = got
        self.moved_before_handover += got
        if got <= _SMALL_BYTES:
            self.small_reads += 1
        else:
            self.small_reads = 0
            self.connection.loop.bulk = True
        if got < pipe.slots and not source.is_unix:
            # Each slot has a byte or more in it: the pipe was not full, so the source's queue is empty. New data, if
            # any, comes with an event. This saves a call for each small message. (A read of a unix socket also ends
            # before a byte that was sent as urgent.)
            source.readable = False
            self.eof = source.ended
        return True

    def _copy(self) -> bool:
        """Copy without a pipe: bytes are taken out of the source's queue once the target has them."""
        source, target = self.source, self.target
        if not target.writable:
            return False
        buffer, blame = self.connection.loop.buffer, self.connection.loop.blame
        start = time.monotonic()
        try:
            if source.may_get_descriptors:
                got = unix_rights.peek(source.sock, buffer)
            else:
                got = source.sock.recv_into(buffer, self.copy_size.bytes, socket.MSG_PEEK)
        except BlockingIOError:
            source.readable = False
            return False
        self.copy_size.note(got, time.monotonic() - start)
        blame(start, source.blamed)
        if got == 0:
            self.eof = True
            return True
        self.connection.note(COPYING)
        start = time.monotonic()
        try:
            sent = target.sock.send(buffer[:got])
        except BlockingIOError:
            self.connection.note(COPYING, False)
            self.wait_for_target()
            return False
        blame(start, target.blamed)
        self.moved_before_handover += sent
        self.connection.resources.traffic.add_bytes(self.is_out, sent)
        start = time.monotonic()
        while sent:
            sent -= source.sock.recv_into(buffer, sent)
        blame(start, source.blamed)
        self.connection.note(COPYING, False)
        return True

    def forward_end(self) -> None:
        """Forward the end of the stream: the source has ended, and the target has all its bytes."""
        if not self.target.established or self.connection.failing:
            return
        self._return_pipe()
        self.shut = True
        # Else both are closed now, which sends a FIN too.
        if self.connection.is_shared or not self.target.flow_from.shut:
            start = time.monotonic()
            self._shut_target()
            self.connection.loop.blame(start, self.target.blamed)
        self.connection.finish()

    def _shut_target(self) -> None:
        try:
            self.target.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            # The graftd before has done it already, and the peer has ended its direction too.
            if error.errno != errno.ENOTCONN or not self.connection.is_resumed:
                raise

    def _take_pipe(self) -> Pipe | None:
        pipe = self.pipe = self.connection.resources.take_pipe()
        if pipe is not None:
            self.notes[self.notes_at] = pipe.inode  # before there is anything in it
        return pipe

    def continue_with(self, pipe: Pipe) -> None:
        """Continue with a pipe that the graftd before has left, and what is in it."""
        self.pipe, self.in_pipe = pipe, pipe.filled
        self.connection.resources.pipes.take()
        if not self.in_pipe:
            self._return_pipe()

    def _return_pipe(self) -> None:
        if self.pipe is not None:
            self.notes[self.notes_at] = 0
            self.connection.resources.return_pipe(self.pipe)
            self.pipe = None

    def count_kernel_bytes(self) -> None:
        """Count what the kernel has moved since the last time."""
        if self.kernel_flow is not None:
            self.connection.resources.traffic.add_bytes(self.is_out, self.kernel_flow.take_moved())

    def release(self) -> None:
        """Release the pipe, with the data in it, and the flow in the kernel."""
        if self.kernel_flow is not None:
            self.count_kernel_bytes()
            self.kernel_flow.forget()
        if self.pipe is None:
            return
        if self.in_pipe:
            self.connection.resources.discard_pipe(self.pipe)
            self.pipe = None
        else:
            self._return_pipe()


class Connection:
    """Two sockets that are one connection to their peers.

    Until it is closed, it is in ``registry`` and in ``resources.connections``. The caller has reserved its descriptors.
    """

    __slots__ = (
        "check_far",
        "closed",
        "failing",
        "far",
        "is_resumed",
        "is_shared",
        "loop",
        "near",
        "outside",
        "registry",
        "resources",
        "slot",
        "sockmap",
    )

    def __init__(
        self,
        resources: ContainerResources,
        registry: set[Connection],
        near: socket.socket,
        far: socket.socket,
        sockmap: Sockmap | None = None,
        check_far: Callable[[socket.socket], bool] | None = None,
        outside: OutsidePeer | None = None,
        far_is_outside: bool = False,
        slot: int | None = None,
    ) -> None:
        """``near`` is accepted, ``far`` is connecting (or connected, by the graftd before); both are non-blocking and
        have the options of relayed sockets.

        ``sockmap`` is the relay in the kernel, None to relay by splice(2). ``check_far`` is called when ``far`` is
        connected: where it returns False, or raises OSError, the connection is reset. ``outside`` is the peer that is
        not in the container: of ``near``, or of ``far``. ``slot``: that of both sockets, if they outlive this process.
        """
        self.slot, self.is_shared, self.is_resumed = slot, slot is not None, False
        self.check_far = check_far
        self.resources, self.loop, self.registry, self.sockmap = resources, resources.loop, registry, sockmap
        self.closed = self.failing = False
        self.near, self.far = Side(self, near, True), Side(self, far, False)
        self.outside = outside or OutsidePeer(resources, "")
        self.outside.on_slow(self._on_slow)
        outer = self.far if far_is_outside else self.near
        outer.blamed, outer.charged = self.outside.count, self.outside.charge
        self.near.flow_from = self.far.flow_to = Flow(self, self.near, self.far, far_is_outside)
        self.far.flow_from = self.near.flow_to = Flow(self, self.far, self.near, not far_is_outside)
        registry.add(self)
        resources.connections[self] = None
        try:
            for side in (self.far, self.near):
                self.loop.watch(side.fd, side.watched_events, side.on_event, self.outside.owner)
        except OSError:  # this user has too many watches (epoll(7), max_user_watches)
            self.reset()

    def note(self, flag: int, on: bool = True) -> None:
        """Note something for the graftd that may continue with it."""
        if self.slot is not None:
            self.resources.daemon.kept.note(self.slot, flag, on)

    def pipe_notes(self, direction: int) -> tuple[memoryview | list[int], int]:
        """Where to note the pipe of a flow: `Kept.pipe_notes`."""
        return self.resources.daemon.kept.pipe_notes(self.slot, direction)

    def leave_keeper(self) -> bool:
        """From now on it ends with this process, because the kernel moves its bytes. False: that cannot be said now."""
        kept = self.resources.daemon.kept
        if self.slot is not None:
            kept.drop(self.slot)
            self.slot = None
            for flow in (self.near.flow_from, self.near.flow_to):
                flow.notes, flow.notes_at = self.pipe_notes(0)
        return kept.store.has_sent_all

    def resume(self, pipes: tuple[Pipe | None, Pipe | None]) -> None:
        """Continue with one that another graftd began, and with what was in its pipes: from near, and to near. (That a
        socket is readable or writable, epoll says as soon as it is watched.)
        """
        self.is_resumed = True
        for flow, pipe in zip((self.near.flow_from, self.near.flow_to), pipes, strict=True):
            if pipe is not None:
                flow.continue_with(pipe)
            self.later(flow.pump)

    def count_kernel_bytes(self) -> None:
        """Count what the kernel has moved of it since the last time."""
        if not self.closed:
            self.near.flow_from.count_kernel_bytes()
            self.near.flow_to.count_kernel_bytes()

    @property
    def is_slow(self) -> bool:
        """Whether a call in these turns was slow lately."""
        return self.outside.owner in self.loop.slow_owners

    def later(self, call: Callable[[], None]) -> None:
        """`EventLoop.later`, in this connection's turns."""
        self.loop.later(call, self.outside.owner)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """`EventLoop.after`, in this connection's turns."""
        self.loop.after(seconds, call, self.outside.owner)

    def _on_slow(self, is_last: bool) -> None:
        """The peer outside was slow: from now on the connection has other turns; ``is_last``: it is reset there."""
        if not self.closed:
            for side in (self.near, self.far):
                self.loop.set_owner(side.fd, self.outside.owner)
            if is_last:
                self.later(self.reset)

    def fail(self, side: Side) -> None:
        """``side`` has an error: its peer reset it, or never answered. What it sent before is still forwarded."""
        side.readable = self.failing = True  # from now on bytes are forwarded, but no end of stream
        flow = side.flow_from
        if flow.kernel_flow is not None and not flow.shut:
            flow.kernel_flow.fail()
            return
        if side.established:
            with contextlib.suppress(OSError):
                flow.move_after_error()
        self.reset()

    def finish(self) -> None:
        """Close without a reset, if both directions have ended."""
        if self.closed or not (self.near.flow_from.shut and self.near.flow_to.shut):
            return
        for side in (self.near, self.far):
            side.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_WITHOUT_RESET)
        self._close()

    def reset(self) -> None:
        """Close so that both peers see a reset. Safe to repeat."""
        if not self.closed:
            self._close(ends=self.is_shared)

    def _close(self, ends: bool = False) -> None:
        self.closed = True
        self.leave_keeper()
        self.near.flow_from.release()
        self.near.flow_to.release()
        self.registry.discard(self)
        del self.resources.connections[self]
        self.resources.release_connection()
        self.outside.close()
        for side in (self.near, self.far):
            self.loop.close(side.sock, self.outside.owner, side.blamed, ends)
            del side.flow_from, side.flow_to  # else these reference cycles stay until the garbage collector runs
