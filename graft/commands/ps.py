"""`graft ps`: every attached container with its processes, supervisors and sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.commands import saving, why_waiting
from graft.commands.restore import NOT_THERE, NOT_TRIED, look_for
from graft.errors import GraftError
from graft.kernel import netns
from graft.model.settings import Settings
from graft.saved.model import SavedAttachment, Target
from graft.saved.store import ATTACHMENTS, Store, file_name
from graft.splice import client as splice
from graft.state import inventory, liveness, lost_hooks, members
from graft.state.compiled_policy import endpoint_names
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket
from graft.state.records import Container
from graft.swap.resource_limits import own_cgroup


@dataclass(frozen=True, slots=True)
class ContainerOverview:
    """A container as it is now. ``processes`` is None if somebody in it holds a folder of its cgroups.

    ``namespaces`` are inodes; ``supervisors`` is empty if it needs none.

    ``stuck`` are those of the supervisors that are stuck; ``sockets`` is None if the kernel did not list them in time.
    ``unsearched`` are processes that could not be searched for sockets in time, ``unlisted`` the kinds of sockets that
    the kernel did not list in time.
    """

    container: Container
    processes: int | None
    namespaces: tuple[int, ...]
    supervisors: tuple[int, ...]
    stuck: frozenset[int]
    sockets: tuple[ContainerSocket, ...] | None
    relay: Mapping[str, Any] | None = None
    """Where graftd relays for it: the result of graft.splice.client.describe."""
    unsearched: tuple[int, ...] = ()
    unlisted: tuple[str, ...] = ()
    unhooked: str = ""
    """Why it is not confined: its hooks were detached, and could not be attached again."""


def overview(graft: Installation) -> list[ContainerOverview]:
    """Every attached container, oldest first; removes those whose cgroup is gone, and gives those that lack hooks
    theirs again.
    """
    settings = graft.settings
    graft.reap()
    listed = graft.containers.listing()
    unhooked = lost_hooks.attach_again(graft, listed)
    inside = members.of_each(
        [*(container.cgroup_path for container in listed), *(own_cgroup(settings, one.id) for one in listed)]
    )
    with inventory.host_stack(graft) as stack:
        found_sockets = inventory.sockets_by_container(settings, listed, stack, inside)
    supervisors = _supervisors(graft, listed, inside)
    stuck = liveness.stuck([pid for pids in supervisors.values() for pid in pids])
    relays = _relays(settings, listed)
    found = []
    for container in listed:
        its_members = inside.get(container.cgroup_path)
        its_supervisors = supervisors[container.id]
        found.append(
            ContainerOverview(
                container=container,
                processes=None if its_members is None else len(its_members.pids),
                namespaces=tuple(sorted(netns.inodes_of(its_members.pids))) if its_members else (),
                supervisors=its_supervisors,
                stuck=stuck.intersection(its_supervisors),
                sockets=None if found_sockets is None else tuple(found_sockets.sockets[container.id]),
                relay=relays.get(container.id),
                unsearched=() if found_sockets is None else found_sockets.unsearched[container.id],
                unlisted=() if found_sockets is None else found_sockets.doubts.names,
                unhooked=unhooked.get(container.id, ""),
            )
        )
    return found


def _supervisors(
    graft: Installation, listed: Sequence[Container], inside: Mapping[Path, members.Members]
) -> dict[int, tuple[int, ...]]:
    """The supervisors of each container: what has a desk, in the cgroup of its supervisors."""
    with_desk = {pid.value for pid in graft.maps.desk_slots.keys()}  # noqa: SIM118
    found = {}
    for container in listed:
        own = inside.get(own_cgroup(graft.settings, container.id))
        found[container.id] = tuple(sorted(with_desk.intersection(own.pids))) if own is not None else ()
    return found


@dataclass(frozen=True, slots=True)
class Waiting:
    """A container that is saved and not there: it is attached when it appears. ``why`` is from when that was tried."""

    saved: SavedAttachment
    why: str

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Those that its rules name."""
        return endpoint_names(self.saved.policy)


def waiting(graft: Installation) -> list[Waiting]:
    """Every container that is waited for. Raises RefusedError if others can write what is saved."""
    store = Store(graft.settings)
    state = store.read()[0]
    waits = [one for one in saving.waiting(graft, state) if not store.is_paused(ATTACHMENTS, file_name(one.target))]
    why = _reasons(graft, state.attachments, waits)
    return [Waiting(one, why[one.target]) for one in waits]


def _reasons(
    graft: Installation, saved: Sequence[SavedAttachment], waits: Sequence[SavedAttachment]
) -> Mapping[Target, str]:
    """Why each of these waits, as that is noted. Of one that did not wait then it is looked now whether it is there.
    ``saved``: all that are.
    """
    noted = why_waiting.noted(graft.settings)
    otherwise = why_waiting.NOT_NOTED if noted is None else noted.get(why_waiting.EACH)
    reasons = {one.target: (noted or {}).get(one.target.text, otherwise) for one in waits}
    others = [one for one in waits if reasons[one.target] is None]
    found, unknown = look_for(graft, others, saved) if others else ({}, {})
    looked = dict.fromkeys((one.target for one in others), NOT_THERE) | dict.fromkeys(found, NOT_TRIED) | unknown
    return looked | {target: why for target, why in reasons.items() if why is not None}


def unread(settings: Settings) -> list[str]:
    """A line for each file of what is saved that cannot be used now. Raises RefusedError as `waiting`."""
    store = Store(settings)
    return [one.line for one in store.read()[1]] if store.exists else []


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
