"""What a graftd leaves to the next one: noted, stored with a keeper, sorted again, continued byte for byte."""

from __future__ import annotations

import os

import pytest

from graft.keeper import protocol
from graft.splice import kept_records
from graft.splice.kept_records import COPYING, KeptRecords, Kind, Record


def test_what_was_noted_is_read_by_the_next_one() -> None:
    first = KeptRecords()
    listener = Record(Kind.LISTENER, 7, near=11, port=80, address=bytes(range(16)))
    connection = Record(Kind.INBOUND, 7, 3, 12, 13, 0, 6, True, 443, b"\1" * 16)
    slots = [first.add(one) for one in (listener, connection, listener)]
    first.set_flag(1, COPYING, True)
    notes, at = first.pipe_notes(1, 1)
    notes[at] = 500
    first.release(0)
    second = KeptRecords(os.dup(first.fd))
    found = second.occupied()
    assert slots == [0, 1, 2]
    assert set(found) == {1, 2}
    assert found[1] == Record(Kind.INBOUND, 7, 3, 12, 13, COPYING, 6, True, 443, b"\1" * 16, (0, 500))
    assert found[2] == listener
    assert [second.add(listener), second.add(listener)] == [0, 3]
    for one in (first, second):
        one.close()


def test_the_table_is_limited_and_cannot_shrink() -> None:
    records = KeptRecords()
    for _ in range(kept_records.MAX_SLOTS):
        assert records.add(Record(Kind.CONTROL)) is not None
    assert records.add(Record(Kind.CONTROL)) is None
    with pytest.raises(OSError):
        os.ftruncate(records.fd, 0)
    records.close()


def test_the_names_of_all_fit_into_one_string_of_the_environment() -> None:
    from graft.splice.kept import MAX_PIPES

    names = [kept_records.slot_name(slot) for slot in range(kept_records.MAX_SLOTS)]
    names += [kept_records.pipe_name(number) for number in range(MAX_PIPES)]
    assert 2 * sum(len(name) + 1 for name in names) + len("records-1:") < protocol.MAX_NAMES
    assert len({*names}) == len(names)
    assert [kept_records.parse_name(name) for name in ("s0", "pz", "s10", "p", "records", "x1", "s-1", "sA")] == [
        ("s", 0),
        ("p", 35),
        ("s", 36),
        *[None] * 5,
    ]
