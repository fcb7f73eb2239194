"""How long supervisors take for trapped calls, as a histogram for each container: written without a system call.

`call-times/ID` in the run directory has a `Slot` for each supervisor of a container. A supervisor takes one that is
free, which is to have the lock on its bytes (fcntl_locking(2)), maps it, and counts there, in Python or in C
(graft/swap/compiled/loop.c). When it ends, the next one takes the slot and counts on, so that no count is ever less
than before. Whoever reads the file adds the slots up.

A time is the supervisor's: from the moment when it has a notification until it is ready for the next one. What the
kernel takes to wake it, and then the program, comes on top.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from graft.model.settings import Settings

BOUNDS = (
    *(10_000, 20_000, 50_000, 100_000, 200_000, 500_000),
    *(1_000_000, 2_000_000, 5_000_000, 10_000_000, 50_000_000, 200_000_000, 1_000_000_000),
)
"""Upper bounds of the buckets in nanoseconds, each included. A last bucket has what took longer."""

NANOSECONDS = 1e9  # in a second
_SLOTS = 64  # as many supervisors as one container may have (graft/oci/shim.py)


class Slot(ctypes.Structure):
    """What one supervisor counts: `struct call_times` in graft/swap/compiled/fast_calls.h. ``total`` is in nanoseconds.

    Its bounds are written by who takes it; a slot with other ones is of another version of Graft.
    """

    _fields_ = (
        ("bounds", ctypes.c_uint64 * len(BOUNDS)),
        ("counts", ctypes.c_uint64 * (len(BOUNDS) + 1)),
        ("total", ctypes.c_uint64),
    )


_SIZE = ctypes.sizeof(Slot)


@dataclass(frozen=True, slots=True)
class CallTimes:
    """How many calls were in each bucket (one more than there are `BOUNDS`), and how long all took, in nanoseconds."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: int = 0

    @property
    def count(self) -> int:
        """How many calls there were."""
        return sum(self.counts)

    def __add__(self, other: CallTimes) -> CallTimes:
        return CallTimes(
            tuple(ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)),
            self.total + other.total,
        )

    def since(self, before: CallTimes) -> CallTimes:
        """What was counted after ``before``. One that is less than before has begun anew."""
        if any(now < then for now, then in zip(self.counts, before.counts, strict=True)):
            return self
        return CallTimes(
            tuple(now - then for now, then in zip(self.counts, before.counts, strict=True)),
            self.total - before.total,
        )

    def quantile(self, share: float) -> int | None:
        """The bound, in nanoseconds, that this ``share`` of the calls did not exceed. None: no call, or no bound."""
        wanted, seen = share * self.count, 0
        for bound, count in zip(BOUNDS, self.counts, strict=False):
            seen += count
            if seen >= wanted and seen:
                return bound
        return None


class CallTimer:
    """The slot of the calling process, which has a lock on it as long as it has this object."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._memory = memory
        self.slot = Slot.from_buffer(memory, offset)
        if tuple(self.slot.bounds) != BOUNDS:
            ctypes.memset(ctypes.addressof(self.slot), 0, _SIZE)
            self.slot.bounds[:] = BOUNDS

    def add(self, nanoseconds: int) -> None:
        """Count one call."""
        self.slot.counts[bisect_left(BOUNDS, nanoseconds)] += 1
        self.slot.total += nanoseconds


def take(settings: Settings, container: int) -> CallTimer | None:
    """A slot for the calling process; None where none is free, or there is no room for it: nothing is counted then."""
    path = _path(settings, container)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    try:
        slot = next(number for number in range(_SLOTS) if _lock(fd, number))
        # A page that is mapped and cannot be had is SIGBUS: what is written below is there, or this fails.
        os.posix_fallocate(fd, slot * _SIZE, _SIZE)
        first = slot * _SIZE // mmap.PAGESIZE * mmap.PAGESIZE
        return CallTimer(mmap.mmap(fd, (slot + 1) * _SIZE - first, offset=first), slot * _SIZE - first)
    except (OSError, StopIteration):
        os.close(fd)
        return None


def _lock(fd: int, slot: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _SIZE, slot * _SIZE)
    except OSError:
        return False
    return True


def read(settings: Settings, container: int) -> CallTimes | None:
    """What all supervisors of a container have counted; None where it has, or had, none."""
    try:
        raw = _path(settings, container).read_bytes()[: _SLOTS * _SIZE]
    except OSError:
        return None
    slots = [Slot.from_buffer_copy(raw, offset) for offset in range(0, len(raw) - _SIZE + 1, _SIZE)]
    counted = [CallTimes(tuple(one.counts), one.total) for one in slots if tuple(one.bounds) == BOUNDS]
    return sum(counted, CallTimes())


def forget(settings: Settings, container: int) -> None:
    """Remove what was counted for a container that has ended. Safe to repeat."""
    with contextlib.suppress(FileNotFoundError):
        _path(settings, container).unlink()


def _path(settings: Settings, container: int) -> Path:
    return settings.run_dir / "call-times" / str(container)
