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
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.errors import KernelError
from graft.kernel import cgroup
from graft.kernel.socket_calls import getsockname, name_buffer
from graft.model.sockaddr import Sockaddr
from graft.state.installation import Installation
from graft.swap.decision import Call, SocketFacts

_FORMATS = {
    ctypes.c_uint64: "Q",
    ctypes.c_uint32: "I",
    ctypes.c_int32: "i",
    ctypes.c_uint16: "H",
    ctypes.c_uint8: "B",
    layout.Desk.ADDRESS: "16s",
    layout.Options: "2I",  # how many there are; which, is read where they stand
}


def _struct_of(fields: Sequence[tuple[str, type]]) -> struct.Struct:
    return struct.Struct("=" + "".join(_FORMATS[kind] for _, kind in fields))


# struct desk is a question, `fdinfo` to `addr`, and an answer, from `netns` on.
_FIRST_OF_ANSWER = [name for name, _ in layout.Desk._fields_].index("netns")
_QUESTION = _struct_of(layout.Desk._fields_[:_FIRST_OF_ANSWER])
_ANSWER = _struct_of(layout.Desk._fields_[_FIRST_OF_ANSWER:])
_ANSWER_NAMES = (*(name for name, _ in layout.Desk._fields_[_FIRST_OF_ANSWER:-1]), "options", "overflow")
_ANSWERED, _NEXT_HOME = layout.Desk.answered.offset, layout.Desk.next_home.offset
_NO_ADDRESS = Sockaddr(0, bytes(16), 0)


class Descriptor(NamedTuple):
    """What the kernel's own structures tell of the socket's descriptor, as far as ``probed`` (PROBED_*) says so.

    And how many ``options`` its program set, with ``overflow`` more than are known by name.
    """

    references: int
    flags: int
    probed: int
    options: int
    overflow: int


class DeskAnswer(NamedTuple):
    """What the hooks know of a socket, and of the descriptor that it was asked about by."""

    facts: SocketFacts
    descriptor: Descriptor


@lru_cache(maxsize=256)
def _read(raw: bytes) -> DeskAnswer:
    """An answer from its bytes. Nearly every socket of a program gets one that another got before."""
    values = dict(zip(_ANSWER_NAMES, _ANSWER.unpack(raw), strict=True))
    values["family"] = values["socket_family"]
    return DeskAnswer(
        SocketFacts(**{name: values[name] for name in SocketFacts._fields}),
        Descriptor(**{name: values[name] for name in Descriptor._fields}),
    )


class Desk:
    """One supervisor's desk. ``container`` is the only one that it may ask about."""

    def __init__(self, maps: Maps, slot: int, container: int) -> None:
        size = ctypes.sizeof(layout.Desk)
        whole = mmap.mmap(maps.desks.fd, layout.MAX_DESKS * size)
        self._view = memoryview(whole)[slot * size : (slot + 1) * size]
        self._view[:] = bytes(size)
        layout.Desk.from_buffer(self._view).container = self._container = container
        self._answer = self._view[_QUESTION.size : _QUESTION.size + _ANSWER.size]
        self._options = layout.Options.from_buffer(self._view, layout.Desk.options.offset)
        self._name = name_buffer()
        # One byte. A home + 1 written there: the hook is to tag the next socket that this process makes with the
        # container and that home. It writes 0 when it has done so.
        self.next_home = self._view[_NEXT_HOME : _NEXT_HOME + 1]

    def ask(
        self, fd: int, call: Call, address: Sockaddr | None, fdinfo: int = -1, number: int = -1
    ) -> DeskAnswer | None:
        """What the hooks know of the socket ``fd``; None where it is no TCP socket of the container's.

        ``fdinfo`` is the open /proc/TID/fdinfo of the process that has it as ``number``.
        """
        view = self._view
        family, asked, port, _ = address or _NO_ADDRESS
        _QUESTION.pack_into(view, 0, fdinfo, number, self._container, port, family, call, asked)
        view[_ANSWERED] = 0
        getsockname(fd, *self._name)
        return _read(self._answer.tobytes()) if view[_ANSWERED] else None

    def count_references(self, fd: int) -> int:
        """References to the file of any TCP socket that we made ourselves, 0 where the kernel does not tell."""
        self._view[layout.Desk.probed.offset] = 0
        getsockname(fd, *self._name)
        descriptor = _read(self._answer.tobytes()).descriptor
        return descriptor.references if descriptor.probed & layout.PROBED else 0

    @property
    def options(self) -> layout.Options:
        """Which options the program set on the socket last asked about; the next question overwrites it."""
        return self._options


def _free_slot(maps: Maps) -> int:
    taken: set[int] = set()
    for pid, slot in maps.desk_slots.items():
        if os.path.exists(f"/proc/{pid.value}"):
            taken.add(int(slot.desk))
        else:
            maps.desk_slots.delete(pid)
    for free in range(layout.MAX_DESKS):
        if free not in taken:
            return free
    raise KernelError(f"{layout.MAX_DESKS} supervisors run already")


def open_desk(graft: Installation, container: int) -> Desk:
    """A desk for the calling process, in the cgroup that it is in now. Raises KernelError where there is none left."""
    maps = graft.maps
    with graft.transaction():
        slot = _free_slot(maps)
        own = cgroup.cgroup_id(cgroup.of_process(os.getpid()))
        maps.desk_slots.put(ctypes.c_uint32(os.getpid()), layout.DeskSlot(cgroup=own, desk=slot))
    return Desk(maps, slot, container)


def give_back(maps: Maps) -> None:
    """The calling process needs its desk no more."""
    with contextlib.suppress(OSError):
        maps.desk_slots.delete(ctypes.c_uint32(os.getpid()))
