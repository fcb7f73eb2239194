"""A container's state, as a runtime gives it to a hook, and sends it with the descriptor of a seccomp listener.

Sources: runtime-spec, runtime.md (State) and config-linux.md (Container Process State). Pure except for the
descriptors of a message.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

from graft.errors import UsageError
from graft.kernel.pidfd import MAX_PID
from graft.kernel.seccomp import is_listener
from graft.model import json_text
from graft.model.json_text import mapping, number, text, text_by_name, texts

_MAX_BYTES = 1 << 20
_MAX_PIECES = 256  # of one message: after each of them it is checked whether the message is complete
_MAX_DESCRIPTORS = 16
_SECCOMP = "seccompFd"
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid (unix(7))


@dataclass(frozen=True, slots=True)
class State:
    """A container, and the process that the message is about: its first one, or one of `exec`.

    ``pid`` is 0 where the runtime does not give it (crun does not for an `exec`). ``metadata`` is of the listener.
    """

    id: str
    pid: int
    bundle: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    descriptors: tuple[str, ...] = ()
    metadata: str = ""


def parse(raw: bytes) -> State:
    """The state in ``raw``, in either format. Raises ValueError for an invalid or incomplete one."""
    try:
        return _state(json_text.parse(raw, "state", _MAX_BYTES))
    except UsageError as error:
        raise ValueError(error.message) from None


def _state(value: Any) -> State:
    whole = mapping(value, "state")
    state = mapping(whole.get("state"), "state.state") or whole
    container_id = text(state.get("id"), "state.id")
    if not container_id:
        raise ValueError("a state without an id")
    pid = number(whole.get("pid"), "state.pid", MAX_PID) or number(state.get("pid"), "state.state.pid", MAX_PID)
    return State(
        container_id,
        pid,
        json_text.path(state.get("bundle"), "state.bundle"),
        text_by_name(state.get("annotations"), "state.annotations"),
        tuple(texts(whole.get("fds"), "state.fds")),
        text(whole.get("metadata"), "state.metadata"),
    )


class Message:
    """One connection's message, read in pieces: a runtime may connect long before it has a descriptor to send."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._raw = b""
        self._pieces = 0
        self._descriptors: list[int] = []
        self.ended = False

    @property
    def sender(self) -> int:
        """The process that has connected."""
        return _peer(self.connection)[0]

    def fileno(self) -> int:
        """For poll()."""
        return self.connection.fileno()

    def read(self) -> State | None:
        """Read what has arrived; gives the state when it is complete. Sets ``ended`` when nothing more is accepted."""
        try:
            data, fds, _, _ = socket.recv_fds(self.connection, 65536, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError:
            data, fds = b"", []
        self._descriptors += fds
        self._raw += data
        self._pieces += 1
        self.ended = not data or len(self._raw) > _MAX_BYTES or self._pieces >= _MAX_PIECES
        if not self._raw.rstrip().endswith(b"}"):
            return None
        try:
            return parse(self._raw)
        except ValueError:
            return None

    def take_listener(self, state: State) -> int | None:
        """The descriptor of the seccomp listener, for the caller to close. Others in the message are closed."""
        listener = None
        with contextlib.suppress(ValueError, IndexError):
            listener = self._descriptors.pop(state.descriptors.index(_SECCOMP))
        self._close_descriptors()
        if listener is not None and not is_listener(listener):
            os.close(listener)
            return None
        return listener

    def reply(self, text: bytes) -> None:
        """Answer, and close the connection."""
        with contextlib.suppress(OSError):
            self.connection.setblocking(True)
            self.connection.settimeout(5)
            self.connection.sendall(text)
        self.close()

    def close(self) -> None:
        """Close the connection, and the descriptors in the message."""
        self._close_descriptors()
        self.connection.close()

    def _close_descriptors(self) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = []


def comes_from_root(connection: socket.socket) -> bool:
    """Whether the peer is the host's root."""
    return _peer(connection)[1] == 0


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user that have connected, as the kernel knows them (SO_PEERCRED, unix(7))."""
    pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid
