"""Which addresses are the host's, and the broadcast addresses of its links: noted for the hooks, which cannot ask.

Noted whenever a policy is put into force. What changes on the host afterwards is known with the next one (of its own
addresses, also with the first datagram that arrives there).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from graft.datapath import layout
from graft.datapath.maps import Maps, needs_room
from graft.errors import KernelError
from graft.kernel import netns
from graft.kernel.routes import LocalRoutes, local_routes
from graft.model.address import pack16


def note(maps: Maps, namespace: Path) -> None:
    """Note those of the host's ``namespace``. Raises KernelError where they cannot be listed, or there is no room."""
    try:
        with netns.entered(namespace):
            cookie, found = netns.cookie(), local_routes()
    except OSError as error:
        raise KernelError(f"cannot list the host's addresses: {error.strerror or error}") from error
    with needs_room("addresses of the host"):
        _note_addresses(maps, cookie, found)
        _note_broadcasts(maps, found)


def _note_addresses(maps: Maps, cookie: int, found: LocalRoutes) -> None:
    for address in found.addresses:
        key = layout.HostAddress(netns=cookie, family=address.version)
        key.addr[:] = pack16(address)
        if maps.host_addresses.peek(key) is None:
            maps.host_addresses.put(key, ctypes.c_uint32(layout.ADDRESS_NOTED))


def _note_broadcasts(maps: Maps, found: LocalRoutes) -> None:
    """Those that are none any more may be addresses of other machines by now."""
    wanted = {int.from_bytes(one.packed, sys.byteorder) for one in found.broadcasts}
    noted = {key.value for key in maps.broadcasts.keys()}  # noqa: SIM118
    for number in wanted - noted:
        maps.broadcasts.put(ctypes.c_uint32(number), ctypes.c_uint32(1))
    for number in noted - wanted:
        maps.broadcasts.delete(ctypes.c_uint32(number))
