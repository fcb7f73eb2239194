"""The maps of the relay in the kernel (bpf/relay.bpf.c): flows are handed over to the kernel here.

A flow is known by the cookie of its source. Its map entries are made in an order in which no byte can meet the BPF
program without a target. Sockets leave the maps when they are closed, and not before: to take one out while bytes
arrive would lose some (net/core/skmsg.c drops bytes of a socket that has no program any more).
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

_SMALL_MESSAGES = 4


class Sockmap:
    """The relay's maps, and this process's flows in them. For one process at a time."""

    def __init__(self, descriptor: Callable[[str], int], after: int = _SMALL_MESSAGES) -> None:
        """``descriptor`` opens a map of loader.RELAY_MAPS; this object closes it. Raises OSError.

        ``after`` is how many small messages in a row a flow has to move before it is handed over.
        """
        self.after = after
        fds = {name: descriptor(name) for name in RELAY_MAPS}
        self._targets = Map(fds["flow_targets"], ctypes.c_uint64, ctypes.c_int32)
        self._sources = Map(fds["flow_sources"], ctypes.c_uint64, ctypes.c_int32)
        self._flows = Map(fds["flows"], ctypes.c_uint64, FlowValue)
        self._copied = Map(fds["flow_taken"], ctypes.c_uint64, ctypes.c_uint64)
        self._fds = tuple(fds.values())
        self.events = fds["flow_events"]
        self._ring = RingBuffer(self.events, FLOW_EVENT_PAGES * mmap.PAGESIZE)
        self._fell_behind: dict[int, Callable[[], None]] = {}
        self._clear_counts()

    @property
    def flows(self) -> tuple[int, ...]:
        """The cookies of the flows that were handed over."""
        return tuple(self._fell_behind)

    @classmethod
    def pinned(cls, pin_dir: Path) -> Sockmap:
        """The maps that `graft up` pinned. Raises OSError: FileNotFoundError where this kernel has none."""
        return cls(lambda name: bpf.obj_get(pin_dir / name))

    def _clear_counts(self) -> None:
        """Remove what an earlier process left, if it was killed."""
        self._ring.records()
        for key in self._flows.keys():  # noqa: SIM118
            self._flows.delete(key)
        for key in self._copied.keys():  # noqa: SIM118
            self._copied.delete(key)

    def add(self, source: socket.socket, target: socket.socket, fell_behind: Callable[[], None]) -> int:
        """Have the kernel move what arrives at ``source`` to ``target``; returns the flow's cookie.

        ``fell_behind`` is called when the kernel has left bytes with the source.

        Raises OSError where the kernel refuses it (the source has ended already); then nothing is changed.
        """
        cookie = tcp.cookie(source)
        key = ctypes.c_uint64(cookie)
        self._targets.put(key, ctypes.c_int32(target.fileno()))
        try:
            self._flows.put(key, FlowValue())
            self._sources.put(key, ctypes.c_int32(source.fileno()))
        except OSError:
            self._flows.delete(key)
            self._targets.delete(key)
            raise
        self._fell_behind[cookie] = fell_behind
        return cookie

    def counts(self, cookie: int) -> tuple[int, int]:
        """How many bytes of a flow the kernel has moved, and how many it has left with the source."""
        found = self._flows.peek(ctypes.c_uint64(cookie))
        return (0, 0) if found is None else (found.moved, found.left)

    def report_copied(self, cookie: int, copied: int) -> None:
        """Report to the kernel how many of the bytes that it left have been copied in all."""
        self._copied.put(ctypes.c_uint64(cookie), ctypes.c_uint64(copied))

    def forget(self, cookie: int) -> None:
        """Remove a flow, before its sockets are closed."""
        self._fell_behind.pop(cookie, None)
        key = ctypes.c_uint64(cookie)
        self._flows.delete(key)
        self._copied.delete(key)

    def on_events(self, _mask: int) -> None:
        """Call ``fell_behind`` of the flows for which the kernel reports that it left bytes."""
        for record in self._ring.records():
            fell_behind = self._fell_behind.get(int.from_bytes(record, sys.byteorder))
            if fell_behind is not None:
                fell_behind()

    def close(self) -> None:
        """Close the maps."""
        self._ring.close()
        for fd in self._fds:
            os.close(fd)
