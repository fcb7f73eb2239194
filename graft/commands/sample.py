"""What Graft counts, read once: for `graft metrics` and `graft top`. Nothing is changed, and Graft is not brought up.

Where a part does not answer in time (the kernel about sockets, graftd), that part is None, and the rest is there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from graft.datapath.dataplane import is_up
from graft.datapath.layout import HookDecision
from graft.datapath.maps import Maps, NotUpError
from graft.errors import GraftError
from graft.model.settings import Settings
from graft.splice import client as splice
from graft.splice.traffic import Relayed, Traffic
from graft.state import call_times, inventory, socket_counts
from graft.state.call_times import CallTimes
from graft.state.installation import Installation
from graft.state.records import Container
from graft.state.socket_counts import SocketCounts, SocketKind

REFUSALS = frozenset(HookDecision) - {HookDecision.REWRITTEN, HookDecision.CONNECTED}
"""Decisions that refuse: a bind, a connect, an option, a listener, a packet."""


@dataclass(frozen=True, slots=True)
class ContainerSample:
    """What is counted of one container. ``decisions``: how often the hooks decided what, since it is attached.

    ``sockets`` is None if the kernel did not list them in time, ``relayed`` if graftd serves it not, or did not answer,
    ``calls`` (how long its supervisors took for calls that were trapped) if it has no supervisor.
    """

    container: Container
    decisions: Mapping[HookDecision, int]
    sockets: Mapping[SocketKind, int] | None = None
    relayed: Relayed | None = None
    calls: CallTimes | None = None

    @property
    def refusals(self) -> int:
        """How often the hooks refused something."""
        return sum(count for decision, count in self.decisions.items() if decision in REFUSALS)


@dataclass(frozen=True, slots=True)
class Sample:
    """What is counted of one installation. ``taken``: when, in seconds of time.monotonic().

    ``endpoints`` are their names; ``graftd_started`` is in seconds since 1970, None where it does not run or answer.
    ``unlisted``: kinds of sockets that the kernel did not list, or not all, in time.
    """

    taken: float
    is_up: bool
    endpoints: tuple[str, ...] = ()
    containers: tuple[ContainerSample, ...] = ()
    graftd_started: float | None = None
    unlisted: tuple[str, ...] = field(default=())


def take(settings: Settings) -> Sample:
    """A sample of now. Raises ConflictError where the data plane is of another version, OSError."""
    try:
        if is_up(settings):
            with Installation(settings) as graft:
                return _take(graft)
    except NotUpError:  # `graft down` meanwhile
        pass
    return Sample(time.monotonic(), is_up=False)


def _take(graft: Installation) -> Sample:
    listed = graft.containers.listing()
    with inventory.host_stack(graft) as stack:
        endpoints = tuple(one.name for one in stack.endpoints.values())
        sockets = socket_counts.count(graft.settings, graft.maps, listed, stack)
    traffic = _traffic(graft.settings)
    decisions = _decisions(graft.maps)
    return Sample(
        taken=time.monotonic(),
        is_up=True,
        endpoints=endpoints,
        containers=tuple(
            ContainerSample(
                container=one,
                decisions=decisions.get(one.id, {}),
                sockets=None if sockets is None else sockets.by_container.get(one.id, {}),
                relayed=None if traffic is None else traffic.containers.get(one.id),
                calls=call_times.read(graft.settings, one.id),
            )
            for one in listed
        ),
        graftd_started=None if traffic is None else traffic.started,
        unlisted=_unlisted(sockets),
    )


def _unlisted(sockets: SocketCounts | None) -> tuple[str, ...]:
    return ("TCP", "bound TCP", "UDP") if sockets is None else sockets.doubts.names


def _decisions(maps: Maps) -> dict[int, dict[HookDecision, int]]:
    """How often the hooks decided what, by container."""
    known = frozenset(HookDecision)
    found: dict[int, dict[HookDecision, int]] = defaultdict(dict)
    for key, count in maps.counters.items():
        if key.decision in known:
            found[int(key.container)][HookDecision(key.decision)] = int(count.value)
    return found


def _traffic(settings: Settings) -> Traffic | None:
    """What graftd has relayed; None where it does not run, or does not answer in time."""
    try:
        return splice.traffic(settings)
    except (GraftError, OSError):
        return None
