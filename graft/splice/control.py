"""How commands talk to the daemon: a unix socket of run_dir, root's only, one JSON object there and one back."""

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
_PATIENCE_SECONDS = 30.0


@contextlib.contextmanager
def address(settings: Settings) -> Iterator[str]:
    """A path of the socket that is short enough for struct sockaddr_un (unix(7)), however long run_dir is."""
    folder = os.open(settings.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{NAME}"
    finally:
        os.close(folder)


def listener(settings: Settings) -> socket.socket:
    """The daemon's end, in place of one that a daemon before left. Whoever calls holds the daemon's lock."""
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


def ask(settings: Settings, request: dict[str, Any], patience: float = _PATIENCE_SECONDS) -> dict[str, Any] | None:
    """The daemon's answer; None where no daemon runs. Raises GraftError with what the daemon could not do.

    ``patience``: seconds that it may take.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(patience)
        try:
            with address(settings) as path:
                sock.connect(path)
            sock.send(json.dumps(request).encode())
            answer = sock.recv(MAX_BYTES)
        except (FileNotFoundError, ConnectionError):
            return None
        except TimeoutError:
            raise GraftError("the daemon does not answer", f"see {settings.run_dir}/graftd.log") from None
    if not answer:
        return None
    return parse_answer(answer)


def parse_answer(raw: bytes) -> dict[str, Any]:
    """The daemon's answer. Raises GraftError with what it could not do, UsageError for what is no answer."""
    found = mapping(json_text.parse(raw, "the daemon's answer", MAX_BYTES), "the daemon's answer")
    if "error" in found:
        problem = printable(text(found["error"], "error"))
        raise GraftError(problem or "the daemon failed", text(found.get("hint"), "hint") or None)
    return found


def parse_request(raw: bytes) -> dict[str, Any]:
    """What a command asks of the daemon. Raises UsageError."""
    found = mapping(json_text.parse(raw, "request", MAX_BYTES), "request")
    known = {name: number(found.get(name), name, MAX_NUMBER) for name in ("container", "pid")}
    return found | known | {"do": text(found.get("do"), "do")}
