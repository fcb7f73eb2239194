"""How commands talk to the daemon: a unix socket in run_dir, for root only; one JSON object each way."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from graft.errors import GraftError
from graft.model import json_text
from graft.model.json_text import mapping, number, text
from graft.model.printable import printable
from graft.model.settings import Settings

NAME = "graftd.sock"
MAX_BYTES = 1 << 20
MAX_NUMBER = (1 << 32) - 1
TIMEOUT_SECONDS = 30.0


@contextlib.contextmanager
def address(settings: Settings) -> Iterator[str]:
    """A path of the socket that fits into struct sockaddr_un (unix(7)), however long run_dir is."""
    folder = os.open(settings.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{NAME}"
    finally:
        os.close(folder)


def listener(settings: Settings) -> socket.socket:
    """The daemon's end; replaces the socket of an earlier daemon. The caller must have the daemon's lock."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    (settings.run_dir / NAME).unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        with address(settings) as path:
            sock.bind(path)
    finally:
        os.umask(before)
    sock.listen(64)
    return sock


class NoAnswerError(GraftError):
    """The daemon has the request, and has not answered in time: what it waits for may be a container's doing."""


def ask(settings: Settings, request: dict[str, Any], timeout: float = TIMEOUT_SECONDS) -> dict[str, Any] | None:
    """The daemon's answer; None where no daemon runs. Raises GraftError with the daemon's error, NoAnswerError.

    ``timeout`` is in seconds.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(timeout)
        try:
            with address(settings) as path:
                sock.connect(path)
            sock.send(json.dumps(request).encode())
            answer = sock.recv(MAX_BYTES)
        except (FileNotFoundError, ConnectionError):
            return None
        except TimeoutError:
            raise NoAnswerError("the daemon does not answer", f"see {settings.run_dir}/graftd.log") from None
    if not answer:
        return None
    return parse_answer(answer)


def parse_answer(raw: bytes) -> dict[str, Any]:
    """The daemon's answer. Raises GraftError with the error in it, UsageError where it is not an answer."""
    found = mapping(json_text.parse(raw, "the daemon's answer", MAX_BYTES), "the daemon's answer")
    if "error" in found:
        problem = printable(text(found["error"], "error"))
        raise GraftError(problem or "the daemon failed", text(found.get("hint"), "hint") or None)
    return found


def parse_request(raw: bytes) -> dict[str, Any]:
    """A command's request to the daemon. Raises UsageError."""
    found = mapping(json_text.parse(raw, "request", MAX_BYTES), "request")
    known = {name: number(found.get(name), name, MAX_NUMBER) for name in ("container", "pid")}
    return found | known | {name: text(found.get(name), name) for name in ("do", "python")}
