"""Which addresses are the host's, and the broadcast addresses of its links: noted for the hooks, which cannot ask.

Of the host's namespace, and of those of endpoints: whenever an endpoint or a policy is put into force. What changes
afterwards is known with the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Found:
    """Keys of the two maps."""

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


def renew(maps: Maps, namespaces: Iterable[Path]) -> None:
    """Note those of all these namespaces, and no others. One that is gone has none. Raises KernelError."""
    found = []
    try:
        for place in namespaces:
            with contextlib.suppress(FileNotFoundError):
                found.append(_look_at(place))
    except OSError as error:
        raise KernelError(f"cannot list the host's addresses: {error.strerror or error}") from error
    with needs_room("addresses of the host"):
        _put_only(maps.noted_addresses, frozenset().union(*(one.addresses for one in found)))
        _put_only(maps.broadcasts, frozenset().union(*(one.broadcasts for one in found)))


def _look_at(place: Path) -> _Found:
    opened = netns.open_place(place)
    try:
        return _look(opened)
    finally:
        os.close(opened)


def _look(opened: int) -> _Found:
    with netns.entered_by(opened):
        cookie, routes = netns.cookie(), local_routes()
    return _Found(
        cookie,
        frozenset(_key(cookie, one) for one in routes.addresses),
        frozenset(_key(where, one) for one in routes.broadcasts for where in (cookie, layout.ANY_NETNS)),
    )


def _key(cookie: int, address: IPAddress) -> bytes:
    key = layout.HostAddress(netns=cookie, family=address.version)
    key.addr[:] = pack16(address)
    return bytes(key)


def _put(table: _Table, keys: Iterable[bytes]) -> None:
    for key in keys:
        table.put(layout.HostAddress.from_buffer_copy(key), ctypes.c_uint32(1))


def _put_only(table: _Table, keys: frozenset[bytes]) -> None:
    _put(table, keys)
    for key in table.keys():  # noqa: SIM118
        if bytes(key) not in keys:
            table.delete(key)
