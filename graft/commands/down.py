"""`graft down`: everything of Graft's is taken away, and the machine is as it was."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

from graft.datapath import attachments, dataplane
from graft.errors import ConflictError
from graft.kernel import cgroup, netns
from graft.kernel.credentials import require_root
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.splice import client as splice
from graft.state import records
from graft.state.installation import Installation


def down(settings: Settings, force: bool = False) -> None:
    """Remove every pin, attachment, cgroup and file of Graft's. Repeatable.

    Raises ConflictError while containers run, unless ``force``. Then the programs of containers whose
    sockets were swapped end too, whoever started them: what they have in the host's stack must not
    outlive the hooks that confine it. Other containers are detached, and run on.
    """
    require_root()
    own = cgroup.v2_mount() / settings.cgroup
    if force or not any(records.folder_of(settings).glob("*.json")):
        splice.stop(settings)
    with dataplane.locked(settings):
        running = cgroup.processes(own)
        inhabited = _inhabited(settings)
        if (running or inhabited) and not force:
            raise ConflictError(
                f"{len(inhabited)} containers and {len(running)} processes are under Graft",
                "detach or end them; `graft down --force` does both",
            )
        for path, swapped in inhabited.items():
            if swapped:
                cgroup.kill(path)
        if running:
            cgroup.kill(own)
        if own.exists():
            cgroup.remove(own)
        attachments.detach_all(settings)
        dataplane.unpin(settings.pin_dir)
        for kept in (settings.run_dir / "netns").glob("*"):
            netns.release(kept)
        shutil.rmtree(settings.run_dir, ignore_errors=True)


def _inhabited(settings: Settings) -> dict[Path, bool]:
    """The attached cgroups that any process lives in, and whether sockets of theirs were swapped."""
    found, wrong = records.read_all(settings)
    inhabited = {one.cgroup_path: one.transport is Transport.SWAP for one in found if one.is_populated}
    if wrong and (settings.pin_dir / "scopes").exists():
        inhabited = _unrecorded(settings) | inhabited
    return inhabited


def _unrecorded(settings: Settings) -> dict[Path, bool]:
    """The same by the maps alone, for where a record cannot be read. What no map knows counts as swapped."""
    with Installation(settings) as graft:
        inhabited = {}
        for path in attachments.attached_cgroups(settings):
            scope = graft.maps.scopes.get(ctypes.c_uint64(cgroup.cgroup_id(path)))
            if scope is None or not scope.container or not cgroup.populated(path):
                continue  # Graft's own, or empty
            value = graft.maps.containers.get(ctypes.c_uint32(scope.container))
            inhabited[path] = value is None or value.transport == Transport.SWAP
        return inhabited
