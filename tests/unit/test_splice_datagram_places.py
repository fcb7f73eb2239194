"""Entries for clients in the maps: what one container fills is its own share."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from graft.datapath import exchanges, layout
from graft.splice.datagram_places import ClientPlaces

OWN, OTHER = 7, 8


class Clients:
    """Those of one container: how many have no answer, and how many have one."""

    def __init__(self, places: ClientPlaces) -> None:
        self.places, self.unanswered, self.answered = places, 0, 0
        self.share = places.join(self)

    def add(self) -> None:
        """Raises OSError."""
        self.places.make_room(self.share)
        self.share.take()
        self.unanswered += 1

    def flood(self) -> int:
        """As many as it can have."""
        while True:
            before = self.unanswered
            self.add()
            if self.unanswered == before:  # one has given way
                return before + self.answered

    def remove_unanswered(self) -> bool:
        if not self.unanswered:
            return False
        self.unanswered -= 1
        self.share.give_back()
        return True

    def remove_any(self) -> bool:
        if self.remove_unanswered():
            return True
        if not self.answered:
            return False
        self.answered -= 1
        self.share.give_back()
        return True


def test_what_one_container_has_is_never_all() -> None:
    places = ClientPlaces(10 * layout.EXCHANGE_OUT_SLOTS)
    hostile, other = Clients(places), Clients(places)
    assert hostile.flood() < 8 * layout.EXCHANGE_OUT_SLOTS
    assert other.flood() > layout.EXCHANGE_OUT_SLOTS


def test_a_container_that_comes_later_gets_its_part() -> None:
    places = ClientPlaces(100 * layout.EXCHANGE_OUT_SLOTS)
    hostile = Clients(places)
    had = hostile.flood()
    for clients in [Clients(places) for _ in range(9)]:
        clients.flood()
        assert clients.share.taken >= clients.share.shares.part
    assert hostile.unanswered < had


def test_a_container_with_its_share_of_answered_clients_gets_no_more() -> None:
    clients = Clients(ClientPlaces(10 * layout.EXCHANGE_OUT_SLOTS))
    clients.answered, clients.unanswered = clients.flood(), 0
    with pytest.raises(OSError):
        clients.add()


def test_no_container_more_is_served_than_there_is_room_for() -> None:
    places = ClientPlaces()
    made = []
    with pytest.raises(OSError):
        while True:
            made.append(Clients(places))
    assert 900 < len(made) < layout.MAX_EXCHANGES // layout.EXCHANGE_OUT_SLOTS
    places.leave(made[0].share)
    places.leave(made[0].share)
    Clients(places)


class Table:
    """A map that is not walked: the keys of others may be very many."""

    def __init__(self, walked: bool) -> None:
        self.entries: dict[bytes, tuple[Any, Any]] = {}
        self.walked = walked

    def put(self, key: Any, value: Any) -> None:
        self.entries[bytes(key)] = key, value

    def get(self, key: Any) -> Any:
        return self.entries.get(bytes(key), (None, None))[1]

    def delete(self, key: Any) -> None:
        self.entries.pop(bytes(key), None)

    def items(self) -> list[tuple[Any, Any]]:
        assert self.walked
        return list(self.entries.values())


def test_what_a_container_leaves_is_found_by_its_own_keys() -> None:
    maps: Any = SimpleNamespace(
        exchanges=Table(False),
        exchange_clients=Table(False),
        offers=Table(False),
        stand_ins=Table(True),
        stand_in_ports=Table(False),
    )
    for number in (OWN, OTHER):
        maps.offers.put(ctypes.c_uint32(number), layout.Offer())
        maps.exchanges.put(layout.ExchangeSlot(container=number, slot=511, out=1), layout.ExchangeValue())
        client = layout.ExchangeValue(port=5000, generation=3, local_port=53)
        client.addr[:4] = b"\xc0\0\2\1"
        maps.exchanges.put(layout.ExchangeSlot(container=number, slot=4095), client)
        key = layout.ExchangeClient(container=number, local_port=53, port=5000)
        key.addr[:] = b"\xc0\0\2\1"
        maps.exchange_clients.put(key, ctypes.c_uint32(1))
        for cookie, port in ((0, 1000), (5, 1001)):
            value = layout.StandInValue(cookie=cookie, port=99, local_port=53)
            maps.stand_ins.put(layout.StandInKey(container=number, port=port), value)
            place = layout.StandInPlace(cookie=cookie, container=number, port=99, local_port=0 if cookie else 53)
            maps.stand_in_ports.put(place, ctypes.c_uint32(port))
    exchanges.erase(maps, OWN)
    for table in vars(maps).values():
        assert table.entries
        for key, _ in table.entries.values():
            assert getattr(key, "container", None) == OTHER or getattr(key, "value", None) == OTHER
