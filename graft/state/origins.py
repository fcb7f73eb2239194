"""In which cgroups the sockets of containers were made: only those are listed where others have too many.

A socket of a container was made in one of its cgroups, or by its supervisor, in that one's cgroup; an accepted one
counts as made where its listener was. What a container was handed from elsewhere no rule has granted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from graft.datapath.dataplane import own_cgroup
from graft.kernel import cgroup
from graft.model.settings import Settings
from graft.state import members
from graft.state.members import Members
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class Origins:
    """Cgroups by their ids. ``are_all``: no socket was made in another one, as one that is gone by now."""

    cgroups: frozenset[int]
    are_all: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where sockets are, paths of namespaces, and in which cgroups they were made."""

    paths: tuple[Path, ...]
    cgroups: frozenset[int]


def of_ended(settings: Settings, containers: Iterable[Container]) -> frozenset[int]:
    """The cgroups of containers that have ended, and of their supervisors. What was below them nobody knows."""
    found = set()
    for one in containers:
        found |= {one.cgroup_id, *_own(settings, one)}
    return frozenset(found)


def of_each(settings: Settings, containers: Iterable[Container]) -> frozenset[int]:
    """The same of containers that are there, with the cgroups below theirs, where nobody holds the folders."""
    listed = list(containers)
    inside = members.of_each([one.cgroup_path for one in listed])
    return of_ended(settings, listed).union(*(one.cgroups for one in inside.values()))


def of(settings: Settings, container: Container, inside: Members | None = None) -> Origins:
    """Those of a container; ``inside`` is what is in its cgroups, if that is known already."""
    if inside is None:
        inside = members.of_each([container.cgroup_path]).get(container.cgroup_path, unknown(container))
    own = _own(settings, container)
    are_all = inside.are_all and (bool(own) or not container.transport.is_supervised)
    return Origins(inside.cgroups | {container.cgroup_id} | own, are_all)


def unknown(container: Container) -> Members:
    """What is in the cgroups of a container where somebody holds one of the folders."""
    return Members((), frozenset([container.cgroup_id]), are_all=False)


def _own(settings: Settings, container: Container) -> frozenset[int]:
    """The cgroup of its supervisors, in which replacement sockets were made."""
    with contextlib.suppress(OSError):
        return frozenset([cgroup.cgroup_id(own_cgroup(settings, container.id))])
    return frozenset()
