"""Exchanges of datagrams in the maps (bpf/exchange.bpf.c, bpf/stand_in.bpf.c), removed as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Collection

from graft.datapath import layout
from graft.datapath.layout import ExchangeClient, ExchangeSlot, ExchangeValue, StandInKey, StandInPlace, StandInValue
from graft.datapath.maps import Maps


def client_key(container: int, value: ExchangeValue) -> ExchangeClient:
    """The key of the client whose exchange this is."""
    key = ExchangeClient(container=container, local_port=value.local_port, port=value.port)
    key.addr[:] = bytes(value.addr)[:4]
    return key


def erase(maps: Maps, container: int) -> None:
    """Remove every exchange of a container. Its own keys are tried: the maps have those of all containers, very many.

    (Not in graftd, which knows what there is of a container that it serves.)
    """
    erase_begun(maps, container)
    for number in range(layout.EXCHANGE_SLOTS):
        slot = ExchangeSlot(container=container, slot=number)
        value = maps.exchanges.get(slot)
        if value is not None:
            maps.exchange_clients.delete(client_key(container, value))
            maps.exchanges.delete(slot)
    maps.offers.delete(ctypes.c_uint32(container))
    for key, stand_in in maps.stand_ins.items():
        if key.container == container:
            maps.stand_in_ports.delete(_place(key, stand_in))
            maps.stand_ins.delete(key)


def _place(key: StandInKey, value: StandInValue) -> StandInPlace:
    local_port = 0 if value.cookie else value.local_port
    return StandInPlace(
        addr=value.addr, cookie=value.cookie, container=key.container, port=value.port, local_port=local_port
    )


def erase_all(maps: Maps, continued: Collection[int] = ()) -> None:
    """Remove the exchanges of all containers, which a daemon that was killed has left: but not those over IPv4 that the
    containers in ``continued`` have begun.
    """
    if continued:
        for key in maps.exchanges.keys():  # noqa: SIM118
            if not key.out or key.container not in continued:
                maps.exchanges.delete(key)
    else:
        maps.exchanges.clear()
    for one in (maps.exchange_clients, maps.offers, maps.stand_ins, maps.stand_in_ports):
        one.clear()


def erase_begun(maps: Maps, container: int) -> None:
    """Remove the exchanges over IPv4 that a container has begun."""
    for number in range(layout.EXCHANGE_OUT_SLOTS):
        maps.exchanges.delete(ExchangeSlot(container=container, slot=number, out=1))
