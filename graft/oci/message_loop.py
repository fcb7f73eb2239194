"""An event loop: messages at sockets, cgroups that become empty, supervisors that die."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable

from graft.oci.state import Message, State, comes_from_root

MessageHandler = Callable[[Message, State], None]


class MessageLoop:
    """Calls a descriptor's callback when it is ready."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._messages: dict[int, Message] = {}

    def watch(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fd`` has one of ``events``."""
        self._callbacks[fd] = callback
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``."""
        if self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def receive(self, listening: socket.socket, handler: MessageHandler) -> None:
        """Call ``handler`` for each complete message that the host's root sends to ``listening``."""
        self.watch(listening.fileno(), select.POLLIN, lambda: self._accept(listening, handler))

    def _accept(self, listening: socket.socket, handler: MessageHandler) -> None:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        if not comes_from_root(connection):
            connection.close()
            return
        message = Message(connection)
        self._messages[message.fileno()] = message
        self.watch(message.fileno(), select.POLLIN, lambda: self._read(message, handler))

    def _read(self, message: Message, handler: MessageHandler) -> None:
        state = message.read()
        if state is None and not message.ended:
            return
        self.unwatch(message.fileno())
        del self._messages[message.fileno()]
        if state is not None:
            handler(message, state)
        message.close()

    def serve(self, check: Callable[[], bool]) -> None:
        """Serve until ``check`` gives True; it is called after each wake-up, also when a child has died."""
        wakeups = _wake_for_children()
        self.watch(wakeups, select.POLLIN, lambda: _drain(wakeups))
        while not check():
            for fd, _ in self._poll.poll():
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback()

    def close(self) -> None:
        """Close the open connections."""
        for message in self._messages.values():
            message.close()


def _wake_for_children() -> int:
    """A descriptor that becomes readable when a child has died."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _drain(fd: int) -> None:
    os.read(fd, 4096)
