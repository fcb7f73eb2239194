"""Decisions of the hooks as they happen: the ring buffer that they are written to while somebody watches.

Whoever watches renews a lease, and every watcher reads the same ring (bpf/trace.bpf.c). There is nothing to clean up
after one that was killed.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from dataclasses import dataclass
from ipaddress import ip_address

from graft.datapath import layout
from graft.datapath.layout import TracedCall, TracedOutcome
from graft.datapath.maps import Maps
from graft.kernel.ringbuf import SharedRing
from graft.model.address import IPAddress

RECORD = ctypes.sizeof(layout.EventValue)
LEASE_SECONDS = 3.0
"""For how long decisions are written after a watcher was killed."""

_RENEW_BEFORE_NS = 2_000_000_000
_LEASE, _LOSSES = ctypes.c_uint32(0), ctypes.c_uint32(1)


@dataclass(frozen=True, slots=True)
class Event:
    """A decision. ``time`` is CLOCK_MONOTONIC in nanoseconds, ``container`` and ``endpoint`` are ids, 0 for none.

    ``tid`` and ``pid`` are 0 and ``comm`` empty where the hook could not know the thread; ``comm`` is the name that it
    gave itself. ``ip`` is None where the call has no address; ``level`` and
    ``option`` are those of a refused setsockopt(2). ``protocol`` is a number of IPPROTO_*.
    """

    time: int
    container: int
    call: TracedCall
    outcome: TracedOutcome
    tid: int = 0
    pid: int = 0
    comm: str = ""
    ip: IPAddress | None = None
    port: int = 0
    protocol: int = 0
    endpoint: int = 0
    endpoint_port: int = 0
    level: int = 0
    option: int = 0


def parse_event(raw: bytes) -> Event:
    """A record of the ring. Raises ValueError where it is not one."""
    value = layout.EventValue.from_buffer_copy(raw)
    address = bytes(value.addr)
    call = TracedCall(value.call)
    is_option = call is TracedCall.OPTION
    return Event(
        time=value.time,
        container=value.container,
        call=call,
        outcome=TracedOutcome(value.outcome),
        tid=value.tid,
        pid=value.pid,
        comm=value.comm.decode(errors="replace"),
        ip=ip_address(address[: 4 if value.family == 4 else 16]) if value.family in (4, 6) else None,
        port=value.port,
        protocol=value.protocol,
        endpoint=value.endpoint,
        endpoint_port=value.endpoint_port,
        level=int.from_bytes(address[:4], sys.byteorder) if is_option else 0,
        option=int.from_bytes(address[4:8], sys.byteorder) if is_option else 0,
    )


class Decisions:
    """One watcher. Raises OSError, NotUpError."""

    def __init__(self, maps: Maps) -> None:
        self._watches = maps.watches
        self._ring = SharedRing(maps.decisions.fd, layout.WATCH_PAGES * mmap.PAGESIZE, RECORD)
        self._lost = self._dropped()
        self.renew()

    def renew(self) -> bool:
        """Have decisions written for `LEASE_SECONDS` more. Whether none were for a time, because nobody renewed it."""
        until = self._until()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if until < now + _RENEW_BEFORE_NS:
            self._watches.put(_LEASE, layout.WatchValue(until=now + int(LEASE_SECONDS * 1e9)))
        return until < now

    def read(self) -> tuple[list[Event], int]:
        """The decisions since the last call, in order, and how many were lost: for which the ring had no room, or that
        were overwritten before they were read. To be called often; it renews the lease.
        """
        self.renew()
        records, lost = self._ring.read()
        dropped = self._dropped()
        lost, self._lost = lost + dropped - self._lost, dropped
        return [parse_event(one) for one in records], lost

    def _until(self) -> int:
        found = self._watches.get(_LEASE)
        return 0 if found is None else int(found.until)

    def _dropped(self) -> int:
        found = self._watches.get(_LOSSES)
        return 0 if found is None else int(found.lost)

    def close(self) -> None:
        """Stop watching."""
        self._ring.close()
