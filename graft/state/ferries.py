"""A container's ferry (graft/swap/ferry.py), for those that know only its container: where it listens, how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.model.settings import Settings

END, STAND_IN, OWNER = b"e", b"s", b"o"
"""Requests: to end; to stand in for a port (followed by `STAND_IN_FORMAT`); to know
of a user for whom sockets are made (followed by `OWNER_FORMAT`)."""
STAND_IN_FORMAT = "=HBB"  # the port; whether over IPv4, over IPv6
OWNER_FORMAT = "=II"  # the user; the group
_CONNECT_SECONDS = 2.0


def socket_path(settings: Settings, container: int) -> Path:
    """The socket of a container's ferry (AF_UNIX, SOCK_SEQPACKET), in a folder that only root can enter."""
    return settings.run_dir / "ferries" / f"{container}.sock"


def connect(settings: Settings, container: int, seconds: float = _CONNECT_SECONDS) -> socket.socket | None:
    """A connection to a container's ferry; None where there is none, or where it takes no other one for so long."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        found.settimeout(seconds)
        found.connect(str(socket_path(settings, container)))
    except OSError:
        found.close()
        return None
    return found


def end(settings: Settings, maps: Maps, container: int) -> None:
    """Have a container's ferry end, and remove what it had. The container has no entry in the maps any more.

    It does not wait: this is done with the installation's lock, and what goes through a container's own firewall takes
    as long as that says. A ferry that is busy removes by itself what it has written meanwhile; the hooks have nobody
    reach it who has no entry, and a ferry that could not be told looks for its container every few seconds.
    """
    path = socket_path(settings, container)
    if not path.exists() and maps.ferries.peek(ctypes.c_uint32(container)) is None:
        return
    ferry = connect(settings, container, 0)
    if ferry is not None:
        with ferry, contextlib.suppress(OSError):
            ferry.send(END)
    path.unlink(missing_ok=True)
    path.with_suffix(".lock").unlink(missing_ok=True)
    forget(maps, container)


def reserve(maps: Maps, container: int) -> None:
    """Take a ferry's places in the maps, with nothing in them. Raises OSError where there are no more.

    There are as many as the maps have room for: `forget` gives them back.
    """
    maps.ferries.put(ctypes.c_uint32(container), layout.FerryValue(mark=new_mark()))  # with 0, what has none would pass
    for key in berth_keys(container):
        maps.berths.delete(key)


def new_mark() -> int:
    """A mark that nobody knows."""
    return int.from_bytes(os.urandom(4), "little") | 1


def forget(maps: Maps, container: int) -> None:
    """Remove a container's entries."""
    maps.ferries.delete(ctypes.c_uint32(container))
    for key in berth_keys(container):
        maps.berths.delete(key)


def berth_keys(container: int) -> list[layout.BerthKey]:
    """The keys of all places that a container's ferry has."""
    return [
        layout.BerthKey(container=container, family=family, place=place)
        for family, places in ((4, layout.BERTHS4), (6, layout.BERTHS6))
        for place in range(places)
    ]
