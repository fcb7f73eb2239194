"""Kernel type information, of a hand-made blob and of the running kernel."""

from __future__ import annotations

import struct

import pytest

from graft.datapath import offsets
from graft.kernel.btf import VMLINUX, Btf
from tests.support.btf import Blob


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


def test_a_missing_member_is_none(btf: Btf) -> None:
    assert btf.offset("thing", "nothing") is None
    assert btf.offset("nothing", "first") is None


def test_another_byte_order_is_refused() -> None:
    with pytest.raises(ValueError, match="byte order"):
        Btf(b"\xeb\x9f" + bytes(30))


def test_every_known_kind_is_skipped() -> None:
    blob = Blob()
    for kind in (2, 7, 8, 9, 10, 11, 12, 16, 18):  # nothing but a head
        blob.type(kind, "x", 1, [])
    blob.type(4, "thing", 8, [blob.member("first", 1, 32)])
    assert Btf(blob.build()).offset("thing", "first") == 4


@pytest.mark.parametrize("kind", [0, 20, 31])
def test_a_newer_kind_is_refused_because_its_length_is_unknown(kind: int) -> None:
    blob = Blob()
    blob.type(kind, "new", 0, [])
    blob.type(4, "thing", 8, [blob.member("first", 1, 0)])
    with pytest.raises(ValueError, match=f"type 1 is of kind {kind}"):
        Btf(blob.build())


def test_a_struct_inside_itself_is_refused() -> None:
    blob = Blob()
    blob.type(4, "thing", 8, [blob.member("", 2, 0)])  # 1
    blob.type(5, "", 8, [blob.member("", 1, 0)])  # 2
    with pytest.raises(ValueError, match="inside itself"):
        Btf(blob.build()).offset("thing", "first")


def test_structs_inside_of_each_other_without_end_are_refused() -> None:
    blob = Blob()
    for number in range(1, 2000):
        blob.type(4, "thing" if number == 1 else "", 8, [blob.member("", number + 1, 0)])
    with pytest.raises(ValueError, match="inside itself"):
        Btf(blob.build()).offset("thing", "first")


def test_a_part_that_occurs_twice_is_searched_once() -> None:
    blob = Blob()
    for number in range(1, 31):  # two of the next in each: a thousand million places
        blob.type(4, "thing" if number == 1 else "", 8, [blob.member("", number + 1, 0)] * 2)
    assert Btf(blob.build()).offset("thing", "nothing") is None


def test_a_blob_that_is_cut_off_anywhere_is_refused() -> None:
    blob = Blob()
    blob.type(1, "int", 4, [], fixed=struct.pack("<I", 32))
    blob.type(4, "thing", 8, [blob.member("first", 1, 0)])
    whole = blob.build()
    for size in range(len(whole)):
        with pytest.raises(ValueError):
            Btf(whole[:size])


def test_types_that_end_too_late_are_refused() -> None:
    blob = Blob()
    blob.type(4, "thing", 8, [blob.member("first", 1, 0)] * 3)
    blob.types = blob.types[:-4]
    with pytest.raises(ValueError, match="cut off"):
        Btf(blob.build())


def test_type_information_that_cannot_be_read_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = Blob()
    blob.type(4, "file", 8, [blob.member("", 1, 0)])
    monkeypatch.setattr(Btf, "of_kernel", classmethod(lambda cls: cls(blob.build())))
    offsets.structure_offsets.cache_clear()
    try:
        assert offsets.structure_offsets() == {}
        assert offsets.missing()
    finally:
        offsets.structure_offsets.cache_clear()


def test_all_that_the_hooks_read_is_known_of_the_running_kernel() -> None:
    assert offsets.missing() == []


def test_the_running_kernel_has_a_socket_with_a_file() -> None:
    assert VMLINUX.exists(), "this kernel has no BTF"
    kernel = Btf.of_kernel()
    assert kernel.offset("sock", "sk_socket")
    assert kernel.offset("socket", "file")
    assert kernel.offset("file", "f_count") is not None or kernel.offset("file", "f_ref") is not None
