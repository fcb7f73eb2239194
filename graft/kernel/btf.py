"""Offsets of kernel structures' members, from the kernel's own type information.

Format: Documentation/bpf/btf.rst. Only what is needed to find a member by name is read; the rest is
skipped. Used once, when the BPF programs are compiled.

With a wrong offset the programs would read other kernel data. So anything that is not fully understood
is a ValueError, also a kind of type that is newer than this module: Graft then works without the type information
(graft/datapath/offsets.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC, _VERSION = 0xEB9F, 1
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_MAX_NESTING = 32  # nested anonymous structs and unions; Linux has three

_STRUCT, _UNION = 4, 5
# Bytes after a type's head: (fixed, for each of its vlen entries), by kind.
_TRAILERS = {
    1: (4, 0),  # int
    2: (0, 0),  # ptr
    3: (12, 0),  # array
    4: (0, 12),  # struct
    5: (0, 12),  # union
    6: (0, 8),  # enum
    7: (0, 0),  # fwd
    8: (0, 0),  # typedef
    9: (0, 0),  # volatile
    10: (0, 0),  # const
    11: (0, 0),  # restrict
    12: (0, 0),  # func
    13: (0, 8),  # func_proto
    14: (4, 0),  # var
    15: (0, 12),  # datasec
    16: (0, 0),  # float
    17: (4, 0),  # decl_tag
    18: (0, 0),  # type_tag
    19: (0, 12),  # enum64
}


@dataclass(frozen=True, slots=True)
class _Aggregate:
    """The position of a struct's or union's members."""

    position: int
    members: int
    bitfields: bool


class Btf:
    """The struct and union types of one BTF blob. Raises ValueError for one that is not BTF, or of a newer format."""

    def __init__(self, blob: bytes) -> None:
        if len(blob) < _HEADER.size:
            raise ValueError("too short for BTF")
        magic, version, _flags, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(blob)
        if magic != _MAGIC:
            raise ValueError("not BTF of this machine's byte order")
        if version != _VERSION or header < _HEADER.size:
            raise ValueError(f"BTF of version {version}, with a header of {header} bytes")
        types, strings = header + type_off, header + str_off
        if types + type_len > len(blob) or strings + str_len > len(blob):
            raise ValueError("BTF that is cut off")
        self._blob = blob
        self._strings = blob[strings : strings + str_len]
        self._by_id: dict[int, _Aggregate] = {}
        self._by_name: dict[bytes, _Aggregate] = {}
        self._scan(types, types + type_len)

    @classmethod
    def of_kernel(cls, path: Path = VMLINUX) -> Btf:
        """The running kernel's. Raises OSError where it has none."""
        return cls(path.read_bytes())

    def _scan(self, position: int, end: int) -> None:
        number = 1
        while position < end:
            if position + _TYPE.size > end:
                raise ValueError(f"BTF type {number} is cut off")
            name_off, info, _size = _TYPE.unpack_from(self._blob, position)
            kind, count = (info >> 24) & 0x1F, info & 0xFFFF
            if kind not in _TRAILERS:
                raise ValueError(f"BTF type {number} is of kind {kind}, which is not known: its length is not either")
            position += _TYPE.size
            fixed, each = _TRAILERS[kind]
            if position + fixed + each * count > end:
                raise ValueError(f"BTF type {number} is cut off")
            if kind in (_STRUCT, _UNION):
                found = _Aggregate(position, count, bool(info >> 31))
                self._by_id[number] = found
                if name_off and kind == _STRUCT:
                    self._by_name.setdefault(self._string(name_off), found)
            position += fixed + each * count
            number += 1

    def _string(self, offset: int) -> bytes:
        end = self._strings.find(b"\0", offset)
        if end < 0:
            raise ValueError(f"BTF has no string at {offset}")
        return self._strings[offset:end]

    def offset(self, structure: str, member: str) -> int | None:
        """Bytes from the start of ``structure`` to ``member``, also inside its anonymous parts; None if absent.

        Raises ValueError for types that contain themselves.
        """
        bits = self.bit_offset(structure, member)
        return None if bits is None else bits // 8

    def bit_offset(self, structure: str, member: str) -> int | None:
        """The same in bits, for a bit-field; counted from the lowest bit of each byte (little-endian machines)."""
        found = self._by_name.get(structure.encode())
        return None if found is None else self._find(found, member.encode(), (), set())

    def _find(self, aggregate: _Aggregate, member: bytes, outer: tuple[int, ...], searched: set[int]) -> int | None:
        """``outer``: positions of the types that contain this one; ``searched``: of those without the member."""
        if aggregate.position in outer or len(outer) >= _MAX_NESTING:
            raise ValueError("BTF has a struct inside itself")
        for index in range(aggregate.members):
            name_off, type_id, bits = _MEMBER.unpack_from(self._blob, aggregate.position + index * _MEMBER.size)
            offset = int(bits & 0xFFFFFF if aggregate.bitfields else bits)
            if name_off and self._string(name_off) == member:
                return offset
            inner = self._by_id.get(type_id) if not name_off else None
            if inner is None or inner.position in searched:
                continue
            inside = self._find(inner, member, (*outer, aggregate.position), searched)
            if inside is not None:
                return offset + inside
        searched.add(aggregate.position)
        return None
