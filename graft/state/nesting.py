"""Refuses to attach a cgroup above or below one that is attached: each call would be decided twice."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable
from pathlib import Path

from graft.datapath import attachments
from graft.datapath.maps import Maps
from graft.errors import ConflictError, RefusedError
from graft.kernel import cgroup
from graft.model.settings import Settings
from graft.state import helper_process, members
from graft.state.records import Container


def refuse_below(path: Path, besides: Collection[Path] = ()) -> None:
    """Raises RefusedError where programs of Graft's, of any installation, are attached to a cgroup below ``path``,
    ``besides`` these; KernelError where a folder there is held, so that this cannot be found out.

    Without the lock, and in a child: this lists the tree. What this installation attaches meanwhile has a record.
    """
    found = helper_process.run_one(lambda: [attachments.find_below(path, besides)])
    if found is None:
        raise members.held(str(path))
    if found[0] is not None:
        raise _nested(path, found[0])


def refuse(settings: Settings, maps: Maps, path: Path, listed: Iterable[Container], replaces: bool = False) -> None:
    """Raises ConflictError where ``path`` is attached, RefusedError where a cgroup above it is, or one of ``listed``
    above or below: it may lack hooks, and gets them again. Under the lock; detaches what a killed command has left on
    it. ``replaces``: the hooks on it are to be replaced, and are in nobody's way.
    """
    number = number_at(maps, path)
    if not replaces and number and maps.containers.get(ctypes.c_uint32(number)) is None:
        attachments.detach(settings, path)
    other = attachments.find_above(path.parent if replaces else path)
    if other == path:
        raise ConflictError(f"cgroup: {path} is already attached", "graft ps")
    other = other or next((one for one in map(_path, listed) if path in one.parents or one in path.parents), None)
    if other is not None:
        raise _nested(path, other)


def refuse_above(path: Path) -> None:
    """Raises RefusedError where programs of Graft's are attached to a cgroup above ``path``. Under the lock."""
    other = attachments.find_above(path.parent)
    if other is not None:
        raise _nested(path, other)


def is_anothers(maps: Maps, path: Path, number: int) -> bool:
    """Whether hooks of these maps take the cgroup at ``path`` for a container other than ``number``. Not for one that
    has no entry: a scope stays in the maps when its hooks are detached.
    """
    at = number_at(maps, path)
    return at not in (0, number) and maps.containers.get(ctypes.c_uint32(at)) is not None


def number_at(maps: Maps, path: Path) -> int:
    """The number of the container that hooks of these maps take the cgroup at ``path`` for, or took when it last had
    any; 0 where there is none.
    """
    try:
        scope = maps.scopes.get(ctypes.c_uint64(cgroup.cgroup_id(path)))
    except FileNotFoundError:
        return 0
    return 0 if scope is None else int(scope.container)


def _path(container: Container) -> Path:
    return container.cgroup_path


def _nested(path: Path, other: Path) -> RefusedError:
    where = "below" if path.is_relative_to(other) else "above"
    return RefusedError(
        f"cgroup: {path} lies {where} {other}, which is attached: each call would be decided twice",
        "detach the other one first: graft detach",
    )
