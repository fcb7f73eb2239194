"""Offsets of kernel structures' members, from the kernel's own type information.

Format: Documentation/bpf/btf.rst. Only what is needed to find a member by name is read; the rest is
stepped over. Used once, when the BPF programs are compiled.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")

_STRUCT, _UNION = 4, 5
# Bytes after a type's head: (fixed, for each of its vlen entries), by kind.
_TRAILERS = {
    1: (4, 0),  # int
    3: (12, 0),  # array
    4: (0, 12),  # struct
    5: (0, 12),  # union
    6: (0, 8),  # enum
    13: (0, 8),  # func_proto
    14: (4, 0),  # var
    15: (0, 12),  # datasec
    17: (4, 0),  # decl_tag
    19: (0, 12),  # enum64
}


@dataclass(frozen=True, slots=True)
class _Aggregate:
    """Where the members of a struct or union stand."""

    position: int
    members: int
    bitfields: bool


class Btf:
    """The struct and union types of one BTF blob."""

    def __init__(self, blob: bytes) -> None:
        magic, _version, _flags, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(blob)
        if magic != _MAGIC:
            raise ValueError("no BTF of this machine's byte order")
        self._blob = blob
        self._strings = blob[header + str_off : header + str_off + str_len]
        self._by_id: dict[int, _Aggregate] = {}
        self._by_name: dict[bytes, _Aggregate] = {}
        self._scan(header + type_off, header + type_off + type_len)

    @classmethod
    def of_kernel(cls, path: Path = VMLINUX) -> Btf:
        """The running kernel's. Raises OSError where it has none."""
        return cls(path.read_bytes())

    def _scan(self, position: int, end: int) -> None:
        number = 1
        while position < end:
            name_off, info, _size = _TYPE.unpack_from(self._blob, position)
            kind, count = (info >> 24) & 0x1F, info & 0xFFFF
            position += _TYPE.size
            if kind in (_STRUCT, _UNION):
                found = _Aggregate(position, count, bool(info >> 31))
                self._by_id[number] = found
                if name_off and kind == _STRUCT:
                    self._by_name.setdefault(self._string(name_off), found)
            fixed, each = _TRAILERS.get(kind, (0, 0))
            position += fixed + each * count
            number += 1

    def _string(self, offset: int) -> bytes:
        return self._strings[offset : self._strings.index(b"\0", offset)]

    def offset(self, structure: str, member: str) -> int | None:
        """Bytes from the start of ``structure`` to ``member``, also inside its anonymous parts; None if absent."""
        bits = self.bit_offset(structure, member)
        return None if bits is None else bits // 8

    def bit_offset(self, structure: str, member: str) -> int | None:
        """The same in bits, for a bit-field; counted from the lowest bit of each byte (little-endian machines)."""
        found = self._by_name.get(structure.encode())
        return None if found is None else self._find(found, member.encode())

    def _find(self, aggregate: _Aggregate, member: bytes) -> int | None:
        for index in range(aggregate.members):
            name_off, type_id, bits = _MEMBER.unpack_from(self._blob, aggregate.position + index * _MEMBER.size)
            offset = int(bits & 0xFFFFFF if aggregate.bitfields else bits)
            if name_off and self._string(name_off) == member:
                return offset
            inner = self._by_id.get(type_id) if not name_off else None
            below = self._find(inner, member) if inner else None
            if below is not None:
                return offset + below
        return None
