"""`graft down`: removes everything of Graft, so that the machine is as it was before."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from graft.commands import watcher_process
from graft.datapath import attachments, dataplane
from graft.errors import ConflictError, GraftError, KernelError
from graft.kernel import cgroup, netns
from graft.kernel.credentials import require_root
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.saved.store import Store
from graft.splice import client as splice
from graft.state import begun, bound_sockets, helper_process, leftovers, members, records
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap import fork_servers

_TIMEOUT = 2.0  # seconds, for each kind of call about folders that a process can hold
_SEARCH_TIMEOUT = 10.0
_END_TIMEOUT = 5.0  # for processes of Graft's that were killed


def down(settings: Settings, force: bool = False, forget: bool = False) -> None:
    """Remove every pin, attachment, cgroup and file of Graft. Safe to repeat.

    What is saved stays, for the next `graft up`, unless ``forget``.

    Raises ConflictError while containers are running, unless ``force``. Then it also kills the processes of containers
    with transport swap: their sockets on the host's stack must not outlive the hooks that confine them. Other
    containers are detached, and continue to run.

    graftd may not end, because a call of its waits in the kernel: it is killed with Graft's cgroup.

    Whoever may list a folder of the cgroup tree can hold it (graft/state/folder_calls.py): all calls about those that
    are not Graft's own are made in children. Whoever has a socket of a container can keep a process of Graft's in the
    kernel by its lock (graft/state/helper_process.py), and with it Graft's cgroup. Raises KernelError where something
    could not be removed for that, when all else is.
    """
    require_root()
    problems, was_watching = [], False
    try:
        was_watching = watcher_process.stop(settings)
    except KernelError as error:
        problems.append(error.message)
    try:
        problems += _down(settings, force)
    except ConflictError:
        if was_watching:
            watcher_process.ensure_running(settings)
        raise
    if forget:
        try:
            Store(settings).forget_all()
        except KernelError as error:  # a process that does not end has the lock on what is saved
            problems.append(error.message)
    if problems:
        raise KernelError("; ".join(problems), "everything else is removed; `graft down` again when that has ended")


def _down(settings: Settings, force: bool) -> list[str]:
    """Gives what could not be removed, and why."""
    graft_cgroup, unstopped = cgroup.v2_mount() / settings.cgroup, ""
    if force or not any(records.folder_of(settings).glob("*.json")):
        unstopped = _stop_graftd(settings)
        fork_servers.stop_all(settings)
    with dataplane.locked(settings):
        own = members.of_each([graft_cgroup]).get(graft_cgroup)
        running = "some" if own is None else len(own.pids)
        populated = _populated(settings)
        if (running or populated) and not force:
            raise ConflictError(
                f"{len(populated)} containers and {running} processes are under Graft",
                "detach or end them, or use `graft down --force`",
            )
        _kill([path for path, swapped in populated.items() if swapped])
        if running:
            cgroup.kill(graft_cgroup)
        _is_removed(graft_cgroup, _END_TIMEOUT)  # what ends now has ended before its hooks go
        problems = [unstopped] if unstopped and splice.runs(settings) else []
        _close_leftovers(settings)
        is_detached = _detach_all(settings, graft_cgroup, frozenset() if own is None else own.cgroups)
        dataplane.remove(settings)
        for pin in (settings.run_dir / "netns").glob("*"):
            netns.release(pin)
        bound_sockets.release(settings, lambda _container, _endpoint: True)
        bound_sockets.remove_released(settings)
        is_folder_removed = bool(helper_process.run_each(_remove_folder, [settings.run_dir], _TIMEOUT).results)
        if not _is_removed(graft_cgroup, patience=0):
            problems.append(_why_kept(graft_cgroup))
        if not is_folder_removed:
            problems.append(f"cannot remove {settings.run_dir}: somebody holds the directory above")
        if not is_detached:
            problems.append("programs may still be attached: somebody holds a directory of the cgroup tree")
        return problems


def _stop_graftd(settings: Settings) -> str:
    """Gives what is wrong, if it does not end by itself."""
    try:
        splice.stop(settings)
    except KernelError as error:
        return error.message
    return ""


def _is_removed(path: Path, patience: float) -> bool:
    """Remove a cgroup whose processes were killed; False where one of them has not ended in time."""
    try:
        cgroup.remove(path, patience)
    except KernelError:
        return False
    return True


def _why_kept(path: Path) -> str:
    own = members.of_each([path]).get(path)
    pids = ", ".join(map(str, own.pids)) if own is not None else ""
    what = f"killed processes wait in the kernel ({pids})" if pids else "somebody holds it"
    return f"cannot remove the cgroup {path}: {what}"


def _kill(paths: Sequence[Path]) -> None:
    done = helper_process.run_each(cgroup.kill, paths, _TIMEOUT).results
    for index, path in enumerate(paths):
        if index not in done:
            raise members.held(str(path))


def _detach_all(settings: Settings, graft_cgroup: Path, own: Collection[int]) -> bool:
    """Detach the programs from every cgroup; False if there may be more, which a search did not find in time.

    Not from Graft's own, whose ids are ``own``: they are gone by now, or what is in them still is under the hooks.
    Noted before: if this is killed, the next command does it for all that had a record.
    """
    for one in records.read_all(settings)[0]:
        begun.take_back(settings, one.id)
    recorded = [*records.read_all(settings)[0], *begun.listing(settings)]
    lost = [*records.all_put_aside(settings), *_lost(settings, recorded)]
    are_detached = helper_process.run_each(
        lambda one: attachments.detach_predecessors(one.cgroup_path, one.cgroup_id), lost, _TIMEOUT
    ).results
    if not (settings.pin_dir / "scopes").exists():
        return len(are_detached) == len(lost)
    done = helper_process.run_each(
        lambda one: attachments.detach(settings, one.cgroup_path), recorded, _TIMEOUT
    ).results
    known = {one.cgroup_id for index, one in enumerate(recorded) if index in done}.union(own)
    if attachments.scope_ids(settings) <= known:
        return True
    search = partial(attachments.detach_all, settings)
    return bool(helper_process.run_each(search, [graft_cgroup], _SEARCH_TIMEOUT).results)


def _lost(settings: Settings, containers: Sequence[Container]) -> list[Container]:
    """Those whose data plane is gone: somebody removed the pins, and nobody has put their records aside since."""
    try:
        if not dataplane.is_up(settings):
            return list(containers)
    except ConflictError:  # of another version, which has them
        return []
    with Installation(settings) as graft:
        return [one for one in containers if graft.maps.containers.get(ctypes.c_uint32(one.id)) is None]


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _close_leftovers(settings: Settings) -> None:
    if (settings.pin_dir / "tags").exists():
        with contextlib.suppress(GraftError), Installation(settings) as graft:
            leftovers.close_all(graft)


def _populated(settings: Settings) -> dict[Path, bool]:
    """The attached cgroups that have processes, and whether their transport is swap."""
    found, unreadable = records.read_all(settings)
    answers = helper_process.run_each(lambda one: one.is_populated, found, _TIMEOUT).results
    populated = {
        one.cgroup_path: one.transport.is_supervised for index, one in enumerate(found) if answers.get(index, True)
    }
    if unreadable and (settings.pin_dir / "scopes").exists():
        unrecorded = helper_process.run_one(lambda: _unrecorded(settings), _SEARCH_TIMEOUT)
        if unrecorded is None:
            raise members.held(str(cgroup.v2_mount()))
        populated = unrecorded | populated
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
