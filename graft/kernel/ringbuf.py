"""The consumer side of a BPF ring buffer: the records of programs, in order, without a system call for each.

Source: Documentation/bpf/ringbuf.rst. The map's descriptor can be mapped: one page with the consumer's position,
one with the producers', then the data, mapped twice in a row, so that a record is never split. A record has a
header of eight bytes: its length, whose two highest bits mean "not yet written" and "discarded", and a page offset.
"""

from __future__ import annotations

import mmap
import sys

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEAD = 8


class _Mapped:
    """A ring buffer, mapped: the kernel's position of the consumer, that of the producers, and the data."""

    def __init__(self, fd: int, size: int) -> None:
        """``size``: of the data in bytes, as the map was made (its max_entries, a power of two)."""
        page = mmap.PAGESIZE
        self._mask = size - 1
        self._consumer = mmap.mmap(fd, page)
        self._producer = mmap.mmap(fd, page + 2 * size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=page)
        self._read = memoryview(self._consumer).cast("Q")
        self._written = memoryview(self._producer)[:8].cast("Q")
        self._data = memoryview(self._producer)[page:]

    def close(self) -> None:
        """Unmap the buffer."""
        for view in (self._read, self._written, self._data):
            view.release()
        self._consumer.close()
        self._producer.close()


class RingBuffer(_Mapped):
    """A ring buffer by its descriptor, which the caller closes. Only one consumer at a time. Raises OSError."""

    def records(self) -> list[bytes]:
        """The new records since the last call."""
        found = []
        at, end = self._read[0], self._written[0]
        while at < end:
            start = at & self._mask
            length = int.from_bytes(self._data[start : start + 4], sys.byteorder)
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED:
                found.append(bytes(self._data[start + _HEAD : start + _HEAD + size]))
            at += (_HEAD + size + 7) & ~7
            self._read[0] = at
        return found


class SharedRing(_Mapped):
    """A ring buffer that several consumers read, each at its own place: every one gets every record.

    All records have ``record`` bytes. The kernel knows of one consumer's position, and writes nothing where it would
    overwrite what is behind that: here it is that of the fastest. A slower one is overtaken, sees that by the
    producers' position, and goes on at the oldest record that is whole. Raises OSError.
    """

    def __init__(self, fd: int, size: int, record: int) -> None:
        """``size`` as for `RingBuffer`. What is written from now on is read."""
        super().__init__(fd, size)
        self._size, self._record = size, record
        self._step = (_HEAD + record + 7) & ~7
        self._at = self._written[0]
        self._give_free()

    def read(self) -> tuple[list[bytes], int]:
        """The new records since the last call, and how many others overtook this consumer."""
        found: list[bytes] = []
        lost = 0
        end = self._written[0]
        while self._at < end:
            if end - self._at > self._size:
                lost += self._skip(end)
            start = self._at & self._mask
            head = int.from_bytes(self._data[start : start + 4], sys.byteorder)
            record = bytes(self._data[start + _HEAD : start + self._step][: self._record])
            end = self._written[0]
            if end - self._at > self._size:
                continue  # overtaken while it was read
            if head & _BUSY:
                break
            found.append(record)
            self._at += self._step
        self._give_free()
        return found, lost

    def _skip(self, end: int) -> int:
        """Go on at the middle of the ring, to have time; gives how many records that leaves out."""
        behind = (end - self._at - self._size // 2) // self._step
        self._at += behind * self._step
        return behind

    def _give_free(self) -> None:
        if self._at > self._read[0]:
            self._read[0] = self._at
