"""`graft down`: removes everything of Graft, so that the machine is as it was before."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
from pathlib import Path

from graft.datapath import attachments, dataplane
from graft.errors import ConflictError, GraftError
from graft.kernel import cgroup, netns
from graft.kernel.credentials import require_root
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.splice import client as splice
from graft.state import bound_sockets, leftovers, records
from graft.state.installation import Installation


def down(settings: Settings, force: bool = False) -> None:
    """Remove every pin, attachment, cgroup and file of Graft. Safe to repeat.

    Raises ConflictError while containers are running, unless ``force``. Then it also kills the processes of containers
    with transport swap: their sockets on the host's stack must not outlive the hooks that confine them. Other
    containers are detached, and continue to run.
    """
    require_root()
    graft_cgroup = cgroup.v2_mount() / settings.cgroup
    if force or not any(records.folder_of(settings).glob("*.json")):
        splice.stop(settings)
    with dataplane.locked(settings):
        running = cgroup.processes(graft_cgroup)
        populated = _populated(settings)
        if (running or populated) and not force:
            raise ConflictError(
                f"{len(populated)} containers and {len(running)} processes are under Graft",
                "detach or end them, or use `graft down --force`",
            )
        for path, swapped in populated.items():
            if swapped:
                cgroup.kill(path)
        if running:
            cgroup.kill(graft_cgroup)
        if graft_cgroup.exists():
            cgroup.remove(graft_cgroup)
        _close_leftovers(settings)
        attachments.detach_all(settings)
        dataplane.unpin(settings.pin_dir)
        for pin in (settings.run_dir / "netns").glob("*"):
            netns.release(pin)
        bound_sockets.release(settings, lambda _container, _endpoint: True)
        bound_sockets.remove_released(settings)
        shutil.rmtree(settings.run_dir, ignore_errors=True)


def _close_leftovers(settings: Settings) -> None:
    if (settings.pin_dir / "tags").exists():
        with contextlib.suppress(GraftError), Installation(settings) as graft:
            leftovers.close_all(graft)


def _populated(settings: Settings) -> dict[Path, bool]:
    """The attached cgroups that have processes, and whether their transport is swap."""
    found, unreadable = records.read_all(settings)
    populated = {one.cgroup_path: one.transport.is_supervised for one in found if one.is_populated}
    if unreadable and (settings.pin_dir / "scopes").exists():
        populated = _unrecorded(settings) | populated
    return populated


def _unrecorded(settings: Settings) -> dict[Path, bool]:
    """The same from the maps alone, for records that cannot be read. A container that no map has counts as swap."""
    with Installation(settings) as graft:
        populated = {}
        for path in attachments.attached_cgroups(settings):
            scope = graft.maps.scopes.get(ctypes.c_uint64(cgroup.cgroup_id(path)))
            if scope is None or not scope.container or not cgroup.populated(path):
                continue  # it is Graft's own, or has no process
            value = graft.maps.containers.get(ctypes.c_uint32(scope.container))
            populated[path] = value is None or Transport(value.transport).is_supervised
        return populated
