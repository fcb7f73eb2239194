"""A container's ferry (graft/swap/ferry.py), for those that know only its container: where it listens, how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import socket
from pathlib import Path

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.model.settings import Settings

END, STAND_IN, OWNER = b"e", b"s", b"o"
"""Requests: to end (its answer is that it hangs up); to stand in for a port (followed by `STAND_IN_FORMAT`); to know
of a user for whom sockets are made (followed by `OWNER_FORMAT`)."""
STAND_IN_FORMAT = "=HBB"  # the port; whether over IPv4, over IPv6
OWNER_FORMAT = "=II"  # the user; the group
_END_SECONDS = 2.0


def socket_path(settings: Settings, container: int) -> Path:
    """The socket of a container's ferry (AF_UNIX, SOCK_SEQPACKET), in a folder that only root can enter."""
    return settings.run_dir / "ferries" / f"{container}.sock"


def connect(settings: Settings, container: int) -> socket.socket | None:
    """A connection to a container's ferry; None where there is none."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        found.settimeout(_END_SECONDS)
        found.connect(str(socket_path(settings, container)))
    except OSError:
        found.close()
        return None
    return found


def end(settings: Settings, maps: Maps, container: int) -> None:
    """End a container's ferry, and remove what it had. Quick where there is none."""
    path = socket_path(settings, container)
    if not path.exists():
        return
    ferry = connect(settings, container)
    if ferry is not None:
        with ferry, contextlib.suppress(OSError):
            ferry.send(END)
            ferry.recv(1)
    path.unlink(missing_ok=True)
    path.with_suffix(".lock").unlink(missing_ok=True)
    forget(maps, container)


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
