"""Exchanges of datagrams in the maps (bpf/exchange.bpf.c), removed as a whole."""

from __future__ import annotations

from graft.datapath.maps import Maps


def erase(maps: Maps, container: int) -> None:
    """Remove every exchange of a container."""
    for slot in maps.exchanges.keys():  # noqa: SIM118
        if slot.container == container:
            maps.exchanges.delete(slot)
    for client in maps.exchange_clients.keys():  # noqa: SIM118
        if client.container == container:
            maps.exchange_clients.delete(client)
