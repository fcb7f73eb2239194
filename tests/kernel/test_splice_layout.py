"""The splice transport's structures are the same in C and in Python."""

from __future__ import annotations

import ctypes

import pytest

from graft.datapath import layout, loader

pytestmark = pytest.mark.kernel


def fields(structure: type[ctypes.Structure]) -> list[tuple[str, int, int]]:
    return [
        (name, getattr(structure, name).offset, getattr(structure, name).size)
        for name, *_ in structure._fields_
        if not name.startswith("__pad")
    ]


def test_relays_and_arrivals_have_the_layout_that_python_writes(root: None) -> None:
    found = loader.layouts(loader.load())
    assert fields(found["relays"][1]) == fields(layout.RelayValue)
    assert fields(found["arrivals"][0]) == fields(layout.ArrivalKey)
    assert fields(found["arrivals"][1]) == fields(layout.CrossingValue)
    for name, value in (("relays", layout.RelayValue), ("arrivals", layout.CrossingValue)):
        assert ctypes.sizeof(found[name][1]) == ctypes.sizeof(value)
