"""Which addresses are the host's, and the broadcast addresses of its links: noted for the hooks, which cannot ask.

Of the host's namespace, and of those of endpoints: whenever an endpoint or a policy is put into force. What changes
afterwards is known with the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
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


def note(maps: Maps, opened: int, is_host: bool) -> int:
    """Note those of the namespace of a descriptor, in the place of what was noted of it; gives its cookie. Raises
    OSError, and KernelError where there is no room.
    """
    found = _look(opened, None if is_host else _MOST_OF_OTHERS)
    _write(maps, lambda cookie: cookie != found.cookie, found if is_host else None, [] if is_host else [found])
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
    [first] = found.values()
    for place in others:
        with contextlib.suppress(OSError):
            _look_at(place, found)
    kept = {value.netns for _, value in maps.endpoints.items()} - found.keys()
    _write(maps, kept.__contains__, first, [one for one in found.values() if one is not first])


def _write(maps: Maps, is_kept: Callable[[int], bool], host: _Found | None, others: Sequence[_Found]) -> None:
    """The host's, and of the others what there is room for: those of whoever has the fewest first. ``is_kept``: of
    which other namespaces, by their cookies, stays what was noted.
    """
    with needs_room("addresses of the host"):
        _replace(maps.noted_addresses, is_kept, host.addresses if host else (), [one.addresses for one in others])
        _replace(maps.broadcasts, is_kept, host.broadcasts if host else (), [one.broadcasts for one in others])


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


def _replace(
    table: _Table, is_kept: Callable[[int], bool], host: Iterable[bytes], others: Sequence[frozenset[bytes]]
) -> None:
    """Put these, and remove what else is there, but of the namespaces that are kept."""
    there = {bytes(key): key for key in table.keys()}  # noqa: SIM118
    stay = {packed for packed, key in there.items() if is_kept(key.netns)}
    room = max(0, layout.MAX_NOTED - _ROOM_OF_HOST - len(stay))
    fewest_first: list[frozenset[bytes]] = sorted(others, key=len)
    wanted = {*host, *islice(chain.from_iterable(fewest_first), room)}
    for packed in there.keys() - stay - wanted:
        table.delete(there[packed])
    for packed in wanted - there.keys():
        table.put(layout.HostAddress.from_buffer_copy(packed), ctypes.c_uint32(1))
