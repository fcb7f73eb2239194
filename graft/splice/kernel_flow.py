"""A flow that the kernel moves. User space still copies what the kernel leaves, and forwards the end of the stream.

                       the target is behind (an event)
        KERNEL ──────────────────────────────────────────▶ BEHIND: wait until the kernel's queue is empty,
          │  ▲                                                │     then copy, while the source has bytes
          │  └── all bytes that were left are copied, ────────┘
          │      and the kernel has their count
          │
          └── the source ended, and the target has been sent every byte that came ─▶ shutdown(SHUT_WR)

The kernel sends from a queue that cannot be looked into and that reports nothing. So before an end is forwarded, and
before a byte is copied, the bytes sent to the target are compared with the bytes received from the source; while there
are fewer, this is checked again a little later.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Protocol

from graft.kernel import tcp
from graft.splice.log import warn
from graft.splice.pipes import SLOW_BYTES
from graft.splice.resources import ContainerResources
from graft.splice.slow_calls import Blamed
from graft.splice.sockmap import Sockmap

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05  # seconds between two checks
STALL_SECONDS = 5.0  # without progress, though the peer takes data: then the connection is reset
_SAME_WAIT_SECONDS = 1.0  # checks further apart belong to different waits
_RESET_GRACE_SECONDS = 1.0  # to forward what a source sent before it was reset
_COPIES_PER_TURN = 4
_COPY_BYTES = 1 << 18
_WINDOW_BYTES = 1 << 20


class SideLike(Protocol):
    """connection.Side. ``blamed``, ``charged`` as for `EventLoop.blame` (outside.py). ``ended``: its peer has sent a
    FIN. ``dialled``: it was connected here, not accepted.
    """

    sock: socket.socket
    blamed: Blamed | None
    charged: Blamed | None
    ended: bool
    dialled: bool


class ConnectionLike(Protocol):
    """connection.Connection."""

    resources: ContainerResources

    @property
    def is_slow(self) -> bool:
        """Whether a call in its turns was slow lately."""

    def later(self, call: Callable[[], None]) -> None:
        """Make ``call`` in its turns."""

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Make ``call`` after that time, in its turns."""

    def reset(self) -> None:
        """Reset both sides."""


class FlowLike(Protocol):
    """connection.Flow. ``moved_before_handover`` is in bytes."""

    @property
    def source(self) -> SideLike:
        """The socket that bytes come from."""

    @property
    def target(self) -> SideLike:
        """The socket that they go to."""

    @property
    def connection(self) -> ConnectionLike:
        """The connection of which this is one direction."""

    moved_before_handover: int

    def pump(self) -> None:
        """Move what can be moved."""

    def update_events(self) -> None:
        """Watch both sockets for what is needed now."""

    def wait_for_target(self) -> None:
        """Note that the target is full."""

    def forward_end(self) -> None:
        """Forward the end of the stream."""


