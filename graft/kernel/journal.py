"""The journal of systemd, for processes whose standard error it is: entries with fields, by which one can search.

    journalctl -t graftd GRAFT_CONTAINER=web

Source: systemd.journal-fields(7), "Journal Export Formats" and "Native Journal Protocol" of systemd's documentation:
an entry is one datagram of lines NAME=VALUE; a value with a line break has its length before it, in 8 bytes.
JOURNAL_STREAM, which names the stream that standard error was connected to: systemd.exec(5).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from enum import IntEnum

from graft.model.printable import printable

STREAM = "JOURNAL_STREAM"
_SOCKET = "/run/systemd/journal/socket"
_UNITS = (".service", ".scope")


class Priority(IntEnum):
    """How bad it is: syslog(3)."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


def is_standard_error() -> bool:
    """Whether standard error is the journal's, and not redirected since the service manager connected it."""
    device, _, inode = os.environ.get(STREAM, "").partition(":")
    try:
        found = os.fstat(2)
        return (found.st_dev, found.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False


def encode(fields: Mapping[str, str]) -> bytes:
    """An entry as the journal takes it. Names are the caller's, values may be anybody's. Pure."""
    return b"".join(_field(name.encode(), value.encode(errors="backslashreplace")) for name, value in fields.items())


def _field(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return name + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name + b"=" + value + b"\n"


def container_fields(name: str, number: int) -> dict[str, str]:
    """The fields of an entry about a container."""
    return {"GRAFT_CONTAINER": name, "GRAFT_CONTAINER_ID": str(number)}


class Journal:
    """The journal, for the process that makes this, as long as it stays in its unit's cgroup, and afterwards.

    ``identifier``: as which it writes (`journalctl -t`).
    """

    def __init__(self, identifier: str) -> None:
        self._always = {"SYSLOG_IDENTIFIER": identifier, **_unit()}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def send(self, text: str, priority: Priority = Priority.INFO, fields: Mapping[str, str] | None = None) -> bool:
        """Write an entry. ``fields`` have names such as GRAFT_CONTAINER. False where the journal does not take it now.

        What is not plain is escaped, but for line breaks in ``text``: containers choose parts.
        """
        others = {name: printable(value) for name, value in (fields or {}).items()}
        message = "\n".join(printable(line) for line in text.split("\n"))
        entry = {"MESSAGE": message, "PRIORITY": str(int(priority)), **self._always, **others}
        try:
            self._socket.sendto(encode(entry), socket.MSG_DONTWAIT, _SOCKET)
        except OSError:  # no journal, a full one, an entry that is too big for a datagram
            return False
        return True


def of_standard_error(identifier: str) -> Journal | None:
    """The journal, if standard error is its."""
    return Journal(identifier) if is_standard_error() else None


def _unit() -> dict[str, str]:
    """The field by which `journalctl -u` finds what root's processes write for a unit whose cgroup they left."""
    try:
        with open("/proc/self/cgroup") as file:
            name = file.read().rstrip("\n").rpartition("/")[2]
    except OSError:
        return {}
    return {"OBJECT_SYSTEMD_UNIT": name} if name.endswith(_UNITS) else {}
