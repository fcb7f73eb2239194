"""Which addresses are noted for the hooks where there is no room for all."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from graft.datapath import layout
from graft.state import host_addresses


class Table:
    """In the place of the map."""

    def __init__(self) -> None:
        self.entries: dict[bytes, layout.HostAddress] = {}

    def keys(self) -> list[layout.HostAddress]:
        return list(self.entries.values())

    def put(self, key: layout.HostAddress, _: ctypes.c_uint32) -> None:
        self.entries[bytes(key)] = key

    def delete(self, key: layout.HostAddress) -> None:
        del self.entries[bytes(key)]

    def counts(self) -> dict[int, int]:
        """How many there are of each namespace."""
        cookies = [key.netns for key in self.entries.values()]
        return {cookie: cookies.count(cookie) for cookie in set(cookies)}


def keys(cookie: int, count: int, first: int = 0) -> frozenset[bytes]:
    made = [layout.HostAddress(netns=cookie, family=4) for _ in range(count)]
    for number, key in enumerate(made, first):
        key.addr[:] = number.to_bytes(16, "big")
    return frozenset(map(bytes, made))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With room for thirty, ten of which are for the host only."""
    monkeypatch.setattr(layout, "MAX_NOTED", 30)
    monkeypatch.setattr(host_addresses, "_ROOM_OF_HOST", 10)
    return Table()


def test_whoever_has_the_fewest_comes_first_and_the_host_always(table: Any) -> None:
    every = {1, 2, 3, 4}
    host_addresses._replace(table, every, 1, {1: keys(1, 5), 2: keys(2, 100), 3: keys(3, 8), 4: keys(4, 1)})
    assert table.counts() == {1: 5, 4: 1, 3: 8, 2: 11}
    host_addresses._replace(table, every, 1, {1: keys(1, 10), 2: keys(2, 100), 3: keys(3, 15), 4: keys(4, 1)})
    assert table.counts() == {1: 10, 4: 1, 3: 15, 2: 4}


def test_what_a_namespace_does_not_have_any_more_is_removed(table: Any) -> None:
    host_addresses._replace(table, {1, 2}, 1, {1: keys(1, 5), 2: keys(2, 3)})
    host_addresses._replace(table, {1, 2}, 1, {2: keys(2, 3, first=2)})
    assert set(table.entries) == keys(1, 5) | keys(2, 3, first=2)


def test_what_was_noted_before_keeps_nothing_from_being_noted(table: Any) -> None:
    host_addresses._replace(table, {1, 2, 3}, 1, {1: keys(1, 10), 2: keys(2, 12), 3: keys(3, 100)})
    host_addresses._replace(table, {1, 2, 3}, 1, {4: keys(4, 2)})
    assert table.counts() == {1: 10, 4: 2, 3: 8, 2: 10} or table.counts() == {1: 10, 4: 2, 3: 6, 2: 12}


def test_what_no_endpoint_has_any_more_is_removed(table: Any) -> None:
    host_addresses._replace(table, {1, 2}, 1, {1: keys(1, 10), 2: keys(2, 20)})
    host_addresses._replace(table, {1}, 1, {3: keys(3, 20)})
    assert table.counts() == {1: 10, 3: 20}


def test_of_the_host_all_count(table: Any) -> None:
    host_addresses._replace(table, {1}, 1, {1: keys(1, 25)})
    assert table.counts() == {1: 25}
