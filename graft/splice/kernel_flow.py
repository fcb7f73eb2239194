"""A flow in the kernel's hands: what is left for user space is to catch up, and to hand on the end.

                       the target is behind (an event)
        KERNEL ──────────────────────────────────────────▶ BEHIND: wait until the kernel's queue is out
          │  ▲                                                │
          │  └── all that was left is carried, ───────────────┘ then by hand, as long as bytes are left
          │      and the kernel is told so                      with the source
          │
          └── the source ended, and the target has been given every byte that came ─▶ shutdown(SHUT_WR)

The kernel sends on from a queue that nobody can look into or be told of. So before an end is handed on, and before a
byte is carried by hand, what the target was given is compared with what the source brought, by the byte; where it
is less, that is asked again a little later.
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Protocol

from graft.kernel import tcp
from graft.splice.resources import Account
from graft.splice.sockmap import Sockmap

_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05  # seconds between two looks
_PATIENCE = 5.0  # seconds in which a queue that no peer holds up must have moved
_ONE_WAIT = 1.0  # seconds: two looks further apart belong to two waits
_LAST_WORDS = 1.0  # seconds for what a source sent before it was reset
_BUDGET = 4  # pieces by hand, before others have their turn
_COPY_BYTES = 1 << 18
_WINDOW_BYTES = 1 << 20


class End(Protocol):
    """One of the two sockets (connection.Side). ``ended``: no more comes. ``dialled``: it was made by us."""

    sock: socket.socket
    ended: bool
    dialled: bool


class Relayed(Protocol):
    """The connection of a flow (connection.Connection)."""

    account: Account

    def reset(self) -> None:
        """Reset both sides."""


class Direction(Protocol):
    """A flow as it is handed over (connection.Flow). ``passed``: bytes that were moved before."""

    @property
    def source(self) -> End:
        """Where bytes come from."""

    @property
    def target(self) -> End:
        """Where they go."""

    @property
    def connection(self) -> Relayed:
        """Whose direction it is."""

    passed: int

    def pump(self) -> None:
        """Move what can be moved."""

    def rewatch(self) -> None:
        """Have the sockets watched for what concerns us now."""

    def block(self) -> None:
        """Wait until the target takes more."""

    def end(self) -> None:
        """Hand on the end of the stream."""


class KernelFlow:
    """The kernel moves what ``flow`` brings. Raises OSError where it does not take it."""

    __slots__ = (
        "_armed",
        "_behind",
        "_deadline",
        "_flow",
        "_looked",
        "_number",
        "_passed",
        "_pause",
        "_rest",
        "_seen",
        "_since",
        "_sockmap",
        "_taken",
        "by_hand",
    )

    def __init__(self, sockmap: Sockmap, flow: Direction) -> None:
        self._sockmap, self._flow = sockmap, flow
        self._passed = flow.passed
        self._taken = 0
        self._rest = memoryview(b"")
        self._behind = self.by_hand = self._armed = False
        self._deadline = 0.0
        self._pause = _FIRST_PAUSE
        self._seen, self._since, self._looked = -1, 0.0, 0.0
        self._number = sockmap.join(flow.source.sock, flow.target.sock, self.fell_behind)

    def start(self) -> None:
        """Have what came before the handover moved too.

        Into a larger buffer from now on: nobody reads here, and it is readers that tell a sender of new room. A segment
        that comes while the kernel has the socket locked to send counts twice for a moment, and in a small buffer
        closes the window, which opens only when the sender asks, after 200 ms.
        """
        tcp.enlarge_receive_buffer(self._flow.source.sock, _WINDOW_BYTES)

    def forget(self) -> None:
        """The sockets are about to be closed."""
        self._sockmap.forget(self._number)

    def fell_behind(self) -> None:
        """The kernel left bytes with the source."""
        if not self._behind:
            self._behind = True
            self._flow.connection.account.later(self._flow.pump)

    def fail(self) -> None:
        """The source was reset: what it sent before is still brought over, then the target is reset too."""
        self._deadline = self._deadline or time.monotonic() + _LAST_WORDS
        self._flow.pump()

    def advance(self) -> None:
        """Do what can be done now. Raises OSError where a side fails, or the kernel lost bytes."""
        if self._behind and not self._catch_up():
            return
        if self._deadline:
            self._give_up()
        elif self._flow.source.ended:
            self._end()

    def _given(self) -> int:
        """Bytes that the target was given in all: before the handover, by the kernel, and by hand."""
        target = self._flow.target
        return tcp.written(target.sock) - target.dialled

    def _queue_is_out(self) -> bool:
        moved, _ = self._sockmap.counts(self._number)
        return self._given() == self._passed + moved + self._taken

    def _catch_up(self) -> bool:
        """Whether nothing is left with the source any more, and the kernel goes on."""
        if not self.by_hand:
            if not self._queue_is_out():
                self._look_later()
                return False
            self.by_hand = True
            self._flow.rewatch()
        if not self._carry():
            return False
        self._behind = self.by_hand = False
        self._pause = _FIRST_PAUSE
        self._flow.rewatch()
        return True

    def _carry(self) -> bool:
        """Bring over what was left with the source. False where that has to wait, or goes on later."""
        source, target = self._flow.source, self._flow.target
        for _ in range(_BUDGET):
            if not self._rest:
                try:
                    self._rest = memoryview(source.sock.recv(_COPY_BYTES))
                except BlockingIOError:
                    pass
                if not self._rest:
                    return self._all_is_carried()
            try:
                sent = target.sock.send(self._rest)
            except BlockingIOError:
                self._flow.block()
                return False
            self._taken += sent
            self._rest = self._rest[sent:]
        self._flow.connection.account.later(self._flow.pump)
        return False

    def _all_is_carried(self) -> bool:
        self._sockmap.take(self._number, self._taken)
        tcp.received(self._flow.source.sock)  # a program at work just now, which saw the old number, is done after this
        _, left = self._sockmap.counts(self._number)
        if left == self._taken:
            return True
        # The kernel went on, and fell behind once more: what it moved meanwhile may still be in its queue, and
        # has to go before what it left.
        self.by_hand = False
        self._look_later()
        return False

    def _end(self) -> None:
        """Hand on the end of the stream, when the target was given all that came before it."""
        source = self._flow.source.sock
        if tcp.received(source) - 1 == self._given():
            self._flow.end()
        else:
            tcp.reprocess_received(source)
            self._behind = self._sockmap.counts(self._number)[1] != self._taken  # with or without an event
            self._look_later()

    def _give_up(self) -> None:
        if self._queue_is_out() or time.monotonic() > self._deadline:
            self._flow.connection.reset()
        else:
            self._look_later()

    def _look_later(self) -> None:
        if self._armed:
            return
        self._mind_progress()
        self._armed = True
        self._flow.connection.account.after(self._pause, self._again)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _again(self) -> None:
        self._armed = False
        self._flow.pump()

    def _mind_progress(self) -> None:
        """Nothing may hang: bytes that the kernel has, and does not bring out though it could, are lost."""
        given, now = self._given(), time.monotonic()
        waiting, self._looked = now - self._looked < _ONE_WAIT, now
        if given != self._seen or not waiting:
            self._seen, self._since = given, now
        elif now - self._since > _PATIENCE and not tcp.unsent(self._flow.target.sock):
            print("the kernel relay kept bytes back: a connection is reset", file=sys.stderr, flush=True)
            raise OSError("lost")
