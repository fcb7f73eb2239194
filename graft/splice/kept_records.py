"""What graftd notes of the sockets that its keeper has open too, for the graftd that comes after it.

A memfd that the keeper has like them, shared by both: a graftd that is killed has written all that it did. It is a
table of slots of 64 bytes, one for a listener or a connection; the keeper knows their sockets by the slot's number. A
slot counts if its kind is set, which is written last, and if the sockets have the cookies in it. Whose a socket is and
where it leads to is not noted here, where the kernel itself says so (its tag, and what the hooks noted with it).

    kind flags family v6only port | container endpoint | near's cookie | far's cookie | address | pipe pipe | ...

A pipe is noted by its inode: it has a number, by which the keeper knows it, but the next pipe may get that.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import struct
from dataclasses import dataclass
from enum import IntEnum

_BYTES = 64
MAX_SLOTS = 11_500
"""The names of so many connections, and of their pipes, are one string (MAX_NAMES of graft/keeper/protocol.py)."""
FOR_LISTENERS = 1500
"""So many slots are not given to connections: they can be had by very many, and all by one container."""
_LAYOUT = struct.Struct("=BBBBHxxIIQQ16s")
_PIPES_AT = _LAYOUT.size
_FAR = struct.Struct("=Q")
_FAR_AT = struct.calcsize("=BBBBHxxIIQ")
_PIPE_BYTES = 4
assert _PIPES_AT % _PIPE_BYTES == 0 and _PIPES_AT + 2 * _PIPE_BYTES <= _BYTES
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
VERSION = 2
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Kind(IntEnum):
    """What a slot is for."""

    FREE = 0
    LISTENER = 1
    """On an endpoint: ``address`` is the digest of what it is for."""
    DATAGRAMS = 2
    """The same, of UDP."""
    OUT = 3
    """In the container's namespace, for its outgoing connections."""
    CONTROL = 4
    INBOUND, OUTBOUND = 5, 6
    """Connections."""
    ACCEPTED = 7
    """Near alone: far is not there yet, and nothing was moved. ``endpoint`` 0: of one that goes out."""
    INNER = 8
    """The socket of UDP in the container's namespace, over IPv4."""


CONNECTIONS = (Kind.INBOUND, Kind.OUTBOUND, Kind.ACCEPTED)
"""What has peers, which see that it is closed."""
CHECKED, COPYING = 1, 2
"""Flags of a connection: its far end is the container's; bytes were sent, and are still to be removed at the source."""


@dataclass(frozen=True, slots=True)
class Record:
    """One slot. For a listener, ``near`` is its cookie."""

    kind: Kind
    container: int = 0
    endpoint: int = 0
    near: int = 0
    far: int = 0
    flags: int = 0
    family: int = 0
    v6only: bool = False
    port: int = 0
    address: bytes = b""
    pipes: tuple[int, int] = (0, 0)
    """Of the flow from near, and of the one to it: the inode of the pipe that it has; 0: none."""


@functools.cache
def slot_name(slot: int) -> str:
    """The name of a slot's sockets: short, so that the names of all fit."""
    return "s" + _base36(slot)


def pipe_name(number: int) -> str:
    """The name of a pipe's two ends."""
    return "p" + _base36(number)


RECORDS_NAME = f"records-{VERSION}"
"""Another version's are not read: nothing is taken over then."""


def _base36(number: int) -> str:
    digits = _DIGITS[number % 36]
    while number := number // 36:
        digits = _DIGITS[number % 36] + digits
    return digits


def parse_name(name: str) -> tuple[str, int] | None:
    """``s`` or ``p`` and a number, None for another name."""
    if name[:1] not in ("s", "p") or not 2 <= len(name) <= 5 or not set(name[1:]) <= set(_DIGITS):
        return None
    return name[0], int(name[1:], 36)


class KeptRecords:
    """The table, in memory that ``fd`` has."""

    def __init__(self, fd: int = -1) -> None:
        """``fd``: that of the graftd before; -1: a new table. Raises OSError, ValueError where it is none."""
        self.fd = _new_file() if fd < 0 else fd
        self._memory = mmap.mmap(self.fd, MAX_SLOTS * _BYTES)
        self._view = memoryview(self._memory)
        self._pipes = self._view.cast("I")
        self._free: list[int] = []
        self._next = 0

    def occupied(self) -> dict[int, Record]:
        """Every slot that is not free. What is noted afterwards is noted in other ones, until `release`."""
        found = {slot: self._read(slot) for slot in range(MAX_SLOTS) if self._memory[slot * _BYTES]}
        self._next = max(found, default=-1) + 1
        self._free = [slot for slot in range(self._next) if slot not in found]
        return {slot: record for slot, record in found.items() if record is not None}

    def _read(self, slot: int) -> Record | None:
        kind, flags, family, v6only, port, container, endpoint, near, far, address = _LAYOUT.unpack_from(
            self._memory, slot * _BYTES
        )
        at = (slot * _BYTES + _PIPES_AT) // _PIPE_BYTES
        try:
            return Record(
                Kind(kind), container, endpoint, near, far, flags, family, bool(v6only), port, address,
                (self._pipes[at], self._pipes[at + 1]),
            )  # fmt: skip
        except ValueError:  # of another version
            return None

    def add(self, record: Record) -> int | None:
        """Note something; gives its slot, None where all are taken."""
        return self._add(record, record.kind, record.near)

    def add_accepted(self, record: Record, kind: Kind, near: int) -> int | None:
        """The same, of a connection, but of another kind, and with the cookie ``near``."""
        if self._next - len(self._free) >= MAX_SLOTS - FOR_LISTENERS:
            return None
        return self._add(record, kind, near)

    def _add(self, record: Record, kind: Kind, near: int) -> int | None:
        if self._free:
            slot = self._free.pop()
        elif self._next < MAX_SLOTS:
            slot = self._next
            self._next += 1
        else:
            return None
        at = slot * _BYTES
        _LAYOUT.pack_into(
            self._memory, at, 0, record.flags, record.family, record.v6only, record.port,
            record.container, record.endpoint, near, record.far, record.address,
        )  # fmt: skip
        pipes_at = (at + _PIPES_AT) // _PIPE_BYTES
        self._pipes[pipes_at], self._pipes[pipes_at + 1] = record.pipes
        self._memory[at] = kind
        return slot

    def complete(self, slot: int, kind: Kind, far: int) -> None:
        """What was accepted is a connection now, by the cookie of its far end."""
        at = slot * _BYTES
        _FAR.pack_into(self._memory, at + _FAR_AT, far)
        self._memory[at] = kind

    def release(self, slot: int) -> None:
        """What was noted there does not exist any more."""
        self._memory[slot * _BYTES] = 0
        self._free.append(slot)

    def set_flag(self, slot: int, flag: int, on: bool) -> None:
        """Set or clear a flag of a connection."""
        at = slot * _BYTES + 1
        self._memory[at] = self._memory[at] | flag if on else self._memory[at] & ~flag

    def pipe_notes(self, slot: int, direction: int) -> tuple[memoryview, int]:
        """Where the inode of a flow's pipe is noted, and at which index: one store of four bytes."""
        return self._pipes, (slot * _BYTES + _PIPES_AT) // _PIPE_BYTES + direction

    def close(self) -> None:
        """Give the memory back."""
        self._pipes.release()
        self._view.release()
        self._memory.close()
        os.close(self.fd)


def _new_file() -> int:
    fd = os.memfd_create("graftd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MAX_SLOTS * _BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd
