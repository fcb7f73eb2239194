"""What a runtime says of a container: to a hook, and with the descriptor of a seccomp listener.

Sources: runtime-spec, runtime.md (State) and config-linux.md (Container Process State). Pure but for the
descriptors that come with a message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

_MAX_BYTES = 1 << 20
_MAX_DESCRIPTORS = 16
_SECCOMP = "seccompFd"
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid (unix(7))


@dataclass(frozen=True, slots=True)
class State:
    """A container, and the process that the message is about: its first one, or one of `exec`.

    ``pid`` is 0 where the runtime does not say it (crun does not for an `exec`).
    """

    id: str
    pid: int
    bundle: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    descriptors: tuple[str, ...] = ()


def parse(raw: bytes) -> State:
    """The state in ``raw``, in either form. Raises ValueError for what is neither, or not complete."""
    whole = json.loads(raw)
    if not isinstance(whole, dict):
        raise ValueError("no state of a container")
    state: dict[str, Any] = whole.get("state") or whole
    pid = whole.get("pid") or state.get("pid") or 0
    if not isinstance(pid, int) or pid < 0 or not isinstance(state.get("id"), str):
        raise ValueError("a state without an id")
    notes = state.get("annotations") or {}
    return State(
        state["id"],
        pid,
        str(state.get("bundle") or ""),
        {str(key): str(value) for key, value in notes.items()},
        tuple(whole.get("fds") or ()),
    )


class Message:
    """One connection's message, taken as it comes: a runtime may connect long before it has a descriptor to send."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._raw = b""
        self._held: list[int] = []
        self.ended = False

    def fileno(self) -> int:
        """For poll()."""
        return self.connection.fileno()

    def read(self) -> State | None:
        """Take what is there; the state as soon as it is whole. Sets ``ended`` when no more can come."""
        try:
            data, fds, _, _ = socket.recv_fds(self.connection, 65536, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError:
            data, fds = b"", []
        self._held += fds
        self._raw += data
        self.ended = not data or len(self._raw) > _MAX_BYTES
        try:
            return parse(self._raw)
        except ValueError:
            return None

    def take_listener(self, state: State) -> int | None:
        """The descriptor of the seccomp listener, now the caller's. Others that came are closed."""
        listener = None
        with contextlib.suppress(ValueError, IndexError):
            listener = self._held.pop(state.descriptors.index(_SECCOMP))
        self._drop()
        if listener is not None and "seccomp notify" not in os.readlink(f"/proc/self/fd/{listener}"):
            os.close(listener)
            return None
        return listener

    def reply(self, text: bytes) -> None:
        """Answer, and end the connection."""
        with contextlib.suppress(OSError):
            self.connection.setblocking(True)
            self.connection.settimeout(5)
            self.connection.sendall(text)
        self.close()

    def close(self) -> None:
        """End it, with whatever came."""
        self._drop()
        self.connection.close()

    def _drop(self) -> None:
        for fd in self._held:
            os.close(fd)
        self._held = []


def comes_from_root(connection: socket.socket) -> bool:
    """Whether the other end was opened by the host's root."""
    _pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid) == 0
