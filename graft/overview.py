"""What `graft ps` shows: every container with its processes, supervisor and sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft import containers, held, liveness, splice
from graft.containers import Container
from graft.errors import GraftError
from graft.held import Held
from graft.kernel import cgroup, tasks
from graft.lifecycle import supervisors_cgroup
from graft.maps import Maps
from graft.settings import Settings


@dataclass(frozen=True, slots=True)
class Seen:
    """A container as it is now. ``namespaces`` are inodes; ``supervisors`` is empty where none is needed.

    ``stuck`` are those of the supervisors that do not answer; ``sockets`` is None where the kernel did not tell.
    """

    container: Container
    processes: int
    namespaces: tuple[int, ...]
    supervisors: tuple[int, ...]
    stuck: frozenset[int]
    sockets: tuple[Held, ...] | None
    relay: Mapping[str, Any] | None = None
    """Transport splice: what graft.splice.describe tells."""


def overview(settings: Settings) -> list[Seen]:
    """Every attached container, oldest first; those whose cgroup is gone are forgotten."""
    maps = Maps(settings.pin_dir)
    containers.reap(settings, maps)
    listed = containers.listing(settings)
    with held.host_stack(settings) as stack:
        sockets = held.of(settings, listed, stack)
    supervisors = cgroup.processes(supervisors_cgroup(settings))
    stuck = liveness.stuck(supervisors)
    relays = _relays(settings, listed)
    found = []
    for container in listed:
        pids = cgroup.processes(container.cgroup_path)
        serving = supervisors_of(container, supervisors)
        found.append(
            Seen(
                container=container,
                processes=len(pids),
                namespaces=namespaces_of(pids),
                supervisors=serving,
                stuck=stuck.intersection(serving),
                sockets=None if sockets is None else tuple(sockets[container.id]),
                relay=relays.get(container.id),
            )
        )
    return found


def _relays(settings: Settings, listed: Sequence[Container]) -> dict[int, Mapping[str, Any]]:
    """What graftd tells of the containers that it serves. One that does not answer is not asked again."""
    found: dict[int, Mapping[str, Any]] = {}
    problem = None
    for container in listed:
        if container.transport != "splice":
            continue
        try:
            found[container.id] = _silent(problem) if problem else splice.describe(settings, container)
        except GraftError as error:
            problem = error.message
            found[container.id] = _silent(problem)
    return found


def _silent(problem: str) -> Mapping[str, Any]:
    return {"serves": False, "problem": problem}


def namespaces_of(pids: Sequence[int]) -> tuple[int, ...]:
    """Inodes of the network namespaces of these processes."""
    seen = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # one that ended meanwhile
            seen.add(os.stat(f"/proc/{pid}/ns/net").st_ino)
    return tuple(sorted(seen))


def supervisors_of(container: Container, supervisors: Sequence[int]) -> tuple[int, ...]:
    """The processes that serve a container: children of its holder, among those of the supervisors' cgroup."""
    if not container.pid:
        return ()
    known = ((pid, tasks.activity(pid)) for pid in supervisors)
    return tuple(pid for pid, found in known if found is not None and found.parent == container.pid)
