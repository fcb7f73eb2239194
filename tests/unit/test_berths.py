"""Which of a ferry's addresses stands for which peer: places are taken, remembered, emptied, and never given twice."""

from __future__ import annotations

import time

from graft.datapath import layout
from graft.swap.berths import Berths, Peer


class FakeMap:
    """As `graft.kernel.bpf.Map`, in memory."""

    fd = 7

    def __init__(self) -> None:
        self.entries: dict[bytes, layout.BerthValue] = {}

    def peek(self, key: layout.BerthKey) -> layout.BerthValue | None:
        return self.entries.get(bytes(key))

    def insert(self, key: layout.BerthKey, value: layout.BerthValue) -> bool:
        return self.entries.setdefault(bytes(key), value) is value

    def delete(self, key: layout.BerthKey) -> bool:
        return self.entries.pop(bytes(key), None) is not None


def berths() -> tuple[Berths, FakeMap]:
    found = FakeMap()
    return Berths(found, 3), found  # type: ignore[arg-type]


def peer(number: int, family: int = 4) -> Peer:
    return Peer(family, f"10.0.{number >> 8}.{number & 255}" if family == 4 else f"fd00::{number:x}", 53)


def test_a_peer_keeps_its_place_and_a_place_its_peer() -> None:
    made, _ = berths()
    for family in (4, 6):
        place = made.place_of(peer(1, family))
        assert place is not None and made.place_of(peer(1, family)) == place
        assert made.peer_at(family, place) == peer(1, family)
        assert made.place_of(peer(2, family)) != place


def test_a_place_that_the_hook_took_is_read_once_and_given_to_nobody_else() -> None:
    made, found = berths()
    taken = layout.BerthValue(port=53, family=4, used=time.monotonic_ns())
    taken.addr[:4] = bytes((10, 0, 0, 9))
    found.entries[bytes(layout.BerthKey(container=3, family=4, place=1))] = taken
    assert made.place_of(peer(1)) != 1
    assert made.peer_at(4, 1) == peer(9)
    assert made.place_of(peer(9)) == 1
    assert made.peer_at(4, 200) is None


def test_there_are_no_more_places_than_a_container_may_have() -> None:
    made, found = berths()
    places = [made.place_of(peer(number)) for number in range(layout.BERTHS4 + 1)]
    assert sorted(place for place in places if place is not None) == list(range(layout.BERTHS4))
    assert places[-1] is None and len(found.entries) == layout.BERTHS4
    assert made.place_of(peer(1, 6)) is not None


def test_places_that_nobody_used_are_emptied() -> None:
    made, found = berths()
    place = made.place_of(peer(1))
    made.sweep(60)
    assert len(found.entries) == 1
    made.sweep(-1)
    assert not found.entries
    assert place is not None and made.peer_at(4, place) is None
