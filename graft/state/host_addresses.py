"""Which addresses are the host's, and the broadcast addresses of its links: noted for the hooks, which cannot ask.

Of the host's namespace, and of those of endpoints: whenever an endpoint or a policy is put into force. What changes
afterwards is known with the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Set
from dataclasses import dataclass
from itertools import islice
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
"""What counts of an endpoint's namespace, where others than the host's root may add addresses."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Keys of the two maps, of one namespace."""

    cookie: int
    addresses: frozenset[bytes]
    broadcasts: frozenset[bytes]


def note(maps: Maps, opened: int) -> int:
    """Note those of the namespace of a descriptor; gives its cookie. Raises OSError, and KernelError where there is no
    room.
    """
    found = _look(opened)
    with needs_room("addresses of the host"):
        _put(maps.noted_addresses, found.addresses)
        _put(maps.broadcasts, found.broadcasts)
    return found.cookie


def renew(maps: Maps, host: Path, others: Iterable[Path]) -> None:
    """Note those of the host's namespace and of these, as they are now. Of one that cannot be entered those stay that
    were noted, as long as an endpoint is there. Raises KernelError, where the host's are not found or there is no room.
    """
    found: dict[int, _Found] = {}
    try:
        _look_at(host, found, most=None)
    except OSError as error:
        raise KernelError(f"cannot list the host's addresses: {error.strerror or error}") from error
    for place in others:
        with contextlib.suppress(OSError):
            _look_at(place, found)
    kept = {value.netns for _, value in maps.endpoints.items()} - found.keys()
    with needs_room("addresses of the host"):
        _replace(maps.noted_addresses, kept, frozenset().union(*(one.addresses for one in found.values())))
        _replace(maps.broadcasts, kept, frozenset().union(*(one.broadcasts for one in found.values())))


def _look_at(place: Path, found: dict[int, _Found], most: int | None = _MOST_OF_OTHERS) -> None:
    """Add what a namespace has, unless another endpoint in it was looked at already."""
    opened = netns.open_place(place)
    try:
        if netns.cookie_by(opened) not in found:
            one = _look(opened, most)
            found[one.cookie] = one
    finally:
        os.close(opened)


def _look(opened: int, most: int | None = _MOST_OF_OTHERS) -> _Found:
    with netns.entered_by(opened):
        cookie, routes = netns.cookie(), local_routes()
    return _Found(cookie, _keys(cookie, routes.addresses, most), _keys(cookie, routes.broadcasts, most))


def _keys(cookie: int, addresses: Iterable[IPAddress], most: int | None) -> frozenset[bytes]:
    return frozenset(_key(cookie, one) for one in islice(addresses, most))


def _key(cookie: int, address: IPAddress) -> bytes:
    key = layout.HostAddress(netns=cookie, family=address.version)
    key.addr[:] = pack16(address)
    return bytes(key)


def _put(table: _Table, keys: Iterable[bytes]) -> None:
    for key in keys:
        table.put(layout.HostAddress.from_buffer_copy(key), ctypes.c_uint32(1))


def _replace(table: _Table, kept: Set[int], keys: frozenset[bytes]) -> None:
    """Put these, and remove all others but those of the namespaces ``kept``."""
    there = {bytes(key): key for key in table.keys()}  # noqa: SIM118
    _put(table, keys - there.keys())
    for packed in there.keys() - keys:
        if there[packed].netns not in kept:
            table.delete(there[packed])
