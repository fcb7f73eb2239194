"""The daemon's end of its control socket (control.py): receives requests, sends each answer when it is ready."""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
from collections.abc import Callable
from typing import Any

from graft.errors import GraftError
from graft.model.settings import Settings
from graft.splice import control
from graft.splice.event_loop import DAEMON, EventLoop
from graft.splice.kept import Kept
from graft.splice.kept_records import Kind

Reply = Callable[[dict[str, Any]], None]


def failure(error: BaseException) -> dict[str, Any]:
    """The answer that makes `control.ask` raise ``error`` at the other end."""
    if isinstance(error, GraftError):
        return {"error": error.message, "hint": error.hint}
    return {"error": str(error)}


def _send(sock: socket.socket, answer: dict[str, Any]) -> None:
    try:
        sock.send(json.dumps(answer).encode())
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        sock.send(json.dumps({"error": "the daemon's answer is too long", "hint": "net.core.wmem_max"}).encode())


class Commands:
    """Calls ``handle`` with each request and a function that answers it, to be called once, now or later."""

    def __init__(
        self, settings: Settings, loop: EventLoop, kept: Kept, handle: Callable[[dict[str, Any], Reply], None]
    ) -> None:
        self._settings, self._loop, self._handle, self._kept = settings, loop, handle, kept
        has_name = (settings.run_dir / control.NAME).exists()
        found = kept.take(Kind.CONTROL, 0, lambda _: has_name)
        kept.close_untaken(lambda found: found.record.kind is Kind.CONTROL)
        if found:  # commands wait in its queue
            self._listener: socket.socket = found[0].socks[0]
            self._slot: int | None = found[0].slot
        else:
            self._listener = control.listener(settings)
            self._slot = kept.add_listener(Kind.CONTROL, 0, self._listener, 0, b"")
        loop.watch(self._listener.fileno(), select.EPOLLIN, self._on_command)

    def _on_command(self, _mask: int) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, control.MAX_BYTES)
                self._loop.watch(sock.fileno(), select.EPOLLIN, lambda _mask: self._on_request(sock))
            except OSError:
                self._loop.close(sock, DAEMON)

    def _on_request(self, sock: socket.socket) -> None:
        self._loop.unwatch(sock.fileno())
        try:
            raw = sock.recv(control.MAX_BYTES)
        except OSError:
            raw = b""
        if not raw:  # the client closed it
            self._loop.close(sock, DAEMON)
            return

        def reply(answer: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):  # the client closed it
                _send(sock, answer)
            self._loop.close(sock, DAEMON)

        try:
            self._handle(control.parse_request(raw), reply)
        except (GraftError, OSError, ValueError) as error:
            reply(failure(error))

    def close(self) -> None:
        """Close the control socket."""
        (self._settings.run_dir / control.NAME).unlink(missing_ok=True)
        self._kept.end_listener(self._listener, self._slot)
        self._listener.close()
