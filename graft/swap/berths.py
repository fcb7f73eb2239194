"""The berths of one container's ferry: which of the ferry's addresses stands for which peer inside.

The hooks fill a free place when a socket sends to a peer that has none (bpf/ferry.bpf.c), the ferry does when a peer
that has none sends first, and only the ferry empties places. So what it has read of a place stays true until then.
"""

from __future__ import annotations

import time
from ipaddress import ip_address
from typing import NamedTuple

from graft.datapath import layout
from graft.kernel.bpf import Map

_PLACES = {4: layout.BERTHS4, 6: layout.BERTHS6}


class Peer(NamedTuple):
    """A socket inside, by its address as text."""

    family: int
    address: str
    port: int


class Berths:
    """Those of ``container``."""

    def __init__(self, berths: Map[layout.BerthKey, layout.BerthValue], container: int) -> None:
        self._map, self._container = berths, container
        self._peers: dict[tuple[int, int], Peer] = {}
        self._places: dict[Peer, int] = {}
        self._used: dict[tuple[int, int], float] = {}
        self._next = 0

    @property
    def map_fd(self) -> int:
        """The descriptor of the map."""
        return self._map.fd

    def peer_at(self, family: int, place: int) -> Peer | None:
        """The peer that a place stands for; None where it is free."""
        known = self._peers.get((family, place))
        if known is None:
            found = self._map.peek(self._key(family, place))
            if found is None:
                return None
            known = self._remember(family, place, _peer_of(found))
        self._used[family, place] = time.monotonic()
        return known

    def place_of(self, peer: Peer) -> int | None:
        """The place of a peer: the one that it has, or a free one, taken for it. None where all are taken."""
        place = self._places.get(peer)
        if place is None:
            place = self._take(peer)
        if place is not None:
            self._used[peer.family, place] = time.monotonic()
        return place

    def sweep(self, idle: float) -> None:
        """Empty the places that nobody used for so many seconds."""
        now = time.monotonic()
        for family, places in _PLACES.items():
            for place in range(places):
                key = self._key(family, place)
                found = self._map.peek(key)
                used = max(self._used.get((family, place), 0.0), found.used / 1e9 if found is not None else now)
                if found is not None and now - used > idle:
                    self._forget(family, place)
                    self._map.delete(key)

    def clear(self) -> None:
        """Empty all places, at the end of the ferry."""
        for family, places in _PLACES.items():
            for place in range(places):
                self._map.delete(self._key(family, place))

    def _take(self, peer: Peer) -> int | None:
        packed = ip_address(peer.address).packed
        value = layout.BerthValue(port=peer.port, family=peer.family, used=time.monotonic_ns())
        value.addr[: len(packed)] = packed
        places = _PLACES[peer.family]
        for _ in range(places):
            self._next += 1
            place = self._next % places
            if (peer.family, place) not in self._peers and self._map.insert(self._key(peer.family, place), value):
                self._remember(peer.family, place, peer)
                return place
        return None

    def _remember(self, family: int, place: int, peer: Peer) -> Peer:
        self._peers[family, place] = peer
        self._places[peer] = place
        return peer

    def _forget(self, family: int, place: int) -> None:
        peer = self._peers.pop((family, place), None)
        if peer is not None and self._places.get(peer) == place:
            del self._places[peer]
        self._used.pop((family, place), None)

    def _key(self, family: int, place: int) -> layout.BerthKey:
        return layout.BerthKey(container=self._container, family=family, place=place)


def _peer_of(value: layout.BerthValue) -> Peer:
    packed = bytes(value.addr)[: 4 if value.family == 4 else 16]
    return Peer(value.family, str(ip_address(packed)), value.port)
