"""Kernel type information, from a blob made by hand and from the running kernel."""

from __future__ import annotations

import struct

import pytest

from graft.kernel.btf import VMLINUX, Btf


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


@pytest.fixture
def btf() -> Btf:
    blob = Blob()
    blob.type(1, "int", 4, [], fixed=struct.pack("<I", 32))  # 1
    blob.type(6, "colour", 4, [struct.pack("<Ii", blob.name("red"), 0)])  # 2
    blob.type(3, "", 0, [], fixed=struct.pack("<III", 1, 1, 4))  # 3: an array
    blob.type(5, "", 8, [blob.member("left", 1, 0), blob.member("right", 1, 0)])  # 4: an anonymous union
    blob.type(4, "", 16, [blob.member("deep", 1, 64)])  # 5: an anonymous struct
    inner = [blob.member("first", 1, 0), blob.member("", 4, 64), blob.member("", 5, 128), blob.member("last", 3, 256)]
    blob.type(4, "thing", 48, inner)  # 6
    blob.type(13, "", 1, [struct.pack("<II", 0, 1)])  # 7: func_proto
    blob.type(
        4, "fields", 8, [blob.member("low", 1, 3 << 24 | 0), blob.member("high", 1, 5 << 24 | 35)], flag=True
    )  # 8
    return Btf(blob.build())


@pytest.mark.parametrize("member, offset", [("first", 0), ("left", 8), ("right", 8), ("deep", 24), ("last", 32)])
def test_a_member_is_found_also_inside_anonymous_parts(btf: Btf, member: str, offset: int) -> None:
    assert btf.offset("thing", member) == offset


def test_bit_fields_are_counted_in_bytes(btf: Btf) -> None:
    assert btf.offset("fields", "high") == 4


def test_what_is_not_there_is_none(btf: Btf) -> None:
    assert btf.offset("thing", "nothing") is None
    assert btf.offset("nothing", "first") is None


def test_another_byte_order_is_refused() -> None:
    with pytest.raises(ValueError, match="byte order"):
        Btf(b"\xeb\x9f" + bytes(30))


def test_the_running_kernel_has_a_socket_with_a_file() -> None:
    assert VMLINUX.exists(), "this kernel has no BTF"
    kernel = Btf.of_kernel()
    assert kernel.offset("sock", "sk_socket")
    assert kernel.offset("socket", "file")
    assert kernel.offset("file", "f_count") is not None or kernel.offset("file", "f_ref") is not None