class KernelFlow:
    """Hands ``flow`` over to the kernel. Raises OSError where the kernel refuses it.

    ``copying``: bytes that the kernel left are being copied in user space.
    """

    __slots__ = (
        "_behind",
        "_check_scheduled",
        "_cookie",
        "_copied",
        "_counted",
        "_deadline",
        "_flow",
        "_last_check",
        "_last_progress",
        "_last_sent",
        "_moved_before",
        "_pause",
        "_sockmap",
        "_uncopied",
        "copying",
    )

    def __init__(self, sockmap: Sockmap, flow: FlowLike) -> None:
        self._sockmap, self._flow = sockmap, flow
        self._moved_before = flow.moved_before_handover
        self._copied = self._counted = 0
        self._uncopied = memoryview(b"")
        self._behind = self.copying = self._check_scheduled = False
        self._deadline = 0.0
        self._pause = _FIRST_PAUSE
        self._last_sent, self._last_progress, self._last_check = -1, 0.0, 0.0
        self._cookie = sockmap.add(flow.source.sock, flow.target.sock, self.fell_behind)

    def start(self) -> None:
        """Have the kernel move what came before the handover too.

        This also enlarges the receive buffer. No program reads from this socket, and it is reading that announces a
        larger window. A segment that comes while the kernel has the socket locked to send counts twice for a moment,
        and in a small buffer closes the window, which opens only when the sender probes it, after 200 ms.
        """
        start, source = time.monotonic(), self._flow.source
        tcp.enlarge_receive_buffer(source.sock, _WINDOW_BYTES)
        self._flow.connection.resources.loop.blame(start, source.charged)

    def take_moved(self) -> int:
        """How many bytes were moved since the last call: by the kernel, and by copying what it left."""
        before, self._counted = self._counted, self._sockmap.counts(self._cookie)[0] + self._copied
        return self._counted - before

    def forget(self) -> None:
        """Remove the flow from the maps, before its sockets are closed."""
        self._sockmap.forget(self._cookie)

    def fell_behind(self) -> None:
        """The kernel left bytes with the source."""
        if not self._behind:
            self._behind = True
            self._flow.connection.later(self._flow.pump)

    def fail(self) -> None:
        """The source was reset: what it sent before is still forwarded, then the target is reset too."""
        self._deadline = self._deadline or time.monotonic() + _RESET_GRACE_SECONDS
        self._flow.pump()

    def advance(self) -> None:
        """Copy, forward the end, or check again later. Raises OSError where a side fails, or the kernel lost bytes."""
        if self._behind and not self._catch_up():
            return
        if self._deadline:
            self._reset_when_sent()
        elif self._flow.source.ended:
            self._forward_end()

    def _sent(self) -> int:
        """All bytes that were sent to the target: before the handover, by the kernel, and by copying."""
        target = self._flow.target
        return tcp.written(target.sock) - target.dialled

    def kernel_queue_is_empty(self) -> bool:
        """Whether the target was sent everything that the kernel took from the source."""
        moved, _ = self._sockmap.counts(self._cookie)
        return self._sent() == self._moved_before + moved + self._copied

    def _catch_up(self) -> bool:
        """Copy what the kernel left. True when nothing is left, and the kernel moves the flow again."""
        if not self.copying:
            if not self.kernel_queue_is_empty():
                self._check_later()
                return False
            self.copying = True
            self._flow.update_events()
        if not self._copy():
            return False
        self._behind = self.copying = False
        self._pause = _FIRST_PAUSE
        self._flow.update_events()
        return True

    def _copy(self) -> bool:
        """Copy what was left with the source. False where the target is full, or the turn is over."""
        source, target = self._flow.source, self._flow.target
        limit = SLOW_BYTES if self._flow.connection.is_slow else _COPY_BYTES
        loop = self._flow.connection.resources.loop
        for _ in range(_COPIES_PER_TURN):
            if not self._uncopied:
                start = time.monotonic()
                try:
                    self._uncopied = memoryview(source.sock.recv(limit))
                except BlockingIOError:
                    pass
                loop.blame(start, source.charged)
                if not self._uncopied:
                    return self._hand_back()
            start = time.monotonic()
            try:
                sent = target.sock.send(self._uncopied[:limit])
            except BlockingIOError:
                self._flow.wait_for_target()
                return False
            loop.blame(start, target.blamed)
            self._copied += sent
            self._uncopied = self._uncopied[sent:]
            if loop.turn_is_over():
                break
        self._flow.connection.later(self._flow.pump)
        return False

    def _hand_back(self) -> bool:
        """Let the kernel move the flow again. False where it did, and has left bytes once more."""
        self._sockmap.report_copied(self._cookie, self._copied)
        # After this, a run of the BPF program that saw the old count has finished.
        tcp.received(self._flow.source.sock)
        _, left = self._sockmap.counts(self._cookie)
        if left == self._copied:
            return True
        # The kernel has moved bytes and left others. Those that it moved may still be in its queue, and have to be sent
        # before those that it left.
        self.copying = False
        self._check_later()
        return False

    def _forward_end(self) -> None:
        """Forward the end of the stream, if the target was sent all bytes before it."""
        source = self._flow.source
        if tcp.received(source.sock) - 1 == self._sent():
            self._flow.forward_end()
        else:
            start = time.monotonic()
            tcp.reprocess_received(source.sock)
            self._flow.connection.resources.loop.blame(start, source.charged)
            self._behind = self._sockmap.counts(self._cookie)[1] != self._copied  # there may be no event for it
            self._check_later()

    def _reset_when_sent(self) -> None:
        if self.kernel_queue_is_empty() or time.monotonic() > self._deadline:
            self._flow.connection.reset()
        else:
            self._check_later()

    def _check_later(self) -> None:
        if self._check_scheduled:
            return
        self._check_progress()
        self._check_scheduled = True
        self._flow.connection.after(self._pause, self._check_again)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _check_again(self) -> None:
        self._check_scheduled = False
        self._flow.pump()

    def _check_progress(self) -> None:
        """Raise OSError where the kernel has bytes and does not send them, though it could: they are lost."""
        sent, now = self._sent(), time.monotonic()
        waiting, self._last_check = now - self._last_check < _SAME_WAIT_SECONDS, now
        if sent != self._last_sent or not waiting:
            self._last_sent, self._last_progress = sent, now
        elif now - self._last_progress > STALL_SECONDS and not tcp.unsent(self._flow.target.sock):
            warn("the relay in the kernel does not send all bytes: a connection is reset")
            raise OSError("lost")
