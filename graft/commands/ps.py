"""`graft ps`: every attached container with its processes, supervisors and sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.datapath.dataplane import supervisors_cgroup
from graft.errors import GraftError
from graft.kernel import cgroup, netns, tasks
from graft.model.settings import Settings
from graft.splice import client as splice
from graft.state import inventory, liveness
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class ContainerOverview:
    """A container as it is now. ``namespaces`` are inodes; ``supervisors`` is empty if it needs none.

    ``stuck`` are those of the supervisors that are stuck; ``sockets`` is None if the kernel did not list them in time.
    """

    container: Container
    processes: int
    namespaces: tuple[int, ...]
    supervisors: tuple[int, ...]
    stuck: frozenset[int]
    sockets: tuple[ContainerSocket, ...] | None
    relay: Mapping[str, Any] | None = None
    """Where graftd relays for it: the result of graft.splice.client.describe."""


def overview(graft: Installation) -> list[ContainerOverview]:
    """Every attached container, oldest first; removes those whose cgroup is gone."""
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
        its_supervisors = supervisors_of(container, supervisors)
        found.append(
            ContainerOverview(
                container=container,
                processes=len(pids),
                namespaces=tuple(sorted(netns.inodes_of(pids))),
                supervisors=its_supervisors,
                stuck=stuck.intersection(its_supervisors),
                sockets=None if sockets is None else tuple(sockets[container.id]),
                relay=relays.get(container.id),
            )
        )
    return found


def _relays(settings: Settings, listed: Sequence[Container]) -> dict[int, Mapping[str, Any]]:
    """graftd's description of each container that it serves. After one failed request no other is sent."""
    found: dict[int, Mapping[str, Any]] = {}
    problem = None
    for container in listed:
        if not container.is_relayed:
            continue
        try:
            found[container.id] = _not_served(problem) if problem else splice.describe(settings, container)
        except GraftError as error:
            problem = error.message
            found[container.id] = _not_served(problem)
    return found


def _not_served(problem: str) -> Mapping[str, Any]:
    return {"serves": False, "problem": problem}


def supervisors_of(container: Container, supervisors: Sequence[int]) -> tuple[int, ...]:
    """The processes that serve a container: children of its keeper's process, in the supervisors' cgroup."""
    if not container.pid:
        return ()
    activities = ((pid, tasks.activity(pid)) for pid in supervisors)
    return tuple(pid for pid, activity in activities if activity is not None and activity.parent == container.pid)
