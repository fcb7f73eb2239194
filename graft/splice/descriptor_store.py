"""graftd's end of the protocol with its keeper (graft/keeper/protocol.py): which of its descriptors must outlive it.

What cannot be sent now, because the keeper has not read what was sent before, waits here, in order. A descriptor that
is closed before it was sent is never sent.

A stored descriptor is open in two processes: `close` in one of them ends nothing. So who closes one ends it first, by a
call that does not wait for the keeper (`end` of graft/kernel/socket_calls.py), and then has the keeper close it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from graft.keeper import protocol
from graft.splice.event_loop import EventLoop
from graft.splice.log import warn

_SEND_BYTES = 1 << 20
_BARRIER_SECONDS = 1.0


def received(told: Mapping[str, str]) -> list[tuple[str, int]]:
    """The names and descriptors that this process was started with, none of which a program inherits that it executes.

    ``told``: the environment. Call it once, before anything else is opened.
    """
    found = protocol.listen_descriptors(told, os.getpid())
    folder = protocol.inherited_folder(told)
    for fd in [fd for fd, _ in found] + ([] if folder is None else [folder]):
        os.set_inheritable(fd, False)
    return [(name, fd) for fd, name in found]


def connected(told: Mapping[str, str]) -> socket.socket | None:
    """A socket that sends to the keeper, None where there is none: nothing outlives this process then."""
    address = told.get(protocol.NOTIFY_SOCKET, "")
    if not address.startswith(("/", "@")):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        sock.close()
        return None
    return sock


def _ignore() -> None:
    pass


class _Message:
    """One that waits: with a ``name``, it stores ``fds``. ``more``: others of that name were sent before. ``sent`` is
    called when it does not wait any more.
    """

    __slots__ = ("fds", "more", "name", "raw", "sent")

    def __init__(
        self,
        raw: bytes,
        name: str = "",
        fds: Sequence[int] = (),
        more: bool = False,
        sent: Callable[[], None] = _ignore,
    ) -> None:
        self.raw, self.name, self.fds, self.more, self.sent = raw, name, fds, more, sent


class DescriptorStore:
    """Sends by ``sock``, which never blocks, and is closed with this; None: there is no keeper, and nothing is sent."""

    def __init__(self, loop: EventLoop, sock: socket.socket | None = None) -> None:
        self._loop = loop
        self._sock: socket.socket | None = None
        self.is_kept = sock is not None
        """Whether there is a keeper, or will be again."""
        self._waiting: OrderedDict[_Message, None] = OrderedDict()
        self._unsent: dict[str, _Message] = {}
        """Those of the waiting that store something."""
        if sock is not None:
            self.continue_with(sock)

    def continue_with(self, sock: socket.socket) -> None:
        """Send to another keeper, which has nothing yet."""
        self.disconnect()
        self._sock = sock
        self._loop.watch(sock.fileno(), 0, self._on_writable)

    @property
    def has_sent_all(self) -> bool:
        """Whether the keeper was sent all that it is to be told."""
        return not self._waiting

    def put(self, name: str, fds: Sequence[int], more: bool = False) -> None:
        """Have the keeper open what ``fds`` are; they stay open here until then, or until `drop`. ``more``: beside
        others of that name.
        """
        if self._sock is None:
            return
        waiting = self._unsent.get(name)
        if waiting is not None:
            waiting.fds = [*waiting.fds, *fds]
            return
        raw = protocol.store(name)
        if self._waiting or not self._sent(raw, fds):
            self._unsent[name] = self._wait(_Message(raw, name, fds, more))

    def drop(self, name: str, sent: Callable[[], None] = _ignore) -> None:
        """Have the keeper close them. ``sent`` is called, now or later, when it has none of that name, or was sent
        that: from then on another graftd gets nothing of that name that was stored before.
        """
        message = self._unsent.pop(name, None)
        if message is not None:
            del self._waiting[message]
            if not message.more:
                sent()
                return
        if self._sock is not None:
            self._send(protocol.remove(name), (), sent)
        else:
            sent()

    def say(self, fields: Mapping[str, str], fds: Sequence[int] = ()) -> None:
        """Send another message."""
        if self._sock is not None:
            self._send(protocol.encode(fields), fds)

    def _send(self, raw: bytes, fds: Sequence[int] = (), sent: Callable[[], None] = _ignore) -> None:
        """At once, if nothing waits."""
        if self._waiting or not self._sent(raw, fds):
            self._wait(_Message(raw, "", fds, False, sent))
        else:
            sent()

    def _wait(self, message: _Message) -> _Message:
        """Send it when there is room."""
        if not self._waiting and self._sock is not None:
            self._loop.change(self._sock.fileno(), select.EPOLLOUT)
        self._waiting[message] = None
        return message

    def _sent(self, raw: bytes, fds: Sequence[int]) -> bool:
        """False: it has to wait."""
        assert self._sock is not None
        try:
            if fds:
                socket.send_fds(self._sock, [raw], fds)
            else:
                self._sock.send(raw)
        except BlockingIOError:
            return False
        except OSError as error:  # it has died: what it had open is closed
            if error.errno not in (errno.ECONNREFUSED, errno.ENOTCONN):
                warn(f"the keeper cannot be sent what is to outlive this graftd: {error.strerror}")
            self.disconnect()
        return True

    def _on_writable(self, _mask: int) -> None:
        while self._waiting and self._sock is not None:
            message = next(iter(self._waiting))
            if not self._sent(message.raw, message.fds):
                return
            if self._waiting.pop(message, message) is None:
                self._unsent.pop(message.name, None)
                message.sent()
        if self._sock is not None:
            self._loop.change(self._sock.fileno(), 0)

    def flush(self, seconds: float) -> bool:
        """Send all that waits, for so long at the most. Whether nothing waits any more."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        if self._sock is not None:
            poll.register(self._sock, select.POLLOUT)
        while self._waiting and self._sock is not None and time.monotonic() < deadline:
            poll.poll(10)
            self._on_writable(0)
        return not self._waiting

    def when_done(self, done: Callable[[], None]) -> None:
        """Call ``done`` when the keeper has done what it was told so far, or soon where it does not answer."""
        if self._sock is None:
            done()
            return
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ended = False

        def end(_mask: int = 0) -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._loop.unwatch(reader)
                os.close(reader)
                done()

        self._loop.watch(reader, 0, end)
        self._loop.after(_BARRIER_SECONDS, end)
        self._send(
            protocol.encode({protocol.BARRIER: "1"}), [writer], lambda: os.close(writer)
        )  # open until it is sent

    def close(self) -> None:
        """Send no more. Safe to repeat."""
        self.is_kept = False
        self.disconnect()

    def disconnect(self) -> None:
        """Send no more to this keeper. Safe to repeat."""
        if self._sock is not None:
            sock, self._sock = self._sock, None
            with contextlib.suppress(OSError):
                self._loop.unwatch(sock.fileno())
            sock.close()
        waited, self._waiting = self._waiting, OrderedDict()
        self._unsent.clear()
        for message in waited:
            message.sent()
