"""The desk: a supervisor's question about a socket, answered by the hooks in one system call.

A desk is a slot of the pinned array `desks`, mapped into this process's memory. The question is written
there, getsockname() on a copy of the socket's descriptor runs the hook, and the hook, seeing that the caller
has a desk, leaves what it knows: the socket's state, the container's defaults, and the rule for the address,
found by the code that will enforce it. There is no second reading of the rules in user space.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct

from graft import layout
from graft.decision import Call, Facts, Sockaddr
from graft.errors import KernelError
from graft.lifecycle import locked
from graft.maps import Maps
from graft.settings import Settings

_CALLS = {Call.BIND: 0, Call.CONNECT: 1, Call.LISTEN: 2}
_QUESTION = struct.Struct("=IHBB16s")
# From `netns` of struct desk to its `options`; the order is that of decision.Facts.
_ANSWER = struct.Struct("=QQQIIHBBBBBBBBBBH2x")
_NO_ADDRESS = bytes(16)
_libc = ctypes.CDLL(None, use_errno=True)


class Desk:
    """One supervisor's desk. ``container`` is the only one that it may ask about."""

    def __init__(self, maps: Maps, slot: int, container: int) -> None:
        size = ctypes.sizeof(layout.Desk)
        whole = mmap.mmap(maps.desks.fd, layout.MAX_DESKS * size)
        self._view = memoryview(whole)[slot * size : (slot + 1) * size]
        self._container = container
        self._answer_at = layout.Desk.netns.offset
        self._options = layout.Options.from_buffer(self._view, layout.Desk.options.offset)
        self._name = ctypes.create_string_buffer(28)
        self._size = ctypes.c_uint32()
        self._name_ref, self._size_ref = ctypes.byref(self._name), ctypes.byref(self._size)

    def ask(self, fd: int, call: Call, address: Sockaddr | None) -> Facts | None:
        """What the hooks know of the socket ``fd``; None where it is no TCP socket of the container's."""
        if address is None:
            question = (self._container, 0, 0, _CALLS[call], _NO_ADDRESS)
        else:
            question = (self._container, address.port, address.family, _CALLS[call], address.address)
        _QUESTION.pack_into(self._view, 0, *question)
        self._view[layout.Desk.answered.offset] = 0
        self._size.value = 28
        _libc.getsockname(fd, self._name_ref, self._size_ref)
        facts = Facts._make(_ANSWER.unpack_from(self._view, self._answer_at))
        return facts if facts.answered else None

    def count_references(self, fd: int) -> int:
        """References to the file of any TCP socket that we made ourselves, 0 where the kernel does not tell."""
        self._view[layout.Desk.probed.offset] = 0
        self._size.value = 28
        _libc.getsockname(fd, self._name_ref, self._size_ref)
        facts = Facts._make(_ANSWER.unpack_from(self._view, self._answer_at))
        return facts.references if facts.probed else 0

    @property
    def options(self) -> layout.Options:
        """Which options the program set on the socket last asked about; the next question overwrites it."""
        return self._options


def _free_slot(maps: Maps) -> int:
    taken: set[int] = set()
    for pid, slot in maps.desk_slots.items():
        if os.path.exists(f"/proc/{pid.value}"):
            taken.add(int(slot.value))
        else:
            maps.desk_slots.delete(pid)
    for free in range(layout.MAX_DESKS):
        if free not in taken:
            return free
    raise KernelError(f"{layout.MAX_DESKS} supervisors run already")


def open_desk(settings: Settings, maps: Maps, container: int) -> Desk:
    """A desk for the calling process. Raises KernelError where there is none left."""
    with locked(settings):
        slot = _free_slot(maps)
        maps.desk_slots.put(ctypes.c_uint32(os.getpid()), ctypes.c_uint32(slot))
    return Desk(maps, slot, container)


def give_back(maps: Maps) -> None:
    """The calling process needs its desk no more."""
    with contextlib.suppress(OSError):
        maps.desk_slots.delete(ctypes.c_uint32(os.getpid()))
