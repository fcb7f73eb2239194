"""The maps of the relay in the kernel (bpf/relay.bpf.c): flows are put into the kernel's hands here.

A flow is named by the cookie of its source. What it needs is listed in an order that leaves no moment in which a byte
could meet the program without a target; sockets leave the lists by themselves when they are closed, and not before: to
take one out while bytes arrive would lose some (net/core/skmsg.c drops what has no program any more).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from graft.datapath.layout import FlowValue
from graft.datapath.loader import FLOW_EVENT_PAGES, RELAY_MAPS
from graft.kernel import bpf, tcp
from graft.kernel.bpf import Map
from graft.kernel.ringbuf import RingBuffer

_MESSAGES = 4


class Sockmap:
    """The relay's maps, and the flows that this process has in them. One process at a time."""

    def __init__(self, descriptor: Callable[[str], int], after: int = _MESSAGES) -> None:
        """``descriptor`` gives each map of loader.RELAY_MAPS, for this object to close. Raises OSError.

        ``after`` is how many small messages in a row make a flow worth handing over; 0: from the start.
        """
        self.after = after
        fds = {name: descriptor(name) for name in RELAY_MAPS}
        self.targets = Map(fds["flow_targets"], ctypes.c_uint64, ctypes.c_int32)
        self._sources = Map(fds["flow_sources"], ctypes.c_uint64, ctypes.c_int32)
        self._flows = Map(fds["flows"], ctypes.c_uint64, FlowValue)
        self._taken = Map(fds["flow_taken"], ctypes.c_uint64, ctypes.c_uint64)
        self._fds = tuple(fds.values())
        self.events = fds["flow_events"]
        self._ring = RingBuffer(self.events, FLOW_EVENT_PAGES * mmap.PAGESIZE)
        self._fell_behind: dict[int, Callable[[], None]] = {}
        self._forget_others()

    @property
    def flows(self) -> tuple[int, ...]:
        """The names of those that are in the kernel's hands."""
        return tuple(self._fell_behind)

    @classmethod
    def pinned(cls, pin_dir: Path) -> Sockmap:
        """The maps that `graft up` pinned. Raises OSError: FileNotFoundError where this kernel has none."""
        return cls(lambda name: bpf.obj_get(pin_dir / name))

    def _forget_others(self) -> None:
        """Counts of a process before this one, which ended without a chance to tidy up."""
        self._ring.records()
        for key in self._flows.keys():  # noqa: SIM118
            self._flows.delete(key)
        for key in self._taken.keys():  # noqa: SIM118
            self._taken.delete(key)

    def join(self, source: socket.socket, target: socket.socket, fell_behind: Callable[[], None]) -> int:
        """Have the kernel move what comes in at ``source`` out at ``target``; gives the flow's name.

        ``fell_behind`` is called when the kernel has left bytes with the source.

        Raises OSError where it does not take it (the source has ended already), and nothing is changed then.
        """
        number = tcp.cookie(source)
        key = ctypes.c_uint64(number)
        self.targets.put(key, ctypes.c_int32(target.fileno()))
        try:
            self._flows.put(key, FlowValue())
            self._sources.put(key, ctypes.c_int32(source.fileno()))
        except OSError:
            self._flows.delete(key)
            self.targets.delete(key)
            raise
        self._fell_behind[number] = fell_behind
        return number

    def counts(self, number: int) -> tuple[int, int]:
        """Bytes of a flow that the kernel moved, and that it left with the source."""
        found = self._flows.peek(ctypes.c_uint64(number))
        return (0, 0) if found is None else (found.moved, found.left)

    def take(self, number: int, taken: int) -> None:
        """Say how much of what was left with the source has been carried over."""
        self._taken.put(ctypes.c_uint64(number), ctypes.c_uint64(taken))

    def forget(self, number: int) -> None:
        """Give up a flow whose sockets are about to be closed."""
        self._fell_behind.pop(number, None)
        key = ctypes.c_uint64(number)
        self._flows.delete(key)
        self._taken.delete(key)

    def on_events(self, _mask: int) -> None:
        """Tell the flows that the kernel gave back."""
        for record in self._ring.records():
            fell_behind = self._fell_behind.get(int.from_bytes(record, sys.byteorder))
            if fell_behind is not None:
                fell_behind()

    def close(self) -> None:
        """Let go of the maps."""
        self._ring.close()
        for fd in self._fds:
            os.close(fd)
