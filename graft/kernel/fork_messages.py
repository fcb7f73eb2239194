"""Messages between a fork server, its clients and its jobs: a JSON object and descriptors, over a unix socket.

Both ends are root's, and the socket is where only root can connect. Few imports: every `graft run` has this module.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct("=I")
MAX_BYTES = 32 << 20
"""Arguments and environment of a program have at most a quarter of its stack's limit, and JSON makes up to six bytes
of one.
"""
MAX_DESCRIPTORS = 8
HELLO, ASK = b"+", b"?"
"""What comes before any message. HELLO: somebody is there for this connection; ASK: so is the client; HELLO again. By
these each end knows who the other one is (graft/kernel/peers.py).
"""


def encode(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    raw = json.dumps(message).encode()
    return _LENGTH.pack(len(raw)) + raw


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a message with descriptors. Raises OSError."""
    send_encoded(sock, encode(message), fds)


def send_encoded(sock: socket.socket, raw: bytes, fds: Sequence[int] = ()) -> None:
    """Send what `encode` made, with descriptors. Raises OSError."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([raw], rights)
    if sent < len(raw):  # to send nothing would fail where the peer has read all, and has gone
        sock.sendall(memoryview(raw)[sent:])


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message, and its descriptors, which are close-on-exec. Raises EOFError, OSError, ValueError."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * fds.itemsize)
    head, ancillary, _, _ = sock.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if len(head) < _LENGTH.size:
        raise EOFError
    message = json.loads(_receive_exactly(sock, _LENGTH.unpack(head)[0]))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message, list(fds)


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    if count > MAX_BYTES:
        raise ValueError("the message is too long")
    raw = bytearray()
    while len(raw) < count:
        chunk = sock.recv(min(count - len(raw), 1 << 20))
        if not chunk:
            raise EOFError
        raw += chunk
    return bytes(raw)
