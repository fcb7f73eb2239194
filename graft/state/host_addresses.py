"""Which addresses are the host's, and the broadcast addresses of its links: noted for the hooks, which cannot ask.

Of the host's namespace, and of those of endpoints: whenever an endpoint or a policy is put into force. What changes
afterwards is known with the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from graft.datapath import layout
from graft.datapath.maps import Maps, needs_room
from graft.errors import KernelError
from graft.kernel import netns
from graft.kernel.routes import local_routes
from graft.model.address import IPAddress, pack16

if TYPE_CHECKING:
    from graft.kernel.bpf import Map

    _Table = Map[layout.HostAddress, ctypes.c_uint32]


_MOST_OF_OTHERS = 4096
"""What counts of an endpoint's namespace, where others than the host's root may add addresses: of each kind."""
_ROOM_OF_HOST = 16384
"""What the namespaces of endpoints leave of a table, all together, for the host's own addresses."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Keys of the two maps, of one namespace."""

    cookie: int
    addresses: frozenset[bytes]
    broadcasts: frozenset[bytes]


def note(maps: Maps, host: Path, opened: int) -> int:
    """Note those of the namespace of a descriptor, in the place of what was noted of it; gives its cookie. ``host``: of
    which all count. Raises OSError, and KernelError where there is no room.
    """
    first, cookie = netns.cookie(host), netns.cookie_by(opened)
    _write(maps, first, [_look(opened, None if cookie == first else _MOST_OF_OTHERS)])
    return cookie


def renew(maps: Maps, host: Path, others: Iterable[Path]) -> None:
    """Note those of the host's namespace and of these, as they are now. Of one that cannot be entered those stay that
    were noted, as long as an endpoint is there. Raises KernelError, where the host's are not found or there is no room.
    """
    found: dict[int, _Found] = {}
    try:
        _look_at(host, found, most=None)
    except OSError as error:
        raise KernelError(f"cannot list the host's addresses: {error.strerror or error}") from error
    [first] = found
    for place in others:
        with contextlib.suppress(OSError):
            _look_at(place, found)
    _write(maps, first, found.values())


def _write(maps: Maps, host: int, found: Collection[_Found]) -> None:
    """Both maps; ``host`` is the cookie of the host's namespace."""
    live = {host, *(value.netns for _, value in maps.endpoints.items())}
    with needs_room("addresses of the host"):
        _replace(maps.noted_addresses, live, host, {one.cookie: one.addresses for one in found})
        _replace(maps.broadcasts, live, host, {one.cookie: one.broadcasts for one in found})


def _look_at(place: Path, found: dict[int, _Found], most: int | None = _MOST_OF_OTHERS) -> None:
    """Add what a namespace has, unless another endpoint in it was looked at already."""
    opened = netns.open_place(place)
    try:
        if netns.cookie_by(opened) not in found:
            one = _look(opened, most)
            found[one.cookie] = one
    finally:
        os.close(opened)


def _look(opened: int, most: int | None) -> _Found:
    with netns.entered_by(opened):
        cookie, routes = netns.cookie(), local_routes(most)
    return _Found(cookie, _keys(cookie, routes.addresses), _keys(cookie, routes.broadcasts))


def _keys(cookie: int, addresses: Iterable[IPAddress]) -> frozenset[bytes]:
    return frozenset(_key(cookie, one) for one in addresses)


def _key(cookie: int, address: IPAddress) -> bytes:
    key = layout.HostAddress(netns=cookie, family=address.version)
    key.addr[:] = pack16(address)
    return bytes(key)


def _replace(table: _Table, live: Set[int], host: int, found: Mapping[int, Set[bytes]]) -> None:
    """Put what was found of namespaces in the place of what is there of them; of other ``live`` ones that is kept."""
    there = {bytes(key): key for key in table.keys()}  # noqa: SIM118
    every = {cookie: set[bytes]() for cookie in live} | {cookie: set(keys) for cookie, keys in found.items()}
    for packed, key in there.items():
        if key.netns in live - found.keys():
            every[key.netns].add(packed)
    wanted = _chosen(every, host)
    for packed in there.keys() - wanted:
        table.delete(there[packed])
    for packed in wanted - there.keys():
        table.put(layout.HostAddress.from_buffer_copy(packed), ctypes.c_uint32(1))


def _chosen(every: Mapping[int, Set[bytes]], host: int) -> set[bytes]:
    """The host's, and of other namespaces what there is room for: of those that have the fewest first."""
    others = sorted((keys for cookie, keys in every.items() if cookie != host), key=len)
    room = layout.MAX_NOTED - _ROOM_OF_HOST
    return {*every.get(host, ()), *islice(chain.from_iterable(others), room)}
