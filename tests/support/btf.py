"""BTF made by hand, for tests that know what is in it."""

from __future__ import annotations

import struct


class Blob:
    """A BTF blob in the making (Documentation/bpf/btf.rst)."""

    def __init__(self) -> None:
        self.strings, self.types = b"\0", b""

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def type(
        self, kind: int, name: str, size: int, entries: list[bytes], flag: bool = False, fixed: bytes = b""
    ) -> None:
        info = kind << 24 | len(entries) | flag << 31
        self.types += struct.pack("<III", self.name(name), info, size) + fixed + b"".join(entries)

    def member(self, name: str, type_id: int, bits: int) -> bytes:
        return struct.pack("<III", self.name(name), type_id, bits)

    def build(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings
