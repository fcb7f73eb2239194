"""Paths of unix sockets, of endpoints on the host and in a container's rules, as an operator writes them.

The two are different things. An endpoint's path is the operator's: Graft opens it on the host. A rule's path is only
compared, byte by byte, with what a program passes to bind(2): it is never opened.

Source: unix(7).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from graft.errors import UsageError
from graft.model.address import shown

SCHEME = "unix:"
MAX_PATH = 107
"""Bytes of a path in struct sockaddr_un without the closing NUL: with a longer one no client could name it."""

DEFAULT_MODE = 0o660
UNIX_FAMILY = 1
"""In the maps' keys: GRAFT_UNIX of bpf/graft.h."""

_MODE = re.compile(r"0?[0-7]{3}", re.ASCII)
_OWNER = re.compile(r"[A-Za-z0-9_.-]{1,64}(:[A-Za-z0-9_.-]{1,64})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A socket on the host's file system. ``owner`` is USER[:GROUP] as the operator wrote it, None for none named."""

    path: str
    owner: str | None = None
    mode: int = DEFAULT_MODE

    @property
    def spec(self) -> str:
        """``unix:/run/app.sock``."""
        return SCHEME + self.path

    @property
    def folder(self) -> str:
        """The folder that it is in."""
        return os.path.dirname(self.path)

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return os.path.basename(self.path)


def is_unix(text: str) -> bool:
    """Whether an operator means a unix socket by ``text``."""
    return text.startswith(SCHEME)


def parse_path(text: str, field: str = "address") -> str:
    """The path in ``unix:/PATH``: absolute, without empty parts, ``.`` and ``..``, and short enough for a client."""
    path = text.removeprefix(SCHEME)
    hint = "unix:/PATH, such as unix:/run/app.sock"
    if not path.startswith("/"):
        raise UsageError(f"{field}: {shown(text)} is not an absolute path", hint)
    size = len(os.fsencode(path)) if _is_encodable(path) else 0
    if not size or not path.isprintable():
        raise UsageError(f"{field}: {shown(text)} has characters that a path should not have", hint)
    if size > MAX_PATH:
        raise UsageError(f"{field}: the path has {size} bytes", f"at most {MAX_PATH}, as for every unix socket")
    if any(part in ("", ".", "..") for part in path.split("/")[1:]):
        raise UsageError(f"{field}: {shown(text)} is not a plain path", "without //, /./ and /../, or a / at its end")
    return path


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_owner(text: str, field: str = "owner") -> str:
    """``USER`` or ``USER:GROUP``, names or numbers. Whether there is such a user is not checked here."""
    if not _OWNER.fullmatch(text):
        raise UsageError(f"{field}: {shown(text)} is not an owner", "USER or USER:GROUP, names or numbers")
    return text


def parse_mode(text: str, field: str = "mode") -> int:
    """Permissions as three octal digits, with or without a zero before them."""
    if not _MODE.fullmatch(text):
        raise UsageError(f"{field}: {shown(text)} is not a mode", "three octal digits, such as 0660")
    return int(text, 8)


def parse_unix_socket(spec: str, owner: str | None = None, mode: str | None = None) -> UnixSocket:
    """The socket at ``spec`` (``unix:/PATH``). Raises UsageError that names the field: address, owner or mode."""
    return UnixSocket(
        path=parse_path(spec),
        owner=None if owner is None else parse_owner(owner),
        mode=DEFAULT_MODE if mode is None else parse_mode(mode),
    )


def path_key(path: bytes) -> bytes:
    """16 bytes that stand for a rule's path in the maps, where an address has no room for it: of its SHA-256."""
    from hashlib import sha256  # a library of megabytes, which only such rules need

    return sha256(path).digest()[:16]
