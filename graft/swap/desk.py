"""The desk: a supervisor's question about a socket, answered by the hooks in one system call.

A desk is a slot of the pinned array `desks`, mapped into this process's memory. The supervisor writes the question
there and calls getsockname() on a duplicate of the socket's descriptor. That runs the hook, which sees that its caller
has a desk and writes the answer there: the socket's state, the container's defaults, and the rule for the address,
found by the code that will enforce it. User space does not look up rules itself.
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
from graft.datapath.dataplane import own_cgroup
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
    layout.DeskValue.ADDRESS: "16s",
    layout.OptionsValue: "2I",  # their number; the options themselves are read in place
}


def _struct_of(fields: Sequence[tuple[str, type]]) -> struct.Struct:
    return struct.Struct("=" + "".join(_FORMATS[kind] for _, kind in fields))


# struct desk is a question, `fdinfo` to `zero`, and an answer, from `uid` on.
_FIRST_OF_ANSWER = [name for name, _ in layout.DeskValue._fields_].index("uid")
_QUESTION = _struct_of(layout.DeskValue._fields_[:_FIRST_OF_ANSWER])
_ANSWER = _struct_of(layout.DeskValue._fields_[_FIRST_OF_ANSWER:])
_ANSWER_NAMES = (*(name for name, _ in layout.DeskValue._fields_[_FIRST_OF_ANSWER:-1]), "options", "overflow")
_OWNER_SIZE = layout.DeskValue.netns.offset - layout.DeskValue.uid.offset
_ANSWERED, _NEXT_HOME = layout.DeskValue.answered.offset, layout.DeskValue.next_home.offset
_CALL = layout.DeskValue.call.offset
_NO_ADDRESS = Sockaddr(0, bytes(16), 0)


class Descriptor(NamedTuple):
    """What the hook read of the socket's descriptor in the kernel's structures; ``probed`` (PROBED_*) says which part.

    Its program set ``options`` options, or more than can be recorded where ``overflow`` is set. ``owner`` is the user
    and the group that opened the socket, None where that could not be read.
    """

    references: int
    flags: int
    probed: int
    options: int
    overflow: int
    owner: tuple[int, int] | None


class DeskAnswer(NamedTuple):
    """What the hooks know about a socket, and about the descriptor in the question. ``raw``: the bytes of all that but
    who opened it, which are those that the compiled part compares.

    (The desk itself has another answer as soon as this process makes an object of any socket: that asks for its name.)
    """

    facts: SocketFacts
    descriptor: Descriptor
    raw: bytes


@lru_cache(maxsize=256)
def _parse_answer(raw: bytes) -> DeskAnswer:
    """An answer from its bytes. Cached: most sockets of a program get the same answer."""
    values = dict(zip(_ANSWER_NAMES, _ANSWER.unpack(raw), strict=True))
    values["family"] = values["socket_family"]
    values["owner"] = (values["uid"], values["gid"]) if values["probed"] & layout.PROBED_OWNER else None
    return DeskAnswer(
        SocketFacts(**{name: values[name] for name in SocketFacts._fields}),
        Descriptor(**{name: values[name] for name in Descriptor._fields}),
        raw[_OWNER_SIZE:],
    )


class Desk:
    """One supervisor's desk, for questions about the sockets of ``container``."""

    def __init__(self, maps: Maps, slot: int, container: int) -> None:
        size = ctypes.sizeof(layout.DeskValue)
        whole = mmap.mmap(maps.desks.fd, layout.MAX_DESKS * size)
        self._view = memoryview(whole)[slot * size : (slot + 1) * size]
        self._view[:] = bytes(size)
        self.memory = self._view  # struct desk, for who asks it without this object (graft/swap/compiled/connect.c)
        layout.DeskValue.from_buffer(self._view).container = self._container = container
        self._answer = self._view[_QUESTION.size : _QUESTION.size + _ANSWER.size]
        self._options = layout.OptionsValue.from_buffer(self._view, layout.DeskValue.options.offset)
        self._name = name_buffer()
        # One byte. Where it is a home + 1, the hook tags the next socket that this process makes with the container
        # and that home, and writes 0.
        self.next_home = self._view[_NEXT_HOME : _NEXT_HOME + 1]

    def ask(
        self, fd: int, call: Call, address: Sockaddr | None, fdinfo: int = -1, number: int = -1, tid: int = 0
    ) -> DeskAnswer | None:
        """What the hooks know about the socket ``fd``; None where it is not a TCP socket of the container.

        ``fdinfo`` is the open /proc/TID/fdinfo of the process in which it is descriptor ``number``, and ``tid`` the
        thread that called, for who traces.
        """
        view = self._view
        family, asked, port, _ = address or _NO_ADDRESS
        _QUESTION.pack_into(view, 0, fdinfo, number, self._container, port, family, call, asked, tid, 0)
        view[_ANSWERED] = 0
        getsockname(fd, *self._name)
        return _parse_answer(self._answer.tobytes()) if view[_ANSWERED] else None

    def tell_refused(self, fd: int) -> None:
        """Tell who traces that the call of the last question is refused: no other hook sees it."""
        asked = self._view[_CALL]
        self._view[_CALL] = asked | layout.CALL_REFUSED
        try:
            getsockname(fd, *self._name)
        finally:
            self._view[_CALL] = asked

    def count_references(self, fd: int) -> int:
        """References to the file of a TCP socket of this process, 0 where the hook cannot read them."""
        self._view[layout.DeskValue.probed.offset] = 0
        getsockname(fd, *self._name)
        descriptor = _parse_answer(self._answer.tobytes()).descriptor
        return descriptor.references if descriptor.probed & layout.PROBED else 0

    def knows(self, fd: int) -> bool:
        """Whether the hooks take ``fd``, a socket of this process, for one of the container that can be served."""
        return self.ask(fd, Call.LISTEN, None) is not None

    @property
    def options(self) -> layout.OptionsValue:
        """The options that the program set on the socket of the last question; the next question overwrites them."""
        return self._options


def _free_slot(maps: Maps) -> int:
    used: set[int] = set()
    for pid, entry in maps.desk_slots.items():
        if os.path.exists(f"/proc/{pid.value}"):
            used.add(int(entry.desk))
        else:
            maps.desk_slots.delete(pid)
    for slot in range(layout.MAX_DESKS):
        if slot not in used:
            return slot
    raise KernelError(f"cannot start a supervisor: {layout.MAX_DESKS} are running already")


def open_desk(graft: Installation, container: int) -> Desk:
    """A desk for the calling process, which is in the cgroup of the container's supervisors. Raises KernelError where
    none is free.
    """
    maps = graft.maps
    own = cgroup.cgroup_id(own_cgroup(graft.settings, container))  # not by /proc, where others can hold its folder
    with graft.transaction():
        slot = _free_slot(maps)
        maps.desk_slots.put(ctypes.c_uint32(os.getpid()), layout.DeskSlot(cgroup=own, desk=slot))
    return Desk(maps, slot, container)


def release_desk(maps: Maps) -> None:
    """Release the calling process's desk."""
    with contextlib.suppress(OSError):
        maps.desk_slots.delete(ctypes.c_uint32(os.getpid()))
