"""What `graft ps` shows: every container with its processes, supervisor and sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.datapath.dataplane import supervisors_cgroup
from graft.errors import GraftError
from graft.kernel import cgroup, tasks
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.splice import client as splice
from graft.state import inventory, liveness
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class ContainerOverview:
    """A container as it is now. ``namespaces`` are inodes; ``supervisors`` is empty where none is needed.

    ``stuck`` are those of the supervisors that do not answer; ``sockets`` is None where the kernel did not tell.
    """

    container: Container
    processes: int
    namespaces: tuple[int, ...]
    supervisors: tuple[int, ...]
    stuck: frozenset[int]
    sockets: tuple[ContainerSocket, ...] | None
    relay: Mapping[str, Any] | None = None
    """Transport splice: what graft.splice.client.describe tells."""


def overview(graft: Installation) -> list[ContainerOverview]:
    """Every attached container, oldest first; those whose cgroup is gone are forgotten."""
    settings = graft.settings
    graft.reap()
    listed = graft.containers.listing()
    with inventory.host_stack(graft) as stack:
        sockets = inventory.sockets_by_container(settings, listed, stack)
    supervisors = cgroup.processes(supervisors_cgroup(settings))
    stuck = liveness.stuck(supervisors)
    relays = _relays(settings, listed)
    found = []
    for container in listed:
        pids = cgroup.processes(container.cgroup_path)
        serving = supervisors_of(container, supervisors)
        found.append(
            ContainerOverview(
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
        if container.transport is not Transport.SPLICE:
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
