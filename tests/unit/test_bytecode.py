"""What a compilation gives, as bytes and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.datapath.bytecode import Bytecode, MapForm, decode, encode
from graft.kernel.bpf_maps import MapShape, MapTypes

_names = st.text("abc_4", min_size=1, max_size=12)
_numbers = st.integers(0, 2**32 - 1)
_shapes = st.builds(MapShape, _numbers, _numbers, _numbers, _numbers, _numbers)
_types = st.builds(MapTypes, st.sampled_from([b"", b"\x9f\xeb one", b"\x9f\xeb\x00 two"]), _numbers, _numbers)
_forms = st.builds(MapForm, _shapes, st.none() | _types)
_bytecode = st.builds(Bytecode, st.dictionaries(_names, _forms), st.dictionaries(_names, st.binary(max_size=64)))


@given(_bytecode)
def test_what_is_encoded_comes_back_with_maps_in_their_order(bytecode: Bytecode) -> None:
    found = decode(encode(bytecode))
    assert found == bytecode
    assert list(found.maps) == list(bytecode.maps)


@given(_bytecode, st.data())
def test_what_is_damaged_or_cut_off_is_noticed(bytecode: Bytecode, data: st.DataObject) -> None:
    raw = encode(bytecode)
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:place] + bytes([raw[place] ^ data.draw(st.integers(1, 255))]) + raw[place + 1 :]
    for damaged in (changed, raw[:place], raw + b"\n"):
        with pytest.raises(ValueError):
            decode(damaged)
