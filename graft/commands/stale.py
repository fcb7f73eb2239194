"""Containers whose data plane is gone: somebody unmounted bpffs, or removed the pins, while they ran.

The kernel keeps the programs on their cgroups, with maps that nobody finds any more: they are confined as they were.
Their records are put aside, so that nothing takes them for containers of the new data plane. One that is saved is then
attached again, each program in the place of the old one, in one step; the others wait for `graft attach` or
`graft down`. Containers with a supervisor keep it, with the old maps, and their records until they end; what graftd did
for them ends.
"""

from __future__ import annotations

import ctypes

from graft.splice import client as splice
from graft.state import records
from graft.state.installation import Installation
from graft.state.records import Container


def remove_stale(graft: Installation) -> list[str]:
    """Put the records of such containers aside. Returns their names."""
    if splice.has_other_maps(graft) or any(one.is_relayed for one in _without_entry(graft)):
        splice.stop(graft.settings)  # it would serve nobody of the new data plane
    with graft.transaction():  # nobody is attaching one, or removing it
        stale = [one for one in _without_entry(graft) if not one.transport.is_supervised]
        for one in stale:
            records.put_aside(graft.settings, one)
    return [one.name for one in stale]


def _without_entry(graft: Installation) -> list[Container]:
    return [one for one in graft.containers.listing() if graft.maps.containers.get(ctypes.c_uint32(one.id)) is None]
