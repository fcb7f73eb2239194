"""Exchanges of datagrams in the maps (bpf/exchange.bpf.c, bpf/stand_in.bpf.c), removed as a whole."""

from __future__ import annotations

import ctypes

from graft.datapath.maps import Maps


def erase(maps: Maps, container: int) -> None:
    """Remove every exchange of a container."""
    for slot in maps.exchanges.keys():  # noqa: SIM118
        if slot.container == container:
            maps.exchanges.delete(slot)
    for client in maps.exchange_clients.keys():  # noqa: SIM118
        if client.container == container:
            maps.exchange_clients.delete(client)
    maps.offers.delete(ctypes.c_uint32(container))
    for place in maps.stand_in_ports.keys():  # noqa: SIM118
        if place.container == container:
            maps.stand_in_ports.delete(place)
    for stand_in in maps.stand_ins.keys():  # noqa: SIM118
        if stand_in.container == container:
            maps.stand_ins.delete(stand_in)
